"""Losses that leave padding out, are summed in fp32, and are 0 where nothing is labelled."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bert_fast import ops
from bert_fast.packing import Layout, check_integers
from bert_fast.reference import IGNORE


def wide(x: Tensor) -> Tensor:
    """Return x in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def loss_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype of eager's loss for these logits: fp32 at least under autocast."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return wide if ops.is_autocast(logits.device.type) else logits.dtype


def mean(total: Tensor, count: Tensor | int, num_items: Tensor | int | None = None) -> Tensor:
    """Return total / num_items, or total / count without it; 0 where that would be 0 / 0."""
    divisor = count if num_items is None else num_items
    if isinstance(divisor, Tensor):
        return total / divisor.to(total.device).clamp(min=1)
    return total / max(divisor, 1)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    num_items: Tensor | int | None = None,
    *,
    ignore: int = IGNORE,
    name: str = "labels",
) -> Tensor:
    """Mean cross entropy over the rows whose label is not `ignore`; 0 when there are none.

    Args:
        logits: (N, C) floating.
        labels: (N,) int64: 0 to C - 1, or `ignore`.
        num_items: divisor in place of the number of labelled rows.
        ignore: label of a row that takes no part.
        name: of the labels, for errors.

    Returns:
        (), in the dtype of the logits (fp32 under autocast).

    Raises:
        ValueError: a label is out of range (seen on the CPU).
    """
    check = ops.Checks("cross_entropy")
    check.range(name, labels, logits.shape[1], ignore=ignore)
    check.done()
    total = F.cross_entropy(wide(logits), labels, reduction="sum", ignore_index=ignore)
    return mean(total, (labels != ignore).sum(), num_items).to(loss_dtype(logits))


def row_mean(losses: Tensor, nonempty: Tensor | None) -> Tensor:
    """Return the mean of losses (B, C) over the sequences that have a token; 0 if none has."""
    if nonempty is None:
        return mean(losses.sum(), losses.numel())
    kept = torch.where(nonempty[:, None], losses, 0)
    return mean(kept.sum(), nonempty.sum() * losses.shape[1])


def sequence_labels(name: str, labels: Tensor, count: int, nonempty: Tensor | None) -> Tensor:
    """Return class labels (count,) as int64, `IGNORE` where a sequence is empty.

    Args:
        name: of the argument, for errors.
        labels: (count,) or (count, 1) integers.
        count: number of sequences.
        nonempty: (count,) bool, or None: all are.
    """
    labels = integers(name, labels)
    if labels.numel() != count:
        raise ValueError(f"{name}: want {[count]}, got {[*labels.shape]}")
    labels = labels.reshape(-1)
    return labels if nonempty is None else torch.where(nonempty, labels, IGNORE)


def token_labels(labels: Tensor, layout: Layout) -> Tensor:
    """Return labels (T,) as int64, of labels (B, L)."""
    labels = integers("labels", labels)
    if tuple(labels.shape) != tuple(layout.shape):
        raise ValueError(f"labels: want {[*layout.shape]}, got {[*labels.shape]}")
    return layout.gather(labels)


def integers(name: str, labels: Tensor) -> Tensor:
    """Return labels as int64.

    Raises:
        TypeError: they are not a tensor of integers.
    """
    check_integers(name, labels)
    return labels.to(torch.int64)
