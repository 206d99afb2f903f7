"""BertTokenizer: the official cases, every setting of a call, tokens, ids and back."""

import gzip
import json
import random

import pytest
import tokenizer_cases
import torch
from tokenizer_cases import EVERYTHING, SPECIAL, TEXTS, VOCABULARIES, both, difference

from bert_fast.tokenizer import BertTokenizer

ours, pair = tokenizer_cases.ours, tokenizer_cases.pair


# --- cases of others -----------------------------------------------------------------------------


def run_case(case, shared):
    """What our tokenizer gives for a case of tokenizer_cases_official.json."""
    unit, text = case["unit"], case["input"]
    names = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    rules = {name: case[name] for name in names if name in case}
    if "vocab_file" in case:
        vocab = shared / "data/vocab" / case["vocab_file"]
    else:
        vocab = list(dict.fromkeys([*case.get("vocab", SPECIAL), *SPECIAL]))
    ours = BertTokenizer(vocab, **rules)
    model, rules = ours.backend_tokenizer.model, ours.backend_tokenizer
    if unit == "is_control":
        return rules.normalizer.normalize_str(f"a{text}b") == "ab"
    if unit == "is_whitespace":
        return [w for w, _ in rules.pre_tokenizer.pre_tokenize_str(f"a{text}b")] == ["a", "b"]
    if unit == "is_punctuation":
        return [w for w, _ in rules.pre_tokenizer.pre_tokenize_str(f"a{text}b")] == ["a", text, "b"]
    if "never_split" in case:  # which special tokens never are
        assert {*case["never_split"]} <= {*ours.all_special_tokens}
        got = ours(text, add_special_tokens=False, return_offsets_mapping=True)
        return [text[start:end] for start, end in got["offset_mapping"]]
    if unit == "basic":
        normalized = rules.normalizer.normalize_str(text)
        return [w for w, _ in rules.pre_tokenizer.pre_tokenize_str(normalized)]
    if unit == "wordpiece":
        return [token.value for word in text.split() for token in model.tokenize(word)]
    if unit == "tokens_to_ids":
        return ours.convert_tokens_to_ids(text)
    if unit == "encode_pair":
        first, second = (ours(t, add_special_tokens=False)["input_ids"] for t in text)
        got = ours(*text)
        assert got["input_ids"] == [101, *first, 102, *second, 102]
        assert got["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        return case["expected"]  # which says this in words
    if "expected_offsets" in case:
        got = ours(text, return_offsets_mapping=True)["offset_mapping"]
        assert got == [*map(tuple, case["expected_offsets"])]
    if "expected_ids" in case:
        assert ours.encode(text, add_special_tokens=False) == case["expected_ids"]
    return ours.tokenize(text, add_special_tokens=unit in ("offsets", "full_with_special"))


def test_the_official_cases(shared):
    cases = json.loads((shared / "data/tokenizer/tokenizer_cases_official.json").read_text())
    assert len(cases) == 51
    for case in cases:
        want = case["expected"]
        if "note" in case:  # of another project, which spells unknown words; BERT does not
            want = [*want[:7], "[UNK]", *want[9:11], "[UNK]", want[-1]]
        assert run_case(case, shared) == want, case


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_golden_cases(shared, name):
    """Google's tokens, but transformers' for long words and for decomposed text."""
    file, small = VOCABULARIES[name]
    ours, _ = both(shared, name)
    raw = gzip.decompress((shared / "data/tokenizer/tokenizer_golden_dev.jsonl.gz").read_bytes())
    cases = [json.loads(line) for line in raw.splitlines()]
    cases = [case for case in cases if file.startswith(case["vocab"])]
    assert len(cases) == 307 and {case["do_lower_case"] for case in cases} == {small}
    for case in cases:
        want = case.get("hf_fast_tokens", case["tokens"])
        got = ours(case["text"], add_special_tokens=False)
        assert got.tokens() == want, case["text"]
        if want == case["tokens"]:
            assert got["input_ids"] == case["ids"]
        assert ours.convert_tokens_to_ids(want) == got["input_ids"]


# --- a call's settings ---------------------------------------------------------------------------


def some_text(generator, most):
    parts = "hello naïve 中国 한국어 [MASK] [SEP] a.b, unwantedly 12345 e\u0301 \0 İ ß".split(" ")
    return " ".join(generator.choices(parts, k=generator.randrange(most)))


def some_call(generator):
    """Arguments of a call, any of them in any company."""
    choice, split = generator.choice, generator.random() < 0.3
    rows = choice([None, 1, 2, 4])

    def text():
        made = some_text(generator, 30)
        return made.split(" ") if split else made

    def texts():
        return text() if rows is None else [text() for _ in range(rows)]

    inputs = [texts() for _ in range(choice([1, 2]))]
    if rows and len(inputs) == 2 and not split and choice([True, False]):
        inputs = [list(zip(*inputs, strict=True))]  # pairs as elements of the batch
    flags = ("add_special_tokens", "split_special_tokens", "return_overflowing_tokens")
    return inputs, {
        "is_split_into_words": split,
        "padding": choice([False, True, "longest", "max_length", "do_not_pad"]),
        "truncation": choice([None, True, False, "longest_first", "only_first", "only_second"]),
        "max_length": choice([None, 3, 4, 5, 8, 16, 17, 40]),
        "stride": choice([0, 0, 0, 1, 2]),
        "pad_to_multiple_of": choice([None, None, 8]),
        "padding_side": choice([None, "left", "right"]),
        "return_tensors": choice([None, None, "pt", "np"]),
        **{name: choice([True, False]) for name in (*flags, *EVERYTHING)},
        **{f"return_{name}": choice([None, True, False]) for name in ("token_type_ids",)},
        "return_attention_mask": choice([None, True, False]),
    }


@pytest.mark.filterwarnings("ignore:.*max_length")
@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["uncased", "korean"])
def test_every_setting_in_any_company(shared, name, count, monkeypatch):
    monkeypatch.setenv("RUST_BACKTRACE", "0")  # a stride that does not fit panics in the library
    tokenizers, generator, equal = both(shared, name), random.Random(name), 0
    for _ in range(count):
        inputs, options = some_call(generator)
        own = {
            "model_max_length": generator.choice([int(1e30), 12]),
            "truncation_side": generator.choice(["left", "right"]),
            "padding_side": generator.choice(["left", "right"]),
        }
        results = []
        for tokenizer in tokenizers:
            for key, value in own.items():
                setattr(tokenizer, key, value)
            try:
                results.append(tokenizer(*inputs, **options))
            except BaseException as error:  # a panic is no Exception
                results.append(error)
        if any(isinstance(result, BaseException) for result in results):
            assert isinstance(results[0], ValueError), (inputs, options, own, results)
            if not isinstance(results[1], BaseException):  # beside an empty row they lose the rest
                assert "rows of lengths [0, " in str(results[0])
                assert results[1]["input_ids"].shape[1:] == (0,)
        else:
            assert not (found := difference(*results)), (found, inputs, options, own)
            equal += 1
    assert equal > count / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "both"}, "padding: want one of True, False, None, 'do_not_pad'.* got 'both'"),
        ({"truncation": "last"}, "truncation: want one of .* got 'last'"),
        ({"padding_side": "up"}, 'padding_side: want "right" or "left", got \'up\''),
        ({"return_tensors": "tf"}, 'return_tensors: want "pt", "np" or None'),
        ({"return_tensors": "pt"}, "want input_ids with rows of one length"),
        ({"max_length": -1}, "max_length: want at least 0"),
        ({"max_length": 1}, "max_length: want at least 2 for the special tokens, got 1"),
        ({"max_length": 4, "stride": 9}, "stride"),
        ({"padding": True, "pad_to_multiple_of": 0}, "pad_to_multiple_of: want at least 1"),
        (
            {"padding": True, "truncation": True, "max_length": 9, "pad_to_multiple_of": 8},
            "max_length: want a multiple of pad_to_multiple_of=8",
        ),
        ({"truncation": "only_second", "max_length": 3}, "text: Truncation error"),
    ],
)
def test_impossible_settings(ours, options, message):
    with pytest.raises(ValueError, match=message):
        ours(TEXTS, **options)


def test_settings_that_say_nothing_new(pair):
    for options in ({"padding": None}, {"truncation": "do_not_truncate"}, {"verbose": False}):
        assert pair[0](TEXTS, **options).data == pair[1](TEXTS).data
    with pytest.warns(UserWarning, match="max_length: without effect"):
        pair[0](TEXTS, padding=True, max_length=4)
    with pytest.raises(TypeError, match="unexpected keyword"):
        pair[0](TEXTS, paddding=True)


def test_an_empty_batch(ours):
    got = ours([], padding=True)
    assert got["input_ids"] == [] and got.encodings == []
    assert ours([], return_tensors="pt")["input_ids"].dtype == torch.int64


def test_batches_that_do_not_fit(ours):
    with pytest.raises(ValueError, match="text_pair: want 2 texts, as in text, got 1"):
        ours(["a", "b"], ["c"])
    with pytest.raises(TypeError, match="text_pair: want a list, as text is one, got str"):
        ours(["a", "b"], "cd")
