"""benchmarks/supervise.py: what is left after deadlines, crashes and signals."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import supervise
from record import Run
from supervise import Stage

HERE = Path(__file__).resolve().parent
CHILD = HERE / "bench_stages.py"


def command(stage, until, heart):
    return [sys.executable, "-u", str(CHILD), stage.name, str(command.path), str(until), str(heart)]


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A run's file; stages are stopped quickly."""
    monkeypatch.setattr(supervise, "_GRACE", 0.5)
    monkeypatch.setattr(supervise, "_LAST_WORDS", 0.5)
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    command.path = Run.start(tmp_path / "run.json", "test", "python test").path
    return command.path


def read(path):
    """The file's content, its rows by candidate."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return data, {row["candidate"]: row for row in data["rows"]}


def lives(pid):
    """Whether a process runs; one that ended and that nobody has asked about does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path("/proc/self").exists()


def wait_for(what, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < end:
        time.sleep(0.02)
    assert found, "it did not come"
    return found


def test_lives():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert lives(process.pid)
    process.communicate(b"\n")
    assert not lives(process.pid)


def test_stages_past_their_deadline_and_broken_ones(path, capfd):
    """What the first stages leave goes to the next; each ends in its own way, and all are run."""
    begin = time.monotonic()
    stages = [Stage("good", 2.5), Stage("deaf", 0.5), Stage("broken", 4), Stage("good", 4)]
    assert supervise.supervise(path, stages, command) == 1
    took = time.monotonic() - begin
    data, rows = read(path)
    good, deaf, broken, last = data["stages"]
    assert [stage["stage"] for stage in data["stages"]] == ["good", "deaf", "broken", "good"]
    assert good["ended"] == last["ended"] == "done"
    assert deaf["ended"] == "past its deadline"
    assert broken["ended"] == "broke: its process ended with exit status 3"
    assert good["deadline_s"] == 2.5
    assert deaf["deadline_s"] == pytest.approx(3.0 - good["seconds"], abs=0.3)
    assert deaf["seconds"] < deaf["deadline_s"] + 0.5 + 1.0  # the grace, and what 2 cores need
    assert broken["deadline_s"] == pytest.approx(7.0 - good["seconds"] - deaf["seconds"], abs=0.5)
    assert took < 11.0 and data["ended"] == "in parts" and data["finished"]
    late = "past the deadline of stage deaf"
    assert rows["timed"]["state"] == "measured" and "cut" not in rows["timed"]
    for name, why in (("half", late), ("hangs", f"{late}, while it ran and did not stop")):
        assert (rows[name]["state"], rows[name]["cut"]) == ("measured", True)
        assert rows[name]["why"] == why and rows[name]["wall"]["n"] == 2
    assert (rows["waits"]["state"], rows["waits"]["why"]) == ("unfinished", late)
    assert (rows["begun"]["state"], rows["begun"]["why"]) == ("unfinished", "stage broken broke")
    assert data["until"] == pytest.approx(begin + 11.0 - supervise._MARGIN, abs=0.3)
    assert len(data["pids"]) == 5 and not any(map(lives, data["pids"]))
    assert sorted(p.name for p in path.parent.iterdir()) == ["run.json", "run.log"]
    log = path.with_suffix(".log").read_text(encoding="utf-8")
    assert "--- deaf (2 of 4" in log and "hanging ≥ 1 s" in log and log == capfd.readouterr().out


def test_it_tells_which_case_is_under_way(path):
    noted = []
    stages = [Stage("good", 60), Stage("talks", 60)]
    assert supervise.supervise(path, stages, command, noted.append) == 0
    assert list(dict.fromkeys(noted)) == ["good", "talks"]
    noted.clear()
    supervise.supervise(path, [Stage("deaf", 1.5)], command, noted.append)
    assert list(dict.fromkeys(noted)) == ["deaf", "case x"]


def test_a_candidate_that_hangs_beyond_its_limit_is_killed_and_the_others_go_on(path, monkeypatch):
    monkeypatch.setattr(supervise, "_GRACE", 0.3)
    begin = time.monotonic()
    assert supervise.supervise(path, [Stage("hangs", 60)], command) == 0
    assert time.monotonic() - begin < 20
    data, rows = read(path)
    why = "its process hung, and was killed"
    assert (rows["hangs"]["state"], rows["hangs"]["why"]) == ("failed", why)
    assert rows["lives"]["state"] == "measured" and data["stages"][0]["restarts"] == 1
    assert not any(map(lives, data["pids"]))


def test_a_process_that_dies_is_started_again_without_who_killed_it(path):
    assert supervise.supervise(path, [Stage("dies", 30)], command) == 0
    data, rows = read(path)
    whys = {
        "exit 7": "its process ended with exit status 7",
        "exit 0": "its process ended with exit status 0",
        "segfault": "its process died of SIGSEGV",
        "abort": "its process died of SIGABRT",
        "real-time signal": f"its process died of signal {signal.SIGRTMIN + 3}",
    }
    for name, why in whys.items():
        assert (rows[name]["state"], rows[name]["why"]) == ("failed", why)
        assert not {"wall", "device", "rate", "cut"} & set(rows[name])
    assert rows["lives"]["state"] == "measured"
    (stage,) = data["stages"]
    assert (stage["ended"], stage["restarts"]) == ("done", 5)
    assert len(data["pids"]) == 6 and data["ended"] == "complete"


def test_restarts_are_bounded(path, monkeypatch):
    monkeypatch.setattr(supervise, "_MOST_RESTARTS", 2)
    assert supervise.supervise(path, [Stage("lost", 30), Stage("dies", 30)], command) == 1
    data, rows = read(path)
    lost, dies = data["stages"]
    assert (lost["ended"], lost["restarts"]) == ("broke: its process ended with exit status 75", 2)
    assert (dies["ended"], dies["restarts"]) == ("broke: its process died of SIGSEGV", 2)
    assert len(data["pids"]) == 6 and "abort" not in rows


def test_wrong_answers_of_our_own_are_an_exit_status(path):
    assert supervise.supervise(path, [Stage("wrong", 30)], command) == 1
    assert read(path)[0]["ended"] == "complete"


def test_a_child_that_left_the_group_does_not_hold_the_run_up(path):
    begin = time.monotonic()
    try:
        stages = [Stage("leaves children", 10), Stage("good", 10)]
        assert supervise.supervise(path, stages, command) == 0
        assert time.monotonic() - begin < 8
        data, rows = read(path)
        assert rows["good"]["state"] == "measured"
        assert len(data["pids"]) == 3 and not any(map(lives, data["pids"]))
    finally:
        os.kill(read(path)[0]["left"], signal.SIGKILL)


SUPERVISOR = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {benchmarks!r}]
import supervise
supervise._GRACE = {grace}
stages = [supervise.Stage(name, 60) for name in sys.argv[2:]]
def command(stage, until, heart):
    return [sys.executable, "-u", {child!r}, stage.name, sys.argv[1], str(until), str(heart)]
raise SystemExit(supervise.supervise(Path(sys.argv[1]), stages, command))
"""


def supervisor(path, *stages, child=CHILD, grace=5.0, **how):
    """Start a supervisor as a process of its own."""
    benchmarks = str(HERE.parent / "benchmarks")
    script = SUPERVISOR.format(
        tests=str(HERE), benchmarks=benchmarks, child=str(child), grace=grace
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, str(path), *stages],
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | how,
    )


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT, signal.SIGINT]],
)
def test_a_signal_ends_the_run_and_rows_stay(path, signals):
    """The second one comes while the stage writes what it has."""
    stage = "waits, slow" if len(signals) > 1 else "waits"
    process = supervisor(path, "good", stage, "good")
    wait_for(lambda: read(path)[0].get("ready"))
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    assert process.wait(30) == 130, process.stderr.read()
    data, rows = read(path)
    assert data["ended"] == "interrupted" and data["finished"]
    assert [stage["ended"] for stage in data["stages"]] == ["done", "interrupted"]
    assert rows["good"]["state"] == "measured" and "cut" not in rows["good"]
    # its `finally` wrote once more
    assert [rows[name]["wall"]["n"] for name in ("good", "a")] == [3, 3]
    for name in "ab":
        assert (rows[name]["state"], rows[name]["cut"]) == ("measured", True)
        assert rows[name]["why"] == "interrupted"
    assert (rows["c"]["state"], rows["c"]["why"]) == ("unfinished", "interrupted")
    assert not any(map(lives, data["pids"]))
    assert sorted(p.name for p in path.parent.iterdir()) == ["run.json", "run.log"]


def test_a_signal_ends_a_stage_that_does_not_listen(path):
    process = supervisor(path, "deaf", "good", grace=0.5)
    wait_for(lambda: len(read(path)[0].get("pids", [])) == 2 and list(path.parent.glob(".run*")))
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130, process.stderr.read()
    data, rows = read(path)
    assert data["ended"] == "interrupted" and rows["hangs"]["cut"] is True
    assert rows["hangs"]["why"] == "interrupted, while it ran and did not stop"
    assert not any(map(lives, data["pids"]))
    assert sorted(p.name for p in path.parent.iterdir()) == ["run.json", "run.log"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_stage_ends_with_a_supervisor_that_is_killed(path):
    process = supervisor(path, "waits")
    wait_for(lambda: read(path)[0].get("ready"))
    process.kill()
    process.wait(30)
    data, rows = read(path)
    (pid,) = data["pids"]
    wait_for(lambda: not lives(pid), 5)
    assert read(path)[1] == rows and rows["a"]["wall"]["n"] == 2  # whole, as it was


@pytest.mark.parametrize("how", ["nobody reads", "ASCII"])
def test_what_cannot_be_printed_is_in_the_log(path, monkeypatch, how):
    """And no stage waits for a reader that has gone."""
    if how == "ASCII":
        monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
        monkeypatch.setenv("PYTHONUTF8", "0")
    child = CHILD
    if how == "ASCII":  # of the supervisor alone
        child = path.with_name("child.py")
        child.write_text(
            "import os, sys\nos.environ['PYTHONIOENCODING'] = 'utf-8'\n"
            f"os.execv(sys.executable, [sys.executable, {str(CHILD)!r}, *sys.argv[1:]])\n"
        )
    process = supervisor(path, "talks", "good", child=child, stdout=subprocess.PIPE)
    if how == "nobody reads":
        process.stdout.close()
        assert process.wait(60) == 0, process.stderr.read()
    else:
        assert b"line 7" not in process.communicate(timeout=60)[0] and process.returncode == 0
    data, rows = read(path)
    assert data["ended"] == "complete" and rows["talks"]["state"] == "measured"
    assert "line 2999 ≥ 0" in path.with_suffix(".log").read_text(encoding="utf-8")


HARNESS = """
import os, resource, signal, sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}, {benchmarks!r}]
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import torch
torch.set_num_threads(1)
from bench_cases import Fake, candidates, case, in_blocks
from bench_stages import spin
from harness import measure
from record import Run

stage, path, until, heart = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)
run = Run.open(Path(path), int(heart))
run.set("pids", [*run.data.get("pids", []), os.getpid()])

def segfault(*_):
    os.kill(os.getpid(), signal.SIGSEGV)

def nap(i, x):
    time.sleep(0.002)

def hang(i, x):
    nap(i, x)
    if any("wall" in row for row in run.data["rows"]):
        Path(path).with_name("hangs").touch()
        spin()

def last_check():
    calls = []
    return lambda x: calls.append(1) or (segfault() if len(calls) > 2 else in_blocks(x))

fakes = dict(
    dies=[Fake("first", run=nap), Fake("prepare", prepare=lambda: os._exit(0)),
          Fake("check", segfault), Fake("rounds", run=lambda i, x: i == 5 and os.abort()),
          Fake("at last", last_check()), Fake("last", run=nap)],
    waits=[Fake("a", run=nap), Fake("b", run=nap)],
    hangs=[Fake("a", run=nap), Fake("hangs", run=hang), Fake("b", run=nap)],
)[stage]
try:
    measure(case(), candidates(fakes), run, rounds=8 if stage == "dies" else 10**6, seconds=1e6)
except KeyboardInterrupt:
    run.save()
    raise SystemExit(130)
"""


@pytest.fixture
def harness_child(path):
    child = path.with_name("child.py")
    benchmarks = str(HERE.parent / "benchmarks")
    child.write_text(HARNESS.format(tests=str(HERE), benchmarks=benchmarks))
    return child


def test_candidates_that_kill_the_harness(path, harness_child, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "CHILD", harness_child)
    assert supervise.supervise(path, [Stage("dies", 120)], command) == 0
    data, rows = read(path)
    whys = {
        "prepare": "its process ended with exit status 0",
        "check": "its process died of SIGSEGV",
        "rounds": "its process died of SIGABRT",
        "at last": "its process died of SIGSEGV",
    }
    for name, why in whys.items():
        assert (rows[name]["state"], rows[name]["why"]) == ("failed", why)
        assert not {"wall", "device", "rate"} & set(rows[name])
    for name in ("first", "last"):
        assert rows[name]["state"] == "measured" and rows[name]["wall"]["n"] == 8
        assert "cut" not in rows[name] and rows[name]["why"] == ""
    assert list(rows) == ["first", *whys, "last"]
    assert data["stages"][0]["restarts"] == 4 and data["ended"] == "complete"


def test_ctrl_c_and_a_hang_in_the_rounds(path, harness_child, tmp_path):
    """Two supervisors side by side: one gets Ctrl-C, in the other a candidate never returns."""
    other = Run.start(tmp_path / "other" / "run.json", "test", "python test").path
    stopped = supervisor(path, "waits", child=harness_child)
    hung = supervisor(other, "hangs", child=harness_child, grace=0.5)
    wait_for(lambda: "wall" in read(path)[1].get("a", {}))
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait(30) == 130, stopped.stderr.read()
    data, rows = read(path)
    for name in "ab":
        assert (rows[name]["state"], rows[name]["cut"]) == ("measured", True)
        assert rows[name]["why"] == "interrupted" and rows[name]["wall"]["n"] > 10
    assert abs(rows["a"]["wall"]["n"] - rows["b"]["wall"]["n"]) <= 1
    assert "after" in data["cases"]["case x"]["clocks"]
    assert not any(map(lives, data["pids"]))
    wait_for(other.with_name("hangs").exists)
    hung.send_signal(signal.SIGINT)
    assert hung.wait(30) == 130, hung.stderr.read()
    data, rows = read(other)
    for name in ("a", "hangs", "b"):
        assert (rows[name]["state"], rows[name]["cut"]) == ("measured", True)
    assert rows["hangs"]["why"] == "interrupted, while it ran and did not stop"
    assert not any(map(lives, data["pids"]))


@pytest.mark.parametrize(
    ("says", "status", "found"),
    [("GPU 0: NVIDIA H200", 0, True), ("GPU 0: lost", 9, False), ("No devices", 0, False)],
)
def test_has_gpu(tmp_path, monkeypatch, says, status, found):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert supervise.has_gpu() is found
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert supervise.has_gpu() is False


def test_the_supervisor_needs_no_torch():
    """A GPU in a bad state cannot take it down."""
    code = "import sys; import run, supervise, record; sys.exit('torch' in sys.modules)"
    benchmarks = HERE.parent / "benchmarks"
    assert subprocess.run([sys.executable, "-c", code], cwd=benchmarks, check=False).returncode == 0
