"""Errors that users can fix, with messages that say what came, what is allowed and what to type."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from fat.utils.commands import install_command

__all__ = [
    "FatError",
    "abbreviated",
    "first_line",
    "missing_extra",
    "nearest",
    "no_run",
    "unknown_name",
]


SYNONYMS = {"cuda": "gpu"}
"""Words of other libraries that resemble a wrong name (``cpu``), and the names that they mean."""


class FatError(Exception):
    """An error that the user can fix. The commands print its message without a traceback."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, at most 300 characters.

    Examples:
        >>> first_line(ValueError("no such layer" + chr(10) + "at line 3"))
        'no such layer'
        >>> first_line(KeyError())
        'KeyError'
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def abbreviated(names: Sequence[str], count: int = 5) -> str:
    """Return the first names as text, and the number of those left out.

    Examples:
        >>> abbreviated(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def nearest(given: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` of the allowed names, the most similar to the given one first.

    Examples:
        >>> nearest("mobilnet_v2", ["mobilenet_v2", "mobilenet_v1", "resnet18"])
        ['mobilenet_v2', 'mobilenet_v1']
        >>> nearest("cuda", ["cpu", "gpu"])
        ['gpu']
    """
    names = list(allowed)
    if SYNONYMS.get(given) in names:
        return [SYNONYMS[given]]
    return difflib.get_close_matches(given, names, n=count, cutoff=0.5)


def unknown_name(
    kind: str,
    given: object,
    allowed: Iterable[str],
    hint: str = "",
    *,
    earlier: Mapping[str, str] = MappingProxyType({}),
) -> FatError:
    """Build the error for a name that is not among the allowed ones, with the nearest of these.

    Args:
        kind: The kind of name, such as ``"init strategy"``.
        given: The name that the user wrote.
        allowed: All allowed names.
        hint: A further sentence that says what to type.
        earlier: Names of earlier versions and what they are called now, to compare with too.

    Examples:
        >>> print(unknown_name("init strategy", "minmix", ["minmax", "percentile"]))
        Unknown init strategy 'minmix'. Did you mean 'minmax'? Allowed: minmax, percentile.
    """
    names = list(allowed)
    similar = nearest(str(given), [*names, *earlier])
    close = dict.fromkeys(earlier.get(name, name) for name in similar)
    text = f"Unknown {kind} {given!r}."
    if close:
        text += " Did you mean " + " or ".join(repr(name) for name in close) + "?"
    if len(names) <= 30:
        text += " Allowed: " + ", ".join(names) + "."
    return FatError(text + (" " + hint if hint else ""))


def missing_extra(extra: str, package: str, hint: str = "") -> FatError:
    """Build the error for an optional dependency that is not installed.

    Args:
        extra: The extra of pyproject.toml that installs it.
        package: Its name, as users know it.
        hint: An alternative, as in "or export=onnx".

    Examples:
        >>> print(missing_extra("openvino", "OpenVINO"))
        OpenVINO is not installed: type pip install -e '.[openvino]'.
    """
    alternative = f", {hint}" if hint else ""
    return FatError(f"{package} is not installed: type {install_command(extra)}{alternative}.")


def no_run(directory: str | os.PathLike[str], missing: str) -> FatError:
    """Build the error for a folder that was given as a run directory but is not one.

    Args:
        directory: The folder.
        missing: The file that every run directory has and this folder has not.
    """
    where = "A run prints its directory at the end; by default it is under outputs/ or multirun/."
    if not os.path.isdir(directory):
        return FatError(f"There is no directory {directory}. {where}")
    return FatError(f"{directory} is not a run directory: it has no {missing}. {where}")
