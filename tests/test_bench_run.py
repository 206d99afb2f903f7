"""benchmarks/run.py, builds.py, proof.py and checkout.py: what surrounds the measuring."""

import json
import subprocess
import sys
import time
from pathlib import Path

import builds
import proof
import pytest
import run
import selection
import torch
import tunables
from bench_cases import CPU, start
from record import ROOT

BENCHMARKS = ROOT / "benchmarks"


def main(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["run.py", *argv])
    return run.main()


LISTED = {
    "kernels": ["layer_norm, base", "layer_norm, large"],
    "encoder": ["cpu 1x128", "cpu 8x128", "cpu 8x128 bf16", "cpu glue"],
    "pretraining": ["cpu mini 32x128"],
}


@pytest.fixture
def listed(monkeypatch):
    """Cases without torch; returns what was asked for."""
    asked = []

    def listed(suite, device, small):
        asked.append((suite, device, small))
        families = [suite] if suite != "all" else [*LISTED]
        return [
            {"name": name, "family": family, "what": "made up", "seconds": 10.0}
            | {"memory": family != "kernels"}
            for family in families
            for name in LISTED[family]
        ]

    monkeypatch.setattr(run, "listed", listed)
    return asked


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["encoder", "--case", "1x129"], "--case: want one of cpu 1x128, cpu 8x128, cpu 8x128 "),
        (["encoder", "1x128"], "encoder: want no more arguments, got 1x128"),
        (["encoder", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["gpu", "3"], "gpu: want no more arguments, got 3"),
        (["gpu", "--case", "3"], "gpu: it has one form"),
        (["proof", "--small"], "proof: it has one form"),
        (["proof", "tests"], "proof: want no more arguments, got tests"),
        (["tune", "gelu.FWD_TILES", "gelu"], "tune: want attention.SHORT, attention.LONG, "),
        (["cpu"], "invalid choice"),
        ([], "required: suite"),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, tmp_path, listed, argv, message):
    with pytest.raises(SystemExit) as end:
        main(monkeypatch, *argv, "--out", str(tmp_path))
    assert end.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_stages_for_a_gpu():
    gpu = run.stages_of("gpu", [])
    assert [stage.name for stage in gpu][:2] == ["build", "machine"]
    assert {"smoke", "ops", "case 3", "case 5", "case 8"} <= {stage.name for stage in gpu}
    assert sum(stage.seconds for stage in gpu) <= 9 * 60 - 10  # the grace of the last one
    assert sum(stage.seconds for stage in run.stages_of("proof", [])) <= 600 - 10
    tune = run.stages_of("tune", [])
    assert [s.name for s in tune][:3] == ["machine", "tune compile", "tune attention.SHORT"]
    assert sum(s.seconds for s in tune) <= 9 * 60 - 10 and min(s.seconds for s in tune) >= 15
    few = run.stages_of("tune", ["gelu.FWD_TILES"])
    assert [s.name for s in few] == ["machine", "tune compile", "tune gelu.FWD_TILES"]


def test_stages_of_the_suites(listed):
    def stages(suite, device):
        return run.stages_for(run.listed(suite, device, False), device)

    names = [stage.name for stage in stages("all", "cpu")]
    assert names == ["machine", "kernels", *LISTED["encoder"], "cpu mini 32x128", "memory"]
    assert [stage.name for stage in stages("kernels", "cpu")] == ["machine", "kernels"]
    assert [stage.name for stage in stages("kernels", "cuda")] == ["build", "machine", "kernels"]
    one = run.stages_for(run.listed("pretraining", "cuda", False), "cuda")
    assert [stage.name for stage in one] == ["build", "machine", "cpu mini 32x128"]
    assert sum(stage.seconds for stage in one) <= 600 - 10  # what a lent machine gives a command
    steps = run.expected(run.listed("all", "cpu", False), stages("all", "cpu"))
    assert [*steps][:3] == ["machine", "layer_norm, base", "layer_norm, large"]
    assert "kernels" not in steps and all(seconds > 0 for seconds in steps.values())


@pytest.mark.parametrize(
    ("argv", "gpu", "small", "on", "name"),
    [
        (["gpu"], False, True, "cpu", "gpu-2"),
        (["gpu"], True, False, "cuda", "gpu-2"),
        (["tune", "gelu.FWD_TILES"], False, True, "cpu", "tune-gelu.FWD_TILES-2"),
        (["tune"], True, False, "cuda", "tune-2"),
        (["encoder", "--case", "8x128 bf16"], False, False, "cpu", "encoder-8x128-bf16-2"),
        (["encoder", "--device", "cpu", "--case", "glue"], True, False, "cpu", "encoder-glue-2"),
        (["all", "--device", "cuda"], False, True, "cpu", "all-2"),
        (["kernels"], True, False, "cuda", "kernels-2"),
        (["kernels", "--small", "--peers", "none"], False, True, "cpu", "kernels-2"),
    ],
)
def test_a_run_says_what_it_is(monkeypatch, capsys, tmp_path, listed, argv, gpu, small, on, name):
    commands, noted = [], []

    def supervise(path, stages, command, note):
        commands.extend(command(stage, 12.5, 7) for stage in stages)
        noted.extend(stages)
        for stage in stages:
            note(stage.name)
        return 0

    monkeypatch.setattr(run, "has_gpu", lambda: gpu)
    monkeypatch.setattr(run, "supervise", supervise)
    assert main(monkeypatch, *argv, "--out", str(tmp_path)) == 0
    (path,) = tmp_path.iterdir()
    data = json.loads(path.read_text())
    assert path.name.startswith(name) and path.suffix == ".json"
    assert data["rehearsal"] is small and data["suite"] == argv[0]
    assert str(tmp_path) not in data["command"]
    if argv[0] in selection.SUITES:
        asked = "cuda" if "cuda" in argv or on == "cuda" else "cpu"
        assert listed == [(argv[0], asked, small)]
        assert data["command"].startswith(f"bert-fast bench {argv[0]} --device {asked}")
        assert ("--small" in data["command"]) is small
        peers = [argv[argv.index("--peers") + 1]] if "--peers" in argv else []
        assert data["asked"]["peers"] == peers
        if "--case" in argv:
            assert data["asked"]["cases"] == [f"cpu {argv[argv.index('--case') + 1]}"]
    else:
        assert data["command"] == " ".join(["python benchmarks/run.py", *argv])
    if argv[0] == "tune":
        assert data["tune"] == {"asked": argv[1:] or tunables.tables()}
    said = capsys.readouterr().out
    assert ("othing of it is a result" in said) is small
    assert ("to keep it" in said) is not small
    for found, stage in zip(commands, noted, strict=True):
        assert found[2:5] == [str(BENCHMARKS / "stages.py"), stage.name, str(path)]
        assert found[found.index("--device") + 1] == on
        assert found[found.index("--until") + 1] == "12.5"
        assert found[found.index("--heart") + 1] == "7" and ("--small" in found) is small


# --- builds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1])
def test_a_build_that_fails_is_told_and_the_run_goes_on(monkeypatch, tmp_path, status):
    real = subprocess.Popen
    code = f"print('{ROOT}/csrc/x.cpp:1: error: no'); raise SystemExit({status})"
    asked = []

    def popen(argv, **how):
        asked.append((argv[1:], how["env"]["BERT_FAST_EXT"], how["cwd"]))
        return real([sys.executable, "-c", code], **how)

    monkeypatch.setattr(builds.subprocess, "Popen", popen)
    one = start(tmp_path)
    builds.everything(one, CPU)
    found = json.loads(one.path.read_text())["build"]
    assert asked == [(["setup.py", "-q", "build_ext", "--inplace"], "1", ROOT)]
    assert found["kernels"]["compiled"] == [] and found["kernels"]["why"].startswith("no GPU")
    assert found["extension"]["built"] is (status == 0)
    assert found["extension"].get("why") == ("./csrc/x.cpp:1: error: no" if status else None)


def test_rows_that_a_kernel_serves(monkeypatch):
    from types import SimpleNamespace

    import bert_fast.ops

    def served(*names):
        by = {
            op: "triton" if op in names else "reference" for op in ("embed", "attention", "unpad")
        }
        table = {op: {"cuda": SimpleNamespace(name=name)} for op, name in by.items()}
        monkeypatch.setattr(bert_fast.ops, "implementations", lambda: table)
        return builds.triton_calls()

    assert served() == []
    dtypes = "float32", "bfloat16", "float16"
    assert served("embed") == [
        ("embed", "bfloat16", "large"),
        *(("embed", dtype, "odd") for dtype in dtypes),
    ]
    large = [name for name, _, size in served("attention") if size == "large"]
    assert large == ["attention mixed", "attention s512 dropout"]


def test_kernels_that_do_not_compile_are_named(monkeypatch):
    """A process that dies ends those beside it too; each has its reason."""
    from concurrent.futures import Future
    from concurrent.futures.process import BrokenProcessPool

    class Pool:
        def __init__(self, workers, mp_context):
            assert 1 <= workers <= 3

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

        def submit(self, call, name, dtype, size):
            future = Future()
            if name == "dies":
                future.set_exception(BrokenProcessPool("terminated abruptly"))
            else:
                future.set_result("" if name == "fine" else "CompilationError: no")
            return future

    monkeypatch.setattr(builds, "ProcessPoolExecutor", Pool)
    calls = [(name, "float16", "odd") for name in ("fine", "wrong", "dies")]
    monkeypatch.setattr(builds, "triton_calls", lambda: calls)
    found = builds.compile_kernels(torch.device("cuda"))
    assert found["compiled"] == ["fine, float16, odd"]
    assert found["failed"] == {
        "wrong, float16, odd": "CompilationError: no",
        "dies, float16, odd": "BrokenProcessPool: terminated abruptly",
    }


# --- proof ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "said", "says"),
    [
        (0, "....\n12 passed in 3 s\n\n", "12 passed in 3 s"),
        (1, "F\n1 failed, 11 passed", "1 failed, 11 passed"),
        (None, "....", "cut short, its time was over: ...."),
        (5, "", ""),
    ],
)
def test_the_tests_are_a_proof(monkeypatch, tmp_path, status, said, says):
    commands = []
    monkeypatch.setattr(
        proof, "_run", lambda argv, *a, **k: commands.append(argv) or (status, said)
    )
    one = start(tmp_path)
    if status:
        with pytest.raises(RuntimeError, match="tests: want no failure"):
            proof.tests(one, float("inf"))
    else:
        proof.tests(one, float("inf"))
    found = json.loads(one.path.read_text())["proof"]["tests"]
    assert (found["status"], found["says"]) == (status, says)
    assert "-n" in commands[0]
    monkeypatch.setattr(proof, "find_spec", lambda name: None)  # a machine without pytest-xdist
    with pytest.raises(RuntimeError) if status else open(one.path):
        proof.tests(one, float("inf"))
    assert "-n" not in commands[1] and "--dist" not in commands[1]


def test_a_sanitizer_that_is_absent_is_told(tmp_path):
    one = start(tmp_path)
    for tool in proof.SANITIZERS:
        proof.sanitizer(tool, one, CPU, float("inf"))
    found = json.loads(one.path.read_text())["proof"]
    assert {tool: found[tool]["says"] for tool in found} == dict.fromkeys(
        proof.SANITIZERS, "absent: no GPU"
    )


@pytest.mark.parametrize("status", [0, 86, None])
def test_what_a_sanitizer_says(monkeypatch, tmp_path, status):
    summary = "========= ERROR SUMMARY: 2 errors" if status else "========= ERROR SUMMARY: 0 errors"
    variables = {}

    def fake(argv, until, **how):
        variables.update(how)
        part = Path(argv[argv.index("smoke") + 1])
        rows = json.loads(part.read_text())
        rows["rows"] = [{"case": "x", "candidate": "bert_fast", "state": "passed"}]
        part.write_text(json.dumps(rows))
        return status, f"first\n{summary}\n"

    monkeypatch.setattr(proof, "_run", fake)
    monkeypatch.setattr(proof.shutil, "which", lambda name: sys.executable)
    one = start(tmp_path)
    if status == 86:
        with pytest.raises(RuntimeError, match="memcheck: ERROR SUMMARY: 2 errors"):
            proof.sanitizer("memcheck", one, torch.device("cuda"), float("inf"))
    else:
        proof.sanitizer("memcheck", one, torch.device("cuda"), float("inf"))
    says = json.loads(one.path.read_text())["proof"]["memcheck"]["says"]
    cut = ", cut short: its time was over" if status is None else ""
    assert says == f"{summary.removeprefix('========= ')}; 1 cases passed under it{cut}"
    assert variables == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_command_past_its_time_is_ended_though_its_children_live(monkeypatch):
    monkeypatch.setattr(proof, "_LAST_WORDS", 0.2)
    code = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '4'])"
    begin = time.monotonic()
    status, said = proof._run([sys.executable, "-c", code], begin)
    assert status is None and said == "begun\n" and time.monotonic() - begin < 3.5
    assert proof._run([sys.executable, "-c", "print(3); exit(5)"], float("inf")) == (5, "3\n")


# --- checkout ------------------------------------------------------------------------------------

CHECKOUT = """
import importlib.util, sys
if {installed}:  # another checkout, in the way that an editable installation is found
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "bert_fast.kernels":
                return importlib.util.spec_from_file_location(name, {other!r})
    sys.meta_path[:] = [f for f in sys.meta_path if "_Editable" not in str(f)] + [Finder()]
else:
    sys.meta_path[:] = [f for f in sys.meta_path if "_Editable" not in str(f)]
    assert importlib.util.find_spec("bert_fast") is None
import checkout
import bert_fast, bert_fast.kernels
print(bert_fast.__file__, bert_fast.kernels.__file__)
"""


@pytest.mark.parametrize("installed", [False, True])
def test_bert_fast_is_that_of_this_checkout(tmp_path, installed):
    other = tmp_path / "kernels.py"
    other.write_text("")
    code = CHECKOUT.format(installed=installed, other=str(other))
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n{code}"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == [str(ROOT / "bert_fast/__init__.py"), str(ROOT / "kernels/__init__.py")]
