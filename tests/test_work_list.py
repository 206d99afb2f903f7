"""work_list: the tiles of a batch, longest sequence first, counted on the device."""

import op_cases
import pytest
import torch
from op_cases import assert_refused, borders
from torch import Tensor, library

from bert_fast import ops, reference

poison = op_cases.poison
LENGTHS = [
    (),  # no sequence
    (0,),
    (0, 0, 0),
    (1,),
    (128,),  # a tile to the row
    (127, 128, 129, 256, 257),  # around tiles
    (5, 5, 5, 300, 5, 300),  # as long: in the order of the batch
    (0, 7, 0, 0, 400, 0),  # empty ones first, between, last
    tuple(range(40)),  # more sequences than a program places
    tuple(3 * i % 151 for i in range(300)),  # and than it looks at together
]


def by_hand(lengths: tuple[int, ...], slack: int) -> list[list[int]]:
    """The entries, from sorted lists."""
    starts = borders(lengths).tolist()
    order = sorted(range(len(lengths)), key=lambda b: (-lengths[b], b))
    entries = [[b, starts[b], lengths[b], at] for b in order for at in range(0, lengths[b], 128)]
    rest = [[len(lengths), starts[-1], slack, 0]] if slack else []
    long = sum(n > 128 for _, _, n, _ in entries)
    return [[len(entries + rest), len(entries), long, 0], *entries, *rest]


def assert_entries(found: Tensor, lengths: tuple[int, ...], slack: int) -> None:
    expected = by_hand(lengths, slack)
    assert found.dtype == torch.int32
    assert found.shape == (2 + (sum(lengths) + slack) // 128 + len(lengths), 4)
    assert found[: len(expected)].tolist() == expected
    assert not found[len(expected) :].any()


@pytest.mark.parametrize("slack", [0, 1, 300])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: str(lengths[:6]))
def test_entries(lengths, slack, device):
    cu_seqlens = borders(lengths).to(device)
    assert_entries(ops.work_list(cu_seqlens, sum(lengths) + slack).cpu(), lengths, slack)


@pytest.mark.parametrize("slack", [0, 1, 300])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: str(lengths[:6]))
def test_kernel_entries(lengths, slack, kernel_device):
    cu_seqlens = borders(lengths).to(kernel_device)
    assert_entries(ops.work_list(cu_seqlens, sum(lengths) + slack).cpu(), lengths, slack)


@pytest.mark.parametrize("rows", [10, 1000])
@pytest.mark.parametrize(
    "cu_seqlens",
    [
        [0, 9, 4, 12],
        [-5, 3, 8],
        [0, 2**31 - 1, 5],
        [7, 7],
        [0, 2000, 0, 2000, 0, 2000],  # of 1,000 rows more tiles than there is room for
        [0, 3],
    ],
    ids=str,
)
def test_borders_are_held_within_the_rows(cu_seqlens, rows, kernel_device):
    """Nobody has looked at them on a GPU: no entry may point outside, nor be one too many."""
    found = ops.work_list(torch.tensor(cu_seqlens, dtype=torch.int32, device=kernel_device), rows)
    count = int(found[0, 0])
    assert 0 <= found[0, 2] <= found[0, 1] <= count < found.shape[0]
    _, first, length, offset = found[1 : 1 + count].T.long()
    assert (first >= 0).all() and (length >= 0).all() and (first + length <= rows).all()
    assert (offset >= 0).all()


def test_another_tile(kernel_device):
    cu_seqlens = borders((3, 9, 4)).to(kernel_device)
    found = torch.ops.bert_fast.work_list(cu_seqlens, 17, 4)
    assert torch.equal(found.cpu(), reference.work_list(cu_seqlens.cpu(), 17, 4))
    entries = [[1, 3, 9, 0], [1, 3, 9, 4], [1, 3, 9, 8], [2, 12, 4, 0], [0, 0, 3, 0], [3, 16, 1, 0]]
    assert found[:7].tolist() == [[6, 5, 3, 0], *entries]


def test_registration(kernel_device):
    cu_seqlens = borders((3, 200, 4)).to(kernel_device)
    library.opcheck(torch.ops.bert_fast.work_list.default, (cu_seqlens, 207, 128))


def test_refused():
    name, op = "work_list", ops.work_list
    assert_refused(TypeError, name, "torch.int64", lambda: op(borders((3,)).long(), 3))
    assert_refused(ValueError, name, "[1, 2]", lambda: op(borders((3,))[None], 3))
    assert_refused(ValueError, name, "[0]", lambda: op(borders((3,))[:0], 3))
