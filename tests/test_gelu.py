"""gelu against torch.nn.functional's activations: eager, and by kernels."""

import op_cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import (
    DATA,
    KERNEL_DTYPES,
    assert_refused,
    check,
    every_dtype,
    gelu_case,
    gradients,
    kernel_dtype,
)

from bert_fast import reference
from bert_fast.config import ACTIVATIONS

poison = op_cases.poison
SHAPES = [
    (0, 64),  # no rows
    (5, 0),  # no columns
    (1, 7),  # fewer than any vector holds
    (1, 64),  # one row
    (33, 1001),  # both odd
    (257, 96),  # a bias summed over more rows than any block, and one left over
]
every_activation = pytest.mark.parametrize(
    "activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]
)


@every_dtype
@every_activation
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "alone"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, bias, data, activation, dtype, device):
    check(gelu_case(*shape, bias=bias, data=data, activation=activation).to(dtype, device))


def assert_far_values(activation, dtype, device):
    """0, both signs, and up to the largest of fp16: exact ends, nothing infinite."""
    ends = torch.tensor([0, 1e-6, 1e-3, 0.5, 3, 5.5, 10, 100, 1e4, 6.5e4])
    x = torch.stack((ends, -ends))
    case = gelu_case(2, 10, bias=False, activation=activation).with_inputs(x=x).to(dtype, device)
    check(case)
    got = gradients(case, case.call, torch.ones(2, 10))
    assert torch.equal(got["out"][0, 6:], case.inputs["x"][0, 6:])
    assert not got["out"][1, 7:].any()
    assert (got["d_x"][0, 7:] == 1).all() and not got["d_x"][1, 7:].any()


@every_dtype
@every_activation
def test_far_values(activation, dtype, device):
    assert_far_values(activation, dtype, device)


def test_activations_differ():
    """The exact and the tanh form are 5e-4 apart, the names of the tanh form are one function."""
    out = {
        name: gelu_case(bias=False, activation=name).call(x=torch.linspace(-4, 4, 801)[None])
        for name in ("gelu", "gelu_new", "gelu_pytorch_tanh")
    }
    assert torch.equal(out["gelu_new"], out["gelu_pytorch_tanh"])
    assert 2e-4 < (out["gelu"] - out["gelu_new"]).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bias_of_another_dtype(dtype, device):
    """The result has the dtype of x, the gradient of the bias that of the bias."""
    case = gelu_case(33, 100).to(dtype, device)
    case = case.with_inputs(b=case.inputs["b"].float())
    check(case)
    assert case.call().dtype == dtype


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"x": torch.ones(12)}, "x: want (T, F) [*, *], got [12]"),
        ({"x": torch.ones(2, 5, 12)}, "got [2, 5, 12]"),
        ({"b": torch.ones(1)}, "b: want (F,) [12], got [1]"),  # would broadcast
        ({"b": torch.ones(5, 12)}, "got [5, 12]"),
        ({"b": torch.ones(())}, "got []"),
    ],
    ids=str,
)
def test_refused_shapes(change, got):
    assert_refused(ValueError, "gelu", got, lambda: gelu_case().call(**change))


@pytest.mark.parametrize("activation", ["silu", "", "GELU", None])
def test_refused_activation(activation):
    case = gelu_case(activation=activation)
    assert_refused(ValueError, "gelu", f"got {activation!r}", case.call)


# --- the kernels ---------------------------------------------------------------------------------

KERNEL_SHAPES = [
    (0, 64),  # no rows
    (5, 0),  # no columns
    (1, 1),  # one number
    (1, 7),  # fewer than any vector holds
    (37, 100),  # several tiles, the last full neither way
    (5, 768),  # BERT-base
    (3, 1024),  # a full tile
    (3, 1025),  # one column past it: two programs along the columns
    (3, 3072),  # BERT-base's feed-forward: three
]


@kernel_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "alone"])
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_kernel_shapes(shape, bias, dtype, kernel_device):
    check(gelu_case(*shape, bias=bias).to(dtype, kernel_device))


@kernel_dtype
@every_activation
@pytest.mark.parametrize("data", DATA)
def test_kernel_activations(data, activation, dtype, kernel_device):
    check(gelu_case(19, 40, data=data, activation=activation).to(dtype, kernel_device))


@pytest.mark.parametrize("T", [7, 8, 9, 17])
def test_kernel_partial_sums(T, kernel_device, monkeypatch):
    """Eight programs at most: one row each, one program fewer, and rows left over."""
    pytest.importorskip("triton")
    from bert_fast.kernels import common, gelu

    monkeypatch.setattr(common, "NUM_PARTIALS", 8)
    monkeypatch.setattr(gelu, "BWD_TILES", {80: (1, 1024, 4)})
    check(gelu_case(T, 3).to(torch.float32, kernel_device))


@kernel_dtype
@every_activation
def test_kernel_far_values(activation, dtype, kernel_device):
    assert_far_values(activation, dtype, kernel_device)


@kernel_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_special_values(activation, dtype, kernel_device):
    """Zeros of both signs, infinities, NaN and large numbers, as the reference has them."""
    large = min(torch.finfo(dtype).max, 1e18)  # whose square is finite
    values = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, large, -large, 1e-7, -1e-7]
    x = torch.tensor([values], dtype=dtype, device=kernel_device)
    ones = torch.ones_like(x)
    ops = torch.ops.bert_fast
    pairs = [
        (ops.bias_gelu(x, None, activation), reference.bias_gelu(x, None, activation)),
        (
            ops.bias_gelu_bwd(ones, x, None, activation)[0],
            reference.bias_gelu_bwd(ones, x, None, activation)[0],
        ),
    ]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_kernel_infinite_gradient(kernel_device):
    """Where relu is flat, even an infinite gradient ends."""
    x = torch.tensor([[-1.0, 1.0]], device=kernel_device)
    dy = torch.full_like(x, torch.inf)
    dx, _ = torch.ops.bert_fast.bias_gelu_bwd(dy, x, None, "relu")
    assert dx.tolist() == [[0.0, torch.inf]]


def test_kernel_rows_past_the_end(kernel_device):
    """They add nothing to db even where the bias has no derivative: its cube is infinite."""
    b = torch.full((2,), 1e20, device=kernel_device)
    x, dy = (-b).repeat(3, 1), torch.ones(3, 2, device=kernel_device)  # fewer rows than a tile
    _, db = torch.ops.bert_fast.bias_gelu_bwd(dy, x, b, "gelu_new")
    assert db.tolist() == [1.5, 1.5]


@given(
    T=st.integers(0, 40),
    F=st.integers(0, 300),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    data=st.sampled_from(DATA),
    dtype=st.sampled_from(KERNEL_DTYPES),
    seed=st.integers(0, 2**31),
)
def _check_drawn(kernel_device, T, F, bias, activation, data, dtype, seed):
    torch.manual_seed(seed)
    case = gelu_case(T, F, bias=bias, activation=activation, data=data)
    check(case.to(dtype, kernel_device))


few = settings(
    max_examples=10,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
many = settings(few, max_examples=300)


def test_kernel_drawn(kernel_device):
    few(_check_drawn)(kernel_device)


@pytest.mark.long
def test_kernel_drawn_long(kernel_device):
    many(_check_drawn)(kernel_device)


@pytest.mark.parametrize("low", KERNEL_DTYPES[1:], ids=str)
@pytest.mark.parametrize("names", ["x", "b"])
def test_kernel_mixed_dtypes(names, low, kernel_device):
    case = gelu_case(19, 100).to(torch.float32, kernel_device)
    check(case.with_inputs(**{name: case.inputs[name].to(low) for name in names.split()}))


def test_kernel_refused(kernel_device):
    """Every reason is in the message."""
    pytest.importorskip("triton")
    case = gelu_case().to(torch.float64, kernel_device)
    got = "x: want fp32, fp16 or bf16 on a GPU, got torch.float64; b: want fp32"
    assert_refused(NotImplementedError, "bias_gelu", got, case.call)
