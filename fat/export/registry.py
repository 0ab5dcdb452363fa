"""Export targets by name, and the runtime for any file."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from fat.export.base import ExportBackend, Runtime
from fat.export.executorch import ExecuTorch
from fat.export.litert import LiteRT
from fat.export.onnx import Onnx
from fat.export.openvino import OpenVino
from fat.utils.errors import FatError, first_line, unknown_name

__all__ = ["BACKENDS", "RUNTIMES", "TARGETS", "make_target", "open_artifact"]

BACKENDS: tuple[type[ExportBackend], ...] = (Onnx, OpenVino, LiteRT, ExecuTorch)
"""All export targets. A new one is added here and gets a file ``conf/export/NAME.yaml``."""

TARGETS = tuple(backend.name for backend in BACKENDS)
RUNTIMES = {
    suffix: tuple(backend.name for backend in BACKENDS if suffix in backend.opens)
    for suffix in dict.fromkeys(suffix for backend in BACKENDS for suffix in backend.opens)
}
"""Targets that can open a file of each suffix, the default first."""


def make_target(name: str, **options: Any) -> ExportBackend:
    """Build an export target.

    Args:
        name: An entry of ``TARGETS``.
        **options: Arguments of its class, such as ``opset`` of :class:`fat.export.onnx.Onnx` or
            ``integer_io`` of :class:`fat.export.litert.LiteRT`. Options that another target has are
            accepted with their default value.

    Raises:
        FatError: If the name is unknown, or the target lacks one of the options.
    """
    if name not in TARGETS:
        raise unknown_name("export target", name, TARGETS)
    parameters = {backend.name: inspect.signature(backend).parameters for backend in BACKENDS}
    accepted = {}
    for option, value in options.items():
        owners = [target for target in TARGETS if option in parameters[target]]
        if name in owners:
            accepted[option] = value
        elif not owners or value != parameters[owners[0]][option].default:
            raise FatError(
                f"export={name} has no option export.{option}"
                + (f"; it belongs to export={' and export='.join(owners)}." if owners else ".")
            )
    return BACKENDS[TARGETS.index(name)](**accepted)


def open_artifact(path: Path, runtime: str | None = None, *, threads: int | None = None) -> Runtime:
    """Open a model file, written by FAT or by another tool.

    Args:
        path: An .onnx, .xml, .tflite or .pte file.
        runtime: Target whose runtime to use; ``None`` for the default of the suffix.
        threads: Number of threads; ``None`` for torch's number.

    Raises:
        FatError: If the suffix is unknown, the runtime does not open such files or is not
            installed, or the file cannot be opened.
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
    except OSError as error:  # for example, the name is too long
        raise FatError(f"{first_line(error)}. Give the file with artifact=FILE.") from error
    return target.open(path, threads=threads)
