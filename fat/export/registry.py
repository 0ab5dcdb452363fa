"""The targets by name, and the runtime for any file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fat.export.base import ExportBackend, Runtime
from fat.export.onnx import INT4_OPSET, Onnx
from fat.utils.errors import FatError, first_line, unknown_name

__all__ = ["RUNTIMES", "TARGETS", "make_target", "open_artefact"]

TARGETS = ("onnx", "openvino", "litert", "executorch")
RUNTIMES = {
    ".onnx": ("onnx", "openvino"),
    ".xml": ("openvino",),
    ".tflite": ("litert",),
    ".pte": ("executorch",),
}
"""Which targets can open a file, the first by default."""


def make_target(name: str, *, opset: int = INT4_OPSET, integer_io: bool = False) -> ExportBackend:
    """The target of a name.

    Args:
        name: ``onnx``, ``openvino``, ``litert`` or ``executorch``.
        opset: Version of ONNX' operators, for the first two.
        integer_io: Whether the file takes and gives int8, for ``litert``.

    Raises:
        FatError: If the name is unknown, or the target does not have what is asked for.
    """
    if name not in TARGETS:
        raise unknown_name("export target", name, TARGETS)
    if integer_io and name != "litert":
        raise FatError(f"export.integer_io is for export=litert; export={name} takes float32.")
    makers: dict[str, Callable[[], ExportBackend]] = {
        "onnx": lambda: Onnx(opset),
        "openvino": lambda: _openvino(opset),
        "litert": lambda: _litert(integer_io),
        "executorch": _executorch,
    }
    return makers[name]()


def open_artefact(path: Path, runtime: str | None = None, *, threads: int | None = None) -> Runtime:
    """Open a file in a runtime, ours or another's.

    Args:
        path: An .onnx, .xml, .tflite or .pte file.
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
    try:
        path.is_file()
    except OSError as error:  # a name that is too long, for example
        raise FatError(f"{first_line(error)}. Give the file with artifact=FILE.") from error
    return target.open(path, threads=threads)


def _openvino(opset: int) -> ExportBackend:
    from fat.export.openvino import OpenVino

    return OpenVino(opset)


def _litert(integer_io: bool) -> ExportBackend:
    from fat.export.litert import LiteRT

    return LiteRT(integer_io=integer_io)


def _executorch() -> ExportBackend:
    from fat.export.executorch import ExecuTorch

    return ExecuTorch()
