"""Vocabularies learned from texts: the same every time, and good for something."""

import random
from pathlib import Path

import pytest
import transformers
from tokenizer_cases import difference, read
from tokenizers import Tokenizer, models, normalizers
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from bert_fast.tokenizer import BertTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture
def corpus(shared, tmp_path):
    lines = read(shared / "data/pretrain/wiki_en_core2016.txt.gz").split("\n")[:400]
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(lines), "utf-8")
    return path


def by_the_library(texts):
    """What the trainer gives whose tables differ from run to run."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), BertPreTokenizer()
    options = {"vocab_size": 600, "limit_alphabet": 60, "special_tokens": SPECIAL}
    made.train_from_iterator(texts, WordPieceTrainer(show_progress=False, **options))
    return made.get_vocab()


def test_learning_gives_the_same_ids_every_time(corpus):
    """Also from a shuffled corpus; the library's own trainer does not."""
    texts, made, theirs = corpus.read_text("utf-8").split("\n"), [], []
    for i in range(5):
        random.Random(i).shuffle(texts)
        made.append(BertTokenizer.train(texts, 600, limit_alphabet=60).get_vocab())
        theirs.append(by_the_library(texts))
    assert made.count(made[0]) == 5 and theirs.count(theirs[0]) < 5
    tokens = sorted(made[0], key=made[0].get)
    assert len(tokens) == 600 and tokens[:5] == SPECIAL
    assert sum(len(token) == 1 for token in tokens) == 60 and "the" in tokens


def test_what_is_learned(corpus, tmp_path):
    texts = corpus.read_text("utf-8").split("\n")
    ours = BertTokenizer.train(texts, vocab_size=2000, do_lower_case=False, model_max_length=64)
    assert ours.model_max_length == 64 and not ours.do_lower_case and len(ours) == 2000
    from_iterator = BertTokenizer.train(iter(texts), 2000, do_lower_case=False)
    assert from_iterator.get_vocab() == ours.get_vocab()
    half = len(texts) // 2
    corpus.write_text("\n".join(texts[half:]), "utf-8")
    mixed = BertTokenizer.train([*texts[:half], corpus], 2000, do_lower_case=False)
    assert mixed.get_vocab() == ours.get_vocab()
    rows = ours(texts)["input_ids"]
    assert sum(row.count(ours.unk_token_id) for row in rows) < 50
    pieces = sum(map(len, rows))
    assert pieces < 0.5 * sum(map(len, texts))  # of several letters each
    ours.save_pretrained(tmp_path)
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    assert not difference(ours(texts), theirs(texts))


def test_small_vocabularies():
    texts = ["aab aab aab c", "b d"]
    ours = BertTokenizer.train(texts, vocab_size=50)
    tokens = sorted(ours.get_vocab(), key=ours.get_vocab().get)
    assert tokens[:11] == [*SPECIAL, "a", "b", "c", "d", "##a", "##b"] and "aab" in tokens
    assert ours.tokenize("aab C e") == ["aab", "c", "[UNK]"]
    rare = BertTokenizer.train(texts, vocab_size=50, min_frequency=9)
    assert len(rare) == 11
    few = BertTokenizer.train(texts, vocab_size=50, limit_alphabet=2)
    assert {"a", "b"} <= few.get_vocab().keys() and not {"c", "d"} & few.get_vocab().keys()
    named = BertTokenizer.train(texts, special_tokens=["<p>", *SPECIAL], pad_token="<p>")
    assert named.pad_token_id == 0 and named.convert_tokens_to_ids("[MASK]") == 5


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("a text", {}, TypeError, "want a list of texts or a Path, got a str"),
        (["a", 3], {}, TypeError, r"texts\[1\]: want a str or a Path, got int"),
        ([], {}, ValueError, "want at least one word, got none"),
        (["", " \n"], {}, ValueError, "want at least one word, got none"),
        (["abc"], {"vocab_size": 7}, ValueError, "vocab_size: want at least 10 .*, got 7"),
        ([Path("no.txt")], {}, FileNotFoundError, "no.txt"),
        (["ok", "a\ud800"], {}, ValueError, r"texts\[1\]: .*surrogate U\+D800 at character 1"),
    ],
)
def test_what_nothing_can_be_learned_from(texts, options, error, message):
    with pytest.raises(error, match=message):
        BertTokenizer.train(texts, **options)


def test_bytes_that_are_no_text_have_a_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nal\xffso\n")
    with pytest.raises(ValueError, match=r"a\.txt:2: want UTF-8, got the byte 0xff at place 2"):
        BertTokenizer.train(tmp_path / "a.txt")
