"""gelu against torch.nn.functional's activations."""

import op_cases
import pytest
import torch
from op_cases import DATA, assert_refused, check, every_dtype, gelu_case, gradients

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


@every_dtype
@every_activation
def test_far_values(activation, dtype, device):
    """0, both signs, and up to the largest of fp16: exact ends, nothing infinite."""
    ends = torch.tensor([0, 1e-6, 1e-3, 0.5, 3, 5.5, 10, 100, 1e4, 6.5e4])
    x = torch.stack((ends, -ends))
    case = gelu_case(2, 10, bias=False, activation=activation).with_inputs(x=x).to(dtype, device)
    check(case)
    got = gradients(case, case.call, torch.ones(2, 10))
    assert torch.equal(got["out"][0, 6:], case.inputs["x"][0, 6:])
    assert not got["out"][1, 7:].any()
    assert (got["d_x"][0, 7:] == 1).all() and not got["d_x"][1, 7:].any()


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
