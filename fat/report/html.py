"""The parts that report pages are made of: escaped text, tables, tiles, plots, and the whole page.

Everything here returns HTML as text. What came from a user or a file goes through :func:`escape`
or :func:`embed`; only text that this package wrote itself is passed on as it is.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fat.report.records import finite

__all__ = [
    "Column",
    "cell",
    "command_line",
    "embed",
    "escape",
    "facts",
    "figure_cell",
    "folded",
    "note",
    "page",
    "pill",
    "plain",
    "plot",
    "section",
    "short",
    "slug",
    "table",
    "tiles",
]

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
DIGITS = 6
"""Significant digits of what is drawn: finer than a pixel, and a third of the bytes of a float."""


def escape(value: object) -> str:
    """Any value as text inside HTML, also inside an attribute's quotes.

    Colours of terminals and halves of surrogate pairs, which no file can hold, are taken out.

    Examples:
        >>> escape('</script><b title="x">')
        '&lt;/script&gt;&lt;b title=&quot;x&quot;&gt;'
    """
    text = ANSI.sub("", str(value)).replace("\x00", "")
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))


def embed(content: Any) -> str:
    r"""Plain data as JSON that is safe inside a script element: no ``<`` and no NaN is left.

    Examples:
        >>> embed({"x": [1.0, float("nan")], "name": "</script>"})
        '{"x":[1.0,null],"name":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(_plain(content), separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _plain(content: Any) -> Any:
    if isinstance(content, float):
        return float(f"{content:.{DIGITS}g}") if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    return content


def plain(value: object, digits: int = 2, unit: str = "", *, sign: bool = False) -> str:
    """A number for people, with a real minus; a dash where there is none.

    Args:
        value: A number, or anything else.
        digits: Digits after the point.
        unit: Written behind it.
        sign: Write the plus, too.

    Examples:
        >>> plain(-2.018, 1, " dB"), plain(None), plain(float("nan")), plain(0.4, sign=True)
        ('−2.0 dB', '–', '–', '+0.40')
    """
    found = finite(value)
    if found is None:
        return "–"
    text = f"{found:{'+' if sign else ''},.{digits}f}"
    if not float(text.replace(",", "")):
        text = text.lstrip("+-")  # no minus zero
    return text.replace("-", "−").replace(",", "\u202f") + unit


def short(value: object) -> str:
    """A number for people in three digits, whatever its size.

    Examples:
        >>> short(-12.359), short(0.0), short(0.00012345), short(None)
        ('−12.4', '0', '0.000123', '–')
    """
    found = finite(value)
    return "–" if found is None else f"{found:.3g}".replace("-", "−")


def slug(text: str) -> str:
    """A heading as an anchor.

    Examples:
        >>> slug("Why runs failed")
        'why-runs-failed'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def pill(status: str) -> str:
    """A status in a coloured shape."""
    return f'<span class="pill {slug(status)}">{escape(status)}</span>'


def section(title: str, *body: str, intro: str = "") -> str:
    """A titled part of a page; nothing at all where it has no body.

    Args:
        title: Heading; its anchor is :func:`slug` of it.
        *body: HTML.
        intro: HTML of one sentence or two that say how to read it.
    """
    inner = "".join(body)
    if not inner:
        return ""
    lead = f'<p class="intro">{intro}</p>' if intro else ""
    name = slug(title)
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{escape(title)}</h2>{lead}{inner}</section>'
    )


def note(text: str, kind: str = "hint") -> str:
    """A paragraph that stands out: a ``hint``, or something ``bad``."""
    return f'<p class="note {kind}">{escape(text)}</p>'


def folded(title: str, text: str) -> str:
    """Long text, folded away."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def command_line(command: str | None) -> str:
    """A command with a button that copies it."""
    if not command:
        return '<span class="none">not known</span>'
    text = escape(command)
    return (
        f'<span class="command"><code tabindex="0" title="{text}">{text}</code>'
        f'<button type="button" class="copy" data-copy="{text}">Copy</button></span>'
    )


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Large figures side by side: name, figure, and a word beneath; those with a dash are left out.

    Args:
        entries: Texts, not yet escaped.
    """
    inner = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}'
        + (f"<small>{escape(more)}</small>" if more else "")
        + "</dd></div>"
        for name, value, more in entries
        if value != "–"
    )
    return f'<dl class="tiles">{inner}</dl>' if inner else ""


def facts(entries: Iterable[tuple[str, str]]) -> str:
    """Names and what they stand for, one below the other.

    Args:
        entries: Names as text and values as HTML.
    """
    inner = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in entries
    )
    return f'<dl class="facts">{inner}</dl>' if inner else ""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its heading.
        numeric: Whether figures stand in it, to the right.
        explain: What the heading means, shown while pointing at it.
    """

    title: str
    numeric: bool = False
    explain: str = ""


def cell(inner: str, sort: object = None) -> str:
    """A cell of text.

    Args:
        inner: HTML.
        sort: What the row is sorted by; the cell's own text when ``None``.
    """
    key = "" if sort is None else f' data-sort="{escape(sort)}"'
    return f"<td{key}>{inner}</td>"


def figure_cell(value: object, digits: int = 2, unit: str = "") -> str:
    """A cell with a number, sorted by all of its digits; a dash, sorted last, where it has none."""
    found = finite(value)
    key = "" if found is None else repr(found)
    return f'<td class="n" data-sort="{key}">{plain(found, digits, unit)}</td>'


def table(
    name: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    *,
    row_ids: Sequence[str] | None = None,
    interactive: bool = True,
) -> str:
    """A table that scrolls inside its own box, and that can be sorted and filtered.

    Args:
        name: What it shows; read out, and part of its id.
        columns: Headings.
        rows: Cells from :func:`cell` and :func:`figure_cell`.
        row_ids: An anchor for each row.
        interactive: Whether it is sorted by its headings and has a filter box.
    """
    anchor = f"table-{slug(name)}"
    heads = []
    for column in columns:
        title = escape(column.title)
        explain = f' title="{escape(column.explain)}"' if column.explain else ""
        kind = ' class="n"' if column.numeric else ""
        inner = f'<button type="button">{title}</button>' if interactive else title
        heads.append(f'<th scope="col"{kind}{explain}>{inner}</th>')
    body = []
    for place, row in enumerate(rows):
        mark = f' id="{escape(row_ids[place])}"' if row_ids else ""
        body.append(f"<tr{mark}>{''.join(row)}</tr>")
    box = (
        f'<div class="filter"><label for="{anchor}-filter">Filter</label>'
        f'<input type="search" id="{anchor}-filter" data-filter="{anchor}" autocomplete="off" '
        'spellcheck="false" placeholder="words that a row must hold">'
        f'<span class="count" aria-live="polite">{len(rows)} rows</span></div>'
        if interactive
        else ""
    )
    return (
        f'{box}<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0">'
        f'<table id="{anchor}"{" data-sortable" if interactive else ""}>'
        f'<caption class="hidden">{escape(name)}</caption>'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def plot(
    figure: Mapping[str, Any],
    label: str,
    *,
    height: int,
    title: str = "",
    below: str = "",
    least_width: int = 0,
) -> str:
    """A plot, drawn by page.js when it comes near the window.

    Args:
        figure: ``data`` and ``layout`` as plotly.js takes them.
        label: What it shows, for those who do not see it.
        height: Pixels.
        title: Text above it.
        below: Text beneath the title.
        least_width: Pixels; on a narrower screen the plot scrolls inside its own box.
    """
    caption = f"<figcaption><b>{escape(title)}</b>" if title else ""
    if title:
        caption += f"<span>{escape(below)}</span></figcaption>" if below else "</figcaption>"
    narrow = f"min-width:{least_width}px;" if least_width else ""
    return (
        f'<figure class="plot">{caption}<div class="scroll-plot">'
        f'<div class="canvas" role="img" aria-label="{escape(label)}" '
        f'style="{narrow}height:{height}px"></div></div>'
        f'<script type="application/json" class="figure">{embed(figure)}</script></figure>'
    )


def page(title: str, header: str, sections: Sequence[str], data: Any = None) -> str:
    """A whole page in one text that needs nothing else: no file and no network.

    Args:
        title: Of the window, not escaped.
        header: HTML above all sections.
        sections: From :func:`section`; empty ones are left out.
        data: What page.js shows of a run when a point of a plot is chosen.
    """
    body = "".join(sections)
    titles = re.findall(r'<section id="([^"]+)"[^>]*><h2[^>]*>(.*?)</h2>', body)
    links = "".join(f'<a href="#{anchor}">{text}</a>' for anchor, text in titles)
    contents = f'<nav aria-label="On this page">{links}</nav>' if len(titles) > 2 else ""
    # A page without plots, such as that of a run that failed at once, stays small.
    scripts = [_plotly()] if 'class="figure"' in body else []
    scripts.append(_asset("page.js"))
    # The browser runs these scripts and no others, and loads nothing: whatever a layer or a class
    # is called, it cannot make the page do anything.
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    runs = (
        "" if data is None else f'<script type="application/json" id="runs">{embed(data)}</script>'
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,">'
        f"<style>{_asset('page.css')}</style></head><body>"
        f"<header><div>{header}</div></header>{contents}<main>{body}</main>"
        f"<footer>Written by FAT. All figures are in the files beside this page.</footer>{runs}"
        + "".join(f"<script>{script}</script>" for script in scripts)
        + "</body></html>\n"
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _asset(name: str) -> str:
    return (files("fat.report") / name).read_text(encoding="utf-8")


def _plotly() -> str:
    """plotly.js itself, inlined into every page that draws: five megabytes, about a student's file.

    One file beside all pages of a sweep would be smaller, but then a page that is sent to somebody
    would be empty.
    """
    from plotly.offline import get_plotlyjs  # slow to import for those who draw nothing

    return str(get_plotlyjs())
