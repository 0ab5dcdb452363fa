"""Callbacks by themselves: the best state, the guard against NaN, the log, the time left."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn

import fat
from fat import FatError, QuantSpec, Student, TrainSpec
from fat.callbacks import AlphaHistory, KeepBest, NanGuard, Progress, student_of
from fat.module import DistillModule


@pytest.fixture
def student(tiny: nn.Module, images: Tensor) -> Student:
    student = fat.prepare(tiny, images, QuantSpec(scheme="asymmetric"))
    fat.calibrate(student, images)
    return student


def fill(student: Student, value: float) -> None:
    with torch.no_grad():
        for thresholds in student.thresholds():
            thresholds.alpha.fill_(value)


def alphas(student: Student) -> set[float]:
    return {round(float(a), 4) for t in student.thresholds() for a in t.alpha.detach().flatten()}


def judged(keep: KeepBest, module: DistillModule, step: int, loss: float) -> None:
    trainer: Any = SimpleNamespace(
        callback_metrics={"val/loss": torch.tensor(loss)}, global_step=step
    )
    keep.on_validation_end(trainer, module)


def test_keep_best_puts_the_smallest_loss_back(student: Student) -> None:
    keep, module = KeepBest(), DistillModule(student, TrainSpec())
    for step, (loss, alpha) in enumerate([(3.0, 1.0), (1.0, 0.9), (2.0, 0.8), (1.0, 0.7)]):
        fill(student, alpha)
        judged(keep, module, 10 * step, loss)
    judged(keep, module, 99, float("nan"))
    assert (keep.calibrated_loss, keep.best_loss, keep.best_step) == (3.0, 1.0, 10)
    keep.restore(module)
    assert alphas(student) == {0.9}


def test_keep_best_before_any_validation_changes_nothing(student: Student) -> None:
    fill(student, 0.8)
    KeepBest().restore(DistillModule(student, TrainSpec()))
    assert alphas(student) == {0.8}


def test_keep_best_survives_a_checkpoint(student: Student) -> None:
    keep, module = KeepBest(), DistillModule(student, TrainSpec())
    fill(student, 0.75)
    judged(keep, module, 4, 1.5)
    again = KeepBest()
    again.load_state_dict(keep.state_dict())
    fill(student, 1.0)
    judged(again, module, 8, 2.0)
    again.restore(module)
    assert alphas(student) == {0.75}
    assert (again.calibrated_loss, again.best_loss, again.best_step) == (1.5, 1.5, 4)


def test_nan_guard_restores_and_gives_up_after_its_patience(student: Student) -> None:
    guard, module = NanGuard(patience=3), DistillModule(student, TrainSpec())
    optimizer = torch.optim.Adam(student.parameters(), lr=0.0)
    trainer: Any = SimpleNamespace(optimizers=[optimizer], global_step=0)

    def step(value: float) -> None:
        trainer.global_step += 1
        fill(student, value)
        guard.on_train_batch_end(trainer, module, None, None, 0)

    fill(student, 0.9)
    guard.on_train_batch_start(trainer, module, None, 0)
    for _ in range(2):
        step(float("nan"))
        assert alphas(student) == {0.9}
    step(0.8)  # a good step: the count starts anew
    assert alphas(student) == {0.8}
    for _ in range(2):
        step(float("inf"))
    with pytest.raises(FatError, match="3 steps in a row gave NaN"):
        step(float("nan"))
    assert guard.restored == 5
    assert all(bool(p.isfinite().all()) for p in student.parameters())


def test_nan_guard_restores_the_optimizer_too(student: Student, images: Tensor) -> None:
    guard, module = NanGuard(every=1), DistillModule(student, TrainSpec())
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    trainer: Any = SimpleNamespace(optimizers=[optimizer], global_step=1)

    def step(batch: Tensor) -> None:
        optimizer.zero_grad()
        (student(batch) - student.float_logits(batch)).square().mean().backward()
        optimizer.step()
        guard.on_train_batch_end(trainer, module, None, batch, 0)

    guard.on_train_batch_start(trainer, module, None, 0)
    step(images)
    moments = {i: s["exp_avg"].clone() for i, s in enumerate(optimizer.state.values())}
    step(images * float("nan"))
    assert guard.restored == 1
    assert all(
        torch.equal(state["exp_avg"], moments[i])
        for i, state in enumerate(optimizer.state.values())
    )
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_alpha_history_logs_mean_smallest_and_largest(student: Student) -> None:
    logged: list[tuple[dict[str, float], int]] = []

    class Logger(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            logged.append((metrics, step))

    weight = student.layers()[0].weight_quantizer.thresholds
    quantizer = student.activation_quantizers()[0].thresholds
    with torch.no_grad():
        weight.alpha.copy_(torch.linspace(0.6, 1.0, 8))
        quantizer.alpha.fill_(7.0)  # acts as 1.0
        quantizer.shift.fill_(0.25)
    trainer: Any = SimpleNamespace(loggers=[Logger()], global_step=12)
    AlphaHistory().on_validation_end(trainer, DistillModule(student, TrainSpec()))
    ((figures, step),) = logged
    assert step == 12
    assert figures["alpha/stem.weight"] == pytest.approx(0.8)
    assert figures["alpha/stem.weight.min"] == pytest.approx(0.6)
    assert figures["alpha/stem.weight.max"] == pytest.approx(1.0)
    assert figures["alpha/input.activation"] == 1.0
    assert figures["shift/input.activation"] == 0.25
    assert "alpha/input.activation.min" not in figures
    assert {f"alpha/{layer}.{kind}" for layer, kind, _ in student.quantizers()} <= figures.keys()


def test_progress_tells_the_time_left(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 110.0])
    monkeypatch.setattr("fat.callbacks.time.monotonic", lambda: next(clock))
    trainer: Any = SimpleNamespace(
        global_step=0, training=True, estimated_stepping_batches=100.0, loggers=[],
        progress_bar_metrics={"train/loss": 0.5},
    )  # fmt: skip
    progress, module = Progress(), DistillModule(student, TrainSpec())
    assert "left" not in progress.get_metrics(trainer, module)
    trainer.global_step = 2  # two seconds a step, 98 steps left
    metrics = progress.get_metrics(trainer, module)
    assert (metrics["left"], metrics["train/loss"]) == ("3:16", 0.5)
    trainer.global_step = 100
    assert progress.get_metrics(trainer, module)["left"] == "0:00"


def test_a_foreign_module_is_not_a_students() -> None:
    with pytest.raises(AssertionError):
        student_of(pl.LightningModule())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_goes_on_where_it_was(tiny: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """Two epochs, a checkpoint and two more give what four give."""
    batches = list(images.split(4))

    def run(epochs: int, resume: str | None = None) -> tuple[Student, fat.FitResult]:
        student = fat.prepare(tiny, images, QuantSpec(bits=4))
        fat.calibrate(student, images)
        saver = ModelCheckpoint(tmp_path / str(epochs), save_last=True, save_top_k=0)
        result = fat.fit(
            student, batches, validation=batches, epochs=epochs, schedule="constant", lr=1e-3,
            bias_correction=False, callbacks=[saver], progress=False, resume=resume,
            trainer_options={"enable_checkpointing": True, "default_root_dir": tmp_path},
        )  # fmt: skip
        return student, result

    whole, expected = run(4)
    run(2)
    resumed, result = run(4, str(tmp_path / "2" / "last.ckpt"))
    assert result.steps == expected.steps == 16
    assert result.best_step == expected.best_step > 0
    assert result.best_loss == expected.best_loss
    assert result.calibrated_loss == expected.calibrated_loss
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    stored = torch.load(tmp_path / "2" / "last.ckpt", weights_only=True)  # plain containers only
    assert QuantSpec.from_dict(stored["fat"]["spec"]) == QuantSpec(bits=4)
