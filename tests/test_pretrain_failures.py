"""What goes wrong in a run is told in one line, and by its exit status."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import time

import pytest
import torch
from training_cases import (
    DEADLINE,
    Process,
    assert_same,
    at_step,
    checkpoints,
    corpus,
    folder,
    ranks,
    records,
    run,
    settings,
)

from bert_fast import cli
from bert_fast.train import step
from bert_fast.train.checkpoints import Checkpoints, load
from bert_fast.train.metrics import METRICS, read_records

AT = 6  # the step in which it happens; checkpoints are of steps 4, 8 and 12
SOON = 30  # seconds in which a run must have ended


@pytest.fixture(scope="module")
def memory():
    with folder() as path:
        corpus(path / "corpus", documents=40)
        yield path


@pytest.fixture(scope="module")
def whole(memory):
    """The output of a run to which nothing happens."""
    assert run(settings(memory / "corpus", memory / "whole")) == 0
    return memory / "whole"


@pytest.fixture
def output():
    with folder() as path:
        yield path / "run"


# --- the disk -------------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch):
    """Have the disk be full in the save of a step."""
    save, usage = Checkpoints.save, shutil.disk_usage

    def saved(self, state, **rest):
        with pytest.MonkeyPatch.context() as patch:
            if state.step == 8:
                none = usage("/")._replace(free=0)
                patch.setattr(shutil, "disk_usage", lambda path: none)
            return save(self, state, **rest)

    monkeypatch.setattr(Checkpoints, "save", saved)


def test_a_full_disk_is_the_end(memory, whole, output, full, capfd, monkeypatch):
    assert run(settings(memory / "corpus", output)) == 74
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("bert-fast: error: no checkpoint of step 8: ")
    assert f"{output}/checkpoints: want " in line
    assert line.endswith(" bytes on the disk for a checkpoint, got 0")
    assert [path.name for path in checkpoints(output)] == ["step-00000004"]
    assert records(output, "stop")[-1]["status"] == 74
    monkeypatch.undo()
    assert run(settings(memory / "corpus", output)) == 0
    assert_same(output, whole)


def test_or_a_warning(memory, whole, output, full, capfd):
    assert run(settings(memory / "corpus", output, save__on_error="warn")) == 0
    lines = capfd.readouterr().err.splitlines()
    assert sum("bert-fast: warning: no checkpoint of step 8: " in line for line in lines) == 1
    assert not any("error" in line for line in lines)
    names = [path.name for path in checkpoints(output)]
    assert names == ["step-00000004", "step-00000012"]
    assert_same(output, whole)


def test_a_full_disk_ends_all_processes(memory, output):
    def before(rank):
        def failed(self, state, **rest):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        Checkpoints.save = failed

    processes, _ = ranks(settings(memory / "corpus", output, micro_batches=2), before=before)
    assert [p.status for p in processes] == [74, 74], [p.said for p in processes]
    assert [len(p.errors()) for p in processes] == [1, 0]


def test_a_limit_of_file_sizes(memory, output):
    """A real one, in the middle of a write."""

    def before():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        def limited(stepper):
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))

        at_step(5, limited)

    process = Process(settings(memory / "corpus", output), before)
    assert process.wait() == 74, process.said
    assert "no checkpoint of step 8" in process.errors()[0]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000004"]


# --- processes that die ---------------------------------------------------------------------------


def test_a_process_that_makes_batches_dies(memory, output):
    def before():
        def kill(stepper):
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

        at_step(AT, kill)

    phases = [{"steps": 4000, "max_length": 24, "sequences": 4}]
    given = settings(memory / "corpus", output, data__workers=2, phases=phases)
    process = Process(given, before)
    assert process.wait(SOON) == 1
    (line,) = [line for line in process.said.splitlines() if line.startswith("bert-fast: error")]
    assert "worker" in line
    load(checkpoints(output)[-1])


# --- other errors ---------------------------------------------------------------------------------


def test_no_memory(memory, output, monkeypatch, capfd, tmp_path):
    message = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"

    def raised(self, *args, **kwargs):
        raise torch.OutOfMemoryError(message)

    monkeypatch.setattr(step.Stepper, "run", raised)
    path = tmp_path / "run.yaml"
    path.write_text(settings(memory / "corpus", output).to_yaml())
    assert cli.main(["pretrain", str(path)]) == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("bert-fast: error: CUDA out of memory. Tried to allocate 2.00 GiB. See")


@pytest.mark.parametrize(
    "again", [*range(2), *(pytest.param(i, marks=pytest.mark.long) for i in range(2, 12))]
)
def test_a_process_of_the_run_is_killed(memory, output, again):
    def before(rank):
        if rank == 1:
            at_step(AT, lambda stepper: signal.raise_signal(signal.SIGKILL))

    given = settings(memory / "corpus", output, micro_batches=2)
    processes, _ = ranks(given, before=before, wait=False)
    assert processes[1].wait() == -signal.SIGKILL and processes[0].wait(SOON) == 1
    assert len(processes[0].errors()) == 1


def test_an_error_in_one_process_ends_the_other(memory, output):
    def before(rank):
        def fail(stepper):
            raise ValueError("something else")

        if rank == 1:
            at_step(AT, fail)

    processes, _ = ranks(settings(memory / "corpus", output, micro_batches=2), before=before)
    assert [p.status for p in processes] == [1, 1]
    assert "something else" in processes[1].errors()[0]
    assert len(processes[0].errors()) == 1


@pytest.mark.parametrize("name", ["tokens", "sentences"])
def test_a_damaged_corpus(memory, output, name):
    with folder() as path:
        shutil.copytree(memory / "corpus", path / "corpus")
        file = path / "corpus" / f"train-00000.{name}.npy"
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 1
        file.write_bytes(raw)
        process = Process(settings(path / "corpus", output))
        assert process.wait() == 1
        (line,) = process.errors()
        assert f"{file}: sha256: want " in line
    assert not (output / METRICS).exists()


def test_two_runs_in_one_place(memory, output):
    """The second one is refused; the first one goes on."""
    phases = [{"steps": 300, "max_length": 24, "sequences": 4}]
    given = settings(memory / "corpus", output, phases=phases)
    first = Process(given)
    end = time.monotonic() + DEADLINE
    while not (output / METRICS).exists() and time.monotonic() < end:
        time.sleep(0.01)
    second = Process(given)
    assert second.wait() == 1
    assert f"{output}: another run is working there" in second.errors()[0]
    first.kill(signal.SIGTERM)
    assert first.wait() == 143
    kinds = [r["kind"] for r in read_records(output / METRICS)]
    assert kinds.count("start") == 1 and kinds[-1] == "stop"
