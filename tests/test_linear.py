"""linear and linear_gelu against torch.nn.functional.linear and its activations."""

import op_cases
import pytest
import torch
from op_cases import DATA, assert_refused, check, every_dtype, gradients, linear_case

poison = op_cases.poison
SHAPES = [
    (0, 24, 7),  # no rows
    (5, 24, 0),  # no outputs
    (5, 0, 7),  # a sum of nothing: the bias
    (3, 1, 2),  # nothing to sum
    (1, 64, 33),  # one row: a matrix times a vector
    (17, 100, 33),  # nothing is a multiple of 8
    (40, 768, 64),  # BERT-base
    (257, 31, 5),  # a bias and a weight summed over more rows than any block, and one left over
]
every_activation = pytest.mark.parametrize(
    "activation", [None, "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]
)


@every_dtype
@every_activation
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "alone"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, bias, activation, dtype, device):
    check(linear_case(*shape, bias=bias, activation=activation).to(dtype, device))


@every_dtype
@pytest.mark.parametrize("data", DATA[1:])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_data(activation, data, dtype, device):
    check(linear_case(33, 100, 40, activation=activation, data=data).to(dtype, device))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_linear_gelu_is_gelu_of_linear(activation):
    """To the bit on the CPU, forward and backward."""
    fused, plain = (linear_case(9, 20, 13, activation=a) for a in (activation, None))
    plain = plain.with_inputs(**fused.inputs)

    def in_two(**inputs):
        return op_cases.ops.gelu(plain.call(**inputs), None, activation)

    dy = torch.randn(9, 13)
    op_cases.assert_same_bits(gradients(fused, fused.call, dy), gradients(fused, in_two, dy))


@pytest.mark.parametrize("activation", [None, "gelu"], ids=["linear", "linear_gelu"])
@pytest.mark.parametrize(
    ("change", "error", "got"),
    [
        ({"x": torch.ones(12)}, ValueError, "x: want (T, D) [*, 12], got [12]"),
        ({"x": torch.ones(2, 5, 12)}, ValueError, "got [2, 5, 12]"),
        ({"x": torch.ones(5, 11)}, ValueError, "got [5, 11]"),
        ({"w": torch.ones(12)}, ValueError, "w: want (F, D) [*, *], got [12]"),
        ({"w": torch.ones(12, 7)}, ValueError, "got [5, 12]"),  # the weight transposed
        ({"b": torch.ones(1)}, ValueError, "b: want (F,) [7], got [1]"),  # would broadcast
        ({"b": torch.ones(5, 7)}, ValueError, "got [5, 7]"),
        ({"x": torch.ones(5, 12).half()}, TypeError, "x torch.float16, w torch.float32"),
        ({"w": torch.ones(7, 12).double()}, TypeError, "w torch.float64"),
        ({"b": torch.ones(7).bfloat16()}, TypeError, "b torch.bfloat16"),
    ],
    ids=str,
)
def test_refused(change, error, got, activation):
    case = linear_case(activation=activation)
    assert_refused(error, case.name, got, lambda: case.call(**change))


def test_refused_activation():
    case = linear_case(activation="tanh")
    assert_refused(ValueError, "linear_gelu", "got 'tanh'", case.call)
