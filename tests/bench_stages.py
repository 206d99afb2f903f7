"""A stage's process for the tests of the supervisor: python bench_stages.py STAGE FILE UNTIL HEART.

Says its own process id, and those of the processes it starts, in the run's "pids".
"""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from record import FINAL, Run

CASE = "case x"
WALL = {"p20": 1.0, "p50": 1.0, "p80": 1.0, "n": 2}
DEATHS = {
    "exit 7": lambda: os._exit(7),
    "exit 0": lambda: os._exit(0),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "abort": os.abort,
    "real-time signal": lambda: os.kill(os.getpid(), signal.SIGRTMIN + 3),
}


def timed(run: Run, name: str, state: str) -> None:
    """Leave a row with times."""
    run.put(CASE, name, state=state, why="", wall=WALL, device=None, rate={})


def spin() -> None:
    """Run for ever, as a loop in C that no signal but SIGKILL ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a mask would be this thread's alone
    while True:
        time.sleep(0.05)


def deaf(run: Run) -> None:
    """Time one candidate, begin another, hang in a third; a child of its own hangs too."""
    timed(run, "timed", "measured")
    timed(run, "half", "checked")
    run.put(CASE, "waits", state="started", why="")
    timed(run, "hangs", "checked")
    child = subprocess.Popen(["sleep", "60"])
    run.set("pids", [*run.data.get("pids", []), child.pid])
    run.path.with_name(f".{run.path.name}.{os.getpid()}").write_text("half a fi")
    print("hanging ≥ 1 s")
    run.at(CASE, "hangs")
    spin()


def waits(run: Run) -> None:
    """Have two candidates half timed and one not begun, then wait."""
    for name in ("a", "b"):
        timed(run, name, "checked")
    run.put(CASE, "c", state="started", why="")
    run.set("ready", True)
    try:
        time.sleep(600)
    finally:
        for row in run.data["rows"][:2]:
            row["wall"] = WALL | {"n": 3}
        run.save()
        if "slow" in sys.argv[1]:
            time.sleep(1.0)


def dies(run: Run) -> None:
    """Go through candidates that end the process, one after the other."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in [*DEATHS, "lives"]:
        row = run.row(CASE, name)
        if row is not None and row["state"] in FINAL:
            continue
        timed(run, name, "checked")
        run.at(CASE, name)
        DEATHS.get(name, lambda: None)()
        run.at()
        timed(run, name, "measured")


def hangs(run: Run) -> None:
    """Prepare two candidates, of which the first never returns from C."""
    for name in ("hangs", "lives"):
        row = run.row(CASE, name)
        if row is None or row["state"] not in FINAL:
            run.put(CASE, name, state="started", why="")
            run.at(CASE, name, until=time.monotonic() + 0.2)
            if name == "hangs":
                spin()
            run.at()
            timed(run, name, "measured")


def main() -> int:
    stage, path, until, heart = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = Run.open(Path(path), int(heart))
    run.set("pids", [*run.data.get("pids", []), os.getpid()])
    run.set("until", float(until))
    if stage == "good":
        timed(run, "good", "measured")
    elif stage == "wrong":
        run.put(CASE, "bert_fast", state="refused", why="y: want less")
    elif stage == "broken":
        run.put(CASE, "begun", state="started", why="")
        return 3
    elif stage == "lost":
        os._exit(75)
    elif stage == "deaf":
        deaf(run)
    elif stage == "hangs":
        hangs(run)
    elif stage == "dies":
        dies(run)
    elif stage == "talks":
        for i in range(3000):
            print(f"line {i} ≥ 0, and more to fill what lies between the two processes")
        timed(run, "talks", "measured")
    elif stage == "leaves children":
        left, child = (subprocess.Popen(["sleep", "60"], start_new_session=b) for b in (1, 0))
        run.set("left", left.pid)
        run.set("pids", [*run.data["pids"], child.pid])
    else:
        waits(run)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
