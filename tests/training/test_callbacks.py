"""Callbacks: best student, guard against NaN, checkpoints, history, progress bar."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn

import fat
from fat import FatError, QuantSpec, Student, TrainSpec
from fat.training.callbacks import (
    AlphaHistory,
    BestStudent,
    CSVHistory,
    NanGuard,
    PeriodicCheckpoint,
    ProgressBar,
    student_of,
)
from fat.training.module import DistillModule
from fat.utils.deferred import Deferred


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


def validated(best: BestStudent, module: DistillModule, step: int, loss: float) -> None:
    trainer: Any = SimpleNamespace(
        callback_metrics={"val/loss": torch.tensor(loss)}, global_step=step
    )
    best.on_validation_end(trainer, module)


def test_the_student_with_the_smallest_loss_is_restored(student: Student) -> None:
    best, module = BestStudent(), DistillModule(student, TrainSpec())
    for step, (loss, alpha) in enumerate([(3.0, 1.0), (1.0, 0.9), (2.0, 0.8), (1.0, 0.7)]):
        fill(student, alpha)
        validated(best, module, 10 * step, loss)
    validated(best, module, 99, float("nan"))
    assert (best.calibrated_loss, best.best_loss, best.best_step) == (3.0, 1.0, 10)
    best.restore(module)
    assert alphas(student) == {0.9}


def test_nothing_is_restored_before_a_validation(student: Student) -> None:
    fill(student, 0.8)
    BestStudent().restore(DistillModule(student, TrainSpec()))
    assert alphas(student) == {0.8}


def test_the_best_student_is_part_of_checkpoints(student: Student) -> None:
    best, module = BestStudent(), DistillModule(student, TrainSpec())
    fill(student, 0.75)
    validated(best, module, 4, 1.5)
    again = BestStudent()
    again.load_state_dict(best.state_dict())
    fill(student, 1.0)
    validated(again, module, 8, 2.0)
    again.restore(module)
    assert alphas(student) == {0.75}
    assert (again.calibrated_loss, again.best_loss, again.best_step) == (1.5, 1.5, 4)


def test_nan_guard_restores_and_fails_after_its_patience(student: Student) -> None:
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


@pytest.fixture
def elsewhere(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student that says it is not on the CPU, where each read of a tensor waits."""
    monkeypatch.setattr(Student, "device", torch.device("meta"))


@pytest.mark.usefixtures("elsewhere")
def test_nan_guard_reads_its_check_at_the_next_one(
    student: Student, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    guard, module = NanGuard(patience=2, every=5), DistillModule(student, TrainSpec())
    optimizer = torch.optim.Adam(student.parameters(), lr=0.0)
    trainer: Any = SimpleNamespace(optimizers=[optimizer], global_step=0)
    reads: list[int] = []
    read = Deferred.tensor

    def counted(deferred: Deferred) -> Tensor:
        reads.append(trainer.global_step)
        return read(deferred)

    monkeypatch.setattr(Deferred, "tensor", counted)

    def steps(count: int, value: float) -> None:
        for _ in range(count):
            trainer.global_step += 1
            fill(student, value)
            guard.on_train_batch_end(trainer, module, None, None, 0)

    fill(student, 0.9)
    guard.on_train_batch_start(trainer, module, None, 0)
    steps(5, 0.8)
    steps(5, 0.7)
    assert reads == [10]  # of the check after step 5
    steps(4, float("nan"))
    steps(1, float("nan"))  # the check after step 10 was good, that after step 15 is unread
    assert (guard.restored, reads) == (0, [10, 15])
    steps(5, float("nan"))
    assert (guard.restored, alphas(student)) == (1, {0.7})
    assert "became NaN or infinite before step 20; restored the last finite state" in caplog.text
    steps(5, float("inf"))
    with pytest.raises(FatError, match="2 checks, one every 5 steps, in a row gave NaN"):
        steps(5, float("nan"))
    assert alphas(student) == {0.7}


@pytest.mark.usefixtures("elsewhere")
def test_nan_guard_checks_before_validations_and_checkpoints(
    student: Student, tmp_path: Path
) -> None:
    guard, module = NanGuard(every=5), DistillModule(student, TrainSpec())
    trainer: Any = SimpleNamespace(
        optimizers=[torch.optim.Adam(student.parameters())],
        global_step=3,
        lightning_module=module,
        is_global_zero=False,
        save_checkpoint=lambda path: saved.append(alphas(student)),
    )
    saved: list[set[float]] = []
    guard.on_validation_start(trainer, module)  # before training: there is nothing to restore
    fill(student, 0.9)
    guard.on_train_batch_start(trainer, module, None, 0)
    fill(student, float("nan"))
    guard.on_validation_start(trainer, module)
    assert (guard.restored, alphas(student)) == (1, {0.9})
    fill(student, 0.8)
    guard.on_train_end(trainer, module)  # finite, and from now on what is restored
    fill(student, float("nan"))
    PeriodicCheckpoint(tmp_path / "last.ckpt", 0.0, guard.check)._save(trainer)
    assert (guard.restored, saved) == (2, [{0.8}])


def test_nan_guard_restores_an_optimizer_without_state(student: Student, images: Tensor) -> None:
    guard, module = NanGuard(), DistillModule(student, TrainSpec())
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    trainer: Any = SimpleNamespace(optimizers=[optimizer], global_step=1)
    before = alphas(student)
    guard.on_train_batch_start(trainer, module, None, 0)
    (student(images) * float("nan")).sum().backward()
    optimizer.step()
    guard.on_train_batch_end(trainer, module, None, None, 0)
    assert (guard.restored, alphas(student), dict(optimizer.state)) == (1, before, {})


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
    trainer: Any = SimpleNamespace(loggers=[Logger()], global_step=12, is_global_zero=True)
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


def test_the_progress_bar_shows_the_remaining_time(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 104.0, 110.0])
    monkeypatch.setattr("fat.training.callbacks.time.monotonic", lambda: next(clock))
    trainer: Any = SimpleNamespace(
        global_step=0,
        training=True,
        estimated_stepping_batches=100.0,
        loggers=[],
        progress_bar_metrics={"val/loss": 0.25},
        callback_metrics={"train/loss": torch.tensor(0.5)},
    )
    progress, module = ProgressBar(), DistillModule(student, TrainSpec())
    assert "left" not in progress.get_metrics(trainer, module)
    trainer.global_step = 2  # two seconds a step, 98 steps left
    metrics = progress.get_metrics(trainer, module)
    assert (metrics["left"], metrics["train/loss"]) == ("3:16", 0.5)
    trainer.global_step = 100
    assert progress.get_metrics(trainer, module)["left"] == "0:00"


def test_the_progress_bar_reads_the_loss_of_other_devices_once_a_second(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, refreshed = [100.0], []
    monkeypatch.setattr("fat.training.callbacks.time.monotonic", lambda: now[0])
    monkeypatch.setattr(
        "fat.training.callbacks.TQDMProgressBar.on_train_batch_end",
        lambda bar, trainer, module, outputs, batch, index: refreshed.append(index),
    )
    trainer: Any = SimpleNamespace(num_training_batches=20)
    module: Any = SimpleNamespace(device=torch.device("meta"))
    bar = ProgressBar()
    for index in range(20):
        bar.on_train_batch_end(trainer, module, None, None, index)
        now[0] += 0.25
    assert refreshed == [0, 4, 8, 12, 16, 19]
    module.device = torch.device("cpu")
    bar.on_train_batch_end(trainer, module, None, None, 3)
    assert refreshed[-1] == 3


def test_other_modules_have_no_student() -> None:
    with pytest.raises(AssertionError):
        student_of(pl.LightningModule())


def test_only_the_main_process_logs_alphas(student: Student) -> None:
    class Logger(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            raise AssertionError("another process logged")

    trainer: Any = SimpleNamespace(loggers=[Logger()], global_step=12, is_global_zero=False)
    AlphaHistory().on_validation_end(trainer, DistillModule(student, TrainSpec()))


def stepping(history: CSVHistory, step: int, **figures: float) -> Any:
    """Call the history with a trainer after a step or a validation; return the trainer."""
    logged = {name.replace("_", "/", 1): torch.tensor(value) for name, value in figures.items()}
    trainer: Any = SimpleNamespace(
        is_global_zero=True, global_step=step, callback_metrics=logged, sanity_checking=False
    )
    module: Any = None
    history.setup(trainer, module, "fit")
    if "train/loss" in logged:
        history.on_train_batch_end(trainer, module, None, None, 0)
    if "val/loss" in logged:
        history.on_validation_end(trainer, module)
    return trainer


def test_history_has_one_row_per_value_with_its_step(tmp_path: Path) -> None:
    history = CSVHistory(tmp_path / "history.csv")
    stepping(history, 0, val_loss=0.5)
    stepping(history, 1, train_loss=0.25, train_lr=1e-3)
    stepping(history, 2, train_loss=0.125, train_lr=5e-4, val_loss=0.0625, val_agreement=75.0)
    assert (tmp_path / "history.csv").read_text().splitlines() == [
        "step,name,value",
        "0,val/loss,0.5",
        "1,train/loss,0.25",
        "1,train/lr,0.00100000005",
        "2,train/loss,0.125",
        "2,train/lr,0.000500000024",
        "2,val/loss,0.0625",
        "2,val/agreement,75",
    ]


class Elsewhere:
    """A value that is not on the CPU; ``reads`` counts its reads."""

    device = torch.device("meta")
    reads = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        raise AssertionError("read one by one")


def test_history_reads_values_of_other_devices_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked: list[int] = []

    def stack(values: list[Elsewhere]) -> Tensor:
        stacked.append(len(values))
        return torch.tensor([value.value for value in values])

    monkeypatch.setattr("fat.training.callbacks.torch.stack", stack)
    history, module = CSVHistory(tmp_path / "history.csv"), DistillModule.__new__(DistillModule)
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=0)
    history.setup(trainer, module, "fit")

    def step() -> None:
        trainer.global_step += 1
        loss = Elsewhere(trainer.global_step / 4)
        trainer.callback_metrics = {"train/loss": loss, "train/lr": torch.tensor(0.5)}
        history.on_train_batch_end(trainer, module, None, None, 0)

    def lines() -> list[str]:
        return (tmp_path / "history.csv").read_text().splitlines()

    for _ in range(49):
        step()
    assert lines() == ["step,name,value"]
    step()
    assert (stacked, len(lines())) == ([50], 101)
    assert lines()[-2:] == ["50,train/loss,12.5", "50,train/lr,0.5"]
    # Nothing is missing in a file beside a checkpoint, nor after the end or an error.
    for ended in (
        lambda: history.on_save_checkpoint(trainer, module, {}),
        lambda: history.on_train_end(trainer, module),
        lambda: history.on_exception(trainer, module, KeyboardInterrupt()),
    ):
        step()
        before = len(lines())
        ended()
        assert len(lines()) == before + 2
    trainer.callback_metrics = {"val/loss": torch.tensor(2.0)}
    history.on_validation_end(trainer, module)
    assert lines()[-1] == "53,val/loss,2"


def test_history_drops_rows_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    lines = [
        "step,name,value",
        "0,val/loss,0.5",
        "1,train/loss,1",
        "2,train/loss,2",
        "2,val/loss,3",
    ]
    # A process resumed once, and was killed while it wrote a line.
    path.write_text("\n".join([*lines, "2,val/loss,3", "3,train/loss,4", "2,trai"]))
    history = CSVHistory(path)
    trainer = stepping(history, 2)
    history.on_train_start(trainer, DistillModule.__new__(DistillModule))
    assert path.read_text().splitlines() == lines
    assert path.read_text().endswith("\n")


def test_other_processes_write_no_history(tmp_path: Path) -> None:
    history, module = CSVHistory(tmp_path / "history.csv"), DistillModule.__new__(DistillModule)
    trainer: Any = SimpleNamespace(
        is_global_zero=False, global_step=1, callback_metrics={"train/loss": torch.tensor(1.0)}
    )
    history.setup(trainer, module, "fit")
    history.on_train_start(trainer, module)
    history.on_train_batch_end(trainer, module, None, None, 0)
    assert list(tmp_path.iterdir()) == []


class Saver:
    """The part of a trainer that PeriodicCheckpoint uses; its checkpoints hold their step."""

    def __init__(self, batches: int, validates_every: int) -> None:
        self.num_training_batches, self.val_check_batch = batches, validates_every
        self.global_step, self.received_sigterm, self.is_global_zero = 0, False, True
        self.world_size = 1
        self.state = SimpleNamespace(fn=TrainerFn.FITTING)
        self.saved: list[int] = []

    def save_checkpoint(self, path: Path) -> None:
        self.saved.append(self.global_step)
        Path(path).write_text(str(self.global_step))

    def steps(self, checkpoints: PeriodicCheckpoint, clock: list[float], seconds: float) -> None:
        module: Any = None
        for index in range(self.num_training_batches):
            self.global_step += 1
            clock[0] += seconds
            checkpoints.on_train_batch_end(self, module, None, None, index)  # type: ignore[arg-type]
            if (index + 1) % self.val_check_batch == 0:
                checkpoints.on_validation_end(self, module)  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("fat.training.callbacks.time.monotonic", lambda: now[0])
    return now


def test_a_checkpoint_is_saved_at_validations_and_when_due(
    tmp_path: Path, clock: list[float]
) -> None:
    trainer, path = Saver(batches=10, validates_every=10), tmp_path / "last.ckpt"
    trainer.steps(PeriodicCheckpoint(path, every=30.0), clock, seconds=10.0)
    # Every third step; the one at step 9 restarts the count, and the validation is at step 10.
    assert trainer.saved == [3, 6, 9, 10]
    assert path.read_text() == "10"
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]  # no partial file


def test_a_checkpoint_waits_for_a_validation_at_the_same_step(
    tmp_path: Path, clock: list[float]
) -> None:
    trainer = Saver(batches=8, validates_every=4)
    trainer.steps(PeriodicCheckpoint(tmp_path / "last.ckpt", every=0.0), clock, seconds=1.0)
    # Never twice at one step, and at step 4 only after its validation.
    assert trainer.saved == list(range(1, 9))


def test_no_checkpoint_is_saved_in_between_before_it_is_due(
    tmp_path: Path, clock: list[float]
) -> None:
    trainer = Saver(batches=8, validates_every=4)
    trainer.steps(PeriodicCheckpoint(tmp_path / "last.ckpt", every=1e9), clock, seconds=1.0)
    assert trainer.saved == [4, 8]


def test_sigterm_saves_a_checkpoint_at_once(tmp_path: Path, clock: list[float]) -> None:
    trainer = Saver(batches=4, validates_every=4)
    checkpoints = PeriodicCheckpoint(tmp_path / "last.ckpt", every=1e9)
    trainer.global_step, trainer.received_sigterm = 2, True
    checkpoints.on_train_batch_end(trainer, None, None, None, 1)  # type: ignore[arg-type]
    assert trainer.saved == [2]


def test_several_processes_end_together_after_a_sigterm_to_one(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanged: list[list[int]] = []
    of_others = [0, 0]

    def all_max(flags: Tensor) -> Tensor:
        exchanged.append(flags.tolist())
        return flags.maximum(torch.tensor(of_others))

    monkeypatch.setattr("fat.training.callbacks.all_max", all_max)
    trainer: Any = Saver(batches=9, validates_every=9)
    trainer.world_size = 2
    trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(_broadcast_sigterm_tensor=None))
    trainer._signal_connector = SimpleNamespace(received_sigterm=False, _sigterm_notifier_fn=None)
    module: Any = None
    checkpoints = PeriodicCheckpoint(tmp_path / "last.ckpt", every=1e9)
    checkpoints.setup(trainer, module, "fit")
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()  # no collective on the device

    def step() -> bool:
        trainer.global_step += 1
        checkpoints.on_train_batch_end(trainer, module, None, None, trainer.global_step - 1)
        ended: bool = trainer._signal_connector.received_sigterm
        return ended

    assert not step()
    trainer._signal_connector._sigterm_notifier_fn(15, None)  # Lightning must not act on it alone
    assert not trainer._signal_connector.received_sigterm
    assert step()
    assert exchanged == [[0, 0], [1, 1]]
    assert trainer.saved == [2]
    # In the process that got none.
    trainer._signal_connector.received_sigterm = False
    checkpoints, of_others = PeriodicCheckpoint(tmp_path / "last.ckpt", every=1e9), [1, 1]
    assert step()
    assert exchanged[-1] == [0, 0]
    assert trainer.saved == [2, 3]


def test_a_validation_outside_training_saves_no_checkpoint(
    tmp_path: Path, clock: list[float]
) -> None:
    trainer = Saver(batches=4, validates_every=4)
    trainer.state.fn = TrainerFn.VALIDATING  # such as that of the calibrated student
    PeriodicCheckpoint(tmp_path / "last.ckpt", every=0.0).on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert trainer.saved == []
