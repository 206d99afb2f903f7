"""Token lists -> the arguments of a packed batch, with the names that BertModel.forward takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bert_fast.data import steps
from bert_fast.data.reference import IGNORE

_LEFT_OUT = "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping"
MOST = 2**63 - 1  # what may stand in a row without a limit of its own


def pack_rows(
    input_ids: Sequence[Any] | np.ndarray | Tensor,
    token_type_ids: Sequence[Any] | np.ndarray | Tensor | None = None,
    labels: Sequence[Any] | np.ndarray | Tensor | None = None,
    *,
    vocab_size: int | None = None,
) -> dict[str, Tensor | int]:
    """Return a batch without padding, as `model(**batch)` takes it.

    Args:
        input_ids: B lists, 1-D arrays or tensors of integers, or one (B, L), on the CPU.
        token_type_ids: rows as long as those of input_ids.
        labels: rows as long, at least -100.
        vocab_size: what every id must be less than.

    Returns:
        input_ids (1, T) int64; position_ids and, where given, token_type_ids and labels likewise;
        cu_seq_lens_q and cu_seq_lens_k (B + 1,) int32; max_length_q and max_length_k.

    Raises:
        TypeError: values that are no integers.
        ValueError: an id out of range, rows of different lengths; with the example's number.
    """
    ids, cu_seqlens = flat("input_ids", input_ids, high=vocab_size)
    columns = {"input_ids": ids}
    if token_type_ids is not None:
        columns["token_type_ids"], _ = flat("token_type_ids", token_type_ids, like=cu_seqlens)
    if labels is not None:
        columns["labels"], _ = flat("labels", labels, low=IGNORE, like=cu_seqlens)
    return packed(cu_seqlens, columns)


def flat(
    name: str,
    rows: Sequence[Any] | np.ndarray | Tensor,
    *,
    low: int = 0,
    high: int | None = None,
    booleans: bool = False,
    like: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values (T,) int64 of all rows behind one another, and cu_seqlens (B + 1,) int32.

    Args:
        name: of the argument, for errors.
        rows: B rows, or an array or tensor (B, L).
        low: the smallest value there may be.
        high: one more than the largest; None: any.
        booleans: whether bool counts as integers.
        like: the cu_seqlens that the rows must have.
    """
    if not isinstance(rows, list | tuple):
        if not isinstance(rows, np.ndarray | Tensor):
            raise TypeError(f"{name}: want a list of rows, got {type(rows).__name__}")
        if rows.ndim != 2:
            raise ValueError(f"{name}: want rows or (B, L), got {[*rows.shape]}")
        rows = list(np.asarray(rows))
    return steps.flatten(rows, name, low, MOST if high is None else high, booleans, like)


def packed(cu_seqlens: np.ndarray, columns: dict[str, np.ndarray]) -> dict[str, Tensor | int]:
    """Return the arguments of a packed batch of columns (T,)."""
    columns = columns | {"position_ids": steps.positions(cu_seqlens)}
    batch: dict[str, Tensor | int]
    batch = {name: torch.from_numpy(column[None]) for name, column in columns.items()}
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.from_numpy(cu_seqlens)
    batch["max_length_q"] = batch["max_length_k"] = steps.longest(cu_seqlens)
    return batch


class PackingCollator:
    """The collate_fn that packs tokenized examples into a batch without padding: fine-tuning's.

    For models of this package and accelerated ones of transformers. Unlike transformers'
    DataCollatorWithFlattening it keeps token_type_ids, so that pairs stay pairs, and every label.

    Args:
        position_ids_start: position of a sequence's first token; RoBERTa's padding id + 1.
    """

    def __init__(self, *, position_ids_start: int = 0):
        self.position_ids_start = position_ids_start

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor | int]:
        """Return a packed batch of the features.

        Args:
            features: of each example a dict, as a tokenizer returns it for a text or a pair:
                input_ids and, in all or in none of them, token_type_ids, attention_mask (all 1),
                and labels (or label, label_ids), a number or one for each token.

        Returns:
            As `pack_rows`, and labels (B,) where they are numbers.

        Raises:
            ValueError: there is padding, or an entry that has no place in a packed batch, such as
                start_positions; rows of different lengths.
        """
        rows = {name: [feature[name] for feature in features] for name in features[0]}
        for mask in rows.pop("attention_mask", ()):
            if not np.asarray(mask).all():
                raise ValueError("attention_mask: want examples without padding, got a 0")
        given = [name for name in ("labels", "label", "label_ids") if name in rows]
        labels = rows.pop(given[0]) if given else None
        for_tokens = labels is not None and np.ndim(labels[0]) == 1
        ids, types = rows.pop("input_ids"), rows.pop("token_type_ids", None)
        if unknown := rows.keys() - {*_LEFT_OUT}:
            got = ", ".join(sorted(unknown))
            raise ValueError(f"features: want input_ids, token_type_ids and labels, got {got}")
        batch = pack_rows(ids, types, labels if for_tokens else None)
        batch["position_ids"] += self.position_ids_start
        if labels is not None and not for_tokens:
            batch["labels"] = torch.as_tensor(labels)
        return batch
