"""Export a student to a file and verify it: lower, convert, compare, keep."""

from __future__ import annotations

import copy
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
from fat.export.lowering import contiguous_copy, lower
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
"""Number of images on which every operation is compared separately."""
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
    """Export a student to ONNX and verify the file in ONNX Runtime.

    Args:
        student: Calibrated student, on any device.
        path: The file to write.
        images: Held-out batches to compare on; see :func:`export`.
        opset: ONNX opset, 18 to 23; from 21 on 4-bit weights are stored as int4.
        metrics: Metrics to store in the file's metadata.
        beside_float: See :func:`export`.

    Returns:
        See :func:`export`.

    Raises:
        FatError: See :func:`export`; also if the opset is not supported.
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
    """Export a student to a file and verify that the file computes the same.

    The file is run in the target's runtime. The integers of every operation are compared with the
    student's, then the logits, and all layers must run as integer kernels. A file that fails is
    deleted, and an earlier file of the same name is kept.

    Args:
        student: Calibrated student, on any device.
        path: The file to write.
        target: Export target, such as :class:`fat.export.onnx.Onnx`.
        images: Held-out batches, with or without labels, on any device. If ``None``, random images
            are used, and accuracies are ``None``.
        metrics: Metrics to store in the file's metadata.
        progress: Label of a progress bar; ``None`` shows none.
        beside_float: Also export the float network temporarily to compare latency and size. If
            false, ``latency_ms`` and ``size_mb`` are ``None``, and the export is a quarter faster.

    Returns:
        ``file``, ``runtime``, ``on`` ("images" or "noise"), the results of
        :func:`fat.export.verify.compare`, ``layers`` {compared, images, differing, worst},
        ``kernels`` {operators, integer_operators, integer_layers, float_layers}, ``latency_ms``
        {float, quantized, ratio, threads, batch}, ``size_mb`` {float, quantized, ratio} of the two
        files, and ``seconds``.

    Raises:
        FatError: If the student is not calibrated, the format lacks an operator, the file cannot be
            written, or it does not compute the same as the student; the layer is named.
    """
    started = time.perf_counter()
    target.check()
    path = Path(path)
    if path.is_dir():
        raise FatError(f"{path} is a folder; give the name of a file, such as student.onnx.")
    if student.device.type != "cpu":  # the runtimes run on the CPU; the caller's student stays
        student = copy.deepcopy(student).to("cpu")
    check_writable(path.parent)
    held_out = None if images is None else as_batches(images)
    example = _example(student, held_out)
    lowered = lower(student, example, target.style)
    metadata = _metadata(student, metrics)
    program = Program(lowered.network, example, lowered.tensors, lowered.weight_bits, metadata)

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        shipped, with_integers, floats = (
            Path(folder) / f"{name}{target.suffix}" for name in ("shipped", "integers", "float")
        )
        target.write(program, shipped)
        runtime = target.open(shipped)
        kernels = runtime.kernels()
        check_kernels(kernels, student)

        target.write_with_integers(program, shipped, with_integers)
        twin = target.open(with_integers)
        differences = _compare_layers(_first(held_out, example), student, twin, program, target)
        test_images = [example] if held_out is None else held_out
        comparison = compare(student, runtime, test_images, progress=progress)
        shortfall = falls_short(comparison["simulation"], target.tolerance)
        if shortfall:
            worst = most_different(student, runtime, test_images)
            differences = _compare_layers(worst, student, twin, program, target)
            explained = any(entry.differing for entry in differences) or (
                float_operations(student.network)
                and not falls_short(compare(student, twin, [worst])["simulation"], target.tolerance)
            )
            check_logits("" if explained else shortfall)

        speed = size = None
        if beside_float:
            target.write(Program(contiguous_copy(student.teacher), example), floats)
            float_runtime = target.open(floats)
            check_float(float_runtime, student, example[:1])
            milliseconds = latency(float_runtime, runtime, example[:1])
            speed = _ratio(*milliseconds) | {"threads": torch.get_num_threads(), "batch": 1}
            megabytes = [1e-6 * file.stat().st_size for file in (floats, shipped)]
            size = _ratio(megabytes[0], megabytes[1], digits=4)
        shipped.replace(path)

    return {
        "file": path.name,
        "runtime": runtime.name,
        "on": "noise" if held_out is None else "images",
        **comparison,
        "layers": _summary(differences),
        "kernels": asdict(kernels),
        "latency_ms": speed,
        "size_mb": size,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _compare_layers(
    images: Tensor, student: Student, twin: Runtime, program: Program, target: ExportBackend
) -> list[LayerDifference]:
    """Compare every operation; raise a FatError if one differs by more than the tolerance."""
    tolerance = target.tolerance
    differences = compare_layers(student, twin, program.tensors, images, ties=tolerance.ties)
    check_layers(differences, tolerance, target.mismatch_hint())
    return differences


def _example(student: Student, images: Images | None) -> Tensor:
    """Return a batch of at least two images of the network's input size."""
    if images is not None:
        first = split(next(iter(images)))[0].cpu()
        return first if len(first) > 1 else first.repeat(2, 1, 1, 1)
    preprocessing = student.origin.get("preprocessing")
    if preprocessing is None:
        raise FatError(
            "The input size of the student is unknown: pass held-out images, as in "
            "fat.export_onnx(student, 'student.onnx', images)."
        )
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NOISE_IMAGES, 3, *preprocessing["size"], generator=generator)


def _first(images: Images | None, example: Tensor) -> Tensor:
    """Return the images on which single operations are compared."""
    if images is None:
        return example[:LAYER_IMAGES]
    rows = itertools.chain.from_iterable(split(batch)[0] for batch in images)
    return torch.stack(list(itertools.islice(rows, LAYER_IMAGES))).cpu()


def _metadata(student: Student, metrics: Mapping[str, Any] | None) -> dict[str, str]:
    """Return what a user of the file needs to preprocess images and read its outputs."""
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


def _ratio(reference: float, quantized: float, digits: int = 3) -> dict[str, Any]:
    return {
        "float": round(reference, 3),
        "quantized": round(quantized, 3),
        "ratio": round(quantized / reference, digits),
    }


def _summary(differences: list[LayerDifference]) -> dict[str, Any]:
    worst = max(differences, key=lambda entry: (entry.steps, entry.differing))
    described = {"layer": worst.layer, "share": worst.differing, "steps": max(worst.steps, 1)}
    return {
        "compared": len(differences),
        "images": LAYER_IMAGES,
        "differing": sum(entry.differing > 0.0 for entry in differences),
        "worst": described if worst.differing else None,
    }
