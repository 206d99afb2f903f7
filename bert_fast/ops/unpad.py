"""From a mask to packed rows."""

import torch
from torch import Tensor, library

from bert_fast import reference
from bert_fast.ops import checks, registry
from bert_fast.ops.work_list import TILE


def _fake(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    T = library.get_ctx().new_dynamic_size()
    rows = mask.new_empty(T, dtype=torch.int64)
    cu_seqlens = mask.new_empty(mask.shape[0] + 1, dtype=torch.int32)
    return rows, cu_seqlens, torch.empty((), dtype=torch.int64, device="cpu")


_unpad = registry.register(
    "unpad(Tensor mask) -> (Tensor rows, Tensor cu_seqlens, Tensor max_len)",
    reference=reference.unpad,
    fake=_fake,
)


def _work_reference(
    mask: Tensor, tile: int, num_rows: int | None, max_len: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two ops one after the other; what the caller knows is found once more."""
    rows, cu_seqlens, longest = torch.ops.bert_fast.unpad(mask)
    work = torch.ops.bert_fast.work_list(cu_seqlens, rows.shape[0], tile)
    return rows, cu_seqlens, work, longest


def _work_fake(
    mask: Tensor, tile: int, num_rows: int | None, max_len: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T = library.get_ctx().new_dynamic_size() if num_rows is None else num_rows
    rows = mask.new_empty(T, dtype=torch.int64)
    cu_seqlens = mask.new_empty(mask.shape[0] + 1, dtype=torch.int32)
    work = cu_seqlens.new_empty(1 + T // tile + cu_seqlens.shape[0], 4)
    return rows, cu_seqlens, work, torch.empty((), dtype=torch.int64, device="cpu")


_unpad_work = registry.register(
    "unpad_work(Tensor mask, int tile, SymInt? num_rows, SymInt? max_len)"
    " -> (Tensor rows, Tensor cu_seqlens, Tensor work, Tensor max_len)",
    reference=_work_reference,
    fake=_work_fake,
    cpu_reason="only a GPU needs it",
)


def unpad(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the tokens of a padded batch.

    Args:
        mask: (B, L) bool, True where there is a token.

    Returns:
        rows (T,) int64, the flat indices b * L + l of the tokens, ascending; cu_seqlens (B + 1,)
        int32, where each sequence begins among them; max_len, the longest sequence, a 0-d int64
        tensor on the CPU. A mask on another device costs one copy of 16 bytes to the host.

    Raises:
        ValueError: the mask is not 2-D.
        TypeError: the mask is not bool.
    """
    check = checks.Checks("unpad")
    check.shape("mask", mask, (None, None), "(B, L)")
    check.dtype("mask", mask, torch.bool)
    check.done()
    return _unpad(mask)


def unpad_work(
    mask: Tensor, num_rows: int | None = None, max_len: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the tokens of a padded batch, and the work list of attention for them.

    On a GPU with the C++ extension that is one launch.

    Args:
        mask: (B, L) bool, True where there is a token.
        num_rows: T, where the caller knows it; with max_len nothing is copied to the host.
        max_len: the longest sequence; given if num_rows is.

    Returns:
        (rows, cu_seqlens, work, max_len), as those of `unpad` and `work_list`. Unless num_rows is
        given, `rows` holds the memory of B * L of them.

    Raises:
        ValueError: the mask is not 2-D; one of num_rows and max_len without the other.
        TypeError: the mask is not bool.
    """
    check = checks.Checks("unpad_work")
    check.shape("mask", mask, (None, None), "(B, L)")
    check.dtype("mask", mask, torch.bool)
    if (num_rows is None) != (max_len is None):
        check.note("num_rows, max_len: want both or neither, got one")
    check.done()
    return _unpad_work(mask, TILE, num_rows, max_len)
