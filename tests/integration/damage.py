"""Bad input for the robustness tests: damaged bytes, junk values, pickles with code in them."""

from __future__ import annotations

import builtins
import importlib
import io
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from hypothesis import given
from hypothesis import strategies as st

from fat.utils.errors import FatError
from tests.conftest import often

__all__ = ["attempt", "attempt_all", "changed_json", "code_in_pickles", "damaged", "saved"]

JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 99, 10**12, 1e308, -0.5, "", "text", "../../etc/passwd", "__class__"),
    *([], [1, "x"], {}, {"a": 1}, float("nan"), float("inf")),
)
SECONDS, BYTES = 120, 8_000_000_000


def attempt(call: Callable[[], object], expected: str = "either") -> str:
    """Call a function on bad input: it works, or raises a FatError that says something.

    Every other exception fails the test, as do code that was executed (it creates a file
    ``executed`` in the working directory), two minutes, and 8 GB of memory.

    Args:
        call: Reads the input.
        expected: ``worked``, ``refused``, or ``either``.

    Returns:
        ``worked`` or ``refused``.
    """
    outcome, text = "worked", ""
    try:
        with _limits():
            call()
    except FatError as error:
        outcome, text = "refused", str(error)
    assert outcome == "worked" or len(text) > 20, f"says too little: {text}"
    assert not Path("executed").exists(), "code in the input was executed"
    assert expected in ("either", outcome)
    return outcome


def attempt_all(
    inputs: st.SearchStrategy[Any], call: Callable[[Any], object], examples: int
) -> None:
    """:func:`attempt` a function on inputs that hypothesis draws."""

    @often(examples)
    @given(inputs)
    def check(drawn: Any) -> None:
        attempt(lambda: call(drawn))

    check()


class Damaged(bytes):
    """Bytes that say how they were damaged: whole files are no message."""

    damage: str

    def __repr__(self) -> str:
        return f"{len(self)} bytes, {self.damage}"


@contextmanager
def _limits() -> Iterator[None]:
    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"no answer within {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, memory[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, head: int = 1000) -> bytes:
    """A damaged copy of a file; every second place lies in its first bytes, which readers trust."""
    ends = min(head, len(content)) - 1, len(content) - 1
    at = draw(st.one_of(*(st.integers(0, end) for end in ends)))
    bit = 1 << draw(st.integers(0, 7))
    noise = draw(st.randoms(use_true_random=False)).randbytes(draw(st.sampled_from([1, 64, 4096])))
    other = draw(st.sampled_from([b"", noise, bytes(4096), b"A text.\n", b"<html>Sign in</html>"]))
    copies = {
        f"cut at {at}": content[:at],
        f"bit {bit} flipped in byte {at}": content[:at]
        + bytes([content[at] ^ bit])
        + content[at + 1 :],
        f"{len(noise)} random bytes at {at}": content[:at] + noise + content[at + len(noise) :],
        f"{len(noise)} random bytes inserted at {at}": content[:at] + noise + content[at:],
        "random bytes appended": content + noise,
        "twice": content + content,
        f"replaced by {other[:20]!r}": other,
    }
    damage = draw(st.sampled_from(list(copies)))
    result = Damaged(copies[damage])
    result.damage = damage
    return result


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """A copy of a JSON value in which one place is left out, renamed or holds junk."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 4)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, copied = draw(st.sampled_from(keys)), value.copy()
        how = draw(st.integers(0, 5))
        if how == 0:
            del copied[key]
        elif how == 1 and isinstance(copied, dict):
            copied["renamed"] = copied.pop(key)
        else:
            copied[key] = draw(changed_json(value[key]))
        return copied
    return draw(st.sampled_from(JUNK))


def saved(content: object, **options: Any) -> bytes:
    """The bytes that ``torch.save`` writes."""
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


class _Call:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


def code_in_pickles() -> dict[str, object]:
    """Objects whose pickles would execute something, by the function that they call."""
    code = "open('executed', 'w').close()"
    return {
        "os.system": _Call(os.system, "touch executed"),
        "subprocess.Popen": _Call(subprocess.Popen, ["touch", "executed"]),
        "eval": _Call(builtins.eval, code),
        "exec": _Call(builtins.exec, code),
        "open": _Call(builtins.open, "executed", "w"),
        "Path.touch": _Call(Path.touch, Path("executed")),
        "import_module": _Call(importlib.import_module, "antigravity"),
    }
