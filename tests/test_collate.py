"""MaskedLMCollator and pack_rows: what they make of features, and that models take it."""

import pickle
import random
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
import transformers
from against_transformers import pair
from data_cases import served_by, tokenizer
from torch.utils.data import DataLoader
from toy_text import VOCABULARY, sentences
from toy_text import tokenizer as toy_tokenizer

from bert_fast import BertTokenizer
from bert_fast.data import MaskedLMCollator, pack_rows

pytestmark = pytest.mark.usefixtures("served_by")
__all__ = ["served_by"]
V = len(VOCABULARY)


@pytest.fixture(scope="module", params=["transformers", "bert_fast"])
def toy(request, tmp_path_factory):
    """The toy language's tokenizer, of both libraries."""
    made = toy_tokenizer()
    if request.param == "bert_fast":
        folder = tmp_path_factory.mktemp("toy")
        made.save_pretrained(folder)
        made = BertTokenizer.from_pretrained(folder)
    return made


def features(tokenizer, count=12, special=True):
    """Encoded pairs of sentences."""
    texts = sentences(2 * count)
    pairs = tokenizer(texts[:count], texts[count:], return_special_tokens_mask=special)
    return [{name: pairs[name][b] for name in pairs} for b in range(count)]


def parts(batch, name):
    """A packed entry by example, as lists."""
    borders = batch["cu_seq_lens_q"].tolist()
    return [batch[name][0, a:z].tolist() for a, z in pairwise(borders)]


def masks(batch):
    """Original ids of each example, from what is packed -> (new ids, labels)."""
    found = {}
    for ids, labels in zip(parts(batch, "input_ids"), parts(batch, "labels"), strict=True):
        old = tuple(i if label == -100 else label for i, label in zip(ids, labels, strict=True))
        found[old] = ids, labels
    return found


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        for name in a
    )


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_pack_rows(seed):
    chance = random.Random(seed)
    rows = [[chance.randrange(90) for _ in range(chance.choice([0, 1, 4, 30]))] for _ in range(7)]
    types = [[i % 2 for i in row] for row in rows]
    labels = [[chance.choice([-100, i]) for i in row] for row in rows]
    kinds = [list, tuple, np.array, torch.tensor, lambda row: np.array(row, np.int32)]
    kinds += [lambda row: torch.tensor(row, dtype=torch.uint8)]
    mixed = [chance.choice(kinds)(row) for row in rows]
    batch = pack_rows(mixed, types, labels, vocab_size=90)
    lengths = [len(row) for row in rows]
    borders = [sum(lengths[:b]) for b in range(len(rows) + 1)]
    want = {
        "input_ids": torch.tensor([[*chain(*rows)]]),
        "token_type_ids": torch.tensor([[*chain(*types)]]),
        "labels": torch.tensor([[*chain(*labels)]]),
        "position_ids": torch.tensor([[i for n in lengths for i in range(n)]]),
        "cu_seq_lens_q": torch.tensor(borders, dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor(borders, dtype=torch.int32),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    assert [*batch] == [*want] and equal(batch, want)
    assert all(getattr(a, "dtype", 0) == getattr(want[n], "dtype", 0) for n, a in batch.items())


def test_pack_rows_takes_a_matrix():
    ids = torch.arange(12).view(3, 4)
    for given in (ids, ids.numpy(), ids.int(), ids.t().contiguous().t(), list(ids)):
        batch = pack_rows(given)
        assert [*batch][:2] == ["input_ids", "position_ids"]
        assert batch["input_ids"].tolist() == [list(range(12))]
        assert batch["cu_seq_lens_q"].tolist() == [0, 4, 8, 12] and batch["max_length_k"] == 4


@pytest.mark.parametrize("rows", [[], [[]], [[], np.zeros(0), torch.zeros(0)]])
def test_pack_nothing(rows):
    batch = pack_rows(rows)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, 0)
    assert batch["cu_seq_lens_q"].tolist() == [0] * (len(rows) + 1)
    assert batch["max_length_q"] == 0


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (([[1], [2, 5]],), {"vocab_size": 5}, ValueError, "input_ids: .*got 5 in example 1, tok"),
        (([[1], [-2]],), {}, ValueError, "input_ids: .*got -2 in example 1, token 0"),
        (([[1], [2.5]],), {}, TypeError, "input_ids: want integers, got float in example 1"),
        ((torch.ones(3).long(),), {}, ValueError, r"input_ids: want rows or \(B, L\), got \[3\]"),
        ((np.ones((1, 2, 3), int),), {}, ValueError, r"got \[1, 2, 3\]"),
        (([torch.ones(1, 2).long()],), {}, ValueError, "want 1-D, got 2-D in example 0"),
        (("ab",), {}, TypeError, "input_ids: want a list of rows, got str"),
        (([[1]], [[0], [1]]), {}, ValueError, "token_type_ids: want 1 rows, got 2"),
        (([[1]], [[0, 0]]), {}, ValueError, "token_type_ids: want 1 values, got 2 in example 0"),
        (([[1]], None, [[-101]]), {}, ValueError, "labels: .*got -101 in example 0"),
        (([[1]], [[-1]]), {}, ValueError, "token_type_ids: .*got -1 in example 0"),
    ],
)
def test_pack_rows_refuses(args, options, error, message):
    with pytest.raises(error, match=message):
        pack_rows(*args, **options)


# --- what the collator returns --------------------------------------------------------------------


def test_packed_and_padded_hold_the_same(toy):
    given = features(toy)
    packed = MaskedLMCollator(toy, seed=3)(given)
    padded = MaskedLMCollator(toy, seed=3, padded=True)(given)
    assert set(padded) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    real = padded["attention_mask"].bool()
    assert real.sum(1).tolist() == packed["cu_seq_lens_q"].diff().tolist()
    assert real.shape == (12, packed["max_length_q"])
    fill = {"input_ids": 0, "token_type_ids": 0, "labels": -100}
    for name, value in fill.items():
        assert padded[name].dtype == packed[name].dtype == torch.int64
        assert torch.equal(padded[name][real], packed[name][0])
        assert (padded[name][~real] == value).all()
    assert parts(packed, "position_ids") == [[*range(len(f["input_ids"]))] for f in given]
    assert parts(packed, "token_type_ids") == [f["token_type_ids"] for f in given]
    assert set(masks(packed)) == {tuple(f["input_ids"]) for f in given}
    special = torch.tensor([*chain(*(f["special_tokens_mask"] for f in given))])
    assert ((packed["labels"][0] != -100) & (special > 0)).sum() == 0
    counts = [sum(label != -100 for label in row) for row in parts(packed, "labels")]
    assert counts == [
        max(1, round(0.15 * s.count(0))) for s in map(lambda f: f["special_tokens_mask"], given)
    ]


def test_features_of_all_kinds_give_the_same(toy):
    given = features(toy)
    collate = MaskedLMCollator(toy, seed=1)
    want = collate(given)
    tensors = [{name: torch.tensor(v) for name, v in f.items()} for f in given]
    arrays = [{name: np.array(v, np.int32) for name, v in f.items()} for f in given]
    encodings = [transformers.BatchEncoding(f) for f in given]
    no_masks = [{n: f[n] for n in ("input_ids", "token_type_ids")} for f in given]
    bools = [
        f | {"special_tokens_mask": [bool(i) for i in f["special_tokens_mask"]]} for f in given
    ]
    offsets = [f | {"offset_mapping": [(0, 1)] * 3} for f in given]
    for other in (tensors, arrays, encodings, no_masks, bools, offsets, tuple(given)):
        assert equal(collate(other), want)
    plain = collate([f["input_ids"] for f in given])
    assert equal(plain, {name: v for name, v in want.items() if name != "token_type_ids"})
    assert equal(collate([{"input_ids": f["input_ids"]} for f in given]), plain)
    assert equal(collate([torch.tensor(f["input_ids"]) for f in given]), plain)


def test_tokens_without_attention_are_left_out(toy):
    given = features(toy)
    wide = []
    for b, f in enumerate(given):
        n, left = 40 - len(f["input_ids"]), b % 3
        fill = {"input_ids": 0, "token_type_ids": 0, "special_tokens_mask": 1, "attention_mask": 0}
        wide.append({name: [fill[name]] * left + v + [fill[name]] * n for name, v in f.items()})
    collate = MaskedLMCollator(toy, seed=1)
    assert equal(collate(wide), collate(given))


def test_special_tokens_mask_keeps_tokens_out(toy):
    given = features(toy)
    for f in given:
        f["special_tokens_mask"] = [int(i % 3 > 0) for i in range(len(f["input_ids"]))]
    batch = MaskedLMCollator(toy, seed=1, mlm_probability=1)(given)
    special = set(toy.all_special_ids)
    for f, labels in zip(given, parts(batch, "labels"), strict=True):
        want = [i % 3 == 0 and token not in special for i, token in enumerate(f["input_ids"])]
        assert [label != -100 for label in labels] == want


def test_numbers_go_along_and_the_index_does_not(toy):
    given = features(toy, 3)
    for b, f in enumerate(given):
        f |= {"next_sentence_label": b % 2, "idx": 7 * b, "weight": b / 2}
    for padded in (False, True):
        batch = MaskedLMCollator(toy, seed=1, index_name="idx", padded=padded)(given)
        assert batch["next_sentence_label"].tolist() == [0, 1, 0] and "idx" not in batch
        assert batch["weight"].tolist() == [0.0, 0.5, 1.0]
    assert MaskedLMCollator(toy, seed=1)(given)["idx"].tolist() == [0, 7, 14]


def test_left_padding_and_multiples():
    rows = [[7, 8, 9], [5], []]
    collate = MaskedLMCollator(tokenizer(), seed=0, padded=True, pad_to_multiple_of=8)
    batch = collate(rows)
    assert batch["attention_mask"].tolist() == [[1] * n + [0] * (8 - n) for n in (3, 1, 0)]
    left = tokenizer(padding_side="left", pad_token_id=1)
    batch = MaskedLMCollator(left, seed=0, padded=True, mlm_probability=0)(rows)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [1, 1, 5], [1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert batch["labels"].eq(-100).all()


def test_nothing_and_little():
    packed, padded = (MaskedLMCollator(tokenizer(), seed=0, padded=p) for p in (False, True))
    assert packed([])["input_ids"].shape == (1, 0) and packed([])["max_length_q"] == 0
    assert packed([])["cu_seq_lens_q"].tolist() == [0]
    assert padded([])["input_ids"].shape == padded([])["labels"].shape == (0, 0)
    assert packed([[], [7], [2, 0, 3]])["labels"].tolist() == [[7, -100, -100, -100]]
    assert padded([[]])["attention_mask"].shape == (1, 0)
    assert MaskedLMCollator(tokenizer(), padded=True)([[]])["labels"].shape == (1, 0)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([[5], [6, 40]], ValueError, "input_ids: want 0 to 39, got 40 in example 1, token 1"),
        ([{"input_ids": [5]}, {"input_ids": [-1]}], ValueError, "got -1 in example 1, token 0"),
        ([{"input_ids": [5]}, [6]], TypeError, "features: want dicts, got list in example 1"),
        ([[5], {"input_ids": [5]}], (TypeError, ValueError), "input_ids: .*in example 1"),
        ([{"ids": [5]}], ValueError, "features: want input_ids in each, got .*ids.* in example 0"),
        (
            [{"input_ids": [5]}, {"input_ids": [5], "x": 1}],
            ValueError,
            "features: want .* as in example 0, got .*x.* in example 1",
        ),
        ([{"input_ids": [5], "x": 1}, {"input_ids": [5], "y": 1}], ValueError, "in example 1"),
        ([{"input_ids": [5], "text": "a"}], ValueError, "text: want a number in each example"),
        ([{"input_ids": [5], "labels": 1}], ValueError, "want none of what is made .*got labels"),
        ([{"input_ids": [5], "position_ids": [0]}], ValueError, "made here, got position_ids"),
        (
            [{"input_ids": [5], "attention_mask": [1, 0]}],
            ValueError,
            "attention_mask: want 1 values, got 2 in example 0",
        ),
        ([{"input_ids": [5], "attention_mask": [2]}], ValueError, "attention_mask: want 0 to 1"),
        ([{"input_ids": [5], "attention_mask": [0.0]}], TypeError, "attention_mask: want integers"),
        ([{"input_ids": [5], "token_type_ids": [-1]}], ValueError, "token_type_ids: want 0 to"),
        (torch.tensor([5, 6]), ValueError, r"input_ids: want rows or \(B, L\), got \[2\]"),
        ([5, 6], ValueError, "input_ids: want 1-D, got 0-D in example 0"),
        ([[[5]]], TypeError, "input_ids: want integers, got list in example 0"),
    ],
)
def test_refuses(given, error, message):
    with pytest.raises(error, match=message):
        MaskedLMCollator(tokenizer(), seed=0)(given)


def test_refuses_options():
    with pytest.raises(ValueError, match="index_name: want a seed"):
        MaskedLMCollator(tokenizer(), index_name="idx")
    with pytest.raises(ValueError, match="pad_to_multiple_of: want padded=True"):
        MaskedLMCollator(tokenizer(), pad_to_multiple_of=8)
    with pytest.raises(ValueError, match="pad_to_multiple_of: want at least 1, got 0"):
        MaskedLMCollator(tokenizer(), padded=True, pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="tokenizer: want a pad token"):
        MaskedLMCollator(tokenizer(pad_token_id=None), padded=True)
    with pytest.raises(ValueError, match="mlm_probability: want 0 to 1"):
        MaskedLMCollator(tokenizer(), mlm_probability=-1)
    collate = MaskedLMCollator(tokenizer(), seed=0, index_name="idx")
    with pytest.raises(ValueError, match="features: want the entry idx"):
        collate([[5]])
    with pytest.raises(TypeError, match=r"idx: want integers, got torch\.float32"):
        collate([{"input_ids": [5], "idx": 0.5}])


# --- on what the masks depend ---------------------------------------------------------------------


def stream(count=40):
    chance = random.Random(0)
    rows = [[n, *(chance.randrange(5, 1000) for _ in range(60))] for n in range(5, 5 + count)]
    return [{"input_ids": row, "idx": b} for b, row in enumerate(rows)]


@pytest.mark.parametrize("index_name", [None, "idx"])
@pytest.mark.parametrize("words", [False, True])
def test_masks_depend_on_neither_batch_nor_order_nor_workers(index_name, words):
    made = tokenizer(1000, continues=range(500, 1000))
    collate = MaskedLMCollator(made, seed=-5, index_name=index_name, whole_word_mask=words)
    given = stream()
    want = masks(collate(given))
    assert len(want) == 40
    for size, shuffled, workers in ((1, False, 0), (7, True, 0), (16, True, 2)):
        order = random.Random(size).sample(given, len(given)) if shuffled else given
        loader = DataLoader(order, batch_size=size, collate_fn=collate, num_workers=workers)
        found = {}
        for batch in loader:
            assert batch["cu_seq_lens_q"].dtype == torch.int32
            found |= masks(batch)
        assert found == want
    collate.set_epoch(1)
    assert masks(collate(given)) != want and collate.epoch == 1
    collate.set_epoch(0)
    assert masks(collate(given)) == want


def test_index_counts_and_not_the_ids_where_there_is_one():
    row = list(range(5, 40))
    given = [{"input_ids": row, "idx": n} for n in (0, 1, 0, -1)]
    by_index = parts(MaskedLMCollator(tokenizer(), seed=0, index_name="idx")(given), "labels")
    assert by_index[0] == by_index[2] != by_index[1] != by_index[3] != by_index[0]
    by_ids = parts(MaskedLMCollator(tokenizer(), seed=0)(given), "labels")
    assert by_ids[0] == by_ids[1] == by_ids[2]
    without = parts(MaskedLMCollator(tokenizer())(given), "labels")
    assert without[0] != without[1] != without[2]
    swapped = row[::-1]
    digests = parts(MaskedLMCollator(tokenizer(), seed=0)([row, swapped]), "labels")
    places = [[i for i, label in enumerate(labels) if label != -100] for labels in digests]
    assert places[0] != places[1]  # the same ids in another order are another example


def test_workers_see_a_new_epoch():
    collate = MaskedLMCollator(tokenizer(1000), seed=0)
    options = {"batch_size": 10, "num_workers": 2, "persistent_workers": True}
    loader = DataLoader(stream(), collate_fn=collate, **options)
    epochs = []
    for epoch in (0, 1, 0):
        collate.set_epoch(epoch)
        epochs.append({old: new for batch in loader for old, new in masks(batch).items()})
    assert epochs[0] == epochs[2] != epochs[1]
    assert epochs[1] == masks((collate.set_epoch(1), collate(stream()))[1])


def test_without_a_seed_masks_follow_torch():
    collate, given = MaskedLMCollator(tokenizer(1000)), stream()
    torch.manual_seed(5)
    first, second = collate(given), collate(given)
    torch.manual_seed(5)
    assert equal(collate(given), first) and not equal(first, second)
    loader = DataLoader(given, batch_size=20, collate_fn=collate, num_workers=2)
    epochs = [[batch["labels"] for batch in loader] for _ in range(2)]
    assert not torch.equal(epochs[0][0], epochs[1][0])


def test_pickled_it_is_the_same(toy):
    collate = MaskedLMCollator(toy, seed=2, whole_word_mask=True, padded=True)
    collate.set_epoch(9)
    again = pickle.loads(pickle.dumps(collate))
    assert again.epoch == 9 and equal(again(features(toy)), collate(features(toy)))
    again.set_epoch(1)
    assert collate.epoch == 9
    assert len(pickle.dumps(collate)) < 5000  # it goes to workers: no tokenizer in it


@pytest.mark.long
def test_spawned_workers_see_a_new_epoch():
    collate = MaskedLMCollator(toy_tokenizer(), seed=0)
    given = [{"input_ids": [2, 5, 6, 7, 8 + b, *range(10, 25), 3]} for b in range(8)]
    options = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "spawn"}
    loader = DataLoader(given, batch_size=4, collate_fn=collate, **options)
    epochs = []
    for epoch in (0, 1):
        collate.set_epoch(epoch)
        epochs.append([masks(batch) for batch in loader])
        assert epochs[-1] == [masks(collate(given[:4])), masks(collate(given[4:]))]
    assert epochs[0] != epochs[1]


# --- models take it -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_models_have_the_same_loss_packed_and_padded(name, toy):
    theirs, ours = pair(name, torch.float32, vocab_size=V, max_position_embeddings=64)
    given = features(toy)
    if name == "BertForPreTraining":
        given = [f | {"next_sentence_label": b % 2} for b, f in enumerate(given)]
    packed = MaskedLMCollator(toy, seed=3)(given)
    padded = MaskedLMCollator(toy, seed=3, padded=True)(given)
    with torch.no_grad():
        want = theirs(**padded).loss
        assert want > 1
        for batch in (packed, padded):
            assert abs(ours(**batch).loss - want) < 1e-5 * want
    ours.train()
    loss = ours(**packed).loss
    loss.backward()
    assert torch.isfinite(loss) and ours.bert.embeddings.word_embeddings.weight.grad.any()
