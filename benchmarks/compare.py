"""Compares two runs of one machine: what became slower, and whether that is more than noise.

    python benchmarks/compare.py A B --fail-over 5

A is before, B after: runs as run.py writes them, or directories, of which the newest run counts.
The exit status is 0 if nothing of ours regressed, 1 if something did, 2 after a wrong command line
or if the two cannot be compared: of different machines, nothing in common, a rehearsal.

A row's change is B's median over A's, by the clock that counts: on the device where both have it
and the case is of kernels with cold caches, else on the wall. Three things can change it although
the code does not:

- **sampling**: a median of n calls is uncertain by se = 1.2533 s / sqrt(n), where the standard
  deviation s = (p80 - p20) / 1.683, as in a normal distribution. Allowed are 2 se of each run, as
  the root of the sum of squares; with n < 10 more, by Student's t over the normal quantile; a
  single call, which says nothing of its spread, is taken to be off by up to 25 %.
- **machine**: two runs differ by more than their calls do. Allowed is the largest of MACHINE_NOISE;
  what the machine was seen to waver within a run: the standard deviation, over the cases, of the
  median rate of a fixed product, and for kernels with cold caches of a fixed copy, which are timed
  before every round (the case's pulse); and the scatter of the peers of the same family: their code
  is the same, so what they changed by unlike each other (2 deviations about their median change) is
  the machine's.
- **drift**: how much faster or slower that product, or copy, was in the case's second run (in runs
  without a pulse: the ceiling of fp32 products). It widens what is allowed, both ways, and is never
  divided out: a machine that was 8 % slower allows 8 % more.

    noise = sqrt(sampling^2 + machine^2) + drift

A row is `slower` if its ratio is above 1 + noise, `faster` if below 1 / (1 + noise); a REGRESSION
if it is ours, slower, and above 1 + --fail-over; `within noise` if it changed by more than
--fail-over, but not by more than noise. Ours measured before, and now refused, failed, absent or
unfinished is LOST, a regression whatever the times. Peers and memory are printed, and never fail.
"""

import argparse
import math
import statistics
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from changes import MACHINE_NOISE, PULSES, Change, Compared, compare
from goals import OURS
from ledger import commit_of, read_run

_VERSIONS = ("torch", "transformers", "sentence-transformers", "onnxruntime", "onnx", "numpy")
_VERSIONS += ("triton", "python", "os", "cuda", "cudnn", "cpu_capability", "variables")
_WIDTH = 100
_LEAST_PEERS = 3  # so many at least make a majority


# --- files ---------------------------------------------------------------------------------------


def read(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return a run and its file: the newest that is no rehearsal, if the path is a directory.

    Raises:
        ValueError: there is no run, or it cannot be compared with any; the file is named.
        OSError: it cannot be read.
    """
    if not path.exists():
        raise ValueError(f"{path}: want a run or a directory of runs, got nothing")
    if not path.is_dir():
        return path, _checked(path)
    runs, last = [], "no .json file"
    for file in sorted(path.glob("*.json")):
        try:
            data = _checked(file)
        except ValueError as error:
            last = str(error)
            print(f"left out: {error}", file=sys.stderr)
            continue
        if data["rehearsal"]:
            last = f"{file.name}, a rehearsal"
        else:
            runs.append((data["started"], file.name, file, data))
    if not runs:
        raise ValueError(f"{path}: want a directory with a run, got {last}")
    return max(runs, key=lambda run: run[:2])[2:]


def _checked(path: Path) -> dict[str, Any]:
    """Return a run whose measured rows have what the noise is computed from."""
    data = read_run(path)
    for row in data["rows"]:
        for clock in ("wall", "device") if row["state"] == "measured" else ():
            time = row.get(clock)
            if time is None:
                continue
            numbers = [time.get(name) for name in ("p20", "p50", "p80", "n")]
            good = all(type(v) in (int, float) and 0 < v < math.inf for v in numbers)
            if not (good and numbers[0] <= numbers[1] <= numbers[2] and type(time["n"]) is int):
                where = f"{path.name}: {row['case']}, {row['candidate']}: {clock}"
                raise ValueError(f"{where}: want p20 <= p50 <= p80 of n calls, got {time}")
    for case, of in data["cases"].items():
        pulse = of.get("pulse") or {}
        rates = [(pulse[name] or {}).get("p50") for name in PULSES if name in pulse]
        good = all(type(rate) in (int, float) and 0 < rate < math.inf for rate in rates)
        if pulse and not (rates and good):
            raise ValueError(f"{path.name}: {case}: pulse: want a p50 above 0, got {of['pulse']}")
    return data


# --- the page ------------------------------------------------------------------------------------


def _number(seconds: float) -> str:
    return f"{1e3 * seconds:,.4g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _table(changes: Iterable[Change], name: str, parts: bool) -> Iterator[str]:
    """Give the lines of a table, `parts`: with what the noise is made of."""
    head = [name, "A ms", "B ms", "change %", "noise %"]
    head += ["sampling", "machine", "drift"] if parts else []
    rows = [[*head, "verdict"]]
    for one in changes:
        label = one.case if one.candidate == OURS else f"{one.case}: {one.candidate}"
        row = [label, *map(_number, one.times), f"{100 * (one.ratio - 1):+.1f}"]
        row.append(f"+-{100 * one.noise:.1f}")
        of = (one.sampling, one.machine, one.drift) if parts else ()
        rows.append([*row, *(f"{100 * part:.1f}" for part in of), one.verdict])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = min(widths[0], _WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    for label, *middle, verdict in rows:
        if len(label) > first:  # on a line of its own
            yield from textwrap.wrap(label, _WIDTH)
            label = ""
        cells = [f"{cell:>{width}}" for cell, width in zip(middle, widths[1:-1], strict=True)]
        yield "  ".join([f"{label:<{first}}", *cells, verdict])


def _of_peers(found: Compared, versions: bool) -> str:
    """Return what it says of the machine that most peers moved the same way, or nothing."""
    theirs, ours = ([c.ratio for c in found.changes if c.ours is own] for own in (False, True))
    if len(theirs) < _LEAST_PEERS:
        return ""
    limit, size = 1 + MACHINE_NOISE / 100, 100 * abs(statistics.median(theirs) - 1)
    for word, sign in (("slower", 1), ("faster", -1)):
        if 2 * sum(ratio**sign > limit for ratio in theirs) > len(theirs):
            too = ", too" if ours and statistics.median(ours) ** sign > limit else ""
            why = "the machine, or other versions" if versions else "the machine"
            return f"the peers are {size:.1f} % {word}{too}: {why} more likely than the code"
    return ""


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, _WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def _title(name: str, path: Path, data: dict[str, Any]) -> str:
    unfinished = "" if data.get("finished") else ", not finished"
    of = f"{data['started'][:16]}, commit {commit_of(data['environment'])}"
    return f"{name}  {of}, {data.get('suite')}{unfinished}: {path}"


def _versions(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    pairs = [(name, before.get(name), after.get(name)) for name in _VERSIONS]
    return [f"{name} {was} before, {now} after" for name, was, now in pairs if was != now]


def render(before: dict[str, Any], after: dict[str, Any], found: Compared, peers: bool) -> str:
    """Return all that is said of two runs but their names; `peers`: all rows of theirs, too."""
    order = ("REGRESSION", "slower")
    changes = sorted(
        found.changes,
        key=lambda one: order.index(one.verdict) if one.verdict in order else len(order),
    )
    ours = [one for one in changes if one.ours]
    theirs = [one for one in changes if not one.ours]
    versions = _versions(before["environment"], after["environment"])
    lost = [f"LOST: {case}: {candidate}: {now}" for case, candidate, now in found.lost]
    lines = [part for line in lost for part in _wrapped(line)]
    lines += _table(ours, "case", parts=True) if ours else []
    shown = [one for one in theirs if peers or one.verdict in ("slower", "faster")]
    if shown:
        lines += ["", "Peers, whatever they do:" if peers else "Peers that moved:"]
        lines += _table(shown, "case", parts=False)
    notes = [f"not compared: {case}: {why}" for case, why in found.others]
    notes += [f"more memory: {line}" for line in found.memory]
    notes += [f"other versions: {line}" for line in versions]
    said = _of_peers(found, bool(versions))
    notes += [said] if said else []
    lines += ["", *(part for note in notes for part in _wrapped(note))] if notes else []
    counts = Counter(one.verdict for one in ours)
    over = f"(> {100 * changes[0].over:g} % and beyond noise)" if changes else ""
    names = {name: name for name in ("same", "within noise", "faster", "slower")}
    names["REGRESSION"] = f"regression{'s' if counts['REGRESSION'] > 1 else ''} {over}"
    parts = [f"{counts[key]} {name}" for key, name in names.items() if counts[key]]
    parts += [f"{len(found.lost)} LOST"] if found.lost else []
    total = len(ours) + len(found.lost)
    return "\n".join([*lines, "", f"{total} case{'s' if total > 1 else ''}: {', '.join(parts)}"])


def _percent(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"want a percentage above 0, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two runs, print what changed, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="A", help="a run, or a directory of runs")
    parser.add_argument("after", type=Path, metavar="B", help="the same, measured later")
    parser.add_argument(
        "--fail-over",
        type=_percent,
        default=5.0,
        metavar="PERCENT",
        help="what a regression is, if it is beyond noise, too; default 5",
    )
    parser.add_argument("--all", action="store_true", help="show every row of the peers, too")
    wanted = parser.parse_args(argv)
    try:
        runs = [read(path) for path in (wanted.before, wanted.after)]
        titles = [_title(name, *run) for name, run in zip("AB", runs, strict=True)]
        datas = [data for _, data in runs]
        found = compare(*datas, wanted.fail_over / 100)
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print("\n".join([*titles, "", render(*datas, found, wanted.all)]))
    return int(found.regressed)


if __name__ == "__main__":
    sys.exit(main())
