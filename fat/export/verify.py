"""The file against the student and the float network: equality, accuracy, kernels, speed, size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from tqdm.auto import tqdm

from fat.evaluation.metrics import Comparison
from fat.export.base import Kernels, Runtime, Tolerance
from fat.export.lowering import Integers
from fat.graph.patterns import module_of, source
from fat.models.integer_inference import IntegerInterpreter, IntegerTensor, requantize
from fat.models.student import Student
from fat.quant.metrics import logits_sqnr_db
from fat.quant.quantized_layers import QuantLayer
from fat.quant.quantizers import ActivationQuantizer
from fat.utils.batches import Images, as_batches, split
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
"""What a float file has to reach: float32 sums in another order are at 90 dB and more."""


@dataclass(frozen=True)
class LayerDifference:
    """How one operation's integers differ when it is given the very same integers.

    Attributes:
        layer: Name of the operation; of the layer where an activation is fused into one.
        share: Share of the integers that differ, but for ties.
        steps: The largest difference, in steps.
        tied: Share of those that differ as ties may, see :class:`fat.export.base.Tolerance`.
    """

    layer: str
    share: float
    steps: int
    tied: float = 0.0

    @property
    def differing(self) -> float:
        """Share of the integers that differ at all."""
        return self.share + self.tied


@torch.no_grad()
def compare(
    student: Student, runtime: Runtime, images: Images, *, progress: str | None = None
) -> dict[str, Any]:
    """Run a file, its student and the float network on the same images.

    Args:
        student: Calibrated student.
        runtime: The opened file.
        images: Batches that nothing was trained or chosen on, labelled or not.
        progress: Text before a progress bar; ``None`` shows none.

    Returns:
        ``images`` (how many), ``float`` {top1, top5}, ``quantized`` {top1, top5, agreement,
        sqnr_db, rmse} of the file against the float network, and ``simulation`` {agreement,
        sqnr_db, largest_step} of the file against the student, the last in steps of the logits'
        grid.
    """
    step = float(student.activation_quantizers()[-1].thresholds()[0])
    file, reference, simulation = Comparison(), Comparison(), Comparison()
    count, largest = 0, 0.0
    for batch in tqdm(as_batches(images), progress, disable=progress is None, leave=False):
        pixels, labels = split(batch)
        floats, simulated = student.float_logits(pixels), student(pixels)
        logits = runtime.run(pixels)[0]
        if logits.shape != floats.shape:
            raise FatError(
                f"The file gives results of shape {list(logits.shape)} for {len(pixels)} images, "
                f"its student {list(floats.shape)}."
            )
        file.update(logits, floats, labels)
        reference.update(floats, floats, labels)
        simulation.update(logits, simulated, labels)
        largest = max(largest, float((logits - simulated).abs().max()) / step)
        count += len(pixels)
    floats_found, simulated_found = reference.compute(), simulation.compute()
    return {
        "images": count,
        "float": {key: floats_found[key] for key in ("top1", "top5")},
        "quantized": dict(file.compute()),
        "simulation": {
            "agreement": simulated_found["agreement"],
            "sqnr_db": simulated_found["sqnr_db"],
            "largest_step": round(largest, 3),
        },
    }


class _Forced(IntegerInterpreter):
    """Goes on with the file's integers after each quantizer, so that differences do not add up."""

    def __init__(
        self, network: fx.GraphModule, integers: dict[str, tuple[Integers, Tensor]], ties: float
    ) -> None:
        super().__init__(network)
        self.integers, self.ties = integers, ties
        self.found: list[LayerDifference] = []

    def quantize(self, node: fx.Node, quantizer: ActivationQuantizer, x: Any) -> IntegerTensor:
        ours = requantize(x, quantizer)
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
        share = float((off > 0).float().mean())
        self.found.append(LayerDifference(name, share, int(off.max()), tied))
        return IntegerTensor(theirs, ours.scale, ours.stored_zero)


@torch.no_grad()
def compare_layers(
    student: Student,
    tapped: Runtime,
    tensors: Sequence[Integers],
    images: Tensor,
    *,
    ties: float = 0.0,
) -> list[LayerDifference]:
    """Compare a file's integers with the student's, operation by operation.

    Each operation of the student is given the file's integers, so a difference is its own.

    Args:
        student: Calibrated student.
        tapped: The file's twin that tells its integers.
        tensors: What its results after the logits are.
        images: One batch.
        ties: See :class:`fat.export.base.Tolerance`.

    Returns:
        One entry per quantizer, in the order of the graph.
    """
    results = tapped.run(images)[1:]
    by_key = {grid.key: (grid, stored) for grid, stored in zip(tensors, results, strict=True)}
    forced = _Forced(student.network, by_key, ties)
    forced.run(images.contiguous(memory_format=torch.channels_last))
    return forced.found


def check_layers(
    differences: Iterable[LayerDifference], tolerance: Tolerance, advice: str = ""
) -> None:
    """Raise a FatError that names the operations which differ by more than is tolerated.

    Args:
        differences: What :func:`compare_layers` gave.
        tolerance: The target's.
        advice: What else to say.
    """
    wrong = [
        entry for entry in differences if entry.steps > 1 or entry.share > tolerance.off_by_one
    ]
    if not wrong:
        return
    listed = "; ".join(
        f"'{entry.layer}': {100 * entry.share:.3g} % of the integers by up to {entry.steps}"
        for entry in wrong[:5]
    )
    raise FatError(
        f"The file does not compute what the student computes in {len(wrong)} operation(s): "
        f"{listed} (tolerated: {100 * tolerance.off_by_one:g} % by 1). The file was not kept. "
        + (advice or "Please report it with the network's name.")
    )


def falls_short(figures: Mapping[str, float | None], tolerance: Tolerance) -> str:
    """How a file's logits are further from the student's than is tolerated; empty if they are not.

    Args:
        figures: ``simulation`` of :func:`compare`.
        tolerance: The target's.
    """
    for name, unit, least in (
        ("sqnr_db", "dB", tolerance.sqnr_db),
        ("agreement", "% agreement", tolerance.agreement),
    ):
        found = figures[name]
        if least is not None and (found is None or found < least):
            return f"{found} {unit} of the student's (at least {least:g} is asked for)"
    return ""


@torch.no_grad()
def most_different(student: Student, runtime: Runtime, images: Images) -> Tensor:
    """The batch in which a file's logits are furthest from its student's, [N, 3, H, W].

    A whole batch, since the last bit of a sigmoid depends on the place in a vector register.
    """
    worst, furthest = None, -1.0
    for batch in as_batches(images):
        pixels = split(batch)[0]
        apart = float((runtime.run(pixels)[0] - student(pixels)).abs().max())
        if apart > furthest:
            worst, furthest = pixels, apart
    assert worst is not None
    return worst


def check_logits(short: str) -> None:
    """Raise a FatError if logits differ and nothing explains it.

    Sigmoids, softmaxes, layer norms are real arithmetic, whose last bit differs between libraries
    and with the place in a vector register: now and then a result falls to the other side of a
    rounding, and the network makes much of such single steps. So logits may differ where single
    operations do, by what is tolerated; or where the network has such operations, and the file's
    twin, which tells all integers and is the same but for its layout in memory, is equal.

    Args:
        short: What :func:`falls_short` gave, or nothing if it is explained.
    """
    if short:
        raise FatError(
            f"The file's logits are at {short}, though every operation by itself computes the "
            "same. The file was not kept. Please report it with the network's name."
        )


@torch.no_grad()
def check_float(runtime: Runtime, student: Student, images: Tensor) -> None:
    """Raise a FatError if the float network's file, which latencies are compared with, is wrong.

    Args:
        runtime: The file, opened.
        student: Whose float network it holds.
        images: One batch.
    """
    found = logits_sqnr_db(student.float_logits(images), runtime.run(images)[0])
    if found < FLOAT_DB:
        raise FatError(
            f"The runtime computes the float network to {found:.1f} dB only (at least "
            f"{FLOAT_DB:g} is asked for), so there is nothing to compare with. The file was not "
            "kept. Please report it with the network's name."
        )


def check_kernels(kernels: Kernels, student: Student) -> None:
    """Raise a FatError that names layers which the runtime would compute in float."""
    layers = len(student.layers())
    if not kernels.float_layers and kernels.integer_layers == layers:
        return
    named = ", ".join(kernels.float_layers[:5]) or "none is named"
    raise FatError(
        f"The runtime computes {kernels.integer_layers} of {layers} layers in integers; in float: "
        f"{named}. The file was not kept. Please report it with the network's name."
    )


def latency(first: Runtime, second: Runtime, images: Tensor) -> tuple[float, float]:
    """Median milliseconds of one run of each, taken in turns so that both see the same machine.

    Args:
        first: A file.
        second: Another.
        images: What both are given.
    """
    times: tuple[list[float], list[float]] = ([], [])
    runtimes = (first, second)
    for _ in range(3):  # caches, and memory that runtimes take at first
        for runtime in runtimes:
            runtime.run(images)
    for turn in range(30):
        for which in (0, 1) if turn % 2 else (1, 0):
            started = time.perf_counter()
            runtimes[which].run(images)
            times[which].append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[0]), statistics.median(times[1])
