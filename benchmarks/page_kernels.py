"""The part of docs/performance.md about single ops: what their newest run on a CPU has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from goals import OURS
from ledger import NOTHING, Kept, figure, table

TITLE = "Kernels"
WORDS = (
    "One call of an op, forward or with its backward, with cold caches, beside the fastest peer"
    " that gives the same answers. The rate is the one that comes nearer to its ceiling: what"
    " copying or matrix products were seen to reach in the same run."
)
_SUITES = ("kernels", "all")
_CEILINGS = (  # rate, its share of the ceiling, unit, ceiling
    ("gb_per_s", "of_copy", "GB/s", "copying"),
    ("tflop_per_s", "of_matmul", "TFLOP/s", "products"),
)


@dataclass(frozen=True)
class Kernels:
    """A run and its cases of single ops.

    Attributes:
        run: it.
        rows: of these cases, by case and candidate.
    """

    run: Kept
    rows: dict[str, dict[str, dict[str, Any]]]

    @classmethod
    def of(cls, runs: Sequence[Kept]) -> "Kernels | None":
        """Choose the newest run in which an op of ours was measured on a CPU."""
        able = [cls(run, _rows(run.data)) for run in runs if run.data.get("suite") in _SUITES]
        able = [one for one in able if one.cases()]
        return max(able, key=lambda one: (one.run.data["started"], one.run.name), default=None)

    def cases(self) -> list[str]:
        """Return the cases in which ours was measured."""
        return [case for case, rows in self.rows.items() if _measured(rows.get(OURS))]

    def label(self, case: str) -> str:
        """Return the name of a case, which says its dtype."""
        dtype = self.run.data["cases"][case].get("dtype") or ""
        return case if dtype in case.replace(",", " ").split() else f"{case}, {dtype}"

    def ratios(self, case: str) -> list[tuple[float, str]]:
        """Return each peer's time divided by ours, the fastest first."""
        rows = self.rows[case]
        ours = rows[OURS]["wall"]["p50"]
        return sorted(
            (row["wall"]["p50"] / ours, name)
            for name, row in rows.items()
            if not name.startswith(OURS) and _measured(row)
        )

    def table(self) -> str:
        """Return the table: a row for each case."""
        head = ("", "bert_fast, ms", "fastest peer", "against it", "rate", "of the ceiling")
        return table(head, map(self._cells, self.cases()))

    def _cells(self, case: str) -> tuple[str, ...]:
        row, ratios = self.rows[case][OURS], self.ratios(case)
        wall = {name: figure(1e3 * row["wall"][name]) for name in ("p20", "p50", "p80")}
        cut = ", cut short" if row.get("cut") else ""
        time = f"{wall['p50']} ({wall['p20']} to {wall['p80']}{cut})"
        peer = (ratios[0][1], f"{figure(ratios[0][0])}x") if ratios else (NOTHING, "")
        return self.label(case), time, *peer, *_rate(row.get("rate") or {})

    def untimed(self) -> list[str]:
        """Return a line about the cases in which ours has no time, or nothing."""
        states = {case: rows[OURS]["state"] for case, rows in self.rows.items() if OURS in rows}
        items = [f"{case} ({state})" for case, state in states.items() if state != "measured"]
        return [f"Without a time of ours: {'; '.join(items)}.\n"] if items else []


def _measured(row: dict[str, Any] | None) -> bool:
    return row is not None and row["state"] == "measured"


def _rows(run: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in run["rows"] if run["rehearsal"] is False else ():
        case = run["cases"].get(row["case"], {})
        if (case.get("device"), case.get("family")) == ("cpu", "kernels"):
            found.setdefault(row["case"], {})[row["candidate"]] = row
    return found


def _rate(rate: dict[str, float]) -> tuple[str, str]:
    """Return the rate that is nearer to its ceiling, and how near."""
    able = [
        (rate.get(share, 0), f"{figure(rate[name])} {unit}", ceiling)
        for name, share, unit, ceiling in _CEILINGS
        if rate.get(name)
    ]
    if not able:
        return "", ""
    share, text, ceiling = max(able)
    return text, f"{100 * share:.0f} % of {ceiling}" if share else ""
