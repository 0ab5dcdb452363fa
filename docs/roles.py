"""Griffe extension: references such as :func:`fat.prepare` in docstrings become links."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Replaces reStructuredText roles by Markdown, which mkdocstrings renders."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Go through all docstrings of a package once it is loaded."""
        self._replace(pkg, pkg)

    def _replace(self, part: griffe.Object, package: griffe.Module) -> None:
        def link(match: re.Match[str]) -> str:
            scope: griffe.Object | None = part
            while scope is not None:
                prefix = "" if scope is package else f"{scope.path}.".partition(".")[2]
                name = match[1].removeprefix(f"{package.path}.") if scope is package else match[1]
                try:
                    found = package[prefix + name]
                    if found.has_docstring:
                        return f"[`{match[1]}`][{found.canonical_path}]"
                except (KeyError, griffe.AliasResolutionError):
                    pass
                scope = scope.parent
            return f"`{match[1]}`"

        if part.docstring is not None:
            part.docstring.value = ROLE.sub(link, part.docstring.value)
        for member in part.members.values():
            if not member.is_alias:
                self._replace(member, package)
