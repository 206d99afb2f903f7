"""Losses that leave padding out, are summed in fp32, and are 0 where nothing is labelled."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bert_fast import ops
from bert_fast.packing import Layout
from bert_fast.reference import IGNORE


def wide(x: Tensor) -> Tensor:
    """Return x in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def loss_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype of eager's loss for these logits: fp32 at least under autocast."""
    autocast = torch.is_autocast_enabled(logits.device.type)
    return torch.promote_types(logits.dtype, torch.float32) if autocast else logits.dtype


def mean(total: Tensor, count: Tensor | int, num_items: Tensor | int | None = None) -> Tensor:
    """Return total / num_items; without num_items total / count, and 0 if the count is 0."""
    if isinstance(num_items, Tensor):
        return total / num_items.to(total.device)
    if num_items is not None:
        return total / num_items
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def cross_entropy(
    logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None, ignore: int = IGNORE
) -> Tensor:
    """Mean cross entropy over the rows whose label is not `ignore`; 0 when there are none.

    Args:
        logits: (N, C) floating.
        labels: (N,) int64: 0 to C - 1, or `ignore`.
        num_items: divisor in place of the number of labelled rows.
        ignore: label of a row that takes no part.

    Returns:
        (), in the dtype of the logits (fp32 under autocast).

    Raises:
        ValueError: a label is out of range (seen on the CPU), or there are not N of them.
    """
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels: want {logits.shape[0]} of them, got {[*labels.shape]}")
    ops.check_range("cross_entropy", "labels", labels, logits.shape[1], ignore=ignore)
    total = F.cross_entropy(wide(logits), labels, reduction="sum", ignore_index=ignore)
    return mean(total, (labels != ignore).sum(), num_items).to(loss_dtype(logits))


def row_mean(losses: Tensor, nonempty: Tensor | None) -> Tensor:
    """Return the mean of losses (B, C) over the sequences that have a token; 0 if none has."""
    if nonempty is None:
        return mean(losses.sum(), losses.numel())
    kept = torch.where(nonempty[:, None], losses, 0)
    return mean(kept.sum(), nonempty.sum() * losses.shape[1])


def sequence_labels(labels: Tensor, nonempty: Tensor | None) -> Tensor:
    """Return class labels (B,) as int64, `IGNORE` where a sequence is empty."""
    labels = _integers(labels.reshape(-1))
    return labels if nonempty is None else torch.where(nonempty, labels, IGNORE)


def token_labels(labels: Tensor, layout: Layout) -> Tensor:
    """Return labels (T,) as int64, of labels (B, L)."""
    if tuple(labels.shape) != tuple(layout.shape):
        raise ValueError(f"labels: want {[*layout.shape]}, got {[*labels.shape]}")
    return _integers(layout.gather(labels))


def _integers(labels: Tensor) -> Tensor:
    """Return labels as int64.

    Raises:
        TypeError: they are not integers.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: want integers, got {labels.dtype}")
    return labels.to(torch.int64)
