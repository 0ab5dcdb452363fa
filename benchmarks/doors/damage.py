"""Ways to damage files: cut short, flipped bits, other bytes; and what hides code in a pickle."""

from __future__ import annotations

import builtins
import importlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["JUNK", "Evil", "damaged", "evils", "json_damaged"]

JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    99,
    10**12,
    1e308,
    -0.5,
    "",
    "text",
    "../../etc/passwd",
    "__class__",
    [],
    [1, "x"],
    {},
    {"a": 1},
)
"""What stands in place of a value in JSON or YAML."""


def damaged(
    content: bytes, rng: random.Random, *, cuts: int = 16, flips: int = 32, head: int = 256
) -> Iterator[tuple[str, str, bytes]]:
    """Damaged copies of a file, as (kind of damage, where, content).

    Args:
        content: The whole file.
        rng: Where places come from.
        cuts: How many places it is cut at, beside the obvious ones.
        flips: How many single bits are flipped, half of them in the head.
        head: Bytes at the begin that most readers look at first.
    """
    size = len(content)
    yield "empty", "0 bytes", b""
    for at in sorted({*(n for n in (1, 4, 8, 9, 64) if n < size), size // 4, size // 2, size - 1}):
        yield "cut short", f"{at} of {size} bytes", content[:at]
    for _ in range(cuts):
        at = rng.randrange(1, size)
        yield "cut short", f"{at} of {size} bytes", content[:at]
    for number in range(flips):
        at = rng.randrange(min(head, size) if number % 2 else size)
        changed = bytearray(content)
        changed[at] ^= 1 << rng.randrange(8)
        yield "a bit flipped", f"in byte {at}", bytes(changed)
    for length in (64, 4096):
        at = rng.randrange(max(1, size - length))
        noise = rng.randbytes(length)
        yield (
            "random bytes inside",
            f"{length} at {at}",
            content[:at] + noise + content[at + length :],
        )
    yield "random bytes alone", "4096", rng.randbytes(4096)
    yield "zeros alone", "4096", bytes(4096)
    yield "text", "a sentence", b"This is no such file.\n" * 20
    yield "a page of HTML", "of a proxy", b"<html><body>Sign in</body></html>\n" * 20
    yield "bytes after the end", "1000", content + rng.randbytes(1000)
    yield "twice in one file", "", content + content


def json_damaged(value: Any, rng: random.Random, count: int) -> Iterator[tuple[str, Any]]:
    """Copies of a JSON value with one place changed, left out or named otherwise.

    Args:
        value: Containers and plain values.
        rng: Where places and junk come from.
        count: How many copies.
    """
    places = list(_places(value))
    for _ in range(count):
        path = rng.choice(places)
        how = rng.choice(("other", "other", "other", "gone", "renamed"))
        junk = rng.choice(JUNK)
        name = ".".join(map(str, path)) or "all of it"
        if how == "other" or not path:
            yield f"{name} is {junk!r}", _changed(value, path, lambda _, j=junk: j)
        elif how == "gone":
            yield f"without {name}", _without(value, path, None)
        else:
            yield f"{name} under another name", _without(value, path, "renamed")


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(below, (*path, key))


def _changed(value: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(value)
    copied = value.copy()
    copied[path[0]] = _changed(value[path[0]], path[1:], change)
    return copied


def _without(value: Any, path: tuple[Any, ...], name: str | None) -> Any:
    def drop(container: Any) -> Any:
        left = container.copy()
        gone = left.pop(path[-1])
        if name is not None and isinstance(left, dict):
            left[name] = gone
        return left

    return _changed(value, path[:-1], drop)


class Evil:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def evils(canary: Path) -> dict[str, Evil]:
    """Objects that would make the canary, by the function that they call."""
    code = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": Evil(os.system, f"touch '{canary}'"),
        "subprocess.Popen": Evil(subprocess.Popen, ["touch", str(canary)]),
        "builtins.eval": Evil(builtins.eval, code),
        "builtins.exec": Evil(builtins.exec, code),
        "builtins.open": Evil(builtins.open, str(canary), "w"),
        "pathlib.Path.touch": Evil(Path.touch, canary),
        "importlib.import_module": Evil(importlib.import_module, "antigravity"),
    }
