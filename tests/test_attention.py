"""attention against torch.nn.functional.scaled_dot_product_attention, sequence by sequence."""

from itertools import pairwise

import op_cases
import pytest
import torch
from op_cases import (
    DATA,
    ON_GPU,
    assert_refused,
    assert_same_bits,
    attention_case,
    borders,
    check,
    check_most,
    every_dtype,
    gradients,
)

poison = op_cases.poison
HEAD_SIZES = (8, 16, 24, 32, 40, 48, 64, 72, 80, 96, 104, 128)
SHAPES = [  # lengths, heads, head size
    ((), 2, 8),  # no sequence
    ((0,), 2, 8),  # an empty one
    ((0, 0, 0), 1, 16),
    ((1,), 1, 8),  # smallest: the probability is 1
    ((1,) * 40, 3, 24),
    ((17,), 1, 64),  # one head
    ((0, 0, 5, 0, 7, 0, 0) * 5, 2, 16),  # borders that repeat: first, between, last
    ((33, 2, 65), 12, 64),  # BERT-base; one past a tile, and far below it
    # a head size that is odd, and the smallest: no GPU's kernel takes them
    *([] if ON_GPU else [((3, 40), 16, 7), ((5, 9) * 8, 2, 1)]),
]


def many_lengths(longest: int) -> list[int]:
    """Every length to `longest` once, in any order, empty sequences strewn in."""
    lengths = torch.cat((torch.arange(longest + 1), torch.zeros(6, dtype=torch.int64)))
    return lengths[torch.randperm(len(lengths))].tolist()


@every_dtype
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("slack", [0, 3], ids=["exact", "slack"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, slack, data, dtype, device):
    lengths, H, K = shape
    # of few keys one score's rounding decides over a row, and the baseline may have it by luck
    draws = 5 if max(lengths, default=8) < 8 else 1
    cases = [attention_case(lengths, H, K, slack=slack, data=data) for _ in range(draws)]
    check_most([case.to(dtype, device) for case in cases], norm=1.5)


@every_dtype
@pytest.mark.parametrize("K", HEAD_SIZES)
def test_every_head_size(K, dtype, device):
    check(attention_case((1, 2, 31, 32, 33, 70), H=2, K=K).to(dtype, device), norm=1.5)


@every_dtype
@pytest.mark.parametrize("K", [64, pytest.param(40, marks=pytest.mark.long)])
def test_every_length(K, dtype, device):
    """1 to 130: each remainder of any tile that a kernel may have."""
    check(attention_case(many_lengths(130), H=1, K=K).to(dtype, device), norm=1.5)


@pytest.mark.long
@every_dtype
@pytest.mark.parametrize("K", HEAD_SIZES)
def test_every_length_and_head_size(K, dtype, device):
    check(attention_case(many_lengths(130), H=2, K=K).to(dtype, device), norm=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_sequences(dtype, device):
    check(attention_case((511, 1, 512, 513), H=1, K=16).to(dtype, device), norm=1.5)


@every_dtype
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout(p, dtype, device):
    """With the mask made here; a probability of 1 leaves nothing."""
    case = attention_case((19, 0, 1, 34), H=3, K=16, p=p, slack=2).to(dtype, device)
    check(case, norm=1.5)
    assert case.call().any() == (p < 1)


@every_dtype
@pytest.mark.parametrize("largest", [1e3, 2e4, 6e4])
def test_large_scores(largest, dtype, device):
    """No probability is NaN where scores reach 6e4, and -1e4 is nobody's minus infinity."""
    case = attention_case((7, 64, 33), H=2, K=16)
    case.inputs["qkv"][:, :2] *= (largest / 16) ** 0.5
    case = case.to(dtype, device)
    if dtype.itemsize == 2:
        check(case, norm=1.5)
        return
    # A score's rounding is of the score's size, and a probability moves by as much, relatively.
    dy = torch.randn_like(case.call())
    exact = gradients(case.to(torch.float64), case.to(torch.float64).by_formula, dy)
    for name, got in gradients(case, case.call, dy).items():
        limit = 8 * torch.finfo(dtype).eps * largest * exact[name].abs().max()
        assert (got - exact[name]).abs().max() <= limit, name


@every_dtype
def test_log_sum_exp(dtype, device):
    """Saved in fp32, 0 in rows of no sequence."""
    case = attention_case((5, 0, 9), H=2, K=8, slack=3).to(dtype, device)
    qkv = case.inputs["qkv"]
    _, lse = torch.ops.bert_fast.attention(qkv, case.inputs["cu_seqlens"], 9, 0.0, None, 0)
    assert lse.dtype == torch.promote_types(dtype, torch.float32) and lse.shape == (2, 17)
    expected = torch.zeros(2, 17, dtype=torch.float64, device=device)
    for first, last in ((0, 5), (5, 14)):
        q, k, _ = qkv[first:last].double().permute(1, 2, 0, 3)
        expected[:, first:last] = (q @ k.mT * 8**-0.5).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)
    assert not lse[:, 14:].any()


def parts(found: dict, lengths: tuple[int, ...]) -> list[dict]:
    """What was found, for each sequence."""
    ends = borders(lengths).tolist()
    return [{name: t[a:b] for name, t in found.items()} for a, b in pairwise(ends)]


@every_dtype
def test_a_sequence_alone(dtype, device):
    """To the bit what it is in any batch, in any order, forward and backward."""
    lengths = (5, 64, 1, 0, 17, 33, 65)
    case = attention_case(lengths, H=2, K=16).to(dtype, device)
    dy = torch.randn(sum(lengths), 2, 16).to(device, dtype)
    whole = parts(gradients(case, case.call, dy), lengths)
    inputs = parts({"qkv": case.inputs["qkv"], "dy": dy}, lengths)
    for order in ([0], [1], [2], [3], [5], [6, 4, 2], [3, 6, 1, 3, 0, 5, 4, 2]):
        chosen = [lengths[i] for i in order]
        batch = attention_case(chosen).with_inputs(
            qkv=torch.cat([inputs[i]["qkv"] for i in order]), cu_seqlens=borders(chosen).to(device)
        )
        found = gradients(batch, batch.call, torch.cat([inputs[i]["dy"] for i in order]))
        for i, got in zip(order, parts(found, chosen), strict=True):
            assert_same_bits(got, whole[i])


@every_dtype
def test_sequences_do_not_meet(dtype, device):
    """NaN in a sequence and in rows of none changes no bit of the others."""
    lengths = (5, 3, 0, 9)
    case = attention_case(lengths, slack=4).to(dtype, device)
    qkv, dy = case.inputs["qkv"], torch.randn(21, 2, 8).to(device, dtype)
    clean = gradients(case, case.call, dy)
    foul = torch.zeros(21, dtype=torch.bool, device=device)
    foul[5:8] = foul[17:] = True
    spread = foul[:, None, None]
    dirty = case.with_inputs(qkv=torch.where(spread[..., None], torch.nan, qkv))
    dirty = gradients(dirty, dirty.call, torch.where(spread, torch.nan, dy))
    for name, value in clean.items():
        assert torch.equal(dirty[name][~foul], value[~foul]), name
        assert dirty[name][5:8].isnan().all(), name
        assert not dirty[name][17:].any() and not value[17:].any(), name


def test_max_len_is_a_bound():
    case = attention_case((5, 3, 9))
    dy = torch.randn(17, 2, 8)
    tight = gradients(case, case.call, dy)
    case.options["max_len"] = 512
    assert_same_bits(gradients(case, case.call, dy), tight)


def test_keys_count_once():
    """Equal keys share the probability: the result is the mean of the values."""
    case = attention_case((5, 130), H=1, K=16)
    qkv = case.inputs["qkv"].clone()
    qkv[:, 1] = 1.0
    out = case.call(qkv=qkv)
    for rows in (slice(0, 5), slice(5, 135)):
        mean = qkv[rows, 2].mean(0).expand_as(out[rows])
        torch.testing.assert_close(out[rows], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "got"),
    [
        ([1, 9], ValueError, "want 0 first, got 1; cu_seqlens: want steps of 0 to 5, got [1, 9]"),
        ([0, 5, 3, 9], ValueError, "got [0, 5, 3, 9]"),
        ([0, 5, 10], ValueError, "want 9 (T) last, got 10"),
        ([0, 5, 8], ValueError, "want 9 (T) last, got 8"),  # a sequence forgotten
        ([0, 6, 9], ValueError, "want steps of 0 to 5, got [0, 6, 9]"),
        ([0, -1], ValueError, "got [0, -1]; cu_seqlens: want 9 (T) last, got -1"),
        ([[0, 5]], ValueError, "want (B + 1,), got [1, 2]"),
        ([], ValueError, "want (B + 1,), got [0]"),
        (9, ValueError, "want (B + 1,), got []"),
    ],
    ids=str,
)
def test_refused_borders(cu_seqlens, error, got):
    case = attention_case((4, 5))
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    assert_refused(error, "attention", got, lambda: case.call(cu_seqlens=cu_seqlens))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.int16], ids=str)
def test_refused_border_dtypes(dtype):
    case = attention_case((4, 5))
    cu_seqlens = borders((4, 5)).to(dtype)
    got = f"cu_seqlens: want int32, got {dtype}"
    assert_refused(TypeError, "attention", got, lambda: case.call(cu_seqlens=cu_seqlens))


@pytest.mark.parametrize("shape", [(9, 48), (9, 2, 2, 8), (9, 3, 16), (9, 3, 2, 8, 1)], ids=str)
def test_refused_shapes(shape):
    case = attention_case((4, 5))
    got = f"qkv: want (T, 3, H, K) [*, 3, *, *], got {[*shape]}"
    assert_refused(ValueError, "attention", got, lambda: case.call(qkv=torch.randn(shape)))
