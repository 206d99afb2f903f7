"""A run that was stopped, killed or damaged goes on to the bits of one that never was."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from checkpoint_cases import Disk, names
from training_cases import (
    VOCABULARY,
    Process,
    assert_same,
    at_step,
    checkpoints,
    corpus,
    folder,
    last,
    records,
    run,
    settings,
)

from bert_fast.data.batches import Position
from bert_fast.ops.products import cpu_library
from bert_fast.train import pretrain, step
from bert_fast.train.build import Texts
from bert_fast.train.metrics import METRICS, read_records
from bert_fast.train.step import Stepper

STEPS = 40
TWO_PHASES = [
    {"steps": 22, "max_length": 20, "tokens": 90},
    {"steps": 18, "max_length": 30, "sequences": 3},
]
# Each: changes of the settings, and after which steps the run is stopped.
CASES = {
    "plain": ({}, (1, 17, 39)),
    "workers": ({"data__workers": 2}, (9,)),
    "accumulation": ({"micro_batches": 2}, (5, 26)),
    "phases": ({"phases": TWO_PHASES, "micro_batches": 3}, (21, 22, 23)),
    "lamb": ({"optimizer__name": "lamb"}, (13,)),
    "bf16": ({"precision": "bf16", "optimizer__name": "lamb"}, (14,)),
    "fp16": ({"precision": "fp16"}, (15,)),
    "recomputed": ({"activation_checkpointing": True}, (16,)),
}
ALL = (1, 2, 3, 7, 9, 10, 11, 13, 16, 19, 20, 21, 22, 23, 26, 30, 31, 36, 38, 39)


@pytest.fixture(scope="module")
def memory():
    with folder() as path:
        corpus(path / "corpus", documents=16)
        yield path


def settings_of(memory: Path, output: Path, **changes):
    """A run of 40 steps with dropout, over several epochs, that saves now and then."""
    given = {
        "phases": [{"steps": STEPS, "max_length": 24, "sequences": 4}],
        "save__every": 10,
        "evaluate__every": 15,
    }
    return settings(memory / "corpus", output, **{**given, **changes})


@pytest.fixture(scope="module")
def whole(memory):
    """The outputs of uninterrupted runs, by case: made when first asked for."""
    made = {}

    def of(case: str = "plain") -> Path:
        if case not in made:
            output = memory / f"whole {case}"
            assert run(settings_of(memory, output, **CASES[case][0])) == 0
            made[case] = output, torch.get_rng_state()
        return made[case][0]

    of.rng = made
    return of


@pytest.fixture
def output(tmp_path_factory):
    with folder() as path:
        yield path / "run"


@pytest.fixture
def stopped(monkeypatch):
    """Have a signal come in the middle of a step; called with the number of steps then done."""

    def at(done: int, number: int = signal.SIGTERM) -> None:
        make = Stepper.run

        def made(self, step, *args, **kwargs):
            make(self, step, *args, **kwargs)
            if step == done - 1:
                signal.raise_signal(number)

        monkeypatch.setattr(Stepper, "run", made)

    yield at


def stop_and_go_on(memory, output, stopped, case, done):
    given = settings_of(memory, output, **CASES[case][0])
    stopped(done)
    assert run(given) == 143
    assert last(output)["step"] == done == records(output, "stop")[-1]["step"]
    torch.manual_seed(random.randrange(2**32))  # nothing of it may matter
    assert run(given) == 0


@pytest.mark.parametrize(
    ("case", "done"), [(case, done) for case, (_, points) in CASES.items() for done in points]
)
def test_goes_on_after_sigterm(memory, output, stopped, whole, case, done):
    expected = whole(case)
    stop_and_go_on(memory, output, stopped, case, done)
    assert torch.equal(torch.get_rng_state(), whole.rng[case][1])
    assert_same(output, expected)
    steps = [record["step"] for record in records(output)]
    assert steps == [*range(1, STEPS + 1)]
    kinds = [r["kind"] for r in read_records(output / METRICS)]
    kinds = [kind for kind in kinds if kind not in ("train", "evaluation")]
    assert kinds == ["start", "stop", "resume", "stop"]


@pytest.mark.long
@pytest.mark.parametrize("done", ALL)
@pytest.mark.parametrize("case", CASES)
def test_goes_on_after_sigterm_anywhere(memory, output, stopped, whole, case, done):
    expected = whole(case)
    stop_and_go_on(memory, output, stopped, case, done)
    assert_same(output, expected)


def test_the_run_is_what_it_should_be(memory, whole):
    """Epochs end within it, also in the middle of a step; the second phase begins with one."""
    for case in ("plain", "accumulation", "phases"):
        told = records(whole(case))
        assert told[-1]["epoch"] >= 2
    given = settings_of(memory, "nowhere", **CASES["accumulation"][0])
    counts = [Texts(given).batches(given.phases[0]).count(epoch) for epoch in range(3)]
    assert any(count % 2 for count in counts)
    epochs = [record["epoch"] for record in records(whole("phases"))]
    assert epochs[22] == epochs[21] + 1


@pytest.mark.parametrize("change", ["dropout", "data"])
def test_the_comparison_sees(memory, output, whole, change, monkeypatch):
    """A run that goes on with other dropout, or one micro-batch later, ends otherwise."""
    shutil.copytree(whole(), output)
    for path in checkpoints(output)[2:]:
        shutil.rmtree(path)
    if change == "dropout":
        seed_of = step.seed_of
        monkeypatch.setattr(step, "seed_of", lambda seed, n, j: seed_of(seed, n + 1, j))
    else:
        steps = pretrain.steps

        def later(batches, at, *args, **options):
            return steps(batches, Position(at.epoch, at.batch + 1), *args, **options)

        monkeypatch.setattr(pretrain, "steps", later)
    assert run(settings_of(memory, output)) == 0
    assert records(output)[:20] == records(whole())[:20]
    with pytest.raises(AssertionError):
        assert_same(output, whole())


# --- killed ---------------------------------------------------------------------------------------


def killed_at(moment: int | None, number: int):
    """What has a run killed: before step `number`, or in the first save behind it.

    Args:
        moment: the change of the disk in that save, from 0; None: at the step.
        number: of the step.
    """

    def die() -> None:
        signal.raise_signal(signal.SIGKILL)

    def before() -> None:
        if moment is None:
            return at_step(number, lambda stepper: die())
        save = pretrain.Checkpoints.save

        def killed(self, state, **rest):
            if state.step <= number:
                return save(self, state, **rest)
            with Disk(lambda change: die() if change == moment else None):
                return save(self, state, **rest)

        pretrain.Checkpoints.save = killed

    return before


def goes_on_after_kills(memory, output, expected, chance, kills):
    """Kill a run again and again, every third time during a save, and let it end."""
    given, begun = settings_of(memory, output), 0
    for _ in range(kills):
        moment = chance.choice([None, None, None, *[chance.randrange(60) for _ in range(3)]])
        process = Process(given, killed_at(moment, chance.randrange(begun, STEPS)))
        if process.wait() == 0:
            break
        assert process.status == -signal.SIGKILL, process.said
        before, begun = begun, last(output)["step"] if checkpoints(output) else 0
        assert begun >= before
    process = Process(given)
    assert process.wait() == 0, process.said
    assert "passed over" not in process.said
    assert_same(output, expected)
    assert [record["step"] for record in records(output)] == [*range(1, STEPS + 1)]
    assert [name for name in names(output / "checkpoints") if name.startswith(".")] == []


@pytest.mark.parametrize("seed", range(3))
def test_goes_on_after_sigkill(memory, output, whole, seed):
    goes_on_after_kills(memory, output, whole(), random.Random(seed), 1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_goes_on_after_four_sigkills(memory, output, whole, seed):
    goes_on_after_kills(memory, output, whole(), random.Random(100 + seed), 4)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_goes_on_after_sigkill_by_the_clock(memory, output, whole, seed):
    chance, given = random.Random(seed), settings_of(memory, output, data__workers=seed % 3)
    for _ in range(3):
        process = Process(given)
        time.sleep(chance.uniform(0.1, 1.5))
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
    assert Process(given).wait() == 0
    assert_same(output, whole())


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGUSR1, 143), (signal.SIGINT, 130)], ids=lambda v: str(int(v))
)
def test_other_signals(memory, output, whole, stopped, number, status):
    given = settings_of(memory, output)
    stopped(7, number)
    assert run(given) == status
    assert last(output)["step"] == 7
    assert run(given) == 0
    assert_same(output, whole())


def test_a_second_signal_ends_it_at_once(memory, output):
    def before():
        def twice(stepper):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

        at_step(5, twice)

    assert Process(settings_of(memory, output), before).wait() == -signal.SIGTERM
    assert checkpoints(output) == []


def test_handlers_are_as_before(memory, output):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    assert run(settings(memory / "corpus", output)) == 0
    assert {n: signal.getsignal(n) for n in before} == before


def test_nothing_is_saved_where_nothing_is_asked_for(memory, output, stopped):
    stopped(5)
    assert run(settings_of(memory, output, save__every=None)) == 143
    assert checkpoints(output) == []
    assert records(output, "stop")[-1]["step"] == 5


# --- what it goes on from -------------------------------------------------------------------------


def test_the_library_is_the_checkpoint_s(memory, output, stopped, whole, monkeypatch):
    """Taken from there whatever is chosen here; the next run chooses for itself again."""
    given = settings_of(memory, output)
    stopped(20)
    assert run(given, "blas") == 143
    seen, evaluate = [], pretrain.evaluate
    monkeypatch.setattr(pretrain, "evaluate", lambda *a: seen.append(cpu_library()) or evaluate(*a))
    assert run(given, "onednn") == 0
    assert {*seen} == {"blas"}
    assert_same(output, whole())
    facts = json.loads((checkpoints(output)[-1] / "state.json").read_text())["facts"]
    assert facts["cpu_library"] == "blas"


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def copied(memory, whole, output):
    """A run that was killed behind step 30, with two checkpoints."""
    shutil.copytree(whole(), output)
    shutil.rmtree(checkpoints(output)[-1])
    assert names(output / "checkpoints") == ["step-00000020", "step-00000030"]
    return output


DAMAGES = {
    "model.safetensors": flip,
    "optimizer.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "state.json": lambda path: path.write_text(path.read_text().replace("30", "31", 1)),
    "manifest.json": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "manifest.json that is gone": lambda path: path.with_name("manifest.json").unlink(),
    "tokenizer.json": flip,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(memory, copied, whole, name, capfd):
    """The one before it is taken, and both are named."""
    DAMAGES[name](copied / "checkpoints" / "step-00000030" / name)
    assert run(settings_of(memory, copied)) == 0
    said = capfd.readouterr().err
    assert f"passed over: {copied}/checkpoints/step-00000030/{name.split()[0]}: " in said
    assert f"goes on from {copied}/checkpoints/step-00000020\n" in said
    assert_same(copied, whole())


def test_no_valid_checkpoint_is_an_error(memory, copied):
    """Training again from the start without a word would be worse."""
    for path in checkpoints(copied):
        flip(path / "model.safetensors")
    before = (copied / METRICS).read_bytes()
    process = Process(settings_of(memory, copied))
    assert process.wait() == 1
    (line,) = process.errors()
    assert "want a checkpoint of this run, or save.resume=no to begin anew, got 2 others" in line
    assert process.said.count("passed over: ") == 2
    assert (copied / METRICS).read_bytes() == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"optimizer__lr": 1e-3}], ids=str)
def test_a_checkpoint_of_another_run_is_refused(memory, copied, change):
    with pytest.raises(ValueError, match=r"want a checkpoint of this run, or save\.resume=no"):
        run(settings_of(memory, copied, **change))


def test_a_checkpoint_of_another_corpus_is_refused(memory, copied):
    with folder() as other:
        corpus(other / "corpus", documents=16, seed=1)
        with pytest.raises(ValueError, match="want a checkpoint of this run"):
            run(settings_of(other, copied))


def test_anew(memory, copied, whole):
    assert run(settings_of(memory, copied, save__resume="no")) == 0
    assert_same(copied, whole())
    kinds = [r["kind"] for r in read_records(copied / METRICS)]
    assert kinds.count("start") == 1 and "resume" not in kinds


def test_from_a_path(memory, output, whole):
    """Of another run's output, which stays as it is."""
    source = whole() / "checkpoints" / "step-00000020"
    given = settings_of(memory, output, save__resume=str(source))
    assert run(given) == 0
    got, want = last(output), last(whole())
    assert got == want
    assert records(output) == records(whole())[20:]
    assert last(whole())["step"] == STEPS


def test_from_a_path_with_other_micro_batches(memory, output, whole):
    """Larger ones, of which the epoch has not so many: it begins the next."""
    source = checkpoints(whole())[-1]
    larger = {"steps": STEPS + 2, "max_length": 24, "sequences": 64}
    given = settings_of(memory, output, save__resume=str(source), phases=[larger])
    assert run(given) == 0
    assert last(output)["step"] == STEPS + 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_from_a_path_in_another_precision(memory, output, whole, precision):
    more = [{**settings_of(memory, output).to_dict()["phases"][0], "steps": STEPS + 2}]
    changes = {
        "precision": precision,
        "phases": more,
        "save__resume": str(checkpoints(whole())[-1]),
    }
    assert run(settings_of(memory, output, **changes)) == 0
    assert last(output)["step"] == STEPS + 2


def test_from_a_path_beyond_the_end(memory, output, whole):
    fewer = [{**settings_of(memory, output).to_dict()["phases"][0], "steps": 8}]
    given = settings_of(memory, output, phases=fewer, save__resume=str(checkpoints(whole())[-1]))
    with pytest.raises(ValueError, match=f"want a checkpoint of at most 8 steps.*got {STEPS}"):
        run(given)


def test_from_a_path_with_other_words(memory, output, whole):
    """As many, by other ids: nobody would see it in shapes."""
    words = [*VOCABULARY]
    words[-1], words[-2] = words[-2], words[-1]
    with folder() as other:
        corpus(other / "corpus", vocabulary=words)
        given = settings_of(other, output, save__resume=str(checkpoints(whole())[-1]))
        with pytest.raises(
            ValueError, match=r"save\.resume: .*want the vocabulary of data\.corpus"
        ):
            run(given)


@pytest.mark.parametrize(
    ("path", "error"), [("nothing", FileNotFoundError), ("damaged", ValueError)]
)
def test_from_a_path_that_is_none(memory, copied, path, error):
    source = copied / "checkpoints" / "step-00000030"
    flip(source / "model.safetensors")
    wanted = source if path == "damaged" else copied / "nothing"
    with pytest.raises(error, match=r"model\.safetensors|nothing"):
        run(settings_of(memory, copied, save__resume=str(wanted)))


def test_a_run_that_is_done_stays_so(memory, copied, whole):
    given = settings_of(memory, copied)
    assert run(given) == 0
    before = last(copied)
    assert run(given) == 0
    assert last(copied) == before
    assert_same(copied, whole())


def test_only_the_last_ones_are_kept(memory, output):
    assert run(settings_of(memory, output, save__every=4, save__keep=2)) == 0
    assert names(output / "checkpoints") == ["step-00000036", "step-00000040"]
