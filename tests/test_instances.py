"""The pairs of segments of an epoch: each beside a slow walk, and what holds for all of them."""

import random
from itertools import pairwise

import corpora
import numpy as np
import pytest
from pairs_reference import reference_pairs, truncated

from bert_fast.data import instances
from bert_fast.data.instances import SPECIAL_TOKENS, pairs_of
from bert_fast.data.shards import Shard, Split

KINDS = {  # documents, sentences in one, tokens in one of those
    "long": (6, (20, 60), (1, 30)),
    "short": (40, (2, 4), (1, 30)),
    "one sentence": (60, (1, 1), (1, 40)),
    "mixed": (40, (1, 12), (1, 60)),
    "one token": (12, (1, 80), (1, 1)),
    "too long for a pair": (30, (1, 6), (60, 90)),
}
KIND = pytest.mark.parametrize("kind", KINDS)


def made(kind, seed=0, first=corpora.FIRST):
    return corpora.numbered(corpora.lengths(random.Random(seed), *KINDS[kind]), first)


def spread(shards, lengths):
    """A split in memory of (documents of) sentences of these lengths; `shards`: documents each."""
    found, at = [], 0
    for count in shards:
        part = lengths[at : at + count]
        flat = np.concatenate(part)
        found.append(
            Shard(
                np.zeros(flat.sum(), np.uint16),
                np.concatenate([[0], np.cumsum(flat)]),
                np.cumsum([0, *map(len, part)]),
            )
        )
        at += count
    return Split("train", tuple(found))


def documents_of(split, shard, start):
    """The number in the split of the document in which tokens stand."""
    ends = np.concatenate([s.sentences[s.documents[1:]] for s in split.shards])
    parts = zip(np.cumsum([0, *(len(s.tokens) for s in split.shards)]), split.shards, strict=False)
    ends = ends + np.concatenate([np.full(s.num_documents, base) for base, s in parts])
    return np.searchsorted(ends, corpora.places(split, shard, start), side="right")


# --- beside a slow walk ---------------------------------------------------------------------------


@KIND
@pytest.mark.parametrize("max_length", [5, 6, 17, 48, 128, 512])
def test_pairs_are_those_of_a_slow_walk(kind, max_length):
    documents = made(kind, max_length)
    split = corpora.in_memory(documents, 7)
    for seed, epoch, short in ((0, 0, 0.1), (2**64 - 1, 3, 0.5), (7, 2**31 - 1, 0), (7, 1, 1)):
        options = {"seed": seed, "epoch": epoch, "max_length": max_length, "short_seq_prob": short}
        got = corpora.as_lists(split, pairs_of(split, **options))
        assert got == reference_pairs(documents, **options)


def test_truncation_is_that_of_a_loop_over_tokens():
    lengths = np.arange(1, 41)
    a, b = (side.ravel() for side in np.meshgrid(lengths, lengths))
    for most in range(2, 40):
        keep = np.stack(instances._cut(a, b, most), 1)
        for x, y, got in zip(a.tolist(), b.tolist(), keep.tolist(), strict=True):
            want = truncated([0] * x, [0] * y, most, (0, 0))
            assert got == [*map(len, want)], (x, y, most)


@KIND
@pytest.mark.parametrize("shard_tokens", [100, 1000])
def test_any_number_of_shards_gives_the_same_pairs(tmp_path, kind, shard_tokens):
    documents = made(kind, 1)
    one = corpora.in_memory(documents)
    many = corpora.build(tmp_path / "many", documents, shard_tokens=shard_tokens).split("train")
    assert len(one.shards) == 1 <= len(many.shards) <= len(documents)
    assert len(many.shards) > 1 or kind == "one token"
    options = {"seed": 3, "epoch": 1, "max_length": 40}
    assert corpora.as_lists(one, pairs_of(one, **options)) == corpora.as_lists(
        many, pairs_of(many, **options)
    )


@pytest.mark.parametrize("block", [1, 7, 100])
def test_any_number_of_blocks_gives_the_same_pairs(monkeypatch, block):
    documents = made("mixed", 2)
    split = corpora.in_memory(documents, 11)
    want = corpora.as_lists(split, pairs_of(split, seed=1, epoch=0, max_length=64))
    monkeypatch.setattr(instances, "_BLOCK", block)
    assert corpora.as_lists(split, pairs_of(split, seed=1, epoch=0, max_length=64)) == want


# --- what is used ---------------------------------------------------------------------------------


@KIND
@pytest.mark.parametrize("epoch", range(3))
def test_every_sentence_is_used_once(kind, epoch):
    """As first segments and those that follow; missing is only what was cut of a full pair."""
    split = corpora.in_memory(made(kind), 5)
    pairs = pairs_of(split, seed=5, epoch=epoch, max_length=32)
    assert len(np.unique(pairs.number)) == len(pairs)
    full, spans = pairs.lengths == 32, []
    for shard, start, length, counts in (
        (pairs.shard_a, pairs.start_a, pairs.length_a, np.full(len(pairs), True)),
        (pairs.shard_b, pairs.start_b, pairs.length_b, ~pairs.random),
    ):
        begin = corpora.places(split, shard, start)
        spans += zip(*(x[counts].tolist() for x in (begin, begin + length, full)), strict=True)
    spans = [(0, 0, False), *sorted(spans), (split.num_tokens,) * 2 + (False,)]
    for (_, end, before), (begin, _, behind) in pairwise(spans):
        assert end == begin or (end < begin and (before or behind))
    if kind == "one token":  # which fill any length exactly
        assert all(end == begin for (_, end, _), (begin, _, _) in pairwise(spans))


@KIND
def test_where_segments_are_from(tmp_path, kind):
    train = made(kind)
    held_out = made(kind, 1, first=70_000)
    corpus = corpora.build(tmp_path / "corpus", train, held_out, shard_tokens=1000)
    for split in (corpus.split("train"), corpus.split("held_out")):
        here, there = (0, 70_000), (70_000, 10**6)
        low, high = here if split.name == "train" else there
        seen = set()
        for epoch in range(4):
            pairs = pairs_of(split, seed=0, epoch=epoch, max_length=48)
            assert all(
                low <= token < high for p in corpora.as_lists(split, pairs) for token in p.a + p.b
            )
            document_a = documents_of(split, pairs.shard_a, pairs.start_a)
            document_b = documents_of(split, pairs.shard_b, pairs.start_b)
            last_b = documents_of(split, pairs.shard_b, pairs.start_b + pairs.length_b - 1)
            assert np.array_equal(document_b, last_b)
            assert np.array_equal(document_a != document_b, pairs.random)
            begin = corpora.places(split, pairs.shard_b, pairs.start_b)
            end = corpora.places(split, pairs.shard_a, pairs.start_a) + pairs.length_a
            whole = ~pairs.random & (pairs.lengths < 48)
            assert (begin[whole] == end[whole]).all() and (begin >= end)[~pairs.random].all()
            seen |= {*document_b[pairs.random].tolist()}
        if kind in ("one sentence", "short"):  # any document can be the other one
            assert len(seen) > 0.85 * split.num_documents


def test_random_segments_begin_at_any_sentence_of_any_other_document():
    lengths = [[3] * 10] * 8
    split, counts, own = spread([3, 5], lengths), np.zeros(80), np.zeros(8)
    for epoch in range(100):
        pairs = pairs_of(split, seed=1, epoch=epoch, max_length=9)  # two sentences: none is cut
        mine = pairs[pairs.random]
        begin = corpora.places(split, mine.shard_b, mine.start_b)
        assert not (begin % 3).any()
        np.add.at(counts, begin // 3, 1)
        np.add.at(own, documents_of(split, mine.shard_a, mine.start_a), 1)
    expected = (own.sum() - own)[np.arange(80) // 10] / 70
    assert counts.sum() > 2500
    assert ((counts - expected) ** 2 / expected).sum() < 79 + 4.5 * (2 * 79) ** 0.5


# --- shares ---------------------------------------------------------------------------------------


BALANCED = {  # documents of so many sentences, each of so many tokens; tokens of a pair
    "long documents": ([(60, (100, 400))], (5, 40), 128),
    "short documents": ([(1500, (3, 8))], (5, 40), 128),
    "one-sentence documents": ([(1200, (1, 1)), (500, (10, 30))], (5, 25), 64),
    "pairs of two sentences": ([(3000, (2, 2))], (5, 10), 128),
    "long sentences": ([(300, (20, 40))], (5, 100), 64),
}


@pytest.mark.parametrize("kind", BALANCED)
def test_half_of_the_pairs_are_random(kind):
    groups, tokens, max_length = BALANCED[kind]
    chance = random.Random(1)
    lengths = [each for count, s in groups for each in corpora.lengths(chance, count, s, tokens)]
    chance.shuffle(lengths)
    split = spread([len(lengths) // 2, len(lengths) - len(lengths) // 2], lengths)
    total = ones = 0
    for epoch in range(5):
        pairs = pairs_of(split, seed=2, epoch=epoch, max_length=max_length)
        n, ones, total = len(pairs), ones + pairs.random.sum(), total + len(pairs)
        assert abs(pairs.random.mean() - 0.5) < 4 * (0.25 / n) ** 0.5
    assert total > 5000 and abs(ones / total - 0.5) < 4 * (0.25 / total) ** 0.5


def test_half_are_random_in_any_order_of_documents():
    chance = random.Random(1)
    long = corpora.lengths(chance, 500, (10, 30), (5, 25))
    short = corpora.lengths(chance, 1200, (1, 1), (5, 25))
    split = corpora.in_memory(corpora.drawn(chance, long + short, 100))
    pairs = pairs_of(split, seed=2, epoch=0, max_length=64)
    assert abs(pairs.random.mean() - 0.5) < 4 * (0.25 / len(pairs)) ** 0.5


def test_both_kinds_of_pairs_stand_anywhere_in_an_epoch():
    split = spread([300], corpora.lengths(random.Random(0), 300, (5, 60), (5, 30)))
    pairs = pairs_of(split, seed=0, epoch=0, max_length=64)
    for part in np.array_split(pairs.random, 8):
        assert abs(part.mean() - 0.5) < 4 * (0.25 / len(part)) ** 0.5
    rank = np.argsort(np.argsort(pairs.number))
    n = len(pairs)
    assert n > 3000
    assert abs(np.corrcoef(rank, np.arange(n))[0, 1]) < 4 / n**0.5
    assert abs(np.corrcoef(rank[1:], rank[:-1])[0, 1]) < 4 / n**0.5


def test_pairs_are_full_but_at_the_end_of_a_document():
    documents = made("mixed", 4) + made("long", 5, first=50_000)
    split = corpora.in_memory(documents)
    last = {document[-1][-1] for document in documents}
    full = 0
    for epoch in range(3):
        for pair in corpora.as_lists(
            split, pairs_of(split, seed=0, epoch=epoch, max_length=64, short_seq_prob=0)
        ):
            length = len(pair.a) + len(pair.b) + SPECIAL_TOKENS
            assert length == 64 or (length < 64 and pair.b[-1] in last)
            full += length == 64
    assert full > 100


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_short_pairs(share):
    """Of sentences of one token each pair has the length that was drawn for it."""
    split, most = spread([8], [[1] * 10_000] * 8), 29
    pairs = pairs_of(split, seed=4, epoch=0, max_length=32, short_seq_prob=share)
    n, got = len(pairs), np.bincount(pairs.lengths - SPECIAL_TOKENS, minlength=most + 1)
    assert n > 3000 and got.sum() == n and len(got) == most + 1 and not got[0]
    # at the end of a document a pair is shorter: 8 ends, and the random segments that reach them
    slack = 8 + n * 8 * most / split.num_tokens
    for length in range(2, most):
        expected = share * n / (most - 1)
        assert abs(got[length] - expected) < 4.5 * expected**0.5 + slack / 2
    expected = n * (1 - share + share / (most - 1))
    assert abs(got[most] - expected) < 4.5 * (expected * (1 - expected / n)) ** 0.5 + slack
    assert got[1] <= slack


def test_lengths_never_exceed():
    lengths = corpora.lengths(random.Random(3), 300, (1, 30), (1, 90))
    split, cut = spread([300], lengths), [0, 0, 0, 0]
    for max_length in (5, 6, 31, 64, 128):
        pairs = pairs_of(split, seed=0, epoch=0, max_length=max_length)
        assert pairs.lengths.max() == max_length
        assert pairs.length_a.min() >= 1 and pairs.length_b.min() >= 1
        sentences = split.shards[0].sentences
        for n, (start, length) in enumerate(
            ((pairs.start_a, pairs.length_a), (pairs.start_b, pairs.length_b))
        ):
            cut[2 * n] += np.count_nonzero(~np.isin(start, sentences))
            cut[2 * n + 1] += np.count_nonzero(~np.isin(start + length, sentences))
    front_a, back_a, front_b, back_b = cut  # as often at the front as at the back
    assert 0.8 < front_a / back_a < 1.25 and 0.8 < front_b / back_b < 1.25 and min(cut) > 1000


def test_the_first_segment_ends_at_any_sentence():
    """1 to n - 1 of n sentences, each as likely."""
    split = spread([40], [[1] * 2000] * 40)
    pairs = pairs_of(split, seed=0, epoch=0, max_length=13, short_seq_prob=0)
    for chosen in (pairs.random, ~pairs.random):
        whole = pairs[chosen & (pairs.lengths == 13)]
        counts = np.bincount(whole.length_a, minlength=11)[1:]
        expected = len(whole) / 9
        assert len(counts) == 10 and counts[9] < 0.01 * expected and expected > 500
        assert abs(counts[:9] - expected).max() < 4.5 * expected**0.5


# --- on what it depends ---------------------------------------------------------------------------


def test_epochs_and_seeds_differ_and_repeat():
    split = corpora.in_memory(made("long"))
    keys = [(0, 0), (0, 1), (1, 0), (2**63, 0), (2**64 - 1, 0), (0, 2**31 - 1)]
    seen, follow = {}, {}
    for seed, epoch in keys:
        pairs = [
            corpora.as_lists(split, pairs_of(split, seed=seed, epoch=epoch, max_length=64))
            for _ in range(2)
        ]
        assert pairs[0] == pairs[1]
        seen[seed, epoch] = {(*p.a, -1, *p.b) for p in pairs[0]}
        follow[seed, epoch] = {(*p.a, -1, *p.b) for p in pairs[0] if not p.random}
    for n, one in enumerate(keys):
        for other in keys[n + 1 :]:
            assert len(seen[one] & seen[other]) < 0.2 * len(seen[one])
            assert len(follow[one] & follow[other]) < 0.3 * len(follow[one])


def test_a_slice_and_a_choice_of_pairs():
    split = corpora.in_memory(made("long"))
    pairs = pairs_of(split, seed=0, epoch=0, max_length=64)
    whole = corpora.as_lists(split, pairs)
    assert corpora.as_lists(split, pairs[2:5]) == whole[2:5] and len(pairs[2:5]) == 3
    assert corpora.as_lists(split, pairs[np.array([4, 0])]) == [whole[4], whole[0]]
    dtypes = {name: getattr(pairs, name).dtype for name in ("number", "shard_a", "start_b")}
    assert dtypes == {"number": np.int64, "shard_a": np.int32, "start_b": np.int64}
    assert pairs.random.dtype == bool and pairs.lengths.dtype == np.int64


# --- edges and refusals ---------------------------------------------------------------------------


def test_two_documents_of_a_token():
    split = spread([2], [[1], [1]])
    pairs = pairs_of(split, seed=0, epoch=0, max_length=5)
    assert pairs.random.all() and sorted(pairs.start_a) == [0, 1]
    assert (pairs.start_b == 1 - pairs.start_a).all() and (pairs.lengths == 5).all()


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        (1, {}, "train: want at least two documents, .*, got 1"),
        (3, {"max_length": 4}, "max_length: want at least 5, got 4"),
        (3, {"max_length": -1}, "max_length: want at least 5, got -1"),
    ],
)
def test_refuses(documents, options, message):
    split = spread([documents], [[4, 4]] * documents)
    with pytest.raises(ValueError, match=message):
        pairs_of(split, **{"seed": 0, "epoch": 0, "max_length": 16} | options)
