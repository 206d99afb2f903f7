"""Dropout's factors in eager PyTorch, from counters: nothing is stored, nothing depends on tiles.

The bits are those of Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3,
2011).
"""

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def philox(key: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> list[Tensor]:
    """Return four random 32-bit words (in int64) for each counter; key is an int64 scalar."""
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    for _ in range(10):
        # an int64 product wraps modulo 2**64, which leaves both of its 32-bit halves right
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((high >> 32) & _MASK32) ^ c1 ^ k0,
            high & _MASK32,
            ((low >> 32) & _MASK32) ^ c3 ^ k1,
            low & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return [c0, c1, c2, c3]


def dropout_threshold(p: float) -> int:
    """Return the 16-bit threshold for dropping with probability p: drop when bits < threshold."""
    return round(p * 65536)


def dropout_factors(
    p: float,
    seed: Tensor,
    site: int,
    row: Tensor,
    width: int,
    c2: Tensor,
    c3: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return what dropout multiplies by: 0, or 1 / (share kept).

    Column j of a row takes bits 16 * (j % 2) up of word (j % 8) // 2 of the Philox call with
    counters (row, j // 8, c2, c3) and key seed + site.

    Args:
        p: probability of dropping, in steps of 1 / 65536.
        seed: (1,) int64, one for each forward of a model.
        site: number of the dropout in the model.
        row: int64 counters that broadcast with c2 and c3, their last dimension of size 1.
        width: columns in a row.
        c2: int64 counters.
        c3: int64 counters.
        dtype: of the result.

    Returns:
        (..., width).
    """
    threshold = dropout_threshold(p)
    groups = torch.arange((width + 7) // 8, device=seed.device)
    row, groups, c2, c3 = torch.broadcast_tensors(row, groups, c2, c3)
    words = philox(seed + site, row, groups, c2, c3)
    halves = [half for w in words for half in (w & 0xFFFF, w >> 16)]
    bits = torch.stack(halves, dim=-1).flatten(-2)[..., :width]
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    return (bits >= threshold).to(dtype) * scale


def row_dropout(x: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor | None:
    """Return the factors for rows x (T, D), counters (row, column // 8, 0, 0), or None."""
    if seed is None or p == 0:
        return None
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=x.device)
    return dropout_factors(p, seed, site, row, x.shape[1], zero, zero, x.dtype)
