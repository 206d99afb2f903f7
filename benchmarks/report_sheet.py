"""What the pictures of a report are drawn on: for a wide page or a phone, on light or on dark.

All places are in points from the top left corner, widths of words are measured before anything is
laid out: so nothing is cut off, and legends never cover data. No colour carries a meaning alone:
markers differ too. The same cases give the same bytes.
"""

import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import Any

import matplotlib
from goals import OURS
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextToPath
from matplotlib.ticker import MaxNLocator

OWN, SIGNAL = "#2478d4", "#d8480f"  # 3:1 at least on white and on the dark paper, as all here
_COLORS = ("#12926a", "#a564c4", "#a97d08", "#7d8590", "#c5568c", "#2495b0", "#96704a")
_MARKERS = ("s", "D", "^", "v", "P", "X", "<", ">")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_INK = "#010203"  # stands for the colour of the page's text in SVG
SIZE = 9.0  # points, of all words but the smallest
SMALL = 7.5
GAP = 12.0


@dataclass(frozen=True)
class Look:
    """How a picture is drawn: its width in points, the colours of words and of what is behind."""

    width: float
    ink: str
    paper: str | None = None


WIDE, NARROW = Look(720, _INK), Look(288, _INK)
LIGHT, DARK = Look(720, "#1c2128", "#ffffff"), Look(720, "#e3e8ee", "#0d1117")


@dataclass(frozen=True)
class Style:
    """Colour, marker and line of a candidate, the same in all pictures."""

    color: str
    marker: str
    dash: Any
    own: bool = False


def styles(candidates: Iterable[str]) -> dict[str, Style]:
    """Return the style of each candidate; ours is always the same."""
    found, peers, variants = {OURS: Style(OWN, "o", "-", True)}, 0, 0
    for name in candidates:
        if name in found:
            continue
        if name.startswith(OURS):
            found[name] = Style(OWN, _MARKERS[variants % 8], _DASHES[1 + variants % 3], True)
            variants += 1
        else:
            dash = _DASHES[(peers // len(_COLORS)) % len(_DASHES)]
            found[name] = Style(_COLORS[peers % len(_COLORS)], _MARKERS[peers % 8], dash)
            peers += 1
    return found


# --- files ---------------------------------------------------------------------------------------


@contextmanager
def settings(name: str = "") -> Iterator[None]:
    """Draw by matplotlib's own defaults and these, whatever the user's are."""
    defaults = {k: v for k, v in matplotlib.rcParamsDefault.items() if "backend" not in k}
    own = {
        "svg.hashsalt": f"bert_fast {name}",
        "svg.fonttype": "none",
        "font.family": ["DejaVu Sans"],
        "text.parse_math": False,
        "font.size": SIZE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.minor.visible": False,
        "ytick.minor.visible": False,
    }
    with matplotlib.rc_context(defaults | own):
        yield


Draw = Callable[[Look], Figure]


def png(draw: Draw, look: Look) -> bytes:
    """Return the picture as a PNG, 1440 pixels wide."""
    with settings():
        file = io.BytesIO()
        draw(look).savefig(file, format="png", dpi=144, metadata={"Software": None})
    return file.getvalue()


def svg(draw: Draw, look: Look, name: str, title: str) -> str:
    """Return the picture as SVG; in a page that strips its style it has the page's colours."""
    with settings(f"{name} {look.width}"):
        file = io.StringIO()
        draw(look).savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    light, dark = (f"svg{{color:{of.ink};background:{of.paper}}}" for of in (LIGHT, DARK))
    style = f"<style>{light}@media(prefers-color-scheme:dark){{{dark}}}</style>"
    text = re.sub(r"\s*<style.*?</style>", "", text, flags=re.DOTALL)
    before, attributes, rest = re.split(r"<svg([^>]*)>", text, maxsplit=1)
    own = f'color="{LIGHT.ink}" style="stroke-linejoin: round"'
    head = f"<svg{attributes} {own}>\n <title>{escape(title)}</title>\n {style}"
    return f"{before}{head}{rest}".replace(_INK, "currentColor")


# --- laying out ----------------------------------------------------------------------------------


_HINTED = 1.03  # on whole pixels words are up to so much wider than drawn exactly


@cache
def extent(text: str, size: float = SIZE, weight: str = "normal") -> float:
    """Return the width of a word in points, as wide as it may become."""
    font = FontProperties(family="DejaVu Sans", size=size, weight=weight)
    return _HINTED * TextToPath().get_text_width_height_descent(text, font, ismath=False)[0]


def wrap(text: str, width: float, size: float = SIZE, weight: str = "normal") -> list[str]:
    """Return the text in lines of at most so many points; too long words are broken."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if extent(joined, size, weight) <= width:
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and extent(lines[-1] + letter, size, weight) > width:
                lines.append("")
            lines[-1] += letter
    return lines


class Sheet:
    """A figure in points from its top left corner.

    Args:
        look: how it is drawn.
        height: of the figure in points.
    """

    def __init__(self, look: Look, height: float):
        height = float(math.ceil(height))  # whole pixels, else the last row of them is mixed
        self.look, self.width, self.height = look, look.width, height
        self.figure = Figure(figsize=(look.width / 72, height / 72))
        FigureCanvasAgg(self.figure)  # not pyplot, which would ask for a screen and keep the figure
        self.figure.patch.set_visible(look.paper is not None)
        if look.paper is not None:
            self.figure.patch.set_facecolor(look.paper)
        self._page = self._add(0, 0, self.width, height)
        self._page.set(xlim=(0, self.width), ylim=(height, 0))
        self._page.axis("off")

    def _add(self, x: float, y: float, width: float, height: float) -> Axes:
        box = (x / self.width, 1 - (y + height) / self.height)
        axes = self.figure.add_axes((*box, width / self.width, height / self.height))
        axes.patch.set_visible(False)
        return axes

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Return axes in the colours of the look."""
        axes, ink = self._add(x, y, width, height), self.look.ink
        for spine in axes.spines.values():
            spine.set(color=ink, alpha=0.45, linewidth=0.8)
        axes.tick_params(colors=ink, which="both", length=3, width=0.6, labelsize=SIZE - 0.5)
        axes.grid(color=ink, alpha=0.13, linewidth=0.6)
        axes.set_axisbelow(True)
        return axes

    def text(self, x: float, y: float, text: str, size: float = SIZE, **how: Any) -> None:
        """Write a line whose middle is at the height y."""
        how = {"color": self.look.ink, "va": "center_baseline"} | how
        self._page.text(x, y, text, fontsize=size, **how)

    def draw(self, x: Sequence[float], y: Sequence[float], **how: Any) -> None:
        """Draw a line or a marker."""
        self._page.add_line(Line2D(x, y, **how))


Entries = Sequence[tuple[str, dict[str, Any]]]


def _sample(how: dict[str, Any]) -> float:
    """Return the width of what stands before a name in a legend."""
    return 24.0 if how["linestyle"] else 9.0


def flow(entries: Entries, width: float) -> tuple[list[tuple[float, float, str, Any]], float]:
    """Return where the lines of a legend stand, and its height."""
    placed, x, y, line = [], 0.0, 0.0, 13.0
    for name, how in entries:
        left = _sample(how) + 6
        lines = wrap(name, width - left)
        wide = left + max(extent(text) for text in lines)
        if x and x + wide > width:
            x, y = 0.0, y + line
        for i, text in enumerate(lines):
            placed.append((x, y + 13.0 * i, text, how if i == 0 else None))
        line = 13.0 * len(lines)
        x += wide + 18
    return placed, (y + line + 8 if placed else 0.0)


def draw_legend(sheet: Sheet, entries: Entries, x: float, y: float, width: float) -> float:
    """Draw a legend and return its height."""
    placed, height = flow(entries, width)
    left = 0.0
    for dx, dy, text, how in placed:
        if how is not None:
            left = _sample(how)
            if how["linestyle"]:
                line = how | {"marker": ""}
                sheet.draw([x + dx, x + dx + left], [y + dy + 6] * 2, **line)
            sheet.draw([x + dx + left / 2], [y + dy + 6], **(how | {"linestyle": ""}))
        sheet.text(x + dx + left + 6, y + dy + 6.5, text)
    return height


def line_of(style: Style) -> dict[str, Any]:
    return {
        "color": style.color,
        "marker": style.marker,
        "linestyle": style.dash,
        "linewidth": 2.4 if style.own else 1.4,
        "markersize": 6.5 if style.own else 5.5,
        "zorder": 4 if style.own else 3,
    }


def dot_of(style: Style) -> dict[str, Any]:
    return line_of(style) | {"linestyle": ""}


_STEPS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (*range(1, 10), 1.5))


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Return round numbers between two positive ones, for a logarithmic axis with room for most."""
    chosen: list[float] = []
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    apart_by = 0.8 * math.log(high / low) / most
    for steps in _STEPS:
        found = sorted(float(f"{m * 10.0**p:.4g}") for p in powers for m in steps)
        found = [v for v in found if low <= v <= high]
        gaps = [math.log(b / a) for a, b in itertools.pairwise(found)]
        if not chosen or min(gaps, default=0) >= apart_by:
            chosen = found
    if len(chosen) < 2:  # less than a step: as on any axis
        found = MaxNLocator(max(2, most // 2)).tick_values(low, high)
        chosen = [float(f"{v:.6g}") for v in found if low <= v <= high] or chosen
    while len(chosen) > most + 1:
        chosen = chosen[::2]
    return chosen


def number(value: float) -> str:
    """Return a number as it stands at a tick."""
    return f"{value:,.6g}" if value < 1e6 else f"{value / 1e6:,.4g} M"


def log_axis(
    axes: Axes, which: str, low: float, high: float, most: int = 7, unit: str = ""
) -> list[float]:
    """Make an axis logarithmic, and return where it has its ticks."""
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    at = ticks(low, high, most)
    axis = getattr(axes, f"{which}axis")
    axis.set_ticks(at, [number(v) + unit for v in at])
    axis.set_ticks([], minor=True)
    return at


# --- finding place --------------------------------------------------------------------------------

_AROUND = [(math.cos(a * math.pi / 4), math.sin(a * math.pi / 4)) for a in (1, 0, 2, 3, 4, 5, 6, 7)]


def apart(wanted: Sequence[float], gap: float, most: float) -> list[float]:
    """Return ascending places moved as little as it takes to be a gap from each other.

    Args:
        wanted: ascending.
        gap: between two neighbours.
        most: they lie between a gap and this.
    """
    groups: list[tuple[float, int]] = []  # middle, how many
    for place in wanted:
        groups.append((place, 1))
        while len(groups) > 1:
            (a, n), (b, m) = groups[-2:]
            if b - a >= gap * (n + m) / 2:
                break
            groups[-2:] = [((a * n + b * m) / (n + m), n + m)]
    found = [middle + gap * (i - (n - 1) / 2) for middle, n in groups for i in range(n)]
    last = len(found) - 1
    found = [min(place, most - gap * (last - i)) for i, place in enumerate(found)]
    return [max(place, gap * (i + 1)) for i, place in enumerate(found)]


def free(
    x: float, y: float, half: float, width: float, height: float, taken: list
) -> tuple[float, float]:
    """Return where beside (x, y) a number finds place, and take it."""
    best = None
    for distance in (9, 14, 19, 25, 31, 38, 46):
        for cx, cy in _AROUND:
            dx, dy = cx * (distance + half - 4), cy * distance
            box = (x + dx - half, y + dy - 4.5, x + dx + half, y + dy + 4.5)
            if box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height:
                continue
            over = sum(
                max(0, min(box[2], t[2]) - max(box[0], t[0]))
                * max(0, min(box[3], t[3]) - max(box[1], t[1]))
                for t in taken
            )
            if best is None or over < best[0] - 1e-9:
                best = (over, dx, dy, box)
        if best is not None and best[0] == 0:
            break
    _, dx, dy, box = best or (0, 9.0, 9.0, (x, y, x, y))
    taken.append(box)
    return dx, dy
