"""Masking, by the reference and compiled: what is chosen and replaced, and on what it depends."""

import sys
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from data_cases import implementation, served_by, tokenizer

from bert_fast import reference_dropout
from bert_fast.data import MaskingRule, mask_tokens

pytestmark = pytest.mark.usefixtures("served_by")
__all__ = ["served_by"]


def examples(count, length, vocabulary=40, seed=0):
    """Ids (count, length) that are not special, and where the examples stand."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(5, vocabulary, (count, length))
    return ids, np.arange(count + 1) * length


def masked(rule, ids, borders=None, seed=0, **more):
    """The new ids and the labels, as arrays of the shape of ids."""
    got, labels = mask_tokens(rule, np.ravel(ids), borders, seed=seed, **more)
    shape = np.shape(ids)
    return got.numpy().reshape(shape), labels.numpy().reshape(shape)


# --- what is chosen -------------------------------------------------------------------------------


def test_the_lowest_words_of_philox_are_chosen():
    seed, epoch, length = 2**64 - 5, 3, 41
    index = torch.tensor([7, -1, 2**40 + 3])
    ids, borders = examples(3, length)
    rule = MaskingRule(tokenizer(), mlm_probability=0.3)
    _, labels = masked(rule, ids, borders, seed=seed, epoch=epoch, index=index)
    place, key = torch.arange(length), torch.tensor(seed - 2**64)
    for n, row in zip(index, labels, strict=True):
        low, high = n & 0xFFFFFFFF, (n >> 32) & 0xFFFFFFFF
        counters = torch.broadcast_tensors(torch.tensor(2 * epoch), place // 4, low, high)
        words = torch.stack(reference_dropout.philox(key, *counters), 1)
        order = words[place, place % 4]
        assert set(np.flatnonzero(row != -100)) == set(order.argsort()[:12].tolist())


@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
@pytest.mark.parametrize("words", [False, True])
def test_labels_are_the_old_ids_and_the_rest_is_untouched(sampling, words):
    ids, borders = examples(50, 60)
    ids[:, 0], ids[:, -1], ids[:, 20] = 2, 3, 1
    before = ids.copy()
    rule = MaskingRule(tokenizer(), sampling=sampling, whole_word_mask=words)
    got, labels = masked(rule, ids, borders)
    assert np.array_equal(ids, before)  # new tensors are returned
    chosen = labels != -100
    assert np.array_equal(labels[chosen], ids[chosen])
    assert np.array_equal(got[~chosen], ids[~chosen])
    assert not chosen[:, [0, 20, -1]].any()
    assert 0.1 < chosen.mean() < 0.2


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 9, 10, 16, 23, 33, 127, 512])
@pytest.mark.parametrize("share", [0.15, 0.5, 1.0])
def test_exact_chooses_a_share_of_each_example(length, share):
    ids, borders = examples(5, length)
    _, labels = masked(MaskingRule(tokenizer(), mlm_probability=share), ids, borders)
    assert ((labels != -100).sum(1) == max(1, round(share * length))).all()
    rule = MaskingRule(tokenizer(), mlm_probability=share, max_predictions=3)
    _, labels = masked(rule, ids, borders)
    assert ((labels != -100).sum(1) == min(3, max(1, round(share * length)))).all()


def test_half_a_token_is_rounded_to_even():
    for length, want in ((1, 1), (5, 2), (7, 4), (9, 4), (11, 6)):
        _, labels = masked(MaskingRule(tokenizer(), mlm_probability=0.5), [5] * length)
        assert (labels != -100).sum() == want, length


@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
def test_every_place_is_as_likely(sampling):
    count, length = 4000, 30
    ids, borders = examples(count, length)
    _, labels = masked(MaskingRule(tokenizer(), sampling=sampling), ids, borders, seed=1)
    chosen = labels != -100
    # round(0.15 * 30), to even, is 4
    share = 4 / length if sampling == "exact" else 0.15
    sigma = (share * (1 - share) / count) ** 0.5
    assert abs(chosen.mean(0) - share).max() < 4 * sigma
    if sampling == "bernoulli":
        counts = chosen.sum(1)
        assert abs(counts.var() / (length * share * (1 - share)) - 1) < 0.1
    for step in (1, 2, 4, 8):  # a token knows nothing of its neighbours
        both = (chosen[:, step:] & chosen[:, :-step]).mean()
        expected = share * (3 / 29 if sampling == "exact" else share)
        assert abs(both - expected) < 5 * (expected / count / (length - step)) ** 0.5


@pytest.mark.parametrize("shares", [(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.4)])
def test_shares_of_what_replaces_a_token(shares):
    V, count, length = 4001, 300, 500
    mask_share, random_share = shares
    ids, borders = examples(count, length, V)
    rule = MaskingRule(
        tokenizer(V),
        mlm_probability=0.4,
        mask_replace_prob=mask_share,
        random_replace_prob=random_share,
    )
    got, labels = masked(rule, ids, borders, seed=5)
    chosen = labels != -100
    n = chosen.sum()
    became_mask = (got == 4)[chosen].mean()
    other = ((got != 4) & (got != ids))[chosen].mean()
    for share, want in ((became_mask, mask_share), (other, random_share)):
        # of the random ids one in V is the mask, one the old id
        assert abs(share - want) <= 4 * (want * (1 - want) / n) ** 0.5 + 3 * random_share / V
    drawn = got[chosen & (got != ids) & (got != 4)]
    if random_share:
        assert drawn.min() >= 0 and drawn.max() < V
        counts = np.histogram(drawn, 20, (0, V))[0]
        expected = len(drawn) / 20
        assert ((counts - expected) ** 2 / expected).sum() < 50  # 19 degrees: p = 1e-4
        assert (drawn == V - 1).any() or len(drawn) < 20 * V


def test_replacement_does_not_depend_on_the_order():
    """Tokens early in the order are replaced by the mask as often as others."""
    ids, borders = examples(3000, 40)
    few = MaskingRule(tokenizer(), mlm_probability=0.025)  # the first alone
    got, labels = masked(few, ids, borders)
    chosen = labels != -100
    assert chosen.sum() == 3000
    assert abs((got[chosen] == 4).mean() - 0.8025) < 4 * (0.16 / 3000) ** 0.5


# --- whole words ----------------------------------------------------------------------------------


def words_of(ids, special):
    """Lists of places that belong together."""
    words = []
    for i, token in enumerate(ids):
        if token in special:
            continue
        if token >= 30 and i and ids[i - 1] not in special:
            words[-1].append(i)
        else:
            words.append([i])
    return words


@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
def test_words_are_chosen_whole(sampling):
    rule = MaskingRule(tokenizer(), whole_word_mask=True, sampling=sampling, mlm_probability=0.3)
    chance, several, total = np.random.default_rng(0), 0, 0
    for n in range(100):
        ids = chance.integers(1, 40, 50)
        _, labels = masked(rule, ids, index=[n])
        words = words_of(ids, range(5))
        for word in words:
            kinds = set(labels[word] != -100)
            assert len(kinds) == 1, (ids, labels, word)
            several += kinds == {True} and len(word) > 1
        chosen = (labels != -100).sum()
        total += chosen / sum(map(len, words))
        if sampling == "exact":
            want = round(0.3 * sum(map(len, words)))
            assert chosen <= want
            # what is left over is too small for any word that was not chosen
            rest = [len(w) for w in words if labels[w[0]] == -100]
            assert not rest or min(rest) > want - chosen
    assert several > 50 and 0.25 < total / 100 < 0.35


def test_a_word_longer_than_the_share_is_passed_over():
    rule = MaskingRule(tokenizer(), whole_word_mask=True)
    long_word = [5, *[30] * 9]
    _, labels = masked(rule, long_word)
    assert (labels == -100).all()
    _, labels = masked(rule, [*long_word, 6, *long_word[1:], 7])  # round(0.15 * 21) is 3
    assert np.flatnonzero(labels != -100).tolist() == [20]
    assert (masked(MaskingRule(tokenizer()), long_word)[1] != -100).sum() == 2


def test_a_word_begins_behind_a_special_token_and_in_an_example():
    options = {"whole_word_mask": True, "sampling": "bernoulli", "mlm_probability": 0.5}
    rule = MaskingRule(tokenizer(), **options)
    ids, borders = [5, 30, 3, 30, 30, 30], [0, 2, 5, 6]
    seen = {
        tuple((masked(rule, ids, borders, seed=seed)[1] != -100).tolist()) for seed in range(200)
    }
    first, behind, last = zip(*{(s[0:2], s[3:5], s[5:6]) for s in seen}, strict=True)
    assert set(first) == set(behind) == {(False, False), (True, True)}
    assert set(last) == {(False,), (True,)} and len(seen) == 8  # each on its own


def test_words_of_one_token_are_as_tokens():
    ids, borders = examples(20, 50, vocabulary=30)
    whole = masked(MaskingRule(tokenizer(), whole_word_mask=True), ids, borders)
    assert np.array_equal(whole, masked(MaskingRule(tokenizer()), ids, borders))


# --- on what it depends ---------------------------------------------------------------------------


@pytest.mark.parametrize("words", [False, True])
def test_an_example_has_its_mask_in_any_batch(words):
    rule = MaskingRule(tokenizer(), whole_word_mask=words)
    chance = np.random.default_rng(3)
    rows = [chance.integers(1, 40, n) for n in (0, 1, 7, 130, 33, 0, 64)]
    numbers = [3, 2**62, 5, -6, 0, 1, 2**33]

    def batch(order):
        borders = np.cumsum([0, *(len(rows[b]) for b in order)])
        ids = np.concatenate([rows[b] for b in order])
        index = np.array([numbers[b] for b in order], np.int64)
        got = masked(rule, ids, borders, seed=-9, epoch=4, index=index)
        parts = pairwise(borders)
        return {b: [g[a:z].tolist() for g in got] for b, (a, z) in zip(order, parts, strict=True)}

    whole = batch(range(7))
    assert batch([6, 3, 1, 4, 0, 2, 5]) == whole
    for b in range(7):
        assert batch([b])[b] == whole[b]


def test_seed_epoch_and_index_each_change_the_mask():
    ids, rule = np.full(200, 7), MaskingRule(tokenizer())
    keys = [{}, {"seed": 1}, {"seed": 2**32}, {"seed": -1}, {"epoch": 1}, {"epoch": 2**31 - 1}]
    keys += [{"index": [n]} for n in (1, -1, 2**32, 2**40)]
    seen = [masked(rule, ids, **key)[1] != -100 for key in keys]
    for a, first in enumerate(seen):
        for second in seen[a + 1 :]:  # 30 of 200 each: 4.5 in common by chance
            assert (first & second).sum() < 15


def test_seeds_are_equal_modulo_2_64():
    ids, rule = np.arange(5, 40), MaskingRule(tokenizer())
    for seed in (-1, -(2**63), -123456789):
        want = masked(rule, ids, seed=seed % 2**64)
        assert np.array_equal(masked(rule, ids, seed=seed), want)
    assert np.array_equal(masked(rule, ids, seed=np.int64(7)), masked(rule, ids, seed=7))
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"seed: want -2\*\*63"):
            masked(rule, ids, seed=seed)
    with pytest.raises(TypeError):
        masked(rule, ids, seed=1.0)
    for epoch in (-1, 2**31):
        with pytest.raises(ValueError, match=r"epoch: want 0 to"):
            masked(rule, ids, epoch=epoch)


def test_threads_have_the_same_bits():
    ids, borders = examples(400, 100)
    rule = MaskingRule(tokenizer(), whole_word_mask=True)
    want, results = masked(rule, ids, borders), [None] * 4

    def work(n):
        results[n] = [masked(rule, ids, borders) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(got, want) for many in results for got in many)


def runs_meanwhile(call):
    """Whether another thread gets to run during a call: the lock is not taken from this one."""
    gate, ran = threading.Lock(), []
    gate.acquire()
    thread = threading.Thread(target=lambda: (gate.acquire(), ran.append(True)))
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        gate.release()
        call()
        return bool(ran)
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def test_compiled_masking_of_ten_million_tokens_lets_threads_run(served_by):
    if served_by != "csrc":
        pytest.skip("of the compiled steps")
    ids = np.full(10_000_000, 7)
    borders = np.array([0, 9_000_000, 10_000_000], np.int32)
    rule = MaskingRule(tokenizer())
    index = np.arange(2, dtype=np.uint64)
    labels = []
    assert runs_meanwhile(lambda: labels.append(rule.mask_in_place(ids, borders, None, index, 0)))
    assert (labels[0] != -100).sum() == 1_500_000
    assert (labels[0][9_000_000:] != -100).sum() == 150_000
    assert runs_meanwhile(lambda: implementation("csrc").digests(ids, borders))
    assert not runs_meanwhile(lambda: sum(range(3_000_000)))  # what holds the lock is seen to


# --- edges and refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
@pytest.mark.parametrize("words", [False, True])
def test_edges(sampling, words):
    def labels(ids, borders=None, share=0.15, **more):
        options = {"whole_word_mask": words, "sampling": sampling, "mlm_probability": share}
        got, labels = masked(MaskingRule(tokenizer(), **options), ids, borders, **more)
        assert labels.dtype == got.dtype == np.int64
        return (labels != -100).tolist()

    empty = np.zeros(0, np.int64)
    assert labels(empty) == labels(empty, [0]) == labels(empty, [0, 0, 0]) == []
    assert labels([2, 0, 3, 1, 4], share=1) == [False] * 5
    assert labels([7], share=1) == [True]
    assert labels([7, 30, 2], share=0) == [False] * 3
    assert labels([7, 30, 2, 9], share=1) == [True, True, False, True]
    special = [0, 0, 1, 0, 9]
    assert labels([7, 8, 9, 2, 7], special_tokens_mask=special, share=1) == [1, 1, 0, 0, 0]
    special = torch.tensor([False, True])
    assert labels(torch.tensor([7, 8]), special_tokens_mask=special, share=1) == [True, False]
    if sampling == "exact":
        assert labels([7]) == [True]
        assert labels([7, 8], share=1e-12).count(True) == 1


def test_a_vocabulary_of_one():
    one = tokenizer(1, special=(), continues=(), mask_token_id=0)
    rule = MaskingRule(one, random_replace_prob=1, mask_replace_prob=0)
    got, labels = masked(rule, [0] * 100)
    assert (got == 0).all() and (labels == 0).sum() == 15


def test_takes_any_integers_and_one_packed_row():
    rule = MaskingRule(tokenizer())
    want = masked(rule, np.arange(5, 25), [0, 8, 20])
    for dtype in (torch.int32, torch.uint8, torch.int16):
        ids = torch.arange(5, 25, dtype=dtype)
        got = mask_tokens(rule, ids, torch.tensor([0, 8, 20], dtype=torch.int32), seed=0)
        assert got[0].dtype == got[1].dtype == torch.int64
        assert np.array_equal(torch.stack(got).numpy(), want)
    row = mask_tokens(rule, torch.arange(5, 25)[None], [0, 8, 20], seed=0)
    assert row[0].shape == (1, 20) and np.array_equal(torch.cat(row).numpy(), want)
    strided = np.repeat(np.arange(5, 25), 2)[::2]
    assert np.array_equal(masked(rule, strided, [0, 8, 20]), want)


@pytest.mark.parametrize(
    ("ids", "more", "error", "message"),
    [
        ([5, 6, 40], {}, ValueError, "input_ids: want 0 to 39, got 40 in example 0, token 2"),
        (
            [5, 6, -1, 7],
            {"cu_seqlens": [0, 1, 1, 4]},
            ValueError,
            "input_ids: want 0 to 39, got -1 in example 2, token 1",
        ),
        ([2**63 - 1], {}, ValueError, "got 9223372036854775807"),
        ([5.0], {}, TypeError, "input_ids: want integers, got float64"),
        ([True], {}, TypeError, "input_ids: want integers, got bool"),
        ([[5, 6], [7, 8]], {}, ValueError, r"input_ids: want \(T,\) or \(1, T\), got \[2, 2\]"),
        ([5, 6], {"cu_seqlens": [0, 1]}, ValueError, "cu_seqlens: want .* from 0 to 2"),
        ([5, 6], {"cu_seqlens": [1, 2]}, ValueError, "cu_seqlens: want .* from 0 to 2"),
        ([5, 6], {"cu_seqlens": [0, 2**32 + 2]}, ValueError, "cu_seqlens: want .* from 0 to 2"),
        ([5, 6], {"cu_seqlens": []}, ValueError, "cu_seqlens: want .* from 0 to 2"),
        ([5, 6], {"cu_seqlens": [0, 2, 1, 2]}, ValueError, "cu_seqlens: want no example to end"),
        ([5, 6], {"cu_seqlens": [0, -1, 2]}, ValueError, "cu_seqlens: want no example to end"),
        ([5, 6], {"cu_seqlens": [0.0, 2.0]}, TypeError, "cu_seqlens: want integers"),
        ([5, 6], {"index": [1, 2]}, ValueError, r"index: want \[1\], got \[2\]"),
        ([5, 6], {"special_tokens_mask": [1]}, ValueError, r"special_tokens_mask: want \[2\]"),
        ([5], {"special_tokens_mask": [0.5]}, TypeError, "special_tokens_mask: want integers"),
    ],
)
def test_refuses(ids, more, error, message):
    with pytest.raises(error, match=message):
        mask_tokens(MaskingRule(tokenizer()), np.array(ids), **more, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlm_probability": 1.1}, "mlm_probability: want 0 to 1, got 1.1"),
        ({"mlm_probability": float("nan")}, "mlm_probability: want 0 to 1, got nan"),
        ({"mask_replace_prob": -0.1}, "mask_replace_prob: want 0 to 1"),
        ({"random_replace_prob": 2}, "random_replace_prob: want 0 to 1"),
        ({"random_replace_prob": 0.3}, "want at most 1, got 0.8 [+] 0.3"),
        ({"sampling": "poisson"}, "sampling: want"),
        ({"max_predictions": 0}, "max_predictions: want at least 1, got 0"),
        ({"max_predictions": 3, "sampling": "bernoulli"}, "max_predictions: want sampling"),
    ],
)
def test_a_rule_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        MaskingRule(tokenizer(), **options)


def test_a_rule_needs_a_mask_token_and_words_need_pieces():
    with pytest.raises(ValueError, match="want a mask token"):
        MaskingRule(tokenizer(mask_token_id=None))
    with pytest.raises(ValueError, match="want a vocabulary with ##"):
        MaskingRule(tokenizer(continues=()), whole_word_mask=True)
    MaskingRule(tokenizer(), mask_replace_prob=0.7, random_replace_prob=0.3)  # 1 and a rounding


def test_the_share_is_that_of_transformers(served_by):
    """With "bernoulli" each draws the same number of tokens of each kind, within 4 sigma."""
    toy = transformers.BertTokenizerFast(
        vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
        | {f"w{i}": i for i in range(5, 500)}
    )
    assert len(toy) == 500 and toy.mask_token_id == 4
    ids = np.random.default_rng(0).integers(0, 500, (60, 500))
    theirs = transformers.DataCollatorForLanguageModeling(toy, seed=0)
    batch = theirs([row.tolist() for row in ids])
    ours = masked(MaskingRule(toy, sampling="bernoulli"), ids, np.arange(61) * 500, seed=0)
    for pair in ((batch["input_ids"].numpy(), batch["labels"].numpy()), ours):
        chosen = pair[1] != -100
        shares = chosen.mean(), (pair[0] == 4)[chosen].mean(), (pair[0] == ids)[chosen].mean()
        want = 0.15 * 495 / 500, 0.8 + 0.1 / 500, 0.1 + 0.1 / 500
        counts = chosen.size, chosen.sum(), chosen.sum()
        for got, p, n in zip(shares, want, counts, strict=True):
            assert abs(got - p) < 4 * (p * (1 - p) / n) ** 0.5
        assert not chosen[ids < 5].any()
