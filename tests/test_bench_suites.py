"""The suites: their cases, how they are chosen, what they are made of, how long they take."""

import json
import subprocess
import sys

import lengths
import progress
import pytest
import run
import selection
import stages
import suites
import targets
import torch
from bench_cases import CPU, start
from lengths import Lengths
from record import ROOT
from timing import Pulse

BENCHMARKS = ROOT / "benchmarks"
DATA = ROOT.parent / "shared" / "data"


def test_the_cases_of_the_suites():
    """As suites.py lists them: what a user chooses from."""
    for device, size, cases in (
        ("cpu", 17, {"cpu 8x128", "cpu text", "cpu mini wikipedia", "attention s512, large"}),
        ("cuda", 20, {"case 5 text", "gpu squad", "case 9", "attention s512, large"}),
    ):
        every = [name for family in suites.FAMILIES for name in suites.names(family, device)]
        assert cases <= set(every) and len(set(every)) == len(every) > size
    fp32 = [target.key for target in targets.CPU_ROWS]
    assert set(fp32) <= set(suites.names("encoder", "cpu"))
    ends = {target.key for target in targets.END_TO_END}
    on_gpu = {n for f in ("encoder", "pretraining") for n in suites.names(f, "cuda")}
    assert ends <= on_gpu
    for target in targets.KERNELS:
        assert set(target.cases) <= set(suites.names("kernels", "cuda"))


def test_what_is_listed(capsys):
    assert run.main(["pretraining", "--device", "cpu", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith("cpu mini 32x128 ")
    assert lines[2].endswith("BERT-mini, 16 of wikipedia, at most 512, float32, a step with LAMB")


@pytest.mark.parametrize("module", ["ops", "encoder", "pretraining"])
def test_a_file_of_cases_is_its_suite(module):
    argv = [sys.executable, str(BENCHMARKS / f"{module}.py"), "--device", "cpu", "--case", "nope"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2 and "--case: want one of " in done.stderr


# --- lengths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", lengths.NAMES)
def test_lengths_of_a_name(name):
    longest = 0 if name != "full" else 128
    drawn = lengths.draw(name, 500, 3, longest)
    assert drawn == lengths.draw(name, 500, 3, longest) and len(drawn) == 500
    assert min(drawn) >= 2 and max(drawn) <= (longest or lengths.LONGEST[name])
    assert name == "full" or drawn != lengths.draw(name, 500, 4)
    assert max(lengths.draw(name, 50, 3, 20)) == 20
    few = lengths.up_to(name, 1000, 3, longest)
    assert sum(few) <= 1000 and len(few) >= 1 and few == drawn[: len(few)]
    assert len(lengths.up_to(name, 1, 3, longest)) == 1


def test_lengths_that_nobody_has_are_refused():
    for name, longest in (("full", 0), ("prose", 10)):
        with pytest.raises(ValueError, match="want one of full, glue, squad, wikipedia"):
            lengths.draw(name, 3, 0, longest)
    with pytest.raises(ValueError, match="25 % filled: want a fill that lengths of 2 to 32"):
        Lengths("normal", 4, 32, 0.25).draw(0)


@pytest.mark.parametrize(("name", "mean"), [("glue", 36.6), ("squad", 177.0), ("wikipedia", 345.6)])
def test_histograms_are_those_of_the_data(name, mean):
    counts = lengths.histogram(name)
    said = json.loads(lengths.FILE.read_text())[name]
    found = sum(n * of for n, of in counts.items()) / sum(counts.values())
    assert said["mean"] == mean == pytest.approx(found, abs=0.06)
    assert max(counts) <= lengths.LONGEST[name] and min(counts) >= 3
    drawn = lengths.draw(name, 20_000, 1)
    assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.02)


@pytest.mark.skipif(not DATA.exists(), reason="the data of ../shared are not here")
def test_histograms_are_made_from_the_data():
    assert lengths.made(DATA) == json.loads(lengths.FILE.read_text())


def test_orders_are_one_shape_and_as_much_work():
    first, second = Lengths("squad", 8).orders(7, 2)
    assert (
        sorted(first) == sorted(second) == sorted(Lengths("squad", 8).draw(7)) and first != second
    )
    filled = Lengths("normal", 16, 512, 0.6)
    assert max(filled.draw(1)) == 512 and sum(filled.draw(1)) == round(0.6 * 16 * 512)
    assert [str(n) for n in (Lengths("full", 8, 128), filled, Lengths("glue", 32))] == [
        "8 x 128, full",
        "16 x 512, 60 % filled",
        "32 of glue, at most 128",
    ]


def test_a_case_says_how_to_repeat_it():
    for name, family in (
        ("cpu glue", "encoder"),
        ("cpu mini wikipedia", "pretraining"),
        ("layer_norm, base", "kernels"),
    ):
        case, _ = suites.build(name, CPU, small=True)
        assert case.facts["family"] == family == suites.family_of(name)
        command = f"bert-fast bench {family} --device cpu --case '{name}'"
        assert case.facts["command"] == command
        assert "seed" in case.facts and {"model", "op"} & set(case.facts)


# --- the pulse -----------------------------------------------------------------------------------


def test_the_pulse_is_a_product_and_a_copy_whose_rates_are_known(monkeypatch):
    pulse = Pulse(CPU, small=True)
    assert pulse.found() is None
    times = iter((4e-6, 1e-6, 1e-6, 2e-6, 2e-6, 8e-6, 0.0, 1e-6))
    watch, made = pulse._watch, []
    monkeypatch.setattr(
        watch, "time", lambda call, into: made.append(call()) or into.wall.append(next(times))
    )
    for _ in range(4):
        pulse.beat()
    found = pulse.found()
    assert found["tflop_per_s"]["p50"] == pytest.approx(2e-12 * 64**3 / 2e-6)
    assert (found["dtype"], found["side"], found["n"]) == ("float32", 64, 3)  # one took no time
    assert found["bytes"] == 2**12 and made[1].nbytes == 2**12 and bool(made[1].all())
    assert found["gb_per_s"]["p50"] == pytest.approx(
        2e-9 * 2**12 * sum(1 / t for t in (1e-6, 2e-6)) / 2
    )
    assert torch.equal(made[0], Pulse(CPU, small=True)._calls["product"]())


# --- choosing ------------------------------------------------------------------------------------

NAMES = ["case 7 s64", "case 7", "cpu 8x128", "cpu 8x128 bf16", "gpu 32x64", "layer_norm, base"]
NAMES += ["layer_norm fwd+bwd, base", "layer_norm_x, base"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ([], NAMES),
        (["7"], ["case 7 s64", "case 7"]),
        (["case 7"], ["case 7"]),
        (["8x128"], ["cpu 8x128"]),
        (["8x128*"], ["cpu 8x128", "cpu 8x128 bf16"]),
        (["layer_norm"], ["layer_norm, base", "layer_norm fwd+bwd, base"]),
        (["*base", "32x64"], ["gpu 32x64", *NAMES[5:]]),
        (["layer_norm, base"], ["layer_norm, base"]),
    ],
)
def test_cases_are_chosen_by_name(asked, found):
    assert selection.cases(NAMES, asked) == found


@pytest.mark.parametrize("word", ["8x12", "cases", "layer", "", "9"])
def test_a_case_that_is_not_there_is_refused(word):
    with pytest.raises(ValueError, match="want one of case 7 s64, case 7, cpu 8x128"):
        selection.cases(NAMES, [word])


def test_peers_are_chosen_by_name():
    peers = ["transformers sdpa", "transformers sdpa flash", "onnxruntime"]

    def chosen(*asked):
        return selection.peers(peers, asked)

    assert chosen("transformers") == peers[:2] and chosen("transformers sdpa") == peers[:1]
    assert (
        chosen("transformers sdpa*") == peers[:2] and chosen("transformers sdpa f*") == peers[1:2]
    )
    assert chosen("none") == [] and chosen("all") == peers and chosen("onnx*") == peers[2:]


def test_ours_and_the_peers_that_are_asked_for_are_measured(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        stages.harness,
        "measure",
        lambda case, some, run, **how: seen.append([c.name for c in some]),
    )
    one = start(tmp_path)
    one.data["suite"] = "encoder"
    context = stages.Context(one, CPU, True, float("inf"))
    for peers in ([], ["onnxruntime plain"], ["none"], ["all"]):
        one.set("asked", {"cases": ["cpu glue"], "peers": peers})
        stages.perform("cpu glue", context)
    assert seen[0] == [
        "bert_fast",
        "transformers sdpa",
        "nn.TransformerEncoder",
        "onnxruntime plain",
    ]
    assert seen[1:3] == [["bert_fast", "onnxruntime plain"], ["bert_fast"]]
    assert len(seen[3]) == 18


def test_a_case_that_breaks_is_no_success(monkeypatch, tmp_path, capsys):
    def measure(case, candidates, run, **how):
        run.put(case.name, "bert_fast", state="started", why="")
        raise RuntimeError("no")

    monkeypatch.setattr(stages.harness, "measure", measure)
    one = start(tmp_path)
    stages.perform("cpu glue", stages.Context(one, CPU, True, float("inf")))
    (row,) = one.data["rows"]
    assert row["state"] == "failed" and row["why"] == "the case broke: RuntimeError: no"


# --- how far it is -------------------------------------------------------------------------------


def test_the_time_left(capsys):
    now = [0.0]
    steps = {"machine": 10.0, "a": 30.0, "b": 30.0, "c": 30.0}
    with progress.Progress(steps, clock=lambda: now[0]) as bar:
        bar.at("machine")
        assert bar.left() == 100 and bar.share() == 0
        bar.at("nobody knows this")
        now[0] = 20.0  # twice as long as expected
        bar.at("a")
        assert bar.left() == 180 and bar.share() == pytest.approx(0.1)
        now[0] = 50.0
        assert bar.left() == 150 and str(bar) == "2 of 4, a: about 2 min left"
        now[0] = 500.0  # longer than expected: the others are still to come
        assert bar.left() == 120
        bar.at("a")
        bar.at("c")
        assert str(bar).startswith("3 of 4, c:")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "--- 1 of 4, machine: about 2 min left" and len(lines) == 3
    assert [progress.words(s) for s in (0, 89, 91, 3599, 3700)] == [
        "0 s",
        "89 s",
        "2 min",
        "1 h 0 min",
        "1 h 2 min",
    ]
