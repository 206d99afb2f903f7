"""Micro-batches of pre-training: what stands in them, and their masks."""

import gzip
import random
from itertools import pairwise

import corpora
import numpy as np
import pytest
import torch
from batch_cases import CLS, MASK, SEP, V, batches_of, corpus, epoch_of, plain, rows, rule, split

from bert_fast.data.batches import Batches
from bert_fast.data.instances import pairs_of
from bert_fast.data.masking import MaskingRule
from bert_fast.tokenizer import BertTokenizer

__all__ = ["corpus", "split"]


# --- what stands in a micro-batch -----------------------------------------------------------------


@pytest.mark.parametrize("options", [{"sequences": 4}, {"sequences": 1}, {"tokens": 200}])
@pytest.mark.parametrize("name", ["train", "held_out"])
def test_rows_are_made_of_the_shards(corpus, options, name):
    split = corpus.split(name)
    batches = batches_of(split, **options)
    for number, batch in enumerate(epoch_of(batches)):
        pairs = corpora.as_lists(split, batches.pairs((0, number)))
        lengths = [len(p.a) + len(p.b) + 3 for p in pairs]
        assert batch["input_ids"].shape == (1, sum(lengths))
        assert batch["cu_seq_lens_q"].tolist() == np.cumsum([0, *lengths]).tolist()
        assert torch.equal(batch["cu_seq_lens_k"], batch["cu_seq_lens_q"])
        assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)
        assert batch["next_sentence_label"].tolist() == [int(p.random) for p in pairs]
        for pair, (whole, _, types, positions) in zip(pairs, rows(batch), strict=True):
            assert whole == [CLS, *pair.a, SEP, *pair.b, SEP]
            assert types == [0] * (len(pair.a) + 2) + [1] * (len(pair.b) + 1)
            assert positions == [*range(len(whole))]


def test_dtypes(split):
    batch = batches_of(split)[0, 0]
    dtypes = {name: v.dtype for name, v in batch.items() if isinstance(v, torch.Tensor)}
    borders = dict.fromkeys(["cu_seq_lens_q", "cu_seq_lens_k"], torch.int32)
    assert {k: v for k, v in dtypes.items() if v != torch.int64} == borders
    assert batch.keys() - dtypes == {"max_length_q", "max_length_k"}
    for name in ("token_type_ids", "position_ids"):
        assert batch[name].shape == batch["input_ids"].shape
    assert batch["masked_positions"].shape == batch["masked_labels"].shape


@pytest.mark.parametrize("max_length", [5, 33, 512])
def test_an_epoch_has_each_pair_once(split, max_length):
    together = []
    for options in ({"sequences": 3}, {"sequences": 10**6}, {"tokens": 700}):
        batches = batches_of(split, max_length=max_length, **options)
        numbers = [batches.pairs((2, n)).number.tolist() for n in range(batches.count(2))]
        together.append([n for each in numbers for n in each])
        assert len({*together[-1]}) == len(together[-1]) and all(numbers)
    assert together[0] == together[1] == together[2]


@pytest.mark.parametrize("short", [0.0, 0.1, 1.0])
def test_pairs_are_those_of_the_settings(split, short):
    options = {"max_length": 40, "seed": 9, "short_seq_prob": short}
    pairs = corpora.as_lists(split, pairs_of(split, epoch=5, **options))
    batches = batches_of(split, **options)
    got = [corpora.as_lists(split, batches.pairs((5, n))) for n in range(batches.count(5))]
    assert [pair for each in got for pair in each] == pairs


def test_sequences_are_as_many_as_asked(split):
    for count in (1, 2, 3, 7, 10**6):
        batches = batches_of(split, sequences=count)
        sizes = [len(b["next_sentence_label"]) for b in epoch_of(batches)]
        total = sum(sizes)
        assert sizes[:-1] == [count] * (len(sizes) - 1) and 1 <= sizes[-1] <= count
        assert batches.count(0) == len(sizes) == -(-total // count)
    exact = batches_of(split, sequences=total)
    assert exact.count(0) == 1


@pytest.mark.parametrize("budget", [64, 65, 150, 1000, 10**6])
def test_tokens_are_filled_up_and_never_exceeded(split, budget):
    batches = batches_of(split, tokens=budget)
    lengths = [b["cu_seq_lens_q"].diff().tolist() for b in epoch_of(batches)]
    assert all(sum(each) <= budget for each in lengths)
    for each, following in pairwise(lengths):
        assert sum(each) + following[0] > budget
    largest = max(sum(each) for each in lengths)
    assert largest == budget or budget > 500 or largest > budget - 64


# --- masks ----------------------------------------------------------------------------------------


def check_masks(found, vocabulary, share=0.15):
    """Statistics of (ids, what the model sees, positions of labels) of pairs with exact sampling.

    Bounds are 4.5 standard deviations. Returns how many tokens could be chosen.
    """
    eligible = chosen = masked = kept = 0
    drawn, at, expected, variance = [], np.zeros(600), np.zeros(600), np.zeros(600)
    for ids, seen, labelled in found:
        can = np.flatnonzero(ids >= corpora.FIRST)
        assert (ids[labelled] >= corpora.FIRST).all()
        want = max(1, round(share * len(can))) if len(can) else 0
        assert len(labelled) == want
        assert np.array_equal(np.delete(seen, labelled), np.delete(ids, labelled))
        eligible, chosen = eligible + len(can), chosen + want
        now, old = seen[labelled], ids[labelled]
        masked, kept = masked + (now == MASK).sum(), kept + (now == old).sum()
        drawn.append(now[(now != MASK) & (now != old)])
        at[labelled] += 1
        if len(can):
            expected[can] += want / len(can)
            variance[can] += want / len(can) * (1 - want / len(can))
    assert abs(chosen / eligible - share) < 0.01 * share + 1 / np.mean([len(f[0]) for f in found])
    drawn = np.concatenate(drawn)
    for count, p in (
        (masked, 0.8 + 0.1 / vocabulary),
        (kept, 0.1 + 0.1 / vocabulary),
        (len(drawn), 0.1 - 0.2 / vocabulary),
    ):
        assert abs(count / chosen - p) < 4.5 * (p * (1 - p) / chosen) ** 0.5
    counts = np.delete(np.bincount(drawn, minlength=vocabulary), MASK)
    mean = len(drawn) / len(counts)
    bins = len(counts) - 1
    assert len(counts) == vocabulary - 1
    assert ((counts - mean) ** 2 / mean).sum() < bins + 4.5 * (2 * bins) ** 0.5
    used = variance > 9
    assert used.sum() > 20
    assert (abs(at - expected)[used] < 4.5 * variance[used] ** 0.5).all()
    return eligible


def seen_in(batches, epochs, limit):
    """(ids, what the model sees, positions of labels) of pairs, until `limit` tokens are there."""
    found, total = [], 0
    for epoch in epochs:
        for batch in epoch_of(batches, epoch):
            ids = batch["input_ids"][0].numpy()
            whole, where = ids.copy(), batch["masked_positions"].numpy()
            whole[where] = batch["masked_labels"].numpy()
            borders = batch["cu_seq_lens_q"].numpy()
            at = np.searchsorted(where, borders)
            for (a, b), (low, high) in zip(pairwise(borders), pairwise(at), strict=True):
                found.append((whole[a:b], ids[a:b], where[low:high] - a))
            total += len(ids)
            if total > limit:
                return found
    raise AssertionError(f"want {limit} tokens, got {total}")


def many_tokens(path, sentences, seed=0):
    """A corpus of about 17 tokens for each of those sentences; one id in 50 is [UNK]."""
    draw = np.random.default_rng(seed)
    documents = []
    for _ in range(sentences // 40):
        lengths = draw.integers(5, 30, 40)
        ids = draw.integers(corpora.FIRST, V, lengths.sum())
        ids[draw.random(len(ids)) < 0.02] = 1
        documents.append([part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])])
    return corpora.build(path / "corpus", documents, vocab_size=V).split("train")


def test_masks_of_a_million_tokens(tmp_path):
    batches = batches_of(many_tokens(tmp_path, 20_000), max_length=128, sequences=256)
    assert check_masks(seen_in(batches, range(9), 1_050_000), V) > 1_000_000


@pytest.mark.long
@pytest.mark.parametrize("max_length", [32, 128, 512])
@pytest.mark.parametrize("seed", range(3))
def test_masks_of_three_million_tokens(tmp_path, max_length, seed):
    split = many_tokens(tmp_path, 60_000, seed)
    batches = batches_of(split, max_length=max_length, tokens=20_000, seed=seed)
    assert check_masks(seen_in(batches, range(9), 3_500_000), V) > 3_000_000


def test_masks_differ_from_epoch_to_epoch(split):
    """The same pair, in two epochs, has two masks; an epoch again has its bits again."""
    batches = batches_of(split, short_seq_prob=0.0, sequences=8)
    again = batches_of(split, short_seq_prob=0.0, sequences=8)
    common, masks = 0, []
    for epoch in range(6):
        made = epoch_of(batches, epoch)
        assert [*map(plain, made)] == [*map(plain, epoch_of(again, epoch))]
        found = {}
        for batch in made:
            for (a, b), row in zip(pairwise(batch["cu_seq_lens_q"]), rows(batch), strict=True):
                where = batch["masked_positions"]
                found[tuple(row[0])] = tuple((where[(where >= a) & (where < b)] - a).tolist())
        masks.append(found)
    for one, other in pairwise(masks):
        shared = [ids for ids in one.keys() & other.keys() if len(one[ids]) > 3]
        common += len(shared)
        assert sum(one[ids] == other[ids] for ids in shared) <= 1
    assert common > 10


def test_a_pair_has_its_mask_in_any_micro_batch(split):
    """It depends on seed, epoch and pair, not on what else is in the batch."""

    def by_pair(**options):
        batches = batches_of(split, **options)
        return {
            int(number): row
            for n in range(batches.count(3))
            for number, row in zip(batches.pairs((3, n)).number, rows(batches[3, n]), strict=True)
        }

    want = by_pair(sequences=5)
    assert by_pair(sequences=1) == by_pair(tokens=333) == want
    other = by_pair(sequences=5, seed=2)
    assert sum(other.get(n) == row for n, row in want.items()) < 0.2 * len(want)


def test_seeds_are_equal_modulo_2_64(split):
    assert plain(batches_of(split, seed=-1)[0, 0]) == plain(batches_of(split, seed=2**64 - 1)[0, 0])


def test_no_more_predictions_than_asked(split):
    batches = batches_of(split, rule(max_predictions=3), sequences=1)
    counts = [len(b["masked_labels"]) for b in epoch_of(batches)]
    assert max(counts) == 3 and min(counts) >= 1


# --- texts ----------------------------------------------------------------------------------------


def texts_of(path):
    """Documents of Google's format: a sentence a line, an empty line between documents."""
    documents = path.read_text("utf-8").split("\n\n")
    return [[line for line in each.splitlines() if line.strip()] for each in documents if each]


def words_of(pieces):
    """Places that belong to a word, for each word that is not special."""
    words = []
    for i, piece in enumerate(pieces):
        if piece.startswith("[") and piece.endswith("]") and len(piece) > 1:
            continue
        if piece.startswith("##") and words and words[-1][-1] == i - 1:
            words[-1].append(i)
        else:
            words.append([i])
    return words


def tokenized(texts, learned):
    ids = [[learned.encode(s, add_special_tokens=False) for s in each] for each in texts]
    return [[s for s in each if s] for each in ids if any(each)]


@pytest.fixture
def sample(shared):
    """Google's sample text, and a vocabulary learned from it."""
    texts = texts_of(shared / "data/pretrain/bert_sample_text.txt")
    return texts, BertTokenizer.train([s for each in texts for s in each], 400)


def check_words(batches, learned, epochs):
    several = 0
    for epoch in range(epochs):
        for batch in epoch_of(batches, epoch):
            borders, where = batch["cu_seq_lens_q"].tolist(), batch["masked_positions"]
            chosen = torch.zeros(borders[-1], dtype=torch.bool)
            chosen[where] = True
            for (a, b), (ids, *_) in zip(pairwise(borders), rows(batch), strict=True):
                for word in words_of(learned.convert_ids_to_tokens(ids)):
                    assert len({*chosen[a:b][word].tolist()}) == 1
                    several += len(word) > 1 and bool(chosen[a + word[0]])
    return several


def test_the_official_sample_text(sample, tmp_path):
    texts, learned = sample
    documents = tokenized(texts, learned)
    split = corpora.build(tmp_path / "c", documents, vocab_size=len(learned)).split("train")
    assert split.num_documents == len(texts) > 1
    batches = Batches(
        split,
        MaskingRule(learned),
        cls_id=learned.cls_token_id,
        sep_id=learned.sep_token_id,
        max_length=512,
        seed=0,
        tokens=2048,
    )
    assert (learned.cls_token_id, learned.sep_token_id) == (CLS, SEP)
    sentences = {" ".join(learned.convert_ids_to_tokens(s)) for d in documents for s in d}
    used, labels = set(), []
    for epoch in range(4):
        for batch in epoch_of(batches, epoch):
            labels += batch["next_sentence_label"].tolist()
            for ids, *_ in rows(batch):
                text = " ".join(learned.convert_ids_to_tokens(ids[1:-1]))
                used |= {s for s in sentences if s in text}
    assert len(used) > 0.9 * len(sentences)
    assert len(labels) > 20 and 0.3 < np.mean(labels) < 0.7


def test_whole_words_are_never_split(sample, tmp_path):
    texts, learned = sample
    documents = tokenized(texts, learned)
    split = corpora.build(tmp_path / "c", documents, vocab_size=len(learned)).split("train")
    masking = MaskingRule(learned, whole_word_mask=True)
    assert check_words(batches_of(split, masking, max_length=96), learned, 3) > 50
    apart = MaskingRule(learned)
    with pytest.raises(AssertionError):  # the words are there to be split
        check_words(batches_of(split, apart, max_length=96), learned, 3)


@pytest.mark.long
def test_whole_words_of_a_million_real_tokens(shared, tmp_path):
    with gzip.open(shared / "data/pretrain/wiki_en_core2016.txt.gz", "rt", encoding="utf-8") as f:
        texts = [[*each.split("\n")] for each in f.read().strip().split("\n\n")]
    learned = BertTokenizer.train([s for each in texts for s in each], 4000)
    documents = tokenized(texts, learned)
    split = corpora.build(tmp_path / "c", documents, vocab_size=len(learned)).split("train")
    options = {"max_length": 128, "sequences": 64}
    masking = MaskingRule(learned, whole_word_mask=True)
    epochs = -(-1_000_000 // split.num_tokens)
    assert check_words(batches_of(split, masking, **options), learned, epochs) > 5000
    found = seen_in(batches_of(split, MaskingRule(learned), **options), range(99), 1_050_000)
    assert check_masks(found, len(learned)) > 1_000_000


# --- vocabularies ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32), (250_002, np.uint32)]
)
def test_the_last_ids_of_a_vocabulary(tmp_path, vocabulary, dtype):
    chance = random.Random(0)
    documents = corpora.drawn(chance, [[9, 9, 9]] * 4, vocabulary)
    documents[0][0][:3] = vocabulary - 1, vocabulary - 2, 2**15
    split = corpora.build(tmp_path / "c", documents, vocab_size=vocabulary).split("train")
    assert split.shards[0].tokens.dtype == dtype
    batches = batches_of(split, rule(vocabulary), max_length=64)
    want = {token for document in documents for sentence in document for token in sentence}
    got = {token for batch in epoch_of(batches) for ids, *_ in rows(batch) for token in ids}
    assert got == want | {CLS, SEP}


def test_an_id_that_the_rule_does_not_know(tmp_path):
    documents = corpora.drawn(random.Random(0), [[9, 9, 9]] * 4, 900)
    split = corpora.build(tmp_path / "c", documents, vocab_size=900).split("train")
    with pytest.raises(ValueError, match="want 0 to 99, got"):
        epoch_of(batches_of(split, rule(100)))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": 4, "tokens": 400}, "want sequences or tokens, got 4 and 400"),
        ({"sequences": None}, "want sequences or tokens, got None and None"),
        ({"sequences": 0}, "sequences: want at least 1, got 0"),
        ({"tokens": 63}, "tokens: want at least max_length, 64, got 63"),
        ({"seed": 2**64}, r"seed: want -2\*\*63 to"),
        ({"seed": -(2**63) - 1}, r"seed: want -2\*\*63 to"),
    ],
)
def test_refuses(split, options, message):
    with pytest.raises(ValueError, match=message):
        batches_of(split, **options)


def test_refuses_what_pairs_refuse(tmp_path, split):
    with pytest.raises(ValueError, match="max_length: want at least 5, got 4"):
        batches_of(split, max_length=4).count(0)
    one = corpora.build(tmp_path / "c", corpora.numbered([[4, 4]])).split("train")
    with pytest.raises(ValueError, match="at least two documents"):
        batches_of(one)[0, 0]
    batches = batches_of(split)
    with pytest.raises(IndexError):
        batches[0, batches.count(0)]
