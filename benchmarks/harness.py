"""Times candidates side by side, and only those whose answers are right.

Each candidate passes the gate first; then all of them take turns in rounds, in a new order each
time; at last each passes the gate once more. A candidate that is absent, wrong or crashes has a row
that says so, and the others go on.
"""

import gc
import random
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import machine
import torch
from gate import AbsentError, Candidate, Case, Gate, Prepared, RefusedError
from record import FINAL, Run, clean
from timing import Pulse, Samples, Stopwatch, spread


class DeviceLostError(RuntimeError):
    """The GPU no longer answers this process: nothing after it can run here."""


# --- preparing -----------------------------------------------------------------------------------


class TooSlowError(BaseException):
    """A step has taken longer than it may; no Exception, so that what catches those lets it by."""


_CRASHES = (Exception, SystemExit, TooSlowError)  # what a candidate may raise and others go on


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise TooSlowError in the body after so many seconds, as soon as it is back in Python."""

    def ring(*_: Any) -> None:
        raise TooSlowError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _graphs() -> int:
    """Return how many graphs torch.compile has made in this process."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0
    return sys.modules["torch._dynamo.utils"].counters["stats"]["unique_graphs"]


def _syncs(device: torch.device, call: Callable[[], Any]) -> int | None:
    """Return how often one call waits for the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    # by the whole text: the mode has a warning of its own, once in a process
    return sum("called a synchronizing CUDA operation" in str(w.message) for w in caught)


class _Memory:
    """Peak memory of one candidate, others being loaded beside it."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._before = torch.cuda.memory_allocated() if self._cuda else 0

    def of(self, call: Callable[[], Any]) -> dict[str, int] | None:
        """Return bytes held since the start, and the peaks of a call above that; None on a CPU."""
        if not self._cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return {
            "held": held - self._before,
            "call": torch.cuda.max_memory_allocated() - held,
            "reserved": torch.cuda.max_memory_reserved() - reserved,
        }


@dataclass
class _Entry:
    """A candidate that may be timed, and its times."""

    name: str
    prepared: Prepared
    factor: float
    samples: Samples = field(default_factory=Samples)
    graphs: int = 0


def _prepare(case: Case, gate: Gate, candidate: Candidate, run: Run) -> _Entry:
    """Make a candidate ready and check it; its row says how long that took and how exact it is."""
    watch, memory = Stopwatch(case.device), _Memory(case.device)
    start = time.perf_counter()
    prepared = candidate.prepare()
    watch.wait()
    prepare_s = time.perf_counter() - start
    error = gate.check(prepared, candidate.factor)
    first_call_s = time.perf_counter() - start - prepare_s

    def call() -> Any:
        return prepared.run(case.inputs[0])

    if prepared.changes_state:  # the check has run other code than what is timed
        first_call_s += watch.seconds(call)
    fields = {
        "state": "checked",
        "error": error,
        "preparation": {"prepare_s": prepare_s, "first_call_s": first_call_s},
        "memory": memory.of(call),
        "syncs": _syncs(case.device, call),
        "notes": dict(prepared.notes),
    }
    if case.flush and fields["memory"]:  # of an op: what its check keeps would be among it
        fields["memory"]["held"] = None
    for inputs in case.inputs:
        prepared.run(inputs)
    watch.wait()
    run.put(case.name, candidate.name, **fields)
    return _Entry(candidate.name, prepared, candidate.factor)


def _lost(device: torch.device) -> bool:
    """Return whether the GPU no longer answers, as after an illegal access."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _gate(case: Case, candidates: Sequence[Candidate], run: Run) -> Gate:
    """Return the case's gate; where there is none, every candidate's row says so."""
    run.at(case.name)
    try:
        return Gate(case)
    except Exception as error:
        for candidate in candidates:
            why = clean(f"the truth to compare with: {type(error).__name__}: {error}")
            run.put(case.name, candidate.name, state="failed", why=why)
        if _lost(case.device):
            raise DeviceLostError(f"{case.name}: the truth to compare with") from error
        raise
    finally:
        run.at()


def _try_to_prepare(
    case: Case, gate: Gate, candidate: Candidate, run: Run, seconds: float
) -> _Entry | None:
    """Return the candidate if it can be timed; else its row says why not."""
    run.put(case.name, candidate.name, state="started", why="")
    run.at(case.name, candidate.name, until=time.monotonic() + seconds)
    try:
        with _limit(seconds):
            return _prepare(case, gate, candidate, run)
    except AbsentError as absent:
        fields = {"state": "absent", "why": clean(str(absent))}
    except RefusedError as refused:
        fields = {"state": "refused", "why": clean(str(refused)), "error": refused.error}
    except _CRASHES as error:
        traceback.print_exc()
        fields = {"state": "failed", "why": clean(f"{type(error).__name__}: {error}")}
    finally:
        run.at()
    run.drop_times(case.name, candidate.name)  # of a process that died, if this is its successor
    run.put(case.name, candidate.name, **fields)
    if case.device.type == "cuda":
        if _lost(case.device):
            raise DeviceLostError(f"{case.name}: {candidate.name}: the GPU no longer answers")
        gc.collect()  # what the traceback's frames held
        torch.cuda.empty_cache()
    return None


# --- measuring -----------------------------------------------------------------------------------


def measure(
    case: Case,
    candidates: Sequence[Candidate],
    run: Run,
    *,
    rounds: int = 20,
    least: int = 5,
    seconds: float = 60.0,
    prepare_seconds: float = 150.0,
    deadline: float | None = None,
    seed: int = 0,
) -> None:
    """Check every candidate and time those that are right, in turn; rows go into the run.

    A row that already says that its candidate failed, is absent or was refused is left alone, so
    that a stage that died goes on with the others.

    Args:
        case: what to do.
        candidates: who does it.
        run: gets a row for each candidate, and what is known of the case.
        rounds: how many rounds at most.
        least: how many rounds even when `seconds` are over.
        seconds: for the rounds.
        prepare_seconds: for making one candidate ready, its check included.
        deadline: on time.monotonic(): at this time it ends with the rounds there are; a quarter
            of the time to it, `seconds` at most, is kept for the rounds.
        seed: of the order within the rounds.

    Raises:
        ValueError: the case itself is broken, see `Gate`.
        DeviceLostError: the GPU no longer answers; rows so far are kept.
    """
    rows = {c.name: run.row(case.name, c.name) for c in candidates}
    if all(row is not None and row["state"] in FINAL for row in rows.values()):
        return
    todo = [c for c in candidates if _is_open(rows[c.name])]
    clocks = {"before": machine.clocks(case.device)}
    run.data["cases"][case.name] = describe(case) | {"clocks": clocks}
    run.save()
    for candidate in todo:
        run.put(case.name, candidate.name, state="started", why="")
    gate, entries = _gate(case, todo, run), []
    kept = 0.0 if deadline is None else min(seconds, (deadline - time.monotonic()) / 4)
    for candidate in todo:
        allowed = prepare_seconds
        if deadline is not None:
            # half of what is left: one that is too slow leaves time to those after it
            allowed = min(allowed, (deadline - kept - time.monotonic()) / 2)
            if allowed <= 0:
                why = "the time was over before its turn"
                run.put(case.name, candidate.name, state="unfinished", why=why)
                continue
        entry = _try_to_prepare(case, gate, candidate, run, allowed)
        entries += [] if entry is None else [entry]
    cut = True
    try:
        cut = _rounds(case, entries, run, rounds, least, seconds, deadline, random.Random(seed))
    finally:
        run.at()
        clocks["after"] = machine.clocks(case.device)
        _publish(case, entries, run)
    for entry in entries:
        _finish(case, gate, entry, run, cut)


def _is_open(row: dict[str, Any] | None) -> bool:
    """Return whether a candidate is to run: times stand beside those of the same rounds only."""
    return row is None or row["state"] == "measured" or row["state"] not in FINAL


def _rounds(
    case: Case,
    entries: list[_Entry],
    run: Run,
    rounds: int,
    least: int,
    seconds: float,
    deadline: float | None,
    order: random.Random,
) -> bool:
    """Time the candidates in turn; one that raises leaves the rounds and its row says why.

    Returns:
        Whether the deadline cut the rounds short.
    """
    watch = Stopwatch(case.device, case.flush)
    pulse = Pulse(case.device, run.data["rehearsal"])
    start = saved = time.monotonic()
    # on a GPU a round without times first: making the others ready emptied the allocator's cache
    for i in range(-1 if case.device.type == "cuda" else 0, rounds):
        inputs = case.inputs[i % len(case.inputs)]
        if i >= 0:
            pulse.beat()
            run.data["cases"][case.name]["pulse"] = pulse.found()
        for entry in order.sample(entries, len(entries)):
            now = time.monotonic()
            if deadline is not None and now > deadline:
                return True
            run.at(case.name, entry.name)
            graphs = _graphs()
            samples = entry.samples if i >= 0 else Samples()
            try:
                watch.time(lambda e=entry, x=inputs: e.prepared.run(x), samples)
            except _CRASHES as error:
                traceback.print_exc()
                why = f"while it was timed: {type(error).__name__}: {error}"
                run.drop_times(case.name, entry.name)
                run.put(case.name, entry.name, state="failed", why=clean(why))
                entries.remove(entry)
                if _lost(case.device):
                    raise DeviceLostError(f"{case.name}: {entry.name}") from error
            entry.graphs += _graphs() - graphs if i >= 0 else 0
        if not entries or (i + 1 >= least and time.monotonic() - start > seconds):
            return False
        if time.monotonic() - saved > 1:
            _publish(case, entries, run)
            saved = time.monotonic()
    return False


def _publish(case: Case, entries: list[_Entry], run: Run) -> None:
    """Write what has been timed so far into the rows."""
    for entry in entries:
        row = run.row(case.name, entry.name)
        if row is not None and entry.samples.wall:
            row.update(_times(case, entry, run.data))
    run.save()


def _finish(case: Case, gate: Gate, entry: _Entry, run: Run, cut: bool) -> None:
    """Check a candidate once more: what runs when it is warm must be as right as the first time."""
    if not entry.samples.wall:
        why = "the time was over before it was timed"
        run.put(case.name, entry.name, state="unfinished", why=why)
        return
    fields: dict[str, Any] = {"state": "measured"} | ({"cut": True} if cut else {})
    run.at(case.name, entry.name)
    try:
        if not entry.prepared.changes_state:
            gate.check(entry.prepared, entry.factor)
    except RefusedError as refused:
        why = clean(f"after it was timed: {refused}")
        fields = {"state": "refused", "why": why, "error": refused.error}
    except _CRASHES as error:
        traceback.print_exc()
        why = clean(f"after it was timed: {type(error).__name__}: {error}")
        fields = {"state": "failed", "why": why}
    finally:
        run.at()
    if fields["state"] != "measured":
        run.drop_times(case.name, entry.name)
    run.put(case.name, entry.name, **fields)
    if fields["state"] == "failed" and _lost(case.device):
        raise DeviceLostError(f"{case.name}: {entry.name}: the GPU no longer answers")


def prove(case: Case, candidates: Sequence[Candidate], run: Run, seconds: float = 60.0) -> None:
    """Check every candidate and time none: rows end as `passed`, or as `measure` has them.

    Args:
        case: what to do.
        candidates: who does it.
        run: gets a row for each candidate that has none in its final state.
        seconds: for a candidate.

    Raises:
        ValueError: the case itself is broken, see `Gate`.
        DeviceLostError: the GPU no longer answers; rows so far are kept.
    """
    rows = {c.name: run.row(case.name, c.name) for c in candidates}
    todo = [c for c in candidates if rows[c.name] is None or rows[c.name]["state"] not in FINAL]
    if not todo:
        return
    run.data["cases"][case.name] = describe(case)
    for candidate in todo:
        run.put(case.name, candidate.name, state="started", why="")
    gate = _gate(case, todo, run)
    for candidate in todo:
        if _try_to_prepare(case, gate, candidate, run, seconds) is not None:
            run.put(case.name, candidate.name, state="passed")


# --- what the rows say ---------------------------------------------------------------------------

_H_BF16_TFLOPS = 989  # the vendor's figure for H100 and H200, dense: customary for utilisation


def describe(case: Case) -> dict[str, Any]:
    """Return what the run says of a case, without its clocks."""
    work = case.work
    return {
        "device": case.device.type,
        "dtype": case.dtype,
        "tokens": work.tokens,
        "slots": work.slots,
        "fill": work.tokens / work.slots if work.slots else None,
        "sequences": work.sequences,
        "bytes": work.bytes or None,
        "flops": work.flops or None,
        "baseline": case.baseline_name,
        "flushed": case.flush,
        **case.facts,
    }


def _times(case: Case, entry: _Entry, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a row that come from its times."""
    wall = spread(entry.samples.wall)
    device = spread(entry.samples.device) if entry.samples.device else None
    seconds = (device if case.flush and device else wall)["p50"]
    return {
        "wall": wall,
        "device": device,
        "rate": rates(case, seconds, data),
        "recompiled": entry.graphs,
    }


def rates(case: Case, seconds: float, data: Mapping[str, Any]) -> dict[str, float]:
    """Return the rates of one call, and their shares of what this machine was seen to reach."""
    work, ceilings, rate = case.work, data["ceilings"], {}
    for name, amount in (
        ("tokens_per_s", work.tokens),
        ("sequences_per_s", work.sequences),
        ("gb_per_s", work.bytes / 1e9),
        ("tflop_per_s", work.flops / 1e12),
    ):
        if amount:
            rate[name] = amount / seconds
    copy = ceilings.get("copy_gb_per_s")
    matmul = ceilings.get("matmul_tflop_per_s", {}).get(case.dtype)
    if copy and "gb_per_s" in rate:
        rate["of_copy"] = rate["gb_per_s"] / copy
    if matmul and "tflop_per_s" in rate:
        rate["of_matmul"] = rate["tflop_per_s"] / matmul
    name = data["environment"].get("device", "")
    if work.flops and case.dtype in ("bf16", "fp16") and re.search("H[12]00", name):
        rate["of_989"] = rate["tflop_per_s"] / _H_BF16_TFLOPS
    return rate
