from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from fat.training.trainer import fused, ignore_warnings, trainer_options_with_defaults


@pytest.mark.parametrize(
    ("device", "given", "accelerator", "devices"),
    [
        ("cpu", {}, "cpu", 1),
        ("cuda:0", {}, "cuda", [0]),
        ("cuda:1", {}, "cuda", [1]),
        ("cuda", {}, "cuda", [0]),
        ("mps", {}, "mps", 1),
        ("cuda:1", {"accelerator": "gpu"}, "gpu", [1]),
        ("cuda:1", {"accelerator": "gpu", "devices": 4}, "gpu", 4),
        ("cuda:1", {"accelerator": "cpu"}, "cpu", 1),
        ("cpu", {"accelerator": "gpu"}, "gpu", 1),
    ],
)
def test_the_trainer_runs_where_the_student_is_unless_told_otherwise(
    device: str, given: dict[str, Any], accelerator: str, devices: Any
) -> None:
    options = trainer_options_with_defaults(given, torch.device(device), max_epochs=2)
    assert (options["accelerator"], options["devices"]) == (accelerator, devices)
    assert (options["max_epochs"], options["logger"]) == (2, False)


@pytest.mark.parametrize(
    ("device", "clip", "expected"),
    [("cuda:0", None, True), ("cuda:0", 1.0, None), ("cpu", None, None), ("mps", None, None)],
)
def test_adam_is_one_kernel_on_cuda(device: str, clip: float | None, expected: Any) -> None:
    class Trainer:
        gradient_clip_val = clip

    class Module:
        _trainer = Trainer()

    module: Any = Module()
    assert fused(module, torch.device(device)) is expected
    module._trainer = None
    assert fused(module, torch.device("cuda")) is True


def test_advice_against_full_precision_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    # A run in the same process may have set Lightning's level.
    lightning = "pytorch_lightning.utilities.rank_zero"
    with caplog.at_level(logging.INFO, lightning), ignore_warnings("expected .*"):
        rank_zero_info("you should set `torch.set_float32_matmul_precision('medium' | 'high')`")
        rank_zero_info("something else")
        warnings.warn("expected here", stacklevel=1)
    assert caplog.messages == ["something else"]
    with caplog.at_level(logging.INFO, lightning):
        rank_zero_info("set_float32_matmul_precision")
    assert caplog.messages[-1] == "set_float32_matmul_precision"
