"""Files of texts into a file of vectors: what is written, and that nothing is lost or mixed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import stream_runs
from stream_runs import DIMENSION, TEXTS, FakeEncoder, left, run, same, want

from bert_fast.encode import stream

alone, source = stream_runs.alone, stream_runs.source


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 11, 1000])
def test_npy(tmp_path, source, chunk):
    target = tmp_path / "v.npy"
    done = run(source, target, chunk=chunk)
    assert (done.output, done.rows, done.dimension, done.encoded) == (target, 11, DIMENSION, 11)
    assert same(np.load(target), want(TEXTS, chunk))
    mapped = np.load(target, mmap_mode="r")
    assert isinstance(mapped, np.memmap) and mapped.shape == (11, DIMENSION)
    assert left(tmp_path) == ["texts.txt", "v.npy"]


def test_jsonl(tmp_path, source):
    """A line a row; the numbers come back as they were."""
    target = tmp_path / "v.jsonl"
    run(source, target, chunk=4)
    rows = [json.loads(line) for line in target.read_text("utf-8").splitlines()]
    assert [list(row) for row in rows] == [["line", "embedding"]] * 11
    assert [row["line"] for row in rows] == [*range(1, 12)]
    assert same(np.array([row["embedding"] for row in rows], np.float32), want(TEXTS, 4))
    run(source, target, chunk=4, keep_text=True, overwrite=True)
    rows = [json.loads(line) for line in target.read_text("utf-8").splitlines()]
    assert [row["text"] for row in rows] == TEXTS
    assert [*rows[0]] == ["line", "text", "embedding"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_digits_in_jsonl_bring_back_every_number(tmp_path, dtype):
    bits = np.random.default_rng(0).integers(0, 2**32, (500, DIMENSION), np.uint32)
    numbers = bits.view(np.float32) if dtype == np.float32 else bits.astype(np.uint16).view(dtype)
    numbers = np.where(np.isfinite(numbers), numbers, 1).astype(dtype)

    class Given(FakeEncoder):
        def encode(self, texts, **_):
            return numbers.astype(np.float32)

    (tmp_path / "a.txt").write_text("x\n" * 500)
    precision = np.dtype(dtype).name
    run(tmp_path / "a.txt", tmp_path / "v.jsonl", encoder=Given(), precision=precision)
    rows = [json.loads(line)["embedding"] for line in open(tmp_path / "v.jsonl")]
    assert same(np.array(rows, dtype), numbers)


@pytest.mark.parametrize("group", [1, 10**9])
def test_parquet(tmp_path, source, group, monkeypatch):
    monkeypatch.setattr("bert_fast.encode.writers._GROUP_BYTES", group)
    target = tmp_path / "v.parquet"
    run(source, target, chunk=4, keep_text=True)
    table = pq.read_table(target)
    assert table.column_names == ["line", "text", "embedding"]
    assert table["line"].to_pylist() == [*range(1, 12)]
    assert table["text"].to_pylist() == TEXTS
    assert same(np.array(table["embedding"].to_pylist(), np.float32), want(TEXTS, 4))
    assert pq.ParquetFile(target).num_row_groups == (3 if group == 1 else 1)
    run(source, target, overwrite=True)
    assert pq.read_table(target).column_names == ["line", "embedding"]


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_float16(tmp_path, source, suffix):
    target = tmp_path / f"v{suffix}"
    run(source, target, precision="float16", chunk=4)
    if suffix == ".npy":
        got = np.load(target)
    else:
        got = np.array(pq.read_table(target)["embedding"].to_pylist(), np.float16)
    assert same(got, want(TEXTS, 4).astype(np.float16))


@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
def test_nothing_to_encode(tmp_path, suffix):
    """An empty input gives an empty output."""
    (tmp_path / "a.txt").write_bytes(b"")
    target, encoder = tmp_path / f"v{suffix}", FakeEncoder()
    assert run(tmp_path / "a.txt", target, encoder=encoder).rows == 0 and not encoder.calls
    if suffix == ".npy":
        assert np.load(target).shape == (0, DIMENSION)
    elif suffix == ".parquet":
        assert pq.read_table(target).num_rows == 0
    else:
        assert target.read_bytes() == b""


def test_skipped_lines_keep_their_row(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\n\xff\nb\n\0\n\n")
    texts, notes = ["a", None, "b", None, ""], []
    for suffix in (".npy", ".jsonl", ".parquet"):
        target = tmp_path / f"v{suffix}"
        done = run(tmp_path / "a.txt", target, errors="skip", chunk=2, note=notes.append)
        assert (done.rows, done.skipped) == (5, 2) and len(notes) == 2
        notes.clear()
    expected = want(texts, 2)
    assert same(np.load(tmp_path / "v.npy"), expected)
    rows = [json.loads(line) for line in open(tmp_path / "v.jsonl")]
    assert [row["embedding"] is None for row in rows] == [text is None for text in texts]
    table = pq.read_table(tmp_path / "v.parquet")
    assert [v is None for v in table["embedding"].to_pylist()] == [t is None for t in texts]
    assert same(np.array(rows[2]["embedding"], np.float32), expected[2])


def test_several_inputs(tmp_path, source):
    """In their order, chunks across their borders; rows say which is theirs."""
    other = tmp_path / "more.csv"
    other.write_text("id,text\n1,one\n2,two\n")
    run([source, other, source], tmp_path / "v.jsonl", chunk=4)
    rows = [json.loads(line) for line in open(tmp_path / "v.jsonl")]
    texts = [*TEXTS, "one", "two", *TEXTS]
    assert same(np.array([row["embedding"] for row in rows], np.float32), want(texts, 4))
    files = [str(source)] * 11 + [str(other)] * 2 + [str(source)] * 11
    assert [row["file"] for row in rows] == files
    assert [row["line"] for row in rows] == [*range(1, 12), 2, 3, *range(1, 12)]


def test_a_chunk_has_bounded_text(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_CHUNK_CHARACTERS", 100)
    texts = ["x" * 30] * 7 + ["y" * 250] + ["z"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    encoder = FakeEncoder()
    run(tmp_path / "a.txt", tmp_path / "v.npy", encoder=encoder)
    assert [len(call) for call in encoder.calls] == [4, 4, 1]


def test_progress_and_notes(tmp_path, source):
    seen, notes = [], []
    run(source, tmp_path / "v.npy", chunk=4, progress=lambda *at: seen.append(at))
    size = source.stat().st_size
    assert [(rows, encoded) for _, rows, encoded in seen] == [(4, 4), (8, 8), (11, 11)]
    assert seen[-1][0] == size and seen[0][0] < seen[1][0] < size
    source.write_bytes(b"\xff\n" * 50)
    run(source, tmp_path / "w.npy", errors="skip", note=notes.append)
    assert len(notes) == 21 and notes[-1] == "and 30 more such lines"


# --- what is refused -----------------------------------------------------------------------------


def test_refused(tmp_path, source):
    """Before anything is encoded or written."""
    before = left(tmp_path)
    cases = [
        ({"target": "v.txt"}, ValueError, r"v\.txt: want \.npy, \.jsonl, \.parquet, got \.txt"),
        ({"target": "v"}, ValueError, "got no suffix"),
        ({"target": "no/v.npy"}, FileNotFoundError, "want a directory to write it into"),
        ({"precision": "int8"}, ValueError, "precision: want float32 or float16, got 'int8'"),
        ({"keep_text": True}, ValueError, "to keep the texts"),
        ({"chunk": 0}, ValueError, "chunk: want 1 or more, got 0"),
        ({"sources": []}, ValueError, "want at least one input"),
        ({"sources": [tmp_path / "no.txt"]}, FileNotFoundError, "want a file, got nothing"),
        ({"sources": [tmp_path]}, IsADirectoryError, "want a file, got a directory"),
        ({"sources": ["-", "-"]}, ValueError, "want the standard input once"),
        ({"format": "xml"}, ValueError, "format: want txt"),
        ({"errors": "ignore"}, ValueError, "errors: want strict"),
    ]
    for options, kind, message in cases:
        options = {"sources": [source], "target": "v.npy"} | options
        options["target"] = tmp_path / options["target"]
        encoder = FakeEncoder()
        with pytest.raises(kind, match=message):
            run(options.pop("sources"), options.pop("target"), encoder=encoder, **options)
        assert not encoder.calls and left(tmp_path) == before


def test_an_output_is_not_replaced_unasked(tmp_path, source):
    target = tmp_path / "v.npy"
    target.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="is there already; --overwrite replaces it"):
        run(source, target)
    assert target.read_bytes() == b"precious" and left(tmp_path) == ["texts.txt", "v.npy"]
    run(source, target, overwrite=True)
    assert same(np.load(target), want(TEXTS, 1000))
    copy = tmp_path / "w.jsonl"
    copy.write_text('{"text": "a"}')
    with pytest.raises(ValueError, match="want another file than the input"):
        run(copy, copy, overwrite=True)


def test_without_pyarrow(tmp_path, source, monkeypatch):
    find = stream_runs.__loader__ and __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == "pyarrow" else find(n))
    with pytest.raises(ImportError, match=r"\.parquet needs `pip install pyarrow`"):
        run(source, tmp_path / "v.parquet")


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.zeros((3, DIMENSION + 1)), r"want vectors of shape \(4, 5\), got \(3, 6\)"),
        (np.array([[0.0] * DIMENSION] * 2 + [[np.nan] * DIMENSION] * 2), r"texts\.txt:3: want a f"),
        (np.full((4, DIMENSION), 1e6), r"texts\.txt:1: want a finite vector in float16"),
    ],
)
def test_what_is_no_vector_is_refused(tmp_path, source, vectors, message):
    class Wrong(FakeEncoder):
        def encode(self, texts, **_):
            return vectors

    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "v.npy", encoder=Wrong(), chunk=4, precision="float16")
    assert not (tmp_path / "v.npy").exists()


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [(2_000_000, 20_000_000), pytest.param((10**8, 10**9), marks=pytest.mark.long)]
)
def test_memory_is_flat(tmp_path, sizes):
    """Ten times the input, the same memory; the last line alone is as long as the rest."""
    if shutil.disk_usage(tmp_path).free < 4 * sizes[1]:
        pytest.skip(f"want {4 * sizes[1]} bytes of disk")
    peaks = []
    for size in sizes:
        source = tmp_path / "big.txt"
        line = b"some words that go on for a while and then for a while longer, number %d\n"
        with open(source, "wb") as file:
            number = 0
            while file.tell() < size // 2:
                file.write(b"".join(line % i for i in range(number, number + 10_000)))
                number += 10_000
            for _ in range(size // 2 // 1_000_000):
                file.write(b"x" * 1_000_000)
        arguments = {"sources": str(source), "target": str(tmp_path / f"{size}.npy")}
        command = [sys.executable, stream_runs.__file__, json.dumps(arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        done = json.loads(done.stdout)
        assert done["rows"] == number + 1 and done["cut"] == (1 if size > 2_000_000 else 0)
        assert np.load(tmp_path / f"{size}.npy", mmap_mode="r").shape == (done["rows"], DIMENSION)
        Path(tmp_path / f"{size}.npy").unlink()
        peaks.append(done["peak"])
    assert peaks[1] < peaks[0] + 40_000, peaks  # KiB
