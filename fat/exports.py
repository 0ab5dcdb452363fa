"""The file that a config asks for, written of a student into its run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fat.batches import AtMost, Images
from fat.config import ExportConfig
from fat.errors import FatError
from fat.export.export import export
from fat.export.target import Target
from fat.export.targets import TARGETS, make_target
from fat.student import Student

__all__ = ["STEM", "asked_target", "export_student"]

STEM = "student"
"""Name of the file in the run directory, without its suffix."""


def asked_target(config: ExportConfig) -> Target | None:
    """What a config asks to export to, ``None`` for nothing.

    Raises:
        FatError: If there is no such target, it is not installed, or an option is out of range.
    """
    if config.target == "none":
        return None
    if config.images < 1:
        raise FatError(f"export.images is {config.images}; it must be at least 1.")
    if config.target not in TARGETS:
        raise FatError(
            f"export.target is {config.target!r}; type export=CHOICE, allowed are none, "
            f"{', '.join(TARGETS)}."
        )
    target = make_target(config.target, opset=config.opset, integer_io=config.integer_io)
    target.check()
    return target


def export_student(
    student: Student,
    target: Target,
    directory: Path,
    images: Images,
    config: ExportConfig,
    metrics: Mapping[str, Any],
    *,
    progress: bool,
) -> dict[str, Any]:
    """Write a student into a run directory and verify the file.

    Args:
        student: Calibrated; it is moved to the CPU, where runtimes are.
        target: From :func:`asked_target`.
        directory: The run directory.
        images: Test images, on the CPU.
        config: conf/export.
        metrics: The run's metrics; its figures are kept in the file.
        progress: Whether to show a bar.

    Returns:
        What :func:`fat.export.export.export` returns.
    """
    kept = ("float", "calibrated", "trained", "accuracy_drop")
    return export(
        student.to("cpu"),
        directory / f"{STEM}{target.suffix}",
        target,
        AtMost(images, config.images),
        metrics={key: metrics[key] for key in kept},
        progress=f"Verify {target.name}" if progress else None,
    )
