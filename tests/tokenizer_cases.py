"""transformers' fast tokenizer and ours on the same vocabulary, and texts to compare them on."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from bert_fast.tokenizer import BertTokenizer

VOCABULARIES = {  # name: file in ../shared/data/vocab, whether it has small letters only
    "uncased": ("bert-base-uncased-vocab.txt", True),
    "cased": ("bert-base-cased-vocab.txt", False),
    "chinese": ("bert-base-chinese-vocab.txt", True),
    "korean": ("koelectra-v1v2-vocab.txt", False),
}
EVERYTHING = {
    "return_special_tokens_mask": True,
    "return_offsets_mapping": True,
    "return_length": True,
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "un", "##want", "##ed", "runn", "##ing", ",", "fox", "low", "##er"]
TEXTS = ["unwanted, running", "the fox", "", "the lower [MASK] fox é"]
ATTRIBUTES = ("ids", "tokens", "offsets", "word_ids", "sequence_ids", "n_sequences")  # of Encoding


def both(shared: Path, name: str, **kwargs) -> tuple[BertTokenizer, transformers.BertTokenizer]:
    """Our tokenizer and transformers' with a vocabulary of ../shared."""
    file, small = VOCABULARIES[name]
    kwargs = {"do_lower_case": small} | kwargs
    path = str(shared / "data/vocab" / file)
    return BertTokenizer(path, **kwargs), transformers.BertTokenizer(vocab=path, **kwargs)


def difference(ours, theirs, attributes: tuple[str, ...] = ATTRIBUTES) -> str:
    """What differs between two results of a call and in their Encodings; "" for nothing."""
    if [*ours] != [*theirs]:
        return f"entries {[*ours]}, want {[*theirs]}"
    for name in ours:
        a, b = ours[name], theirs[name]
        if type(a) is not type(b) or getattr(a, "dtype", 0) != getattr(b, "dtype", 0):
            return f"{name}: {type(a)}, want {type(b)}"
        a, b = (lists(v) for v in (a, b))
        if a != b:
            return f"{name}: {a!s:.300}, want {b!s:.300}"
    if len(ours.encodings) != len(theirs.encodings):
        return f"{len(ours.encodings)} encodings, want {len(theirs.encodings)}"
    for i, (a, b) in enumerate(zip(ours.encodings, theirs.encodings, strict=True)):
        for name in attributes:
            if getattr(a, name) != getattr(b, name):
                return f"encoding {i}: {name}: {getattr(a, name)}, want {getattr(b, name)}"
    return ""


def lists(value):
    """A tensor or array as lists."""
    if hasattr(value, "tolist"):  # rows of different lengths are an array of arrays
        return [lists(row) for row in value] if value.dtype == object else value.tolist()
    return value


def read(path: Path) -> str:
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")


def rows(path: Path) -> list[list[str]]:
    return [line.rstrip("\r").split("\t") for line in read(path).split("\n")]


def questions(path: Path) -> Iterator[tuple[str, str]]:
    """Of a file in the form of SQuAD: a question and its paragraph, the further ones in pairs."""
    for article in json.loads(read(path))["data"]:
        for paragraph in article["paragraphs"]:
            asked = [question["question"] for question in paragraph["qas"]]
            yield asked[0] if asked else "", paragraph["context"]
            yield from zip(asked[1::2], asked[2::2], strict=False)


def words(path: Path) -> list[list[str]]:
    """The sentences of a CoNLL file, as words."""
    blocks = read(path).split("\n\n")
    return [[line.split(" ")[0] for line in block.split("\n") if line] for block in blocks]


def texts(shared: Path) -> Iterator[tuple[str, list]]:
    """(file, its texts, pairs of texts or lists of words), of every set of ../shared/data."""
    data = shared / "data"
    for path in sorted(data.glob("pretrain/*.txt*")):
        yield path.name, [line for line in read(path).split("\n") if line]
    for place, pattern in ((0, "sst2/*.tsv*"), (1, "ko/nsmc*.tsv*")):
        for path in sorted(data.glob(pattern)):
            yield path.name, [row[place] for row in rows(path)[1:] if len(row) > place]
    for path in sorted([*data.glob("stsb/*.csv*"), *data.glob("ko/korsts/*.tsv*")]):
        yield path.name, [tuple(row[5:7]) for row in rows(path) if len(row) > 6]
    for path in sorted(data.glob("mrpc/*.tsv*")):
        yield path.name, [tuple(row[3:5]) for row in rows(path)[1:] if len(row) > 4]
    for path in sorted([*data.glob("qa/*.json*"), *data.glob("ko/*.json*")]):
        yield path.name, list(questions(path))
    for path in sorted(data.glob("conll2003/*.txt*")):
        yield path.name, words(path)


@pytest.fixture
def pair():
    """Ours and transformers', of a few words."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    return BertTokenizer(vocab), transformers.BertTokenizer(vocab=vocab)


@pytest.fixture
def ours(pair):
    return pair[0]
