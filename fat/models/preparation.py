"""From a float network to a student ready to be calibrated: the visible list of passes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fat.graph.passes.batch_norm_folding import fold_batch_norms
from fat.graph.passes.equalization import EqualizeReport, equalize
from fat.graph.passes.quantizer_insertion import insert_quantizers
from fat.graph.tracing.capture import trace
from fat.models.student import PrepareReport, Student
from fat.quant.config import QuantSpec
from fat.quant.metrics import logits_sqnr_db
from fat.utils.batches import Images, as_batches, split
from fat.utils.errors import FatError

__all__ = ["prepare"]

FOLD_SQNR_DB = 80.0
"""A folded network is the same function to float rounding; below this something is wrong."""


@torch.no_grad()
def prepare(network: nn.Module, example_images: Images, spec: QuantSpec | None = None) -> Student:
    """Fold, equalize and insert quantizers into a copy of the network.

    Args:
        network: Any traceable network in eval mode, [N, 3, H, W] → logits [N, classes]. Unchanged.
        example_images: One batch, or several, of real images: folding is checked on them and
            equalization takes the channels' ranges from them.
        spec: What is asked for; 8 bits, one threshold per filter, by default.

    Returns:
        The student, not yet calibrated. ``student.report`` says what each pass did, layer by layer.

    Raises:
        FatError: If a layer cannot be traced, folded or quantized (it is named), weights are not
            finite, or a pass changed what the network computes.
    """
    spec = spec or QuantSpec()
    images = [split(batch)[0] for batch in as_batches(example_images)]
    if not images:
        raise FatError("No example images came; give at least one batch [N, 3, H, W].")
    check_finite(network)

    teacher = trace(network, images[0])
    fold = fold_batch_norms(teacher)
    fold_sqnr = check_folding(network, teacher, images)

    quantized = copy.deepcopy(teacher)
    equalized: EqualizeReport | None = None
    equalize_sqnr: float | None = None
    if spec.equalize.methods:
        equalized = equalize(quantized, images, spec)
        equalize_sqnr = _shift(teacher, quantized, images)

    insert = insert_quantizers(quantized, spec, images[0][:1])
    report = PrepareReport(fold, fold_sqnr, equalized, equalize_sqnr, insert)
    return Student(quantized, teacher, spec, report)


@torch.no_grad()
def check_folding(network: nn.Module, folded: nn.Module, images: list[Tensor]) -> float:
    """Raise a FatError if folding batch norms changed what a network computes.

    Deep networks amplify float32's own rounding, some to 55 dB. One that is further off is folded
    once more in float64, where only a mistake is left.

    Args:
        network: As it was.
        folded: Its graph without batch norms.
        images: Batches [N, 3, H, W], float32.

    Returns:
        How far the logits moved, as a ratio of signal to noise in dB.
    """
    moved = _shift(network, folded, images)
    if moved > FOLD_SQNR_DB:
        return moved
    try:
        exact, doubled = copy.deepcopy(network).double(), [batch.double() for batch in images]
        graph = trace(exact, doubled[0])
        fold_batch_norms(graph)
        rounding = _shift(exact, graph, doubled) > FOLD_SQNR_DB
    except (FatError, RuntimeError):  # a network whose own code fixes a dtype
        rounding = False
    if not rounding:
        raise FatError(
            f"Folding batch norms moved the logits to {moved:.1f} dB of the original's "
            f"(expected over {FOLD_SQNR_DB:g} dB): the network does not compute the same in its "
            "graph. Please report it with the network's name."
        )
    return moved


def check_finite(network: nn.Module) -> None:
    """Raise a FatError that names the tensors of the network which hold NaN or infinity."""
    bad = [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise FatError(
            f"{len(bad)} tensor(s) of the network hold NaN or infinity: {', '.join(bad[:5])}."
        )


def _shift(reference: nn.Module, network: nn.Module, images: list[Tensor]) -> float:
    before = torch.cat([reference(batch) for batch in images])
    return logits_sqnr_db(before, torch.cat([network(batch) for batch in images]))
