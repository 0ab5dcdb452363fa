"""Calibration: the initial thresholds of all quantizers, from a few images."""

from __future__ import annotations

import logging

import torch

from fat.models.student import Student
from fat.utils import distributed
from fat.utils.batches import Images, as_batches, to_device
from fat.utils.errors import FatError
from fat.utils.precision import full_precision

__all__ = ["calibrate"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def calibrate(student: Student, images: Images) -> None:
    """Set every threshold from the activations of the float student, and reset trained factors.

    Thresholds of weights are computed from the weights. Only running statistics of the images are
    kept, so that memory use does not depend on their number.

    Args:
        student: A student from :func:`fat.prepare`.
        images: One batch [N, 3, H, W], or any iterable of batches, labeled or not; about 100
            images are enough. They are moved to the student's device. With several processes, each
            passes its own images and all get the same thresholds.

    Raises:
        FatError: If there is no image, or a layer's values are not finite. The student then keeps
            its earlier thresholds.
    """
    device = student.device
    quantizers = student.activation_quantizers()
    layers = student.layers()
    weights_enabled = [layer.weight_quantizer.enabled for layer in layers]
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
        with full_precision(device):
            for batch in as_batches(images):
                pixels = to_device(batch, device)[0]
                student.network(pixels.contiguous(memory_format=torch.channels_last))
                seen += len(pixels)
        if not int(distributed.all_sum(torch.tensor(seen))):
            raise FatError("There are no calibration images. Give at least one batch [N, 3, H, W].")
        for quantizer in quantizers:
            quantizer.stop_observing(keep=True)
        done = True
    finally:
        for layer, enabled in zip(layers, weights_enabled, strict=True):
            layer.weight_quantizer.enabled = enabled
        for quantizer in quantizers:
            quantizer.stop_observing(keep=False)
        if not done:
            for thresholds, state in zip(student.thresholds(), before, strict=True):
                thresholds.load_state_dict(state)
    widened = {layer.layer: count for layer in layers if (count := layer.calibrate())}
    if widened:
        logger.info(
            "Widened the thresholds of %d filter(s) with vanishing weights in %d layers, so that "
            "their bias fits int32.",
            sum(widened.values()),
            len(widened),
        )
        logger.debug("Widened: %s", widened)
    student.mark_calibrated()
