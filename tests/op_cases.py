"""Calls of the ops, the same by `op_formulas`, and the rules by which the two agree.

The truth of a case is its formula in float64. In fp32 the op may be as far from it as the formula
in fp32 is; in 16 bits, as the formula in fp32 which rounds what the contract stores in 16 bits.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import op_formulas
import pytest
import torch
from op_formulas import SEED, attention_factors, row_factors
from torch import Tensor

from bert_fast import batch_invariant, ops

ON_GPU = torch.cuda.is_available()
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES = DTYPES[ON_GPU:]  # no kernel takes float64
# In Triton's interpreter bf16 arithmetic is wrong: there bf16 waits for a GPU.
KERNEL_DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if ON_GPU else ()))


@pytest.fixture(autouse=True)
def poison():
    """What `torch.empty` returns is NaN, or the largest integer: an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


# --- data ----------------------------------------------------------------------------------------


def rows(T: int, D: int, data: str = "plain") -> Tensor:
    """(T, D) fp32 whose mean is not 0: "plain", "wide", or with BERT's few huge columns."""
    x = torch.randn(T, D) * (4 if data == "wide" else 1) + 0.5
    if data == "outliers":
        x[:, :: max(1, D // 3)] *= 40
    return x


DATA = ("plain", "wide", "outliers")


def borders(lengths: Sequence[int]) -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


# --- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A call of an op, and the same call of its formula.

    Attributes:
        op: public function of bert_fast.ops.
        formula: the same of torch.nn.functional.
        inputs: tensors by argument name; floating ones get a gradient.
        options: the op's other arguments, except dropout's.
        dropout: p, seed and site.
        factors: what the formula multiplies by in place of them.
        invariant: whether the batch-invariant mode is on, forward and backward.
    """

    op: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    inputs: dict[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)
    dropout: dict[str, Any] = field(default_factory=dict)
    factors: Any = None
    invariant: bool = False

    @property
    def name(self) -> str:
        """The op's name as its messages give it."""
        name = self.op.__name__
        return "add_layer_norm" if name == "layer_norm" else name

    @property
    def leaves(self) -> list[str]:
        """The inputs that get a gradient."""
        return [n for n, t in self.inputs.items() if t is not None and t.is_floating_point()]

    def with_inputs(self, **inputs: Tensor | None) -> "Case":
        return replace(self, inputs=self.inputs | inputs)

    def to(self, dtype: torch.dtype, device: str | None = None) -> "Case":
        """The case with its floating inputs in `dtype`, and everything on `device`."""
        moved = {n: t if t is None else t.to(device) for n, t in self.inputs.items()}
        moved |= {n: moved[n].to(dtype) for n in self.leaves}
        dropout = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in self.dropout.items()}
        return replace(self, inputs=moved, dropout=dropout)

    def call(self, **inputs: Tensor | None) -> Tensor:
        """What the op gives, with some of its inputs replaced."""
        with self.mode():
            return self.op(**self.inputs | inputs, **self.options, **self.dropout)

    def mode(self) -> AbstractContextManager:
        """What the op and its backward pass run in."""
        return batch_invariant() if self.invariant else nullcontext()

    def by_formula(self, stores: torch.dtype | None = None, **inputs: Tensor | None) -> Tensor:
        """What the formula gives."""
        inputs = self.inputs | inputs
        extra = {} if self.factors is None else {"factors": self.factors}
        if isinstance(self.factors, Tensor):
            first = inputs[self.leaves[0]]
            extra = {"factors": self.factors.to(first.device, first.dtype)}
        return self.formula(**inputs, **self.options, **extra, stores=stores)


def gradients(
    case: Case, function: Callable[..., Tensor], dy: Tensor | None = None, wanted: Any = None
) -> dict[str, Tensor]:
    """The output of case.call or case.by_formula, and the gradients of the `wanted` inputs."""
    wanted = case.leaves if wanted is None else wanted
    leaves = {n: case.inputs[n].detach().requires_grad_() for n in wanted}
    with case.mode():
        out = function(**leaves)
        out.backward(random_gradient(out) if dy is None else dy.to(out))
    return {"out": out.detach()} | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}


def random_gradient(out: Tensor) -> Tensor:
    """A gradient of an output; a scalar's is a power of two: its product with anything is exact."""
    return torch.full_like(out, 2) if out.ndim == 0 else torch.randn_like(out) + 0.25


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), f"{name}: {(got[name] - value).abs().max():.2e}"


def assert_as_good(
    got: dict[str, Tensor],
    baseline: dict[str, Tensor],
    truth: dict[str, Tensor],
    norm: float = 1.25,
    largest: float = 2.0,
) -> None:
    """Largest error at most `largest` times the baseline's, in norm `norm` times; and some ulps.

    In norm one rounding to nearest counts for a quarter of an ulp. One ulp of 16 bits is granted,
    four of fp32, where few roundings make the error of many numbers. Of few numbers the baseline
    may have one right by luck: four times as much is allowed there.
    """
    for name, exact in truth.items():
        assert got[name].shape == exact.shape, name
        info = torch.finfo(got[name].dtype)
        eps, smallest = info.eps, info.eps * info.smallest_normal
        eps *= 1 if got[name].dtype.itemsize == 2 else 4
        luck = 1 if exact.numel() > 200 else 4
        error = (got[name].double() - exact).abs()
        allowed = (baseline[name].to(got[name].dtype).double() - exact).abs()
        if not exact.numel():
            continue
        limit = luck * (largest * allowed.max() + eps * exact.abs().max()) + smallest
        assert error.max() <= limit, f"{name}: largest error {error.max():.2e} > {limit:.2e}"
        limit = luck * (norm * allowed.norm() + eps / 4 * exact.norm())
        limit += smallest * exact.numel() ** 0.5
        assert error.norm() <= limit, f"{name}: error in norm {error.norm():.2e} > {limit:.2e}"


def assert_exact(got: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Within 1e-10, absolutely and of the largest."""
    for name, exact in truth.items():
        assert got[name].dtype == torch.float64 and got[name].shape == exact.shape, name
        if exact.numel():
            error = (got[name] - exact).abs().max() / exact.abs().max().clamp(min=1)
            assert error <= 1e-10, f"{name}: {error:.2e}"


def check(case: Case, norm: float = 1.25, largest: float = 2.0) -> None:
    """The op's output and every gradient against its formula, by the rule of its dtype."""
    dy = random_gradient(case.call())
    wide = case.to(torch.float64)
    truth = gradients(wide, wide.by_formula, dy)
    got = gradients(case, case.call, dy)
    for name in case.leaves:
        assert got[f"d_{name}"].dtype == case.inputs[name].dtype, name
    dtypes = {case.inputs[name].dtype for name in case.leaves}
    if torch.float64 in dtypes:
        return assert_exact(got, truth)
    stored = [dtype for dtype in (got["out"].dtype, *dtypes) if dtype.itemsize == 2]
    narrow = case.to(torch.float32)
    call = partial(narrow.by_formula, stores=stored[0] if stored else torch.float32)
    return assert_as_good(got, gradients(narrow, call, dy), truth, norm, largest)


def check_most(cases: Sequence[Case], norm: float = 1.25, largest: float = 2.0) -> None:
    """check() of more than half of these draws of a case: over a single one luck decides."""
    failures = []
    for case in cases:
        try:
            check(case, norm, largest)
        except AssertionError as failure:
            failures.append(failure)
    if 2 * len(failures) >= len(cases):
        raise failures[0]


def _dropout(p: float, site: int) -> dict[str, Any]:
    return {"p": p, "seed": torch.tensor([SEED]), "site": site} if p else {}


def layer_norm_case(
    T: int = 5,
    D: int = 12,
    *,
    residual: bool = True,
    bias: bool = False,
    p: float = 0.0,
    site: int = 3,
    eps: float = 1e-12,
    data: str = "plain",
) -> Case:
    inputs = {"x": rows(T, D, data), "w": rows(1, D)[0], "b": rows(1, D)[0]}
    op = ops.layer_norm
    if residual or bias or p:
        op = ops.add_layer_norm
        inputs["residual"] = rows(T, D, data) if residual else None
        inputs["bias"] = rows(1, D, data)[0] if bias else None
    factors = row_factors(T, D, p, site=site) if p else None
    return Case(op, op_formulas.layer_norm, inputs, {"eps": eps}, _dropout(p, site), factors)


def embed_case(
    T: int = 5,
    D: int = 12,
    *,
    sizes: tuple[int, int, int] = (11, 7, 2),
    with_ids: bool = True,
    ids_dtype: torch.dtype = torch.int64,
    pad_id: int | None = None,
    p: float = 0.0,
    site: int = 0,
    eps: float = 1e-12,
    data: str = "plain",
) -> Case:
    V, P, C = sizes
    ids = [torch.randint(0, size, (T,), dtype=ids_dtype) for size in sizes]
    names = ("input_ids", "position_ids", "token_type_ids")
    inputs = dict(zip(names, ids if with_ids else (None, *ids[1:]), strict=True))
    inputs |= {"word": rows(V if with_ids else T, D, data)}
    inputs |= {"position": rows(P, D), "type_": rows(C, D), "w": rows(1, D)[0], "b": rows(1, D)[0]}
    factors = row_factors(T, D, p, site=site) if p else None
    options = {"eps": eps, "pad_id": pad_id}
    return Case(ops.embed, op_formulas.embed, inputs, options, _dropout(p, site), factors)


def gelu_case(
    T: int = 5, D: int = 12, *, bias: bool = True, activation: str = "gelu", data: str = "plain"
) -> Case:
    inputs = {"x": rows(T, D, data), "b": rows(1, D)[0] if bias else None}
    return Case(ops.gelu, op_formulas.gelu, inputs, {"activation": activation})


def linear_case(
    T: int = 5,
    D: int = 12,
    F_: int = 7,
    *,
    bias: bool = True,
    activation: str | None = None,
    data: str = "plain",
    invariant: bool = False,
) -> Case:
    """linear, or with an activation linear_gelu."""
    inputs = {
        "x": rows(T, D, data),
        "w": torch.randn(F_, D) * max(D, 1) ** -0.5,
        "b": rows(1, F_)[0] if bias else None,
    }
    if activation is None:
        return Case(ops.linear, op_formulas.linear, inputs, invariant=invariant)
    op, formula, options = ops.linear_gelu, op_formulas.linear_gelu, {"activation": activation}
    return Case(op, formula, inputs, options, invariant=invariant)


def attention_case(
    lengths: Sequence[int] = (3, 0, 5, 1),
    H: int = 2,
    K: int = 8,
    *,
    slack: int = 0,
    p: float = 0.0,
    site: int = 2,
    data: str = "plain",
) -> Case:
    T = sum(lengths) + slack
    qkv = rows(T, 3 * H * K, data).view(T, 3, H, K)
    if data == "outliers":
        qkv[:, :2] /= 8  # scores of tens, as BERT's
    inputs = {"qkv": qkv, "cu_seqlens": borders(lengths)}
    factors = None
    if p:
        factors = [attention_factors(n, b, H, p, site=site) for b, n in enumerate(lengths)]
    options = {"max_len": max(lengths, default=0), "slack": slack > 0}
    return Case(ops.attention, op_formulas.attention, inputs, options, _dropout(p, site), factors)


def cross_entropy_case(
    T: int = 5, D: int = 12, V: int = 11, *, bias: bool = True, data: str = "plain"
) -> Case:
    """Every third row is without a label."""
    labels = torch.randint(0, V, (T,))
    labels[2::3] = -100
    inputs = linear_case(T, D, V, bias=bias, data=data).inputs | {"labels": labels}
    return Case(ops.linear_cross_entropy, op_formulas.linear_cross_entropy, inputs)


# Three or more small calls of every op; what all ops share is shown on each.
CASES: dict[str, Callable[[], Case]] = {
    "embed": embed_case,
    "embed-rows": partial(embed_case, with_ids=False),
    "embed-pad": partial(embed_case, T=9, D=7, ids_dtype=torch.int32, pad_id=3),
    "embed-dropout": partial(embed_case, pad_id=0, p=0.3),
    "layer_norm": partial(layer_norm_case, residual=False),
    "layer_norm-eps": partial(layer_norm_case, T=3, D=9, residual=False, eps=1e-5),
    "layer_norm-row": partial(layer_norm_case, T=1, D=16, residual=False),
    "add_layer_norm": layer_norm_case,
    "add_layer_norm-odd": partial(layer_norm_case, T=9, D=7),
    "add_layer_norm-bias": partial(layer_norm_case, T=6, D=10, bias=True, p=0.3),
    "add_layer_norm-dropout": partial(layer_norm_case, p=0.3),
    "add_layer_norm-dropout-alone": partial(layer_norm_case, p=0.3, residual=False),
    "gelu": gelu_case,
    "gelu-tanh": partial(gelu_case, activation="gelu_new"),
    "gelu-relu-alone": partial(gelu_case, activation="relu", bias=False),
    "linear": linear_case,
    "linear-alone": partial(linear_case, bias=False),
    "linear-row": partial(linear_case, T=1, D=7, F_=16),
    "linear_gelu": partial(linear_case, activation="gelu"),
    "linear_gelu-tanh": partial(linear_case, activation="gelu_pytorch_tanh"),
    "linear_gelu-relu-alone": partial(linear_case, activation="relu", bias=False),
    "attention": attention_case,
    "attention-slack": partial(attention_case, (0, 2, 4, 0), H=1, K=5, slack=2),
    "attention-dropout": partial(attention_case, p=0.3),
    "linear_cross_entropy": cross_entropy_case,
    "linear_cross_entropy-alone": partial(cross_entropy_case, bias=False),
    "linear_cross_entropy-row": partial(cross_entropy_case, T=1, D=7, V=3),
}
every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
kernel_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda dtype: str(dtype)[6:])


# --- refusals ------------------------------------------------------------------------------------


def assert_refused(error: type[Exception], name: str, got: str, call: Callable[[], Any]) -> None:
    """The call raises `error` with a message that names the op, what was wanted and what came."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{name}: "), message
    assert "want " in message and "got " in message.partition("want ")[2], message
    assert got in message, message
