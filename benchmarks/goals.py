"""What a row of the ledger reads from a run, and when its goal is reached.

Figures come from the row of bert_fast, ratios from the rows of its peers in the same run: the
peer's time divided by ours, so that more than 1 means bert_fast is faster. Only rows in state
`measured` count; those of an H200 in bf16, those of a CPU in fp32, and never a rehearsal.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

OURS = "bert_fast"
MORE, LESS = "≥", "≤"


@dataclass(frozen=True)
class Place:
    """Where a row must have run: the device of its case, its dtype, and which GPU it was."""

    device: str
    dtype: str
    gpu: str | None = None

    def holds(self, run: dict[str, Any]) -> bool:
        """Say whether rows of that run may count here."""
        if run.get("rehearsal") is not False:
            return False
        if self.gpu is None:
            return True
        gpu = run["environment"].get("gpu") or {}  # none, whatever the device is called
        names = f"{run['environment'].get('device')} {gpu.get('name')}"
        return bool(gpu) and re.search(rf"\b{self.gpu}\b", names) is not None


H200 = Place("cuda", "bf16", "H200")
CPU = Place("cpu", "fp32")


class Rows:
    """The rows of a run that ran in a place.

    Args:
        run: as record.py has it.
        place: rows from elsewhere are left out.
        kernel: compare by the time on the device, where both rows have it.
    """

    def __init__(self, run: dict[str, Any], place: Place, kernel: bool = False):
        self._kernel = kernel
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}
        for row in run["rows"] if place.holds(run) else ():
            case = run["cases"].get(row["case"], {})
            if (case.get("device"), case.get("dtype")) == (place.device, place.dtype):
                self._rows[row["case"], row["candidate"]] = row

    def state(self, case: str) -> str | None:
        """Return what became of bert_fast in that case, or None."""
        return self._rows.get((case, OURS), {}).get("state")

    def measured(self, case: str, candidate: str = OURS) -> dict[str, Any] | None:
        """Return the row of that candidate if it was measured."""
        row = self._rows.get((case, candidate))
        return row if row is not None and row["state"] == "measured" else None

    def peers(self, case: str) -> Iterator[str]:
        """Give the names of the other candidates that were measured."""
        for name, candidate in self._rows:
            if name == case and not candidate.startswith(OURS) and self.measured(name, candidate):
                yield candidate

    def over(self, case: str, candidate: str, base: str, base_candidate: str) -> float | None:
        """Return the time of one row divided by that of another, on a clock that both have."""
        rows = self.measured(case, candidate), self.measured(base, base_candidate)
        if rows[0] is None or rows[1] is None:
            return None
        by_device = self._kernel and all(row.get("device") for row in rows)
        clock = "device" if by_device else "wall"
        return rows[0][clock]["p50"] / rows[1][clock]["p50"]


Reader = Callable[[Rows], float | None]


def wall_ms(case: str) -> Reader:
    """Read the median wall time, in ms."""

    def read(rows: Rows) -> float | None:
        row = rows.measured(case)
        return None if row is None else row["wall"]["p50"] * 1e3

    return read


def rate(case: str, key: str, scale: float = 1.0) -> Reader:
    """Read a rate of the row, times scale."""

    def read(rows: Rows) -> float | None:
        value = ((rows.measured(case) or {}).get("rate") or {}).get(key)
        return None if value is None else value * scale

    return read


def rate_over(case: str, base: str, key: str) -> Reader:
    """Read a rate in one case as % of that in another."""

    def read(rows: Rows) -> float | None:
        ours, other = rate(case, key)(rows), rate(base, key)(rows)
        return 100 * ours / other if ours is not None and other else None

    return read


def extra(case: str, base: str) -> Reader:
    """Read how much longer one case takes than another, in % of the other."""

    def read(rows: Rows) -> float | None:
        over = rows.over(case, OURS, base, OURS)
        return None if over is None else 100 * (over - 1)

    return read


def device_us(*cases: str) -> Reader:
    """Read the time of the cases together on the device, in us."""

    def read(rows: Rows) -> float | None:
        times = [(rows.measured(case) or {}).get("device") for case in cases]
        return sum(time["p50"] for time in times) * 1e6 if all(times) else None

    return read


def memory_saved(case: str, peer: str) -> Reader:
    """Read the memory that one call of the peer needs, divided by ours."""

    def read(rows: Rows) -> float | None:
        pair = [(rows.measured(case, c) or {}).get("memory") or {} for c in (peer, OURS)]
        theirs, ours = (memory.get("call") for memory in pair)
        return theirs / ours if theirs and ours else None

    return read


def verdict(value: float, goal: float | None, stretch: float | None, sense: str = MORE) -> str:
    """Return "stretch", "met", "missed", or "" where there is nothing to reach."""
    sign = 1 if sense == MORE else -1
    if stretch is not None and sign * value >= sign * stretch:
        return "stretch"
    if goal is None:
        return ""
    return "met" if sign * value >= sign * goal else "missed"


@dataclass(frozen=True)
class Part:
    """One figure of a row.

    Attributes:
        read: gives it, in `unit`; None where nothing measures it yet.
        unit: as written behind the number.
        goal: what it must reach, in `unit`; None where it is only shown.
        stretch: what it should reach.
        sense: MORE or LESS: which way is better.
        label: tells it from the other figures of the row.
    """

    read: Reader | None
    unit: str
    goal: float | None = None
    stretch: float | None = None
    sense: str = MORE
    label: str = ""

    def verdict(self, value: float) -> str:
        """Say what the value reaches, as `verdict`."""
        return verdict(value, self.goal, self.stretch, self.sense)

    def better(self, value: float) -> float:
        """Return a number that is larger the better the value is."""
        return value if self.sense == MORE else -value


@dataclass(frozen=True)
class Against:
    """One comparison of a row; more is better.

    Attributes:
        label: the class of peers, as the goal names it.
        case: whose rows are compared.
        chosen: says whether a candidate belongs to the class, by its name.
        goal: the ratio that must be reached against the best of them, None where it is only shown.
        stretch: the ratio that should be reached.
    """

    label: str
    case: str
    chosen: Callable[[str], bool]
    goal: float | None = None
    stretch: float | None = None

    def verdict(self, value: float) -> str:
        """Say what the ratio reaches, as `verdict`."""
        return verdict(value, self.goal, self.stretch)


@dataclass(frozen=True)
class Ratio:
    """A peer's time divided by ours."""

    value: float
    peer: str
    case: str


@dataclass(frozen=True)
class Measured:
    """What one run says about a target.

    Attributes:
        values: one for each part, None where the run has none.
        ratios: one for each comparison, against the best peer of its class; None likewise.
        peers: every peer that was measured, best first.
        cut: rounds were cut short.
    """

    values: tuple[float | None, ...]
    ratios: tuple[Ratio | None, ...]
    peers: tuple[Ratio, ...]
    cut: bool


@dataclass(frozen=True)
class Target:
    """A row of the ledger.

    Attributes:
        key: names it; in end-to-end and CPU rows also the case that is read.
        title: what it is.
        place: where it must be measured.
        parts: its figures; the first one chooses the best run.
        against: its comparisons.
        cases: whose rows are read.
        words: what the goal says beside its numbers.
        kernel: compared by the time on the device.
    """

    key: str
    title: str
    place: Place
    parts: tuple[Part, ...]
    against: tuple[Against, ...] = ()
    cases: tuple[str, ...] = ()
    words: str = ""
    kernel: bool = False

    @property
    def goal(self) -> str:
        """The absolute goals as text, the stretch in brackets."""
        texts = [_bound(p.label, p.sense, p.goal, p.stretch, in_unit(p.unit)) for p in self.parts]
        return "; ".join(text for text in (*texts, self.words) if text)

    @property
    def peers(self) -> str:
        """The goals against peers as text."""
        texts = [_bound("", MORE, a.goal, a.stretch, f"x {a.label}") for a in self.against]
        return "; ".join(text for text in texts if text)

    def rows(self, run: dict[str, Any]) -> Rows:
        """Return the rows of a run that may count."""
        return Rows(run, self.place, self.kernel)

    def state(self, run: dict[str, Any]) -> str | None:
        """Return what became of bert_fast in the cases, the worst of it; None: not there."""
        rows = self.rows(run)
        states = [rows.state(case) for case in self.cases]
        order = (
            "refused",
            "failed",
            "absent",
            "started",
            "checked",
            "unfinished",
            "passed",
            "measured",
        )
        return next((state for state in order if state in states), None)

    def read(self, run: dict[str, Any]) -> Measured | None:
        """Return what a run says about this target, or None."""
        rows = self.rows(run)
        values = tuple(part.read(rows) if part.read else None for part in self.parts)
        found = []
        for case in self.cases:
            for peer in rows.peers(case):
                value = rows.over(case, peer, case, OURS)
                if value is not None:
                    found.append(Ratio(value, peer, case))
        found.sort(key=lambda ratio: (ratio.value, ratio.peer))
        ratios = tuple(
            next((r for r in found if r.case == a.case and a.chosen(r.peer)), None)
            for a in self.against
        )
        if all(value is None for value in (*values, *ratios)):
            return None
        cut = any((rows.measured(case) or {}).get("cut") for case in self.cases)
        return Measured(values, ratios, tuple(found), cut)


def in_unit(unit: str) -> str:
    """Return the unit as it follows a number: "3x", "3 ms"."""
    return unit if unit.startswith("x") else f" {unit}"


def _bound(label: str, sense: str, goal: float | None, stretch: float | None, unit: str) -> str:
    number = "{:,g}".format
    if goal is None:
        only = "" if stretch is None else f"stretch {sense} {number(round(stretch, 2))}{unit}"
    else:
        only = f"{sense} {number(round(goal, 2))}{unit}"
        only += "" if stretch is None else f" ({number(round(stretch, 2))})"
    return f"{label}: {only}" if label and only else only
