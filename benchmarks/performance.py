"""What was measured on CPUs: docs/performance.md and README's table, made from the results.

    python benchmarks/performance.py            write them
    python benchmarks/performance.py --check    only compare; 1 if one differs

Each part shows one run, the newest of those with most of its rows; the ledger has all of them
beside their goals.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ledger
import page_kernels
import readme_table
from ledger import Kept, figure
from page_parts import PARTS, Shown
from record import ROOT

PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
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


def _machine(run: Kept) -> str:
    """Return what a run was measured on, with what and from which sources."""
    data, of = run.data, run.data["environment"]
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
        f" [{run.name}](../benchmarks/results/{run.name})",
    ]
    return "\n".join(lines) + "\n"


def _served(shown: Shown) -> str:
    """Return what served our ops, by row where it differs."""
    lines: list[str] = []
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


def _behind(all_shown: Sequence[Shown], kernels: page_kernels.Kernels | None) -> str:
    """Return the list of peers that are faster than bert_fast, each case once."""
    lines: dict[str, str] = {}
    compared = set()
    for shown in all_shown:
        for case in shown.cases():
            ratios = shown.ratios(case)
            compared |= {case} if ratios else set()
            faster = [f"{figure(value)}x {peer}" for value, peer in ratios if value < 1]
            if faster and case not in lines:
                label = f"{shown.part.rows[case]}, {shown.part.dtype}"
                lines[case] = f"- {label}: {'; '.join(faster)}\n"
    for case in kernels.cases() if kernels is not None else ():
        ratios = kernels.ratios(case)
        compared |= {case} if ratios else set()
        faster = [f"{figure(value)}x {peer}" for value, peer in ratios if value < 1]
        if faster:
            lines[case] = f"- {kernels.label(case)}: {'; '.join(faster)}\n"
    if lines:
        return "The peer's time as a share of ours:\n\n" + "".join(lines.values())
    return (
        f"No peer, in {len(compared)} rows that are compared.\n" if compared else "Nothing yet.\n"
    )


def render(runs: Sequence[Kept]) -> str:
    """Return the text of the page."""
    found = [(part, Shown.of(part, runs)) for part in PARTS]
    kernels = page_kernels.Kernels.of(runs)
    texts = [HEAD, "## Where a peer is faster\n"]
    texts.append(_behind([shown for _, shown in found if shown is not None], kernels))
    for part, shown in found:
        texts.append(f"## {part.title}\n\n{part.words}\n")
        texts += [f"{ledger.NOTHING.capitalize()}.\n"] if shown is None else _part(shown)
    texts.append(f"## {page_kernels.TITLE}\n\n{page_kernels.WORDS}\n")
    if kernels is None:
        texts.append(f"{ledger.NOTHING.capitalize()}.\n")
    else:
        texts += [_machine(kernels.run), kernels.table(), *kernels.untimed()]
    return "\n".join(texts)


def _part(shown: Shown) -> list[str]:
    """Return what is said of the run that a part shows."""
    missing = [name for case, name in shown.part.rows.items() if case not in shown.cases()]
    texts = [_machine(shown.run) + _served(shown), _table(shown, _time, against=True)]
    if missing:
        texts.append(f"{ledger.NOTHING.capitalize()}: {'; '.join(missing)}.\n")
    texts.append(f"Difference:\n\n{_table(shown, _difference)}")
    if any(_memory(shown.rows.measured(c)) != ledger.NOTHING for c in shown.cases()):
        texts.append(f"Memory:\n\n{_table(shown, _memory)}")
    else:
        texts.append(f"Memory: {ledger.NOTHING}.\n")
    return texts


def main(
    argv: Sequence[str] | None = None,
    results: Path = ledger.RESULTS,
    page: Path = PAGE,
    readme: Path = README,
) -> int:
    """Write or check the page and README's table, and return the exit status."""
    parser = argparse.ArgumentParser(description="docs/performance.md and README's table.")
    parser.add_argument("--check", action="store_true", help="only compare; 1 if one differs")
    wanted = parser.parse_args(argv)
    try:
        runs = ledger.load(results)
        was = {page: page.read_text("utf-8") if page.exists() else ""}
        was[readme] = readme.read_text("utf-8")
        made = {page: render(runs), readme: readme_table.replace(was[readme], runs)}
    except (ValueError, OSError) as error:
        print(f"performance: {error}", file=sys.stderr)
        return 1
    if not wanted.check:
        page.parent.mkdir(parents=True, exist_ok=True)
        for path, text in made.items():
            path.write_text(text, "utf-8")
        return 0
    for path, name in ((page, "docs/performance.md"), (readme, "README.md")):
        lines = (was[path].splitlines(True), made[path].splitlines(True))
        sys.stdout.writelines(difflib.unified_diff(*lines, name, "as the results have it"))
    return int(was != made)


if __name__ == "__main__":
    sys.exit(main())
