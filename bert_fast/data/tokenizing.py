"""Documents -> token ids, by several processes, in the order of the input.

The order, and so every byte that is made of it, is the same with any number of processes. Only so
many chunks are under way that memory stays flat.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from bert_fast.data.sentences import split_sentences

MOST_WORKERS = 16  # more than one reader keeps busy
_BATCH_CHARACTERS = 250_000  # that are tokenized at a time: what bounds the memory of a process
_AHEAD = 2  # chunks under way for each process

Key = TypeVar("Key")
Paragraphs = Sequence[Sequence[str]]  # of documents


@dataclass(frozen=True)
class Tokens:
    """Token ids of some documents.

    Attributes:
        ids: (N,) uint16 or uint32, of all sentences behind one another.
        lengths: (S,) int64, how many each sentence has; none of them 0.
        sentences: (D,) int64, sentences of each document, 0 where there are no tokens.
        dropped: (D,) int64, sentences without a token that it had.
        unknown: how many ids are that of the unknown token.
    """

    ids: np.ndarray
    lengths: np.ndarray
    sentences: np.ndarray
    dropped: np.ndarray
    unknown: int


@dataclass(frozen=True)
class Tokenize:
    """From the paragraphs of documents to their tokens; special tokens in a text are text.

    Attributes:
        tokenizer: a `BertTokenizer`, or what is called like it.
        whole: paragraphs are sentences, and not to be split.
        dtype: of the ids.
    """

    tokenizer: Any
    whole: bool
    dtype: np.dtype

    def __call__(self, documents: Paragraphs) -> Tokens:
        """Return the tokens of some documents."""
        sentences: list[str] = []
        counts = []
        for paragraphs in documents:
            before = len(sentences)
            if self.whole:
                sentences += paragraphs
            else:
                sentences += chain.from_iterable(map(split_sentences, paragraphs))
            counts.append(len(sentences) - before)
        lengths, ids = [], []
        for batch in _batches(sentences):
            rows = self.tokenizer(
                batch,
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
            sizes = [*map(len, rows)]
            lengths += sizes
            ids.append(np.fromiter(chain.from_iterable(rows), self.dtype, sum(sizes)))
        found = np.array(lengths, np.int64)
        owners = np.repeat(np.arange(len(counts)), counts)
        kept = np.bincount(owners[found > 0], minlength=len(counts))
        joined = np.concatenate(ids) if ids else np.empty(0, self.dtype)
        unknown = int((joined == self.tokenizer.unk_token_id).sum())
        return Tokens(joined, found[found > 0], kept, np.array(counts, np.int64) - kept, unknown)


def _batches(sentences: Sequence[str]) -> Iterator[Sequence[str]]:
    start = size = 0
    for i, sentence in enumerate(sentences):
        size += len(sentence)
        if size >= _BATCH_CHARACTERS:
            yield sentences[start : i + 1]
            start, size = i + 1, 0
    if start < len(sentences):
        yield sentences[start:]


class Workers:
    """Processes that call a function, as a context manager; none: this one calls it."""

    def __init__(self, count: int, function: Callable[[Any], Any]) -> None:
        """Start them.

        Args:
            count: 0: no process but this one.
            function: is copied into each.
        """
        self._count, self._function = count, function
        self._pool: ProcessPoolExecutor | None = None
        if count:
            # A fork shares the memory of what is imported here; elsewhere it is not safe.
            kind = "fork" if sys.platform == "linux" else None
            context = multiprocessing.get_context(kind)
            self._pool = ProcessPoolExecutor(count, context, _begin, (function,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, tasks: Iterable[tuple[Key, Any]]) -> Iterator[tuple[Key, Any]]:
        """Yield (key, what the function returns) for each (key, argument), in their order.

        Raises:
            RuntimeError: a process died. What the function raises is raised here.
        """
        if self._pool is None:
            for key, argument in tasks:
                yield key, self._function(argument)
            return
        under_way: deque[tuple[Key, Future]] = deque()
        try:
            for key, argument in tasks:
                under_way.append((key, self._pool.submit(_call, argument)))
                if len(under_way) >= _AHEAD * self._count:
                    done, future = under_way.popleft()
                    yield done, future.result()
            while under_way:
                done, future = under_way.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            want = f"workers: want {self._count} processes that live"
            raise RuntimeError(f"{want}, got a dead one (killed? out of memory?)") from error


def default_workers() -> int:
    """Return the number of processors this process may use, or MOST_WORKERS."""
    if hasattr(os, "sched_getaffinity"):
        return min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    return min(MOST_WORKERS, os.cpu_count() or 1)


_function: Callable[[Any], Any]  # of a worker


def _begin(function: Callable[[Any], Any]) -> None:
    """Set up a worker: Ctrl-C is for its parent, with whom it dies, and it is one thread."""
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(argument: Any) -> Any:
    return _function(argument)
