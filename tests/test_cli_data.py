"""`bert-fast data`: what it writes and what it says."""

import json
import re

import pytest
from cli_cases import call, process, work_in
from corpus_cases import files_of, read_corpus

from bert_fast.data.shards import Corpus
from bert_fast.tokenizer import BertTokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return work_in(tmp_path, monkeypatch)


def test_vocab(folder, capfd):
    """The same tokenizer every time, of all the files; stdout stays empty."""
    made = []
    for name in ("a", "b"):
        arguments = ["book.txt", "reviews.csv", "--column", "body", "-o", name, "--size", "90"]
        status, out, err = call(capfd, "data", "vocab", *arguments)
        assert (status, out) == (0, "")
        assert err.splitlines()[-1] == f"bert-fast: a tokenizer of 90 tokens in {name}"
        made.append(files_of(folder / name))
    assert made[0] == made[1]
    tokenizer = BertTokenizer.from_pretrained("a")
    assert len(tokenizer) == 90 and tokenizer.do_lower_case is True
    assert "[UNK]" not in tokenizer.tokenize("The whale, money")
    arguments = ["book.txt", "-o", "cased", "--size", "200", "--cased", "--min-frequency", "9"]
    assert call(capfd, "data", "vocab", *arguments)[0] == 0
    cased = BertTokenizer.from_pretrained("cased")
    assert cased.do_lower_case is False and "The" in cased.get_vocab() and len(cased) < 200
    arguments = ["book.txt", "-o", "few", "--size", "60", "--alphabet", "10"]
    assert call(capfd, "data", "vocab", *arguments)[0] == 0
    letters = [t for t in BertTokenizer.from_pretrained("few").get_vocab() if len(t) == 1]
    assert len(letters) == 10


def test_prepare_and_inspect(folder, capfd):
    (folder / "bad.jsonl").write_bytes(b'{"text": "One. Two."}\n{"text": "a\xff"}\n{"x": 0}\n')
    arguments = ["book.txt", "bad.jsonl", "--tokenizer", "model", "--held-out", "0.3"]
    status, out, err = call(capfd, "data", "prepare", *arguments, "-o", "c", "--workers", "2")
    assert (status, out) == (0, "")
    lines = [line for line in err.splitlines() if "unknown tokens" not in line]
    assert lines[0].startswith("bert-fast: bad.jsonl:2: replaced: want UTF-8, got byte 0xff")
    assert lines[1] == "bert-fast: bad.jsonl:3: skipped: want a field 'text', got 'x'"
    done, problems = lines[-2:]
    assert re.match(r"bert-fast: c: train \d+ documents, [\d,]+ tokens; held out \d+ doc", done)
    assert problems == "bert-fast: problems: replaced 1, single 1, skipped 1"
    corpus = Corpus("c")
    found = {name: len(documents) for name, documents in read_corpus(folder / "c").items()}
    assert sum(found.values()) == 14 and f"train {found['train']} documents" in done

    status, out, err = call(capfd, "data", "inspect", "c", "--json", "--texts", "1", "--check")
    assert (status, err) == (0, "")
    said = json.loads(out)
    assert said["digest"] == corpus.digest and said["problems"]["skipped"]["count"] == 1
    assert said["splits"]["held_out"]["documents"] == found["held_out"]
    assert len(said["texts"]) == 1 and len(said["texts"][0]) <= 5
    status, out, err = call(capfd, "data", "inspect", "c", "--split", "held_out")
    assert (status, err) == (0, "") and "bad.jsonl:3: skipped" in out
    assert f"held_out  {found['held_out']} documents" in out and "unigram entropy" in out

    name = next((folder / "c").glob("*.tokens.npy"))
    raw = bytearray(name.read_bytes())
    raw[-1] ^= 1
    name.write_bytes(raw)
    status, out, err = call(capfd, "data", "inspect", "c", "--check")
    assert (status, out) == (1, "") and f"{name.name}: sha256: want " in err


def test_options_of_prepare(folder, capfd):
    (folder / "lines.txt").write_text("One. Two.\nThree. Four.\n\nFive.\n")
    base = ["data", "prepare", "lines.txt", "--tokenizer", "model", "--held-out", "0"]
    for options, want in [
        ([], [4, 1]),
        (["--lines", "sentences"], [2, 1]),
        (["--documents", "line"], [2, 2, 1]),
    ]:
        name = f"corpus{len(want)}{want[0]}"
        status, _, _ = call(capfd, *base, *options, "-o", name, "--workers", "0")
        assert status == 0
        assert [*map(len, read_corpus(folder / name)["train"])] == want


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["vocab", "book.txt", "-o", "model"], 1, "model: want a new or empty directory"),
        (["vocab", "no.txt", "-o", "new"], 1, "no.txt: want a file, got nothing"),
        (["vocab", "blank.txt", "-o", "new"], 1, "want at least one word, got none"),
        (["vocab", "book.txt", "-o", "new", "--size", "9"], 1, "vocab_size: want at least"),
        (["vocab", "bad.txt", "-o", "new", "--strict"], 1, "bad.txt:1: want UTF-8"),
        (["prepare", "book.txt", "-o", "new"], 2, "Missing option '--tokenizer'"),
        (["prepare", "book.txt", "--tokenizer", "./no", "-o", "new"], 1, "no: want a directory"),
        (["prepare", "book.txt", "--tokenizer", "model", "-o", "model"], 1, "want a new or empty"),
        (["prepare", "blank.txt", "--tokenizer", "model", "-o", "new"], 1, "0 usable documents in"),
        (
            ["prepare", "bad.txt", "--tokenizer", "model", "-o", "new", "--strict"],
            1,
            "bad.txt:1: want UTF-8, got byte 0xff at byte 0",
        ),
        (
            ["prepare", "book.txt", "--tokenizer", "model", "-o", "new", "--held-out", "2"],
            1,
            "held_out: want a share",
        ),
        (["vocab", "-", "-o", "new"], 1, "-: want a file, which can be read again"),
        (["vocab", "/dev/null", "-o", "new", "--format", "txt"], 1, "which can be read again"),
        (["inspect", "model"], 1, "manifest.json"),
        (["inspect", "no"], 1, "no"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors(arguments, status, message, folder, capfd):
    """One line that says what is wrong, and nothing is written."""
    (folder / "bad.txt").write_bytes(b"\xff\n")
    (folder / "blank.txt").write_bytes(b"\n \n")
    before = sorted(path.name for path in folder.iterdir())
    got, out, err = call(capfd, "data", *arguments)
    assert (got, out) == (status, "")
    assert err.splitlines()[-1].startswith("bert-fast: error: ") and message in err.splitlines()[-1]
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("damage", ["magic", "shape", "order", "facts"])
def test_a_damaged_corpus(folder, capfd, damage):
    """Without --check nobody compares sums, and still the file is named."""
    assert call(capfd, "data", "prepare", "book.txt", "--tokenizer", "model", "-o", "c")[0] == 0
    path = folder / "c" / "train-00000.documents.npy"
    raw = bytearray(path.read_bytes())
    if damage == "facts":
        manifest = folder / "c" / "manifest.json"
        known = json.loads(manifest.read_text())
        for name in ("unigram_entropy", "unknown", "sources", "problems"):
            del known[name]
        manifest.write_text(json.dumps(known))
        status, out, err = call(capfd, "data", "inspect", "c")
        assert (status, err) == (0, "") and "train" in out
        return
    if damage == "magic":
        raw[:6] = b"\x93numpy"
    elif damage == "shape":
        at = raw.index(b"'shape': (") + 10
        raw[at : at + 1] = b"9"
    else:
        raw[-12] ^= 0x40  # of the border before the last
    path.write_bytes(raw)
    status, out, err = call(capfd, "data", "inspect", "c")
    (line,) = err.splitlines()
    assert (status, out) == (1, "") and line.startswith("bert-fast: error: c")
    assert "documents" in line and "want" in line and "pickle" not in line


def test_from_a_pipe(folder):
    arguments = ["data", "prepare", "-", "--tokenizer", "model", "-o", "c", "--held-out", "0"]
    status, out, err = process(*arguments, input="One. Two.\n\nThree.\n\nFour.\n")
    assert (status, out) == (0, ""), err
    assert [*map(len, read_corpus(folder / "c")["train"])] == [2, 1, 1]
    assert Corpus("c").manifest["sources"] == [{"name": "-", "documents": 3}]
