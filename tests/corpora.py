"""Small corpora, made of lists of ids, and pairs of segments as lists of ids."""

import random
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert_fast.data.instances import Pairs
from bert_fast.data.shards import SHARD_TOKENS, Corpus, CorpusWriter, Shard, Split

Document = list[list[int]]  # sentences of ids
FIRST = 5  # ids below it are special: [PAD] [UNK] [CLS] [SEP] [MASK]


class Pair(NamedTuple):
    """Number of its first sentence in the split, ids of both segments, whether b is random."""

    number: int
    a: list[int]
    b: list[int]
    random: bool


def build(
    path: Path,
    train: list[Document],
    held_out: list[Document] = (),
    *,
    vocab_size: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Corpus:
    """A corpus of documents; its vocabulary is no larger than it must be unless said."""
    documents = {"train": train, "held_out": held_out}
    if vocab_size is None:
        ids = (max(s) for each in documents.values() for document in each for s in document)
        vocab_size = max(ids) + 1
    with CorpusWriter(path, vocab_size=vocab_size, shard_tokens=shard_tokens) as writer:
        for split, each in documents.items():
            for document in each:
                ids = [token for sentence in document for token in sentence]
                writer.add(split, ids, [*map(len, document)])
        writer.finish({}, save_tokenizer=lambda directory: [])
    return Corpus(path)


def in_memory(documents: list[Document], per_shard: int = 10**9) -> Split:
    """A split of documents that is not on the disk, so many of them in a shard."""
    shards = []
    for at in range(0, len(documents), per_shard):
        part = documents[at : at + per_shard]
        sentences = [sentence for document in part for sentence in document]
        shards.append(
            Shard(
                np.array([token for sentence in sentences for token in sentence], np.uint32),
                np.cumsum([0, *map(len, sentences)]),
                np.cumsum([0, *map(len, part)]),
            )
        )
    return Split("train", tuple(shards))


def numbered(lengths: list[list[int]], first: int = FIRST) -> list[Document]:
    """Documents of sentences of these lengths in which no id stands twice."""
    documents = []
    for of_document in lengths:
        ends = first + np.cumsum([0, *of_document])
        documents.append([[*range(a, b)] for a, b in pairwise(ends.tolist())])
        first = int(ends[-1])
    return documents


def lengths(
    chance: random.Random, documents: int, sentences: tuple[int, int], tokens: tuple[int, int]
) -> list[list[int]]:
    """Lengths of sentences in documents of so many sentences, each of so many tokens."""
    return [
        [chance.randint(*tokens) for _ in range(chance.randint(*sentences))]
        for _ in range(documents)
    ]


def drawn(chance: random.Random, of: list[list[int]], vocabulary: int) -> list[Document]:
    """Documents of sentences of these lengths, of ids that are not special."""
    return [[chance.choices(range(FIRST, vocabulary), k=n) for n in each] for each in of]


def tokens_of(split: Split) -> np.ndarray:
    """The ids of all shards behind one another."""
    return np.concatenate([shard.tokens for shard in split.shards])


def places(split: Split, shard: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Where tokens of shards stand in `tokens_of`."""
    return np.cumsum([0, *(len(shard.tokens) for shard in split.shards)])[shard] + start


def as_lists(split: Split, pairs: Pairs) -> list[Pair]:
    """The pairs with the ids of their segments."""
    ids = tokens_of(split)
    segments = []
    for shard, start, length in (
        (pairs.shard_a, pairs.start_a, pairs.length_a),
        (pairs.shard_b, pairs.start_b, pairs.length_b),
    ):
        begin = places(split, shard, start)
        segments.append([ids[a : a + n].tolist() for a, n in zip(begin, length, strict=True)])
    return [*map(Pair, pairs.number.tolist(), *segments, pairs.random.tolist())]
