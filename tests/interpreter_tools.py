"""What shows a kernel's faults without a GPU, and the calls that all kernels are shown with.

In Triton's interpreter a kernel's programs run one after another on the CPU, on real addresses. So
they can be run in any order or only a few of them, each tensor can be laid against a page that
kills who touches it, and every sum and product of 32-bit integers can be checked for overflow.
"""

import builtins
import ctypes
import itertools
import mmap
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import op_cases
import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from op_cases import CASES, Case
from torch import Tensor, library

from bert_fast.ops import registry

in_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="shown in Triton's interpreter, which is off beside a GPU"
)


def in_long(*values: Any) -> list[Any]:
    """Parameters that only `make test-long` takes."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


# --- calls ---------------------------------------------------------------------------------------

# the operator of the namespace bert_fast that a public function's kernel serves
KERNELS = {
    "embed": "embed",
    "layer_norm": "add_layer_norm",
    "add_layer_norm": "add_layer_norm",
    "gelu": "bias_gelu",
    "linear": "column_sums",
    "linear_gelu": "linear_gelu",
    "attention": "attention",
    "linear_cross_entropy": "linear_cross_entropy",
}
PRODUCTS = ("linear", "linear_gelu", "linear_cross_entropy")  # bits are PyTorch's product's


def function(name: str) -> str:
    """The public function of a case of that name."""
    return name.partition("-")[0]


def has_kernel(name: str) -> bool:
    return KERNELS[function(name)] in registry.kernels


# Kernels take head sizes of 8 to 128 in steps of 8.
_attention = {
    "attention": partial(op_cases.attention_case, K=16),
    "attention-slack": partial(op_cases.attention_case, (0, 2, 4, 0), H=1, K=24, slack=2),
    "attention-dropout": partial(op_cases.attention_case, K=16, p=0.3),
}
# Of the batch-invariant mode only kernels are shown here: test_invariant has the CPU.
_invariant = {
    "linear-invariant": partial(op_cases.linear_case, invariant=True),
    "linear_gelu-invariant": partial(
        op_cases.linear_case, T=9, bias=False, activation="gelu", invariant=True
    ),
}
ALL_CASES = CASES | _attention | _invariant
KERNEL_CASES = {name: make for name, make in ALL_CASES.items() if has_kernel(name)}
every_kernel_case = pytest.mark.parametrize("make", KERNEL_CASES.values(), ids=KERNEL_CASES)
FUNCTIONS = [name for name in KERNELS if has_kernel(name)]
some_dtypes = pytest.mark.parametrize(
    "dtype",
    [op_cases.KERNEL_DTYPES[0], *in_long(*op_cases.KERNEL_DTYPES[1:])],
    ids=[str(dtype)[6:] for dtype in op_cases.KERNEL_DTYPES],
)
every_function = pytest.mark.parametrize("name", FUNCTIONS)

ROWS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65)
MANY_ROWS = (0, 127, 129, 255, 256, 257, 300, 511, 513)  # around the number of partial sums
COLUMNS = (1, 2, 3, 7, 8, 9, 16, 31, 33, 64, 65, 100, 129)
LENGTHS = (0, 0, 1, 1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65)
LONG_LENGTHS = (127, 128, 129, 130, 191, 193, 255, 257)


def draw(name: str, rng: random.Random, many: bool = False, p: float | None = None) -> Case:
    """A small call of the function: odd sizes around the powers of two; `many`: more rows too."""
    T, D = rng.choice(ROWS), rng.choice(COLUMNS)
    if many and rng.random() < 0.3:
        T, D = rng.choice(MANY_ROWS), rng.choice(COLUMNS[:8])
    p = rng.choice((0.0, 0.0, 0.1, 0.5)) if p is None else p
    site, data = rng.randrange(40), rng.choice(op_cases.DATA)
    if name == "embed":
        sizes = rng.choice((1, 2, 5, 40)), rng.choice((1, 7, 64)), rng.choice((1, 2, 5))
        with_ids, pad_id = rng.random() < 0.8, rng.choice((None, 0))
        ids_dtype = rng.choice((torch.int64, torch.int32))
        return op_cases.embed_case(
            T, D, sizes=sizes, with_ids=with_ids, ids_dtype=ids_dtype, pad_id=pad_id,
            p=p, site=site, data=data,
        )  # fmt: skip
    if name == "layer_norm":
        return op_cases.layer_norm_case(T, D, residual=False, data=data)
    if name == "add_layer_norm":
        residual = rng.random() < 0.8 or not p
        return op_cases.layer_norm_case(T, D, residual=residual, p=p, site=site, data=data)
    if name == "gelu":
        activation = rng.choice(("gelu", "gelu_new", "relu"))
        bias = rng.random() < 0.7
        return op_cases.gelu_case(T, D, bias=bias, activation=activation, data=data)
    if name == "attention":
        lengths = [rng.choice(LENGTHS) for _ in range(rng.randrange(1, 6))]
        if many and rng.random() < 0.4:
            lengths[0] = rng.choice(LONG_LENGTHS)
        K, H = 8 * rng.randrange(1, 17), rng.choice((1, 2, 3))
        slack = rng.choice((0, 0, 1, 5))
        return op_cases.attention_case(lengths, H, K, slack=slack, p=p, site=site, data=data)
    bias, F = rng.random() < 0.7, rng.choice(COLUMNS[2:])
    if name == "linear_cross_entropy":
        return op_cases.cross_entropy_case(T, D, F, bias=bias, data=data)
    activation = None if name == "linear" else rng.choice(("gelu", "gelu_new", "relu"))
    sizes = {"T": T, "D": D, "F_": F, "bias": bias, "activation": activation, "data": data}
    return op_cases.linear_case(**sizes, invariant=rng.random() < 0.5)


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """The kernels serve the ops, as in the fixture kernel_device."""
    ours = library.Library("bert_fast", "IMPL")
    for name, kernel in registry.kernels.items():
        ours.impl(name, kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        ours._destroy()


def raw(name: str, **arguments: Any) -> Any:
    """Call the operator with those of the arguments that its schema names; others by default."""
    operator = getattr(torch.ops.bert_fast, name).default
    known = operator._schema.arguments
    names = [a.name for a in known if a.name in arguments or not a.has_default_value()]
    return operator(**{n: arguments[n] for n in names})


# --- which programs run, and in which order ------------------------------------------------------

Program = tuple[int, int, int]


@contextmanager
def programs(choose: Callable[[Program], Sequence[Program]]) -> Iterator[None]:
    """Of each grid only the programs that `choose` returns, in that order."""
    builder = interpreter.interpreter_builder
    launch = interpreter.GridExecutor.__call__

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        x, y, z = (*self.grid, 1, 1)[:3]
        chosen = choose((x, y, z))
        self.grid = (len(chosen),)

        def set_dim(*_: int) -> None:
            builder.grid_dim = x, y, z

        def set_index(i: int, *_: int) -> None:
            builder.grid_idx = chosen[i]

        with mock.patch.multiple(builder, set_grid_dim=set_dim, set_grid_idx=set_index):
            launch(self, *args, **kwargs)

    with mock.patch.object(interpreter.GridExecutor, "__call__", run):
        yield


def shuffled(seed: int) -> Callable[[Program], list[Program]]:
    """For `programs`: all of them, in an order that the seed makes."""
    rng = random.Random(seed)

    def choose(grid: Program) -> list[Program]:
        every = list(itertools.product(*map(range, grid)))
        rng.shuffle(every)
        return every

    return choose


def ends(last: int, first: int = 0) -> Callable[[Program], list[Program]]:
    """For `programs`: that many of the first and of the last."""

    def choose(grid: Program) -> list[Program]:
        x, y, z = grid
        size = x * y * z
        flat = [*range(min(first, size)), *range(max(first, size - last), size)]
        return [(i // (y * z), i // z % y, i % z) for i in flat]

    return choose


# --- overflow ------------------------------------------------------------------------------------


def _typed_range(*bounds: Any, **_: Any) -> Iterator[Any]:
    """A loop's counter as the compiler has it, of 32 or 64 bits, not a Python int of any length."""
    start, end, step = {1: (0, *bounds, 1), 2: (*bounds, 1)}.get(len(bounds), bounds)
    wide = any(isinstance(b, tl.tensor) and b.dtype.int_bitwidth == 64 for b in bounds)
    dtype, np_dtype = (tl.int64, np.int64) if wide else (tl.int32, np.int32)
    for i in builtins.range(start, end, step):
        yield tl.tensor(interpreter.TensorHandle(np.array([i], dtype=np_dtype), dtype), dtype)


@contextmanager
def overflow_is_an_error() -> Iterator[None]:
    """A sum, difference or product of integers of 32 bits that wraps raises InterpreterError."""
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    module_globals: list[dict[str, Any]] = []
    running = False

    def range_(*bounds: Any, **options: Any) -> Any:
        return _typed_range(*bounds, **options) if running else builtins.range(*bounds)

    def patch(fn: Any) -> Any:
        scope = patch_lang(fn)
        for lang in (tl, tl.core):
            scope.set_attr(lang, "range", range_)
        fn.__globals__["range"] = range_
        module_globals.append(fn.__globals__)
        return scope

    def run(*args: Any, **kwargs: Any) -> None:
        nonlocal running
        running = True
        try:
            launch(*args, **kwargs)
        finally:
            running = False

    options = interpreter.InterpreterOptions(debug=True)
    with (
        mock.patch.object(interpreter.interpreter_builder, "options", options),
        mock.patch.object(interpreter, "_patch_lang", patch),
        mock.patch.object(interpreter.GridExecutor, "__call__", run),
    ):
        try:
            yield
        finally:
            for names in module_globals:
                names.pop("range", None)


LARGE = 1 << 26  # bytes
MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


def lazy(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written to."""
    count = 1
    for size in shape:
        count *= size
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


@contextmanager
def lazy_allocations() -> Iterator[None]:
    """What is large and made by torch.empty, zeros, their like and new_ forms is `lazy`."""

    def shape_of(args: Sequence[Any]) -> tuple[int, ...]:
        one = len(args) == 1 and not isinstance(args[0], int)
        return tuple(args[0] if one else args)

    def replaced(original: Callable, form: str) -> Callable:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            if form == "like":
                shape, dtype = args[0].shape, kwargs.get("dtype") or args[0].dtype
            elif form == "new":
                shape, dtype = shape_of(args[1:]), kwargs.get("dtype") or args[0].dtype
            else:
                shape, dtype = shape_of(args), kwargs.get("dtype") or torch.get_default_dtype()
            count = 1
            for size in shape:
                count *= size
            if count * dtype.itemsize < LARGE:
                return original(*args, **kwargs)
            return lazy(shape, dtype)

        return make

    with mock.patch.multiple(
        torch,
        **{n: replaced(getattr(torch, n), "plain") for n in ("empty", "zeros")},
        **{n: replaced(getattr(torch, n), "like") for n in ("empty_like", "zeros_like")},
    ), mock.patch.multiple(
        Tensor, **{n: replaced(getattr(Tensor, n), "new") for n in ("new_empty", "new_zeros")}
    ):  # fmt: skip
        yield


# --- guard pages ---------------------------------------------------------------------------------

SIDES = ("before", "after")
_libc = ctypes.CDLL(None, use_errno=True)


class _Guarded:
    """`size` bytes with a page before and a page after them that nobody may touch.

    They lie directly behind the one, or directly before the other.
    """

    def __init__(self, size: int, side: str):
        page = mmap.PAGESIZE
        inner = -(-size // page) * page
        self.memory = mmap.mmap(-1, inner + 2 * page)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for at in (begin, begin + page + inner):
            if _libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(page), 0):  # PROT_NONE
                raise OSError(ctypes.get_errno(), "mprotect")
        self.offset = page if side == "before" else page + inner - size
        self.address, self.size = begin + self.offset, size

    def tensor(self) -> Tensor:
        return torch.frombuffer(self.memory, dtype=torch.uint8, offset=self.offset, count=self.size)


@contextmanager
def guard_pages(side: str) -> Iterator[None]:
    """Every tensor that a kernel is given lies against a guard page: a touch kills the process.

    Inputs, outputs and scratch alike: each launch works on copies of its tensors, which go back
    afterwards. Views of one tensor stay views of one copy, from the first byte of any of them to
    the last.
    """
    launch = interpreter.GridExecutor.__call__

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        spans: dict[int, tuple[int, int]] = {}
        for t in (*args, *kwargs.values()):
            if isinstance(t, Tensor) and t.numel():
                reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
                low, high = t.data_ptr(), t.data_ptr() + reach * t.element_size()
                key = t.untyped_storage().data_ptr()
                before = spans.get(key, (low, high))
                spans[key] = min(low, before[0]), max(high, before[1])
        copies = {key: _Guarded(high - low, side) for key, (low, high) in spans.items()}
        for key, copy in copies.items():
            ctypes.memmove(copy.address, spans[key][0], copy.size)

        def moved(t: Any) -> Any:
            if not isinstance(t, Tensor) or not t.numel():
                return t
            key = t.untyped_storage().data_ptr()
            bytes_ = copies[key].tensor()
            offset = (t.data_ptr() - spans[key][0]) // t.element_size()
            return bytes_.view(t.dtype).as_strided(t.shape, t.stride(), offset)

        launch(self, *map(moved, args), **{name: moved(t) for name, t in kwargs.items()})
        for key, copy in copies.items():
            ctypes.memmove(spans[key][0], copy.address, copy.size)

    with mock.patch.object(interpreter.GridExecutor, "__call__", run):
        yield


# --- planted faults ------------------------------------------------------------------------------


@triton.jit
def double(x_ptr, y_ptr, n, first, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """y = 2 x, n numbers; without MASKED it reads x from `first`, and whole blocks to the end."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    else:
        x = tl.load(x_ptr + at + first)
    tl.store(y_ptr + at, 2 * x, mask=at < n)


@triton.jit
def read_row(x_ptr, y_ptr, first, stride, N: tl.constexpr, WIDE: tl.constexpr, LOOP: tl.constexpr):
    """Row first + program of x, also as a loop's counter; without WIDE offsets are of 32 bits."""
    row = first + tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    at = tl.arange(0, N)
    y_ptr += tl.program_id(0) * N
    if LOOP:
        for i in range(row, row + 1):
            tl.store(y_ptr + at, tl.load(x_ptr + i * stride + at))
    else:
        tl.store(y_ptr + at, tl.load(x_ptr + row * stride + at))


@triton.jit
def sum_rows(x_ptr, y_ptr, R, N: tl.constexpr, ATOMIC: tl.constexpr):
    """Program i sums rows i R to (i + 1) R of x (., N): into row i of y, or all ATOMIC into y."""
    at = tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for r in range(R):
        total += tl.load(x_ptr + (tl.program_id(0) * R + r) * N + at)
    if ATOMIC:
        tl.atomic_add(y_ptr + at, total)
    else:
        tl.store(y_ptr + tl.program_id(0) * N + at, total)


@triton.jit
def sum_columns(x_ptr, y_ptr, D, BLOCK: tl.constexpr):
    """y[i] = sum of row i of x (., D), BLOCK columns at a time: the tile sets the rounding."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, D, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + row * D + at, mask=at < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + row, tl.sum(total, axis=0))
