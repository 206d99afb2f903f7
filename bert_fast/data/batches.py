"""Micro-batches of pre-training: pairs of segments, packed, masked, in an order that is known.

A micro-batch is a function of (seed, epoch, its number there), so a run that goes on needs no more
than that number, and any number of processes, of workers in each, gives the same sequence.
"""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from bert_fast.data.instances import Pairs, check_length, pairs_of
from bert_fast.data.masking import MaskingRule, check_seed
from bert_fast.data.packing import packed
from bert_fast.data.reference import IGNORE
from bert_fast.data.shards import Split

_AHEAD = 4  # micro-batches that each worker has ready
_GRACE = 30  # seconds that a worker lives on after SIGTERM
Batch = dict[str, Tensor | int]


class Position(NamedTuple):
    """Where a run is in its data.

    Attributes:
        epoch: from 0.
        batch: number of the next micro-batch in it.
    """

    epoch: int
    batch: int


class _Epoch(NamedTuple):
    """The pairs of an epoch, and where its micro-batches begin and end (count + 1,)."""

    pairs: Pairs
    borders: np.ndarray


def labelled(batch: Batch, where: np.ndarray, labels: np.ndarray, random: np.ndarray) -> Batch:
    """Return a packed batch with what is to be predicted; see `Batches.__getitem__`.

    Args:
        batch: of B pairs.
        where: (N,) int64, the rows that are masked.
        labels: (N,) int64, what stood there.
        random: (B,) bool, whose second segment is a random one.
    """
    batch["masked_positions"] = torch.from_numpy(where)
    batch["masked_labels"] = torch.from_numpy(labels)
    batch["next_sentence_label"] = torch.from_numpy(random.astype(np.int64))
    return batch


class Batches(Dataset):
    """The micro-batches of a split; `batches[epoch, number]` is one of them.

    Args:
        split: the documents.
        rule: what is masked.
        cls_id: id of [CLS].
        sep_id: id of [SEP].
        max_length: tokens of a pair at most.
        seed: -2**63 to 2**64 - 1.
        sequences: pairs in a micro-batch; or
        tokens: real tokens in it at most, and as many pairs as fit.
        short_seq_prob: share of the pairs that are made shorter.

    Raises:
        ValueError: both or neither of sequences and tokens, or less than a pair fits.
    """

    def __init__(
        self,
        split: Split,
        rule: MaskingRule,
        *,
        cls_id: int,
        sep_id: int,
        max_length: int,
        seed: int,
        sequences: int | None = None,
        tokens: int | None = None,
        short_seq_prob: float = 0.1,
    ) -> None:
        if (sequences is None) == (tokens is None):
            raise ValueError(f"want sequences or tokens, got {sequences} and {tokens}")
        if sequences is not None and sequences < 1:
            raise ValueError(f"sequences: want at least 1, got {sequences}")
        if tokens is not None and tokens < max_length:
            raise ValueError(f"tokens: want at least max_length, {max_length}, got {tokens}")
        check_length(max_length)
        self.split, self.rule, self.cls_id, self.sep_id = split, rule, cls_id, sep_id
        self.max_length, self.sequences, self.tokens = max_length, sequences, tokens
        self.seed, self.short_seq_prob = check_seed(seed), short_seq_prob
        self._made: dict[int, Future[_Epoch]] = {}
        self._threads: list[Thread] = []
        self._gives_up = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what a process that is not forked gets: it makes its epochs itself."""
        return vars(self) | {"_made": {}, "_threads": []}

    def count(self, epoch: int) -> int:
        """Return how many micro-batches an epoch has."""
        return len(self._epoch(epoch).borders) - 1

    def numbers(self, position: tuple[int, int]) -> list[int]:
        """Return what the pairs of a micro-batch are known by: the numbers of first sentences."""
        return self.pairs(position).number.tolist()

    def pairs(self, position: tuple[int, int]) -> Pairs:
        """Return the pairs of a micro-batch."""
        epoch, number = position
        pairs, borders = self._epoch(epoch)
        if not 0 <= number < len(borders) - 1:
            raise IndexError(f"position: want a batch from 0 to {len(borders) - 2}, got {number}")
        return pairs[borders[number] : borders[number + 1]]

    def __getitem__(self, position: tuple[int, int]) -> Batch:
        """Return a micro-batch as the training step takes it.

        Args:
            position: epoch and number.

        Returns:
            input_ids, token_type_ids, position_ids (1, T) int64, cu_seq_lens_q and cu_seq_lens_k
            (B + 1,) int32, max_length_q and max_length_k as of a packed batch;
            masked_positions (N,) int64, the rows of T that are to be predicted, masked_labels (N,)
            int64 what stood there; next_sentence_label (B,) int64, 1 where the second segment is a
            random one.
        """
        if get_worker_info() is not None:
            self.prepare(position[0] + 1)
        pairs = self.pairs(position)
        ids, types, cu_seqlens = self._rows(pairs)
        number = pairs.number.astype(np.uint64)
        labels = self.rule.mask_in_place(ids, cu_seqlens, None, number, self.seed, position[0])
        where = np.flatnonzero(labels != IGNORE)
        columns = {"input_ids": ids, "token_type_ids": types}
        return labelled(packed(cu_seqlens, columns), where, labels[where], pairs.random)

    def prepare(self, epoch: int) -> None:
        """Begin to make an epoch in a thread, so that nothing waits for it later."""
        if epoch not in self._made:
            self._made[epoch] = Future()
            thread = Thread(target=self._fulfil, args=(epoch, self._made[epoch]), daemon=True)
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
            thread.start()

    def stop_preparing(self) -> None:
        """Give up the epochs that are still being made; Python could not end beside them."""
        self._gives_up = True
        for thread in self._threads:
            thread.join()
        self._gives_up = False
        self._made = {
            epoch: made
            for epoch, made in self._made.items()
            if made.done() and not isinstance(made.exception(), InterruptedError)
        }

    def _epoch(self, epoch: int) -> "_Epoch":
        if epoch not in self._made:
            self._made[epoch] = Future()
            self._fulfil(epoch, self._made[epoch])
        for old in [e for e in self._made if e < epoch - 1]:
            del self._made[old]
        return self._made[epoch].result()

    def _fulfil(self, epoch: int, made: "Future[_Epoch]") -> None:
        try:
            made.set_result(self._make_epoch(epoch))
        except Exception as error:  # it is raised where the result is asked for
            made.set_exception(error)

    def _make_epoch(self, epoch: int) -> "_Epoch":
        pairs = pairs_of(
            self.split,
            seed=self.seed,
            epoch=epoch,
            max_length=self.max_length,
            short_seq_prob=self.short_seq_prob,
            gives_up=lambda: self._gives_up,
        )
        if self.sequences is not None:
            borders = np.arange(0, len(pairs) + self.sequences, self.sequences)
            return _Epoch(pairs, np.minimum(borders, len(pairs)))
        ends, borders = np.cumsum(pairs.lengths), [0]
        while borders[-1] < len(pairs):
            begun = ends[borders[-1] - 1] if borders[-1] else 0
            borders.append(int(np.searchsorted(ends, begun + self.tokens, side="right")))
        return _Epoch(pairs, np.array(borders))

    def _rows(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ids (T,), types (T,) and cu_seqlens (B + 1,) of pairs with special tokens."""
        cu_seqlens = np.concatenate([[0], np.cumsum(pairs.lengths)]).astype(np.int32)
        ids = np.full(cu_seqlens[-1], self.sep_id, np.int64)
        types = np.zeros(cu_seqlens[-1], np.int64)
        ids[cu_seqlens[:-1]] = self.cls_id
        shards = self.split.shards
        of_a = zip(pairs.shard_a, pairs.start_a, pairs.length_a, strict=True)
        of_b = zip(pairs.shard_b, pairs.start_b, pairs.length_b, strict=True)
        for at, end, a, b in zip(cu_seqlens[:-1], cu_seqlens[1:], of_a, of_b, strict=True):
            middle = at + 2 + a[2]
            for place, (shard, start, length) in ((at + 1, a), (middle, b)):
                ids[place : place + length] = shards[shard].tokens[start : start + length]
            types[middle:end] = 1
        return ids, types, cu_seqlens


class Step(NamedTuple):
    """What a process computes in one step.

    Attributes:
        batches: its micro-batches, each with its number in the step.
        positions: of them.
        after: where the next step begins.
    """

    batches: list[tuple[int, Batch]]
    positions: list[Position]
    after: Position


def steps(
    batches: Batches,
    start: Position,
    micro_batches: int,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Step]:
    """Yield steps without end; epoch follows epoch, also within a step.

    Args:
        batches: the micro-batches.
        start: of the first step.
        micro_batches: in a step, of all processes together.
        rank: of this process, which takes each world-th micro-batch of a step.
        world: how many processes there are; micro_batches is a multiple of it.
        workers: processes that make micro-batches ahead; 0: they are made when they are wanted.
        pin_memory: put them into memory that a GPU copies from without waiting.

    Raises:
        ValueError: micro_batches is no multiple of world.
        RuntimeError: a worker died.
    """
    if micro_batches % world:
        raise ValueError(f"micro_batches: want a multiple of {world}, got {micro_batches}")
    batches.count(start[0])  # which forked workers need not find out again
    loader = DataLoader(
        batches,
        sampler=_Mine(batches, start, micro_batches, rank, world),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_as_worker,
    )
    mine = range(rank, micro_batches, world)
    made = iter(loader)  # forks; threads come afterwards
    try:
        for positions in _plan(batches, start, micro_batches):
            batches.prepare(positions[0].epoch + 1)
            try:
                own = [(number, next(made)) for number in mine]
            except (ConnectionError, EOFError) as error:  # it died while it handed over a batch
                raise RuntimeError("a worker that makes batches died") from error
            yield Step(own, positions[rank::world], _after(batches, positions[-1]))
    finally:
        batches.stop_preparing()


class _Mine:
    """The positions of one process's micro-batches, in order."""

    def __init__(
        self, batches: Batches, start: Position, micro_batches: int, rank: int, world: int
    ) -> None:
        self._of_all, self._mine = (batches, start, micro_batches), slice(rank, None, world)

    def __iter__(self) -> Iterator[Position]:
        for positions in _plan(*self._of_all):
            yield from positions[self._mine]


def _plan(batches: Batches, start: Position, micro_batches: int) -> Iterator[list[Position]]:
    """Yield the positions of each step's micro-batches."""
    at = Position(*start)
    while True:
        positions = []
        for _ in range(micro_batches):
            positions.append(at)
            at = _after(batches, at)
        yield positions


def _after(batches: Batches, position: Position) -> Position:
    """Return the position behind another."""
    epoch, number = position
    if number + 1 < batches.count(epoch):
        return Position(epoch, number + 1)
    return Position(epoch + 1, 0)


def _as_worker(worker: int) -> None:
    """A worker leaves signals, also those to all processes, to the one that started it.

    That one ends its step and then its workers; one that has been asked to end and still lives
    after a while is alone.
    """
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE))
