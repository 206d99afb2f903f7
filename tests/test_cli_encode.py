"""`bert-fast encode` with a true encoder: vectors, restart, several processes, progress."""

import gzip
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_cases import call, process, work_in
from encoder_models import TEXTS, minilm

from bert_fast.encode import Encoder
from bert_fast.progress import Progress


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return work_in(tmp_path, monkeypatch)


def vectors(**options):
    return Encoder.from_pretrained("model").encode(TEXTS, **options)


def test_outputs(folder, capfd):
    """The vectors are the encoder's; stdout stays empty, stderr says how it went and what came."""
    for name in ("v.npy", "v.jsonl", "v.parquet"):
        status, out, err = call(capfd, "encode", "model", "texts.txt", "-o", name)
        assert (status, out) == (0, "")
        shown, done = err.splitlines()
        assert shown.startswith(f"bert-fast: {len(TEXTS)} rows, 0.0 of 0.0 MB, ")
        assert done == f"bert-fast: {len(TEXTS)} rows of 32 in {name}"
    assert np.array_equal(np.load("v.npy"), vectors())
    rows = [json.loads(line) for line in open("v.jsonl")]
    assert np.array_equal(np.array([row["embedding"] for row in rows], np.float32), vectors())
    assert np.array_equal(pq.read_table("v.parquet")["embedding"].to_pylist(), vectors())


def test_options(folder, capfd):
    arguments = ["encode", "model", "texts.txt", "-o", "v.npy", "--overwrite"]
    for options, build, run in [
        (["--pooling", "cls"], {"pooling": "cls"}, {}),
        (["--normalize"], {"normalize": True}, {}),
        (["--max-seq-length", "4"], {"max_seq_length": 4}, {}),
        (["--prompt", "the sea: "], {}, {"prompt": "the sea: "}),
        (["--dtype", "bfloat16", "--batch-size", "2"], {"dtype": "bfloat16"}, {"batch_size": 2}),
    ]:
        assert call(capfd, *arguments, *options)[0] == 0, options
        want = Encoder.from_pretrained("model", **build).encode(TEXTS, **run)
        assert np.array_equal(np.load("v.npy"), want), options
        assert not np.array_equal(want, vectors())
    assert call(capfd, *arguments, "--precision", "float16")[0] == 0
    assert np.array_equal(np.load("v.npy"), vectors().astype(np.float16))


def test_bad_lines(folder, capfd):
    """Named on stderr, counted in the last line."""
    (folder / "bad.txt").write_bytes(b"a\n\xff\nb\n")
    status, _, err = call(capfd, "encode", "model", "bad.txt", "-o", "v.npy", "--errors", "skip")
    lines = err.splitlines()
    assert status == 0 and len(lines) == 3
    assert lines[0].startswith("bert-fast: bad.txt:2: skipped: want UTF-8, got byte 0xff")
    assert lines[2] == "bert-fast: 3 rows of 32 in v.npy, 1 skipped"
    assert np.isnan(np.load("v.npy")).any(1).tolist() == [False, True, False]


def test_stdin(folder):
    arguments = ["encode", "model", "-", "--format", "jsonl", "-o", "v.jsonl", "--keep-text"]
    text = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS)
    assert process(*arguments, input=text)[0] == 0
    rows = [json.loads(line) for line in open("v.jsonl")]
    assert [row["text"] for row in rows] == TEXTS


def killed(arguments, parts, seconds=0.0):
    """Start it and kill it a moment after so many parts are there; False if it finished first."""
    command = [sys.executable, "-m", "bert_fast", *arguments]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    directory = Path(f"{arguments[-1]}.parts")
    while child.poll() is None and len([*directory.glob("part-*")]) < parts:
        time.sleep(0.002)
    time.sleep(seconds)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    return child.returncode == -9


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.long)])
def test_kill_and_restart(folder, count):
    """The same command goes on; the bytes are those of a run that nobody killed."""
    (folder / "many.txt").write_text("".join(f"{TEXTS[i % 6]} {i}\n" for i in range(60 * count)))
    arguments = ["encode", "model", "many.txt", "--chunk", "4", "-o"]
    assert process(*arguments, "whole.npy")[0] == 0
    for i in range(count):
        assert killed([*arguments, "many.npy"], 10 * i + 3, 0.003 * (i % 5))
    assert not (folder / "many.npy").exists()
    status, _, err = process(*arguments, "many.npy")
    assert status == 0 and "not encoded by this process now" in err, err
    assert (folder / "many.npy").read_bytes() == (folder / "whole.npy").read_bytes()
    assert not (folder / "many.npy.parts").exists()


def test_two_processes(folder):
    """Under torchrun, the bytes of one process with as many threads."""
    (folder / "many.txt").write_text("".join(f"{TEXTS[i % 6]} {i}\n" for i in range(80)))
    arguments = ["encode", "model", "many.txt", "--chunk", "8", "-o"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert process(*arguments, "one.npy", env=environment)[0] == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", "-m", "bert_fast"]
    status, _, err = process(*arguments, "two.npy", prefix=launcher, env=environment)
    assert status == 0, err
    assert (folder / "two.npy").read_bytes() == (folder / "one.npy").read_bytes()
    assert err.count("rows of 32") == 1


def test_a_bar_on_a_terminal(folder):
    """Drawn on stderr, with rows, bytes and rate; --no-progress keeps it away."""
    for option, drawn in (("--progress", True), ("--no-progress", False)):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "bert_fast", "encode", "model", "texts.txt", "-o", "v.npy"]
        environment = os.environ | {"COLUMNS": "120", "TERM": "xterm"}
        child = subprocess.Popen(
            [*command, "--overwrite", option],
            stderr=theirs,
            stdout=subprocess.PIPE,
            env=environment,
        )
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            seen += part
        os.close(ours)
        out = child.communicate()[0]
        assert child.returncode == 0 and out == b""
        assert (b"6 rows, 0.0 of 0.0 MB" in seen) == drawn, seen
        assert b"6 rows of 32 in v.npy" in seen


def test_lines_where_there_is_no_terminal(capfd, monkeypatch):
    """A line now and then, not one a chunk."""
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with Progress(1_000_000) as progress:
        for i in range(1, 11):
            progress.update(100_000 * i, 100 * i, f"{100 * i} rows")
    lines = capfd.readouterr()[1].splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"bert-fast: 400 rows, \d+ texts/s, 0:00:\d\d left", lines[0]), lines
    assert re.fullmatch(r"bert-fast: 1000 rows, \d+ texts/s, 0:00:00 left", lines[2]), lines
    with Progress(None, shown=False) as progress:
        for i in range(1, 11):
            progress.update(100_000 * i, 100 * i, f"{100 * i} rows")
    assert capfd.readouterr()[1] == ""


@pytest.mark.long
def test_texts_of_wikipedia(folder, shared):
    """A real model on the first of them: order kept, kill and restart gives the same bytes."""
    with gzip.open(
        shared / "data" / "pretrain" / "wiki_en_2018.txt.gz", "rt", encoding="utf-8"
    ) as file:
        lines = [next(file) for _ in range(2000)]
    (folder / "wiki.txt").write_text("".join(lines), "utf-8")
    arguments = ["encode", str(minilm()), "wiki.txt", "--chunk", "100", "-o"]
    assert process(*arguments, "whole.npy", timeout=3000)[0] == 0
    assert killed([*arguments, "v.npy"], 7)
    assert process(*arguments, "v.npy", timeout=3000)[0] == 0
    assert (folder / "v.npy").read_bytes() == (folder / "whole.npy").read_bytes()
    got, encoder = np.load("v.npy"), Encoder.from_pretrained(minilm())
    picked = [0, 1, 777, 1999]
    want = encoder.encode([lines[i].removesuffix("\n") for i in picked])
    assert np.abs(got[picked] - want).max() < 1e-5
