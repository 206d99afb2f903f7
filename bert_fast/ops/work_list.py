"""The order in which a GPU takes the tiles of a packed batch."""

import torch
from torch import Tensor

from bert_fast import reference
from bert_fast.ops import checks, registry

TILE = 128  # rows of an entry: a sequence that long or shorter is one


def _fake(cu_seqlens: Tensor, num_rows: int, tile: int) -> Tensor:
    return cu_seqlens.new_empty(1 + num_rows // tile + cu_seqlens.shape[0], 4)


def _cuda(cu_seqlens: Tensor, num_rows: int, tile: int) -> Tensor:
    from bert_fast.kernels import work_list

    return work_list.work_list(cu_seqlens, num_rows, tile)


_work_list = registry.register(
    "work_list(Tensor cu_seqlens, SymInt num_rows, int tile) -> Tensor",
    reference=reference.work_list,
    fake=_fake,
    cuda=_cuda,
    cpu_reason="only a GPU needs it",
)


def work_list(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Cut packed sequences into tiles of 128 rows, longest sequence first.

    Made once for a batch and given to every `attention` of it; on the device, nothing waits.

    Args:
        cu_seqlens: (B + 1,) int32: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
        num_rows: T; the rows past the last sequence are one entry, the last, as sequence B.

    Returns:
        (2 + num_rows // 128 + B, 4) int32: first (number of entries, of these in sequences, of
        these in sequences longer than 128, 0), then for each entry (sequence, its first row, its
        length, the tile's first row within it), then zeros.

    Raises:
        ValueError: cu_seqlens is not 1-D or empty.
        TypeError: cu_seqlens is not int32.
    """
    check = checks.Checks("work_list")
    check.dtype("cu_seqlens", cu_seqlens, torch.int32)
    if cu_seqlens.ndim != 1 or not cu_seqlens.shape[0]:
        check.note(f"cu_seqlens: want (B + 1,), got {[*cu_seqlens.shape]}")
    check.done()
    return _work_list(cu_seqlens.contiguous(), num_rows, TILE)
