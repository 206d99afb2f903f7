"""Files -> a corpus: what is in it, that it is the same every time, and how it dies."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter

import numpy as np
import pytest
from corpus_cases import BOOK, files_of, read_corpus, tiny_tokenizer

from bert_fast.data import documents as documents_module
from bert_fast.data import prepare as module
from bert_fast.data.inspect import first_documents, inspect_corpus
from bert_fast.data.prepare import prepare
from bert_fast.data.sentences import split_sentences
from bert_fast.data.shards import Corpus
from bert_fast.data.tokenizing import Tokenize, Workers

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(BOOK)
    return path


def ids_of(text):
    found = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [] if not text else found


def left_in(directory, *known):
    return sorted({path.name for path in directory.iterdir()} - {*known})


# --- what is in it -------------------------------------------------------------------------------


def test_every_document_is_in_one_split(tmp_path, book):
    """With the tokens of its sentences; the split is a matter of the seed alone."""
    want = [
        [ids_of(s) for line in text.split("\n") for s in split_sentences(line)]
        for text in BOOK.strip().split("\n\n")
    ]
    chosen = set()
    for seed in range(3):
        done = prepare(book, tmp_path / f"{seed}", TOKENIZER, held_out=0.3, seed=seed, workers=0)
        found = read_corpus(done.path)
        held = [want.index(document) for document in found["held_out"]]
        train = [want.index(document) for document in found["train"]]
        assert (
            sorted(held + train) == [*range(12)] and held == sorted(held) and train == sorted(train)
        )
        chosen.add(tuple(held))
        for split, documents in found.items():
            sentences = [ids for document in documents for ids in document]
            assert done.documents[split] == len(documents)
            assert done.sentences[split] == len(sentences)
            assert done.tokens[split] == sum(map(len, sentences))
        tokens = Counter(i for document in found["train"] for ids in document for i in ids)
        share = [n / tokens.total() for n in tokens.values()]
        assert math.isclose(done.unigram_entropy, -sum(p * math.log(p) for p in share))
        assert done.unknown == 0 and done.problems == {}
    assert len(chosen) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = prepare(book, tmp_path / "none", TOKENIZER, held_out=0, workers=0)
    assert done.documents == {"train": 12, "held_out": 0}


@pytest.mark.filterwarnings("ignore:held_out. want 2")
def test_the_manifest(tmp_path, book):
    """Names without folders, hashes, options, problems; the tokenizer beside it."""
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "One. Two."}\n{"x": 1}\n')
    done = prepare([book, str(other)], tmp_path / "corpus", TOKENIZER, workers=0, held_out=0.2)
    manifest = Corpus(done.path).manifest
    assert manifest["sources"] == [
        {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "documents": count,
        }
        for path, count in ((book, 12), (other, 1))
    ]
    assert manifest["options"]["held_out"] == 0.2 and manifest["options"]["lines"] == "paragraphs"
    said = "other.jsonl:2: skipped: want a field 'text', got 'x'"
    assert manifest["problems"] == done.problems == {"skipped": {"count": 1, "first": [said]}}
    assert str(tmp_path) not in json.dumps(manifest)
    assert manifest["unigram_entropy"] == done.unigram_entropy
    found = inspect_corpus(done.path, verify=True)
    assert found["splits"]["train"]["documents"] == done.documents["train"]
    assert found["splits"]["train"]["document_tokens"]["mean"] > 0
    assert first_documents(done.path, type(TOKENIZER).from_pretrained(done.path), 2)[0]


@pytest.mark.parametrize("lines", ["paragraphs", "sentences"])
def test_sentences_of_a_line(tmp_path, lines):
    path = tmp_path / "a.txt"
    path.write_text("A whale. It dived.\n  the sea.\n\nb c. D e.\n")
    done = prepare(path, tmp_path / "c", TOKENIZER, lines=lines, workers=0, held_out=0)
    sentences = (
        ["A whale.", "It dived.", "the sea."]
        if lines == "paragraphs"
        else ["A whale. It dived.", "the sea."]
    )
    assert read_corpus(done.path)["train"][0] == [ids_of(s) for s in sentences]


def test_what_has_no_tokens_is_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"the whale. The sea.\n\x01\n\n\xff\n\nthe\n\n\x02 \x03.\n\x7f\n")
    with pytest.warns(UserWarning, match="train: want 2 documents or more"):
        done = prepare(path, tmp_path / "c", TOKENIZER, workers=0, held_out=0.999)
    counts = {kind: said["count"] for kind, said in done.problems.items()}
    assert counts == {"replaced": 1, "wordless": 3, "tokenless": 1, "single": 2}
    assert done.problems["tokenless"]["first"] == ["a.txt:4: a document without a token"]
    assert done.problems["wordless"]["first"][0] == "a.txt:1: sentences without a token: 1"
    assert sum(done.documents.values()) == 3


def test_parts_of_a_document_stay_together(tmp_path, monkeypatch):
    """No sentence of one document is in both splits."""
    monkeypatch.setattr(documents_module, "MAX_DOCUMENT", 40)
    path = tmp_path / "a.txt"
    texts = [[f"the whale {i} dived. It came.", f"the sea {i} was calm."] * 3 for i in range(20)]
    path.write_text("\n\n".join("\n".join(lines) for lines in texts))
    done = prepare(path, tmp_path / "c", TOKENIZER, workers=0, held_out=0.5)
    assert done.problems["divided"]["count"] == 20
    found = {
        split: {tuple(ids) for document in parts for ids in document if len(ids) > 3}
        for split, parts in read_corpus(done.path).items()
    }
    assert all(done.documents.values()) and sum(done.documents.values()) == 20 * 6
    both = found["train"] & found["held_out"]
    assert both == {tuple(ids_of("It came."))}


def test_the_official_sample(tmp_path, shared):
    with pytest.warns(UserWarning, match="held_out: want 2 documents or more"):
        done = prepare(
            shared / "data/pretrain/bert_sample_text.txt", tmp_path / "c", TOKENIZER, workers=0
        )
    assert sum(done.documents.values()) == 3 and not {*done.problems} - {"single"}
    lines = prepare(
        shared / "data/pretrain/bert_sample_text.txt",
        tmp_path / "d",
        TOKENIZER,
        workers=0,
        lines="sentences",
        held_out=0,
    )
    text = (shared / "data/pretrain/bert_sample_text.txt").read_text("utf-8")
    assert lines.sentences["train"] == sum(bool(line.strip()) for line in text.split("\n"))


# --- the same every time -------------------------------------------------------------------------


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, book, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 150)
    (tmp_path / "bad.txt").write_bytes(b"a\xff b.\n\n\x01\n\nthe sea.\n")
    made = []
    for workers in (0, 1, 3, None):
        target, seen = tmp_path / f"corpus {workers}", []
        prepare(
            [book, tmp_path / "bad.txt"],
            target,
            TOKENIZER,
            workers=workers,
            held_out=0.3,
            progress=lambda *facts, seen=seen: seen.append(facts),
        )
        made.append(files_of(target))
        assert len(seen) > 3 and seen == sorted(seen)
    assert all(files == made[0] for files in made)
    assert left_in(tmp_path, "book.txt", "bad.txt") == sorted(
        f"corpus {workers}" for workers in (0, 1, 3, None)
    )


# --- refused -------------------------------------------------------------------------------------


def test_nothing_usable(tmp_path):
    """An error that names the files, and nothing is left."""
    for i, raw in enumerate((b"", b"\n \n\n", b"\xff\n", b"\x01\n\n\x02\n")):
        path = tmp_path / f"{i}.txt"
        path.write_bytes(raw)
        for workers in (0, 2):
            with pytest.raises(ValueError, match=rf"^0 usable documents in .*{i}\.txt$"):
                prepare(path, tmp_path / "corpus", TOKENIZER, workers=workers)
    assert left_in(tmp_path) == [f"{i}.txt" for i in range(4)]


@pytest.mark.filterwarnings("ignore:held_out. want 2")
def test_refusals(tmp_path, book):
    unmasked = tiny_tokenizer()
    unmasked.mask_token = None
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for options, error, said in [
        ({"held_out": 1}, ValueError, "held_out: want a share from 0 to less than 1, got 1"),
        ({"workers": -1}, ValueError, "workers: want 0 or more, got -1"),
        ({"target": tmp_path / "full"}, FileExistsError, "want a new or empty directory"),
        ({"sources": tmp_path / "no"}, FileNotFoundError, "no: want a file, got nothing"),
        ({"tokenizer": unmasked}, ValueError, "tokenizer: want unk_token, .* got no mask_token"),
    ]:
        given = {"sources": book, "target": tmp_path / "new", "tokenizer": TOKENIZER} | options
        with pytest.raises(error, match=said):
            prepare(**given)
    (tmp_path / "bad.txt").write_bytes(b"a\n\xff\n")
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"bad\.txt:2: want UTF-8, got byte 0xff at byte 0 of"):
            prepare(tmp_path / "bad.txt", tmp_path / "new", TOKENIZER, strict=True, workers=workers)
    assert left_in(tmp_path) == ["bad.txt", "book.txt", "full"]


def test_too_many_unknown_tokens(tmp_path):
    (tmp_path / "ko.txt").write_text("고래는 바다. 갔다.\n\nthe whale dived.\n")
    with pytest.warns(UserWarning) as said:
        done = prepare(tmp_path / "ko.txt", tmp_path / "c", TOKENIZER, workers=0, held_out=0)
    got = f"got {done.unknown:.1%}: is it one for these texts?"
    assert [str(w.message) for w in said] == [f"tokenizer: want at most 5% unknown tokens, {got}"]
    assert 0.05 < done.unknown < 1


# --- it dies well --------------------------------------------------------------------------------


class Fails:
    """A tokenizer that fails at a word."""

    def __init__(self, how):
        self.how = how

    def __getattr__(self, name):
        return getattr(TOKENIZER, name)

    def __call__(self, texts, **options):
        if any("number 7" in text for text in texts):
            self.how()
        return TOKENIZER(texts, **options)


def boom():
    raise ValueError("boom")


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        (boom, ValueError, "boom"),
        (lambda: os._exit(1), RuntimeError, "want 2 processes that live, got a dead one"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), RuntimeError, "got a dead one"),
    ],
)
def test_a_worker_that_fails(tmp_path, book, monkeypatch, how, error, said):
    monkeypatch.setattr(module, "CHUNK", 150)
    began = time.monotonic()
    with pytest.raises(error, match=said):
        prepare(book, tmp_path / "c", Fails(how), workers=2)
    assert time.monotonic() - began < 20 and left_in(tmp_path) == ["book.txt"]


SLOW = """
import sys, time
sys.path.insert(0, {tests!r})
from test_prepare import *
class Slow(Fails):
    def __call__(self, texts, **options):
        os.write(1, b"%d\\n" % os.getpid())  # all of a line at once
        time.sleep(0.2)
        return TOKENIZER(texts, **options)
module.CHUNK = 50
signal.signal(signal.SIGINT, signal.default_int_handler)  # else as inherited: ignored behind a "&"
from pathlib import Path
prepare(Path("book.txt"), Path("c"), Slow(None), workers=2)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_or_killed(tmp_path, book, sent):
    """No process stays; after Ctrl-C, which all of them get, no file either."""
    code = SLOW.format(tests=os.path.dirname(__file__))
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert all(int(run.stdout.readline()) != run.pid for _ in range(3))  # workers are at work
    if sent == signal.SIGINT:
        os.killpg(run.pid, sent)
    else:
        os.kill(run.pid, sent)
    _, err = run.communicate(timeout=30)  # ends when every process that could write has ended
    assert run.returncode not in (0, None) and err.count("Traceback") == (sent == signal.SIGINT)
    if sent == signal.SIGINT:
        assert left_in(tmp_path) == ["book.txt"]
    else:
        assert not [*(tmp_path / "c").glob("[!.]*")]


# --- memory --------------------------------------------------------------------------------------

MEASURE = r"""
import re, resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_prepare import *
prepare("text.txt", sys.argv[1], TOKENIZER, workers=int(sys.argv[2]), held_out=0)
mine = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]
print(int(mine) / 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def peaks(tmp_path, workers):
    """MB of this process and of its largest worker."""
    code = MEASURE.format(tests=os.path.dirname(__file__))
    target = tmp_path / os.urandom(4).hex()
    done = subprocess.run(
        [sys.executable, "-c", code, str(target), str(workers)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(value) for value in done.stdout.split()]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_little_is_under_way(count):
    """Arguments are asked for as results are taken, and no more than two for a process wait."""
    asked, taken = [], []

    def tasks():
        for i in range(30):
            asked.append(i)
            yield i, list(range(i))

    with Workers(count, len) as pool:
        for key, result in pool.map(tasks()):
            taken.append(key)
            assert key == result and len(asked) - len(taken) <= 2 * count
    assert taken == [*range(30)]


def test_few_texts_are_tokenized_at_a_time():
    """So that the library's objects, 100 to 200 bytes a token, are few."""
    sizes = []

    class Sized(Fails):
        def __call__(self, texts, **options):
            sizes.append(sum(map(len, texts)))
            return TOKENIZER(texts, **options)

    tokenize = Tokenize(Sized(None), whole=False, dtype=np.dtype(np.uint16))
    found = tokenize([["The whale. " * 100] * 1000, [], ["the."]])
    assert max(sizes) < 300_000 and sum(sizes) > 900_000
    assert found.sentences.tolist() == [100_000, 0, 1] and len(found.ids) == 300_002


@pytest.mark.long
@pytest.mark.parametrize("documents", ["many", "one"])
def test_memory_stays_flat(tmp_path, documents):
    """Of 5 and of 40 MB, in many documents, and in one that is a single line."""
    text = "The whale the whale the whale the whale. "
    found = []
    for size in (5, 40):
        end = "\n\n" if documents == "many" else ""
        (tmp_path / "text.txt").write_text((text * 10 + end) * (size * 2500))
        found.append(peaks(tmp_path, 1))
    kept = 40_000_000 / len(text) * (9 * 2 + 8) / 1e6  # what waits for the end of a shard
    assert found[1][0] - found[0][0] < 20 + 2 * kept and found[1][1] - found[0][1] < 40, found


@pytest.mark.long
@pytest.mark.parametrize("piece", ["word ", "x"])
def test_a_line_of_100_mb(tmp_path, piece):
    (tmp_path / "text.txt").write_text(piece * (100_000_000 // len(piece)) + "\n\nthe whale.\n")
    assert sum(peaks(tmp_path, 1)) < 1500
