"""Counts of what a pretended GPU does, by operation and by line of source."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch

import fat
from benchmarks.tools.counting import kernels, memory, traffic

__all__ = ["Counts", "kernels", "memory", "source_line", "traffic"]

FAT = str(Path(fat.__file__).parent)
ROOT = str(Path(fat.__file__).parents[1])


@dataclass(eq=False)  # sections are compared by identity
class Counts:
    """Kernels, bytes and waits of a device in a section, by operation or by line of source.

    Attributes:
        kernels: Launched kernels by (operation, line).
        read: Bytes read by operation.
        written: Bytes written by operation.
        reads: Host reads, which wait until the device has done everything before, by (kind, line).
        waiting_copies: Copies to the device that wait in the same way, by line.
        copies: All copies to the device by line.
    """

    kernels: Counter[tuple[str, str]] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    reads: Counter[tuple[str, str]] = field(default_factory=Counter)
    waiting_copies: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)

    @property
    def launched(self) -> int:
        """Number of kernels."""
        return self.kernels.total()

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.read.total() + self.written.total()

    @property
    def host_reads(self) -> int:
        """Number of host reads."""
        return self.reads.total()

    def of(self, prefix: str) -> int:
        """Number of kernels of the operations whose name starts with a prefix."""
        return sum(count for (name, _), count in self.kernels.items() if name.startswith(prefix))

    def table(self, most: int = 12) -> str:
        """Return the most frequent kernels, and all that waited, as text."""
        total = f"{self.launched} kernels, {self.bytes / 1e6:.1f} MB, {self.host_reads} host reads"
        often = self.kernels.most_common(most)
        lines = [total, *(f"  {n:5d} {name:32s} {line}" for (name, line), n in often)]
        lines += [f"  {n:5d} host read: {kind} at {line}" for (kind, line), n in self.reads.items()]
        lines += [f"  {n:5d} waiting copy at {line}" for line, n in self.waiting_copies.items()]
        return "\n".join(lines)


def source_line() -> str:
    """Return the innermost line of fat on the stack, else of a library that trains, else of a test.

    Within a backward pass it is the name of the autograd node, unless fat's own code computes it.
    """
    fallback = ""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(FAT):
            return _line(frame, ROOT) + (f" (in {fallback})" if fallback else "")
        if not fallback and frame.f_code.co_name == "_engine_run_backward":
            node = torch._C._current_autograd_node()
            if node is not None:
                return f"backward of {node.name()}"
        for library in ("pytorch_lightning", "torchmetrics"):
            if not fallback and f"/{library}/" in path:
                fallback = _line(frame, path.split(f"/{library}/")[0])
        frame = frame.f_back
    return fallback or "outside of fat"


def _line(frame: FrameType, root: str) -> str:
    return f"{Path(frame.f_code.co_filename).relative_to(root)}:{frame.f_lineno}"
