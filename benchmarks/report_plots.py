"""Which pictures a report has: the cases of each, and why one is left out."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import report_charts as charts
from goals import OURS
from ledger import figure
from report_cases import FAMILIES, Shown, percent
from report_sheet import DARK, LIGHT, NARROW, WIDE, Draw, Style, png, styles, svg

_NAMES = {"glue": "GLUE", "squad": "SQuAD", "wikipedia": "Wikipedia"}
_WORDS = {"kernels": "kernels", "encoder": "encoder", "pretraining": "pre-training"}
_LEAST = 3  # points that make a line


@dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
        name: of its files.
        title: its heading.
        caption: how to read it.
        alt: what it shows, in words.
        draw: draws it.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Draw

    def wide(self) -> str:
        """Return it as SVG for a wide page."""
        return svg(self.draw, WIDE, self.name, self.title)

    def narrow(self) -> str:
        """Return it as SVG for a phone."""
        return svg(self.draw, NARROW, self.name, self.title)

    def pngs(self) -> dict[str, bytes]:
        """Return it as PNG by the name of its file, for light and for dark paper."""
        light, dark = png(self.draw, LIGHT), png(self.draw, DARK)
        return {f"{self.name}.png": light, f"{self.name}-dark.png": dark}


def plots(cases: Sequence[Shown]) -> tuple[list[Plot], list[str]]:
    """Return the pictures of the cases, and which are left out and why."""
    style = styles(name for case in cases for name in case.rows if case.measured(name))
    machines: dict[str, list[Shown]] = {}
    for case in cases:
        machines.setdefault(case.run.machine, []).append(case)
    found: list[Plot] = []
    left_out: list[str] = []
    for make in (_time, _throughput, _roofline, _bandwidth, _memory, _ratios):
        for machine, of in machines.items():
            more = len(machines) > 1
            suffix = re.sub(r"[^A-Za-z0-9]+", "-", f"-{machine}") if more else ""
            where = f", {of[0].run.device}" if more else ""
            made, why = make(of, style)
            for plot in made:
                name, title = f"{plot.name}{suffix}", f"{plot.title}{where}"
                found.append(Plot(name, title, plot.caption, plot.alt, plot.draw))
            left_out += [f"{why[0]}{where}: {why[1]}."] if why else []
    return found, left_out


Made = tuple[list[Plot], tuple[str, str] | None]


# --- lines ---------------------------------------------------------------------------------------


def _groups(
    cases: Iterable[Shown], keys: Sequence[str], x: Callable[[Shown], float]
) -> list[tuple[Shown, dict[float, Shown]]]:
    """Return groups of cases that are alike but for x, each with three values of it at least."""
    found: dict[tuple, dict[float, Shown]] = {}
    for case in cases:
        key = (case.facts.get("input") or "batch", *(case.facts.get(name) for name in keys))
        if None not in key and any(case.measured(name) for name in case.rows):
            found.setdefault(key, {}).setdefault(x(case), case)
    groups = [dict(sorted(of.items())) for of in found.values() if len(of) >= _LEAST]
    return [(next(iter(of.values())), of) for of in groups]


def _what(case: Shown) -> str:
    facts = case.facts
    words = {"base": "BERT-base", "large": "BERT-large", "mini": "BERT-mini", "small": "BERT-small"}
    model = str(facts.get("model") or "")
    return f"{words.get(model, model)}, {case.dtype}"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _candidates(cases: Iterable[Shown]) -> list[str]:
    return list(dict.fromkeys(n for case in cases for n in case.rows if case.measured(n)))


def _is_full(case: Shown) -> bool:
    return case.facts.get("fill") == 1


def _distribution(case: Shown) -> str:
    """Return the name of a distribution of lengths: of "8 of squad, at most 384" it is SQuAD."""
    lengths = str(case.facts.get("lengths") or "")
    found = re.fullmatch(r"(?:\d+ of )?(\w+)(?:, .*)?|.*, (full)", lengths)
    name = (found and (found.group(1) or found.group(2))) or ""
    return _NAMES.get(name, name)


def _lines(
    by: Mapping[float, Shown], value: Callable[[Shown, float], float]
) -> dict[str, list[tuple[float, ...]]]:
    """Return the line of each candidate: where, then its least, middle and largest value there."""
    lines: dict[str, list[tuple[float, ...]]] = {}
    for at, case in by.items():
        for name in _candidates([case]):
            time = case.spread(name)
            points = sorted(value(case, time[p]) for p in ("p20", "p50", "p80"))
            lines.setdefault(name, []).append((at, *points))
    return lines


def _time(cases: Sequence[Shown], style: dict[str, Style]) -> Made:
    of = [case for case in cases if case.family == "encoder" and _is_full(case)]
    keys = ("model", "dtype", "device", "sequences", "longest")
    groups = _groups(of, keys[:-1], lambda case: case.facts.get("longest") or 0)
    if not groups:
        why = f"no encoder was measured at {_LEAST} full lengths with one number of sequences"
        return [], ("Time against length", why)
    panels = []
    for first, by_length in groups:
        lines = _lines(by_length, lambda case, seconds: 1e3 * seconds)
        title = f"{_what(first)}, {_count(first.facts['sequences'], 'sequence')}"
        names = {length: f"{length:,}" for length in by_length}
        panels.append(charts.Panel(title, lines, names))
    draw = charts.lines(panels, style, "length, tokens", "time of a batch, ms", length=True)
    caption = (
        "Medians of single calls, bars from the 20th to the 80th percentile; lower is better."
        " Every sequence is as long as the longest. Both axes are logarithmic."
    )
    alt = f"Lines of time against length. {_ends(panels, 'ms', 'at', 'tokens')}"
    return [Plot("time-against-length", "Time against length", caption, alt, draw)], None


def _throughput(cases: Sequence[Shown], style: dict[str, Style]) -> Made:
    of = [c for c in cases if c.family == "encoder" and c.facts.get("fill") and c.facts["tokens"]]
    keys = ("model", "dtype", "device", "sequences", "longest")
    groups = _groups(of, keys, lambda case: round(100 * case.facts["fill"], 1))
    if not groups:
        why = f"no batch of one shape was measured at {_LEAST} fills"
        return [], ("Throughput against fill", why)
    panels = []
    for first, by_fill in groups:
        lines = _lines(by_fill, lambda case, seconds: case.facts["tokens"] / seconds)
        title = f"{_what(first)}, {first.facts['sequences']:,} x {first.facts['longest']:,}"
        names = {}
        for fill, case in by_fill.items():
            names[fill] = f"{fill:.0f}\n{_distribution(case)}".strip()
        panels.append(charts.Panel(title, lines, names))
    y = "real tokens per second"
    draw = charts.lines(panels, style, "fill: real tokens in % of all slots", y, length=False)
    caption = (
        "Padding counts as nothing: only real tokens are counted. Medians of single calls, bars"
        " from the 20th to the 80th percentile; higher is better."
    )
    alt = f"Lines of real tokens per second against fill. {_ends(panels, 'tokens/s', 'at', '%')}"
    return [Plot("throughput-against-fill", "Throughput against fill", caption, alt, draw)], None


def _ends(panels: Sequence[charts.Panel], unit: str, at: str, of: str) -> str:
    """Return in words where our lines begin and end."""
    texts = []
    for panel in panels:
        points = panel.lines.get(OURS)
        if points:
            ends = [f"{figure(p[2])} {unit} {at} {p[0]:g} {of}" for p in (points[0], points[-1])]
            texts.append(f"{panel.title}: bert_fast {', '.join(dict.fromkeys(ends))}.")
    return " ".join(texts)


# --- kernels -------------------------------------------------------------------------------------


def _roofline(cases: Sequence[Shown], style: dict[str, Style]) -> Made:
    title, panels = "Kernels under their roofs", {}
    for case in cases:
        ceilings, facts = case.run.data.get("ceilings") or {}, case.facts
        ours = case.rate(OURS, "tflop_per_s")
        matmul = (ceilings.get("matmul_tflop_per_s") or {}).get(case.dtype)
        able = case.family == "kernels" and facts.get("bytes") and facts.get("flops") and ours
        if not (able and ceilings.get("copy_gb_per_s") and matmul):
            continue
        rates = [case.rate(peer, "tflop_per_s") for peer in case.peers()]
        peer = max((rate for rate in rates if rate), default=None)
        point = charts.Point(case.name, facts["flops"] / facts["bytes"], ours, peer)
        roof = ceilings["copy_gb_per_s"], matmul
        words = f"{case.dtype}, {case.run.label}"
        panels.setdefault(words, charts.Roof(words, *roof, [])).points.append(point)
    if not panels:
        return [], (title, "no kernel with bytes, FLOPs and ceilings of its machine was measured")
    for panel in panels.values():
        panel.points.sort(key=lambda point: (point.intensity, point.name))
    caption = (
        "What each kernel reaches against the FLOPs that it has for each byte it must move; in the"
        " key its share of the roof above it. The roofs are what the run itself measured: a copy"
        " and a large matrix product. A small kernel may lie above the slope where caches hold its"
        " data. Both axes are logarithmic; markers that would cover each other stand a little"
        " aside."
    )
    points = [(panel, point) for panel in panels.values() for point in panel.points]
    shares = [point.ours / panel.height(point.intensity) for panel, point in points]
    alt = (
        f"{_count(len(points), 'kernel')} of bert_fast under the roofs of their machine, at"
        f" {100 * min(shares):.0f} to {100 * max(shares):.0f} % of them."
    )
    return [Plot("roofline", title, caption, alt, charts.roofs([*panels.values()]))], None


def _bandwidth(cases: Sequence[Shown], style: dict[str, Style]) -> Made:
    title, shown = "Kernels bound by memory", []
    for case in cases:
        share = case.rate(OURS, "of_copy")
        if case.family != "kernels" or not case.facts.get("bytes") or case.facts.get("flops"):
            continue
        if share is not None:
            names = [OURS, *filter(None, [case.best_peer()])]
            shares = {name: case.rate(name, "of_copy") for name in names}
            values = {n: (100 * s, f"{percent(s)} %") for n, s in shares.items() if s}
            shown.append(charts.Bars(_short(case, cases), values))
    if not shown:
        return [], (title, "no kernel with bytes alone was measured beside a copy")
    caption = (
        "Bytes that a kernel must move, per second, as a share of what a plain copy reached in the"
        " same run; higher is better. Beside ours the fastest peer. Over 100 %: the data stay in"
        " caches, or less is read than counted."
    )
    ours = [bar.values[OURS][0] for bar in shown]
    alt = (
        f"Bars of {_count(len(shown), 'kernel')}; bert_fast reaches {min(ours):.0f} to"
        f" {max(ours):.0f} % of the bandwidth of a copy."
    )
    x = "share of the measured bandwidth of a copy, %"
    return [Plot("bandwidth", title, caption, alt, charts.bars(shown, style, x))], None


# --- memory and ratios ---------------------------------------------------------------------------


def _short(case: Shown, cases: Sequence[Shown]) -> str:
    """Return the name of a case, with its dtype where another has the same name."""
    again = sum(case.name == other.name for other in cases) > 1
    return f"{case.name}, {case.dtype}" if again else case.name


def _by_family(
    cases: Sequence[Shown], value: Callable[[Shown], Any]
) -> list[tuple[str, list[tuple[Shown, Any]]]]:
    pairs = [(case, value(case)) for case in cases]
    found = [(f, [(c, v) for c, v in pairs if c.family == f and v]) for f in FAMILIES]
    return [(family, of) for family, of in found if of]


def _memory(cases: Sequence[Shown], style: dict[str, Style]) -> Made:
    def needs(case: Shown) -> dict[str, float]:
        found = {name: case.memory(name) for name in case.rows}
        return {name: value for name, value in found.items() if value is not None}

    made = []
    for family, of in _by_family(cases, needs):
        shown = [
            charts.Bars(_short(case, cases), {n: (v, f"{v:,.0f}") for n, v in values.items()})
            for case, values in of
        ]
        cpu = of[0][0].facts.get("device") == "cpu"
        held = family != "kernels"
        how = (
            "the most that is resident during one call, without what its imports take"
            if cpu
            else "the peak of one call on the GPU" + (", with what is held" if held else "")
        )
        caption = f"In MiB: {how}; lower is better."
        pairs = [(values[OURS], values) for _, values in of if OURS in values]
        least = sum(own <= min(values.values()) for own, values in pairs)
        alt = (
            f"Bars of memory in {_count(len(shown), 'case')}; bert_fast needs the least in"
            f" {least} of {len(pairs)}."
        )
        title = f"Memory, {_WORDS[family]}"
        draw = charts.bars(shown, style, "memory, MiB")
        made.append(Plot(f"memory-{family}", title, caption, alt, draw))
    return made, None if made else ("Memory", "it was measured in no case")


def _ratios(cases: Sequence[Shown], style: dict[str, Style]) -> Made:
    made = []
    for family, of in _by_family(cases, Shown.ratios):
        shown = [
            charts.Dots(_short(case, cases), {peer: value for value, peer in ratios})
            for case, ratios in of
        ]
        every = [value for _, ratios in of for value, _ in ratios]
        behind = sum(value < 1 for value in every)
        alt = (
            f"Dots of {_count(len(every), 'comparison')} in {_count(len(of), 'case')}, from"
            f" {figure(min(every))}x to {figure(max(every))}x; the peer is faster in {behind}."
        )
        caption = (
            "The peer's time divided by ours: right of 1x bert_fast is faster, left of it, where"
            " the ground is coloured, the peer. The axis is logarithmic."
        )
        draw = charts.dots(shown, style, "the peer's time / ours; below 1x the peer is faster")
        title = f"Against each peer, {_WORDS[family]}"
        made.append(Plot(f"ratios-{family}", title, caption, alt, draw))
    return made, None if made else ("Against each peer", "no peer was measured beside bert_fast")
