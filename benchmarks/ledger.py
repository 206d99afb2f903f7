"""Writes benchmarks/results/README.md, the ledger: every goal beside the best that was measured.

python benchmarks/ledger.py                  write it from benchmarks/results/*/*.json
python benchmarks/ledger.py --check          exit 1 and show the difference if it is not up to date
python benchmarks/ledger.py --keep FILE...   first copy runs to benchmarks/results/
"""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goals import CPU, Measured, Target, in_unit
from record import Run
from targets import SECTIONS

TARGETS = [target for _, section in SECTIONS for target in section]
RESULTS = Path(__file__).resolve().parent / "results"
NOTHING = "not measured yet"
HEAD = """\
# What was measured

Made by `python benchmarks/ledger.py` from the runs in this folder; not to be edited. A test fails
when it differs from them.

- **goal**: the stretch is in brackets. "≥ 8x eager" means: at least eight times as fast as the
  fastest peer in eager mode, in the same run.
- **best measured**: of all runs on the right kind of machine, the one with most of the row's
  figures, then most goals met, then the best first figure. Times of different processors do not
  compare: in CPU rows it is the run whose ratios are best against their goals.
- **against peers**: the peer's time divided by ours, for the fastest peer of its kind; from the run
  with most peers. Below 1.00x the peer is faster.
- Times are medians. A candidate with wrong answers is refused and never timed. Rehearsals at
  reduced size do not count.
"""


@dataclass(frozen=True)
class Kept:
    """A run in the results.

    Attributes:
        name: of its file, relative to the results, with "/".
        data: its content.
    """

    name: str
    data: dict[str, Any]

    @property
    def link(self) -> str:
        """Its file as a link."""
        return f"[{self.name.removesuffix('.json')}]({self.name})"


@dataclass(frozen=True)
class Found:
    """A run and what it says about one target."""

    run: Kept
    measured: Measured


def read_run(path: Path) -> dict[str, Any]:
    """Return the content of a run's file.

    Raises:
        ValueError: it is none, or it cannot be read as one; the file is named.
    """
    try:
        data = Run.open(path).data
        for key, kind in (("environment", dict), ("cases", dict), ("rows", list), ("started", str)):
            if not isinstance(data.get(key), kind):
                raise ValueError(f"{key}: want {kind.__name__}, got {type(data.get(key)).__name__}")
        if not isinstance(data.get("rehearsal"), bool):
            raise ValueError("rehearsal: want true or false")
        for row in data["rows"]:
            name = f"{row['case']}, {row['candidate']}"
            for clock in ("wall", "device") if row["state"] == "measured" else ():
                time = row.get(clock)
                if (clock == "wall" or time is not None) and not _is_time(time):
                    raise ValueError(f"{name}: {clock}: want a p50 above 0, got {time}")
        for target in TARGETS:
            target.read(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path.parent.name}/{path.name}: {what}") from error
    return data


def _is_time(time: Any) -> bool:
    p50 = time.get("p50") if isinstance(time, dict) else None
    return isinstance(p50, int | float) and 0 < p50 < math.inf


def load(results: Path) -> list[Kept]:
    """Return the runs in the results, in the order of their names; rehearsals are left out."""
    runs = [
        Kept(path.relative_to(results).as_posix(), read_run(path))
        for path in sorted(results.glob("*/*.json"))
    ]
    return [run for run in runs if run.data["rehearsal"] is False]


def figure(value: float) -> str:
    """Return a number with three significant digits."""
    value = float(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(digits, 0)}f}"


def _best(target: Target, found: list[Found]) -> Found | None:
    """Return the run whose own figures the row shows."""

    def rank(one: Found) -> tuple:
        pairs = zip(target.parts, one.measured.values, strict=True)
        pairs = [(part, value) for part, value in pairs if value is not None]
        reached = [part.verdict(value) in ("met", "stretch") for part, value in pairs]
        first = [part.better(value) for part, value in pairs[:1]]
        return len(pairs), sum(reached), first, one.run.data["started"], one.run.name

    able = [one for one in found if any(v is not None for v in one.measured.values)]
    return max(able, key=rank, default=None)


def _best_on_cpu(target: Target, found: list[Found]) -> Found | None:
    """Return the run whose ratios are best against their goals."""

    def rank(one: Found) -> tuple:
        pairs = [
            ratio.value / against.goal
            for against, ratio in zip(target.against, one.measured.ratios, strict=True)
            if ratio is not None and against.goal is not None
        ]
        return len(pairs), min(pairs, default=0), one.run.data["started"], one.run.name

    return max(found, key=rank, default=None)


def _most_peers(found: list[Found], best: Found | None) -> Found | None:
    """Return the run whose comparisons the row shows: of those with most peers the fastest one."""

    def rank(one: Found) -> tuple:
        answered = sum(ratio is not None for ratio in one.measured.ratios)
        return answered, len(one.measured.peers), one is best, one.run.data["started"], one.run.name

    return max((one for one in found if one.measured.peers), key=rank, default=None)


@dataclass(frozen=True)
class Line:
    """A target and the runs that its row shows."""

    target: Target
    best: Found | None
    peers: Found | None
    newest: tuple[Kept, str] | None  # the newest run with rows of it, and their state

    @classmethod
    def of(cls, target: Target, runs: Iterable[Kept]) -> "Line":
        """Choose among the runs."""
        found, states = [], []
        for run in runs:
            measured, state = target.read(run.data), target.state(run.data)
            if measured is not None:
                found.append(Found(run, measured))
            if state is not None:
                states.append((run, state))
        newest = max(states, key=lambda one: (one[0].data["started"], one[0].name), default=None)
        if target.place == CPU:
            best = peers = _best_on_cpu(target, found)
        else:
            best = _best(target, found)
            peers = _most_peers(found, best)
        return cls(target, best, peers, newest)

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        goal = "<br>".join(text for text in (self.target.goal, self.target.peers) if text)
        title = f"**{self.target.key}**: {self.target.title}"
        return title, goal, self._own(), self._against(), self._files()

    def _own(self) -> str:
        lines = []
        if self.best is not None:
            measured = self.best.measured
            for part, value in zip(self.target.parts, measured.values, strict=True):
                label = f"{part.label}: " if part.label else ""
                if value is None:
                    lines.append(f"{label}{NOTHING}")
                else:
                    words = _words(part.verdict(value), part.goal)
                    lines.append(f"{label}{figure(value)}{in_unit(part.unit)}{words}")
            if measured.cut:
                lines.append("rounds cut short")
        if self.newest is not None and self.newest[1] in ("refused", "failed", "absent"):
            run, state = self.newest
            lines.append(f"**{state}** in {run.link}")
        return "<br>".join(lines) or NOTHING

    def _against(self) -> str:
        if self.peers is None:
            return NOTHING if self.target.against else ""
        lines = []
        for against, ratio in zip(self.target.against, self.peers.measured.ratios, strict=True):
            if ratio is None:
                lines.append(f"{against.label}: {NOTHING}")
                continue
            number = f"{figure(ratio.value)}x"
            number = f"**{number}**" if ratio.value < 1 else number
            words = _words(against.verdict(ratio.value), against.goal)
            label = f"{against.label}: " if len(self.target.against) > 1 else ""
            lines.append(f"{label}{number} {ratio.peer}{words}")
        return "<br>".join(lines)

    def _files(self) -> str:
        links = [found.run.link for found in (self.best, self.peers) if found is not None]
        if len(links) == 2 and links[0] != links[1]:
            links[1] = f"peers: {links[1]}"
        return "<br>".join(dict.fromkeys(links))


def _words(verdict: str, goal: float | None) -> str:
    met = "stretch met" if goal is None else "met, stretch too"
    words = {"stretch": met, "met": "met", "missed": "**missed**"}
    return f", {words[verdict]}" if verdict else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [[" ".join(str(c).split()).replace("|", "\\|") for c in row] for row in (head, *rows)]
    cells.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"


def _behind(lines: Iterable[Line]) -> str:
    """Return the list of peers that are faster than bert_fast: their time as a share of ours."""
    compared = [line for line in lines if line.peers is not None]
    if not compared:
        return "Nothing is compared yet.\n"
    items = []
    for line in compared:
        faster = [ratio for ratio in line.peers.measured.peers if ratio.value < 1]
        cases = dict.fromkeys(ratio.case for ratio in faster)
        for case in cases:
            peers = [f"{figure(r.value)}x {r.peer}" for r in faster if r.case == case]
            where = "" if case == line.target.key else f", {case}"
            items.append(
                f"- {line.target.key}{where}: {'; '.join(peers)} ({line.peers.run.link})\n"
            )
    if items:
        return "The peer's time as a share of ours:\n\n" + "".join(items)
    return f"No peer, in {len(compared)} rows that are compared.\n"


def render(runs: Sequence[Kept]) -> str:
    """Return the text of the ledger."""
    sections = [(title, [Line.of(t, runs) for t in section]) for title, section in SECTIONS]
    parts = [HEAD, "## Where a peer is faster\n"]
    parts.append(_behind(line for _, lines in sections for line in lines))
    for title, lines in sections:
        head = ("row", "goal", "best measured", "against peers", "file")
        parts += [f"## {title}\n", table(head, (line.cells() for line in lines))]
    parts.append("## The runs\n")
    head = ("file", "device", "processor", "copy, GB/s", "fp32, TFLOP/s", "bf16, TFLOP/s")
    head += ("date", "commit", "torch", "suite", "ended")
    parts.append(table(head, map(_entry, runs)) if runs else "None yet.\n")
    return "\n".join(parts)


def _entry(run: Kept) -> tuple[str, ...]:
    of = run.data["environment"]
    ceilings = run.data["ceilings"]
    products = ceilings.get("matmul_tflop_per_s", {})
    reached = (ceilings.get("copy_gb_per_s"), products.get("fp32"), products.get("bf16"))
    texts = (of.get("device"), of.get("processor"), *(rate and figure(rate) for rate in reached))
    last = (of.get("torch"), run.data.get("suite"), run.data.get("ended"))
    texts = (*texts, run.data["started"][:10], commit_of(of), *last)
    return run.link, *(str(text or "") for text in texts)


def commit_of(environment: dict[str, Any]) -> str:
    """Return what names the sources in a file name.

    Raises:
        ValueError: the environment says nothing of them.
    """
    commit, source = environment.get("commit"), environment.get("source")
    if commit and commit != "unknown":
        return commit[:7] + ("-dirty" if environment.get("dirty") else "")
    if source:
        return f"source-{source[:7]}"
    raise ValueError("environment: want a commit or a source")


def keep(paths: Sequence[Path], results: Path) -> list[Path]:
    """Copy runs to the results, and return where each of them is.

    A run that was killed is kept as far as it came. A run that is there already is not copied
    again, and none is overwritten. Nothing is copied unless all can be.

    Raises:
        ValueError: a file is no run, or one that is not kept; the message says which and why.
    """
    stems = []
    for path in paths:
        data = read_run(path)
        try:
            if data["rehearsal"]:
                raise ValueError("a rehearsal is never evidence")
            slug, started = data["environment"].get("slug"), data["started"]
            if not (isinstance(slug, str) and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)):
                raise ValueError(f"environment: want a slug such as nvidia-h200, got {slug}")
            if not re.match(r"\d{4}-\d\d-\d\dT", started):
                raise ValueError(f"started: want a date, got {started}")
            stem = f"{started[:10]}-{commit_of(data['environment'])}"
            if not re.fullmatch(r"[0-9A-Za-z-]+", stem):
                raise ValueError(f"environment: want a commit in hexadecimal, got {stem[11:]}")
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        stems.append(results / slug / stem)
    return [_copy(path, stem) for path, stem in zip(paths, stems, strict=True)]


def _copy(path: Path, stem: Path) -> Path:
    content, number, run = path.read_bytes(), 1, Run.open(path)
    if not run.data.get("finished"):
        run.data["ended"] = "killed"
        run.settle("the run was killed", save=False)
        content = run.text().encode()
    while True:
        kept = stem.with_name(stem.name + (f"-{number}" if number > 1 else "") + ".json")
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(content)
            return kept
        if kept.read_bytes() == content:
            return kept
        number += 1


def main(argv: Sequence[str] | None = None, results: Path = RESULTS) -> int:
    """Write or check the ledger, and return the exit status."""
    parser = argparse.ArgumentParser(description="The ledger: goals beside what was measured.")
    parser.add_argument("--check", action="store_true", help="only compare; 1 if it differs")
    parser.add_argument("--keep", type=Path, nargs="+", default=[], help="runs to copy first")
    wanted = parser.parse_args(argv)
    if wanted.check and wanted.keep:
        parser.error("--check writes nothing, --keep copies: want one of them")
    ledger = results / "README.md"
    try:
        for path in keep(wanted.keep, results):
            print(f"kept {path.relative_to(results).as_posix()}")
        text = render(load(results))
    except (ValueError, OSError) as error:
        print(f"ledger: {error}", file=sys.stderr)
        return 1
    if wanted.check:
        was = ledger.read_text("utf-8") if ledger.exists() else ""
        names = ("results/README.md", "as the results have it")
        lines = (was.splitlines(True), text.splitlines(True))
        difference = list(difflib.unified_diff(*lines, *names))
        sys.stdout.writelines(difference)
        return int(was != text)
    ledger.parent.mkdir(parents=True, exist_ok=True)
    ledger.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
