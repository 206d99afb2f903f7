"""add_layer_norm and layer_norm against torch.nn.functional.layer_norm: eager, and by kernels."""

from itertools import product

import op_cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import (
    DATA,
    KERNEL_DTYPES,
    ON_GPU,
    assert_refused,
    assert_same_bits,
    check,
    every_dtype,
    gradients,
    kernel_dtype,
    layer_norm_case,
)
from torch import library

poison = op_cases.poison
SHAPES = [
    (0, 64),  # no rows
    (1, 5),  # one short row
    (1, 64),  # one row
    (3, 100),  # D is no power of two
    (17, 768),  # BERT-base
    (33, 1001),  # both odd
    (257, 96),  # a sum over more rows than any block, and one left over
]


@every_dtype
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, residual, data, dtype, device):
    check(layer_norm_case(*shape, residual=residual, data=data).to(dtype, device))


@every_dtype
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_dropout(residual, p, dtype, device):
    check(layer_norm_case(19, 100, residual=residual, p=p).to(dtype, device))


@every_dtype
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_bias(residual, p, data, dtype, device):
    check(layer_norm_case(33, 100, bias=True, residual=residual, p=p, data=data).to(dtype, device))


def spread_case(eps):
    """Rows from constant to a deviation of 1e-2: next to these the eps of BERT and others shows."""
    case = layer_norm_case(6, 64, residual=False, eps=eps)
    x = case.inputs["x"] * torch.tensor([0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2])[:, None]
    return case.with_inputs(x=x)


every_eps = pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3])


@every_dtype
@every_eps
def test_eps(eps, dtype, device):
    check(spread_case(eps).to(dtype, device))


def far_case(T, D):
    """A variance made of sums of squares would lose all its digits."""
    case = layer_norm_case(T, D)
    return case.with_inputs(x=case.inputs["x"] + 1000)


@every_dtype
def test_far_from_zero(dtype, device):
    check(far_case(17, 768).to(dtype, device))


@pytest.mark.parametrize(
    ("x", "residual", "w"),
    [
        (torch.bfloat16, torch.float32, torch.float32),  # autocast
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),  # LayerNorm kept in fp32
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
        *([] if ON_GPU else [(torch.float32, torch.float64, torch.float32)]),
    ],
    ids=str,
)
def test_mixed_dtypes(x, residual, w, device):
    case = layer_norm_case(33, 100).to(torch.float32, device)
    dtypes = {"x": x, "residual": residual, "w": w, "b": w}
    case = case.with_inputs(**{name: case.inputs[name].to(d) for name, d in dtypes.items()})
    out = case.call()
    assert out.dtype == torch.promote_types(x, residual)
    if torch.float64 not in dtypes.values():
        return check(case)
    # rounded to float64 at the end only: a gradient of an fp32 input has an ulp of its own
    dy = torch.randn_like(out)
    truth = gradients(case.to(torch.float64), case.to(torch.float64).by_formula, dy)
    for name, got in gradients(case, case.call, dy).items():
        torch.testing.assert_close(got.double(), truth[name], rtol=1e-6, atol=1e-6)


def assert_saved(dtype, device):
    """z is kept in the output's dtype, mean and rstd wide: kernels may not save less."""
    case = layer_norm_case(9, 40).to(dtype, device)
    x, w, b, residual = (case.inputs[name] for name in ("x", "w", "b", "residual"))
    op = torch.ops.bert_fast.add_layer_norm
    _, z, mean, rstd = op(x, None, residual, w, b, 1e-12, 0.0, None, 0, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    exact = x.double() + residual.double()
    assert z.dtype == dtype and mean.dtype == rstd.dtype == wide
    eps = torch.finfo(wide).eps
    torch.testing.assert_close(z, exact.to(wide).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(mean.double(), exact.mean(-1), rtol=8 * eps, atol=8 * eps)
    expected = (exact.var(-1, correction=0) + 1e-12).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, rtol=8 * eps, atol=0)
    assert not op(x, None, None, w, b, 1e-12, 0.0, None, 0, dtype)[1].numel()


@every_dtype
def test_saved_statistics(dtype, device):
    assert_saved(dtype, device)


def assert_one_column(dtype, device):
    """Its variance is 0: the result is b, and nothing depends on x."""
    case = layer_norm_case(3, 1, residual=False).to(dtype, device)
    got = gradients(case, case.call)
    assert torch.equal(got["out"], case.inputs["b"].expand(3, 1))
    assert not got["d_x"].any() and not got["d_w"].any()


@every_dtype
def test_one_column(dtype, device):
    assert_one_column(dtype, device)


def assert_rows_do_not_meet(device):
    """A NaN in one row changes no bit of another, forward or backward."""
    case = layer_norm_case(6, 40).to(torch.float32, device)
    dy = torch.randn(6, 40)
    clean = gradients(case, case.call, dy)
    x = case.inputs["x"].clone()
    x[2, 7] = torch.nan
    dirty = gradients(case.with_inputs(x=x), case.with_inputs(x=x).call, dy)
    others = [0, 1, 3, 4, 5]
    for name in ("out", "d_x", "d_residual"):
        assert torch.equal(dirty[name][others], clean[name][others]), name
        assert dirty[name][2].isnan().all(), name


def test_rows_do_not_meet(device):
    assert_rows_do_not_meet(device)


def test_statistics_are_as_wide_as_the_residual():
    """And so the fake says."""
    x, w = torch.randn(3, 8), torch.randn(8)
    arguments = x, None, x.double(), w, w, 1e-12, 0.0, None, 0, torch.float64
    library.opcheck(torch.ops.bert_fast.add_layer_norm.default, arguments)


def test_layer_norm_is_add_layer_norm_of_nothing():
    case = layer_norm_case(7, 40, residual=False)
    dy = torch.randn(7, 40)
    both = layer_norm_case(7, 40).with_inputs(**case.inputs, residual=None)
    assert_same_bits(gradients(both, both.call, dy), gradients(case, case.call, dy))


@pytest.mark.parametrize(
    ("change", "error", "got"),
    [
        ({"x": torch.ones(12)}, ValueError, "x: want (T, D) [*, 12], got [12]"),
        ({"x": torch.ones(5, 11)}, ValueError, "got [5, 11]"),
        ({"residual": torch.ones(4, 12)}, ValueError, "residual: want (T, D) [5, 12], got [4, 12]"),
        ({"residual": torch.ones(1, 12)}, ValueError, "got [1, 12]"),  # would broadcast
        ({"w": torch.ones(1, 12)}, ValueError, "got [1, 12]"),
        ({"b": torch.ones(1)}, ValueError, "b: want (D,) [12], got [1]"),
        ({"b": torch.ones(())}, ValueError, "got []"),
        ({"bias": torch.ones(1)}, ValueError, "bias: want (D,) [12], got [1]"),
        ({"bias": torch.ones(5, 12)}, ValueError, "got [5, 12]"),
        ({"w": torch.ones(())}, ValueError, "got []"),
    ],
    ids=str,
)
def test_refused_shapes(change, error, got):
    case = layer_norm_case()
    assert_refused(error, "add_layer_norm", got, lambda: case.call(**change))


# --- the kernels ---------------------------------------------------------------------------------

KERNEL_SHAPES = [
    (0, 64),  # no rows
    (1, 1),  # one number
    (37, 7),  # fewer columns than one call of Philox serves; several tiles, the last not full
    (9, 100),  # D is no power of two
    (5, 768),  # BERT-base
    (3, 1000),  # not a multiple of 16
    (3, 1024),  # BERT-large: a full tile
    (3, 1025),  # one column past it
    (2, 8192),  # the most
]


@kernel_dtype
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_kernel_shapes(shape, dtype, kernel_device):
    check(layer_norm_case(*shape, bias=True, p=0.1).to(dtype, kernel_device))


@kernel_dtype
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("bias", "residual"), [*product([True, False], repeat=2)])
def test_kernel_forms(bias, residual, p, dtype, kernel_device):
    case = layer_norm_case(19, 40, bias=bias, residual=residual, p=p)
    check(case.to(dtype, kernel_device))


@kernel_dtype
@pytest.mark.parametrize("data", DATA)
def test_kernel_data(data, dtype, kernel_device):
    check(layer_norm_case(19, 100, bias=True, p=0.1, data=data).to(dtype, kernel_device))


@pytest.mark.parametrize("T", [7, 8, 9, 17])
def test_kernel_partial_sums(T, kernel_device, monkeypatch):
    """Eight programs at most: one row each, one program fewer, and rows left over."""
    pytest.importorskip("triton")
    from bert_fast.kernels import common, layer_norm

    monkeypatch.setattr(common, "NUM_PARTIALS", 8)
    for tiles in layer_norm.BWD_TILES.values():
        monkeypatch.setitem(tiles, 8, (1, 1, 1))
    check(layer_norm_case(T, 3).to(torch.float32, kernel_device))


def test_kernel_partial_sums_of_more_rows(kernel_device, monkeypatch):
    """One row more than there are partial sums: two for each program."""
    pytest.importorskip("triton")
    from bert_fast.kernels import common, layer_norm

    for tiles in layer_norm.BWD_TILES.values():
        monkeypatch.setitem(tiles, 8, (1, 1, 1))
    check(layer_norm_case(common.NUM_PARTIALS + 1, 3).to(torch.float32, kernel_device))


@given(
    T=st.integers(0, 40),
    D=st.integers(1, 300),
    bias=st.booleans(),
    residual=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    data=st.sampled_from(DATA),
    dtype=st.sampled_from(KERNEL_DTYPES),
    seed=st.integers(0, 2**31),
)
def _check_drawn(kernel_device, T, D, bias, residual, p, data, dtype, seed):
    torch.manual_seed(seed)
    case = layer_norm_case(T, D, bias=bias, residual=residual, p=p, data=data)
    check(case.to(dtype, kernel_device))


few = settings(
    max_examples=15,
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


@kernel_dtype
@every_eps
def test_kernel_eps(eps, dtype, kernel_device):
    check(spread_case(eps).to(dtype, kernel_device))


@kernel_dtype
def test_kernel_far_from_zero(dtype, kernel_device):
    check(far_case(5, 768).to(dtype, kernel_device))


@kernel_dtype
def test_kernel_edges(dtype, kernel_device):
    assert_saved(dtype, kernel_device)
    assert_one_column(dtype, kernel_device)
    assert_rows_do_not_meet(kernel_device)


@pytest.mark.parametrize("low", KERNEL_DTYPES[1:], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("names", ["x", "x bias", "x residual", "residual", "w b", "x w b bias"])
def test_kernel_mixed_dtypes(names, p, low, kernel_device):
    """Some in 16 bits, the others in fp32; without dropout dx is still not dz in another dtype."""
    case = layer_norm_case(19, 100, bias=True, p=p).to(torch.float32, kernel_device)
    check(case.with_inputs(**{name: case.inputs[name].to(low) for name in names.split()}))


@kernel_dtype
def test_kernel_keeps_z(dtype, kernel_device):
    """Where the weight is 0 the output says nothing about z, and its gradient still needs it."""
    case = layer_norm_case(9, 40, bias=True)
    case.inputs["w"][::2] = 0
    check(case.to(dtype, kernel_device))
    case = case.with_inputs(w=torch.zeros(40)).to(dtype, kernel_device)
    check(case)
    found = gradients(case, case.call)
    assert not found["d_x"].any() and found["d_w"].all()


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_kernel_mask(p, kernel_device):
    """To the bit that of the formula: of z in the forward, of dx in the backward."""
    case = layer_norm_case(33, 65, p=p).to(torch.float32, kernel_device)
    x, w, dropout = case.inputs["x"], case.inputs["w"], case.dropout.values()
    factors = case.factors.to(x)
    op = torch.ops.bert_fast.add_layer_norm
    _, z, mean, rstd = op(torch.ones_like(x), None, None, w, w, 1.0, *dropout, torch.float32)
    assert torch.equal(z, factors)
    backward = torch.ops.bert_fast.add_layer_norm_bwd
    dx, dz, *_ = backward(x, z, w, mean, rstd, False, *dropout, torch.float32)
    assert torch.equal(dx, dz * factors)


@pytest.mark.parametrize("name", ["add_layer_norm", "layer_norm"])
def test_kernel_refused(name, kernel_device):
    """Every reason is in the message."""
    pytest.importorskip("triton")
    case = layer_norm_case(2, 8193, residual=name == "add_layer_norm").to(None, kernel_device)
    assert_refused(NotImplementedError, "add_layer_norm", "got 8193", case.call)
    both = case.with_inputs(x=case.inputs["x"].double())
    got = "x: want fp32, fp16 or bf16 on a GPU, got torch.float64; D: want 1 to 8192 on a GPU"
    assert_refused(NotImplementedError, "add_layer_norm", got, both.call)
