"""Jinja2 templates of the report pages and the model card, and the number formats they use.

``templates/macros.html.j2`` holds the parts of a page (tables, plots, tiles, ...). Each macro is
also an attribute of this module, so that Python code can call ``html.table(...)``; macros return
:class:`markupsafe.Markup` and escape every argument that is not markup already.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from fat.report.records import dig, finite, word

__all__ = ["Column", "Sorted", "embed", "escape", "format_number", "render", "short", "slug"]

MACROS = (
    "cell",
    "code",
    "command_line",
    "facts",
    "folded",
    "link",
    "note",
    "number_cell",
    "pill",
    "plot",
    "section",
    "table",
    "tiles",
)
UNPRINTABLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x00")
"""Terminal colors, and a character that HTML cannot contain."""
DIGITS = 6
"""Significant digits of plotted values: finer than a pixel, and a third of a float's bytes."""


def _clean(value: Any) -> Any:
    """Remove what an HTML file cannot contain, also lone surrogates; markup is left alone."""
    if isinstance(value, Markup):
        return value
    return UNPRINTABLE.sub("", str(value)).encode("utf-8", "replace").decode("utf-8")


def escape(value: object) -> str:
    """Escape a value for HTML and for plotly.js, which renders a subset of HTML in its labels.

    Examples:
        >>> escape('</script><b title="x">')
        '&lt;/script&gt;&lt;b title=&quot;x&quot;&gt;'
    """
    return html.escape(_clean(value))


def embed(content: Any) -> Markup:
    r"""Serialize data as JSON that is safe inside a script element; NaN and infinity become null.

    Examples:
        >>> print(embed({"x": [1.0, float("nan")], "name": "</script>"}))
        {"x":[1.0,null],"name":"\u003c/script\u003e"}
    """
    if hasattr(content, "to_plotly_json"):
        content = content.to_plotly_json()
    return htmlsafe_json_dumps(_jsonable(content), separators=(",", ":"), allow_nan=False)


def _jsonable(content: Any) -> Any:
    if isinstance(content, float):
        return float(f"{content:.{DIGITS}g}") if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {str(key): _jsonable(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_jsonable(value) for value in content]
    return content


def format_number(value: object, digits: int = 2, unit: str = "") -> str:
    """Format a number with a fixed number of decimals; anything else gives a dash.

    Args:
        value: A number, or anything else.
        digits: Digits after the decimal point.
        unit: Appended to the number.

    Examples:
        >>> format_number(-2.018, 1, " dB"), format_number(None), format_number(float("nan"))
        ('−2.0 dB', '–', '–')
    """
    found = finite(value)
    if found is None:
        return "–"
    text = f"{found:,.{digits}f}"
    if not float(text.replace(",", "")):
        text = text.lstrip("-")  # no minus zero
    return text.replace("-", "−").replace(",", "\u202f") + unit


def short(value: object) -> str:
    """Format a number of any size with three significant digits.

    Examples:
        >>> short(-12.359), short(0.0), short(0.00012345), short(None)
        ('−12.4', '0', '0.000123', '–')
    """
    found = finite(value)
    return "–" if found is None else f"{found:.3g}".replace("-", "−")


def slug(text: str) -> str:
    """Turn a heading into an anchor.

    Examples:
        >>> slug("Failed runs")
        'failed-runs'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _shown(nested: object, path: str, digits: int = 2, unit: str = "") -> str:
    return format_number(dig(nested, path), digits, unit)


def _code(text: str) -> str:
    """Markdown code that can leave neither its backticks nor the cell of a table."""
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", "/") + "`"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Heading.
        numeric: Right-align the cells and sort them by value.
        explain: Tooltip of the heading.
        digits: Digits after the decimal point; ``None`` shows numbers as they are given.
    """

    title: str
    numeric: bool = False
    explain: str = ""
    digits: int | None = 2


class Sorted(NamedTuple):
    """A cell that is sorted by something other than its text."""

    shown: object
    key: object


def render(template: str | jinja2.Template, **context: Any) -> str:
    """Render a template of this package; those of HTML pages escape their variables.

    A template that extends ``page.html.j2`` gives a self-contained page: one file that needs no
    other file and no network. Its variables are ``title``, that of the browser window, and
    optionally ``data``, what page.js shows of a run when a point of a plot is selected.
    """
    return _environment().get_template(template).render(**context)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fat.report"),
        autoescape=lambda name: name is None or name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "code": _code,
        "embed": embed,
        "finite": finite,
        "measure": lambda value, unit: "–" if value is None else f"{value:.2f} {unit}",
        "number": format_number,
        "shown": _shown,
        "slug": slug,
        "word": word,
    }
    environment.globals |= {"asset": _asset, "headings": _headings, "page_scripts": _scripts}
    environment.globals["policy"] = _policy
    return environment


def __getattr__(name: str) -> Any:
    if name in MACROS:
        return getattr(_environment().get_template("macros.html.j2").module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _headings(body: str) -> list[tuple[str, Markup]]:
    """Anchor and title of each section of a page."""
    found = re.findall(r'<section id="([^"]+)"[^>]*><h2[^>]*>(.*?)</h2>', body)
    return [(anchor, Markup(title)) for anchor, title in found]


def _scripts(body: str) -> list[Markup]:
    """Scripts of a page. A page without plots does without plotly.js and stays small.

    plotly.js, five megabytes, is inlined into every page that has plots. One file shared by all
    pages of a sweep would be smaller, but then a page sent to somebody would show no plots.
    """
    scripts = [_asset("page.js")]
    if 'class="figure"' in body:
        from plotly.offline import get_plotlyjs

        scripts.insert(0, Markup(get_plotlyjs()))
    return scripts


def _policy(scripts: list[Markup]) -> Markup:
    """Content security policy: run these scripts and no others, and load nothing.

    Names of layers, classes and files come from users; with this policy none can run a script.
    """
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in scripts)
    allowed = " ".join(f"'sha256-{digest.decode()}'" for digest in digests)
    return Markup(
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _asset(name: str) -> Markup:
    return Markup((files("fat.report") / name).read_text(encoding="utf-8"))
