"""One training step of a network changes every parameter, for all grids and parametrizations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fat
from fat import InitSpec, QuantSpec, Student, TrainSpec
from fat.quant.quantizers import ActivationQuantizer
from fat.quant.thresholds import LARGEST_FACTOR
from fat.training.losses import rmse
from fat.training.module import DistillModule

CUT = InitSpec("percentile", 98.0)
"""Leaves values outside most grids; without them the shift has no gradient."""


@torch.no_grad()
def shifts_inside(student: Student, images: Tensor) -> set[str]:
    """Return the names of shifts without effect: those of grids that hold all values."""
    found: set[str] = set()

    def note(quantizer: ActivationQuantizer, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        scale, zero_point = quantizer.thresholds()
        q = (inputs[0] / scale).round() + zero_point
        if bool(((q >= quantizer.grid.qmin) & (q <= quantizer.grid.qmax)).all()):
            key = quantizer.layer.replace(".", "_")
            found.add(f"network.activation_quantizers.{key}.thresholds.shift")

    handles = [q.register_forward_hook(note) for q in student.activation_quantizers()]
    student.network(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("thresholds", ["fat", "lsq", "tqt", "frozen"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_one_step_changes_every_parameter(
    tiny: nn.Module, images: Tensor, granularity: str, scheme: str, thresholds: str
) -> None:
    """For all bit-widths, with both weight options and both kinds of steps."""
    for bits in range(2, 9):
        options: dict[str, Any] = {
            "bits": bits,
            "weights": ("scale", "adaround")[bits % 2],
            # At 2 and 3 bits coarser steps would round whole layers to 0.
            "power_of_two": bits > 3 and bits % 3 == 0,
        }
        spec = QuantSpec(
            granularity=granularity,  # type: ignore[arg-type]
            scheme=scheme,  # type: ignore[arg-type]
            thresholds=thresholds,  # type: ignore[arg-type]
            alpha_range=(0.5, 1.3),  # room above 1, so that factors can move both ways
            activation_init=CUT,
            **options,
        )
        student = fat.prepare(tiny, images[:2], spec)
        fat.calibrate(student, images)
        kinds = {quantizer.grid.kind for quantizer in student.activation_quantizers()}
        assert kinds == {"symmetric_unsigned", "symmetric" if scheme == "symmetric" else "affine"}
        wanted = {"factor", "bias"} | ({"alpha"} if thresholds != "frozen" else set())
        if "alpha" in wanted and scheme == "asymmetric":
            wanted.add("shift")
        assert {name.rsplit(".", 1)[1] for name, _ in student.named_parameters()} == wanted

        inside = shifts_inside(student, images)
        optimizer = DistillModule(student, TrainSpec()).configure_optimizers()
        before = {name: value.detach().clone() for name, value in student.named_parameters()}
        loss = rmse(student.float_logits(images), student(images))
        loss.backward()
        assert loss.isfinite()
        optimizer.step()
        student.project()
        assert rmse(student.float_logits(images), student(images)).isfinite()
        still = set()
        for name, value in student.named_parameters():
            assert value.grad is not None, name
            assert value.grad.isfinite().all(), name
            assert value.isfinite().all(), name
            assert value.abs().max() <= LARGEST_FACTOR, name
            if torch.equal(value, before[name]):
                assert not value.grad.any(), name
                still.add(name)
        assert still == inside & before.keys(), options
