"""Several processes train the model of one: to the bit with two, and they stop as one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from training_cases import (
    DEADLINE,
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

from bert_fast.train import distributed, step
from bert_fast.train.metrics import METRICS, read_records

# A micro-batch has as many pairs as fit, so the processes' labels differ, and an epoch's last
# micro-batch is smaller.
CASES = {
    "accumulation of one": {},
    "four micro-batches": {"micro_batches": 4},
    "by sequences": {"phases": [{"steps": 12, "max_length": 24, "sequences": 5}]},
    "lamb": {"optimizer__name": "lamb"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "workers": {"data__workers": 1},
    "recomputed": {"activation_checkpointing": True},
    "phases": {
        "phases": [
            {"steps": 5, "max_length": 16, "tokens": 70},
            {"steps": 7, "max_length": 30, "sequences": 3},
        ]
    },
}
# With four micro-batches one process adds ((a + b) + c) + d, two add (a + c) + (b + d).
EXACT = [name for name in CASES if name != "four micro-batches"]


@pytest.fixture(scope="module")
def memory():
    with folder() as path:
        corpus(path / "corpus", documents=12)
        yield path


@pytest.fixture
def output():
    with folder() as path:
        yield path


def settings_of(memory: Path, output: Path, **changes):
    """A run of 12 steps with dropout, over several epochs."""
    phases = [{"steps": 12, "max_length": 24, "tokens": 110}]
    given = {"phases": phases, "micro_batches": 2, "evaluate__every": 6, "save__every": 6}
    return settings(memory / "corpus", output, **{**given, **changes})


def both(memory, output, before=None, single=None, **changes):
    """The outputs of one process, and of two; `single` are other settings of the former."""
    one, two = output / "one", output / "two"
    assert run(settings_of(memory, one, **{**changes, **(single or {})})) == 0
    processes, _ = ranks(settings_of(memory, two, **changes), before=before)
    assert [p.status for p in processes] == [0, 0], [p.said for p in processes]
    return one, two


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load(last(output)["model.safetensors"])


def farthest(one: Path, two: Path) -> float:
    """How far the weights are apart at most."""
    a, b = weights(one), weights(two)
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_close(one: Path, two: Path, bound: float) -> None:
    assert farthest(one, two) <= bound
    for a, b in zip(records(one), records(two), strict=True):
        assert abs(a["loss"] - b["loss"]) <= bound and a["labels"] == b["labels"]


@pytest.mark.parametrize("case", EXACT)
def test_two_processes_are_one(memory, output, case):
    """All tensors, moments too, and what is told of each step, to the bit."""
    one, two = both(memory, output, **CASES[case])
    assert [name for name, value in last(one).items() if last(two)[name] != value] == []
    assert records(one) == records(two)
    told = records(one)
    assert told[-1]["epoch"] >= 1 and len({record["labels"] for record in told}) > 4
    for a, b in zip(records(one, "evaluation"), records(two, "evaluation"), strict=True):
        assert a.keys() == b.keys() and a["labels"] == b["labels"]
        for name in ("mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-6)  # summed in another order


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", EXACT)
def test_two_processes_are_one_over_50_steps(memory, output, case, seed):
    changes = {**CASES[case], "seed": seed}
    phases = changes.pop("phases", [{"max_length": 24, "tokens": 110}])
    changes["phases"] = [{**phase, "steps": 50 // len(phases)} for phase in phases]
    one, two = both(memory, output, **changes)
    assert [name for name, value in last(one).items() if last(two)[name] != value] == []
    assert records(one) == records(two)


def test_sums_of_another_order(memory, output):
    one, two = both(memory, output, **CASES["four micro-batches"])
    assert 0 < farthest(one, two)
    assert_close(one, two, 1e-5)


# --- what the comparison sees ---------------------------------------------------------------------


def mean_of_means(rank: int) -> None:
    """Each process divides by its own counts, and the sum of them is halved."""
    forward = step.PreTrainingObjective.forward

    def divided(self, batch, counts, *rest):
        own = [batch[name].numel() for name in ("masked_labels", "next_sentence_label")]
        return forward(self, batch, 2 * torch.tensor(own).float(), *rest)

    step.PreTrainingObjective.forward = divided


def averaged(rank: int) -> None:
    """As DDP itself does."""
    assert distributed.DistributedDataParallel.register_comm_hook
    distributed.DistributedDataParallel.register_comm_hook = lambda *args: None


def one_dropout(rank: int) -> None:
    """Both processes draw the same bits."""
    seed_of = step.seed_of
    step.seed_of = lambda seed, number, j: seed_of(seed, number, 0)


def never_summed(rank: int) -> None:
    """Gradients stay each process's own."""
    distributed.without_sync = lambda module, last: module.no_sync()
    step.without_sync = distributed.without_sync


@pytest.mark.parametrize("mistake", [mean_of_means, averaged, one_dropout, never_summed])
def test_the_comparison_sees(memory, output, mistake):
    """By far more than an order of sums makes."""
    one, two = both(memory, output, mistake)
    assert records(one)[0]["labels"] == records(two)[0]["labels"]
    assert last(one)["optimizer.safetensors"] != last(two)["optimizer.safetensors"]
    moments = [load(last(output)["optimizer.safetensors"]) for output in (one, two)]
    name = "exp_avg.bert.encoder.layer.0.intermediate.dense.weight"
    apart = (moments[0][name] - moments[1][name]).norm() / moments[0][name].norm()
    assert apart > 1e-3


# --- sharded --------------------------------------------------------------------------------------


def test_sharded_parameters(memory, output):
    """FSDP2 sums in an order of its own, and takes torch's AdamW."""
    one, two = both(memory, output, single={"fsdp": False}, fsdp=True)
    assert_close(one, two, 1e-5)


def test_sharded_goes_on_as_one_process(memory, output):
    """Its state is whole: any number of processes reads it, sharding or not."""
    one, two = both(memory, output, single={"fsdp": False}, fsdp=True)
    for path in checkpoints(two)[1:]:
        shutil.rmtree(path)
    assert run(settings_of(memory, two)) == 0
    assert_close(one, two, 1e-5)


# --- other numbers of processes -------------------------------------------------------------------


def test_the_number_of_processes_may_change(memory, output):
    """2, then 1, then 2, each going on from the last: the bits of one all along."""
    one, changing = output / "one", output / "changing"
    assert run(settings_of(memory, one)) == 0
    for done, world in ((4, 2), (8, 1), (None, 2)):
        given = settings_of(memory, changing)

        def before(rank, done=done):
            if done is not None and rank == 0:
                at_step(done - 1, lambda stepper: signal.raise_signal(signal.SIGTERM))

        processes, _ = ranks(given, world, before)
        assert {p.status for p in processes} == {0 if done is None else 143}
        assert last(changing)["step"] == (done or 12)
    assert last(changing)["model.safetensors"] == last(one)["model.safetensors"]
    assert last(changing)["optimizer.safetensors"] == last(one)["optimizer.safetensors"]
    assert records(changing) == records(one)


def test_a_checkpoint_that_stepped_aside(memory, output):
    """A kill between two renames leaves it so; all processes find it."""
    given = settings_of(memory, output)
    assert run(given) == 0
    (path,) = (output / "checkpoints").glob("step-*12")
    path.rename(path.with_name(f"{path.name}.old"))
    longer = [{**given.to_dict()["phases"][0], "steps": 12}]
    processes, _ = ranks(settings_of(memory, output, phases=longer))
    assert [p.status for p in processes] == [0, 0], [p.said for p in processes]
    assert all("goes on from" in p.said and ".old" in p.said for p in processes[:1])


def test_the_library_is_the_first_process_s(memory, output):
    """Whatever the others have chosen, whatever they have measured."""

    def before(rank):
        from bert_fast.ops.products import set_cpu_library

        set_cpu_library(("blas", "onednn")[rank])

    one, two = both(memory, output, before)
    assert last(one)["model.safetensors"] == last(two)["model.safetensors"]


def test_micro_batches_that_cannot_be_shared(memory, output):
    processes, _ = ranks(settings_of(memory, output, micro_batches=3))
    for process in processes:
        assert process.status == 1
        (line,) = process.errors()
        assert "micro_batches: want a multiple of the 2 processes, got 3" in line
    assert not (output / METRICS).exists()


def test_settings_that_do_not_go_together(memory, output):
    processes, _ = ranks(settings_of(memory, output, fsdp=True, optimizer__name="lamb"))
    for process in processes:
        assert process.status == 1 and "fsdp: want adamw" in process.errors()[0]
    with pytest.raises(ValueError, match="fsdp: want processes that torchrun starts"):
        run(settings_of(memory, output, fsdp=True))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: want cpu, since PyTorch finds no GPU"):
            run(settings_of(memory, output, device="cuda"))


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_stops_all(memory, output, told):
    """At the same step, with one checkpoint of it; and it goes on."""

    def before(rank):
        if rank == told:
            at_step(7, lambda stepper: signal.raise_signal(signal.SIGTERM))

    one, two = output / "one", output / "two"
    given = settings_of(memory, two)
    processes, _ = ranks(given, before=before)
    assert [p.status for p in processes] == [143, 143], [p.said for p in processes]
    assert [path.name for path in checkpoints(two)] == ["step-00000006", "step-00000008"]
    assert [r["kind"] for r in read_records(two / METRICS)].count("stop") == 1
    processes, _ = ranks(given)
    assert [p.status for p in processes] == [0, 0]
    assert run(settings_of(memory, one)) == 0
    assert last(two)["model.safetensors"] == last(one)["model.safetensors"]
    assert records(two) == records(one)


def test_only_the_first_process_tells(memory, output):
    _, two = both(memory, output)
    steps = [record["step"] for record in records(two)]
    assert steps == [*range(1, 13)]
    facts = json.loads((checkpoints(two)[-1] / "state.json").read_text())["facts"]
    assert facts["world"] == 2


@pytest.mark.long
def test_torchrun(memory, output):
    """As a user starts it: processes of their own, which meet by torchrun's rendezvous."""
    one, two = output / "one", output / "two"
    (output / "run.yaml").write_text(settings_of(memory, two).to_yaml())
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m bert_fast pretrain"
    env = os.environ | {"BERT_FAST_CPU_LIBRARY": "blas", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command.split(), "run.yaml"],
        **{"env": env, "cwd": output, "capture_output": True, "text": True},
        timeout=4 * DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    assert run(settings_of(memory, one)) == 0
    assert last(one)["model.safetensors"] == last(two)["model.safetensors"]
    assert records(one) == records(two)
