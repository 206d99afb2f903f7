"""The kernels of linear_cross_entropy: in Triton's interpreter here, compiled on a GPU."""

import op_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    DATA,
    Case,
    assert_same_bits,
    check,
    cross_entropy_case,
    gradients,
    kernel_dtype,
)
from torch.utils._python_dispatch import TorchDispatchMode

poison = op_cases.poison
IGNORE = -100


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 rows, in which programs take 8 rows and blocks of 64 words."""
    from bert_fast.kernels import cross_entropy

    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 1)
    monkeypatch.setattr(cross_entropy, "LOSS_BLOCKS", {80: (64, 1)})
    monkeypatch.setattr(cross_entropy, "GRADIENT_TILES", {80: (4, 64, 1, 1, 8)})


def raw(case: Case, with_grad: bool = True) -> tuple[torch.Tensor, ...]:
    """(loss, dx, dw, db) of the op below the checks."""
    args = [case.inputs[name] for name in ("x", "w", "b", "labels")]
    return torch.ops.bert_fast.linear_cross_entropy(*args, with_grad)


# --- shapes --------------------------------------------------------------------------------------

SHAPES = [
    (0, 24, 11),  # no rows
    (1, 1, 1),  # smallest: one word, the loss is 0
    (1, 64, 2),  # one row, far fewer words than a block
    (9, 20, 33),  # nothing is a multiple of 8
    (5, 16, 64),  # no word is added
    (7, 16, 65),  # one word past a multiple of 64
    (5, 12, 2500),  # more words than a block of either kernel, and a part of one
]


@kernel_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "alone"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, bias, dtype, kernel_device):
    check(cross_entropy_case(*shape, bias=bias).to(dtype, kernel_device))


@kernel_dtype
@pytest.mark.parametrize("data", DATA[1:])
def test_data(data, dtype, kernel_device):
    check(cross_entropy_case(9, 24, 70, data=data).to(dtype, kernel_device))


@pytest.mark.long
@kernel_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "alone"])
@pytest.mark.parametrize("shape", [(150, 31, 5), (40, 96, 1001), (20, 8, 30522)], ids=str)
def test_formula_of_more(shape, bias, dtype, kernel_device):
    check(cross_entropy_case(*shape, bias=bias).to(dtype, kernel_device))


def draw_and_check(data, device):
    T, D, V = (data.draw(st.integers(low, high)) for low, high in ((0, 20), (1, 20), (1, 200)))
    case = cross_entropy_case(
        T, D, V, bias=data.draw(st.booleans()), data=data.draw(st.sampled_from(DATA))
    )
    labels = [data.draw(st.sampled_from([IGNORE, 0, V - 1, V // 2])) for _ in range(T)]
    case = case.with_inputs(labels=torch.tensor(labels, dtype=torch.int64))
    check(case.to(data.draw(st.sampled_from(op_cases.KERNEL_DTYPES)), device))


@pytest.mark.parametrize("examples", [8, pytest.param(300, marks=pytest.mark.long)])
def test_drawn(examples, kernel_device, small_chunks):
    options = settings(derandomize=True, max_examples=examples, deadline=None, database=None)
    options(given(data=st.data())(draw_and_check))(device=kernel_device)


# --- chunks of rows ------------------------------------------------------------------------------


@kernel_dtype
@pytest.mark.parametrize("T", [15, 16, 17, 33])
def test_chunks(T, dtype, kernel_device, small_chunks):
    """Below, at and above whole chunks."""
    check(cross_entropy_case(T, 12, 11).to(dtype, kernel_device))


def test_sums_over_many_chunks(kernel_device, small_chunks):
    """Of 16-bit gradients, in fp32: rounded after each of 19 chunks they would be off by more."""
    check(cross_entropy_case(300, 24, 11).to(torch.float16, kernel_device))


def test_rows_have_the_same_bits_in_any_chunk(kernel_device, monkeypatch):
    """A row's loss and gradient; sums over rows may be made in another order."""
    from bert_fast.kernels import cross_entropy

    case = cross_entropy_case(35, 12, 11).to(torch.float32, kernel_device)
    whole = raw(case)
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 1)
    chunked = raw(case)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


def test_buffer_of_the_logits(monkeypatch):
    """Within its budget at BERT's size, with rows that begin at aligned addresses."""
    from bert_fast.kernels import cross_entropy

    rows, S = cross_entropy._buffer_shape(100_000, 30522, 2)
    assert S == 30528 and rows % 16 == 0
    assert 0.9 < rows * S * 2 / cross_entropy.LOGITS_BYTES <= 1
    assert cross_entropy._buffer_shape(7, 30522, 2) == (7, 30528)
    assert cross_entropy._buffer_shape(0, 1, 4) == (0, 64)
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 1)
    assert cross_entropy._buffer_shape(100, 30522, 2) == (16, 30528)


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "loss"])
def test_logits_are_never_whole_or_wide(gradient, kernel_device, small_chunks):
    """Nothing made on the way is larger than a chunk of logits, x or w; no chunk of it is fp32."""
    from bert_fast.kernels import cross_entropy

    made = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor) and t.is_floating_point():
                    made.add((t.numel(), t.dtype))
            return out

    inputs = cross_entropy_case(40, 3, 130).to(torch.float16, kernel_device).inputs
    with Watch():  # which sees nothing within an op
        cross_entropy.linear_cross_entropy(**inputs, with_grad=gradient)
    assert max(made, key=lambda m: m[0]) == (16 * 192, torch.float16)
    assert max(n for n, dtype in made if dtype == torch.float32) < 16 * 130


# --- labels --------------------------------------------------------------------------------------


@kernel_dtype
def test_no_label(dtype, kernel_device):
    case = cross_entropy_case(6, 24, 11).to(dtype, kernel_device)
    case = case.with_inputs(labels=torch.full((6,), IGNORE, device=kernel_device))
    for value in gradients(case, case.call).values():
        assert torch.equal(value, torch.zeros_like(value))


@kernel_dtype
def test_every_label(dtype, kernel_device):
    """Each word is some row's label, the first and the last included."""
    case = cross_entropy_case(13, 12, 13).to(dtype, kernel_device)
    check(case.with_inputs(labels=torch.randperm(13, device=kernel_device)))


@pytest.mark.parametrize("label", [-1, -99, -101, 11, 63, 64, 2**62, -(2**63)])
def test_label_out_of_range(label, kernel_device):
    """The loss is NaN and so is the row's gradient; those of other rows are as they were."""
    case = cross_entropy_case(7, 12, 11).to(torch.float32, kernel_device)
    clean = raw(case)
    labels = case.inputs["labels"].clone()
    labels[3] = label
    loss, dx, dw, db = raw(case.with_inputs(labels=labels))
    others = torch.arange(7, device=kernel_device) != 3
    assert loss.isnan()
    assert dx[3].isnan().all() and dw.isnan().all() and db.isnan().all()
    assert torch.equal(dx[others], clean[1][others])
    assert raw(case.with_inputs(labels=labels), False)[0].isnan()


def test_label_out_of_range_does_not_reach_the_next_chunk(kernel_device, small_chunks):
    case = cross_entropy_case(40, 12, 11).to(torch.float32, kernel_device)
    clean = raw(case)
    labels = case.inputs["labels"].clone()
    labels[3] = 11
    dx = raw(case.with_inputs(labels=labels))[1]
    assert torch.equal(dx[4:], clean[1][4:])


# --- values --------------------------------------------------------------------------------------


@kernel_dtype
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits(size, dtype, kernel_device):
    case = cross_entropy_case(9, 24, 70)
    case = case.with_inputs(w=case.inputs["w"] * size / (8 if dtype == torch.float16 else 1))
    check(case.to(dtype, kernel_device))


@kernel_dtype
def test_logits_far_below_zero(dtype, kernel_device):
    """Every exponential of a logit is 0; of its distance to the largest it is not."""
    case = cross_entropy_case(5, 12, 70)
    check(case.with_inputs(b=case.inputs["b"] - 1000).to(dtype, kernel_device))


@pytest.mark.parametrize("dtype", op_cases.KERNEL_DTYPES[1:], ids=str)
def test_sum_over_chunks_is_wide(dtype, kernel_device, small_chunks):
    """Eight chunks whose share of the weight's gradient is less than half an ulp of the first's."""
    x = torch.zeros(144, 1, device=kernel_device, dtype=dtype)
    x[0], x[16:] = 1024, 3 / 128
    w = torch.zeros(2, 1, device=kernel_device, dtype=dtype)  # so that both are as likely
    labels = torch.zeros(144, dtype=torch.int64, device=kernel_device)
    dw = torch.ops.bert_fast.linear_cross_entropy(x, w, None, labels, True)[2]
    expected = torch.tensor([[-513.5], [513.5]], device=kernel_device)
    assert torch.equal(dw, expected.to(dtype))


@pytest.mark.parametrize("far", [1e4, -3e4])
def test_logits_far_from_zero(far, kernel_device):
    """The loss keeps its digits, and words past the vocabulary are less likely than any."""
    case = cross_entropy_case(9, 1, 11, bias=False)
    words = torch.arange(11.0)[:, None]  # so that logits are exact
    case = case.with_inputs(x=torch.ones(9, 1), w=far + words)
    check(case.to(torch.float32, kernel_device))


@kernel_dtype
@pytest.mark.parametrize("first", [0, 9], ids=["finite after", "finite before"])
def test_word_that_cannot_be(first, dtype, kernel_device, small_chunks):
    """A bias of -inf: no NaN, and the word has no gradient, whole blocks of such words included."""
    case = cross_entropy_case(9, 12, 140).to(dtype, kernel_device)
    b, labels = case.inputs["b"].clone(), case.inputs["labels"].clone()
    never = slice(0, 70) if first == 0 else slice(9, 140)
    b[never] = -torch.inf
    labels[labels >= 0] = 75 if first == 0 else 4
    loss, dx, dw, db = raw(case.with_inputs(b=b, labels=labels))
    kept = [n for n in range(140) if n not in range(*never.indices(140))]
    shift = kept[0]
    few = {"w": case.inputs["w"][kept].clone(), "b": b[kept].clone(), "labels": labels - shift}
    few["labels"] = torch.where(labels < 0, labels, labels - shift)
    expected = raw(case.with_inputs(**few))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close((loss, dx, dw[kept], db[kept]), expected, **tolerance)
    assert not dw[never].any() and not db[never].any()


def test_label_that_cannot_be(kernel_device):
    """Its loss is infinite, as torch.nn.functional.cross_entropy's."""
    case = cross_entropy_case(3, 12, 11).to(torch.float32, kernel_device)
    b = case.inputs["b"].clone()
    b[case.inputs["labels"][0]] = -torch.inf
    assert raw(case.with_inputs(b=b))[0] == torch.inf


def test_rows_without_label_are_not_read(kernel_device):
    """Even NaN in them changes neither the loss nor the gradients of other rows."""
    case = cross_entropy_case(9, 12, 11).to(torch.float32, kernel_device)
    clean = raw(case)
    x = case.inputs["x"].clone()
    x[2::3] = torch.nan
    loss, dx, _, db = raw(case.with_inputs(x=x))
    assert torch.equal(loss, clean[0])
    assert torch.equal(dx, clean[1])
    assert torch.equal(db, clean[3])


# --- the rest ------------------------------------------------------------------------------------


@kernel_dtype
def test_loss_alone(dtype, kernel_device):
    """The same bits without gradients, which are empty then; the loss is fp32."""
    case = cross_entropy_case(9, 12, 11).to(dtype, kernel_device)
    loss, *grads = raw(case, False)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert torch.equal(loss, raw(case)[0])
    assert all(g.shape == (0,) and g.dtype == dtype for g in grads)


def test_same_bits_twice(kernel_device, small_chunks):
    case = cross_entropy_case(40, 12, 70).to(torch.float16, kernel_device)
    assert_same_bits(gradients(case, case.call), gradients(case, case.call))


def test_outputs_are_as_the_fake_s(kernel_device):
    """Shape, dtype and layout, which tracing relies on."""
    for bias in (True, False):
        for shape in ((0, 12, 11), (5, 12, 11), (5, 12, 64)):
            case = cross_entropy_case(*shape, bias=bias).to(torch.float16, kernel_device)
            inputs = {n: t if t is None else t.to("meta") for n, t in case.inputs.items()}
            for got, want in zip(raw(case), raw(case.with_inputs(**inputs)), strict=True):
                assert (got.shape, got.dtype, got.stride()) == (
                    want.shape,
                    want.dtype,
                    want.stride(),
                )
                assert got.storage_offset() == 0


def test_unsupported(kernel_device):
    case = cross_entropy_case(3, 12, 11).to(torch.float64, kernel_device)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy: x: want fp32") as caught:
        case.call()
    assert "w: want" in str(caught.value) and "b: want" in str(caught.value)
    w = torch.empty(0, 12, device=kernel_device)
    args = torch.ones(3, 12, device=kernel_device), w, None, case.inputs["labels"], True
    with pytest.raises(NotImplementedError, match="w: want"):
        torch.ops.bert_fast.linear_cross_entropy(*args)
