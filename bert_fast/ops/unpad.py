"""From a mask to packed rows."""

import torch
from torch import Tensor

from bert_fast import reference
from bert_fast.ops import checks, registry


def _fake(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    T = torch.library.get_ctx().new_dynamic_size()
    rows = mask.new_empty(T, dtype=torch.int64)
    cu_seqlens = mask.new_empty(mask.shape[0] + 1, dtype=torch.int32)
    return rows, cu_seqlens, torch.empty((), dtype=torch.int64, device="cpu")


_unpad = registry.register(
    "unpad(Tensor mask) -> (Tensor rows, Tensor cu_seqlens, Tensor max_len)",
    reference=reference.unpad,
    fake=_fake,
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
