"""A report of runs: tables, pictures, and where a peer is faster, as Markdown and as one page.

    python benchmarks/report.py RESULTS... --out DIR

RESULTS are files of runs, or directories that are searched for them. DIR gets report.md, index.html
and plots/. The same results give the same bytes.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ledger
import report_page as page
from goals import OURS
from ledger import figure
from report_cases import FAMILIES, Shown, Source, merge, percent, read
from report_page import Block, Cell, Heading, Items, Table, Text

TITLE = "bert_fast: what was measured"
REHEARSAL = "a rehearsal: nothing of it is evidence"
WANT = "want matplotlib for pictures: pip install 'bert-fast[bench]'"
_FAMILY = {"kernels": "Kernels", "encoder": "Encoder", "pretraining": "Pre-training"}
_VERSIONS = ("torch", "triton", "cuda", "cudnn", "transformers", "onnxruntime", "numpy", "python")


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


# --- the runs ------------------------------------------------------------------------------------


def _size(value: float) -> str:
    return f"{value / 2**30:,.1f} GiB"


def _machine(of: dict[str, Any]) -> str:
    gpu = (of.get("gpu") or {}).get("name")
    processor = of.get("processor_model") or of.get("processor")
    parts = [of.get("device"), f"GPU {gpu}" if gpu and gpu != of.get("device") else ""]
    parts.append(f"processor {processor}" if processor and processor != of.get("device") else "")
    parts += [", ".join(of.get("instruction_sets") or [])]
    parts.append(f"{_size(of['memory'])} of memory" if of.get("memory") else "")
    return "; ".join(str(part) for part in parts if part) or "not said"


def _versions(of: dict[str, Any]) -> str:
    found = [f"{name} {of[name]}" for name in _VERSIONS if of.get(name)]
    return ", ".join([*found, *([str(of["os"])] if of.get("os") else [])]) or "not said"


def _commit(of: dict[str, Any]) -> str:
    try:
        name = ledger.commit_of(of)
    except ValueError:
        return "not said"
    return (
        f"{name.removesuffix('-dirty')}, with changes that are in no commit"
        if (name.endswith("-dirty"))
        else name
    )


def _ceilings(of: dict[str, Any]) -> str:
    copy = of.get("copy_gb_per_s")
    parts = [f"copy {figure(copy)} GB/s"] if copy else []
    for dtype, rate in (of.get("matmul_tflop_per_s") or {}).items():
        parts += [f"{dtype} products {figure(rate)} TFLOP/s"] if rate else []
    return ", ".join(parts) or "not measured"


def _ended(data: dict[str, Any]) -> str:
    """Return whether a run is whole, and what is missing of it."""
    ended = data.get("ended") or "it was killed, or still runs"
    said = [ended]
    for stage in data.get("stages") or []:
        if stage.get("ended") != "done":
            said.append(f"{stage.get('stage')}: {stage.get('ended')}")
        elif stage.get("restarts"):
            said.append(f"{stage['stage']}: begun anew {stage['restarts']} times")
    cut = sum(bool(row.get("cut")) for row in data["rows"])
    said += [f"{_count(cut, 'row')} cut short"] if cut else []
    return "; ".join(said)


def _states(data: dict[str, Any]) -> str:
    states: dict[str, int] = {}
    for row in data["rows"]:
        states[row["state"]] = states.get(row["state"], 0) + 1
    return ", ".join(f"{n} {state}" for state, n in sorted(states.items())) or "none"


def _pulse(data: dict[str, Any]) -> str:
    """Return how steady the machine was."""
    kinds: dict[tuple[str, str], list[dict[str, float]]] = {}
    for case in data["cases"].values():
        pulse = case.get("pulse") or {}
        side, size = pulse.get("side", ""), pulse.get("bytes", 0)
        shape = [str(pulse.get("dtype", "")), f"{side} x {side} x {side}" if side else ""]
        for what, rate, unit in (
            (f"product ({', '.join(filter(None, shape))})", "tflop_per_s", "TFLOP/s"),
            (f"copy ({size / 2**20:,.3g} MiB)", "gb_per_s", "GB/s"),
        ):
            if pulse.get(rate):
                kinds.setdefault((what, unit), []).append(pulse[rate])
    texts = []
    for (what, unit), found in kinds.items():
        low, high = min(p["p20"] for p in found), max(p["p80"] for p in found)
        texts.append(
            f"a fixed {what} reached {figure(low)} to {figure(high)} {unit} over the run, before"
            f" the rounds of {len(found)} cases"
        )
    return "; ".join(texts)


def _runs(runs: Sequence[Source], cases: Sequence[Shown]) -> list[Block]:
    blocks: list[Block] = []
    for run in runs:
        of, data = run.data["environment"], run.data
        shown = sum(case.run is run for case in cases)
        lines = [
            ("machine", _machine(of)),
            ("threads", str(of.get("threads") or "not said")),
            ("versions", _versions(of)),
            ("commit", _commit(of)),
            ("date", data["started"]),
            ("command", str(data.get("command") or "")),
            ("ceilings, measured", _ceilings(data.get("ceilings") or {})),
            ("ended", _ended(data)),
            ("rows", _states(data)),
            ("steadiness", _pulse(data)),
            ("cases shown below", str(shown)),
        ]
        whole = data.get("ended") == "complete" and not any(r.get("cut") for r in data["rows"])
        rows = []
        for name, text in lines:
            kind = "code" if name == "command" else "text"
            kind = "loud" if name == "ended" and not whole else kind
            rows += [[Cell(name), Cell(text, kind)]] if text else []
        if run.rehearsal:
            blocks.append(Text(REHEARSAL, loud=True))
        name = f"{run.label[0].upper()}{run.label[1:]}: {run.name}"
        blocks.append(Table(name, ("", ""), [("", rows)]))
    return blocks


# --- losses --------------------------------------------------------------------------------------


def _times(ratio: float) -> str:
    """Return a ratio in words, never rounded up to 1.00x."""
    if ratio < 1 and figure(ratio) == "1.00":
        digits = next(n for n in range(3, 17) if float(f"{ratio:.{n}f}") < 1)
        return f"{ratio:.{digits}f}x"
    return f"{figure(ratio)}x"


def _ms(time: dict[str, float]) -> str:
    p20, p50, p80 = (figure(1e3 * time[name]) for name in ("p20", "p50", "p80"))
    return f"{p50} ({p20} to {p80})"


def _where(case: Shown) -> str:
    words = [case.name, *([] if case.dtype in case.name else [case.dtype])]
    return ", ".join([*words, *(["a rehearsal"] if case.run.rehearsal else [])])


def _behind(cases: Sequence[Shown]) -> list[Block]:
    blocks: list[Block] = []
    troubles = [(case, *trouble) for case in cases for trouble in case.refused]
    if troubles:
        rows = [
            [Cell(_where(case)), Cell(state, "loud"), Cell(why), Cell(run.label, "label")]
            for case, run, state, why in troubles
        ]
        blocks.append(
            Text(f"bert_fast itself was not measured in {_count(len(rows), 'row')}:", loud=True)
        )
        head = ("case", "state", "why", "run")
        blocks.append(Table("Where bert_fast was not measured", head, [("", rows)]))
    compared = [case for case in cases if case.ratios()]
    losses = [(value, peer, case) for case in compared for value, peer in case.ratios()]
    whole = len(losses)
    losses = sorted(
        (loss for loss in losses if loss[0] < 1), key=lambda loss: (loss[0], loss[2].name, loss[1])
    )
    if not losses:
        where = f"No peer, in {_count(len(compared), 'case')} that are compared."
        return [*blocks, Text(where if compared else "Nothing is compared yet.")]
    rows = []
    for value, peer, case in losses:
        times = [Cell(_ms(case.spread(name)), "number") for name in (peer, OURS)]
        share = Cell(_times(value), "loud number")
        rows.append([Cell(_where(case)), share, Cell(peer), *times, Cell(case.run.label, "label")])
    n = len({id(case) for _, _, case in losses})
    blocks.append(
        Text(
            f"In {n} of {_count(len(compared), 'case')} that are compared, {len(losses)} of"
            f" {_count(whole, 'comparison')}. The worst stands first."
        )
    )
    head = ("case", "the peer's time / ours", "peer", "its ms (p20 to p80)")
    head += ("our ms (p20 to p80)", "run")
    return [*blocks, Table("Where a peer is faster", head, [("", rows)])]


# --- tables --------------------------------------------------------------------------------------


def _rate(case: Shown, candidate: str, name: str, share: str) -> str:
    rate, of = case.rate(candidate, name), case.rate(candidate, share)
    text = "" if rate is None else figure(rate)
    return f"{text} ({percent(of)} %)" if text and of is not None else text


def _error(row: dict[str, Any]) -> str:
    error = row.get("error") or {}
    own, allowed = error.get("own") or {}, error.get("allowed") or {}
    if own.get("max") is None:
        return ""
    most = f" of {allowed['max']:.1e}" if allowed.get("max") is not None else ""
    return f"{own['max']:.1e}{most}"


def _row(case: Shown, candidate: str) -> list[Cell]:
    row = case.rows[candidate]
    name = Cell(candidate, "ours" if candidate == OURS else "text")
    time = case.spread(candidate)
    if time is None:
        why = f"{row['state']}: {row['why']}" if row.get("why") else row["state"]
        loud = candidate == OURS or row["state"] == "refused"
        return [name, Cell(why, "loud" if loud else "text")]
    ratio, memory = case.ratio(candidate), case.memory(candidate)
    against = "" if ratio is None or candidate == OURS else _times(ratio)
    middle, low, high = (figure(1e3 * time[p]) for p in ("p50", "p20", "p80"))
    n = f"{time.get('n', '')}{', cut short' if row.get('cut') else ''}"
    return [
        name,
        Cell(middle, "number"),
        Cell(f"{low} to {high}", "number"),
        Cell(against, "loud number" if against and ratio < 1 else "number"),
        *(Cell(_rate(case, candidate, *of), "number") for of in _RATES[case.family].values()),
        Cell(_error(row), "number"),
        Cell("" if memory is None else figure(memory), "number"),
        Cell(n, "number"),
    ]


_PRODUCTS = {"TFLOP/s (of products)": ("tflop_per_s", "of_matmul")}
_TOKENS = {"real tokens/s": ("tokens_per_s", "")} | _PRODUCTS
_RATES = {
    "kernels": {"GB/s (of a copy)": ("gb_per_s", "of_copy")} | _PRODUCTS,
    "encoder": _TOKENS,
    "pretraining": _TOKENS,
}


def _head(family: str) -> tuple[str, ...]:
    times = "candidate", "median, ms", "p20 to p80, ms", "its time / ours"
    return (*times, *_RATES[family], "error, of what is allowed", "memory, MiB", "n")


def _value(value: Any) -> str:
    """Return a size; many lengths in short."""
    if not (isinstance(value, list) and value and all(isinstance(n, int) for n in value)):
        return str(value)
    low, high = min(value), max(value)
    return f"{len(value)} x {low}" if low == high else f"{len(value)} of {low} to {high}"


def _shape(case: Shown) -> str:
    """Return what a case works on, as far as the run says it."""
    facts, parts = case.facts, []
    lengths, fill = str(facts.get("lengths") or ""), facts.get("fill")
    if isinstance(facts.get("sizes"), dict):
        parts += [f"{name} {_value(value)}" for name, value in facts["sizes"].items()]
        parts += [f"as in {lengths}" if lengths not in ("", "full") else ""]
    elif re.search(r"\d", lengths):  # the whole of it, such as "8 x 128, full"
        parts.append(lengths)
    elif facts.get("sequences") and facts.get("longest"):
        parts.append(f"{facts['sequences']:,} x {facts['longest']:,}")
        parts.append(lengths)
    if case.family != "kernels" and fill is not None and not re.search("full|filled", lengths):
        parts.append(f"{100 * fill:.0f} % filled")
    kind = {"ids": "ids of tokens in host memory", "texts": "texts in host memory"}
    parts.append(kind.get(facts.get("input"), ""))
    direction = str(facts.get("direction") or "")
    parts.append({"both": "forward and backward"}.get(direction, direction))
    dropout = facts.get("p") or facts.get("dropout")
    parts.append(f"dropout {dropout}" if dropout else "")
    parts.append(str(facts.get("optimizer") or ""))
    return ", ".join(filter(None, parts))


def _tables(cases: Sequence[Shown], family: str) -> list[Block]:
    of = [case for case in cases if case.family == family]
    if not of:
        return [Text("Not measured yet.")]
    blocks: list[Block] = [Text(_NOTES[family])]
    for machine in dict.fromkeys(case.run.machine for case in of):
        here = [case for case in of if case.run.machine == machine]
        groups = []
        for case in here:
            of_case = ", ".join(filter(None, [_shape(case), case.dtype]))
            name = f"{case.name} ({of_case}; {case.run.label})"
            names = sorted(case.rows, key=lambda n: (n != OURS, not case.measured(n)))
            groups.append((name, [_row(case, candidate) for candidate in names]))
        if here[0].run.rehearsal:
            blocks.append(Text(REHEARSAL, loud=True))
        caption = f"{_FAMILY[family]}, {here[0].run.device}"
        blocks.append(Table(caption, _head(family), groups, "case"))
    return blocks


_COMMON = (
    " Medians of single calls in turns; below 1x the peer is faster. The error is the largest"
    " against the truth, beside what was allowed: nobody is timed whose answers are wrong."
)
_NOTES = {
    "kernels": "Calls of single ops. Times are those of the device where it has a clock."
    " Bytes and FLOPs count what must be moved and computed, each once." + _COMMON,
    "encoder": "Forwards of a batch; only real tokens count." + _COMMON,
    "pretraining": "Whole steps: forward, loss, backward and optimizer." + _COMMON,
}


def _repeat(cases: Sequence[Shown]) -> list[Block]:
    rows = []
    for case in cases:
        facts = case.facts
        command = facts.get("command") or case.run.data.get("command") or "not said"
        fields = facts.get("model"), _shape(case), facts.get("seed"), case.dtype
        texts = ["not said" if field in (None, "") else str(field) for field in fields]
        cells = [Cell(text) for text in (*texts, str(facts.get("device") or "not said"))]
        last = Cell(command, "code"), Cell(case.run.label, "label")
        rows.append([Cell(case.name), *cells, *last])
    if not rows:
        return [Text("Nothing was measured yet.")]
    head = ("case", "model", "shape", "seed", "dtype", "device", "command", "run")
    return [Table("What each case is made of, and what repeats it", head, [("", rows)])]


# --- the whole -----------------------------------------------------------------------------------


def build(runs: Sequence[Source]) -> dict[str, bytes]:
    """Return the files of a report by their names.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from report_plots import plots

    cases = merge(runs)
    blocks: list[Block] = []
    if any(run.rehearsal for run in runs):
        names = ", ".join(run.label for run in runs if run.rehearsal)
        blocks.append(Text(f"{names}: {REHEARSAL}", loud=True))
    compared = sum(bool(case.ratios()) for case in cases)
    blocks.append(
        Text(
            f"{_count(len(cases), 'case')} of {_count(len(runs), 'run')}, {compared} of them beside"
            " a peer. Where several runs of a machine have a case, the newest that measured it is"
            " shown."
        )
    )
    blocks += [Heading("Where a peer is faster"), *_behind(cases), Heading("Pictures")]
    files: dict[str, bytes] = {}
    found, left_out = plots(cases)
    for plot in found:
        wide = plot.wide()
        names = plot.name, plot.title, plot.caption, plot.alt
        blocks.append(page.Picture(*names, wide, plot.narrow()))
        files[f"plots/{plot.name}.svg"] = wide.encode()
        files |= {f"plots/{name}": content for name, content in plot.pngs().items()}
    if left_out:
        blocks += [Heading("Left out", 3), Items(left_out)]
    for family in FAMILIES:
        blocks += [Heading(_FAMILY[family]), *_tables(cases, family)]
    blocks += [Heading("To repeat a case"), *_repeat(cases)]
    blocks += [Heading("The runs"), *_runs(runs, cases)]
    files["report.md"] = page.markdown(TITLE, blocks).encode()
    files["index.html"] = page.html(TITLE, blocks).encode()
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Write a report, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="report", description="Tables and pictures of runs, and where a peer is faster."
    )
    parser.add_argument(
        "results", type=Path, nargs="+", help="files of runs, or directories with them"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory that it is written to")
    wanted = parser.parse_args(argv)
    try:
        runs = read(wanted.results)
        for run in runs:
            if run.rehearsal:
                print(f"report: {run.name}: {REHEARSAL}", file=sys.stderr)
        files = build(runs)
        (wanted.out / "plots").mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (wanted.out / name).write_bytes(content)
    except ImportError as error:
        if not (error.name or "").startswith("matplotlib"):
            raise
        print(f"report: {WANT}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"written: {wanted.out / 'report.md'}, {wanted.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
