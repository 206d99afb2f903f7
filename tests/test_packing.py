"""pack, unpack and unpad against loops over the entries of the mask."""

import random
from itertools import pairwise

import op_cases
import pytest
import torch
from op_cases import assert_refused

from bert_fast import ops, reference
from bert_fast.packing import pack

poison = op_cases.poison
LIMIT = 64  # rows of the position table


def random_mask(seed: int) -> torch.Tensor:
    """(B, L) bool: on the right, on the left, in holes, all or nothing; some rows empty or full."""
    chance = random.Random(seed)
    B, L = chance.randint(0, 7), chance.randint(0, 12)
    columns, rows = torch.arange(L), []
    for _ in range(B):
        n = chance.choice([0, L, chance.randint(0, L)])
        holes = torch.tensor([chance.random() < 0.6 for _ in range(L)], dtype=torch.bool)
        rows.append(chance.choice([columns < n, columns >= L - n, holes]))
    return torch.stack(rows) if B else torch.zeros(0, L, dtype=torch.bool)


def by_loop(mask: torch.Tensor, *padded: torch.Tensor) -> tuple[list[int], list[int], list[list]]:
    """Flat index of each token, the sequences' borders, and each tensor's values at the tokens."""
    rows, ends, values = [], [0], [[] for _ in padded]
    for b, row in enumerate(mask.tolist()):
        for column, real in enumerate(row):
            if real:
                rows.append(b * len(row) + column)
                for found, t in zip(values, padded, strict=True):
                    found.append(t[b, column].tolist())
        ends.append(len(rows))
    return rows, ends, values


def padded_inputs(B: int, L: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(0, 100, (B, L)),
        "token_type_ids": torch.randint(0, 2, (B, L)),
        "position_ids": torch.randint(0, LIMIT, (B, L)),
    }


def lengths_of(ends: list[int]) -> list[int]:
    return [last - first for first, last in pairwise(ends)]


def check_mask(mask: torch.Tensor) -> None:
    """All that a layout answers, for one mask."""
    B, L = mask.shape
    inputs = padded_inputs(B, L)
    rows, ends, (tokens, types, positions) = by_loop(mask, *inputs.values())
    lengths = lengths_of(ends)
    batch = pack(**inputs, attention_mask=mask, max_positions=LIMIT)
    assert batch.tokens.tolist() == tokens
    assert batch.types.tolist() == types
    assert batch.positions.tolist() == positions
    assert batch.embeds is None and not batch.packed
    assert batch.cu_seqlens.tolist() == ends and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_len == max(lengths, default=0) and type(batch.max_len) is int
    assert batch.num_tokens == len(rows) and batch.num_sequences == B
    assert (list(range(B * L)) if batch.rows is None else batch.rows.tolist()) == rows
    assert torch.equal(batch.mask(), mask)
    assert batch.columns().tolist() == [row % L for row in rows]
    nonempty = batch.nonempty()
    assert ([True] * B if nonempty is None else nonempty.tolist()) == [n > 0 for n in lengths]
    x = torch.randn(len(rows), 3)
    expected = torch.zeros(B * L, 3)
    expected[rows] = x
    assert torch.equal(batch.unpack(x), expected.view(B, L, 3))
    assert (batch.unpack(x[:, 0], -7.0)[~mask] == -7).all()
    assert torch.equal(batch.gather(batch.unpack(x)), x)
    first = [x[end] if n else torch.zeros(3) for end, n in zip(ends, lengths, strict=False)]
    assert torch.equal(batch.first_rows(x), torch.stack(first) if B else torch.zeros(0, 3))
    alone = pack(inputs["input_ids"], mask, max_positions=LIMIT)
    assert torch.equal(alone.positions, batch.columns())
    assert not alone.types.any() and alone.types.shape == batch.types.shape


MASKS = {
    "full": torch.ones(3, 5),
    "right": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]),
    "left": torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]),
    "holes": torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]),
    "empty rows": torch.tensor([[0, 0], [1, 1], [0, 0], [0, 0], [1, 0], [0, 0]]),
    "nothing": torch.zeros(2, 3),
    "one token": torch.ones(1, 1),
    "one pad": torch.zeros(1, 1),
    "one column": torch.tensor([[1], [0], [1]]),
    "B = 0": torch.ones(0, 4),
    "L = 0": torch.ones(3, 0),
    "B = L = 0": torch.ones(0, 0),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_mask(mask):
    check_mask(mask.bool())


def test_random_masks():
    for seed in range(300):
        check_mask(random_mask(seed))


@pytest.mark.long
def test_more_random_masks():
    for seed in range(300, 10_000):
        check_mask(random_mask(seed))


@pytest.mark.parametrize("unpad", [reference.unpad, ops.unpad], ids=["reference", "op"])
def test_unpad(unpad):
    for seed in range(300):
        mask = random_mask(seed)
        rows, ends, _ = by_loop(mask)
        found = unpad(mask)
        assert [t.tolist() for t in found] == [rows, ends, max(lengths_of(ends), default=0)]
        assert [t.dtype for t in found] == [torch.int64, torch.int32, torch.int64]
        assert found[2].device.type == "cpu" and found[2].shape == ()


@pytest.mark.parametrize("unpad", [reference.unpad, ops.unpad], ids=["reference", "op"])
def test_unpad_takes_any_strides(unpad):
    base = torch.rand(12, 16) < 0.6
    repeated = base[:1].expand(5, -1), base[:, :1].expand(-1, 4)
    for mask in (base.T, base[:, ::2], base[1::3, 2:], *repeated):
        for got, expected in zip(unpad(mask), unpad(mask.contiguous()), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16, torch.bfloat16],
    ids=str,
)
def test_mask_dtypes(dtype):
    """Everything but 0 is a token."""
    mask = torch.tensor([[1, 0, 2], [0, 0, 0], [1, 1, 0]]).to(dtype)
    ids = torch.arange(9).view(3, 3)
    batch = pack(ids, mask, max_positions=LIMIT)
    assert batch.tokens.tolist() == [0, 2, 6, 7]
    assert batch.cu_seqlens.tolist() == [0, 2, 2, 4]


def test_small_parts_of_a_mask_count():
    mask = torch.tensor([[1.0, 0.25, 1e-30, 0.0, -0.0]])
    assert pack(torch.arange(5)[None], mask, max_positions=LIMIT).tokens.tolist() == [0, 1, 2]


def test_without_padding_nothing_is_copied():
    """No mask and a mask of ones are the same layout: tokens are the batch, seen flat."""
    ids = torch.randint(0, 9, (3, 4))
    for mask in (None, torch.ones(3, 4)):
        batch = pack(ids, mask, max_positions=LIMIT)
        assert batch.rows is None and batch.nonempty() is None
        assert batch.tokens.data_ptr() == ids.data_ptr()
        assert batch.cu_seqlens.tolist() == [0, 4, 8, 12] and batch.max_len == 4
        assert batch.positions.tolist() == [0, 1, 2, 3] * 3


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
def test_no_tokens_without_mask(shape):
    batch = pack(torch.zeros(shape, dtype=torch.int64), max_positions=LIMIT)
    assert batch.num_tokens == 0 and batch.num_sequences == shape[0]
    assert batch.cu_seqlens.tolist() == [0] * (shape[0] + 1)
    assert batch.mask().shape == shape and batch.positions.shape == (0,)
    assert torch.equal(batch.first_rows(torch.zeros(0, 2)), torch.zeros(shape[0], 2))


def test_one_row_of_positions_for_all():
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    ids, one = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[5, 6, 7]])
    batch = pack(ids, mask, one - 5, one, max_positions=LIMIT)
    assert batch.positions.tolist() == [6, 7, 5, 7]
    assert batch.types.tolist() == [1, 2, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings_in_place_of_ids(dtype):
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    embeds = torch.randn(2, 3, 4).to(dtype).requires_grad_()
    batch = pack(attention_mask=mask, inputs_embeds=embeds, max_positions=LIMIT)
    assert batch.tokens is None and torch.equal(batch.embeds, embeds[mask.bool()])
    (gradient,) = torch.autograd.grad(batch.embeds, embeds, torch.ones_like(batch.embeds))
    assert torch.equal(gradient, mask[..., None].expand(2, 3, 4).to(dtype))


def test_gradient_of_unpack():
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]]).bool()
    batch = pack(torch.zeros(2, 3, dtype=torch.int64), mask, max_positions=LIMIT)
    x, d = torch.randn(4, 5, requires_grad=True), torch.randn(2, 3, 5)
    assert torch.equal(torch.autograd.grad(batch.unpack(x), x, d)[0], d[mask])


def test_padding_is_not_read():
    """NaN there goes nowhere."""
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    embeds = torch.where(mask.bool()[..., None], 1.0, torch.nan).expand(2, 3, 4)
    batch = pack(attention_mask=mask, inputs_embeds=embeds, max_positions=LIMIT)
    assert (batch.embeds == 1).all()


# --- callers who pack ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", [(3, 4), (0, 3, 0, 0, 4, 0), (7,), (1,) * 7], ids=str)
def test_packed(lengths, dtype):
    ids = torch.arange(10, 17)[None]
    cu_seqlens = op_cases.borders(lengths).to(dtype)
    for max_len in (None, max(lengths), torch.tensor(max(lengths))):
        batch = pack(ids, cu_seqlens=cu_seqlens, max_len=max_len, max_positions=LIMIT)
        assert batch.packed and batch.rows is None and batch.shape == (1, 7)
        assert batch.max_len == max(lengths) and type(batch.max_len) is int
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.num_tokens == 7 and batch.num_sequences == len(lengths)
        assert batch.tokens.tolist() == list(range(10, 17))
        assert batch.positions.tolist() == [i for n in lengths for i in range(n)]
        assert batch.nonempty().tolist() == [n > 0 for n in lengths]
        x = torch.randn(7, 2)
        ends = op_cases.borders(lengths).tolist()
        first = [x[end] if n else torch.zeros(2) for end, n in zip(ends, lengths, strict=False)]
        assert torch.equal(batch.first_rows(x), torch.stack(first))
        assert torch.equal(batch.unpack(x), x[None])
        assert batch.mask().shape == (1, 7) and batch.mask().all()


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
def test_packed_nothing(lengths):
    ids = torch.zeros(1, 0, dtype=torch.int64)
    batch = pack(ids, cu_seqlens=op_cases.borders(lengths), max_positions=LIMIT)
    assert batch.num_tokens == 0 and batch.num_sequences == len(lengths) and batch.max_len == 0
    assert torch.equal(batch.first_rows(torch.zeros(0, 2)), torch.zeros(len(lengths), 2))


@pytest.mark.parametrize(
    ("cu_seqlens", "max_len", "error", "got"),
    [
        ([0, 3], None, ValueError, "want 5 (T) last, got 3"),
        ([0, 6], None, ValueError, "want 5 (T) last, got 6"),
        ([1, 5], None, ValueError, "0 first"),
        ([0, 4, 3, 5], None, ValueError, "got [0, 4, 3, 5]"),
        ([0, 3, 5], 2, ValueError, "steps of 0 to 2"),
        ([[0, 5]], None, ValueError, "got [1, 2]"),
        ([], None, ValueError, "got [0]"),
        ([0.0, 2.5, 5.0], None, TypeError, "torch.float32"),
        ([0, 2**32 + 5], 5, ValueError, "got"),
    ],
    ids=str,
)
def test_packed_refused(cu_seqlens, max_len, error, got):
    ids = torch.zeros(1, 5, dtype=torch.int64)
    dtype = torch.float32 if error is TypeError else torch.int64
    cu_seqlens = torch.tensor(cu_seqlens, dtype=dtype)

    def call():
        pack(ids, cu_seqlens=cu_seqlens, max_len=max_len, max_positions=LIMIT)

    assert_refused(error, "cu_seq_lens_q", got, call)


# --- refusals ------------------------------------------------------------------------------------

IDS, EMBEDS = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, 3)
BORDERS = torch.tensor([0, 5], dtype=torch.int32)
ADDITIVE = torch.tensor([0, -1e4]).repeat(5).view(2, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "got"),
    [
        ({"input_ids": None}, ValueError, "input_ids and inputs_embeds, got neither"),
        ({"inputs_embeds": EMBEDS}, ValueError, "input_ids and inputs_embeds, got both"),
        ({"input_ids": IDS[0]}, ValueError, "input_ids: want (B, L), got [5]"),
        ({"input_ids": IDS[None]}, ValueError, "input_ids: want (B, L), got [1, 2, 5]"),
        ({"input_ids": IDS.float()}, TypeError, "input_ids: want integers, got torch.float32"),
        (
            {"input_ids": None, "inputs_embeds": EMBEDS[0]},
            ValueError,
            "inputs_embeds: want (B, L, D), got [5, 3]",
        ),
        ({"attention_mask": IDS[:, None]}, NotImplementedError, "mask: want (B, L), got [2, 1, 5]"),
        ({"attention_mask": IDS[:, None, None]}, NotImplementedError, "got [2, 1, 1, 5]"),
        ({"attention_mask": IDS[:, 1:]}, ValueError, "attention_mask: want [2, 5], got [2, 4]"),
        ({"attention_mask": IDS[:1]}, ValueError, "attention_mask: want [2, 5], got [1, 5]"),
        ({"attention_mask": IDS[0]}, ValueError, "attention_mask: want [2, 5], got [5]"),
        ({"attention_mask": ADDITIVE}, ValueError, "got a negative value"),
        ({"attention_mask": ADDITIVE.long()}, ValueError, "got a negative value"),
        ({"token_type_ids": IDS.float()}, TypeError, "token_type_ids: want integers, got torch.f"),
        ({"token_type_ids": IDS[:, 1:]}, ValueError, "want [2, 5] or [1, 5], got [2, 4]"),
        ({"token_type_ids": IDS[0]}, ValueError, "token_type_ids: want [2, 5] or [1, 5], got [5]"),
        ({"position_ids": IDS.bool()}, TypeError, "position_ids: want integers, got torch.bool"),
        ({"position_ids": IDS.repeat(2, 1)}, ValueError, "want [2, 5] or [1, 5], got [4, 5]"),
        ({"input_ids": IDS.repeat(1, 13)}, ValueError, "max_position_embeddings = 64, got 65"),
        ({"cu_seqlens": BORDERS}, ValueError, "cu_seq_lens_q: want (1, T), got [2, 5]"),
        ({"cu_seqlens": BORDERS, "attention_mask": IDS}, ValueError, "cu_seq_lens_q, got a mask"),
    ],
    ids=lambda value: str(value)[:40].replace("\n", ""),
)
def test_refused(arguments, error, got):
    with pytest.raises(error) as caught:
        pack(**{"input_ids": IDS} | arguments, max_positions=LIMIT)
    assert "want " in str(caught.value) and got in str(caught.value)


def test_longest_sequence():
    """max_position_embeddings itself is allowed; beyond it only with positions of the caller's."""
    ids = torch.zeros(1, LIMIT + 1, dtype=torch.int64)
    assert pack(ids[:, 1:], max_positions=LIMIT).positions.max() == LIMIT - 1
    assert pack(ids, position_ids=ids, max_positions=LIMIT).num_tokens == LIMIT + 1
    packed = pack(ids, cu_seqlens=torch.tensor([0, 1, LIMIT + 1]), max_positions=LIMIT)
    assert packed.positions.max() == LIMIT - 1
    with pytest.raises(ValueError, match=r"max_position_embeddings = 64, got 65"):
        pack(ids, cu_seqlens=torch.tensor([0, LIMIT + 1]), max_positions=LIMIT)


@pytest.mark.parametrize(
    ("mask", "error", "got"),
    [
        (torch.ones(3).bool(), ValueError, "want (B, L) [*, *], got [3]"),
        (torch.ones(2, 3, 4).bool(), ValueError, "got [2, 3, 4]"),
        (torch.ones(2, 3), TypeError, "want bool, got torch.float32"),
        (torch.ones(2, 3).long(), TypeError, "want bool, got torch.int64"),
        (torch.ones(2, 3).to(torch.uint8), TypeError, "want bool, got torch.uint8"),
    ],
    ids=str,
)
def test_unpad_refuses(mask, error, got):
    assert_refused(error, "unpad", got, lambda: ops.unpad(mask))
