"""Griffe extension: prepares docstrings for the API reference.

References such as :func:`fat.prepare` become links. Options, which are written
``bits: int = option(8, "bit-width of weights and activations")``, become the attributes of their
class.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

LIST = re.compile(r"^(?!\* )(\S.*)\n(?=\* )", re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Goes through all objects of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Prepare the docstrings of a package."""
        self._prepare(pkg, pkg)

    def _prepare(self, part: griffe.Object, package: griffe.Module) -> None:
        if part.docstring is not None:
            text = part.docstring.value
            if part.is_class and (options := _options(part)):
                text = f"{text}\n\nAttributes:\n" + "\n".join(options)
            text = LIST.sub(r"\1\n\n", text)  # Markdown wants a blank line before a list
            part.docstring.value = ROLE.sub(lambda match: _link(match[1], part, package), text)
        for member in part.members.values():
            if not member.is_alias:
                self._prepare(member, package)


def _link(name: str, part: griffe.Object, package: griffe.Module) -> str:
    """Return a link to a documented object, which is looked for from the inner scope outwards."""
    scope: griffe.Object | None = part
    while scope is not None:
        inside = "" if scope is package else f"{scope.path}.".partition(".")[2]
        try:
            found = package[inside + name.removeprefix(f"{package.path}.")]
            if found.has_docstring and found.is_public:
                return f"[`{name}`][{found.canonical_path}]"
        except (KeyError, griffe.AliasResolutionError):
            pass
        scope = scope.parent
    return f"`{name}`"


def _options(part: griffe.Object) -> list[str]:
    """Return one line for each option of a class; the defaults take the place of the calls."""
    lines = []
    for name, member in part.members.items():
        call: Any = getattr(member, "value", None)
        if not isinstance(call, griffe.ExprCall) or str(call.function) not in ("option", "nested"):
            continue
        given = {x.name: x.value for x in call.arguments if isinstance(x, griffe.ExprKeyword)}
        given |= zip(("default", "meaning"), call.arguments, strict=False)
        meaning = ast.literal_eval(f"({given['meaning']})")
        lines.append(f"    {name}: {meaning}.")
        default = given.get("default")
        member.value = f"{default}()" if str(call.function) == "nested" else default  # type: ignore[union-attr]
    return lines
