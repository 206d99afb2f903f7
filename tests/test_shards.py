"""The files of a corpus: what is written is read, and nothing else is."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from corpus_cases import files_of, read_corpus, tiny_tokenizer

from bert_fast.data.shards import MANIFEST, Corpus, CorpusWriter

TOKENIZER = tiny_tokenizer()
VOCAB = len(TOKENIZER)


def documents(count, seed=0, most=VOCAB):
    """Documents as lists of sentences of ids, a long one among them."""
    rng = random.Random(seed)
    return [
        [
            [rng.randrange(most) for _ in range(rng.randrange(1, 9))]
            for _ in range(400 if i == 1 else rng.randrange(1, 6))
        ]
        for i in range(count)
    ]


def write(target, train, held_out=(), *, vocab_size=VOCAB, shard_tokens=100, facts=None):
    with CorpusWriter(target, vocab_size=vocab_size, shard_tokens=shard_tokens) as writer:
        for split, found in (("train", train), ("held_out", held_out)):
            for document in found:
                ids = np.array([i for sentence in document for i in sentence])
                writer.add(split, ids, [*map(len, document)])
        return writer.finish(facts or {}, TOKENIZER.save_pretrained)


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "corpus", documents(30), documents(5, seed=1), facts={"a": [1]})


@pytest.mark.parametrize("shard_tokens", [1, 100, 1 << 20])
@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_what_is_written_is_read(tmp_path, shard_tokens, vocab_size, dtype):
    train, held = documents(30, most=vocab_size), documents(5, seed=1, most=vocab_size)
    options = {"vocab_size": vocab_size, "shard_tokens": shard_tokens}
    path = write(tmp_path / "corpus", train, held, **options, facts={"what": "this"})
    assert read_corpus(path) == {"train": train, "held_out": held}
    corpus = Corpus(path)
    assert corpus.vocab_size == vocab_size and corpus.manifest["what"] == "this"
    for name, found in (("train", train), ("held_out", held)):
        split = corpus.split(name)
        assert split.num_documents == len(found)
        assert split.num_sentences == sum(map(len, found))
        assert split.num_tokens == sum(len(s) for document in found for s in document)
        assert len(split.shards) == {1: len(found), 1 << 20: 1}.get(shard_tokens, len(split.shards))
        for shard in split.shards:
            assert shard.tokens.dtype == dtype and isinstance(shard.tokens, np.memmap)
            assert shard.num_documents == len(shard.documents) - 1
    assert not [p for p in tmp_path.iterdir() if p != path]
    assert files_of(path) == files_of(
        write(tmp_path / "again", train, held, **options, facts={"what": "this"})
    )


def test_a_split_without_documents(tmp_path):
    corpus = Corpus(write(tmp_path / "corpus", documents(3)))
    assert corpus.split("train").num_documents == 3
    for name in ("held_out", "test"):
        with pytest.raises(ValueError, match=f"want documents for '{name}', got none"):
            corpus.split(name)


def test_an_identity(tmp_path):
    """Any other token is another digest."""
    train = documents(3)
    first = Corpus(write(tmp_path / "a", train)).digest
    assert Corpus(write(tmp_path / "b", train)).digest == first
    train[2][0][0] ^= 1
    assert Corpus(write(tmp_path / "c", train)).digest != first


# --- what does not open --------------------------------------------------------------------------


def refused(path, said="", **options):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Corpus(path, **options)
    assert said in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("each", [6, pytest.param(150, marks=pytest.mark.long)])
def test_a_flipped_bit_is_refused(corpus, each):
    """In any file, wherever it is."""
    rng, flips = random.Random(0), 0
    for path in sorted(corpus.iterdir()):
        if path.name == MANIFEST:
            continue  # what holds the hashes; below
        raw = path.read_bytes()
        for place in {0, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(each))}:
            bad = bytearray(raw)
            bad[place] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            refused(corpus, f"{path.name}: sha256: want ")
            flips += 1
        path.write_bytes(raw)
    assert flips > 15 * each
    Corpus(corpus)


def test_a_truncated_file_is_refused(corpus):
    """Also without reading it."""
    rng = random.Random(0)
    for path in sorted(corpus.glob("*.npy")):
        raw = path.read_bytes()
        for size in {0, 1, 100, len(raw) - 1, rng.randrange(len(raw))}:
            path.write_bytes(raw[:size])
            for verify in (True, False):
                refused(corpus, path.name, verify=verify)
        path.write_bytes(raw + b"\0")
        refused(corpus, path.name, verify=False)
        path.unlink()
        refused(corpus, path.name)
        path.write_bytes(raw)
    Corpus(corpus)


def test_a_swapped_shard_is_refused(tmp_path, corpus):
    other = write(tmp_path / "other", documents(30, seed=2), documents(5, seed=3))
    for kind in ("tokens", "sentences", "documents"):
        first, second = (corpus / f"train-0000{i}.{kind}.npy" for i in (0, 2))
        mine, its, theirs = (
            first.read_bytes(),
            second.read_bytes(),
            (other / first.name).read_bytes(),
        )
        first.write_bytes(its)
        refused(corpus, first.name)
        first.write_bytes(theirs)
        refused(corpus, first.name)
        first.write_bytes(mine)
    Corpus(corpus)


def test_a_stale_manifest_is_refused(tmp_path, corpus):
    """That of another corpus, of another format, and one that is no JSON."""
    other = write(tmp_path / "other", documents(29), documents(5, seed=1))
    raw = (corpus / MANIFEST).read_bytes()
    (corpus / MANIFEST).write_bytes((other / MANIFEST).read_bytes())
    refused(corpus)
    said = json.loads(raw)
    for change, what in [
        ({"version": 2}, "of version 1, got 'bert_fast corpus' 2"),
        ({"format": "a corpus"}, "want a bert_fast corpus"),
        ({"splits": []}, "want the entries of a bert_fast corpus"),
        ({"splits": said["splits"] | {"test": {}}}, "want the entries of a bert_fast corpus"),
        ({"vocab_size": 2**16 + 1}, "want uint32"),
    ]:
        (corpus / MANIFEST).write_text(json.dumps(said | change))
        refused(corpus, what)
    for bad in (b"", raw[:-20], raw.replace(b"}", b"", 1), b"[]", b"\xff"):
        (corpus / MANIFEST).write_bytes(bad)
        refused(corpus)
    (corpus / MANIFEST).unlink()
    refused(corpus)
    (corpus / MANIFEST).write_bytes(raw)
    Corpus(corpus)


def test_a_name_elsewhere_is_refused(tmp_path, corpus):
    said = json.loads((corpus / MANIFEST).read_bytes())
    (tmp_path / "secret.npy").write_bytes((corpus / "train-00000.tokens.npy").read_bytes())
    for name in ("../secret.npy", str(tmp_path / "secret.npy"), ".", ""):
        said["splits"]["train"]["shards"][0]["files"]["tokens"]["name"] = name
        (corpus / MANIFEST).write_text(json.dumps(said))
        refused(corpus, "want a bare file name")


# --- a writer that fails -------------------------------------------------------------------------


def test_a_target_with_files_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match=f"{name}: want a new or empty directory"):
            CorpusWriter(tmp_path / name, vocab_size=9)
    (tmp_path / "empty").mkdir()
    assert read_corpus(write(tmp_path / "empty", documents(2)))["train"] == documents(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), CorpusWriter(tmp_path / "c", vocab_size=9) as writer:
        writer.add("train", np.array([1, 2]), [2])
        {}["key"]
    with pytest.raises(OSError, match="no space"):
        with CorpusWriter(tmp_path / "c", vocab_size=9) as writer:
            writer.add("train", np.array([1, 2]), [2])

            def fails(path):
                raise OSError("no space")

            writer.finish({}, fails)
    assert not [*tmp_path.iterdir()]


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_shards
from bert_fast.data import shards
left = 0
def dies(call):
    def counted(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return call(*arguments, **options)
    return counted
for name in ("mkdir", "rename", "fsync", "rmdir", "unlink", "open"):
    setattr(os, name, dies(getattr(os, name)))
shards.open = dies(open)
for calls in range(1000):
    if not os.fork():
        left = calls
        test_shards.write(f"{{calls}}/corpus", test_shards.documents(8))
        os._exit(0)
    if os.wait()[1] == 0:
        break
print(calls)
"""


def test_a_killed_writer_leaves_nothing_that_opens(tmp_path):
    """Killed before each call that touches the disk: no corpus is there, or the whole one."""
    code = KILLED.format(tests=os.path.dirname(__file__))
    for i in range(1000):
        (tmp_path / f"{i}").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    calls = int(done.stdout)
    assert 20 < calls < 1000, done.stderr
    whole, opened = files_of(tmp_path / f"{calls}" / "corpus"), []
    for i in range(calls):
        target = tmp_path / f"{i}" / "corpus"
        if (target / MANIFEST).exists():
            Corpus(target)
            assert {name: (target / name).read_bytes() for name in whole} == whole
            opened.append(i)
        else:
            refused(target)
            if target.exists() and not [*target.glob("[!.]*")]:
                assert files_of(write(target, documents(8))) == whole  # another goes on there
    assert 0 < len(opened) < 9 and opened == [*range(opened[0], calls)]
