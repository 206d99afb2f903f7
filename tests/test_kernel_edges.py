"""Every length, every head size, nothing at all, and numbers at the ends of their range."""

import random

import op_cases
import pytest
import torch

pytest.importorskip("triton")

from interpreter_tools import (
    FUNCTIONS,
    KERNEL_CASES,
    draw,
    every_function,
    function,
    in_long,
    some_dtypes,
)
from op_cases import (
    assert_as_good,
    attention_case,
    check,
    cross_entropy_case,
    embed_case,
    gelu_case,
    gradients,
    kernel_dtype,
    layer_norm_case,
    linear_case,
)

poison = op_cases.poison
HEAD_SIZES = range(8, 129, 8)
DTYPES = op_cases.KERNEL_DTYPES
LENGTHS = (*range(1, 131), 511, 512, 513)
needs_attention = pytest.mark.skipif("attention" not in FUNCTIONS, reason="no kernel of attention")


def bound(case, norm):
    """The bound in norm: wider for attention of a few rows.

    The rounding of a row's saved o is one error of all its columns, and of few such errors the
    baseline may have small ones by luck.
    """
    return 3 if case.name == "attention" and case.inputs["qkv"].shape[0] < 8 else norm


# --- attention: lengths by head sizes ------------------------------------------------------------


def check_forward(case, norm=1.5):
    """The output alone, by the rule of its dtype."""
    truth = {"out": case.to(torch.float64).by_formula()}
    dtype = case.inputs["qkv"].dtype
    stores = dtype if dtype.itemsize == 2 else None
    baseline = {"out": case.to(torch.float32).by_formula(stores=stores)}
    assert_as_good({"out": case.call()}, baseline, truth, norm)


@needs_attention
@pytest.mark.parametrize("K", HEAD_SIZES)
def test_head_sizes(K, kernel_device):
    """A sequence within a tile, one at its end, one beyond it; one head."""
    rng, dtype = random.Random(K), DTYPES[K // 8 % len(DTYPES)]
    lengths = [rng.randrange(1, 16), 0, rng.choice((16, 32, 64)), rng.choice((33, 65, 70))]
    check(attention_case(lengths, H=1, K=K).to(dtype, kernel_device), norm=1.5)


@needs_attention
@pytest.mark.parametrize("part", range(4))
def test_lengths(part, kernel_device):
    """Every length to 66, and around 128, in four batches."""
    lengths = [*range(part, 67, 4), 127 + part]
    random.Random(part).shuffle(lengths)
    check_forward(attention_case(lengths, H=1, K=16).to(torch.float32, kernel_device))


@needs_attention
@pytest.mark.parametrize("n", [513, *in_long(511)])
def test_long_lengths(n, kernel_device):
    check_forward(attention_case((n, 1), H=1, K=16).to(torch.float32, kernel_device))


@pytest.mark.long
@needs_attention
@pytest.mark.parametrize("n", LENGTHS)
def test_every_length_and_head_size(n, kernel_device):
    """2,128 forward calls: each length alone, with each head size, and every tenth backward."""
    for K in HEAD_SIZES:
        dtype = DTYPES[(n + K // 8) % len(DTYPES)]
        case = attention_case((n,), H=1, K=K).to(dtype, kernel_device)
        check_forward(case)
        if (n * 16 + K // 8) % 10 == 0:
            check(case, norm=1.5)


@pytest.mark.long
@needs_attention
@kernel_dtype
@pytest.mark.parametrize("number", range(30))
def test_mixed_lengths(number, dtype, kernel_device):
    """Forward and backward of drawn batches, empty sequences anywhere."""
    rng = random.Random(number)
    lengths = [rng.choice((0, rng.randrange(1, 131))) for _ in range(rng.randrange(1, 9))]
    K, p = rng.choice(HEAD_SIZES), rng.choice((0.0, 0.1))
    case = attention_case(lengths, H=rng.randrange(1, 4), K=K, slack=rng.randrange(3), p=p)
    check(case.to(dtype, kernel_device), norm=1.5)


@needs_attention
@some_dtypes
@pytest.mark.parametrize(
    "lengths",
    [(), (0,), (0, 0, 0), (0, 5), (5, 0), (3, 0, 0, 2), (1,), (1,) * 9, (0, 70, 0, 1, 0)],
    ids=str,
)
@pytest.mark.parametrize("slack", [3, *in_long(0)])
def test_empty_sequences(lengths, slack, dtype, kernel_device):
    """First, last, between, alone, and none at all; rows of nobody give 0 and get 0."""
    case = attention_case(lengths, H=1, K=16, slack=slack).to(dtype, kernel_device)
    check(case, norm=bound(case, 2))  # of few numbers
    found = gradients(case, case.call)
    for name in ("out", "d_qkv"):
        assert not found[name][sum(lengths) :].any(), name


@needs_attention
@kernel_dtype
@pytest.mark.parametrize("largest", [6e4, *in_long(2e4)])
@pytest.mark.parametrize("sign", [1, -1, 0], ids=["above 0", "below 0", "both"])
def test_large_scores(largest, sign, dtype, kernel_device):
    """No NaN where scores reach 6e4, and -1e4 is nobody's minus infinity."""
    case = attention_case((7, 64, 33, 70), H=1, K=16)
    q, k = case.inputs["qkv"][:, 0], case.inputs["qkv"][:, 1]
    if sign:
        q.abs_()
        k.abs_().mul_(sign)
    q *= (largest / 16) ** 0.5
    k *= (largest / 16) ** 0.5
    case = case.to(dtype, kernel_device)
    # A score's rounding is of the score's size, and a probability moves by as much, relatively.
    dy = torch.randn_like(case.call())
    exact = gradients(case.to(torch.float64), case.to(torch.float64).by_formula, dy)
    for name, got in gradients(case, case.call, dy).items():
        eps = 8 * torch.finfo(torch.float32).eps * largest + 4 * torch.finfo(dtype).eps
        assert (got - exact[name]).abs().max() <= eps * exact[name].abs().max(), name


# --- every op ------------------------------------------------------------------------------------

NOTHING = {
    "embed": lambda: embed_case(T=0, pad_id=2),
    "embed-rows": lambda: embed_case(T=0, with_ids=False),
    "embed-dropout": lambda: embed_case(T=0, p=0.5),
    "layer_norm": lambda: layer_norm_case(T=0, residual=False),
    "add_layer_norm": lambda: layer_norm_case(T=0, p=0.5),
    "gelu": lambda: gelu_case(T=0),
    "linear": lambda: linear_case(T=0),
    "linear_gelu": lambda: linear_case(T=0, activation="gelu"),
    "attention": lambda: attention_case((), K=16),
    "linear_cross_entropy": lambda: cross_entropy_case(T=0),
}
NOTHING = {name: make for name, make in NOTHING.items() if function(name) in FUNCTIONS}


@kernel_dtype
@pytest.mark.parametrize("make", NOTHING.values(), ids=NOTHING)
def test_no_rows(make, dtype, kernel_device):
    """An output without rows; the gradients of what is not by row are 0."""
    case = make().to(dtype, kernel_device)
    found = gradients(case, case.call)
    assert found["out"].shape == case.by_formula().shape
    for name in case.leaves:
        grad = found[f"d_{name}"]
        assert grad.shape == case.inputs[name].shape and not grad.any(), name


@kernel_dtype
@every_function
@pytest.mark.parametrize("number", [0, *in_long(1)])
def test_drawn(name, number, dtype, kernel_device):
    check_drawn(name, number, dtype, kernel_device)


@pytest.mark.long
@kernel_dtype
@every_function
@pytest.mark.parametrize("number", range(10, 70))
def test_many_drawn(name, number, dtype, kernel_device):
    check_drawn(name, number, dtype, kernel_device)


def check_drawn(name, number, dtype, device):
    """Odd sizes, one column, one row, more rows than partial sums; all outputs and gradients."""
    torch.manual_seed(number)
    case = draw(name, random.Random(f"check {name} {number}"), many=number >= 10)
    check(case.to(dtype, device), norm=bound(case, 1.5))


@every_function
def test_every_form_is_drawn(name):
    """Of 60 draws some have one row, one column, and each option; all are calls of the function."""
    cases = [draw(name, random.Random(f"check {name} {i}"), many=True) for i in range(60)]
    assert {case.op.__name__ for case in cases} == {name}
    sizes = {
        next(iter(c.inputs.values())).shape[0]
        for c in cases
        if next(iter(c.inputs.values())) is not None
    }
    assert len(sizes) >= 10
    if KERNEL_CASES[name]().dropout or name in ("embed", "add_layer_norm", "attention"):
        assert len({bool(case.dropout) for case in cases}) == 2
