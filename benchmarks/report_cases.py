"""Which runs a report is made of, and which of them says what about a case."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ledger
from goals import OURS

FAMILIES = ("kernels", "encoder", "pretraining")
_PRETRAINING = ("cpu mini", "cpu small", "case 8", "case 9", "case 10")


@dataclass(frozen=True)
class Source:
    """A run.

    Attributes:
        label: what the report calls it.
        name: of its file, with the directory that it is in.
        data: its content.
    """

    label: str
    name: str
    data: dict[str, Any]

    @property
    def rehearsal(self) -> bool:
        """Whether nothing of it is evidence."""
        return self.data["rehearsal"]

    @property
    def machine(self) -> str:
        """What tells its machine from others; a rehearsal is apart from what was measured."""
        of = self.data["environment"]
        name = str(of.get("slug") or of.get("device") or "unknown")
        return f"{name}-rehearsal" if self.rehearsal else name

    @property
    def device(self) -> str:
        """Its machine in words."""
        of = self.data["environment"]
        name = str(of.get("device") or of.get("slug") or "an unknown machine")
        return f"{name}, a rehearsal" if self.rehearsal else name


@dataclass(frozen=True)
class Shown:
    """A case as one run has it.

    Attributes:
        run: which.
        name: of the case.
        facts: what the run knows of it.
        rows: by candidate.
        refused: of ours, in this run or a newer one: (run, state, why).
    """

    run: Source
    name: str
    facts: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    refused: list[tuple[Source, str, str]] = field(default_factory=list)

    @property
    def family(self) -> str:
        """One of `FAMILIES`."""
        if self.facts.get("family") in FAMILIES:
            return self.facts["family"]
        if "op" in self.facts:
            return "kernels"
        return "pretraining" if self.name.startswith(_PRETRAINING) else "encoder"

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return str(self.facts.get("dtype") or "?")

    def measured(self, candidate: str = OURS) -> dict[str, Any] | None:
        """Return the row of that candidate if it was measured."""
        row = self.rows.get(candidate)
        return row if row is not None and row["state"] == "measured" else None

    def peers(self) -> list[str]:
        """Return the others that were measured."""
        return [n for n in self.rows if not n.startswith(OURS) and self.measured(n)]

    def clock(self, row: dict[str, Any]) -> str:
        """Return by which clock a row is shown: kernels by the device's where there is one."""
        return "device" if self.family == "kernels" and row.get("device") else "wall"

    def spread(self, candidate: str = OURS) -> dict[str, float] | None:
        """Return p20, p50 and p80 in seconds and n, or None where it was not measured."""
        row = self.measured(candidate)
        if row is None:
            return None
        time = row[self.clock(row)]
        middle = time["p50"]
        return {"p20": time.get("p20", middle), "p80": time.get("p80", middle)} | time

    def ratio(self, candidate: str) -> float | None:
        """Return a candidate's time divided by ours, on a clock that both have."""
        rows = self.measured(candidate), self.measured()
        if rows[0] is None or rows[1] is None:
            return None
        clock = "device" if all(self.clock(row) == "device" for row in rows) else "wall"
        return rows[0][clock]["p50"] / rows[1][clock]["p50"]

    def ratios(self) -> list[tuple[float, str]]:
        """Return the ratio of each peer, the fastest first."""
        return sorted((self.ratio(p), p) for p in self.peers()) if self.measured() else []

    def best_peer(self) -> str | None:
        """Return the fastest peer."""
        times = [(self.spread(p)["p50"], p) for p in self.peers()]
        return min(times)[1] if times else None

    def rate(self, candidate: str, name: str) -> float | None:
        """Return a rate of a row."""
        return ((self.measured(candidate) or {}).get("rate") or {}).get(name)

    def memory(self, candidate: str) -> float | None:
        """Return what a candidate needs in MiB: beyond its imports; on a GPU held and in a call.

        Of a kernel it is the call alone: what its check keeps would be among what is held.
        """
        memory = (self.measured(candidate) or {}).get("memory") or {}
        if memory.get("peak") is not None and memory.get("imported") is not None:
            return (memory["peak"] - memory["imported"]) / 2**20
        held = memory.get("held") if self.family != "kernels" else 0
        if held is not None and memory.get("call") is not None:
            return (held + memory["call"]) / 2**20
        return None


def percent(share: float) -> str:
    """Return a share in %, never as 0 unless it is."""
    return f"{100 * share:.0f}" if share >= 0.01 or not share else f"{100 * share:.1g}"


# --- reading -------------------------------------------------------------------------------------


def _is_run(path: Path) -> bool:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(data, dict) and {"format", "suite", "rows"} <= set(data)


def _found(directory: Path) -> list[Path]:
    """Return the runs in a directory; what else ends in .json is named on stderr."""
    runs = []
    for path in sorted(directory.rglob("*.json")):
        if _is_run(path):
            runs.append(path)
        else:
            print(f"report: {path}: left out, it is no run", file=sys.stderr)
    return runs


def read(results: Sequence[Path]) -> list[Source]:
    """Return the runs in files and directories, the oldest first; each once.

    Raises:
        ValueError: a file is no run, or there is none.
        OSError: a file cannot be read.
    """
    found: dict[Path, tuple[str, dict[str, Any]]] = {}
    for given in results:
        for path in _found(given) if given.is_dir() else [given]:
            data = ledger.read_run(path.absolute())
            where = path.resolve()
            if data["rehearsal"] and given.is_dir():
                print(f"report: {path}: left out, it is a rehearsal", file=sys.stderr)
            elif all(data != other for _, other in found.values()):
                found[where] = (f"{where.parent.name}/{where.name}", data)
    if not found:
        raise ValueError(f"want runs, got none in {', '.join(map(str, results))}")
    ordered = sorted(found.values(), key=lambda one: (one[1]["started"], one[0]))
    return [Source(f"run {i}", name, data) for i, (name, data) in enumerate(ordered, 1)]


# --- choosing ------------------------------------------------------------------------------------


def _of(run: Source) -> Iterable[Shown]:
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in run.data["rows"]:
        rows.setdefault(row["case"], {})[row["candidate"]] = row
    for name, by_candidate in rows.items():
        if any(row["state"] != "passed" for row in by_candidate.values()):
            yield Shown(run, name, run.data["cases"].get(name) or {}, by_candidate)


def _trouble(one: Shown) -> tuple[Source, str, str] | None:
    """Return what is wrong with our row, if something is."""
    row = one.rows.get(OURS)
    if row is None:
        return one.run, "absent", "there is no row of it"
    if row["state"] in ("measured", "passed"):
        return None
    return one.run, row["state"], str(row.get("why") or "")


def merge(runs: Sequence[Source]) -> list[Shown]:
    """Return each case of each machine once, as the newest run that measured it has it.

    A run in which bert_fast was measured is preferred to one that measured others alone, and that
    to one that measured nobody. What became of ours in newer runs stays in `refused`.
    """
    found: dict[tuple[str, str, str, str], list[Shown]] = {}
    for run in runs:
        for one in _of(run):
            key = (run.machine, str(one.facts.get("device")), one.dtype, one.name)
            found.setdefault(key, []).append(one)
    chosen = []
    for several in found.values():
        best = max(
            range(len(several)),
            key=lambda i: (bool(several[i].measured()), bool(several[i].peers()), i),
        )
        refused = [trouble for one in several[best:] if (trouble := _trouble(one))]
        one = several[best]
        chosen.append(Shown(one.run, one.name, one.facts, one.rows, refused))
    order = {run.machine: i for i, run in reversed([*enumerate(runs)])}
    return sorted(chosen, key=lambda one: (order[one.run.machine], FAMILIES.index(one.family)))
