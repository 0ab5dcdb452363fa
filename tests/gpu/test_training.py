"""Training on a pretended GPU: checks that are read later, other devices, and fine-tuning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import fat
from fat import FatError, Student
from fat.models.float_model import load_float_network
from fat.training.config import FinetuneSpec
from fat.training.finetuning import finetune
from tests.gpu.pretended import PretendedGpu


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.norm(self.conv(x)).relu()).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.fixture
def images() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 3, 12, 12) for _ in range(30)]


def student_on(device: str, images: list[Tensor]) -> Student:
    torch.manual_seed(1)
    student = fat.prepare(Net().eval(), images[:2]).to(device)
    fat.calibrate(student, images[:4])
    return student


def places(module: nn.Module) -> set[str]:
    return {str(tensor.device) for tensor in (*module.parameters(), *module.buffers())}


def test_steps_with_nan_are_undone(gpu: PretendedGpu, images: list[Tensor]) -> None:
    student = student_on("cuda", images)
    spoiled = [*images[:12], images[12] * float("nan"), *images[13:]]
    losses: list[float] = []

    class Losses(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            losses.append(float(trainer.callback_metrics["val/loss"]))

    result = fat.fit(
        student,
        spoiled,
        validation=images[:2],
        epochs=2,
        bias_correction=False,
        progress=False,
        callbacks=[Losses()],
    )
    # The check after step 20, in each epoch of 30 steps, is read after step 30.
    assert (result.steps, result.restored) == (60, 2)
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert all(bool(parameter.isfinite().all()) for parameter in student.parameters())
    assert places(student) == {"cuda:0"}


@pytest.mark.parametrize(("own", "given"), [("cuda", "cpu"), ("cpu", "gpu")])
def test_a_student_returns_from_the_device_of_the_trainers_options(
    gpu: PretendedGpu, images: list[Tensor], own: str, given: str, caplog: pytest.LogCaptureFixture
) -> None:
    student = student_on(own, images)
    with caplog.at_level("INFO"):
        result = fat.fit(
            student, images[:8], epochs=1, progress=False, trainer_options={"accelerator": given}
        )
    assert result.steps == 7
    there = {"cpu": "cpu", "gpu": "cuda:0"}[given]
    assert f"Training on {there} (trainer_options); the student returns to {own}" in caplog.text
    assert places(student) == {{"cuda": "cuda:0"}.get(own, own)}


def test_a_label_that_is_no_class_is_found_without_waiting_in_each_step(
    gpu: PretendedGpu, images: list[Tensor]
) -> None:
    def train(label: int) -> None:
        batches = [(batch, torch.tensor([0, 1, -1, label])) for batch in images[:4]]
        fat.fit(student, batches, epochs=1, progress=False, label_weight=0.5, bias_correction=False)

    student = student_on("cuda", images)
    train(4)
    with pytest.raises(FatError, match="A label is 5, but the network has the classes 0 to 4"):
        train(5)
    assert places(student) == {"cuda:0"}


@pytest.mark.parametrize("label", [-1, 1, 5])
def test_a_network_is_fine_tuned_where_it_is(gpu: PretendedGpu, label: int) -> None:
    source = load_float_network("test_efficientnet", weights="random", seed=0)
    source.network.cuda()
    batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, label])) for _ in range(2)]
    options: Any = {"classes": ("a", "b", "c"), "progress": False}
    if label == 1:
        tuned, result = finetune(source, batches, batches[:1], FinetuneSpec(epochs=1), **options)
        assert (result.epochs, places(tuned.network)) == (1, {"cuda:0"})
        return
    with pytest.raises(FatError, match=f"has the label {label}; allowed are 0 to 2"):
        finetune(source, batches, batches[:1], FinetuneSpec(epochs=1), **options)
