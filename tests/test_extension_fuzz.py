"""The compiled operators on random calls, and on arguments that do not fit."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import extension_fuzz
import op_cases
import optimizer_cases
import pytest
import torch
from extension_fuzz import Drawn, call, check_public, check_raw, moved, spread, steps
from torch import Tensor

from bert_fast import reference
from bert_fast.ops import products

poison = op_cases.poison
COUNTS = {"attention": 110, "add_layer_norm": 110, "embed": 110, "bias_gelu": 80, "linear_gelu": 40}
MANY = 18  # times as many in a long run
pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(autouse=True)
def one_thread():
    """Cases take others as they need them; small ones are slower by several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cases(count: int, first: int = 0) -> Iterator[tuple[int, random.Random]]:
    """Numbers of cases, each with its own chance; torch's goes with it."""
    for number in range(first, first + count):
        torch.manual_seed(number)
        yield number, random.Random(number)


def counts(of: int) -> Any:
    """A few cases, and in a long run many others."""
    long = pytest.param(of, of * MANY, marks=pytest.mark.long, id="many")
    return pytest.mark.parametrize(("first", "count"), [pytest.param(0, of, id="few"), long])


def each(name: str, count: int, first: int, check: Callable[[random.Random], Any]) -> None:
    """Run a check on every case; what fails says which."""
    for number, r in cases(count, first):
        try:
            check(r)
        except Exception as error:
            raise AssertionError(f"{name} {number}: {type(error).__name__}: {error}") from error


# --- right ---------------------------------------------------------------------------------------


def few_and_many() -> Iterator[Any]:
    for op, count in COUNTS.items():
        yield pytest.param(op, 0, count, id=f"{op}-few")
        yield pytest.param(op, count, count * MANY, id=f"{op}-many", marks=pytest.mark.long)


@pytest.mark.parametrize(("op", "first", "count"), [*few_and_many()])
def test_random_calls(op, first, count):
    libraries = ["blas", *(["onednn"] if products._has_onednn() else [])]
    before = products.cpu_library()

    def check(r: random.Random) -> None:
        products.set_cpu_library(r.choice(libraries))
        drawn = extension_fuzz.DRAWS[op](r)
        try:
            check_raw(r, drawn)
            check_public(r, drawn)
        except Exception as error:
            raise AssertionError(f"{drawn}: {error}") from error

    try:
        each(op, count, first, check)
    finally:
        products.set_cpu_library(before)


@counts(60)
def test_random_masks(first, count):
    def check(r: random.Random) -> None:
        shape = r.choice(extension_fuzz.SIZES), r.choice(extension_fuzz.SIZES)
        mask = spread(r, torch.rand(shape) < r.choice((0.0, 0.03, 0.5, 0.97, 1.0)))
        for got, want in zip(call.unpad(mask), reference.unpad(mask), strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want), mask

    each("unpad", count, first, check)


def draw_optimizer(r: random.Random) -> optimizer_cases.Call:
    """Parameters of any size and dtype, in two groups."""
    sizes = (0, 1, 3, 7, 8, 33, 130, 1024, 1025, 2050, 16385)
    dtypes = torch.float32, torch.float16, torch.bfloat16
    shapes = []
    for _ in range(r.randint(1, 6)):
        dtype = r.choice(dtypes)
        master = dtype.itemsize == 2 and r.random() < 0.5
        grad = r.choice((None, None, *dtypes))
        zero = r.random() < 0.1
        shapes.append(
            optimizer_cases.Shape(r.choice(sizes), dtype, grad, master, r.choice((0, 1)), zero)
        )
    case = optimizer_cases.Case(
        shapes,
        clip=r.random() < 0.4,
        limit=r.choice((0.5, 3.0)),
        scale=r.choice((None, 8.0, 1024.0)),
        found_inf=r.choice((None, None, 0.0)),
        lr_tensor=r.random() < 0.3,
        always_adapt=r.random() < 0.5,
    )
    return case.draw(lambda t: moved(r, t))


@counts(30)
def test_random_steps(first, count):
    def check(r: random.Random) -> None:
        before = draw_optimizer(r)
        op = r.choice(optimizer_cases.OPS)
        found = []
        for number in r.sample((1, 2, 3), 2):
            torch.set_num_threads(number)
            step = before.map(lambda t: moved(r, t))
            getattr(call, op)(*step.args(op))
            found.append((step, call.grad_norm(before.lists[1], None)))
        (got, norm), (other, other_norm) = found
        optimizer_cases.assert_agrees(got, before.truth(op), before)
        optimizer_cases.assert_same_bits(other, got)
        exact = torch.cat([g.double().flatten() for g in before.lists[1]]).norm()
        assert norm == other_norm and (norm - exact).abs() <= 1e-6 * exact

    each("step", count, first, check)


def test_draws_differ():
    """They reach what they are for."""
    seen = set()
    for op, draw in extension_fuzz.DRAWS.items():
        for _, r in cases(COUNTS[op]):
            drawn = draw(r)
            tensors = [a for a in drawn.args if isinstance(a, Tensor)]
            floats = {t.dtype for t in tensors if t.is_floating_point()}
            seen |= {(op, str(dtype)) for dtype in floats}
            seen |= {(op, "mixed")} if len(floats) > 1 else set()
            seen |= {(op, "empty")} if not all(t.numel() for t in tensors) else set()
            seen |= {(op, "large")} if tensors[0].numel() > 65536 else set()
    wanted = {(op, str(dtype)) for op in COUNTS for dtype in extension_fuzz.DTYPES}
    wanted |= {(op, "mixed") for op in ("add_layer_norm", "embed", "bias_gelu")}
    wanted |= {(op, "empty") for op in COUNTS} | {
        (op, "large") for op in ("attention", "bias_gelu")
    }
    assert wanted <= seen, wanted - seen


# --- refused -------------------------------------------------------------------------------------

INT64 = 2**63 - 1
FREE = "x", "qkv", "cu_seqlens"  # another size of these may fit
SEEDS = torch.tensor([1, 2]), torch.empty(0).long(), torch.ones(1), torch.ones(1).int()
REFUSALS = ValueError, TypeError, IndexError, NotImplementedError


def unfit(r: random.Random, t: Tensor, fixed: bool) -> Tensor:
    """A tensor of another rank or dtype than this, or, where others fix it, of another size."""
    kinds = [t[None], t.to(torch.complex64), t.to(torch.int16), t.to(torch.bool)]
    kinds += [t.float()] if not t.is_floating_point() else [t.long(), t.to(torch.float8_e4m3fn)]
    if t.ndim:
        kinds += [t.new_ones(()), t.to_sparse()]
        kinds += [torch.cat((t, t.new_ones(*t.shape[:-1], 1)), -1)] if fixed else []
    return r.choice(kinds)


def wrong_borders(r: random.Random, cu_seqlens: Tensor, T: int) -> Tensor:
    """What no batch has: out of order, beyond T, below 0, not from 0 on."""
    wrong = cu_seqlens.tolist()
    at = r.randrange(len(wrong))
    wrong[at] = r.choice((-1, -(2**31), 2**31 - 1, T + 1))
    if r.random() < 0.3:
        wrong = [0, 2**31 - 1, -(2**31), T]
    return torch.tensor(wrong, dtype=torch.int32)


def hostile(r: random.Random, drawn: Drawn) -> tuple[Any, ...]:
    """The arguments with something wrong in one of them."""
    args = list(drawn.args)
    schema = getattr(call, drawn.op).default._schema
    names = [a.name for a in schema.arguments]
    changes: list[tuple[str, Callable[[], Any]]] = []
    for name, a in zip(names, args, strict=False):
        if isinstance(a, Tensor) and name != "seed":
            changes.append((name, lambda a=a, name=name: unfit(r, a, name not in FREE)))
    if "p" in names:
        args[names.index("seed")] = torch.tensor([1])
        changes.append(("p", lambda: r.choice((-0.1, 1.001, 1e300, *map(float, ("nan", "inf"))))))
        changes.append(("seed", lambda: r.choice(SEEDS)))
        if r.random() < 0.5:
            args[names.index("p")] = 0.5
    if "cu_seqlens" in names:
        T = args[names.index("qkv")].shape[0]
        cu_seqlens = args[names.index("cu_seqlens")]
        changes += [("cu_seqlens", lambda: wrong_borders(r, cu_seqlens, T))] * 4
        if len(cu_seqlens) > 1:
            changes.append(("max_len", lambda: r.choice((-1, -(2**63)))))
    for name, table in (
        ("input_ids", "word"),
        ("position_ids", "position"),
        ("token_type_ids", "type_"),
    ):
        ids = args[names.index(name)] if name in names else None
        if ids is not None and len(ids):
            size = args[names.index(table)].shape[0]
            changes += [(name, lambda ids=ids, size=size: foreign_id(r, ids, size))] * 4
    if "activation" in names:
        changes.append(("activation", lambda: r.choice(("", "silu", "GELU", "gelu\0", "x" * 9999))))
    if "out_dtype" in names:
        changes.append(("out_dtype", lambda: r.choice((torch.int64, torch.bool, torch.complex64))))
    name, change = r.choice(changes)
    args[names.index(name)] = change()
    if name == "seed":
        args[names.index("p")] = 0.5
    if name == "cu_seqlens" and r.random() < 0.5:  # then T alone bounds them
        args[names.index("max_len")] = INT64
    return tuple(args)


def foreign_id(r: random.Random, ids: Tensor, size: int) -> Tensor:
    ids = ids.clone()
    most = torch.iinfo(ids.dtype)
    ids[r.randrange(len(ids))] = r.choice((-1, size, most.max, most.min))
    return ids


def refused(op: str, args: tuple[Any, ...]) -> bool:
    """Whether the call raises, as it must then: a kind of refusal that names the op."""
    by_product = op == "linear_gelu"  # PyTorch refuses there what it does not take
    errors = (*REFUSALS, RuntimeError) if by_product else REFUSALS
    try:
        getattr(call, op)(*args)
    except errors as error:
        text = str(error)
        named = by_product or text.startswith((f"{op}: ", "Could not run 'bert_fast::"))
        assert named and "INTERNAL ASSERT" not in text, f"{op}: {type(error).__name__}: {text}"
        return True
    return False


@counts(150)
def test_hostile_calls(first, count):
    """An exception of the right kind, never a crash, never a result."""
    draws = [*extension_fuzz.DRAWS.values()]

    def check(r: random.Random) -> None:
        chosen = r.choice([step for step, _ in steps(r.choice(draws)(r))])
        args = hostile(r, chosen)
        # what a product's tensors may be is PyTorch's to say
        taken = not refused(chosen.op, args) and (
            chosen.op != "linear_gelu" or args[3] not in extension_fuzz.ACTIVATIONS
        )
        assert not taken, f"taken: {chosen.op}{[*map(extension_fuzz.shown, args)]}"

    each("hostile", count, first, check)


def wrong_step(r: random.Random, step: optimizer_cases.Call) -> tuple[Any, ...]:
    """The arguments of adamw_ with one list that does not fit."""
    args = [[*a] if isinstance(a, list) else a for a in step.args("adamw_")]
    at = r.randrange(len(args[0]))
    which = r.randrange(13)
    if which < 5:
        args[which + 1] = args[which + 1][:-1] if r.random() < 0.5 else [*args[which + 1]] * 2
    elif which < 9:
        kinds = [args[which - 5][at].to(torch.int32), args[which - 5][at].to(torch.complex64)]
        args[which - 5][at] = r.choice([*kinds, torch.ones(2, 3, 5), kinds[0].float()[None]])
    elif which == 9:
        n = len(args[0])
        args[6] = r.choice(
            ([], [n], [-1, n + 1], [n, 1], [INT64, INT64, 2 + n], [INT64, n - INT64])
        )
        args[7] = args[8] = [0.1] * (len(args[6]) + (args[6] == [n]))
    elif which == 10:
        args[4][at] = r.choice((torch.ones(2), torch.ones(0), torch.ones((), dtype=torch.int64)))
    elif which == 11:
        args[9] = r.choice(([torch.ones(2)] * 2, [torch.ones(())], [torch.ones(()).double()] * 2))
    else:
        args[r.choice((14, 15, 16))] = r.choice(
            (torch.ones(2), torch.ones(0), torch.ones(()).int())
        )
    return tuple(args)


@counts(40)
def test_hostile_steps(first, count):
    """Refused before anything is changed."""

    def check(r: random.Random) -> None:
        before = draw_optimizer(r)
        step = before.clone()
        args = wrong_step(r, step)
        op = r.choice(optimizer_cases.OPS)
        assert refused(op, (*args, False) if op == "lamb_" else args), "taken"
        optimizer_cases.assert_same_bits(step, before)

    each("hostile step", count, first, check)


def test_sizes_that_wrap_to_the_right_sum():
    args = list(optimizer_cases.CASES["plain"].draw().args("adamw_"))
    args[6], args[7], args[8] = [INT64, INT64, 2 + 3], [0.1] * 3, [0.0] * 3
    with pytest.raises(ValueError, match="sizes: want the sum 3, got"):
        call.adamw_(*args)


@pytest.mark.parametrize("borders", [[0, 6], [0, 2, 2**31 - 1], [0, 2**31 - 1, -(2**31), 5]])
def test_sequences_beyond_the_rows(borders):
    """Refused, though max_len would allow them."""
    qkv, o, lse = torch.ones(5, 3, 2, 8), torch.ones(5, 2, 8), torch.ones(2, 5)
    last = torch.tensor(borders, dtype=torch.int32), INT64, 0.0, None, 0
    with pytest.raises(ValueError, match="attention: cu_seqlens: want"):
        call.attention(qkv, *last)
    with pytest.raises(ValueError, match="attention_bwd: cu_seqlens: want"):
        call.attention_bwd(o, qkv, o, lse, *last)


@pytest.mark.parametrize("T", [0, 5])
def test_heads_of_no_size(T):
    borders = torch.tensor([0, T], dtype=torch.int32)
    for qkv in (torch.ones(T, 3, 2, 0), torch.ones(T, 3, 2**40, 0)):
        with pytest.raises(ValueError, match="attention: qkv: want heads of 1 or more, got"):
            call.attention(qkv, borders, T, 0.0, None, 0)


@pytest.mark.parametrize("D", [1, 2**40])
def test_no_rows(D):
    """No memory for what there is none of."""
    none = torch.zeros(1, dtype=torch.int32)
    o, lse = call.attention(torch.ones(0, 3, 2, D), none, 9, 0.0, None, 0)
    assert o.shape == (0, 2, D) and lse.shape == (2, 0)
    dqkv = call.attention_bwd(o, torch.ones(0, 3, 2, D), o, lse, none, 9, 0.0, None, 0)
    assert dqkv.shape == (0, 3, 2, D)
    assert call.bias_gelu(torch.ones(0, D), None, "gelu").shape == (0, D)


# --- instruction sets ----------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_every_instruction_set(compiled, capability):
    """The few once more on the lesser ones."""
    if compiled.cpu_capability() == "DEFAULT":
        pytest.skip("there is one set here")
    arguments = ["-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
