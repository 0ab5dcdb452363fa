"""Closed-form bias correction: remove the mean quantization error of every channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fat.models.student import Student
from fat.quant.quantized_layers import QuantLayer
from fat.quant.quantizers import ActivationQuantizer
from fat.utils.batches import Images, first_images
from fat.utils.errors import FatError
from fat.utils.precision import full_precision

__all__ = ["IMAGES", "correct_biases"]

IMAGES = 50
"""Number of images for the channel means; activations of all of them are held in memory."""


@torch.no_grad()
def correct_biases(student: Student, images: Images, count: int = IMAGES) -> None:
    """Add to every bias the mean of (float output − quantized output) of its channel, in place.

    Layers are corrected in the order of the graph; the quantized input of each comes from the
    corrected layers before it. The biases stay on the int32 grid.

    Args:
        student: Calibrated student.
        images: Batches, with or without labels; they are moved to the student's device.
        count: Maximum number of images. Memory is proportional to it: the float and quantized
            activations of the current layer are held for all images.

    Raises:
        FatError: If the student is not calibrated, or there are no images.

    Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2, in its empirical form.
    """
    student.check_calibrated()
    batches = [
        pixels.to(student.device).contiguous(memory_format=torch.channels_last)
        for pixels in first_images(images, count)
    ]
    if not batches:
        raise FatError("There are no images for bias correction; pass at least one batch.")
    with full_precision(student.device):
        _Lockstep(student.network).run(batches)


class _Lockstep:
    """Runs a graph node by node for all batches, in float and quantized."""

    def __init__(self, network: fx.GraphModule) -> None:
        self._network = network
        self._last_reader: dict[fx.Node, fx.Node] = {}
        for node in network.graph.nodes:
            for source in node.all_input_nodes:
                self._last_reader[source] = node

    def run(self, batches: list[Tensor]) -> None:
        exact: dict[fx.Node, list[Any]] = {}
        quantized: dict[fx.Node, list[Any]] = {}
        for node in self._network.graph.nodes:
            if node.op == "output":
                return
            if node.op == "placeholder":
                exact[node] = quantized[node] = batches
                continue
            module = self._network.get_submodule(node.target) if node.op == "call_module" else None
            if isinstance(module, QuantLayer):
                exact[node], quantized[node] = _correct(
                    module, exact[node.args[0]], quantized[node.args[0]]
                )
            elif isinstance(module, ActivationQuantizer):
                exact[node] = [module.activate(x) for x in exact[node.args[0]]]
                quantized[node] = [module(x) for x in quantized[node.args[0]]]
            else:
                interpreter = fx.Interpreter(self._network)
                for values in (exact, quantized):
                    values[node] = [
                        _call(interpreter, node, values, index) for index in range(len(batches))
                    ]
            for source in node.all_input_nodes:
                if self._last_reader[source] is node:
                    del exact[source], quantized[source]


def _call(
    interpreter: fx.Interpreter, node: fx.Node, values: dict[fx.Node, list[Any]], index: int
) -> Any:
    interpreter.env = {source: values[source][index] for source in node.all_input_nodes}
    return interpreter.run_node(node)


def _correct(
    layer: QuantLayer, exact: list[Tensor], quantized: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Correct the bias of a layer and return its float and quantized outputs."""
    was_enabled = layer.weight_quantizer.enabled
    layer.weight_quantizer.enabled = False
    wanted = [layer(x) for x in exact]
    layer.weight_quantizer.enabled = was_enabled
    got = [layer(x) for x in quantized]
    if layer.bias is None:
        return wanted, got
    channels = 1 if wanted[0].dim() == 4 else wanted[0].dim() - 1
    others = [axis for axis in range(wanted[0].dim()) if axis != channels]
    total = sum(x.numel() // x.shape[channels] for x in wanted)
    error = sum((a.double() - b.double()).sum(others) for a, b in zip(wanted, got, strict=True))
    assert isinstance(error, Tensor)
    used = layer.quantized()[1]  # the outputs were computed with the quantized bias
    assert used is not None
    layer.bias.copy_(used.double() + error / total)
    return wanted, [layer(x) for x in quantized]
