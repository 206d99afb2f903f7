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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeVar

import numpy as np

from bert_fast.data.reference import draw, mix
from bert_fast.data.shards import Shard, Split

SPECIAL_TOKENS = 3  # of a pair: [CLS] a [SEP] b [SEP]
_KEY = 0x6E65787473656E74  # makes another key of the seed than masking has
_BLOCK = 2**18  # sentences whose random words are held at a time
_WALKS = 5  # at most, to find as many random pairs as others
_WORD = 2**32
_T = TypeVar("_T")


@dataclass(frozen=True)
class Pairs:
    """Pairs of segments, as places in the shards.

    Attributes:
        number: (n,) int64, of the pair's first sentence in its split: the pair's identity.
        shard_a: (n,) int32, the shard of the first segment.
        start_a: (n,) int64, its first token there.
        length_a: (n,) int64, how many it has.
        shard_b: as shard_a, of the second segment.
        start_b: as start_a.
        length_b: as length_a.
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
    split: Split,
    *,
    seed: int,
    epoch: int,
    max_length: int,
    short_seq_prob: float = 0.1,
    gives_up: Callable[[], bool] = lambda: False,
) -> Pairs:
    """Return the pairs of an epoch, in the order in which it takes them.

    A pair whose first segment is a single sentence that fills it, or the last of its document, can
    only have a random second one. The lot of the others is drawn so much more often for the
    segment that follows that half of all pairs are random, as far as there are others.

    Args:
        split: at least two documents.
        seed: 0 to 2**64 - 1.
        epoch: 0 to 2**31 - 1.
        max_length: tokens of a pair at most, with [CLS] and two [SEP].
        short_seq_prob: share of the pairs that are made for a length drawn from 2 up to that.
        gives_up: asked now and then whether nobody wants them any more.

    Raises:
        ValueError: fewer than two documents, or max_length is below 5.
        InterruptedError: it gave up.
    """
    check_length(max_length)
    if not 0 <= short_seq_prob <= 1:
        raise ValueError(f"short_seq_prob: want 0 to 1, got {short_seq_prob}")
    if split.num_documents < 2:
        want = "at least two documents, of which one is another than the other"
        raise ValueError(f"{split.name}: want {want}, got {split.num_documents}")
    key = int(mix(np.array([seed], np.uint64) ^ np.uint64(_KEY))[0])
    most, short = max_length - SPECIAL_TOKENS, round(short_seq_prob * _WORD)
    blocks = [_Block(at, key, epoch, most, short) for at in _asking(_places(split), gives_up)]
    others = _Others(split)
    walks = _balanced(blocks, gives_up)
    made = _asking(zip(blocks, walks, strict=True), gives_up)
    found = [block.pairs(*walk, others) for block, walk in made]
    names = [field.name for field in fields(Pairs)]
    columns = (np.concatenate([getattr(part, name) for part in found]) for name in names)
    pairs = Pairs(*columns)
    turn = pairs.number.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(epoch)
    return pairs[np.argsort(mix(turn ^ np.uint64(key)), kind="stable")]


def check_length(max_length: int) -> None:
    """Raise a ValueError where no pair fits into so many tokens."""
    if max_length < 2 + SPECIAL_TOKENS:
        raise ValueError(f"max_length: want at least {2 + SPECIAL_TOKENS}, got {max_length}")


def _asking(items: Iterable[_T], gives_up: Callable[[], bool]) -> Iterator[_T]:
    """Yield the items; each is small work, before which it is asked whether to go on."""
    for item in items:
        if gives_up():
            raise InterruptedError("pairs that nobody wants any more are not made")
        yield item


def _balanced(
    blocks: list["_Block"], gives_up: Callable[[], bool]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return a walk through each block, half of whose pairs together are random.

    Which pairs there are depends on which are random, so the share of the lot that does it is
    found by trying, from each try to the next along the line through the last two.
    """
    share, before = 0.5, None
    for _ in range(_WALKS):
        walks = [block.walk(round(share * _WORD)) for block in _asking(blocks, gives_up)]
        pairs = sum(len(starts) for starts, _ in walks)
        excess = sum(np.count_nonzero(random) for _, random in walks) - pairs / 2
        if excess**2 <= pairs / 4:  # within a deviation of what tossing a coin gives
            break
        rise = pairs if before is None else (excess - before[1]) / (share - before[0])
        before = share, excess
        share = min(max(share - excess / max(rise, 1.0), 0.0), 1.0)
        if share == before[0]:
            break
    return walks


class _Place(NamedTuple):
    """Some documents of a shard.

    Attributes:
        shard: the shard.
        at: its number.
        first: number of the first document in the shard.
        last: one more than that of the last.
        sentences: those of the shards before.
        documents: likewise.
    """

    shard: Shard
    at: int
    first: int
    last: int
    sentences: int
    documents: int


def _places(split: Split) -> Iterator[_Place]:
    """Yield all documents, in parts of about _BLOCK sentences."""
    sentences = documents = 0
    for at, shard in enumerate(split.shards):
        first = 0
        while first < shard.num_documents:
            reach = int(shard.documents[first]) + _BLOCK
            last = int(np.searchsorted(shard.documents, reach, side="right")) - 1
            last = max(last, first + 1)
            yield _Place(shard, at, first, last, sentences, documents)
            first = last
        sentences += shard.num_sentences
        documents += shard.num_documents


class _Block:
    """The pair that would begin at each sentence of some documents of a shard."""

    def __init__(self, place: _Place, key: int, epoch: int, most: int, short: int) -> None:
        borders = np.asarray(place.shard.documents[place.first : place.last + 1])
        start, stop = int(borders[0]), int(borders[-1])
        self.place, self.most, self._key, self._epoch = place, most, key, epoch
        self.number = start + place.sentences  # of the first sentence, in the split
        self.offsets = place.shard.sentences[start : stop + 1]
        sentence = np.arange(stop - start)
        is_short, length, split_at, lot = self._drawn(0, sentence).T
        target = np.where(is_short < short, 2 + (length * (most - 1) >> 32), most)
        end = np.searchsorted(self.offsets, self.offsets[:-1] + target)
        document = np.repeat(np.arange(len(borders) - 1), np.diff(borders))
        end = np.minimum(np.maximum(end, sentence + 1), borders[1:][document] - start)
        count = end - sentence
        middle = sentence + 1 + (split_at * np.maximum(count - 1, 0) >> 32)
        # kept for every sentence of the split: as small as it goes
        self.target, self.end, self.middle, self.document = (
            column.astype(np.int32) for column in (target, end, middle, document)
        )
        self.alone, self.lot = count < 2, lot.astype(np.uint32)

    def _drawn(self, which: int, sentence: np.ndarray) -> np.ndarray:
        """Return four random words (n, 4) for sentences of this block."""
        number = (sentence + self.number).astype(np.uint64)
        return draw(self._key, 2 * self._epoch + which, np.zeros_like(sentence), number)

    def walk(self, share: int) -> tuple[np.ndarray, np.ndarray]:
        """Go from pair to pair: return where they begin (n,), and which are random (n,).

        Behind a random pair the walk goes on where its first segment ends: what follows there is
        not lost.

        Args:
            share: of those that can be either, in parts of 2**32.
        """
        is_random = self.alone | (self.lot < share)
        after = np.where(is_random, self.middle, self.end).tolist()
        starts, i, stop = [], 0, len(after)
        while i < stop:
            starts.append(i)
            i = after[i]
        begun = np.array(starts, np.int64)
        return begun, is_random[begun]

    def pairs(self, starts: np.ndarray, random: np.ndarray, others: "_Others") -> Pairs:
        """Return the pairs of a walk."""
        middle, end = self.middle[starts], self.end[starts]
        own = self.place.documents + self.place.first + self.document[starts]
        start_a, start_b = self.offsets[starts], self.offsets[middle]
        length_a, length_b = start_b - start_a, self.offsets[end] - start_b
        shard_a = np.full(len(starts), self.place.at, np.int32)
        shard_b = shard_a.copy()
        document, sentence, cut_a, cut_b = self._drawn(1, starts).T
        wanted = np.maximum(self.target[starts] - length_a, 1)
        found = others.find(own[random], document[random], sentence[random], wanted[random])
        shard_b[random], start_b[random], length_b[random] = found
        keep_a, keep_b = _cut(length_a, length_b, self.most)
        start_a = start_a + (cut_a * (length_a - keep_a + 1) >> 32)
        start_b = start_b + (cut_b * (length_b - keep_b + 1) >> 32)
        number = starts + self.number
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
