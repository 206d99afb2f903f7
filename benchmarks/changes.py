"""What changed from one run to another, row by row, and how much of it may be noise.

compare.py says what the noise is made of, and prints it.
"""

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

from goals import OURS

# percent: by so much at most BERT-base took longer or shorter in two runs of one commit, 12 minutes
# apart, on 2 cores of an AMD EPYC that others share (five cases at dffe732, 2026-12-01)
MACHINE_NOISE = 3.0
# what a case's pulse has: a rate, and what must be equal for two of them to compare
PULSES = {"tflop_per_s": ("dtype", "side"), "gb_per_s": ("bytes",)}
_ONE_CALL = 0.25  # relative: what the time of a single call may be off
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)  # t, 97.5 %; n = 2, 3, ... 9
_LEAST_PEERS = 5  # so many at least make a scatter
_NORMAL = 1.96  # the same quantile of the normal distribution
# what does not say what was done
_NO_FACTS = {"clocks", "pulse", "baseline", "checked", "limit", "family", "how"}


# --- noise ---------------------------------------------------------------------------------------


def sampling(time: dict[str, float]) -> float:
    """Return 2 standard errors of a median, relative to it, from its percentiles."""
    n = time["n"]
    if n < 2:
        return _ONE_CALL
    error = 1.2533 * (time["p80"] - time["p20"]) / 1.683 / math.sqrt(n) / time["p50"]
    return 2 * error * (_STUDENT[n - 2] / _NORMAL if n < 10 else 1)


def _pulses(case: dict[str, Any], cold: bool) -> dict[tuple[Any, ...], float]:
    """Return the median rates of a case's pulse, by what it is: a product; for cold caches a copy.

    Whole models, with warm caches, are products for the most part.
    """
    pulse = case.get("pulse") or {}
    return {
        (rate, *(pulse.get(name) for name in names)): pulse[rate]["p50"]
        for rate, names in PULSES.items()
        if rate in pulse and (cold or rate == "tflop_per_s")
    }


def wobble(run: dict[str, Any], cold: bool) -> float:
    """Return the relative standard deviation, over the cases, of the pulse's medians.

    Args:
        run: all its cases have the same pulse.
        cold: for cases that begin with cold caches: the copy's count, too.
    """
    rates: dict[Any, list[float]] = {}
    for case in run["cases"].values():
        for kind, rate in _pulses(case, cold).items():
            rates.setdefault(kind, []).append(rate)
    several = [of for of in rates.values() if len(of) > 1]
    return max((statistics.stdev(of) / statistics.median(of) for of in several), default=0.0)


def drift(before: dict[str, Any], after: dict[str, Any], case: str) -> float:
    """Return how much the machine's rate was seen to change, relative; 0 if nobody looked."""
    cold = before["cases"][case].get("flushed", False)
    was, is_now = (_pulses(run["cases"][case], cold) for run in (before, after))
    pairs = [(was[kind], is_now[kind]) for kind in was.keys() & is_now.keys()]
    if not pairs:
        ceilings = [run.get("ceilings") or {} for run in (before, after)]
        pairs = [tuple((of.get("matmul_tflop_per_s") or {}).get("fp32") for of in ceilings)]
    return max((abs(b / a - 1) for a, b in pairs if a and b), default=0.0)


def scatter(changes: list["Change"]) -> float:
    """Return by how much peers, whose code is the same, changed unlike each other: 2 deviations.

    It is taken from the median of the distances to their median change, so that a few that moved
    for a reason do not count, nor a change that all share. 0 with less than 5 peers.
    """
    logs = [math.log(one.ratio) for one in changes if not one.ours]
    if len(logs) < _LEAST_PEERS:
        return 0.0
    middle = statistics.median(logs)
    return math.expm1(2 * 1.4826 * statistics.median(abs(v - middle) for v in logs))


# --- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A row in both runs; all but the times is relative.

    Attributes:
        case: its case.
        candidate: its candidate.
        times: seconds before and after.
        sampling: what the numbers of calls leave open.
        machine: what the machine is known to waver.
        drift: what the machine was seen to change from run to run.
        over: from which change on a regression counts.
    """

    case: str
    candidate: str
    times: tuple[float, float]
    sampling: float
    machine: float
    drift: float
    over: float

    @property
    def ours(self) -> bool:
        """Whether it is no peer."""
        return _is_ours(self.candidate)

    @property
    def ratio(self) -> float:
        """The time after over the time before."""
        return self.times[1] / self.times[0]

    @property
    def noise(self) -> float:
        """By how much the ratio may differ from 1 though the code is the same."""
        return math.hypot(self.sampling, self.machine) + self.drift

    @property
    def verdict(self) -> str:
        """REGRESSION, slower, within noise, same or faster."""
        if self.ratio > 1 + self.noise:
            return "REGRESSION" if self.ours and self.ratio > 1 + self.over else "slower"
        if self.ratio < 1 / (1 + self.noise):
            return "faster"
        return "within noise" if max(self.ratio, 1 / self.ratio) > 1 + self.over else "same"


@dataclass(frozen=True)
class Compared:
    """Two runs side by side.

    Attributes:
        changes: rows that both measured.
        lost: ours that was measured before and is not any more: case, candidate, what it is now.
        others: what is not compared: case, why.
        memory: ours that takes more: a line each.
    """

    changes: list[Change]
    lost: list[tuple[str, str, str]]
    others: list[tuple[str, str]]
    memory: list[str]

    @property
    def regressed(self) -> bool:
        """Whether something of ours became worse."""
        return bool(self.lost) or any(one.verdict == "REGRESSION" for one in self.changes)


def _is_ours(candidate: str) -> bool:
    return candidate.startswith(OURS)


def _facts(run: dict[str, Any], case: str) -> dict[str, Any]:
    """Return what must be equal for the times of a case to compare."""
    facts = {name: v for name, v in run["cases"][case].items() if name not in _NO_FACTS}
    if facts.get("device") == "cpu":
        facts["threads"] = run["environment"].get("threads")
    return facts


def _differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the facts that differ; a new one, or a number that nobody counted, does not."""

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, int | float) and isinstance(b, int | float):
            return math.isclose(a, b, rel_tol=1e-9)
        return a == b or (not a and not b)

    return [
        f"{name} {str(value)[:40]} before, {str(after[name])[:40]} after"
        for name, value in before.items()
        if name in after and not equal(value, after[name])
    ]


def _clock(before: dict, after: dict, flushed: bool) -> tuple[dict[str, float], ...]:
    by_device = flushed and before.get("device") and after.get("device")
    return tuple(row["device" if by_device else "wall"] for row in (before, after))


def _bytes(row: dict[str, Any]) -> int | None:
    """Return the memory a row took: its process's peak on a CPU, its share of a GPU's."""
    memory = row.get("memory") or {}
    if "peak" in memory:
        return memory["peak"]
    return memory["held"] + memory["call"] if {"held", "call"} <= memory.keys() else None


def compare(before: dict[str, Any], after: dict[str, Any], over: float) -> Compared:
    """Compare the runs row by row.

    Args:
        before: as record.py has it.
        after: the same.
        over: the change that counts, relative.

    Raises:
        ValueError: they cannot be compared.
    """
    _check_machines(before, after)
    found = Compared([], [], [], [])
    rows = {(row["case"], row["candidate"]): row for row in after["rows"]}
    machine = {
        cold: max(MACHINE_NOISE / 100, wobble(before, cold), wobble(after, cold))
        for cold in (False, True)
    }
    usable = set()
    for case in before["cases"]:
        if case not in after["cases"]:
            found.others.append((case, "not in B"))
        elif differing := _differing(_facts(before, case), _facts(after, case)):
            found.others.append((case, f"another case: not compared: {'; '.join(differing)}"))
        else:
            usable.add(case)
    found.others.extend((c, "not in A") for c in after["cases"] if c not in before["cases"])
    for row in before["rows"]:
        case, candidate = key = row["case"], row["candidate"]
        if case not in usable:
            continue
        now, ours = rows.get(key), _is_ours(candidate)
        was, is_now = row["state"], now["state"] if now else "no row"
        if was != "measured" or is_now != "measured":
            if ours and was == "measured" and is_now == "passed":
                found.others.append((case, f"{candidate}: right, but not timed in B"))
            elif ours and was == "measured":
                why = f": {now['why']}" if now and now.get("why") else ""
                found.lost.append((case, candidate, is_now + why))
            elif ours:
                found.others.append((case, f"{candidate}: {was} in A, {is_now} in B"))
            continue
        cold = before["cases"][case].get("flushed", False)
        times = _clock(row, now, cold)
        parts = (
            math.hypot(*(sampling(time) for time in times)),
            machine[cold],
            drift(before, after, case),
        )
        pair = (times[0]["p50"], times[1]["p50"])
        found.changes.append(Change(case, candidate, pair, *parts, over))
        took = _bytes(row), _bytes(now)
        if ours and all(took) and took[1] > took[0] * (1 + over):
            found.memory.append(f"{case}: {took[0] / 2**20:,.0f} to {took[1] / 2**20:,.0f} MiB")
    kinds = {case: of.get("family") for case, of in before["cases"].items()}
    for kind in set(kinds.values()):
        apart = scatter([one for one in found.changes if kinds[one.case] == kind])
        for i, one in enumerate(found.changes):
            if kinds[one.case] == kind:
                found.changes[i] = replace(one, machine=max(one.machine, apart))
    if not found.lost and not any(one.ours for one in found.changes):
        why = f" ({'; '.join(f'{case}: {why}' for case, why in found.others[:3])})"
        raise ValueError(
            f"want a case in which {OURS} was measured in both, got none"
            + (why if found.others else "")
        )
    return found


def _check_machines(before: dict[str, Any], after: dict[str, Any]) -> None:
    for run, name in ((before, "A"), (after, "B")):
        if run["rehearsal"]:
            raise ValueError(f"{name}: want a run, got a rehearsal, which is never evidence")
    for key in ("slug", "device"):
        was, is_now = (run["environment"].get(key) for run in (before, after))
        if was != is_now:
            raise ValueError(
                f"want two runs of one machine: want {key} {was} as in A, got {is_now}"
            )
