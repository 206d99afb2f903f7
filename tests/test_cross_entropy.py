"""linear_cross_entropy against torch.nn.functional's linear and cross_entropy."""

import op_cases
import pytest
import torch
from op_cases import (
    DATA,
    assert_refused,
    assert_same_bits,
    check,
    cross_entropy_case,
    every_dtype,
    gradients,
)
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast import reference

poison = op_cases.poison
SHAPES = [
    (0, 24, 11),  # no rows
    (1, 1, 1),  # smallest: one class, its loss is 0
    (1, 64, 2),  # one row
    (17, 100, 33),  # nothing is a multiple of 8
    (40, 96, 1001),  # many classes
    (257, 31, 5),  # a weight and a bias summed over more rows than any block, and one left over
]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three rows of 11 classes."""
    monkeypatch.setattr(reference, "_CHUNK_LOGITS", 3 * 11 + 10)


@every_dtype
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "alone"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, bias, data, dtype, device):
    check(cross_entropy_case(*shape, bias=bias, data=data).to(dtype, device))


@every_dtype
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 6, 7, 31])
def test_chunks(T, dtype, device, small_chunks):
    """Below, at and above whole chunks of rows."""
    check(cross_entropy_case(T, 24, 11).to(dtype, device))


def test_a_chunk_is_at_least_a_row(device, monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_LOGITS", 1)
    check(cross_entropy_case(7, 24, 11).to(torch.float32, device))


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "loss"])
def test_logits_are_never_whole(gradient, small_chunks):
    """The largest tensor made on the way has the weight's size, not N times V."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    inputs = cross_entropy_case(300, 8, 11).inputs
    with Watch():  # which sees nothing within an op
        reference.linear_cross_entropy(**inputs, with_grad=gradient)
    assert 33 <= largest <= 300 * 8 < 300 * 11


@every_dtype
def test_no_label(dtype, device):
    """0 and zero gradients, where a mean would be 0 / 0."""
    case = cross_entropy_case(6, 24, 11).to(dtype, device)
    case = case.with_inputs(labels=torch.full((6,), -100, device=device))
    for value in gradients(case, case.call).values():
        assert torch.equal(value, torch.zeros_like(value))


@every_dtype
def test_rows_without_label_are_not_read(dtype, device):
    """Even NaN in them changes neither the loss nor the gradients."""
    case = cross_entropy_case(9, 24, 11).to(dtype, device)
    clean = gradients(case, case.call)
    x = case.inputs["x"].clone()
    x[2::3] = 0
    zeroed = case.with_inputs(x=x)
    assert_same_bits(gradients(zeroed, zeroed.call), clean)
    assert not clean["d_x"][2::3].any()


@every_dtype
@pytest.mark.parametrize("factor", [1 / 3, 0.7, 1 / 257, 0.0, -1.0])
def test_gradient_of_the_loss(factor, dtype, device):
    """It multiplies before the one rounding to 16 bits, as a mean over 3 rows needs."""
    case = cross_entropy_case(17, 24, 11).to(dtype, device)
    one = gradients(case, case.call, torch.ones(()))
    got = gradients(case, case.call, torch.tensor(factor, dtype=one["out"].dtype))
    for name in ("d_x", "d_w", "d_b"):
        wide = torch.promote_types(dtype, torch.float32)
        scale = torch.tensor(factor, dtype=wide, device=device)
        expected = (one[name].to(wide) * scale).to(dtype)
        assert torch.equal(got[name], expected), name


def test_loss_scale(device):
    """torch.amp.GradScaler begins with 2**16, which fp16 does not have; the gradients it has."""
    case = cross_entropy_case(17, 24, 11).to(torch.float16, device)
    case = case.with_inputs(x=case.inputs["x"] / 256)
    one = gradients(case, case.call, torch.ones(()))
    small = one["d_x"].abs() < 0.5
    got = gradients(case, case.call, torch.tensor(65536.0))["d_x"]
    assert small.any()
    assert torch.equal(got[small], (one["d_x"].float() * 65536).half()[small])


@pytest.mark.parametrize("dtype", op_cases.DTYPES[1:], ids=str)
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits(size, dtype, device):
    case = cross_entropy_case(9, 24, 11)
    check(case.with_inputs(w=case.inputs["w"] * size).to(dtype, device))


@every_dtype
def test_loss_is_wide(dtype, device):
    """fp32 for 16 bits: the sum over many rows would not fit."""
    case = cross_entropy_case(5, 24, 11).to(dtype, device)
    assert case.call().dtype == torch.promote_types(dtype, torch.float32)
    assert case.call().shape == ()


@pytest.mark.parametrize(
    ("change", "error", "got"),
    [
        ({"labels": [0, 1, 11, 2, 3]}, ValueError, "labels: want 0 to 10 or -100, got 11 at 2"),
        ({"labels": [0, 1, 2, 3, -1]}, ValueError, "got -1 at 4"),
        ({"labels": [-100, 1, -99, 3, 1]}, ValueError, "got -99 at 2"),
        ({"labels": [0, 1, 2, 3]}, ValueError, "labels: want (N,) [5], got [4]"),
        ({"labels": [[0, 1, 2, 3, 4]]}, ValueError, "got [1, 5]"),
        ({"labels": [0.0, 1, 2, 3, 4]}, TypeError, "labels: want int64, got torch.float32"),
        ({"x": torch.ones(12)}, ValueError, "x: want (N, D) [*, 12], got [12]"),
        ({"x": torch.ones(5, 11)}, ValueError, "got [5, 11]"),
        ({"w": torch.ones(11)}, ValueError, "w: want (V, D) [*, *], got [11]"),
        ({"b": torch.ones(1)}, ValueError, "b: want (V,) [11], got [1]"),  # would broadcast
        ({"x": torch.ones(5, 12).half()}, TypeError, "x torch.float16, w torch.float32"),
        ({"b": torch.ones(11).double()}, TypeError, "b torch.float64"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(change, error, got):
    case = cross_entropy_case()
    change = {n: torch.tensor(v) if isinstance(v, list) else v for n, v in change.items()}
    assert_refused(error, "linear_cross_entropy", got, lambda: case.call(**change))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_refused_label_dtypes(dtype):
    case = cross_entropy_case()
    labels = torch.zeros(5, dtype=dtype)
    got = f"labels: want int64, got {dtype}"
    assert_refused(TypeError, "linear_cross_entropy", got, lambda: case.call(labels=labels))
