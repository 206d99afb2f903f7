"""An encoding that was stopped or killed goes on where it was; nothing is lost, nothing mixed."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import stream_runs
from stream_runs import TEXTS, FakeEncoder, left, run, same, want

from bert_fast import batch_invariant
from bert_fast.encode import stream

alone, source = stream_runs.alone, stream_runs.source


# --- starting again ------------------------------------------------------------------------------


class Interrupted(FakeEncoder):
    """Fails at its third chunk."""

    def encode(self, texts, **options):
        if len(self.calls) == 2:
            raise KeyboardInterrupt
        return super().encode(texts, **options)


def interrupt(source, target, **options):
    with pytest.raises(KeyboardInterrupt):
        run(source, target, encoder=Interrupted(), **{"chunk": 2} | options)
    assert target.with_name(f"{target.name}.parts").is_dir() and not target.exists()


def test_finished_chunks_are_not_encoded_again(tmp_path, source):
    target, encoder = tmp_path / "v.npy", FakeEncoder()
    interrupt(source, target)
    done = run(source, target, encoder=encoder, chunk=2)
    assert [text for call in encoder.calls for text in call] == TEXTS[4:]
    assert (done.rows, done.encoded) == (11, 7)
    assert same(np.load(target), want(TEXTS, 2))
    assert left(tmp_path) == ["texts.txt", "v.npy"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"chunk": 3}, "chunk"),
        ({"precision": "float16"}, "precision"),
        ({"prompt": "p: "}, "prompt"),
        ({"batch_size": 4}, "batch_size"),
    ],
)
def test_work_of_other_arguments_is_refused(tmp_path, source, options, named):
    target = tmp_path / "v.npy"
    interrupt(source, target)
    with pytest.raises(ValueError, match=f"another {named}; run that again, or discard it with"):
        run(source, target, **{"chunk": 2} | options)
    run(source, target, overwrite=True, **{"chunk": 2} | options)
    assert left(tmp_path) == ["texts.txt", "v.npy"]


def test_work_begun_without_the_batch_invariant_mode_is_refused(tmp_path, source):
    """And goes on without it: vectors of both would have been mixed."""
    target = tmp_path / "v.npy"
    interrupt(source, target)
    with batch_invariant(True), pytest.raises(ValueError, match="another batch_invariant; run"):
        run(source, target, chunk=2)
    with batch_invariant(False):
        assert run(source, target, chunk=2).encoded == 7


def test_work_of_another_input_or_model_is_refused(tmp_path, source):
    target, other = tmp_path / "v.npy", tmp_path / "other.txt"
    other.write_text("x\n")
    interrupt(source, target)
    with pytest.raises(ValueError, match="another inputs"):
        run(other, target, chunk=2)
    with pytest.raises(ValueError, match="another model"):
        stream.encode_file(FakeEncoder(), source, target, chunk=2, fingerprint="other")


def test_an_input_that_changed_is_encoded_anew_where_it_changed(tmp_path, source):
    """Say, because the line that stopped the first run was mended."""
    target, encoder = tmp_path / "v.npy", FakeEncoder()
    source.write_bytes(source.read_bytes().replace(b"text 7", b"\xff"))
    with pytest.raises(ValueError, match=r"texts\.txt:8: want UTF-8"):
        run(source, target, chunk=2)
    new = "TEXT 2 é"  # as long as the old one
    texts = [*TEXTS[:2], new, *TEXTS[3:]]
    source.write_text("\n".join(texts), "utf-8")
    run(source, target, encoder=encoder, chunk=2)
    assert encoder.calls == [[new, TEXTS[3]], TEXTS[6:8], TEXTS[8:10], TEXTS[10:]]
    assert same(np.load(target), want(texts, 2))


def test_a_directory_of_somebody_else_is_left_alone(tmp_path, source):
    parts = tmp_path / "v.npy.parts"
    parts.mkdir()
    (parts / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"holds thesis\.tex, which is of no encoding"):
        run(source, tmp_path / "v.npy", overwrite=True)
    assert left(parts) == ["thesis.tex"]


def test_two_runs_at_once(tmp_path, source):
    """The second is told so, and spoils nothing."""
    target = tmp_path / "v.npy"

    class Twice(FakeEncoder):
        def encode(self, texts, **options):
            if not self.calls:
                with pytest.raises(OSError, match="another run is working there"):
                    run(source, target)
            return super().encode(texts, **options)

    run(source, target, encoder=Twice())
    assert same(np.load(target), want(TEXTS, 1000))


@pytest.mark.parametrize("limit", [0, 100])
def test_a_full_disk(tmp_path, source, monkeypatch, limit):
    """The error is the system's; what was done stays."""
    target, fsync, count = tmp_path / "v.npy", os.fsync, 0

    def full(handle):
        nonlocal count
        count += 1
        if count > 4 + limit / 25:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run(source, target, chunk=2)
    assert not target.exists()
    encoder = FakeEncoder()
    run(source, target, chunk=2, encoder=encoder)
    assert len(encoder.calls) < 6 and same(np.load(target), want(TEXTS, 2))


# --- killed --------------------------------------------------------------------------------------


def expected_bytes(tmp_path, source, suffix, **options):
    path = tmp_path / f"expected{suffix}"
    run(source, path, **options)
    return path.read_bytes()


@pytest.mark.parametrize("old", [None, b"an older output"])
@pytest.mark.parametrize("suffix", [".npy", pytest.param(".parquet", marks=pytest.mark.long)])
def test_killed_at_every_change_of_the_disk(tmp_path, source, suffix, old):
    """And started again: the same bytes as without a kill, nothing left behind."""
    expected = expected_bytes(tmp_path, source, suffix, chunk=4)
    options = {"chunk": 4, "overwrite": old is not None}
    moments = finished = 0
    while not finished:
        folder = tmp_path / str(moments)
        folder.mkdir()
        target = folder / f"v{suffix}"
        if old:
            target.write_bytes(old)
        ended = stream_runs.in_child(lambda t=target: run(source, t, **options), kill_at=moments)
        assert ended in (0, -9)
        finished = ended == 0
        if target.exists():
            assert target.read_bytes() in (expected, old), moments  # never half an output
        if not finished:
            try:
                run(source, target, **options)
            except FileExistsError:  # killed after all was done but leaving
                assert not old and target.read_bytes() == expected
                run(source, target, chunk=4, overwrite=True)
        assert target.read_bytes() == expected, moments
        assert left(folder) == [target.name], moments
        moments += 1
    assert moments > 20


@pytest.mark.parametrize("count", [4, pytest.param(40, marks=pytest.mark.long)])
def test_killed_again_and_again(tmp_path, count):
    """By the clock, wherever it is; each run goes on from the one before."""
    source = tmp_path / "a.txt"
    source.write_text("".join(f"line {i}\n" for i in range(40 * count)))
    expected = expected_bytes(tmp_path, source, ".npy", chunk=4)
    target, kills = tmp_path / "v.npy", 0
    for i in range(count):
        ended = stream_runs.in_child(
            lambda: run(source, target, chunk=4, delay=0.01), after=0.03 + 0.01 * (i % 5)
        )
        kills += ended == -9
        assert ended == -9 and not target.exists()
    names = (path.name for path in tmp_path.glob("v.npy.parts/*"))
    kept = [name for name in names if re.fullmatch(r"part-\d{8}-[0-9a-f]{32}", name)]
    done = run(source, target, chunk=4)
    assert kills == count and done.encoded == done.rows - 4 * len(kept)
    assert target.read_bytes() == expected


def test_stdin_starts_again_too(tmp_path):
    """As long as the same texts come; of others only theirs are used."""
    worker = [sys.executable, stream_runs.__file__]

    def call(text, **options):
        arguments = {"sources": "-", "target": str(tmp_path / "v.npy"), "chunk": 2} | options
        command = [*worker, json.dumps(arguments)]
        return subprocess.run(command, input=text, capture_output=True, text=True)

    first = call("a\nb\nc\nd\n\0\n")
    assert first.returncode and "<stdin>:5: want text, got NUL" in first.stderr
    assert left(tmp_path) == ["v.npy.parts"]
    second = call("a\nb\nC\nd\n")
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["encoded"] == 2
    assert same(np.load(tmp_path / "v.npy"), want(["a", "b", "C", "d"], 2))
