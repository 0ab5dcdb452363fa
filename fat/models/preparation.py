"""The list of passes that turn a float network into a student."""

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
from fat.utils.batches import Images, as_batches, to_device
from fat.utils.devices import module_device
from fat.utils.errors import FatError
from fat.utils.precision import full_precision

__all__ = ["prepare"]

FOLD_SQNR_DB = 80.0
"""Smallest plausible SQNR of a folded network, whose logits differ only by float rounding."""


@torch.no_grad()
def prepare(network: nn.Module, example_images: Images, spec: QuantSpec | None = None) -> Student:
    """Fold batch norms, equalize, and insert quantizers into a copy of the network.

    Args:
        network: Any traceable network in eval mode, [N, 3, H, W] → logits [N, classes]. It does not
            change.
        example_images: One or several batches of real images, on which folding is checked and
            equalization measures the ranges of channels. They are moved to the network's device.
        spec: Quantization options; by default 8 bits and one threshold per filter.

    Returns:
        The student on the network's device, not yet calibrated. ``student.report`` lists what each
        pass did by layer.

    Raises:
        FatError: If a layer cannot be traced, folded or quantized (the message names it), weights
            are not finite, or a pass changed the network's function.
    """
    spec = spec or QuantSpec()
    device = module_device(network)
    images = [to_device(batch, device)[0] for batch in as_batches(example_images)]
    if not images:
        raise FatError("There are no example images. Give at least one batch [N, 3, H, W].")
    check_finite(network)

    with full_precision(device):
        teacher = trace(network, images[0])
        fold = fold_batch_norms(teacher)
        fold_sqnr = check_folding(network, teacher, images)

        quantized = copy.deepcopy(teacher)
        equalized: EqualizeReport | None = None
        equalize_sqnr: float | None = None
        if spec.equalize.methods:
            equalized = equalize(quantized, images, spec)
            equalize_sqnr = _sqnr_db(teacher, quantized, images)

        insert = insert_quantizers(quantized, spec, images[0][:1])
    report = PrepareReport(fold, fold_sqnr, equalized, equalize_sqnr, insert)
    return Student(quantized, teacher, spec, report).to(device)


@torch.no_grad()
def check_folding(network: nn.Module, folded: nn.Module, images: list[Tensor]) -> float:
    """Raise a FatError if folding batch norms changed the network's function.

    Deep networks amplify the rounding of float32, some to 55 dB. If the difference is larger than
    expected, folding is checked again in float64, where only an error would remain.

    Args:
        network: The network with batch norms.
        folded: Its graph without batch norms.
        images: Batches [N, 3, H, W], float32.

    Returns:
        SQNR of the folded network's logits against the original's, dB.
    """
    sqnr = _sqnr_db(network, folded, images)
    if sqnr > FOLD_SQNR_DB:
        return sqnr
    try:
        exact, doubled = copy.deepcopy(network).double(), [batch.double() for batch in images]
        graph = trace(exact, doubled[0])
        fold_batch_norms(graph)
        only_rounding = _sqnr_db(exact, graph, doubled) > FOLD_SQNR_DB
    except (FatError, RuntimeError):  # a network whose code requires float32
        only_rounding = False
    if not only_rounding:
        raise FatError(
            "The network and its graph with batch norms folded do not compute the same: the SQNR "
            f"of the logits is {sqnr:.1f} dB, but more than {FOLD_SQNR_DB:g} dB is expected. "
            "Please report it with the network's name."
        )
    return sqnr


def check_finite(network: nn.Module) -> None:
    """Raise a FatError that names the network's tensors with NaN or infinity."""
    bad = [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise FatError(
            f"{len(bad)} tensor(s) of the network hold NaN or infinity: {', '.join(bad[:5])}."
        )


def _sqnr_db(reference: nn.Module, network: nn.Module, images: list[Tensor]) -> float:
    before = torch.cat([reference(batch) for batch in images])
    return logits_sqnr_db(before, torch.cat([network(batch) for batch in images]))
