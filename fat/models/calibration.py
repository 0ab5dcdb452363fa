"""Give every quantizer its first thresholds from a few images."""

from __future__ import annotations

import logging

import torch

from fat.models.student import Student
from fat.utils import distributed
from fat.utils.batches import Images, as_batches, split
from fat.utils.errors import FatError

__all__ = ["calibrate"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def calibrate(student: Student, images: Images) -> None:
    """Run the images through the float student and set every threshold; trained factors restart.

    Weights take their thresholds from themselves. Nothing is kept of the images but running
    statistics, so memory does not grow with their number; a short last batch is welcome.

    Args:
        student: From :func:`fat.prepare`.
        images: One batch [N, 3, H, W], or any iterable of batches, labelled or not. About 100
            images are enough. Of several processes each gives its own; all get the same thresholds.

    Raises:
        FatError: If there is no image, or a layer's values are not finite. The student then keeps
            the thresholds it had.
    """
    quantizers = student.activation_quantizers()
    layers = student.layers()
    weights_on = [layer.weight_quantizer.enabled for layer in layers]
    before = [
        {name: value.clone() for name, value in thresholds.state_dict().items()}
        for thresholds in student.thresholds()
    ]
    seen = 0
    done = False
    for quantizer in quantizers:
        quantizer.start_observing()
    for layer in layers:
        layer.weight_quantizer.enabled = False
    try:
        for batch in as_batches(images):
            pixels = split(batch)[0]
            student.network(pixels.contiguous(memory_format=torch.channels_last))
            seen += len(pixels)
        if not int(distributed.all_sum(torch.tensor(seen))):
            raise FatError("No images came to calibrate on; give at least one batch [N, 3, H, W].")
        for quantizer in quantizers:
            quantizer.stop_observing(keep=True)
        done = True
    finally:
        for layer, on in zip(layers, weights_on, strict=True):
            layer.weight_quantizer.enabled = on
        for quantizer in quantizers:
            quantizer.stop_observing(keep=False)
        if not done:
            for thresholds, state in zip(student.thresholds(), before, strict=True):
                thresholds.load_state_dict(state)
    widened = {layer.layer: count for layer in layers if (count := layer.calibrate())}
    if widened:
        logger.info(
            "%d filter(s) with vanishing weights in %d layers got wider thresholds, so that their "
            "bias fits int32.",
            sum(widened.values()),
            len(widened),
        )
        logger.debug("Widened: %s", widened)
    student.is_calibrated.fill_(True)
