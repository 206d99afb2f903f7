"""add_layer_norm and layer_norm against torch.nn.functional.layer_norm."""

import op_cases
import pytest
import torch
from op_cases import (
    DATA,
    assert_refused,
    assert_same_bits,
    check,
    every_dtype,
    gradients,
    layer_norm_case,
)

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
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3])
def test_eps(eps, dtype, device):
    """Rows from constant to a deviation of 1e-2: next to these the eps of BERT and others shows."""
    case = layer_norm_case(6, 64, residual=False, eps=eps)
    x = case.inputs["x"] * torch.tensor([0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2])[:, None]
    check(case.with_inputs(x=x).to(dtype, device))


@every_dtype
def test_far_from_zero(dtype, device):
    """A variance made of sums of squares would lose all its digits."""
    case = layer_norm_case(17, 768)
    check(case.with_inputs(x=case.inputs["x"] + 1000).to(dtype, device))


@pytest.mark.parametrize(
    ("x", "residual", "w"),
    [
        (torch.bfloat16, torch.float32, torch.float32),  # autocast
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),  # LayerNorm kept in fp32
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.float64, torch.float32),
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


@every_dtype
def test_saved_statistics(dtype, device):
    """z is kept in the output's dtype, mean and rstd wide: kernels may not save less."""
    case = layer_norm_case(9, 40).to(dtype, device)
    x, w, b, residual = (case.inputs[name] for name in ("x", "w", "b", "residual"))
    op = torch.ops.bert_fast.add_layer_norm
    _, z, mean, rstd = op(x, residual, w, b, 1e-12, 0.0, None, 0, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    exact = x.double() + residual.double()
    assert z.dtype == dtype and mean.dtype == rstd.dtype == wide
    eps = torch.finfo(wide).eps
    torch.testing.assert_close(z, exact.to(wide).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(mean.double(), exact.mean(-1), rtol=8 * eps, atol=8 * eps)
    expected = (exact.var(-1, correction=0) + 1e-12).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, rtol=8 * eps, atol=0)
    assert not op(x, None, w, b, 1e-12, 0.0, None, 0, dtype)[1].numel()


@every_dtype
def test_one_column(dtype, device):
    """Its variance is 0: the result is b, and nothing depends on x."""
    case = layer_norm_case(3, 1, residual=False).to(dtype, device)
    got = gradients(case, case.call)
    assert torch.equal(got["out"], case.inputs["b"].expand(3, 1))
    assert not got["d_x"].any() and not got["d_w"].any()


def test_rows_do_not_meet():
    """A NaN in one row changes no bit of another, forward or backward."""
    case = layer_norm_case(6, 40)
    dy = torch.randn(6, 40)
    clean = gradients(case, case.call, dy)
    x = case.inputs["x"].clone()
    x[2, 7] = torch.nan
    dirty = gradients(case.with_inputs(x=x), case.with_inputs(x=x).call, dy)
    others = [0, 1, 3, 4, 5]
    for name in ("out", "d_x", "d_residual"):
        assert torch.equal(dirty[name][others], clean[name][others]), name
        assert dirty[name][2].isnan().all(), name


def test_statistics_are_as_wide_as_the_residual():
    """And so the fake says."""
    x, w = torch.randn(3, 8), torch.randn(8)
    arguments = x, x.double(), w, w, 1e-12, 0.0, None, 0, torch.float64
    torch.library.opcheck(torch.ops.bert_fast.add_layer_norm.default, arguments)


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
        ({"w": torch.ones(())}, ValueError, "got []"),
    ],
    ids=str,
)
def test_refused_shapes(change, error, got):
    case = layer_norm_case()
    assert_refused(error, "add_layer_norm", got, lambda: case.call(**change))
