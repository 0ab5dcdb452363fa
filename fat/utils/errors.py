"""The errors that a user of FAT may see, and how their text is put together.

Every message answers three questions: what came, what is allowed, what to type.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

__all__ = ["FatError", "first_line", "nearest", "no_run", "unknown_name"]


class FatError(Exception):
    """A mistake that the user can mend. The entry points print its text without a traceback."""


def first_line(error: BaseException) -> str:
    """What another library's error says, as much of it as fits into a sentence.

    Examples:
        >>> first_line(ValueError("no such layer" + chr(10) + "at line 3"))
        'no such layer'
        >>> first_line(KeyError())
        'KeyError'
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def nearest(given: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` of the allowed names that look most like the given one.

    Args:
        given: What the user wrote.
        allowed: All names that would have been accepted.
        count: How many suggestions to return at most.

    Examples:
        >>> nearest("mobilnet_v2", ["mobilenet_v2", "mobilenet_v1", "resnet18"])
        ['mobilenet_v2', 'mobilenet_v1']
    """
    return difflib.get_close_matches(given, list(allowed), n=count, cutoff=0.5)


def unknown_name(kind: str, given: object, allowed: Iterable[str], hint: str = "") -> FatError:
    """Build the error for a name that is not among the allowed ones, nearest names first.

    Args:
        kind: What the name was meant to be, such as ``"init strategy"``.
        given: What the user wrote.
        allowed: All names that would have been accepted.
        hint: One more sentence that says what to type.

    Examples:
        >>> print(unknown_name("init strategy", "minmix", ["minmax", "percentile"]))
        Unknown init strategy 'minmix'. Did you mean 'minmax'? Allowed: minmax, percentile.
    """
    names = list(allowed)
    close = nearest(str(given), names)
    text = f"Unknown {kind} {given!r}."
    if close:
        text += " Did you mean " + " or ".join(repr(name) for name in close) + "?"
    if len(names) <= 30:
        text += " Allowed: " + ", ".join(names) + "."
    return FatError(text + (" " + hint if hint else ""))


def no_run(directory: str | os.PathLike[str], missing: str) -> FatError:
    """What to say of a folder that was given as a run's directory and is none.

    Args:
        directory: The folder.
        missing: The file that tells.
    """
    return FatError(
        f"{directory} holds no {missing}: it is not the directory of a run. train.py prints "
        "the directory at the end; by default it lies under outputs/ or multirun/."
    )
