"""A run of measurements as one JSON file, whole after every change.

    {"format", "suite", "command", "rehearsal", "started", "finished", "ended", "environment",
     "ceilings", "stages", "cases", "rows"}

and, where their stages ran, "build", "gemms", "profiles", "proof" and "tune".

A row is what became of one candidate in one case. Its state is `started` (being prepared),
`checked` (right, not timed to the end yet), `measured`, `passed` (right, and not to be timed),
`refused` (its answers are wrong: never timed), `absent` (what it needs is not here), `failed` or
`unfinished` (the time was over, or the run interrupted); `why` says more for the last four.
"""

import datetime
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FORMAT = 1
FINAL = ("measured", "passed", "refused", "absent", "failed", "unfinished")
_SHOWN_RATES = {
    "tokens_per_s": "tok/s",
    "gb_per_s": "GB/s",
    "tflop_per_s": "TFLOP/s",
    "of_copy": "of copy",
    "of_matmul": "of matmul",
}


_HEARTBEAT = 250  # bytes


def heartbeat(descriptor: int) -> tuple[str, str, float | None]:
    """Return what `Run.at` wrote last: case, candidate, and until when it may run."""
    word = os.pread(descriptor, _HEARTBEAT, 0).decode(errors="replace").strip(" ")
    case, _, rest = word.partition("\t")
    candidate, _, until = rest.partition("\t")
    return case, candidate, float(until) if until else None


def clean(text: str, most: int = 400) -> str:
    """Return the text in at most `most` characters, without the paths of this machine."""
    for path, short in ((ROOT, "."), (Path.home(), "~"), (Path(tempfile.gettempdir()), "tmp")):
        text = text.replace(str(path), short)
    text = re.sub(r"/\S*?/(site-packages|python3\.\d+)/", r"\1/", " ".join(text.split()))
    return text if len(text) <= most else text[: most - 3] + "..."


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class Run:
    """A run's file.

    Args:
        path: of the JSON file; written anew at each `save`, and never half.
        data: its content.
        heartbeat: file descriptor that `at` writes to: who is running, should the process die.
    """

    def __init__(self, path: Path, data: dict[str, Any], heartbeat: int | None = None):
        self.path, self.data, self._heartbeat = path, data, heartbeat

    @classmethod
    def start(cls, path: Path, suite: str, command: str, rehearsal: bool = False) -> "Run":
        """Begin a file; `rehearsal`: reduced sizes, nothing of it is evidence of speed."""
        head = {"format": FORMAT, "suite": suite, "command": command, "rehearsal": rehearsal}
        times = {"started": now(), "finished": None, "ended": None}
        parts = {"environment": {}, "ceilings": {}, "stages": [], "cases": {}, "rows": []}
        run = cls(path, head | times | parts)
        run.save()
        return run

    @classmethod
    def open(cls, path: Path, heartbeat: int | None = None) -> "Run":
        """Read a file that `start` began.

        Raises:
            ValueError: it is no run, or one of another format.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path.name}: want JSON, got {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            got = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"{path.name}: want a run of format {FORMAT}, got {got}")
        return cls(path, data, heartbeat)

    def text(self) -> str:
        """Return the content of the file."""
        return json.dumps(self.data, indent=1, allow_nan=False) + "\n"

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        staged.write_text(self.text(), "utf-8")
        os.replace(staged, self.path)

    def row(self, case: str, candidate: str) -> dict[str, Any] | None:
        """Return the row of that candidate, or None."""
        for row in self.data["rows"]:
            if (row["case"], row["candidate"]) == (case, candidate):
                return row
        return None

    def unsettled(self, case: str, candidate: str) -> list[str]:
        """Return the candidate if its row is not in its final state.

        Without a candidate, when the case itself was under way: all such of the case.
        """
        return [
            row["candidate"]
            for row in self.data["rows"]
            if row["case"] == case
            and row["candidate"] == (candidate or row["candidate"])
            and row["state"] not in FINAL
        ]

    def put(self, case: str, candidate: str, **fields: Any) -> dict[str, Any]:
        """Add fields to that candidate's row, which is made if it is not there; saves.

        Raises:
            ValueError, TypeError: a field is no JSON, such as NaN; the row is as it was.
        """
        json.dumps(fields, allow_nan=False)  # else no later save would work
        row = self.row(case, candidate)
        if row is None:
            row = {"case": case, "candidate": candidate}
            self.data["rows"].append(row)
        row.update(fields)
        self.save()
        return row

    def drop_times(self, case: str, candidate: str) -> None:
        """Take the times out of a row: they are of no worth."""
        for key in ("wall", "device", "rate"):
            self.row(case, candidate).pop(key, None)

    def settle(self, why: str, save: bool = True) -> None:
        """Bring every row to its final state, after whoever measured has stopped.

        What has been timed for some rounds is measured, cut short; the rest is unfinished.
        """
        for row in self.data["rows"]:
            if row["state"] not in FINAL:
                timed = "wall" in row
                row.update({"state": "measured", "cut": True} if timed else {"state": "unfinished"})
                row["why"] = why
        if save:
            self.save()

    def set(self, key: str, value: Any) -> None:
        """Set a part of the run, such as "environment"; saves.

        Raises:
            ValueError, TypeError: the value is no JSON, such as NaN; the run is as it was.
        """
        json.dumps(value, allow_nan=False)
        self.data[key] = value
        self.save()

    def at(self, case: str = "", candidate: str = "", until: float | None = None) -> None:
        """Leave word of who runs from now on, and until when on time.monotonic() it may."""
        if self._heartbeat is not None:
            word = f"{case}\t{candidate}\t{until or ''}"
            os.pwrite(self._heartbeat, word.encode().ljust(_HEARTBEAT), 0)

    def summary(self, cases: Sequence[str] | None = None) -> str:
        """Return a line for each row, of these cases alone if given: what came of it, and rates.

        Rows that passed are counted; in a rehearsal there are no rates.
        """
        rates = {} if self.data["rehearsal"] else _SHOWN_RATES
        lines, passed = [], 0
        for row in self.data["rows"]:
            if cases is not None and row["case"] not in cases:
                continue
            if row["state"] == "passed":
                passed += 1
                continue
            line = f"{row['case']:<28} {row['candidate']:<38} "
            if row["state"] == "measured":
                line += f"{1e3 * row['wall']['p50']:10.3f} ms"
                if row["device"]:
                    line += f"  device {1e3 * row['device']['p50']:9.4f} ms"
                for name, unit in rates.items():
                    if name in row["rate"]:
                        line += f"  {row['rate'][name]:,.4g} {unit}"
                line += f"  n {row['wall']['n']}{' (cut short)' if row.get('cut') else ''}"
            else:
                line += row["state"] + (f": {row['why']}" if row.get("why") else "")
            lines.append(line)
        if passed:
            lines.insert(0, f"{passed} check{'s' if passed > 1 else ''} passed")
        return "\n".join(lines)
