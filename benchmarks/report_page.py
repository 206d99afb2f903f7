"""What a report is made of, and how it is written: as Markdown, and as one page of HTML.

The page asks for nothing from outside: its style and its pictures are inside, and it needs no
script. All words come as plain text and are escaped here.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import ledger

_STYLE = Path(__file__).with_name("report_page.css")
_LONG = 40  # characters: a word that is longer may be broken


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it says.
        kind: "text", "number", "code", "label", which is not broken, "loud", what must not be
            overlooked, "loud number" or "ours".
    """

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Heading:
    """A heading; level 2 or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; loud: a notice that must not be overlooked."""

    text: str
    loud: bool = False


@dataclass(frozen=True)
class Items:
    """A list."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what it shows.
        head: names of the columns; all empty: each row has its own in front.
        groups: rows under the name of what they belong to; where it is empty there is none. The
            last cell of a row that is too short spans what is left.
        group: name of the column that the groups are in Markdown.
    """

    caption: str
    head: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]
    group: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        name: of its files.
        title: its heading.
        caption: how to read it.
        alt: what it shows, for who cannot see it.
        wide: SVG for a wide page.
        narrow: SVG for a phone.
    """

    name: str
    title: str
    caption: str
    alt: str
    wide: str
    narrow: str


Block = Heading | Text | Items | Table | Picture


# --- Markdown ------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Return the text with what Markdown would take for its own escaped, but for "|"."""
    text = " ".join(text.split()).replace("&", "&amp;")
    text = re.sub(r"([\\`*\[\]~#])", r"\\\1", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return text.replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str) -> str:
    text = " ".join(text.split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}" if text else ""


def _markdown_cell(cell: Cell) -> str:
    if cell.kind == "code":
        return _code(cell.text)
    text = plain(cell.text)
    return f"**{text}**" if cell.kind.startswith(("loud", "ours")) and text else text


def _markdown_table(table: Table) -> str:
    rows = []
    for name, of in table.groups:
        for row in of:
            cells = [_markdown_cell(cell) for cell in row]
            cells += [""] * (len(table.head) - len(cells))
            rows.append([plain(name), *cells] if table.group else cells)
    head = [*([table.group] if table.group else []), *table.head]
    return f"{plain(table.caption)}\n\n{ledger.table([plain(name) for name in head], rows)}"


def _markdown_picture(picture: Picture) -> str:
    dark, light = f"plots/{picture.name}-dark.png", f"plots/{picture.name}.png"
    return (
        f"### {plain(picture.title)}\n\n<picture>\n"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">\n'
        f'<img alt="{escape(picture.alt)}" src="{light}">\n</picture>\n\n{plain(picture.caption)}\n'
    )


def markdown(title: str, blocks: Iterable[Block]) -> str:
    """Return the report as Markdown; its pictures lie in plots/."""
    parts = [f"# {plain(title)}\n"]
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {plain(text)}\n")
            case Text(text, loud):
                parts.append(f"> **{plain(text)}**\n" if loud else f"{plain(text)}\n")
            case Items(texts):
                parts.append("".join(f"- {plain(text)}\n" for text in texts))
            case Table():
                parts.append(_markdown_table(block))
            case Picture():
                parts.append(_markdown_picture(block))
    return "\n".join(parts)


# --- HTML ----------------------------------------------------------------------------------------


def _broken(text: str) -> str:
    """Return the text escaped, with places where a very long word may be broken."""
    words = [re.findall(f".{{1,{_LONG}}}", word) for word in text.split()]
    return " ".join("<wbr>".join(map(escape, parts)) for parts in words)


def _html_cell(cell: Cell, first: bool, span: int) -> str:
    text = f"<code>{_broken(cell.text)}</code>" if cell.kind == "code" else _broken(cell.text)
    tag, scope = ("th", ' scope="row"') if first else ("td", "")
    kind = f' class="{cell.kind}"' if cell.kind not in ("text", "code") else ""
    over = f' colspan="{span}"' if span > 1 else ""
    return f"<{tag}{scope}{kind}{over}>{text}</{tag}>"


def _html_table(table: Table, label: str) -> str:
    whole = [row for _, rows in table.groups for row in rows if len(row) == len(table.head)]
    numbers = {i for row in whole for i, cell in enumerate(row) if "number" in cell.kind}
    css = [' class="number"' if i in numbers else "" for i in range(len(table.head))]
    head = "".join(
        f'<th scope="col"{of}>{escape(name)}</th>' for of, name in zip(css, table.head, strict=True)
    )
    head = f"<thead><tr>{head}</tr></thead>\n" if any(table.head) else ""
    bodies = []
    for name, rows in table.groups:
        lines = []
        if table.group:
            of = f'<th scope="rowgroup" colspan="{len(table.head)}"><span>{_broken(name)}</span>'
            lines.append(f'<tr class="group">{of}</th></tr>')
        for row in rows:
            spans = [1] * (len(row) - 1) + [len(table.head) - len(row) + 1]
            cells = [_html_cell(c, i == 0, spans[i]) for i, c in enumerate(row)]
            ours = ' class="own"' if row[0].kind == "ours" else ""
            lines.append(f"<tr{ours}>{''.join(cells)}</tr>")
        bodies.append("<tbody>\n" + "\n".join(lines) + "\n</tbody>")
    return (
        f'<div class="scroll" role="region" aria-labelledby="{label}" tabindex="0">\n<table>\n'
        f'<caption id="{label}"><span>{escape(table.caption)}</span></caption>\n'
        + head
        + "\n".join(bodies)
        + "\n</table>\n</div>\n"
    )


def inline(svg: str, prefix: str, alt: str, css: str) -> str:
    """Return an SVG file as an element of a page: its ids are its own, and it has a label.

    Args:
        svg: the file.
        prefix: of its ids.
        alt: its label.
        css: its class.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<style.*?</style>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"<title.*?</title>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'\sid="', f' id="{prefix}-', body)
    body = body.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'href="#{prefix}-')
    box = re.search(r'viewBox="[^"]*"', body)
    label = f'class="{css}" role="img" aria-label="{escape(alt)}"'
    root = f'<svg {label} {box.group(0) if box else ""} style="stroke-linejoin: round">'
    return re.sub(r"<svg[^>]*>", lambda _: root, body, count=1).strip() + "\n"


def _html_picture(picture: Picture) -> str:
    wide = inline(picture.wide, f"{picture.name}-w", picture.alt, "wide")
    narrow = inline(picture.narrow, f"{picture.name}-n", picture.alt, "narrow")
    return (
        f'<figure aria-labelledby="{picture.name}">\n'
        f'<h3 id="{picture.name}">{escape(picture.title)}</h3>\n'
        f"{wide}{narrow}<figcaption>{escape(picture.caption)}</figcaption>\n</figure>\n"
    )


def html(title: str, blocks: Sequence[Block]) -> str:
    """Return the report as one page."""
    parts, contents, tables = [], [], 0
    for block in blocks:
        match block:
            case Heading(text, 2):
                contents.append(text)
                parts.append(f'<h2 id="part-{len(contents)}">{escape(text)}</h2>\n')
            case Heading(text, level):
                parts.append(f"<h{level}>{_broken(text)}</h{level}>\n")
            case Text(text, loud):
                css = ' class="notice"' if loud else ""
                parts.append(f"<p{css}>{_broken(text)}</p>\n")
            case Items(texts):
                items = "".join(f"<li>{_broken(text)}</li>\n" for text in texts)
                parts.append(f"<ul>\n{items}</ul>\n")
            case Table():
                tables += 1
                parts.append(_html_table(block, f"table-{tables}"))
            case Picture():
                parts.append(_html_picture(block))
    links = "".join(
        f'<li><a href="#part-{i}">{escape(text)}</a></li>\n' for i, text in enumerate(contents, 1)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE.read_text('utf-8')}</style>\n</head>\n"
        f'<body>\n<header>\n<h1>{escape(title)}</h1>\n<nav aria-label="Contents">\n<ol>\n{links}'
        f"</ol>\n</nav>\n</header>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )
