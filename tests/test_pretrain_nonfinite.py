"""A loss or gradient that is not finite is never applied: the run stops, or in fp16 skips."""

import json
import signal

import pytest
import torch
from training_cases import (
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

from bert_fast.train import step
from bert_fast.train.checkpoints import load

AT = 6  # the step in which it happens; checkpoints are of steps 4, 8 and 12
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
