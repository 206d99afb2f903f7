"""Runs stages one after another, each in a process of its own with a deadline.

Whatever a stage has written into the run's file stays: past the deadline, after Ctrl-C, after a
crash. A stage whose process dies under a candidate goes on without it, and its row says so.
Nothing here imports torch: a GPU in a bad state cannot take the supervisor down.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from record import Run, heartbeat, now

EXIT_LOST = 75  # a stage's exit status: the GPU no longer answers it, a new process may go on
_GRACE = 10.0  # seconds between asking a stage to stop and killing it
_LAST_WORDS = 3.0  # seconds for what a stage said; one that left its group may keep the pipe open
_MARGIN = 4.0  # seconds before its deadline at which a stage stops by itself
_MOST_RESTARTS = 20


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        name: what the child process is told to do.
        seconds: for it; what it leaves is for those after it.
    """

    name: str
    seconds: float


@dataclass
class _End:
    """How a process ended: "exit", "hung", "deadline" or "interrupted", and its exit status."""

    how: str
    status: int


class _Interrupt:
    """Signals that end the run, as a flag: SIGINT, SIGTERM and SIGHUP."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.came = False  # no threading.Event: its lock may be held where the handler runs
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Interrupt":
        for number in self._SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, *_: object) -> None:
        self.came = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def supervise(
    path: Path,
    stages: Sequence[Stage],
    command: Callable[[Stage, float, int], list[str]],
    note: Callable[[str], None] = lambda step: None,
) -> int:
    """Run the stages of the run that `path` holds; its log stands beside it.

    Args:
        path: of a file that `Run.start` wrote.
        stages: in order.
        command: makes the command line of a stage's process from the stage, the time on
            time.monotonic() at which it should be over, and the file descriptor for `Run.at`.
        note: told again and again which case is under way, or else which stage.

    Returns:
        130 if it was interrupted; 1 if a stage broke or candidate bert_fast has no right answer or
        no time; else 0.
    """
    end_of_stage = time.monotonic()
    with path.with_suffix(".log").open("a", encoding="utf-8") as log, _Interrupt() as interrupt:
        for i, stage in enumerate(stages):
            end_of_stage += stage.seconds
            _say(log, f"--- {stage.name} ({i + 1} of {len(stages)}, {stage.seconds:.0f} s)")
            outcome = _run_stage(path, stage, command, end_of_stage, interrupt, log, note)
            _say(log, f"--- {stage.name}: {outcome['ended']}, {outcome['seconds']:.0f} s")
            if interrupt.came:
                break
        run = Run.open(path)
        ended = [s["ended"] for s in run.data["stages"]]
        if interrupt.came:
            run.data["ended"], status = "interrupted", 130
        else:
            whole = all(e == "done" for e in ended)
            run.data["ended"] = "complete" if whole else "in parts"
            wrong = [row for row in run.data["rows"] if _is_our_fault(row)]
            for row in wrong:
                _say(log, f"{row['case']}: {row['candidate']}: {row['state']}: {row['why']}")
            status = int(bool(wrong) or any(e.startswith("broke") for e in ended))
        run.set("finished", now())
        return status


def _is_our_fault(row: dict[str, Any]) -> bool:
    """Return whether this project has no right answer in a case."""
    return row["candidate"] == "bert_fast" and row["state"] in ("refused", "failed")


def _say(log: TextIO, line: str) -> None:
    """Print a line and log it."""
    _show(line + "\n")
    log.write(line + "\n")
    log.flush()


def _show(text: str) -> None:
    """Print a text; whoever reads may have gone, or be unable to take some letter."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(text)
        sys.stdout.flush()


def _run_stage(
    path: Path,
    stage: Stage,
    command: Callable[[Stage, float, int], list[str]],
    deadline: float,
    interrupt: _Interrupt,
    log: TextIO,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Run a stage, again where its process dies under a candidate; return its entry in the run."""
    start = time.monotonic()
    outcome = {"stage": stage.name, "deadline_s": round(deadline - start, 1), "restarts": 0}
    while True:
        with tempfile.TemporaryFile() as heart:
            argv = command(stage, deadline - _MARGIN, heart.fileno())
            beat = lambda case, of=stage.name: note(case or of)  # noqa: E731
            end = _run_process(argv, heart.fileno(), deadline, interrupt, log, beat)
            case, candidate, _ = heartbeat(heart.fileno())
        for leftover in path.parent.glob(f".{path.name}.*"):
            leftover.unlink()
        run = Run.open(path)
        under = run.unsettled(case, candidate)  # it ended, or was stopped, while these ran
        by_itself = end.how in ("exit", "hung")
        again = by_itself and outcome["restarts"] < _MOST_RESTARTS and not interrupt.came
        died = "hung, and was killed" if end.how == "hung" else _death(end.status)
        if end.how == "exit" and end.status == 0 and not under:
            outcome["ended"] = "done"
            run.settle("the stage ended before it was timed")
        elif end.how == "deadline":
            outcome["ended"] = "past its deadline"
            run.settle(f"past the deadline of stage {stage.name}")
        elif end.how == "interrupted":
            outcome["ended"] = "interrupted"
            run.settle("interrupted")
        elif again and end.status == EXIT_LOST:
            outcome["restarts"] += 1
            continue
        elif again and under:
            for name in under:
                run.drop_times(case, name)
                run.put(case, name, state="failed", why=f"its process {died}")
            outcome["restarts"] += 1
            continue
        else:
            outcome["ended"] = f"broke: its process {died}"
            run.settle(f"stage {stage.name} broke")
        for name in under if not by_itself else ():
            why = f"{run.row(case, name)['why']}, while it ran and did not stop"
            run.put(case, name, why=why)
        outcome["seconds"] = round(time.monotonic() - start, 1)
        run.data["stages"].append(outcome)
        run.save()
        return outcome


def _death(status: int) -> str:
    """Return in words how a process ended."""
    if status < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"died of {names.get(-status, f'signal {-status}')}"
    return f"ended with exit status {status}"


def _run_process(
    argv: list[str],
    heart: int,
    deadline: float,
    interrupt: _Interrupt,
    log: TextIO,
    note: Callable[[str], None],
) -> _End:
    """Run a process until it ends, its deadline is past or a signal comes; nothing survives it."""
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(heart,),
        preexec_fn=_stand_apart,
        text=True,
        errors="replace",
    )
    reader = threading.Thread(target=_tee, args=(process.stdout, log), daemon=True)
    reader.start()
    how = "exit"
    try:
        while process.poll() is None:
            case, _, until = heartbeat(heart)
            note(case)
            if interrupt.came or time.monotonic() > deadline:
                how = "interrupted" if interrupt.came else "deadline"
                _stop(process)
            elif time.monotonic() > (until or deadline) + _GRACE:
                how = "hung"  # not in Python, where its own limit would have reached it
                break
            else:
                time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        reader.join(_LAST_WORDS)
    return _End(how, status)


def _stop(process: subprocess.Popen) -> None:
    """Ask a process to stop, so that it can write what it has; then kill it."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tee(lines: Iterator[str], log: TextIO) -> None:
    """Print and log what a process says."""
    for line in lines:
        _show(line)
        with contextlib.suppress(ValueError):  # closed: something of the stage lives on
            log.write(line)
            log.flush()


_LIBC = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
_PR_SET_PDEATHSIG = 1


def _stand_apart() -> None:
    """Make a new process lead a group, to be killed whole, and on Linux die with this one."""
    os.setpgrp()
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def has_gpu() -> bool:
    """Return whether nvidia-smi lists a GPU; asks no CUDA library."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout
