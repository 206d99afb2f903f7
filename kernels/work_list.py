"""The order in which attention takes the tiles of a packed batch: longest sequence first.

Sequence b has rows cu_seqlens[b] to cu_seqlens[b + 1]; every `tile` rows of it, from its first, are
one entry. Programs take them in this order and read from the device how many there are: work is
balanced whatever the lengths, and a captured graph serves every mix of them.

    entry = (sequence, its first row, its length, the tile's first row within it)

The rows past the last sequence are the last entry, of sequence B: attention writes zeros there.
Borders are held within 0 to T whatever cu_seqlens says, since nobody has looked at it.

An entry's place is the number of entries before it, which each program counts over all sequences:
O(B^2) comparisons, no sort, one launch (B = 8,192: 67 M comparisons over 513 programs). Bound by
the latency of that one launch; it runs once a forward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels import common


@triton.jit
def _borders(cu_seqlens_ptr, sequences, B, T):
    """First rows and lengths of `sequences`; sequence B is what follows the last."""
    first = tl.load(cu_seqlens_ptr + sequences, mask=sequences <= B, other=0)
    last = tl.load(cu_seqlens_ptr + sequences + 1, mask=sequences < B, other=0)
    last = tl.where(sequences == B, T, last)
    first = tl.minimum(tl.maximum(first, 0), T)
    return first, tl.minimum(tl.maximum(last, first), T) - first


@triton.jit(do_not_specialize=["B", "T", "capacity"])  # they change with every batch
def _work_list_kernel(
    cu_seqlens_ptr,  # (B + 1,) int32
    entries_ptr,  # (1 + capacity, 4) int32, zeros
    B,
    T,
    capacity,
    tile,
    BLOCK: tl.constexpr,  # sequences a program places
    BLOCK_B: tl.constexpr,  # sequences it looks at together
):
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, length = _borders(cu_seqlens_ptr, mine, B, T)
    tiles = (length + tile - 1) // tile
    tiles = tl.where(mine < B, tiles, tl.where(mine == B, tl.minimum(tiles, 1), 0))

    before = tl.zeros((BLOCK,), dtype=tl.int32)
    total = 0
    total_long = 0
    for start in range(0, B, BLOCK_B):
        others = start + tl.arange(0, BLOCK_B)
        _, their_length = _borders(cu_seqlens_ptr, others, B, T)
        their_tiles = tl.where(others < B, (their_length + tile - 1) // tile, 0)
        longer = their_length[None, :] > length[:, None]
        as_long = their_length[None, :] == length[:, None]
        earlier = others[None, :] < mine[:, None]
        is_before = longer | (as_long & earlier) | (mine == B)[:, None]
        before += tl.sum(tl.where(is_before, their_tiles[None, :], 0), axis=1)
        total += tl.sum(their_tiles, axis=0)
        total_long += tl.sum(tl.where(their_tiles > 1, their_tiles, 0), axis=0)

    for i in range(0, tl.max(tiles, axis=0)):
        at = before + i
        mask = (i < tiles) & (at < capacity)
        ptrs = entries_ptr + 4 * (1 + at.to(tl.int64))
        tl.store(ptrs, mine, mask=mask)
        tl.store(ptrs + 1, first, mask=mask)
        tl.store(ptrs + 2, length, mask=mask)
        tl.store(ptrs + 3, i * tile, mask=mask)

    head_ptrs = entries_ptr + tl.zeros_like(mine)
    tl.store(head_ptrs, tl.minimum(total + tiles, capacity), mask=mine == B)
    tl.store(head_ptrs + 1, tl.minimum(total, capacity), mask=mine == B)
    tl.store(head_ptrs + 2, tl.minimum(total_long, capacity), mask=mine == B)


def work_list(cu_seqlens: Tensor, num_rows: int, tile: int) -> Tensor:
    """Return the entries (1 + num_rows // tile + B + 1, 4) int32 of the sequences and the rest.

    Args:
        cu_seqlens: (B + 1,) int32 contiguous.
        num_rows: T.
        tile: rows of an entry.

    Returns:
        Row 0 is (number of entries, of these in sequences, of these in sequences longer than a
        tile, 0); unused rows at the end are 0.
    """
    B = cu_seqlens.shape[0] - 1
    capacity = num_rows // tile + B + 1
    entries = torch.zeros(1 + capacity, 4, dtype=torch.int32, device=cu_seqlens.device)
    grid = (triton.cdiv(B + 1, 16),)
    args = cu_seqlens, entries, B, num_rows, capacity, tile
    common.launch(_work_list_kernel, grid, *args, BLOCK=16, BLOCK_B=128)
    return entries
