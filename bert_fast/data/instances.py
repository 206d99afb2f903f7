"""The pairs of segments that an epoch of MLM + NSP pre-training goes through, in its order.

As in the BERT paper: a segment is a run of whole sentences; a pair has as many tokens as the model
takes, or with `short_seq_prob` fewer; the second segment is what follows the first, or begins at a
random sentence of another document. Of a pair that is too long the longer segment is cut, at the
front and at the back.

Nothing is stored. An epoch is a function of (seed, epoch) alone: each sentence has random words of
its own, Philox4x32-10 of counters (2 epoch + 0 or 1, 0, number of the sentence), and the pair that
begins with it is made by those. So pairs and masks differ from epoch to epoch, and any number of
processes find the same ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from bert_fast.data.reference import mix, words
from bert_fast.data.shards import Shard, Split

SPECIAL_TOKENS = 3  # of a pair: [CLS] a [SEP] b [SEP]
_KEY = 0x6E65787473656E74  # makes another key of the seed than masking has
_BLOCK = 2**18  # sentences whose random words are held at a time
_WORD = 2**32


@dataclass(frozen=True)
class Pairs:
    """Pairs of segments, as places in the shards.

    Attributes:
        number: (n,) int64, of the pair's first sentence in its split: the pair's identity.
        shard_a: (n,) int32, the shard of the first segment, start_a (n,) int64 its first token
            there, length_a (n,) int64 how many it has.
        start_a: see shard_a.
        length_a: see shard_a.
        shard_b: likewise of the second segment.
        start_b: see shard_b.
        length_b: see shard_b.
        random: (n,) bool: the second segment is of another document.
    """

    number: np.ndarray
    shard_a: np.ndarray
    start_a: np.ndarray
    length_a: np.ndarray
    shard_b: np.ndarray
    start_b: np.ndarray
    length_b: np.ndarray
    random: np.ndarray

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, index: slice | np.ndarray) -> "Pairs":
        """Return some of the pairs."""
        return Pairs(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, tokens of each pair with its special ones."""
        return self.length_a + self.length_b + SPECIAL_TOKENS


def pairs_of(
    split: Split, *, seed: int, epoch: int, max_length: int, short_seq_prob: float = 0.1
) -> Pairs:
    """Return the pairs of an epoch, in the order in which it takes them.

    A pair whose first segment is a single sentence that fills it, or the last of its document, can
    only have a random second one. For each of them another pair, whose second segment would be
    chosen by lot, gets the one that follows: so half of all pairs are random, as far as there are
    others.

    Args:
        split: at least two documents.
        seed: 0 to 2**64 - 1.
        epoch: 0 to 2**31 - 1.
        max_length: tokens of a pair at most, with [CLS] and two [SEP].
        short_seq_prob: share of the pairs that are made for a length drawn from 2 up to that.

    Raises:
        ValueError: fewer than two documents, or max_length is below 5.
    """
    if split.num_documents < 2:
        want = "at least two documents, of which one is another than the other"
        raise ValueError(f"{split.name}: want {want}, got {split.num_documents}")
    if max_length < 2 + SPECIAL_TOKENS:
        raise ValueError(f"max_length: want at least {2 + SPECIAL_TOKENS}, got {max_length}")
    key = int(mix(np.array([seed], np.uint64) ^ np.uint64(_KEY))[0])
    most, short = max_length - SPECIAL_TOKENS, round(short_seq_prob * _WORD)
    others = _Others(split)
    found, debt, base, document = [], 0, 0, 0
    for at, shard in enumerate(split.shards):
        for first, last in _blocks(shard):
            block = _Block(shard, first, last, key, epoch, base, most, short)
            starts, random, debt = block.walk(debt)
            found.append(block.pairs(at, starts, random, others, document))
        base += shard.num_sentences
        document += shard.num_documents
    pairs = Pairs(*(np.concatenate(c) for c in zip(*map(_columns, found), strict=True)))
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        turn = mix(pairs.number.astype(np.uint64) * golden + np.uint64(epoch) ^ np.uint64(key))
    return pairs[np.argsort(turn, kind="stable")]


def _columns(pairs: Pairs) -> Iterator[np.ndarray]:
    return (getattr(pairs, field.name) for field in fields(pairs))


def _blocks(shard: Shard) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of documents that have about _BLOCK sentences together."""
    first, count = 0, shard.num_documents
    while first < count:
        reach = int(shard.documents[first]) + _BLOCK
        last = int(np.searchsorted(shard.documents, reach, side="right")) - 1
        last = min(max(last, first + 1), count)
        yield first, last
        first = last


class _Block:
    """The pair that would begin at each sentence of some documents of a shard."""

    def __init__(
        self,
        shard: Shard,
        first: int,
        last: int,
        key: int,
        epoch: int,
        base: int,
        most: int,
        short: int,
    ) -> None:
        borders = np.asarray(shard.documents[first : last + 1])
        start, stop = int(borders[0]), int(borders[-1])
        self.first, self.start, self.base, self.most = first, start, base, most
        self.offsets = np.asarray(shard.sentences[start : stop + 1])
        self.document = np.repeat(np.arange(last - first), np.diff(borders))  # of each sentence
        place = np.arange(stop - start)
        number = (place + start + base).astype(np.uint64)
        zeros = np.zeros_like(place)
        is_short, length, split_at, lot = words(key, 2 * epoch, zeros, number).T
        self.other = words(key, 2 * epoch + 1, zeros, number)  # document, sentence, two cuts
        target = np.where(is_short < short, 2 + (length * (most - 1) >> 32), most)
        ends = np.searchsorted(self.offsets, self.offsets[:-1] + target)
        self.end = np.minimum(np.maximum(ends, place + 1), borders[1:][self.document] - start)
        count = self.end - place
        self.middle = place + 1 + (split_at * np.maximum(count - 1, 0) >> 32)
        self.alone = count < 2
        self.lot = lot < _WORD // 2
        self.target = target

    def walk(self, debt: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Go from pair to pair: return where they begin, which are random, and the new debt.

        Behind a random pair the walk goes on where its first segment ends: what follows there is
        not lost. The debt is how many more had to be random than had to follow.
        """
        end, middle = self.end.tolist(), self.middle.tolist()
        alone, lot = self.alone.tolist(), self.lot.tolist()
        starts: list[int] = []
        random: list[bool] = []
        i, stop = 0, len(end)
        while i < stop:
            starts.append(i)
            if alone[i]:
                debt += 1
                is_random = True
            elif debt:
                debt -= 1
                is_random = False
            else:
                is_random = lot[i]
            random.append(is_random)
            i = middle[i] if is_random else end[i]
        return np.array(starts, np.int64), np.array(random, bool), debt

    def pairs(
        self, at: int, starts: np.ndarray, random: np.ndarray, others: "_Others", document: int
    ) -> Pairs:
        """Return the pairs that begin at `starts`; `document`: number of the shard's first."""
        offsets, middle, end = self.offsets, self.middle[starts], self.end[starts]
        own = document + self.first + self.document[starts]
        start_a, start_b = offsets[starts], offsets[middle]
        length_a, length_b = start_b - start_a, offsets[end] - start_b
        shard_b = np.full(len(starts), at, np.int32)
        which = np.flatnonzero(random)
        drawn = self.other[starts[which]]
        wanted = np.maximum(self.target[starts[which]] - length_a[which], 1)
        found = others.find(own[which], drawn[:, 0], drawn[:, 1], wanted)
        shard_b[which], start_b[which], length_b[which] = found
        cuts = self.other[starts]
        keep_a, keep_b = _cut(length_a, length_b, self.most)
        start_a = start_a + (cuts[:, 2] * (length_a - keep_a + 1) >> 32)
        start_b = start_b + (cuts[:, 3] * (length_b - keep_b + 1) >> 32)
        number = starts + self.start + self.base
        shard_a = np.full(len(starts), at, np.int32)
        return Pairs(number, shard_a, start_a, keep_a, shard_b, start_b, keep_b, random)


class _Others:
    """Finds random segments in the documents of a split."""

    def __init__(self, split: Split) -> None:
        self.shards = split.shards
        self.ends = np.cumsum([shard.num_documents for shard in split.shards])

    def find(
        self, own: np.ndarray, document: np.ndarray, sentence: np.ndarray, wanted: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return shard, first token and length of a segment for each of n pairs.

        Args:
            own: (n,) int64, the document that it must not be of.
            document: (n,) int64, a random word that chooses its document.
            sentence: (n,) int64, one that chooses its first sentence.
            wanted: (n,) int64, tokens; whole sentences are taken until there are so many.
        """
        drawn = _scaled(document, np.full_like(own, self.ends[-1] - 1))
        drawn += drawn >= own
        at = np.searchsorted(self.ends, drawn, side="right")
        start, length = np.zeros_like(own), np.zeros_like(own)
        for number, shard in enumerate(self.shards):
            mine = np.flatnonzero(at == number)
            if not len(mine):
                continue
            inside = drawn[mine] - (self.ends[number] - shard.num_documents)
            first, last = shard.documents[inside], shard.documents[inside + 1]
            begin = first + _scaled(sentence[mine], last - first)
            token = shard.sentences[begin]
            end = np.searchsorted(shard.sentences, token + wanted[mine])
            end = np.minimum(np.maximum(end, begin + 1), last)
            start[mine], length[mine] = token, shard.sentences[end] - token
        return at.astype(np.int32), start, length


def _scaled(word: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return 0 to count - 1 for 32-bit words."""
    return word * count >> 32


def _cut(a: np.ndarray, b: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths that are left when the longer one loses tokens until they fit."""
    half = most // 2
    keep_a = np.where(b <= half, most - b, np.where(a <= most - half, a, most - half))
    keep_a = np.where(a + b <= most, a, keep_a)
    return keep_a, np.where(a + b <= most, b, most - keep_a)
