"""What surrounds a call: tokens and ids, padding by hand, the result, transformers' own tools."""

import copy
import pickle
import random

import numpy as np
import pytest
import tokenizer_cases
import torch
import transformers
from tokenizer_cases import EVERYTHING, SPECIAL, TEXTS, WORDS, both, lists
from tokenizers import AddedToken

from bert_fast.batch_encoding import BatchEncoding
from bert_fast.tokenizer import BertTokenizer

ours, pair = tokenizer_cases.ours, tokenizer_cases.pair


# --- tokens and ids ------------------------------------------------------------------------------


def test_tokens_and_ids(pair):
    ours, theirs = pair
    assert ours.is_fast and len(ours) == len(theirs) and ours.vocab_size == theirs.vocab_size
    assert ours.get_vocab() == theirs.get_vocab() == ours.vocab
    for name in ("special_tokens_map", "all_special_tokens", "all_special_ids"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("added_tokens_decoder", "added_tokens_encoder", "model_input_names"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("pad", "unk", "cls", "sep", "mask", "bos", "eos"):
        for attribute in (f"{name}_token", f"{name}_token_id"):
            assert getattr(ours, attribute) == getattr(theirs, attribute)
    tokens = ["the", "nothing", "[MASK]", "##ing"]
    assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert ours.convert_tokens_to_ids("nothing") == ours.unk_token_id
    ids = [5, 4, 1, 9, 999]
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.convert_ids_to_tokens(torch.tensor(ids), skip_special_tokens=True)[0] == "the"
    assert ours.convert_ids_to_tokens(5) == "the"
    assert ours.tokenize(TEXTS[0]) == theirs.tokenize(TEXTS[0])
    assert ours.tokenize("the", pair="fox", add_special_tokens=True)[-1] == "[SEP]"
    assert ours.encode("the fox", max_length=3) == theirs.encode("the fox", max_length=3)
    with pytest.raises(AttributeError, match="no attribute 'max_tokens'"):
        _ = ours.max_tokens


def test_rows_by_hand(ours):
    a, b = [5, 6], [7]
    row = ours(["the fox"], ["lower"], return_special_tokens_mask=True)
    first, second = (ours.encode(t, add_special_tokens=False) for t in ("the fox", "lower"))
    assert ours.build_inputs_with_special_tokens(first, second) == row["input_ids"][0]
    types = ours.create_token_type_ids_from_sequences(first, second)
    assert types == row["token_type_ids"][0]
    mask = row["special_tokens_mask"][0]
    assert ours.get_special_tokens_mask(first, second) == mask
    whole = torch.tensor(row["input_ids"][0])
    assert ours.get_special_tokens_mask(whole, already_has_special_tokens=True) == mask
    assert ours.build_inputs_with_special_tokens(a) == [2, *a, 3]
    assert ours.get_special_tokens_mask(a) == [1, 0, 0, 1]
    assert ours.num_special_tokens_to_add() == 2 and ours.num_special_tokens_to_add(True) == 3
    with pytest.raises(ValueError, match="token_ids_1: want None"):
        ours.get_special_tokens_mask(a, b, already_has_special_tokens=True)


def test_decoding(shared):
    ours, theirs = both(shared, "uncased")
    text = "I do n't know , it 's `` fine '' . [MASK] unwantedly , naïve !"
    ids = ours(text)["input_ids"]
    for skip in (False, True):
        for clean in (None, False, True):
            options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
            want = theirs.decode(ids, **options)
            for form in (ids, np.array(ids), torch.tensor(ids), [*map(np.int64, ids)]):
                assert ours.decode(form, **options) == want
            rows = [ids, ids[:4], []]
            assert ours.batch_decode(rows, **options) == theirs.batch_decode(rows, **options)
            assert ours.batch_decode(torch.tensor([ids]), **options) == [want]
            ours.clean_up_tokenization_spaces = theirs.clean_up_tokenization_spaces = skip
    assert ours.decode(ids[1]) == theirs.decode(ids[1]) and ours.decode([]) == ""
    assert ours.batch_decode([]) == theirs.batch_decode([])
    tokens = ours.convert_ids_to_tokens(ids)
    assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)
    assert ours.decode([10**6]) == theirs.decode([10**6])
    with pytest.raises(ValueError, match="token_ids: want ids from 0, got -100"):
        ours.decode([5, -100])


@pytest.mark.parametrize("special", [False, True])
def test_added_tokens(pair, special):
    ours, theirs = pair
    text = "the NEWfox is new, [NEW]er <x> <X>"
    tokens = ["[NEW]", AddedToken("<x>", single_word=True, lstrip=True), "fox"]
    results = []
    for tokenizer in pair:
        before = tokenizer(text).data  # a call in between must not be remembered
        count = tokenizer.add_tokens(tokens, special_tokens=special)
        assert tokenizer(text).data != before
        results.append((count, len(tokenizer), tokenizer(text, **EVERYTHING).data))
    assert results[0] == results[1]
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    ids = ours(text)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
        ids, skip_special_tokens=True
    )
    assert ours.add_tokens([]) == 0 and ours.add_tokens("[NEW]", special) == 0


def test_named_special_tokens(pair):
    ours, theirs = pair
    for more in (["<a>", "<b>"], ["<c>"]):
        for replace in (True, False):
            given = {"mask_token": "<mask>", "extra_special_tokens": more}
            counts = [t.add_special_tokens(given, replace) for t in pair]
            assert counts[0] == counts[1]
            for name in ("mask_token", "mask_token_id", "extra_special_tokens"):
                assert getattr(ours, name) == getattr(theirs, name)
            assert ours.all_special_ids == theirs.all_special_ids
    assert ours("a <mask> <a>").data == theirs("a <mask> <a>").data
    ours.pad_token = "the"
    assert ours.pad_token_id == 5 and ours(["the fox", ""], padding=True)["input_ids"][1][-1] == 5
    ours.pad_token_id = 0
    assert ours.pad_token == "[PAD]"
    ours.pad_token = None
    assert ours.pad_token_id is None
    with pytest.raises(ValueError, match="want a pad_token, got None"):
        ours(TEXTS, padding=True)
    with pytest.raises(ValueError, match="padding: want a pad_token"):
        ours.pad({"input_ids": [[1], [1, 2]]})
    with pytest.raises(ValueError, match="pad_token: want a token or None, got 3"):
        ours.pad_token = 3
    with pytest.raises(ValueError, match="want names among bos_token, "):
        ours.add_special_tokens({"hug_token": "x"})


def test_tokens_that_a_vocabulary_lacks():
    """They are added in the order in which transformers adds them."""
    vocab = {"[UNK]": 0, "the": 1}
    ours, theirs = BertTokenizer(vocab), transformers.BertTokenizer(vocab=vocab)
    assert ours.get_vocab() == theirs.get_vocab() and len(ours) == 6
    assert ours("the fox").data == theirs("the fox").data
    with pytest.raises(ValueError, match=r"vocab: want \[UNK\] among the tokens"):
        BertTokenizer(["the"])
    assert BertTokenizer().get_vocab() == transformers.BertTokenizer().get_vocab()


@pytest.mark.parametrize("name", ["padding_side", "truncation_side"])
def test_sides(name):
    with pytest.raises(ValueError, match=f'{name}: want "right" or "left", got \'top\''):
        BertTokenizer(**{name: "top"})


def test_copies(ours):
    """Pickled and copied, with the tokens added since."""
    ours.add_tokens("[NEW]")
    ours.model_max_length = 5
    want = ours("the [NEW] fox", padding="max_length").data
    for made in (copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
        assert made("the [NEW] fox", padding="max_length").data == want
        assert repr(made) == repr(ours) and "do_lower_case=True" in repr(made)
    made = copy.deepcopy(ours)
    made.add_tokens("[OTHER]")
    assert made.encode("[OTHER]")[1] == len(ours) == len(made) - 1
    assert max(ours.encode("[OTHER]")) < len(ours)


def test_what_is_changed_in_the_backend_is_followed(ours):
    assert ours.tokenize("FOX") == ["fox"]
    ours.backend_tokenizer.normalizer = None
    assert ours.tokenize("FOX") == ["[UNK]"] and ours.do_lower_case is None


# --- padding by hand -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*max_length")
@pytest.mark.parametrize("seed", range(12))
def test_pad(pair, seed):
    generator = random.Random(seed)
    for _ in range(20):
        rows = [
            {"input_ids": [7] * n, "token_type_ids": [1] * n, "special_tokens_mask": [0] * n}
            for n in generator.choices(range(1, 9), k=3)
        ]
        for row in rows:
            row["labels"] = 1
        if generator.random() < 0.5:
            rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
        form = generator.choice(["list", "dict", "one", "pt", "np"])
        given = rows
        if form == "dict":
            given = BatchEncoding({name: [row[name] for row in rows] for name in rows[0]})
        elif form == "one":
            given = {name: value for name, value in rows[0].items() if name != "labels"}
        elif form != "list":
            array = torch.tensor if form == "pt" else np.array
            given = [{name: array(value) for name, value in row.items()} for row in rows]
        options = {
            "padding": generator.choice([True, "longest", "max_length"]),
            "max_length": generator.choice([None, 5, 12]),
            "pad_to_multiple_of": generator.choice([None, 4]),
            "padding_side": generator.choice([None, "left", "right"]),
            "return_attention_mask": generator.choice([None, True, False]),
            "return_tensors": generator.choice([None, "pt", "np"]),
        }
        results = []
        for tokenizer in pair:
            tokenizer.model_max_length = 16
            try:
                got = tokenizer.pad(copy.deepcopy(given), **options)
            except Exception as error:
                results.append(type(error))
            else:
                results.append({n: lists(v) for n, v in got.items()})
                kinds = {type(v) for v in got.values()}
                results.append(kinds)
        half = len(results) // 2
        assert results[:half] == results[half:], (given, options)


def test_pad_refuses(ours):
    with pytest.raises(ValueError, match="want input_ids among the entries, got \\['ids'\\]"):
        ours.pad({"ids": [1]})
    with pytest.raises(ValueError, match="want 2 rows of token_type_ids, got 1"):
        ours.pad({"input_ids": [[1], [2]], "token_type_ids": [[0]]})
    assert ours.pad({"input_ids": []}, padding=True).data == {"input_ids": [], "attention_mask": []}


# --- the result ----------------------------------------------------------------------------------


def test_places(pair):
    """Words, tokens and characters, from each to each, as transformers gives them."""
    texts = (["Unwanted, running fox", "the é lower"], ["the fox", "Fox unwanted"])
    ours, theirs = (tokenizer(*texts, padding=True) for tokenizer in pair)
    assert ours.n_sequences == theirs.n_sequences == 2 and ours.is_fast
    for row in range(2):
        assert ours.tokens(row) == theirs.tokens(row)
        assert ours.word_ids(row) == theirs.word_ids(row)
        assert ours.sequence_ids(row) == theirs.sequence_ids(row)
        for token in range(len(ours[row])):
            for name in ("token_to_sequence", "token_to_word", "token_to_chars"):
                assert getattr(ours, name)(row, token) == getattr(theirs, name)(row, token)
        for i in range(12):
            for side in (0, 1):
                for name in ("char_to_token", "char_to_word", "word_to_tokens"):
                    mine = getattr(ours, name)(row, i, side)
                    assert mine == getattr(theirs, name)(row, i, side)
    assert ours.word_to_chars(0, 0) == theirs.word_to_chars(0, 0) == (0, 8)
    assert ours.word_to_chars(0, 99) is None and ours.token_to_chars(0, 0) is None
    assert ours.token_to_chars(1).end == theirs.token_to_chars(1).end
    assert ours.token_to_word(0, -2) == ours.token_to_word(0, len(ours[0]) - 2)


def test_the_result_is_a_dict(ours):
    got = ours(TEXTS, padding=True)
    assert got.input_ids is got["input_ids"] and {**got} == got.data and "input_ids" in got
    assert got[1].ids == got["input_ids"][1] and len(got[:2]) == 2
    again = pickle.loads(pickle.dumps(got))
    assert again.data == got.data and again.tokens(1) == got.tokens(1)
    assert copy.deepcopy(got).data == got.data
    with pytest.raises(AttributeError, match="no entry 'labels'"):
        _ = got.labels
    got.convert_to_tensors("pt").to("cpu")
    assert isinstance(got.input_ids, torch.Tensor)
    with pytest.raises(TypeError, match=r"device: want .* got torch.float16"):
        got.to(torch.float16)
    bare = BatchEncoding({"input_ids": [1, 2, 3]}, tensor_type="np", prepend_batch_axis=True)
    assert bare.input_ids.shape == (1, 3) and bare[:1]["input_ids"].shape == (1, 3)
    with pytest.raises(KeyError):
        bare[0]
    with pytest.raises(ValueError, match="want an object with encodings"):
        bare.tokens()


# --- transformers takes it -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    config = transformers.BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    return lambda kind: getattr(transformers, f"Bert{kind}")(config).eval()


@pytest.mark.parametrize(
    ("task", "kind", "text", "options"),
    [
        ("fill-mask", "ForMaskedLM", "the lower [MASK] , fox", {}),
        ("text-classification", "ForSequenceClassification", ["unwanted , running", "the"], {}),
        ("token-classification", "ForTokenClassification", "unwanted running fox", {}),
        (
            "token-classification",
            "ForTokenClassification",
            ["unwanted running fox " * 9, "fox"],
            {"aggregation_strategy": "first", "stride": 2},
        ),
        ("feature-extraction", "Model", "unwanted running fox", {}),
    ],
)
def test_pipelines(pair, model, task, kind, text, options):
    torch.manual_seed(0)
    net = model(kind)
    made = [transformers.pipeline(task, model=net, tokenizer=t, device="cpu") for t in pair]
    results = [pipe(text, **options) for pipe in made]
    assert results[0] and str(results[0]) == str(results[1])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DataCollatorWithPadding", {"pad_to_multiple_of": 8}),
        ("DataCollatorForTokenClassification", {}),
        ("DataCollatorForLanguageModeling", {"seed": 0}),
        ("DataCollatorForLanguageModeling", {"seed": 0, "return_tensors": "np"}),
        ("DataCollatorForLanguageModeling", {"seed": 0, "whole_word_mask": True}),
        ("DataCollatorForMultipleChoice", {}),
    ],
)
def test_data_collators(pair, name, options):
    results = []
    for tokenizer in pair:
        collator = getattr(transformers, name)(tokenizer, **options)
        rows = []
        for text in TEXTS[:2] + TEXTS[3:]:
            settings = {}
            if "whole_word_mask" in options:  # offsets are not padded by a collator
                settings = {"return_offsets_mapping": True, "padding": "max_length"}
            row = {**tokenizer(text, max_length=12, **settings)}
            if name == "DataCollatorForTokenClassification":
                row["labels"] = [1] * len(row["input_ids"])
            if name == "DataCollatorForMultipleChoice":
                row = {n: [v, v] for n, v in row.items()} | {"label": 1}
            rows.append(row)
        results.append({n: v.tolist() for n, v in collator(rows).items()})
    assert results[0] == results[1]
