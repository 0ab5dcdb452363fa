"""Every grid and every way to train it, through a whole network: one step moves everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fat
from fat import InitSpec, QuantSpec, TrainSpec
from fat.losses import rmse
from fat.module import DistillModule
from fat.quant.thresholds import LARGEST_FACTOR

# Some values outside each grid: else the shift of a lower threshold has no gradient.
CUT = InitSpec("percentile", 98.0)


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("granularity", ["scalar", "vector"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_one_step_moves_every_parameter(
    tiny: nn.Module, images: Tensor, bits: int, granularity: str, scheme: str
) -> None:
    # Both ways to train weights, and steps of both kinds, meet each parametrization at some bits.
    for index, thresholds in enumerate(("fat", "lsq", "tqt", "frozen")):
        options: dict[str, Any] = {
            "thresholds": thresholds,
            "weights": ("pointwise", "rounding")[(bits + index) % 2],
            "power_of_two": (bits + index) % 3 == 0,
            "alpha_range": (0.5, 1.3),
        }
        spec = QuantSpec(
            bits=bits, granularity=granularity, scheme=scheme, activation_init=CUT, **options  # type: ignore[arg-type]
        )
        student = fat.prepare(tiny, images[:2], spec)
        fat.calibrate(student, images)
        kinds = {quantizer.grid.kind for quantizer in student.activation_quantizers()}
        assert kinds == {"unsigned", "signed" if scheme == "symmetric" else "asymmetric"}
        names = {name.rsplit(".", 1)[1] for name, _ in student.named_parameters()}
        wanted = {"factor", "bias"} | ({"alpha"} if thresholds != "frozen" else set())
        wanted |= {"shift"} if "alpha" in wanted and scheme == "asymmetric" else set()
        assert names == wanted

        optimizer = DistillModule(student, TrainSpec()).configure_optimizers()
        before = {name: value.detach().clone() for name, value in student.named_parameters()}
        loss = rmse(student.float_logits(images), student(images))
        loss.backward()
        assert loss.isfinite()
        optimizer.step()
        student.project()
        for name, value in student.named_parameters():
            assert value.grad is not None, name
            assert value.grad.isfinite().all(), name
            assert value.isfinite().all(), name
            assert (value != before[name]).any(), f"{name} did not move with {options}"
            assert value.abs().max() <= LARGEST_FACTOR, name
        assert rmse(student.float_logits(images), student(images)).isfinite()
