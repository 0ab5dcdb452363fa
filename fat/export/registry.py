"""Export targets by name, and the runtime for any file."""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fat.utils.errors import FatError, first_line, unknown_name

if TYPE_CHECKING:
    from fat.export.base import ExportBackend, Runtime

__all__ = ["BACKENDS", "TARGETS", "make_target", "open_artifact", "runtimes"]

BACKENDS = {
    "onnx": "fat.export.onnx.Onnx",
    "openvino": "fat.export.openvino.OpenVino",
    "litert": "fat.export.litert.LiteRT",
    "executorch": "fat.export.executorch.ExecuTorch",
}
"""Class of each export target, imported when it is needed: help and completion do without torch.

A new target is added here and gets a file ``conf/export/NAME.yaml``.
"""

TARGETS = tuple(BACKENDS)


@cache
def _backend(target: str) -> type[ExportBackend]:
    module, _, name = BACKENDS[target].rpartition(".")
    backend: type[ExportBackend] = getattr(importlib.import_module(module), name)
    return backend


@cache
def runtimes() -> dict[str, tuple[str, ...]]:
    """Return the targets that can open a file of each suffix, the default first."""
    opens = {target: _backend(target).opens for target in TARGETS}
    suffixes = dict.fromkeys(suffix for found in opens.values() for suffix in found)
    return {suffix: tuple(name for name in TARGETS if suffix in opens[name]) for suffix in suffixes}


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
    parameters = {target: inspect.signature(_backend(target)).parameters for target in TARGETS}
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
    return _backend(name)(**accepted)


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
    if path.suffix not in runtimes():
        raise FatError(f"{path} ends in '{path.suffix}'; allowed are {', '.join(runtimes())}.")
    allowed = runtimes()[path.suffix]
    if runtime is not None and runtime not in allowed:
        raise unknown_name(f"runtime for {path.suffix} files", runtime, allowed)
    target = make_target(runtime or allowed[0])
    target.check()
    try:
        path.is_file()
    except OSError as error:  # for example, the name is too long
        raise FatError(f"{first_line(error)}. Give the file with artifact=FILE.") from error
    return target.open(path, threads=threads)


def __getattr__(name: str) -> Any:
    if name == "RUNTIMES":  # the name in version 0.1
        return runtimes()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
