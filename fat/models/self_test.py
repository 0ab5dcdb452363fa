"""Check that a device computes the integers that the CPU computes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fat.models.integer_inference import (
    IntegerGrid,
    IntegerInterpreter,
    IntegerLayer,
    accumulator_bounds,
    exact_weights,
    requantize_layer,
)
from fat.models.student import Student
from fat.quant import kernels
from fat.quant.quantized_layers import QuantConv2d, QuantLayer
from fat.utils.errors import FatError
from fat.utils.precision import full_precision

__all__ = ["geometry", "self_test"]

logger = logging.getLogger(__name__)

IMAGES = 2
PIXELS = 12
"""Height and width of the random inputs, or those of the dilated kernel if it is larger."""
VALUES = 100_000
"""Number of random values that the quantizer of the input rounds."""

_passed: set[tuple[object, ...]] = set()


@torch.no_grad()
def self_test(student: Student) -> None:
    """Compare the arithmetic of the student's device with the CPU's, once per process.

    Compared bit for bit are the thresholds, integer weights and biases of all layers, the integers
    of random inputs, and the accumulators and requantized integers of random inputs, weights and
    biases for each distinct layer geometry. A student on the CPU is not tested, nor one with
    quantizers switched off, which does not compute in integers.

    Args:
        student: Calibrated student.

    Raises:
        FatError: If anything differs. Its figures would then not be those of its exported file.
    """
    device = student.device
    if device.type == "cpu" or not student.quantizer_batch.all_enabled():
        return
    geometries = {geometry(layer): layer for layer in student.layers()}
    key = (device, repr(student.spec), *sorted(geometries))
    if key in _passed:
        return
    with full_precision(device):
        twin = copy.deepcopy(student.network).cpu()
        ours = IntegerInterpreter(student.network, student.quantizer_batch, exact_bounds=True)
        theirs = IntegerInterpreter(twin)
        generator = torch.Generator().manual_seed(0)
        differences = [*_constants(ours, theirs), *_inputs(ours, theirs, generator)]
        own = dict(zip(ours.layers, theirs.layers, strict=True))
        for name, layer in geometries.items():
            mine, other = ours.layers[layer], theirs.layers[own[layer]]
            grids = (ours.grids[layer.input_quantizer], theirs.grids[other.layer.input_quantizer])
            differences += _layer(name, mine, other, grids, generator)
    if differences:
        raise FatError(
            f"The self-test on {_name(device)} failed: {'; '.join(differences[:5])}. The student's "
            "figures would not be those of its exported file. Update PyTorch and the device's "
            "driver, or use the CPU: trainer=cpu, or student.to('cpu')."
        )
    _passed.add(key)
    logger.info(
        "Self-test on %s: %d layer geometries, thresholds and input integers equal the CPU's bit "
        "for bit.",
        _name(device),
        len(geometries),
    )


def geometry(layer: QuantLayer) -> str:
    """Describe the shape of a layer's weight and how it is applied."""
    channels, *kernel = layer.weight.shape
    if not isinstance(layer, QuantConv2d):
        return f"linear layer {kernel[0]} → {channels}"
    inputs = kernel[0] * layer.groups
    size = "×".join(map(str, kernel[1:]))
    return (
        f"convolution {inputs} → {channels}, kernel {size}, stride {layer.stride}, padding "
        f"{layer.padding}, dilation {layer.dilation}, groups {layer.groups}"
    )


def _name(device: torch.device) -> str:
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_device_name(device) if device.type == "cuda" and used else str(device)


def _constants(ours: IntegerInterpreter, theirs: IntegerInterpreter) -> Iterator[str]:
    """Compare thresholds, weights and biases."""
    for (quantizer, grid), other in zip(ours.grids.items(), theirs.grids.values(), strict=True):
        if not (_same(grid.scale, other.scale) and _same(grid.zero_point, other.zero_point)):
            yield f"the thresholds of '{quantizer.layer}' differ"
    for (layer, mine), their in zip(ours.layers.items(), theirs.layers.values(), strict=True):
        weights = (torch.cat(x.weights, 1).double() for x in (mine, their))
        same = _same(*weights) and _same(mine.scale, their.scale)
        if mine.bias is not None and their.bias is not None:
            same = same and _same(mine.bias, their.bias)
        if not same:
            yield f"the integers of the weights of '{layer.layer}' differ"


def _inputs(
    ours: IntegerInterpreter, theirs: IntegerInterpreter, generator: torch.Generator
) -> Iterator[str]:
    """Compare the integers of random values on the grid of the network's input."""
    quantizer, grid = next(iter(ours.grids.items()))
    other = next(iter(theirs.grids.values()))
    span = other.scale * (other.qmax - other.qmin)
    x = torch.randn(VALUES, generator=generator) * span
    found = kernels.requantize_real(x.to(grid.scale.device), *grid.arguments)
    if not _same(found, kernels.requantize_real(x, *other.arguments)):
        yield f"the integers of '{quantizer.layer}' differ"


def _layer(
    name: str,
    ours: IntegerLayer,
    theirs: IntegerLayer,
    grids: tuple[IntegerGrid, IntegerGrid],
    generator: torch.Generator,
) -> Iterator[str]:
    """Compare accumulators and requantized integers of random integers."""
    layer, (grid, other) = theirs.layer, grids
    device, zero = grid.scale.device, int(other.zero_point.nan_to_num())
    x = torch.randint(other.qmin, other.qmax + 1, _shape(layer), generator=generator) - zero
    x = x.float().contiguous(
        memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format
    )
    qmax = layer.weight_quantizer.grid.qmax
    weight = torch.randint(-qmax, qmax + 1, layer.weight.shape, generator=generator).float()
    bias = torch.randint(-(2**28), 2**28, (len(weight),), generator=generator, dtype=torch.int32)
    (bound,) = accumulator_bounds([weight], [qmax], [other], exact=True)
    wanted = layer.compute(x.double(), weight.double(), None)  # exact in any order up to 2^53
    moved = weight.to(device)
    ours = replace(
        ours, weights=exact_weights(ours.layer, moved, grid, bound), bias=bias.to(device)
    )
    sums = ours.accumulate(x.to(device))
    found = sums.cpu().double().round()
    if not torch.equal(found, wanted):
        off = (found - wanted).abs()
        yield (
            f"{int((off > 0).sum())} of {off.numel()} accumulators of a {name} differ, by up to "
            f"{float(off.max()):g}"
        )
        return
    # A step by which the accumulators cover the output grid, which is as that of the input.
    step = other.scale * theirs.scale.mean() * wanted.abs().max() / other.qmax
    results = [
        requantize_layer(replace(one, bias=b), total, inputs, replace(inputs, scale=s))
        for one, b, total, inputs, s in (
            (ours, bias.to(device), sums, grid, step.float().to(device)),
            (theirs, bias, wanted, other, step.float()),
        )
    ]
    if not _same(*results):
        yield f"the integers after a {name} differ"


def _shape(layer: QuantLayer) -> tuple[int, ...]:
    """Return the shape of a random input."""
    if not isinstance(layer, QuantConv2d):
        return IMAGES, layer.weight.shape[1]
    sizes = (
        max(PIXELS, (size - 1) * dilation + 1)
        for size, dilation in zip(layer.weight.shape[2:], layer.dilation, strict=True)
    )
    return (IMAGES, layer.weight.shape[1] * layer.groups, *sizes)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Return True if a tensor of the device equals that of the CPU; NaN equals NaN."""
    return torch.equal(ours.cpu().nan_to_num(), theirs.nan_to_num())
