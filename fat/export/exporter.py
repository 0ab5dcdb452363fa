"""A student → a file that was proven equal to it: lower, write, compare, put in place."""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fat.export.base import ExportBackend, Program, Runtime
from fat.export.lowering import in_order, lower
from fat.export.onnx import INT4_OPSET, Onnx
from fat.export.verify import (
    LayerDifference,
    check_float,
    check_kernels,
    check_layers,
    check_logits,
    compare,
    compare_layers,
    falls_short,
    latency,
    most_different,
)
from fat.models.integer_inference import float_operations
from fat.models.labels import class_names
from fat.models.student import Student
from fat.utils.batches import Images, as_batches, split
from fat.utils.errors import FatError
from fat.utils.io import check_writable

__all__ = ["export", "export_onnx"]

LAYER_IMAGES = 8
"""Images on which every operation is compared by itself."""
NOISE_IMAGES = 16


def export_onnx(
    student: Student,
    path: str | Path,
    images: Images | None = None,
    *,
    opset: int = INT4_OPSET,
    metrics: Mapping[str, Any] | None = None,
    beside_float: bool = True,
) -> dict[str, Any]:
    """Write an ONNX file and prove that ONNX Runtime computes the student with it.

    Args:
        student: Calibrated student, on the CPU.
        path: The file.
        images: Held-out batches to compare on; see :func:`export`.
        opset: Version of ONNX' operators, 18 to 23; 4-bit weights are stored as such from 21 on.
        metrics: Figures to keep in the file's metadata.
        beside_float: See :func:`export`.

    Returns:
        What :func:`export` returns.

    Raises:
        FatError: See :func:`export`; or for an opset that cannot be written.
    """
    target = Onnx(opset)
    return export(student, path, target, images, metrics=metrics, beside_float=beside_float)


def export(
    student: Student,
    path: str | Path,
    target: ExportBackend,
    images: Images | None = None,
    *,
    metrics: Mapping[str, Any] | None = None,
    progress: str | None = None,
    beside_float: bool = True,
) -> dict[str, Any]:
    """Write a student as a file of a target, and prove that the file equals it.

    The file is run in the target's runtime: every operation's integers are compared with the
    student's, then the logits; layers must run as integer kernels. Only a file that passes is put
    in its place; what was there before stays otherwise.

    Args:
        student: Calibrated student, on the CPU.
        path: The file.
        target: What to write, such as :class:`fat.export.onnx.Onnx`.
        images: Held-out batches, labelled or not. Without any, noise tells whether the integers are
            equal; accuracies are then ``None``.
        metrics: Figures to keep in the file's metadata.
        progress: Text before a progress bar; ``None`` shows none.
        beside_float: Write the float network too, for a moment, to compare speed and size. Without
            it, a quarter of the time less, ``latency_ms`` and ``size_mb`` are ``None``.

    Returns:
        ``file``, ``runtime``, ``on`` ("images" or "noise"), what :func:`fat.export.verify.compare`
        gives, ``layers`` {compared, images, differing, worst}, ``kernels`` {operators,
        integer_operators, integer_layers, float_layers}, ``latency_ms`` {float, quantized, ratio,
        threads, batch}, ``size_mb`` {float, quantized, ratio} of the two files, and ``seconds``.

    Raises:
        FatError: If the student is not calibrated or not on the CPU, an operator has no form in the
            format, the place cannot be written, or the file does not compute what the student does;
            the layer is named.
    """
    started = time.perf_counter()
    target.check()
    path = Path(path)
    if path.is_dir():
        raise FatError(f"{path} is a folder; give the name of a file, such as student.onnx.")
    if student.device.type != "cpu":
        raise FatError("The student is on a GPU; call student.to('cpu') before exporting it.")
    check_writable(path.parent)
    held_out = None if images is None else as_batches(images)
    example = _example(student, held_out)
    lowered = lower(student, example, target.style)
    metadata = _metadata(student, metrics)
    program = Program(lowered.network, example, lowered.tensors, lowered.weight_bits, metadata)

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        shipped, tapped, floats = (
            Path(folder) / f"{name}{target.suffix}" for name in ("shipped", "tapped", "float")
        )
        target.write(program, shipped)
        runtime = target.open(shipped)
        kernels = runtime.kernels()
        check_kernels(kernels, student)

        target.write_tapped(program, shipped, tapped)
        judged = [example] if held_out is None else held_out
        twin = target.open(tapped)
        differences = _layers_on(_first(held_out, example), student, twin, program, target)
        figures = compare(student, runtime, judged, progress=progress)
        short = falls_short(figures["simulation"], target.tolerance)
        if short:
            worst = most_different(student, runtime, judged)
            differences = _layers_on(worst, student, twin, program, target)
            explained = any(entry.differing for entry in differences) or (
                float_operations(student.network)
                and not falls_short(compare(student, twin, [worst])["simulation"], target.tolerance)
            )
            check_logits("" if explained else short)

        speed = size = None
        if beside_float:
            reference = Program(in_order(student.teacher), example)
            target.write(reference, floats)
            float_runtime = target.open(floats)
            check_float(float_runtime, student, example[:1])
            float_ms, quantized_ms = latency(float_runtime, runtime, example[:1])
            speed = {
                "float": round(float_ms, 3),
                "quantized": round(quantized_ms, 3),
                "ratio": round(quantized_ms / float_ms, 3),
                "threads": torch.get_num_threads(),
                "batch": 1,
            }
            float_mb, quantized_mb = (1e-6 * file.stat().st_size for file in (floats, shipped))
            size = {
                "float": round(float_mb, 3),
                "quantized": round(quantized_mb, 3),
                "ratio": round(quantized_mb / float_mb, 4),
            }
        shipped.replace(path)

    return {
        "file": path.name,
        "runtime": runtime.name,
        "on": "noise" if held_out is None else "images",
        **figures,
        "layers": _summary(differences),
        "kernels": asdict(kernels),
        "latency_ms": speed,
        "size_mb": size,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _layers_on(
    images: Tensor, student: Student, twin: Runtime, program: Program, target: ExportBackend
) -> list[LayerDifference]:
    """Compare every operation on some images; one that differs by more than is tolerated raises."""
    tolerance = target.tolerance
    differences = compare_layers(student, twin, program.tensors, images, ties=tolerance.ties)
    check_layers(differences, tolerance, target.advice())
    return differences


def _example(student: Student, images: Images | None) -> Tensor:
    """A batch of the size that the network is for."""
    if images is not None:
        first = split(next(iter(images)))[0]
        return first if len(first) > 1 else first.repeat(2, 1, 1, 1)
    preprocessing = student.origin.get("preprocessing")
    if preprocessing is None:
        raise FatError(
            "The student does not know the size of its images: give held-out ones, as in "
            "fat.export_onnx(student, 'student.onnx', images)."
        )
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NOISE_IMAGES, 3, *preprocessing["size"], generator=generator)


def _first(images: Images | None, example: Tensor) -> Tensor:
    """The images on which single operations are compared."""
    if images is None:
        return example[:LAYER_IMAGES]
    rows = itertools.chain.from_iterable(split(batch)[0] for batch in images)
    return torch.stack(list(itertools.islice(rows, LAYER_IMAGES)))


def _metadata(student: Student, metrics: Mapping[str, Any] | None) -> dict[str, str]:
    """What whoever finds the file needs to feed it and to read its answers."""
    origin = student.origin
    names = origin.get("classes") or class_names(int(origin.get("num_classes", 0)))
    content = {
        "model": origin.get("name"),
        "weights": origin.get("weights"),
        "num_classes": origin.get("num_classes"),
        "preprocessing": origin.get("preprocessing"),
        "classes": None if names is None else list(names),
        "quantization": student.spec.to_dict(),
        "metrics": None if metrics is None else dict(metrics),
    }
    return {
        f"fat.{key}": value if isinstance(value, str) else json.dumps(value)
        for key, value in content.items()
        if value is not None
    }


def _summary(differences: list[LayerDifference]) -> dict[str, Any]:
    worst = max(differences, key=lambda entry: (entry.steps, entry.differing))
    told = {"layer": worst.layer, "share": worst.differing, "steps": max(worst.steps, 1)}
    return {
        "compared": len(differences),
        "images": LAYER_IMAGES,
        "differing": sum(entry.differing > 0.0 for entry in differences),
        "worst": told if worst.differing else None,
    }
