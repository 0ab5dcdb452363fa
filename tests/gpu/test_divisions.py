"""No division by a number decides a threshold or an integer.

CUDA divides by a number that it is given on the host as a product with its reciprocal, which rounds
differently from a CPU's division. Divisors have to be tensors on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fat
from fat import QuantSpec
from fat.data.transforms import EvalTransform
from fat.models.float_model import Preprocessing
from fat.quant.config import EqualizeSpec, InitSpec
from fat.quant.range_estimators import STRATEGIES
from tests.gpu.counting import source_line
from tests.gpu.pretended import CUDA, PretendedGpu, PretendedTensor

DIVISIONS = {"div", "div_", "divide", "divide_", "true_divide", "true_divide_", "floor_divide"}


@contextmanager
def divisions(gpu: PretendedGpu) -> Iterator[list[str]]:
    """Collect the lines that divide a float tensor of the device by a number."""
    found: list[str] = []

    def watch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if func._schema.name.split("::")[1] not in DIVISIONS:
            return
        dividend, divisor = args[0], args[1]
        # A 0-dim tensor of the CPU is a number for CUDA. Gradients of torch's own operations, such
        # as a mean, are float sums, which no device rounds like another.
        if dividend.is_floating_point() and not isinstance(divisor, PretendedTensor):
            line = source_line()
            if not line.startswith("backward of"):
                found.append(line)

    gpu.watchers.append(watch)
    try:
        yield found
    finally:
        gpu.watchers.remove(watch)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("divisor", [3, 3.0, torch.tensor(3.0)])
def test_divisions_by_numbers_are_found(gpu: PretendedGpu, divisor: Any, in_place: bool) -> None:
    x = torch.ones(4, device=CUDA)
    with divisions(gpu) as found:
        x.div_(divisor) if in_place else x / divisor
    assert len(found) == 1
    with divisions(gpu) as found:
        x / torch.tensor(3.0, device=CUDA)
        3.0 / x
        x * 3.0
        torch.arange(4, device=CUDA) // 2  # exact
    assert found == []


def calibrated(network: nn.Module, images: Tensor, **spec: Any) -> fat.Student:
    student = fat.prepare(copy.deepcopy(network).to(CUDA), images, QuantSpec(**spec))
    fat.calibrate(student, [images])
    return student


@pytest.mark.parametrize("name", STRATEGIES)
def test_calibration(gpu: PretendedGpu, tiny: nn.Module, images: Tensor, name: str) -> None:
    images = images[:4].to(CUDA)
    few = {"candidates": 10} if name in ("mse", "lp", "entropy") else {}
    init = InitSpec(name, **few)
    with divisions(gpu) as found:
        calibrated(tiny, images, weight_init=init, activation_init=init)
    assert found == []


@pytest.mark.parametrize("method", ["depthwise", "cross_layer", "balanced", "exact"])
def test_equalization(
    gpu: PretendedGpu, tiny: nn.Module, images: Tensor, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fat.graph.passes.balance.STEPS", 2)
    with divisions(gpu) as found:
        fat.prepare(
            copy.deepcopy(tiny).to(CUDA),
            images[:4].to(CUDA),
            QuantSpec(equalize=EqualizeSpec(method)),
        )
    assert found == []


@pytest.mark.parametrize("thresholds", ["fat", "lsq", "tqt", "frozen"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_thresholds_quantizers_and_inference(
    gpu: PretendedGpu,
    tiny: nn.Module,
    images: Tensor,
    thresholds: str,
    scheme: str,
    granularity: str,
) -> None:
    images = images[:4].to(CUDA)
    student = calibrated(
        tiny, images, thresholds=thresholds, scheme=scheme, granularity=granularity
    )
    with divisions(gpu) as found:
        logits = student(images)
        student.project()
        with torch.no_grad():
            student(images)
            with student.cached_integers():
                student(images)
        for part in student.thresholds():
            part()
            part.range()
            part.grid_range()
            part.at_edge()
            part.project()
        for layer in student.layers():
            layer.integers()
    assert logits.requires_grad or thresholds == "frozen"
    assert found == []


def test_power_of_two_steps(gpu: PretendedGpu, tiny: nn.Module, images: Tensor) -> None:
    images = images[:4].to(CUDA)
    student = calibrated(tiny, images, power_of_two=True, thresholds="tqt")
    with divisions(gpu) as found, torch.no_grad():
        student(images)
        student.project()
    assert found == []


def test_transforms(gpu: PretendedGpu) -> None:
    preprocessing = Preprocessing(
        (8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 1.0, "center"
    )
    with divisions(gpu) as found:
        EvalTransform(preprocessing).finish(torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device=CUDA))
    assert found == []
