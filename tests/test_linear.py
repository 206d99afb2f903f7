"""linear and linear_gelu against torch.nn.functional.linear and its activations.

By kernels is the sum over rows for the gradient of the bias, and the activation.
"""

import op_cases
import pytest
import torch
from op_cases import (
    DATA,
    assert_as_good,
    assert_refused,
    check,
    every_dtype,
    gradients,
    kernel_dtype,
    linear_case,
)

from bert_fast import ops

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
    got, want = gradients(fused, fused.call, dy), gradients(fused, in_two, dy)
    op_cases.assert_same_bits(got, want)


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


# --- the kernels ---------------------------------------------------------------------------------

KERNEL_SHAPES = [
    (0, 24, 7),  # no rows
    (5, 24, 0),  # no outputs
    (5, 0, 7),  # a sum of nothing: the bias
    (1, 8, 33),  # one row
    (37, 10, 100),  # several tiles, the last full neither way
    (3, 4, 1024),  # a full tile
    (3, 4, 1025),  # one column past it
]


@kernel_dtype
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "alone"])
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_kernel_shapes(shape, bias, activation, dtype, kernel_device):
    check(linear_case(*shape, bias=bias, activation=activation).to(dtype, kernel_device))


def assert_sums(dy):
    """The gradient of the bias against the sum in float64, by the rule of its dtype."""
    db = torch.ops.bert_fast.column_sums(dy)
    truth = dy.double().sum(0)
    assert_as_good({"db": db}, {"db": dy.float().sum(0)}, {"db": truth})


@kernel_dtype
@pytest.mark.parametrize("data", DATA)
def test_kernel_sums(data, dtype, kernel_device, monkeypatch):
    """Several tiles for each program: 16 bits in between would show."""
    pytest.importorskip("triton")
    from bert_fast.kernels import common

    monkeypatch.setattr(common, "NUM_PARTIALS", 8)
    assert_sums(op_cases.rows(300, 40, data).to(kernel_device, dtype))


@kernel_dtype
def test_kernel_sums_of_what_cancels(dtype, kernel_device, monkeypatch):
    """Large numbers first and last: in 16 bits those between would lose their digits."""
    pytest.importorskip("triton")
    from bert_fast.kernels import common

    monkeypatch.setattr(common, "NUM_PARTIALS", 1)
    dy = op_cases.rows(300, 40)
    dy[0], dy[-1] = 2048, -2048
    assert_sums(dy.to(kernel_device, dtype))


@pytest.mark.parametrize("T", [7, 8, 9, 17])
def test_kernel_partial_sums(T, kernel_device, monkeypatch):
    """Eight programs at most: one row each, one program fewer, and rows left over."""
    pytest.importorskip("triton")
    from bert_fast.kernels import common, linear

    monkeypatch.setattr(common, "NUM_PARTIALS", 8)
    monkeypatch.setattr(linear, "COLUMN_SUM_TILES", {80: (1, 1024, 4)})
    assert_sums(op_cases.rows(T, 3).to(kernel_device))


def test_kernel_need(kernel_device):
    """What nobody wants is empty."""
    x, w, dy = (torch.randn(shape, device=kernel_device) for shape in ((5, 4), (3, 4), (5, 3)))
    for wanted in range(4):
        need = [bool(wanted >> i & 1) for i in range(2)]
        found = torch.ops.bert_fast.linear_bwd(dy, x, w, need)
        assert [bool(t.numel()) for t in found] == need


def test_kernel_products_know_no_autocast(kernel_device):
    """It casts what is given to a public function; within, dtypes are fixed."""
    args = [torch.randn(shape, device=kernel_device) for shape in ((5, 3), (5, 4), (3, 4))]
    expected = torch.ops.bert_fast.linear_bwd(*args, [True] * 2)
    with torch.autocast(kernel_device, torch.bfloat16):
        found = torch.ops.bert_fast.linear_bwd(*args, [True] * 2)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_implementations():
    """The products are PyTorch's; what names Triton has a kernel in it."""
    pytest.importorskip("triton")
    by = {name: on["cuda"].name for name, on in ops.implementations().items()}
    assert by["linear"] == by["linear_bwd"] == "cublas"
    assert by["column_sums"] == by["linear_gelu"] == by["bias_gelu"] == "triton"


def test_kernel_refused(kernel_device):
    pytest.importorskip("triton")
    dy = torch.ones(2, 2, device=kernel_device).double()
    assert_refused(
        NotImplementedError,
        "column_sums",
        "got torch.float64",
        lambda: torch.ops.bert_fast.column_sums(dy),
    )
