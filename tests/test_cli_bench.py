"""`bert-fast bench`: finds the scripts of a checkout, passes options on, ends as they do."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import call, process

from bert_fast.cli import bench

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores" / "2026-11-22-5da2356.json"
SUITES = ("kernels", "encoder", "pretraining", "all")
VERBS = (*SUITES, "report", "compare")
TELLS = "import json, os, sys; json.dump([sys.argv, os.getcwd()], open('said.json', 'w'));"


def checkout(root, code=TELLS):
    """A checkout whose scripts run this code."""
    (root / "benchmarks").mkdir(parents=True)
    for name in (*bench._FILES, "report.py", "compare.py"):
        (root / "benchmarks" / name).write_text(code, "utf-8")
    return root


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory; the package stands beside no scripts."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(bench, "_BESIDE", tmp_path / "nothing")
    return tmp_path / "here"


def said(capfd, *arguments):
    """What the script was called with: its name and its arguments."""
    status, out, err = call(capfd, "bench", *arguments)
    assert (status, out, err) == (0, "", "")
    argv, where = json.loads(Path("said.json").read_text("utf-8"))
    assert where == os.getcwd()
    return [Path(argv[0]).name, *argv[1:]]


# --- help ----------------------------------------------------------------------------------------


def test_the_group_is_said_in_whole(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = call(capfd, "--help")[1]
    assert "\n  bench  " in out and "..." not in out.partition("Commands:")[2]
    status, out, err = call(capfd, "bench")
    assert (status, out) == (2, "") and err.startswith("Usage: bert-fast bench ")


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_of_the_help_work(verb, capfd, tmp_path, monkeypatch):
    if verb == "report":
        pytest.importorskip("matplotlib", reason="draws with matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    for name in ("before.json", "after.json", "results/run.json"):
        shutil.copy(KEPT, tmp_path / name)
    text = call(capfd, "bench", verb, "--help")[1].partition("Example:\n")[2]
    lines = [shlex.split(line) for line in text.splitlines() if line.strip()]
    assert lines and all(line[:3] == ["bert-fast", "bench", verb] for line in lines)
    for _, *arguments in lines:
        status, out, err = call(capfd, *arguments)
        assert status == 0, (arguments, out, err)
        assert "--list" not in arguments or out.strip()
        assert "--out" not in arguments or any((tmp_path / arguments[-1]).iterdir())
    for path in (tmp_path / "runs").glob("*.json"):
        rows = json.loads(path.read_text("utf-8"))["rows"]
        states = [row["state"] for row in rows if row["candidate"] == "bert_fast"]
        assert states and set(states) == {"measured"}, states


# --- what the scripts get ------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_options_are_passed_on(suite, capfd, folder):
    checkout(folder)
    assert said(capfd, suite) == ["run.py", suite, "--device=auto"]
    given = ["--case", "8x128 bf16", "--case", "-x*", "--peers", "none", "--peers", "onnxruntime"]
    given += ["--device", "cuda", "--small", "--list", "--out", "a b", "--debug"]
    assert said(capfd, suite, *given) == [
        *("run.py", suite, "--device=cuda", "--case=8x128 bf16", "--case=-x*"),
        *("--peers=none", "--peers=onnxruntime", "--small", "--list", "--out=a b"),
    ]


def test_report_and_compare(capfd, folder):
    checkout(folder)
    assert said(capfd, "report", "a", "b") == ["report.py", "--out=report", "--", "a", "b"]
    assert said(capfd, "report", "a", "--out", "c") == ["report.py", "--out=c", "--", "a"]
    assert said(capfd, "compare", "a", "b") == ["compare.py", "--fail-over=5.0", "--", "a", "b"]
    given = ["compare", "--fail-over", "2.5", "--all", "--", "-a", "b"]
    assert said(capfd, *given) == ["compare.py", "--fail-over=2.5", "--all", "--", "-a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encoder", "--device", "tpu"], "--device"),
        (["encoder", "case 5"], "case 5"),
        (["compare", "a"], "Missing argument 'B'. See bert-fast bench compare --help"),
        (["compare", "a", "b", "--fail-over", "x"], "--fail-over"),
        (["report"], "Missing argument 'RESULTS...'. See bert-fast bench report --help"),
        (["nope"], "No such command 'nope'. See bert-fast bench --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_command_lines_run_nothing(arguments, message, capfd, folder):
    checkout(folder)
    status, out, err = call(capfd, "bench", *arguments)
    assert (status, out) == (2, "") and err.startswith("bert-fast: error: ") and message in err
    assert err.count("\n") == 1 and not (folder / "said.json").exists()


# --- where they are ------------------------------------------------------------------------------


def test_those_beside_the_package_come_first(capfd, folder, monkeypatch):
    checkout(folder, "raise SystemExit(7)")
    monkeypatch.setattr(bench, "_BESIDE", checkout(folder.parent / "beside"))
    assert said(capfd, "all") == ["run.py", "all", "--device=auto"]


def test_beside_this_package_they_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert bench._benchmarks() == ROOT / "benchmarks"


@pytest.mark.parametrize("what", ["nothing", "another's"])
def test_without_a_checkout(what, capfd, folder):
    if what == "another's":  # a folder of that name, with a script of that name
        checkout(folder)
        (folder / "benchmarks" / "ledger.py").unlink()
    for verb in (["all"], ["report", "a"], ["compare", "a", "b"]):
        status, out, err = call(capfd, "bench", *verb)
        assert (status, out) == (1, "") and err.count("\n") == 1
        assert err.startswith("bert-fast: error: want a checkout of bert_fast, whose benchmarks/ ")
        assert "git clone it and run from there" in err
    assert not (folder / "said.json").exists()


# --- how they end --------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 2, 3, 75])
def test_the_status_is_that_of_the_script(status, capfd, folder):
    checkout(folder, f"import sys; print('out'); print('err', file=sys.stderr); sys.exit({status})")
    assert call(capfd, "bench", "all") == (status, "out\n", "err\n")


def test_a_script_that_a_signal_ended(capfd, folder):
    checkout(folder, "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    before = signal.getsignal(signal.SIGTERM)
    assert call(capfd, "bench", "all")[0] == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


WAITS = """
import signal, sys, time
def end(number, frame):
    print("child got", number, flush=True)
    sys.exit(130 if number == signal.SIGINT else 143)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "everyone", "status"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)]
)
def test_ctrl_c_and_sigterm_reach_the_script(number, everyone, status, tmp_path):
    """Ctrl-C goes to all processes of the terminal, SIGTERM to one; no traceback, none left."""
    beside = checkout(tmp_path / "beside", WAITS)
    code = "import sys; from pathlib import Path; from bert_fast.cli import bench, main;"
    code += f"bench._BESIDE = Path({str(beside)!r}); sys.exit(main(['bench', 'all']))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes)
    try:
        assert child.stdout.readline() == "ready\n"
        (os.killpg if everyone else os.kill)(child.pid, number)
        out, err = child.communicate(timeout=60)  # until whoever has the pipe is gone, too
    finally:
        child.kill()
    assert (child.returncode, out) == (status, f"child got {int(number)}\n")
    assert err == ("bert-fast: error: interrupted\n" if everyone else "")


def test_compare_as_it_is(capfd, tmp_path):
    """With the results of this repository."""
    slow = json.loads(KEPT.read_text("utf-8"))
    for row in slow["rows"]:
        for name in ("p20", "p50", "p80") if row["state"] == "measured" else ():
            row["wall"][name] *= 1.2
    (tmp_path / "slow.json").write_text(json.dumps(slow), "utf-8")
    status, out, err = call(capfd, "bench", "compare", KEPT, tmp_path / "slow.json")
    assert (status, err) == (1, "") and "7 regressions (> 5 % and beyond noise)\n" in out
    assert call(capfd, "bench", "compare", tmp_path / "slow.json", KEPT)[0] == 0
    status, out, err = call(capfd, "bench", "compare", KEPT, tmp_path / "none.json")
    assert (status, out) == (2, "") and err.startswith("compare: ")
    status, out, err = call(capfd, "bench", "compare", KEPT, KEPT, "--fail-over", "-1")
    assert (status, out) == (2, "") and "want a percentage above 0" in err


def test_as_a_module():
    assert process("bench", "compare", KEPT, KEPT)[0] == 0
