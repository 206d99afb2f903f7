"""The page of what was measured on CPUs: docs/performance.md, made from the results.

    python benchmarks/performance.py            write it
    python benchmarks/performance.py --check    only compare; 1 if it differs

Each part shows one run, the newest of those with most of its rows; the ledger has all of them
beside their goals.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ledger
from goals import CPU, OURS, Place, Rows
from ledger import Kept, figure
from record import ROOT
from targets import CLASSES

PAGE = ROOT / "docs" / "performance.md"
HEAD = """\
# Performance on CPUs

Made by `python benchmarks/performance.py` from [the results](../benchmarks/results/README.md); not
to be edited. A test fails when it differs from them. Another processor has other ratios.

- Times are medians of single calls, in brackets the 20th and 80th percentile. All candidates of a
  row are loaded in one process, with the same weights and batches, and take turns in a new order
  each round. None is timed before its answers have passed a check against fp64, and each passes it
  once more after its last round.
- **against**: the peer's time divided by ours; below 1.00x the peer is faster.
- **difference**: the largest to fp64, of all values, padding left out.
- **memory**: the most that is resident during one call, in MiB, in a process with that candidate
  alone, after a first call; in brackets without what its imports take. It is measured apart from
  the times. Not measured: what exporting, compiling or loading takes for a moment.
"""


@dataclass(frozen=True)
class Part:
    """A part of the page.

    Attributes:
        title: its heading.
        place: rows of other devices and dtypes do not count.
        rows: its cases, with what the table calls them.
        words: what its rows are.
        against: the columns of ratios: what they are called, and whose names belong to it.
    """

    title: str
    place: Place
    rows: dict[str, str]
    words: str
    against: dict[str, Callable[[str], bool]]


_TRANSFORMERS = {"transformers SDPA": CLASSES["transformers SDPA"]}
_FULL, _SHARE = "{}, full", "{}, {} % filled"
PARTS = (
    Part(
        "Encoder, BERT-base in fp32",
        CPU,
        {
            "cpu 1x128": _FULL.format("1 x 128"),
            "cpu 8x128": _FULL.format("8 x 128"),
            "cpu 2x512": _FULL.format("2 x 512"),
            "cpu 16x128 33%": _SHARE.format("16 x 128", 33),
            "cpu 8x512 46%": _SHARE.format("8 x 512", 46),
        },
        "One forward of a padded batch with its mask, to hidden states. `onnxruntime` is the graph"
        " through ONNX Runtime's optimizer for transformers, `onnxruntime plain` the exported one"
        " with what a session optimizes by itself.",
        _TRANSFORMERS | {"ONNX Runtime": CLASSES["ONNX Runtime"]},
    ),
    Part(
        "Encoder, BERT-base in bf16",
        Place("cpu", "bf16"),
        {
            "cpu 8x128 bf16": _FULL.format("8 x 128"),
            "cpu 16x128 33% bf16": _SHARE.format("16 x 128", 33),
        },
        "The same with the model in bf16, which is never the default on a CPU. A candidate may be"
        " off fp64 by twice what transformers' own bf16 is off, and by a fixed bound.",
        _TRANSFORMERS,
    ),
    Part(
        "Pre-training of small models in fp32",
        CPU,
        {
            "cpu mini 32x128": "BERT-mini, 32 x 128",
            "cpu small 32x128": "BERT-small, 32 x 128",
        },
        "One step: forward with dropout 0.1, masked-LM and next-sentence loss, backward, AdamW."
        " transformers computes the masked-LM head at every token, bert_fast at the masked ones,"
        " 15 %. Checked are loss and gradients without dropout; the difference is that of the"
        " output that comes nearest to its bound.",
        _TRANSFORMERS | {"the fastest peer": CLASSES["best peer"]},
    ),
)


@dataclass(frozen=True)
class Shown:
    """A part and the run that it shows."""

    part: Part
    run: Kept
    rows: Rows

    @classmethod
    def of(cls, part: Part, runs: Sequence[Kept]) -> "Shown | None":
        """Choose the newest of the runs with most rows of ours."""
        able = [cls(part, run, Rows(run.data, part.place)) for run in runs]

        def rank(one: "Shown") -> tuple[int, str, str]:
            return len(one.cases()), one.run.data["started"], one.run.name

        best = max(able, key=rank, default=None)
        return best if best is not None and best.cases() else None

    def cases(self) -> list[str]:
        """Return the cases in which ours was measured."""
        return [case for case in self.part.rows if self.rows.measured(case) is not None]

    def candidates(self) -> list[str]:
        """Return ours and all others that were measured somewhere, in the order of their rows."""
        found = dict.fromkeys([OURS])
        for case in self.cases():
            found |= dict.fromkeys(self.rows.peers(case))
        return list(found)

    def ratios(self, case: str) -> list[tuple[float, str]]:
        """Return each peer's time divided by ours, the fastest first."""
        return sorted((self.rows.over(case, p, case, OURS), p) for p in self.rows.peers(case))


def _state(shown: Shown, case: str, candidate: str) -> str:
    """Return what stands where a candidate has no time."""
    for row in shown.run.data["rows"]:
        if (row["case"], row["candidate"]) == (case, candidate):
            return row["state"]
    return ""


def _time(row: dict[str, Any]) -> str:
    wall = {name: figure(1e3 * row["wall"][name]) for name in ("p20", "p50", "p80")}
    cut = ", cut short" if row.get("cut") else ""
    return f"{wall['p50']} ms ({wall['p20']} to {wall['p80']}{cut})"


def _difference(row: dict[str, Any]) -> str:
    return f"{row['error']['own']['max']:.1e}" if row.get("error") else ledger.NOTHING


def _memory(row: dict[str, Any]) -> str:
    memory = row.get("memory") or {}
    if "peak" not in memory:
        return ledger.NOTHING
    peak, own = memory["peak"] / 2**20, (memory["peak"] - memory["imported"]) / 2**20
    return f"{peak:,.0f} ({own:,.0f})"


def _table(shown: Shown, cell: Callable[[dict[str, Any]], str], against: bool = False) -> str:
    """Return a table with a column for each candidate, and those of the ratios if asked for."""
    candidates, part = shown.candidates(), shown.part
    labels = [f"against {label}" for label in part.against] if against else []
    lines = []
    for case in shown.cases():
        cells = [part.rows[case]]
        for candidate in candidates:
            row = shown.rows.measured(case, candidate)
            cells.append(cell(row) if row is not None else _state(shown, case, candidate))
        for chosen in part.against.values() if against else ():
            of = [(value, peer) for value, peer in shown.ratios(case) if chosen(peer)]
            cells.append(f"{figure(of[0][0])}x" if of else ledger.NOTHING)
        lines.append(cells)
    return ledger.table(["", *candidates, *labels], lines)


def _machine(shown: Shown) -> str:
    """Return what the run was measured on, with what and from which sources."""
    data, of = shown.run.data, shown.run.data["environment"]
    rates = data["ceilings"].get("matmul_tflop_per_s", {})
    products = ", ".join(f"{name} {figure(rate)}" for name, rate in rates.items())
    sets = ", ".join(of.get("instruction_sets") or ["none of those asked for"])
    packages = ("torch", "transformers", "onnxruntime")
    versions = ", ".join(f"{name} {of.get(name) or 'absent'}" for name in packages)
    lines = [
        f"- processor: {of['device']}, {of.get('threads', '?')} threads; {sets}"
        + (f"; products in TFLOP/s: {products}" if products else ""),
        f"- {versions}, Python {of.get('python', '?')}, {of.get('os', '?')}",
        f"- commit {ledger.commit_of(of)}, {data['started'][:10]}, `{data['command']}`:"
        f" [{shown.run.name}](../benchmarks/results/{shown.run.name})",
    ]
    said: dict[str, list[str]] = {}
    for case in shown.cases():
        said.setdefault(_how(shown.rows.measured(case)), []).append(shown.part.rows[case])
    for how, names in said.items():
        where = f" ({'; '.join(names)})" if len(said) > 1 else ""
        lines.append(f"- bert_fast{where}: {how}")
    return "\n".join(lines) + "\n"


def _how(row: dict[str, Any]) -> str:
    """Return what served our ops, as the row's notes have it."""
    notes = row.get("notes") or {}
    by: dict[str, list[str]] = {}
    for op, name in sorted(notes.get("ops", {}).items()):
        by.setdefault(name, []).append(op)
    said = [f"{name} for {', '.join(ops)}" for name, ops in sorted(by.items())]
    if "extension" in notes:
        said.append(f"the extension: {notes['extension']}")
    if "cpu_library" in notes:
        why = "measured faster at first use" if notes.get("cpu_library_ms") else "chosen by hand"
        said.append(f"fp32 products through {notes['cpu_library']}, {why}")
    return "; ".join(said) or "no notes"


def _behind(all_shown: Sequence[Shown]) -> str:
    """Return the list of peers that are faster than bert_fast."""
    lines, compared = [], 0
    for shown in all_shown:
        for case in shown.cases():
            ratios = shown.ratios(case)
            compared += bool(ratios)
            faster = [f"{figure(value)}x {peer}" for value, peer in ratios if value < 1]
            if faster:
                dtype = shown.run.data["cases"][case]["dtype"]
                lines.append(f"- {shown.part.rows[case]}, {dtype}: {'; '.join(faster)}\n")
    if lines:
        return "The peer's time as a share of ours:\n\n" + "".join(lines)
    return f"No peer, in {compared} rows that are compared.\n" if compared else "Nothing yet.\n"


def render(runs: Sequence[Kept]) -> str:
    """Return the text of the page."""
    found = [(part, Shown.of(part, runs)) for part in PARTS]
    texts = [HEAD, "## Where a peer is faster\n"]
    texts.append(_behind([shown for _, shown in found if shown is not None]))
    for part, shown in found:
        texts.append(f"## {part.title}\n\n{part.words}\n")
        if shown is None:
            texts.append(f"{ledger.NOTHING.capitalize()}.\n")
            continue
        missing = [name for case, name in part.rows.items() if case not in shown.cases()]
        texts.append(_machine(shown))
        texts.append(_table(shown, _time, against=True))
        if missing:
            texts.append(f"{ledger.NOTHING.capitalize()}: {'; '.join(missing)}.\n")
        texts.append(f"Difference:\n\n{_table(shown, _difference)}")
        if any(_memory(shown.rows.measured(c)) != ledger.NOTHING for c in shown.cases()):
            texts.append(f"Memory:\n\n{_table(shown, _memory)}")
        else:
            texts.append(f"Memory: {ledger.NOTHING}.\n")
    return "\n".join(texts)


def main(
    argv: Sequence[str] | None = None, results: Path = ledger.RESULTS, page: Path = PAGE
) -> int:
    """Write or check the page, and return the exit status."""
    parser = argparse.ArgumentParser(description="docs/performance.md, from the results.")
    parser.add_argument("--check", action="store_true", help="only compare; 1 if it differs")
    wanted = parser.parse_args(argv)
    try:
        text = render(ledger.load(results))
    except (ValueError, OSError) as error:
        print(f"performance: {error}", file=sys.stderr)
        return 1
    if not wanted.check:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, "utf-8")
        return 0
    was = page.read_text("utf-8") if page.exists() else ""
    names = ("docs/performance.md", "as the results have it")
    lines = (was.splitlines(True), text.splitlines(True))
    sys.stdout.writelines(difflib.unified_diff(*lines, *names))
    return int(was != text)


if __name__ == "__main__":
    sys.exit(main())
