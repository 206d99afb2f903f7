"""Micro-batches of random ids: for measuring the speed of training where no text is at hand."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from bert_fast.data.batches import Batch, labelled
from bert_fast.data.packing import packed

_FIRST = 5  # ids below are special


class SyntheticBatches(Dataset):
    """Micro-batches as `batches.Batches` makes them, of random pairs, without an end.

    Args:
        vocab_size: every id is less.
        lengths: tokens of the sequences, in turn.
        mlm_probability: share of the tokens to be predicted, all of which [MASK] replaces.
        seed: 0 to 2**64 - 1.
        sequences: pairs in a micro-batch; or
        tokens: tokens in it at most, and as many pairs as always fit.

    Raises:
        ValueError: both or neither of sequences and tokens, or a sequence that does not fit.
    """

    def __init__(
        self,
        vocab_size: int,
        lengths: Sequence[int],
        *,
        mlm_probability: float,
        seed: int,
        sequences: int | None = None,
        tokens: int | None = None,
    ) -> None:
        self.vocab_size, self.lengths, self.seed = vocab_size, np.array(lengths), seed
        self.mlm_probability = mlm_probability
        if (sequences is None) == (tokens is None):
            raise ValueError(f"want sequences or tokens, got {sequences} and {tokens}")
        if tokens is not None and tokens < max(lengths):
            raise ValueError(f"tokens: want at least the longest, {max(lengths)}, got {tokens}")
        self.sequences = sequences or 1
        while tokens is not None and self._longest(self.sequences + 1) <= tokens:
            self.sequences += 1

    def _longest(self, sequences: int) -> int:
        """Return the tokens of so many sequences at most, from wherever the turn is."""
        ends = np.cumsum(np.resize(self.lengths, len(self.lengths) + sequences))
        return int((ends[sequences:] - ends[:-sequences]).max())

    def count(self, epoch: int) -> int:
        """Return how many micro-batches an epoch has."""
        return 2**31

    def prepare(self, epoch: int) -> None:
        """Do nothing: there is nothing to make ahead."""

    def stop_preparing(self) -> None:
        """Do nothing."""

    def numbers(self, position: tuple[int, int]) -> list[int]:
        """Return the numbers of the pairs of a micro-batch."""
        return [*range(position[1] * self.sequences, (position[1] + 1) * self.sequences)]

    def __getitem__(self, position: tuple[int, int]) -> Batch:
        """Return a micro-batch; its entries are those of `Batches`."""
        epoch, number = position
        random = np.random.default_rng([self.seed, epoch, number])
        turn = np.arange(number * self.sequences, (number + 1) * self.sequences)
        lengths = self.lengths[turn % len(self.lengths)]
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        place = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
        types = (place >= np.repeat(lengths // 2, lengths)).astype(np.int64)
        ids = random.integers(_FIRST, self.vocab_size, cu_seqlens[-1])
        count = max(1, round(self.mlm_probability * len(ids)))
        where = np.sort(random.choice(len(ids), count, replace=False))
        labels = ids[where]
        ids[where] = _FIRST - 1
        batch = packed(cu_seqlens, {"input_ids": ids, "token_type_ids": types})
        return labelled(batch, where, labels, random.integers(0, 2, self.sequences))
