"""Compare an exported file with its student and the float network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from tqdm.auto import tqdm

from fat.evaluation.metrics import Comparison
from fat.export.base import Kernels, Runtime, Tolerance
from fat.export.lowering import StoredGrid
from fat.graph.patterns import module_of, source
from fat.models.integer_inference import IntegerInterpreter, IntegerTensor
from fat.models.student import Student
from fat.quant.metrics import logits_sqnr_db
from fat.quant.quantized_layers import QuantLayer
from fat.quant.quantizers import ActivationQuantizer
from fat.utils.batches import Images, as_batches, to_device
from fat.utils.errors import FatError

__all__ = [
    "LayerDifference",
    "check_float",
    "check_kernels",
    "check_layers",
    "check_logits",
    "compare",
    "compare_layers",
    "falls_short",
    "latency",
    "most_different",
]

FLOAT_DB = 60.0
"""Least SQNR of a float file, dB; float32 sums in another order have 90 dB and more."""


@dataclass(frozen=True)
class LayerDifference:
    """Difference between the outputs of one operation for the same integer inputs.

    Attributes:
        layer: Name of the operation; of the layer if an activation is fused into one.
        fraction: Fraction of the integers that differ, without ties.
        steps: Largest difference, in steps.
        tied: Fraction of the integers that differ as ties, see
            :class:`fat.export.base.Tolerance`.
    """

    layer: str
    fraction: float
    steps: int
    tied: float = 0.0

    @property
    def differing(self) -> float:
        """Fraction of the integers that differ, ties included."""
        return self.fraction + self.tied


@torch.no_grad()
def compare(
    student: Student, runtime: Runtime, images: Images, *, progress: str | None = None
) -> dict[str, Any]:
    """Compare a file with its student and the float network on the same images.

    Args:
        student: Calibrated student on the CPU.
        runtime: The opened file.
        images: Held-out batches, with or without labels.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        ``images`` (their number), ``float`` {top1, top5}, ``quantized`` {top1, top5, agreement,
        sqnr_db, rmse} of the file against the float network, and ``simulation`` {agreement,
        sqnr_db, largest_step} of the file against the student, the last in steps of the logits'
        grid.

    Raises:
        FatError: If the file's logits have another shape than the student's.
    """
    step = float(student.activation_quantizers()[-1].thresholds()[0])
    file, reference, simulation = Comparison(), Comparison(), Comparison()
    count, largest = 0, 0.0
    with student.cached_integers():
        for batch in tqdm(as_batches(images), progress, disable=progress is None, leave=False):
            pixels, labels = to_device(batch, student.device)
            floats, simulated = student.float_logits(pixels), student(pixels)
            logits = runtime.run(pixels)[0]
            if logits.shape != floats.shape:
                raise FatError(
                    f"The file returns logits {list(logits.shape)} for {len(pixels)} images, its "
                    f"student {list(floats.shape)}."
                )
            file.update(logits, floats, labels)
            reference.update(floats, floats, labels)
            simulation.update(logits, simulated, labels)
            largest = max(largest, float((logits - simulated).abs().max()) / step)
            count += len(pixels)
    float_metrics, simulated_metrics = reference.compute(), simulation.compute()
    return {
        "images": count,
        "float": {key: float_metrics[key] for key in ("top1", "top5")},
        "quantized": dict(file.compute()),
        "simulation": {
            "agreement": simulated_metrics["agreement"],
            "sqnr_db": simulated_metrics["sqnr_db"],
            "largest_step": round(largest, 3),
        },
    }


class _LayerComparison(IntegerInterpreter):
    """Runs the student on the file's integers after each quantizer, so errors do not accumulate."""

    def __init__(
        self, network: fx.GraphModule, integers: dict[str, tuple[StoredGrid, Tensor]], ties: float
    ) -> None:
        super().__init__(network)
        self.integers, self.ties = integers, ties
        self.differences: list[LayerDifference] = []

    def quantize(self, node: fx.Node, quantizer: ActivationQuantizer, x: Any) -> IntegerTensor:
        ours = super().quantize(node, quantizer, x)
        grid, stored = self.integers[str(node.target)]
        theirs = stored.to(torch.float32) - grid.zero_point
        if theirs.shape != ours.values.shape:
            raise FatError(
                f"The file's integers of '{quantizer.layer}' have shape {list(theirs.shape)}, the "
                f"student's {list(ours.values.shape)}."
            )
        off = (theirs - ours.values).abs()
        before, tied = source(node), 0.0
        if self.ties and isinstance(x, Tensor):
            middle = (x / ours.scale - (theirs + ours.values) / 2).abs()
            is_tie = (off == 1) & (middle <= self.ties)
            off[is_tie] = 0
            tied = float(is_tie.float().mean())
        producer = None if before is None else module_of(self.module, before)  # type: ignore[arg-type]
        name = producer.layer if isinstance(producer, QuantLayer) else quantizer.layer
        fraction = float((off > 0).float().mean())
        self.differences.append(LayerDifference(name, fraction, int(off.max()), tied))
        return replace(ours, values=theirs)


@torch.no_grad()
def compare_layers(
    student: Student,
    with_integers: Runtime,
    tensors: Sequence[StoredGrid],
    images: Tensor,
    *,
    ties: float = 0.0,
) -> list[LayerDifference]:
    """Compare a file's integers with the student's, operation by operation.

    Each operation of the student gets the file's integers as inputs, so that every difference is
    attributed to the operation that caused it.

    Args:
        student: Calibrated student.
        with_integers: File that returns the integers of every quantizer after the logits.
        tensors: Grids of these results.
        images: One batch.
        ties: See :class:`fat.export.base.Tolerance`.

    Returns:
        One entry per quantizer, in the order of the graph.

    Raises:
        FatError: If the integers of an operation have another shape than the student's.
    """
    results = with_integers.run(images)[1:]
    by_key = {grid.key: (grid, stored) for grid, stored in zip(tensors, results, strict=True)}
    comparison = _LayerComparison(student.network, by_key, ties)
    comparison.run(images.contiguous(memory_format=torch.channels_last))
    return comparison.differences


def check_layers(
    differences: Iterable[LayerDifference], tolerance: Tolerance, hint: str = ""
) -> None:
    """Raise a FatError that names the operations that differ by more than the tolerance.

    Args:
        differences: Result of :func:`compare_layers`.
        tolerance: Tolerance of the target.
        hint: Advice for the message.
    """
    wrong = [
        entry for entry in differences if entry.steps > 1 or entry.fraction > tolerance.off_by_one
    ]
    if not wrong:
        return
    listed = "; ".join(
        f"'{entry.layer}': {100 * entry.fraction:.3g} % of the integers by up to {entry.steps}"
        for entry in wrong[:5]
    )
    raise FatError(
        f"The file differs from the student in {len(wrong)} operation(s): {listed} (tolerance: "
        f"{100 * tolerance.off_by_one:g} % by 1). The file was not kept. "
        + (hint or "Please report it with the name of the network.")
    )


def falls_short(metrics: Mapping[str, float | None], tolerance: Tolerance) -> str:
    """Describe why logits differ by more than the tolerance; return "" if they do not.

    Args:
        metrics: ``simulation`` of :func:`compare`.
        tolerance: Tolerance of the target.
    """
    for name, text, least in (
        ("sqnr_db", "an SQNR of {} dB against", tolerance.sqnr_db),
        ("agreement", "{} % agreement with", tolerance.agreement),
    ):
        found = metrics[name]
        if least is not None and (found is None or found < least):
            return f"{text.format(found)} the student's (required: at least {least:g})"
    return ""


@torch.no_grad()
def most_different(student: Student, runtime: Runtime, images: Images) -> Tensor:
    """Return the batch with the largest difference between the logits of a file and its student.

    Whole batches are compared, as the last bit of a sigmoid depends on the position in a vector
    register.

    Args:
        student: Calibrated student.
        runtime: The opened file.
        images: Batches, with or without labels.

    Returns:
        Images [N, 3, H, W].
    """
    worst, largest = None, -1.0
    with student.cached_integers():
        for batch in as_batches(images):
            pixels = to_device(batch, student.device)[0]
            difference = float((runtime.run(pixels)[0] - student(pixels)).abs().max())
            if difference > largest:
                worst, largest = pixels, difference
    assert worst is not None
    return worst


def check_logits(shortfall: str) -> None:
    """Raise a FatError if logits differ without an explanation.

    Sigmoids, softmaxes and layer norms are computed in float. Their last bit differs between
    libraries and with the position in a vector register, so now and then a value is rounded to the
    next integer, and networks amplify such single steps. Logits may therefore differ if single
    operations differ within the tolerance; or if the network has such operations and the file that
    also returns the integers, which differs in memory layout alone, has equal logits.

    Args:
        shortfall: Result of :func:`falls_short`, or "" if it is explained.
    """
    if shortfall:
        raise FatError(
            f"The file's logits have {shortfall}, although each operation by itself computes the "
            "same. The file was not kept. Please report it with the name of the network."
        )


@torch.no_grad()
def check_float(runtime: Runtime, student: Student, images: Tensor) -> None:
    """Raise a FatError if the float file, the reference for latencies, is wrong.

    Args:
        runtime: The opened file.
        student: Student of the float network.
        images: One batch.
    """
    found = logits_sqnr_db(student.float_logits(images), runtime.run(images)[0])
    if found < FLOAT_DB:
        raise FatError(
            f"The runtime computes the float network with an SQNR of {found:.1f} dB only "
            f"(required: at least {FLOAT_DB:g}), so latencies cannot be compared. The file was not "
            "kept. Please report it with the name of the network."
        )


def check_kernels(kernels: Kernels, student: Student) -> None:
    """Raise a FatError that names the layers that the runtime computes in float."""
    layers = len(student.layers())
    if not kernels.float_layers and kernels.integer_layers == layers:
        return
    named = ", ".join(kernels.float_layers[:5]) or "none is named"
    raise FatError(
        f"The runtime computes {kernels.integer_layers} of {layers} layers in integers; in float: "
        f"{named}. The file was not kept. Please report it with the name of the network."
    )


def latency(first: Runtime, second: Runtime, images: Tensor) -> tuple[float, float]:
    """Measure the median latency of two files in alternation, under the same machine load.

    Args:
        first: A file.
        second: Another.
        images: Input of both.

    Returns:
        Milliseconds per run of each.
    """
    times: tuple[list[float], list[float]] = ([], [])
    runtimes = (first, second)
    for _ in range(3):  # warm up caches and allocations
        for runtime in runtimes:
            runtime.run(images)
    for turn in range(30):
        for index in (0, 1) if turn % 2 else (1, 0):
            started = time.perf_counter()
            runtimes[index].run(images)
            times[index].append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[0]), statistics.median(times[1])
