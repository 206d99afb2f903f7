"""What goes wrong in a run is told in one line, by its exit status, and never applied."""

import errno
import json
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
    last,
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
LAYER = "bert.encoder.layer.1"
MODULE, WEIGHT = f"{LAYER}.intermediate", f"{LAYER}.output.dense.weight"


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


# --- not finite -----------------------------------------------------------------------------------


def bad_weight(model, value):
    with torch.no_grad():
        model.get_parameter(WEIGHT)[3, 5] = value


def bad_activation(model, value):
    def spoil(module, inputs, out):
        spoiled = torch.ones(out.shape[0], 1, dtype=out.dtype)
        spoiled[7] = value
        return out * spoiled

    model.get_submodule(MODULE).register_forward_hook(spoil)


def bad_gradient(model, value):
    model.get_parameter(WEIGHT).register_hook(lambda gradient: gradient * value)


def bad_loss(model, value):
    head = model.cls.predictions
    loss_sum = head.loss_sum
    head.loss_sum = lambda rows, labels: loss_sum(rows, labels) * value


NON_FINITE = {
    bad_weight: f"the parameter {WEIGHT}",
    bad_activation: f"the output of {MODULE}",
    bad_gradient: f"the gradient of {WEIGHT}",
    bad_loss: "the loss",
}


def bits(model) -> dict[str, bytes]:
    return {n: p.detach().float().numpy().tobytes() for n, p in model.named_parameters()}


@pytest.fixture
def spoiled(monkeypatch):
    """Have something done to the model before a step; returns what was there then."""
    seen = {}

    def at(number, spoil, value):
        make = step.Stepper.run

        def made(self, now, *args, **kwargs):
            if now == number:
                model = self.module.model
                spoil(model, value)
                seen["model"], seen["before"] = model, bits(model)
                state = self.optimizer.state
                seen["state"] = {p: {k: v.clone() for k, v in state[p].items()} for p in state}
                seen["now"] = state
            make(self, now, *args, **kwargs)

        monkeypatch.setattr(step.Stepper, "run", made)
        return seen

    return at


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spoil", NON_FINITE)
def test_what_is_not_finite_is_not_applied(
    memory, whole, output, spoiled, capfd, spoil, precision, value
):
    """The run stops before the optimizer; module and batch are named; and it can go on."""
    given = settings(memory / "corpus", output, precision=precision)
    seen = spoiled(AT, spoil, value)
    assert run(given) == 65
    assert bits(seen["model"]) == seen["before"]
    for p, state in seen["state"].items():
        for name, value_before in state.items():
            assert torch.equal(seen["now"][p][name].view(-1), value_before.view(-1)), name
    lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    (line,) = lines
    file = output / f"nonfinite-step-{AT:08}-rank-0.json"
    assert line.startswith(f"bert-fast: error: step {AT}: want a finite loss and gradient, got ")
    assert f"first of all {NON_FINITE[spoil]}; the batches are in {file}" in line
    found = json.loads(file.read_text())
    assert found["step"] == AT and found["first"] == NON_FINITE[spoil]
    (batch,) = found["batches"]
    assert (batch["epoch"], batch["batch"]) == (0, AT) and len(batch["pairs"]) == 4
    (stop,) = records(output, "stop")
    assert (stop["step"], stop["status"]) == (AT + 1, 65) and NON_FINITE[spoil] in stop["reason"]
    assert [path.name for path in checkpoints(output)] == ["step-00000004"]
    load(checkpoints(output)[0])


def test_and_goes_on_when_it_is_well_again(memory, whole, output):
    process = Process(
        settings(memory / "corpus", output),
        lambda: at_step(AT, lambda stepper: bad_weight(stepper.module.model, float("nan"))),
    )
    assert process.wait() == 65 and len(process.errors()) == 1
    assert Process(settings(memory / "corpus", output)).wait() == 0
    assert_same(output, whole)


@pytest.mark.parametrize("spoil", [bad_activation, bad_gradient, bad_loss])
def test_not_finite_in_one_process(memory, output, spoil):
    """All end with the same status; the one where it was says what it was."""

    def before(rank):
        if rank == 1:
            at_step(AT, lambda stepper: spoil(stepper.module.module.model, float("nan")))

    processes, _ = ranks(settings(memory / "corpus", output, micro_batches=2), before=before)
    assert [p.status for p in processes] == [65, 65], [p.said for p in processes]
    assert f"first of all {NON_FINITE[spoil]}" in processes[1].errors()[0]
    for rank in range(2):
        found = json.loads((output / f"nonfinite-step-{AT:08}-rank-{rank}.json").read_text())
        (batch,) = found["batches"]
        assert (batch["epoch"], batch["batch"]) == (0, 2 * AT + rank)
    assert [path.name for path in checkpoints(output)] == ["step-00000004"]


def test_not_finite_in_sharded_parameters(memory, output):
    def before(rank):
        if rank == 1:
            at_step(AT, lambda stepper: bad_loss(stepper.module.model, float("nan")))

    given = settings(memory / "corpus", output, micro_batches=2, fsdp=True)
    processes, _ = ranks(given, before=before)
    assert [p.status for p in processes] == [65, 65], [p.said for p in processes]
    assert all(len(p.errors()) == 1 for p in processes)
    assert [path.name for path in checkpoints(output)] == ["step-00000004"]


# --- fp16 -----------------------------------------------------------------------------------------


def overflow(steps):
    """Gradients of these steps are infinite."""

    def act(stepper):
        parameter = stepper.module.model.get_parameter(WEIGHT)
        now = {"left": steps}

        def spoil(gradient):
            now["left"] -= 1
            return gradient * (float("inf") if now["left"] >= 0 else 1.0)

        parameter.register_hook(spoil)

    return act


@pytest.fixture
def patched(monkeypatch):
    """`at_step` until the test ends."""
    monkeypatch.setattr(step.Stepper, "run", step.Stepper.run)
    return at_step


def test_an_overflow_is_skipped(memory, output, patched):
    """The scale halves, nothing is applied, training goes on."""
    given = settings(memory / "corpus", output, precision="fp16", save__every=1, save__keep=20)
    patched(AT, overflow(2))
    assert run(given) == 0
    told = records(output)
    assert [r["skipped"] for r in told] == [0] * AT + [1] + [2] * (len(told) - AT - 1)
    scales = [r["scale"] for r in told]
    assert scales[AT - 1] == 2 * scales[AT] == 4 * scales[AT + 1] == 4 * scales[-1]
    made = {int(path.name[5:]): path for path in checkpoints(output)}
    for name in ("model.safetensors", "optimizer.safetensors"):
        contents = [(made[n] / name).read_bytes() for n in (AT, AT + 1, AT + 2, AT + 3)]
        assert contents[0] == contents[1] == contents[2] != contents[3]
    assert all(r["loss"] for r in told)


def test_an_overflow_survives_a_restart(memory, output, patched):
    """The scale is part of the state, and how long it has held."""
    given = settings(memory / "corpus", output / "one", precision="fp16", save__every=1)
    patched(AT, overflow(1))
    patched(AT + 2, lambda stepper: signal.raise_signal(signal.SIGTERM))
    assert run(given) == 143
    before = last(output / "one")["scaler"]
    assert run(given) == 0
    after = last(output / "one")["scaler"]
    assert after["scale"] == before["scale"] == 2.0**15
    assert after["_growth_tracker"] == before["_growth_tracker"] + 12 - AT - 3 == 12 - AT - 1


def test_twenty_overflows_in_a_row_are_the_end(memory, output, patched, capfd):
    phases = [{"steps": 40, "max_length": 24, "sequences": 4}]
    given = settings(memory / "corpus", output, precision="fp16", phases=phases)
    patched(AT, overflow(100))
    assert run(given) == 65
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert f"step {AT + 19}: want a finite gradient, got none 20 times in a row" in line
    assert last(output)["step"] == 24
    (stop,) = records(output, "stop")
    assert (stop["step"], stop["status"]) == (AT + 20, 65)


def test_nineteen_overflows_are_not(memory, output, patched):
    phases = [{"steps": 30, "max_length": 24, "sequences": 4}]
    given = settings(memory / "corpus", output, precision="fp16", phases=phases)
    patched(AT, overflow(19))
    assert run(given) == 0
    assert records(output)[-1]["skipped"] == 19


def test_an_overflow_in_one_process(memory, output):
    """All skip the step."""

    def before(rank):
        if rank == 1:
            at_step(AT, lambda stepper: overflow(1)(_Unwrapped(stepper)))

    given = settings(memory / "corpus", output, precision="fp16", micro_batches=2)
    processes, _ = ranks(given, before=before)
    assert [p.status for p in processes] == [0, 0], [p.said for p in processes]
    assert records(output)[-1]["skipped"] == 1
    assert all(record["loss"] for record in records(output))


class _Unwrapped:
    """A stepper, as if its module were not wrapped."""

    def __init__(self, stepper):
        self.module = stepper.module.module


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
