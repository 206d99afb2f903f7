"""Examples -> a masked batch: the collate_fn of a DataLoader for masked-language modelling."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bert_fast.data import steps
from bert_fast.data.masking import MaskingRule, check_epoch, check_seed
from bert_fast.data.packing import MOST, flat, packed
from bert_fast.data.reference import IGNORE

_LIMITS = {  # entries by token: one more than their largest value, whether they may be bool
    "input_ids": (MOST, False),  # of the vocabulary
    "token_type_ids": (MOST, False),
    "attention_mask": (2, True),
    "special_tokens_mask": (2, True),
}
_MADE = {"labels", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
_LEFT_OUT = ("offset_mapping", "length", "overflow_to_sample_mapping")


class MaskedLMCollator:
    """Masks examples, and packs or pads them into a batch for `model(**batch)`.

    Packed batches (the default) are for the models of this package; padded ones also for those of
    transformers. The tokenizer is read when the object is made and is not kept.

    Each example has its own mask. With a seed the mask depends on the seed, on the epoch and on the
    example, never on the batch, the order or the number of workers; a new epoch has new masks once
    `set_epoch` is called, as before each `iter(loader)`. Without a seed every call draws one from
    torch's default generator, which a DataLoader seeds anew for each worker and epoch.

    Args:
        tokenizer: ours or transformers'.
        mlm_probability: as the next five, see `MaskingRule`.
        mask_replace_prob: see there.
        random_replace_prob: see there.
        whole_word_mask: see there.
        sampling: see there.
        max_predictions: see there.
        seed: -2**63 to 2**64 - 1, or None.
        index_name: the entry with an example's number; None: a digest of its ids, so that examples
            with the same ids have the same mask in an epoch.
        padded: return rows of one length and their attention_mask.
        pad_to_multiple_of: padded lengths are multiples of this.

    Raises:
        ValueError: see `MaskingRule`; no pad token; an option that takes no effect.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        mlm_probability: float = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        whole_word_mask: bool = False,
        sampling: str = "exact",
        max_predictions: int | None = None,
        seed: int | None = None,
        index_name: str | None = None,
        padded: bool = False,
        pad_to_multiple_of: int | None = None,
    ):
        self.rule = MaskingRule(
            tokenizer,
            mlm_probability=mlm_probability,
            mask_replace_prob=mask_replace_prob,
            random_replace_prob=random_replace_prob,
            whole_word_mask=whole_word_mask,
            sampling=sampling,
            max_predictions=max_predictions,
        )
        if index_name is not None and seed is None:
            raise ValueError("index_name: want a seed beside it, got None")
        if pad_to_multiple_of is not None:
            if not padded:
                raise ValueError("pad_to_multiple_of: want padded=True beside it, got False")
            if operator.index(pad_to_multiple_of) < 1:
                raise ValueError(f"pad_to_multiple_of: want at least 1, got {pad_to_multiple_of}")
        if padded and tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: want a pad token, got none")
        self.seed = None if seed is None else check_seed(seed)
        self.index_name = index_name
        self.padded = padded
        self.pad_to_multiple_of = pad_to_multiple_of
        self._pad_id = tokenizer.pad_token_id
        self._left = getattr(tokenizer, "padding_side", "right") == "left"
        # shared: workers that outlive an epoch see the next one
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that masks are drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other masks, in workers too: from the batches that are not yet begun.

        Args:
            epoch: 0 to 2**31 - 1; without a seed it has no effect.
        """
        self._epoch.fill_(check_epoch(epoch))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was pickled."""
        self.__dict__.update(state)
        self._epoch.share_memory_()

    def __call__(self, features: Sequence[Any]) -> dict[str, Tensor | int]:
        """Return a batch of the features.

        Args:
            features: of each example a dict, as a tokenizer returns it for a text: input_ids and,
                in all or in none of them, token_type_ids, attention_mask (tokens where it is 0 are
                left out), special_tokens_mask (not 0: never chosen), single numbers such as
                next_sentence_label; or its ids alone. Ids are lists, arrays or tensors.

        Returns:
            input_ids and labels (1, T), token_type_ids where given, position_ids, cu_seq_lens_q
            and _k, max_length_q and _k; or, padded, input_ids and labels (B, L), token_type_ids
            where given, attention_mask. int64, but cu_seq_lens int32; labels are -100 where
            nothing is to be predicted. Single numbers: (B,) each.

        Raises:
            ValueError: ids out of the vocabulary's range, rows of different lengths, entries that
                are missing, that are no numbers, or that are made here, such as labels; with the
                example's number.
            TypeError: values that are no integers.
        """
        rows, numbers = _columns(features)
        ids, cu_seqlens = flat("input_ids", rows.pop("input_ids"), high=len(self.rule.table))
        columns = {}
        for name, values in rows.items():
            columns[name], _ = steps.flatten(values, name, 0, *_LIMITS[name], cu_seqlens)
        kept = columns.pop("attention_mask", None)
        if kept is not None and np.count_nonzero(kept) < len(kept):
            kept = kept.astype(bool)
            ends = np.concatenate([[0], np.cumsum(kept)])
            cu_seqlens = ends[cu_seqlens].astype(np.int32)
            ids = ids[kept]
            columns = {name: values[kept] for name, values in columns.items()}
        seed, index = self._key(ids, cu_seqlens, numbers)
        special = columns.pop("special_tokens_mask", None)
        epoch = 0 if self.seed is None else self.epoch
        labels = self.rule.mask_in_place(ids, cu_seqlens, special, index, seed, epoch)
        columns = {"input_ids": ids, **columns, "labels": labels}
        if not self.padded:
            return packed(cu_seqlens, columns) | numbers
        return self._pad(cu_seqlens, columns) | numbers

    def _key(
        self, ids: np.ndarray, cu_seqlens: np.ndarray, numbers: dict[str, Tensor]
    ) -> tuple[int, np.ndarray]:
        """Return a seed and the number of each example; takes these out of `numbers`."""
        if self.seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
            return seed, np.arange(len(cu_seqlens) - 1, dtype=np.uint64)
        if self.index_name is None:
            return self.seed, steps.digests(ids, cu_seqlens)
        if self.index_name not in numbers and len(cu_seqlens) > 1:
            raise ValueError(f"features: want the entry {self.index_name}, got none")
        index = numbers.pop(self.index_name, torch.empty(0, dtype=torch.int64))
        if index.dtype != torch.int64:
            raise TypeError(f"{self.index_name}: want integers, got {index.dtype}")
        return self.seed, index.numpy().view(np.uint64)

    def _pad(self, cu_seqlens: np.ndarray, columns: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """Return columns (T,) as (B, L), with an attention_mask."""
        length = steps.longest(cu_seqlens)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        fill = {"input_ids": self._pad_id, "token_type_ids": 0, "labels": IGNORE}
        columns["attention_mask"] = np.ones(len(columns["input_ids"]), np.int64)
        return {
            name: torch.from_numpy(
                steps.pad(values, cu_seqlens, length, fill.get(name, 0), self._left)
            )
            for name, values in columns.items()
        }


def _columns(features: Sequence[Any]) -> tuple[dict[str, Sequence[Any]], dict[str, Tensor]]:
    """Return the rows of each entry by name, and the single numbers (B,)."""
    if not len(features) or not isinstance(features[0], Mapping):
        return {"input_ids": features}, {}
    names = [name for name in features[0] if name not in _LEFT_OUT]
    if "input_ids" not in names:
        raise ValueError(f"features: want input_ids in each, got {names} in example 0")
    if not _MADE.isdisjoint(names):
        got = ", ".join(sorted(_MADE.intersection(names)))
        raise ValueError(f"features: want none of what is made here, got {got} in example 0")
    for kind in set(map(type, features)):
        if not issubclass(kind, Mapping):
            b = next(b for b, feature in enumerate(features) if type(feature) is kind)
            raise TypeError(f"features: want dicts, got {kind.__name__} in example {b}")
    keys = set(features[0])
    try:
        if len(set(map(len, features))) > 1:
            raise KeyError
        if len(names) == 1:  # of a single name itemgetter returns no tuple
            columns = {"input_ids": tuple(feature["input_ids"] for feature in features)}
        else:
            found = zip(*map(operator.itemgetter(*names), features), strict=True)
            columns = dict(zip(names, found, strict=True))
    except KeyError:
        b = next(b for b, feature in enumerate(features) if keys != set(feature))
        want, got = [*features[0]], [*features[b]]
        message = f"features: want {want} as in example 0, got {got} in example {b}"
        raise ValueError(message) from None
    rows = {name: columns.pop(name) for name in _LIMITS if name in columns}
    return rows, {name: _numbers(name, values) for name, values in columns.items()}


def _numbers(name: str, values: Sequence[Any]) -> Tensor:
    """Return single numbers (B,)."""
    try:
        numbers = torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: want a number in each example: {error}") from None
    if numbers.ndim != 1:
        raise ValueError(f"{name}: want a number in each example, got {[*numbers.shape]}")
    return numbers
