"""The pictures of a report: lines, rows of bars or dots, and kernels under their roofs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ledger import figure
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from report_sheet import (
    GAP,
    OWN,
    SIGNAL,
    SIZE,
    SMALL,
    Axes,
    Draw,
    Entries,
    Look,
    Sheet,
    Style,
    apart,
    dot_of,
    draw_legend,
    extent,
    flow,
    free,
    line_of,
    log_axis,
    number,
    wrap,
)

# --- lines ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """Lines in one pair of axes: for each candidate (x, low, middle, high) of its points."""

    title: str
    lines: dict[str, list[tuple[float, float, float, float]]]
    names: dict[float, str]  # what stands at a value of x


def lines(panels: Sequence[Panel], style: dict[str, Style], x: str, y: str, length: bool) -> Draw:
    """Return what draws panels of lines.

    Args:
        panels: what to draw.
        style: of the candidates.
        x: what the x axis has.
        y: what the y axis has.
        length: x is a length, on a logarithmic axis as y then is; else a share in %.
    """

    def draw(look: Look) -> Figure:
        columns = 2 if len(panels) > 1 and look.width > 500 else 1
        wide = (look.width - GAP * (columns - 1)) / columns
        left, inner = 52.0, 215.0 if look.width > 500 else 190.0
        heads = [wrap(panel.title, wide - 8, SIZE, "bold") for panel in panels]
        head = 14.0 * max(map(len, heads)) + 6
        foot = 28.0 if length else 62.0
        pitch = head + inner + foot + 16
        known = [name for name in style if any(name in panel.lines for panel in panels)]
        entries = [(name, line_of(style[name])) for name in known]
        _, above = flow(entries, look.width - 8)
        sheet = Sheet(look, above + pitch * math.ceil(len(panels) / columns) + 2)
        draw_legend(sheet, entries, 4, 4, look.width - 8)
        for i, panel in enumerate(panels):
            x0, y0 = (i % columns) * (wide + GAP), above + 4 + (i // columns) * pitch
            for k, text in enumerate(heads[i]):
                sheet.text(x0 + 4, y0 + 7 + 14 * k, text, weight="bold")
            axes = sheet.axes(x0 + left, y0 + head, wide - left - 14, inner)
            _panel(axes, panel, style, length, wide - left - 14)
            middle = x0 + left + (wide - left - 14) / 2
            sheet.text(middle, y0 + head + inner + foot, x, ha="center")
            how = {"rotation": 90, "ha": "center", "va": "center"}
            sheet.text(x0 + 8, y0 + head + inner / 2, y, **how)
        return sheet.figure

    return draw


def _panel(axes: Axes, panel: Panel, style: dict[str, Style], length: bool, width: float) -> None:
    for name, points in panel.lines.items():
        xs, lows, middles, highs = zip(*sorted(points), strict=True)
        off = [[m - a for m, a in zip(middles, lows, strict=True)]]
        off.append([b - m for m, b in zip(middles, highs, strict=True)])
        how = line_of(style[name])
        axes.errorbar(xs, middles, yerr=off, capsize=2.5, elinewidth=1, **how)
    every = [point for points in panel.lines.values() for point in points]
    low, high = min(p[1] for p in every), max(p[3] for p in every)
    at = sorted(panel.names)
    if length:
        log_axis(axes, "y", low / 1.25, high * 1.25)
        ends = at[0] / 1.2, at[-1] * 1.2
        axes.set(xscale="log", xlim=ends)
        places = [width * math.log(v / ends[0]) / math.log(ends[1] / ends[0]) for v in at]
    else:
        axes.set(ylim=(0, high * 1.08), xlim=(0, 104))
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        places = [width * value / 104 for value in at]
    axes.xaxis.set_ticks([], minor=True)
    ends_at = [-math.inf] * (1 if length else 2)  # of the words at two heights
    texts = []
    for value, place in zip(at, places, strict=True):
        text = panel.names[value]
        half = max(extent(line) for line in text.split("\n")) / 2
        level = next((k for k, end in enumerate(ends_at) if place - half > end + 4), None)
        if level is not None:
            ends_at[level] = place + half
        texts.append("" if level is None else "\n\n" * level + text)
    axes.set_xticks(at, texts)


# --- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Body:
    """The axes of one column of rows, and where in them each of its rows begins and ends."""

    axes: Axes
    width: float  # in points
    at: list[tuple[int, float, float]]

    def rule(self, values: Sequence[float], **how: object) -> None:
        """Draw upright lines at values of x through the rows, but not through names above."""
        for _, top, bottom in self.at:
            self.axes.vlines(values, top, bottom, **how)


_HEAD = 18.0  # points above the axes of rows, for their ticks


def _columns(heights: Sequence[float], n: int) -> list[list[int]]:
    """Return the rows in n columns, each about as high."""
    columns: list[list[int]] = [[] for _ in range(n)]
    whole, so_far = sum(heights), 0.0
    for i, height in enumerate(heights):
        columns[min(n - 1, int(n * (so_far + height / 2) / whole))].append(i)
        so_far += height
    return [column for column in columns if column]


def _rows(
    look: Look, names: Sequence[str], heights: Sequence[float], entries: Entries, x: str
) -> tuple[Sheet, list[_Body]]:
    """Return a sheet with a legend and a row for each name, in one column or two.

    Args:
        look: how it is drawn.
        names: of the rows; beside them, or above where there is too little place.
        heights: of what is drawn in the rows, in points.
        entries: of the legend.
        x: what the x axis has.
    """
    n = 2 if look.width > 500 and sum(heights) > 430 else 1
    wide = (look.width - GAP * (n - 1)) / n - 8
    left = max(extent(name) for name in names) + 14
    beside = left < (0.6 if look.width > 500 else 0.35) * wide
    texts = [[name] if beside else wrap(name, wide - 14) for name in names]
    left = left if beside else 8.0
    above_row = [0.0 if beside else 12.0 * len(text) + 4 for text in texts]
    columns = _columns([a + b for a, b in zip(above_row, heights, strict=True)], n)
    inner = [sum(above_row[i] + heights[i] for i in column) for column in columns]
    width = wide - left - 10
    words = wrap(x, width)
    _, above = flow(entries, look.width - 8)
    sheet = Sheet(look, above + _HEAD + max(inner) + 25 + 12 * len(words))
    draw_legend(sheet, entries, 4, 4, look.width - 8)
    bodies = []
    for c, column in enumerate(columns):
        x0, y = 4 + c * (wide + 8 + GAP), above + _HEAD
        axes = sheet.axes(x0 + left, y, width, inner[c])
        axes.set(ylim=(inner[c], 0), yticks=[])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(top=inner[c] > 250, labeltop=inner[c] > 250)
        for k, text in enumerate(words):
            sheet.text(x0 + left + width / 2, y + inner[c] + 27 + 12 * k, text, ha="center")
        at, top = [], 0.0
        for i in column:
            begin = top + above_row[i]
            at.append((i, begin, begin + heights[i]))
            for k, text in enumerate(texts[i]):
                if beside:
                    sheet.text(x0 + left - 8, y + begin + heights[i] / 2, text, ha="right")
                else:
                    sheet.text(x0 + left, y + top + 10 + 12 * k, text)
            top = begin + heights[i]
        bodies.append(_Body(axes, width, at))
    return sheet, bodies


@dataclass(frozen=True)
class Bars:
    """Bars of one case: for each candidate how long, and the words at its end."""

    name: str
    values: dict[str, tuple[float, str]]


def bars(cases: Sequence[Bars], style: dict[str, Style], x: str) -> Draw:
    """Return what draws a row of bars for each case, one bar for each candidate."""
    pitch = 9.0

    def draw(look: Look) -> Figure:
        known = [name for name in style if any(name in case.values for case in cases)]
        entries = [(n, dot_of(style[n]) | {"marker": "s", "markersize": 8}) for n in known]
        names = [case.name for case in cases]
        heights = [pitch * len(case.values) + 8 for case in cases]
        sheet, bodies = _rows(look, names, heights, entries, x)
        longest = max(value for case in cases for value, _ in case.values.values())
        words = max(extent(text, SMALL) for case in cases for _, text in case.values.values())
        for body in bodies:
            high = longest / (1 - (words + 6) / body.width)
            at = MaxNLocator(max(2, int(body.width // 40))).tick_values(0, high)
            at = [value for value in at if 0 <= value <= high]
            body.axes.set(xlim=(0, high))
            body.axes.set_xticks(at, [number(value) for value in at])
            body.rule(at, color=look.ink, alpha=0.13, linewidth=0.6, zorder=1)
            for i, top, _ in body.at:
                values = [(n, cases[i].values[n]) for n in known if n in cases[i].values]
                y = top + 4 + pitch / 2
                for name, (value, text) in values:
                    alpha = 1.0 if style[name].own else 0.75
                    body.axes.barh(y, value, pitch - 2, color=style[name].color, alpha=alpha)
                    how = {"fontsize": SMALL, "va": "center_baseline", "color": look.ink}
                    body.axes.annotate(
                        text, (value, y), (3, -0.5), textcoords="offset points", **how
                    )
                    y += pitch
        return sheet.figure

    return draw


@dataclass(frozen=True)
class Dots:
    """Ratios of one case: each peer's time divided by ours."""

    name: str
    values: dict[str, float]


def dots(cases: Sequence[Dots], style: dict[str, Style], x: str) -> Draw:
    """Return what draws a row of dots for each case; those below 1 stand out."""

    def draw(look: Look) -> Figure:
        known = [name for name in style if any(name in case.values for case in cases)]
        entries = [(name, dot_of(style[name])) for name in known]
        every = [value for case in cases for value in case.values.values()]
        if min(every) < 1:
            lost = {"color": SIGNAL, "marker": "o", "markersize": 9, "linestyle": ""}
            lost |= {"markerfacecolor": "none", "markeredgewidth": 2}
            entries.append(("ring: the peer is faster", lost))
        names = [case.name for case in cases]
        sheet, bodies = _rows(look, names, [16.0] * len(names), entries, x)
        low, high = min(0.8, min(every) / 1.2), max(1.25, max(every) * 1.15)
        for body in bodies:
            axes = body.axes
            at = log_axis(axes, "x", low, high, max(3, int(body.width // 26)), "x")
            body.rule(at, color=look.ink, alpha=0.13, linewidth=0.6, zorder=1)
            body.rule([1], color=look.ink, linewidth=1.2, alpha=0.8, zorder=2)
            for i, top, bottom in body.at:
                values, middle = cases[i].values, (top + bottom) / 2
                box = {"facecolor": SIGNAL, "alpha": 0.09, "linewidth": 0}
                axes.fill_between([low, 1], top, bottom, zorder=0, **box)
                ends = [min(1.0, *values.values()), max(1.0, *values.values())]
                axes.plot(ends, [middle] * 2, color=look.ink, alpha=0.22, linewidth=0.8)
                for name in known:
                    if name not in values:
                        continue
                    axes.plot([values[name]], [middle], **dot_of(style[name]))
                    if values[name] < 1:
                        axes.plot([values[name]], [middle], **(lost | {"zorder": 6}))
        return sheet.figure

    return draw


# --- roofs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A kernel: FLOP/byte, TFLOP/s of ours and of the best peer (None: there is none)."""

    name: str
    intensity: float
    ours: float
    peer: float | None


@dataclass(frozen=True)
class Roof:
    """Kernels of one run and dtype under what its machine was seen to reach."""

    title: str
    copy: float  # GB/s
    matmul: float  # TFLOP/s
    points: list[Point]

    @property
    def words(self) -> str:
        """What is written over it."""
        roofs = f"copy {figure(self.copy)} GB/s, products {figure(self.matmul)} TFLOP/s"
        return f"{self.title}: {roofs}"

    def height(self, intensity: float) -> float:
        """Return the roof over an intensity, in TFLOP/s."""
        return min(self.matmul, intensity * self.copy / 1e3)


def roofs(panels: Sequence[Roof]) -> Draw:
    """Return what draws kernels by their numbers, with the numbers' names below."""
    own = {"color": OWN, "marker": "o", "markersize": 6, "linestyle": ""}
    peer = {"color": _PEER, "marker": "D", "markersize": 5, "linestyle": ""}
    peer |= {"markerfacecolor": "none", "markeredgewidth": 1.2}
    faster = {"color": SIGNAL, "marker": "", "linestyle": "-", "linewidth": 2}
    left = 56.0

    def draw(look: Look) -> Figure:
        roof = {"color": look.ink, "alpha": 0.55, "marker": "", "linestyle": "-", "linewidth": 1.6}
        entries: list = [("bert_fast", own), ("the roofs of the machine", roof)]
        pairs = [point for panel in panels for point in panel.points if point.peer is not None]
        if pairs:
            entries.append(("the best peer", peer))
        if any(point.peer > point.ours for point in pairs):
            entries.append(("the best peer is faster", faster))
        inner = 300.0 if look.width > 500 else 400.0
        keys = [_key(panel, look.width - 8) for panel in panels]
        _, above = flow(entries, look.width - 8)
        heads = [wrap(panel.words, look.width - 8, SIZE, "bold") for panel in panels]
        pitches = [
            inner + 58 + 14 * len(head) + 12.5 * rows
            for head, (_, rows, _) in zip(heads, keys, strict=True)
        ]
        sheet = Sheet(look, above + sum(pitches))
        draw_legend(sheet, entries, 4, 4, look.width - 8)
        y0 = above + 4
        each = zip(panels, heads, keys, pitches, strict=True)
        for panel, head, (names, rows, wide), pitch in each:
            for k, text in enumerate(head):
                sheet.text(4, y0 + 7 + 14 * k, text, weight="bold")
            top, width = y0 + 6 + 14 * len(head), look.width - left - 14
            axes = sheet.axes(left, top, width, inner)
            _roof(axes, panel, look, width, inner, own, peer)
            how = {"rotation": 90, "ha": "center", "va": "center"}
            sheet.text(8, top + inner / 2, "TFLOP/s", **how)
            sheet.text(left + width / 2, top + inner + 28, "FLOP per byte", ha="center")
            for i, (label, texts) in enumerate(names):
                x, y = 4 + (i // rows) * wide, top + inner + 46 + 12.5 * (i % rows)
                if label:
                    sheet.text(x + 16, y, label, ha="right", color=OWN, weight="bold")
                sheet.text(x + 21, y, texts)
            y0 += pitch
        return sheet.figure

    return draw


def _key(panel: Roof, width: float) -> tuple[list[tuple[str, str]], int, float]:
    """Return the lines of a panel's key, how many stand in a column, and its width."""
    lines: list[tuple[str, str]] = []
    for i, point in enumerate(panel.points, 1):
        share = f", {100 * point.ours / panel.height(point.intensity):.0f} %"
        for k, text in enumerate(wrap(point.name + share, width - 25)):
            lines.append((str(i) if k == 0 else "", text))
    widest = max(extent(text) for _, text in lines) + 35
    columns = max(1, min(4, int((width + 14) // widest)))
    return lines, math.ceil(len(lines) / columns), width / columns


_PEER = "#7d8590"


def _roof(
    axes: Axes, panel: Roof, look: Look, width: float, height: float, own: dict, peer: dict
) -> None:
    ridge = panel.matmul * 1e3 / panel.copy
    xs = [point.intensity for point in panel.points]
    ys = [v for p in panel.points for v in (p.ours, p.peer) if v]
    left, right = min(*xs, ridge) / 1.6, max(*xs, ridge) * 1.6
    low, high = min(ys) / 1.6, max(*ys, panel.matmul) * 1.6
    log_axis(axes, "x", left, right, max(4, int(width // 60)))
    log_axis(axes, "y", low, high, 8)
    start = max(left, low * 1e3 / panel.copy)
    roof = [panel.height(x) for x in (start, ridge, right)]
    axes.plot([start, ridge, right], roof, color=look.ink, alpha=0.55, linewidth=1.6)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            width * math.log(x / left) / math.log(right / left),
            height * math.log(y / low) / math.log(high / low),
        )

    taken: list[tuple[float, float, float, float]] = []
    offset = {"textcoords": "offset points"}
    wanted = [place(point.intensity, low)[0] for point in panel.points]
    aside = apart(wanted, min(4.5, 0.6 * width / len(wanted)), width - 5)
    shown_at = [left * (right / left) ** (px / width) for px in aside]
    for x, point in zip(shown_at, panel.points, strict=True):
        if point.peer is not None:
            lost = point.peer > point.ours
            color, thick = (SIGNAL, 2) if lost else (look.ink, 0.8)
            faint = 1.0 if lost else 0.3
            axes.plot([x, x], [point.ours, point.peer], color=color, linewidth=thick, alpha=faint)
            axes.plot([x], [point.peer], **(peer | {"zorder": 3}))
            px, py = place(x, point.peer)
            taken.append((px - 3, py - 3, px + 3, py + 3))
        axes.plot([x], [point.ours], **(own | {"zorder": 4}))
        px, py = place(x, point.ours)
        taken.append((px - 3.5, py - 3.5, px + 3.5, py + 3.5))
    for i, (x, point) in enumerate(zip(shown_at, panel.points, strict=True), 1):
        px, py = place(x, point.ours)
        dx, dy = free(px, py, extent(str(i), SMALL, "bold") / 2 + 1, width, height, taken)
        words = {"fontsize": SMALL, "weight": "bold", "color": OWN, "zorder": 5}
        if math.hypot(dx, dy) > 14:
            words["arrowprops"] = {"arrowstyle": "-", "color": OWN, "alpha": 0.5, "lw": 0.6}
            words["arrowprops"] |= {"shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            str(i), (x, point.ours), (dx, dy), ha="center", va="center", **offset, **words
        )
