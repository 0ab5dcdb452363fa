"""The targets by name, and the runtime for any file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fat.errors import FatError, unknown_name
from fat.export.onnx import INT4_OPSET, Onnx
from fat.export.target import Runtime, Target

__all__ = ["RUNTIMES", "TARGETS", "make_target", "open_artefact"]

TARGETS = ("onnx", "openvino")
RUNTIMES = {
    ".onnx": ("onnx", "openvino"),
    ".xml": ("openvino",),
}
"""Which targets can open a file, the first by default."""


def make_target(name: str, *, opset: int = INT4_OPSET) -> Target:
    """The target of a name.

    Args:
        name: ``onnx`` or ``openvino``.
        opset: Version of ONNX' operators.

    Raises:
        FatError: If the name is unknown, or the target does not have what is asked for.
    """
    makers: dict[str, Callable[[], Target]] = {
        "onnx": lambda: Onnx(opset),
        "openvino": lambda: _openvino(opset),
    }
    if name not in makers:
        raise unknown_name("export target", name, TARGETS)
    return makers[name]()


def open_artefact(path: Path, runtime: str | None = None, *, threads: int | None = None) -> Runtime:
    """Open a file in a runtime, ours or another's.

    Args:
        path: An .onnx or .xml file.
        runtime: The target whose runtime to take; ``None`` for the first that the suffix allows.
        threads: Threads that it may use.

    Raises:
        FatError: If the suffix is unknown, the runtime does not take it or is not installed, or the
            file cannot be opened.
    """
    if path.suffix not in RUNTIMES:
        raise FatError(f"{path} ends in '{path.suffix}'; allowed are {', '.join(RUNTIMES)}.")
    allowed = RUNTIMES[path.suffix]
    if runtime is not None and runtime not in allowed:
        raise unknown_name(f"runtime for {path.suffix} files", runtime, allowed)
    target = make_target(runtime or allowed[0])
    target.check()
    return target.open(path, threads=threads)


def _openvino(opset: int) -> Target:
    from fat.export.openvino import OpenVino

    return OpenVino(opset)
