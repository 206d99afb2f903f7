"""Masked-language modelling: which tokens are to be predicted, and what the model sees instead."""

import operator
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bert_fast.data import steps
from bert_fast.data.reference import CONTINUES, SPECIAL


@dataclass(frozen=True, eq=False)
class MaskingRule:
    """How tokens are chosen and replaced: BERT's way unless said otherwise.

    The vocabulary is read once: tokens that are added later are unknown to the rule.

    Args:
        tokenizer: ours or transformers', with a mask token. Its special tokens are never chosen.
        mlm_probability: share of the tokens that is chosen, special ones not counted.
        mask_replace_prob: share of the chosen tokens that the mask token replaces.
        random_replace_prob: share that a random one replaces, drawn from the whole vocabulary; the
            rest stays as it is.
        whole_word_mask: choose words: tokens that begin with ## go with the one in front of them.
            Each token is replaced by itself, by the shares above.
        sampling: "exact": round(mlm_probability * tokens) of each example, at least 1; of words as
            many as fit, so that an example whose words are all longer has none. "bernoulli": each
            token or word by itself, as transformers' collator does.
        max_predictions: tokens chosen in an example at most, with "exact"; None: no limit.

    Attributes:
        table: (V,) uint8, for each id whether it is special and whether it goes on with a word.
        mask_id: id of the mask token.
        num_random: random ids are drawn from 0 up to, not including, this one.

    Raises:
        ValueError: a share outside 0 to 1, or two that add up to more than 1; a tokenizer without a
            mask token; whole words without ## in the vocabulary.
    """

    tokenizer: InitVar[Any]
    mlm_probability: float = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    whole_word_mask: bool = False
    sampling: str = "exact"
    max_predictions: int | None = None
    table: np.ndarray = field(init=False, repr=False)
    mask_id: int = field(init=False)
    num_random: int = field(init=False)

    def __post_init__(self, tokenizer: Any) -> None:
        for name in ("mlm_probability", "mask_replace_prob", "random_replace_prob"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: want 0 to 1, got {value}")
            object.__setattr__(self, name, float(value))
        if self.mask_replace_prob + self.random_replace_prob > 1 + 1e-9:
            both = f"{self.mask_replace_prob} + {self.random_replace_prob}"
            raise ValueError(f"mask_replace_prob + random_replace_prob: want at most 1, got {both}")
        if self.sampling not in ("exact", "bernoulli"):
            raise ValueError(f'sampling: want "exact" or "bernoulli", got {self.sampling!r}')
        if self.max_predictions is not None:
            if self.sampling != "exact":
                raise ValueError('max_predictions: want sampling="exact" beside it')
            if operator.index(self.max_predictions) < 1:
                raise ValueError(f"max_predictions: want at least 1, got {self.max_predictions}")
        if tokenizer.mask_token_id is None:
            raise ValueError("tokenizer: want a mask token, got none")
        vocabulary = tokenizer.get_vocab()
        table = np.zeros(max(vocabulary.values()) + 1, np.uint8)
        table[[i for i in tokenizer.all_special_ids if i is not None]] = SPECIAL
        continues = [i for token, i in vocabulary.items() if token.startswith("##")]
        if self.whole_word_mask and not continues:
            raise ValueError("whole_word_mask: want a vocabulary with ## tokens, got none")
        table[continues] |= CONTINUES
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "mask_id", int(tokenizer.mask_token_id))
        object.__setattr__(self, "num_random", len(tokenizer))
        both = min(self.mask_replace_prob + self.random_replace_prob, 1)
        settings = (  # in the order of reference.mask
            table,
            self.mlm_probability,
            2**31 if self.max_predictions is None else self.max_predictions,
            self.sampling == "exact",
            self.whole_word_mask,
            self.mask_id,
            round(self.mask_replace_prob * 2**32),
            round(both * 2**32),
            self.num_random,
        )
        object.__setattr__(self, "_settings", settings)

    def mask_in_place(
        self,
        ids: np.ndarray,
        cu_seqlens: np.ndarray,
        special: np.ndarray | None,
        index: np.ndarray,
        seed: int,
        epoch: int = 0,
    ) -> np.ndarray:
        """Mask ids (T,) int64 in place and return the labels; arguments as `reference.mask`."""
        return steps.mask(ids, cu_seqlens, special, index, seed, epoch, *self._settings)


def mask_tokens(
    rule: MaskingRule,
    input_ids: Tensor | np.ndarray,
    cu_seqlens: Tensor | np.ndarray | None = None,
    *,
    seed: int,
    epoch: int = 0,
    index: Sequence[int] | Tensor | np.ndarray | None = None,
    special_tokens_mask: Tensor | np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Return masked ids and their labels; -100 where nothing is to be predicted.

    A token's fate depends on seed, epoch, the number of its example and its place there, never on
    the batch, nor on threads.

    Args:
        rule: how tokens are chosen and replaced.
        input_ids: (T,) integers, B examples behind one another, or (1, T).
        cu_seqlens: (B + 1,) integers: where they begin and end; None: there is one.
        seed: -2**63 to 2**64 - 1, of which those that are equal modulo 2**64 are the same.
        epoch: 0 to 2**31 - 1.
        index: (B,) the numbers of the examples; None: 0 to B - 1.
        special_tokens_mask: as input_ids: not 0 where a token is not to be chosen either.

    Returns:
        New tensors of input_ids' shape, int64.

    Raises:
        ValueError: an id that is not in the vocabulary; shapes that do not fit.
        TypeError: ids that are no integers.
    """
    ids = _integers("input_ids", input_ids, np.int64, copy=True)
    if ids.ndim != 1 and not (ids.ndim == 2 and len(ids) == 1):
        raise ValueError(f"input_ids: want (T,) or (1, T), got {[*ids.shape]}")
    flat = ids.reshape(-1)
    if len(flat) >= 2**31:
        raise ValueError(f"input_ids: want less than 2**31 tokens, got {len(flat)}")
    borders = np.array([0, len(flat)]) if cu_seqlens is None else cu_seqlens
    borders = _integers("cu_seqlens", borders, np.int64)
    if borders.ndim != 1 or not len(borders) or borders[0] != 0 or borders[-1] != len(flat):
        raise ValueError(f"cu_seqlens: want (B + 1,) from 0 to {len(flat)}, got {cu_seqlens}")
    if (np.diff(borders) < 0).any():
        raise ValueError(f"cu_seqlens: want no example to end before it begins, got {cu_seqlens}")
    count = len(borders) - 1
    numbers = np.arange(count) if index is None else index
    numbers = _integers("index", numbers, np.uint64)
    if numbers.shape != (count,):
        raise ValueError(f"index: want {[count]}, got {[*numbers.shape]}")
    special = None
    if special_tokens_mask is not None:
        special = _integers("special_tokens_mask", special_tokens_mask, np.int64, booleans=True)
        if special.shape != ids.shape:
            want = [*ids.shape]
            raise ValueError(f"special_tokens_mask: want {want}, got {[*special.shape]}")
        special = special.reshape(-1)
    seed, epoch = check_seed(seed), check_epoch(epoch)
    labels = rule.mask_in_place(flat, borders.astype(np.int32), special, numbers, seed, epoch)
    return torch.from_numpy(ids), torch.from_numpy(labels.reshape(ids.shape))


def check_seed(seed: int) -> int:
    """Return the seed as 0 to 2**64 - 1."""
    seed = operator.index(seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: want -2**63 to 2**64 - 1, got {seed}")
    return seed % 2**64


def check_epoch(epoch: int) -> int:
    """Return the epoch, which must be 0 to 2**31 - 1."""
    if not 0 <= operator.index(epoch) < 2**31:
        raise ValueError(f"epoch: want 0 to 2**31 - 1, got {epoch}")
    return operator.index(epoch)


def _integers(
    name: str, values: Any, dtype: type, copy: bool = False, booleans: bool = False
) -> np.ndarray:
    """Return integers as a contiguous array of that dtype."""
    array = np.asarray(values)
    if array.size and array.dtype.kind not in ("iub" if booleans else "iu"):
        raise TypeError(f"{name}: want integers, got {array.dtype}")
    return array.astype(dtype, order="C", copy=copy)
