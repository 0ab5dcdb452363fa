"""Training: gradients reach everything, the best student stays, and nothing breaks it."""

from __future__ import annotations

import itertools
import math
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import fat
from fat import FatError, QuantSpec, Student
from fat.quant.quantized_layers import QuantConv2d, QuantLayer
from fat.training.fitting import FitResult

QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def prepared(network: nn.Module, images: Tensor, **options: Any) -> Student:
    student = fat.prepare(network, images, QuantSpec(**options))
    fat.calibrate(student, images)
    return student


@torch.no_grad()
def loss_of(student: Student, batches: list[Tensor]) -> float:
    """Validation loss by hand: each batch's RMSE, weighted by its images, in float64."""
    total = sum(
        len(x) * float((student.float_logits(x) - student(x)).double().square().mean().sqrt())
        for x in batches
    )
    return total / sum(len(x) for x in batches)


def trained(student: Student) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in student.named_parameters()}


class AtStep(pl.Callback):
    """Calls a function with the trainer and the student after the given step."""

    def __init__(self, step: int, call: Any) -> None:
        self.step, self.call = step, call

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.call(trainer, pl_module.student)


# --- gradients ----------------------------------------------------------------


def values_outside(student: Student, images: Tensor) -> set[str]:
    """Names of activations of which some value rounds to outside its grid."""
    found: set[str] = set()

    def note(quantizer: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        scale, zero = quantizer.thresholds()
        q = (inputs[0] / scale).round() + zero
        if bool(((q < quantizer.grid.qmin) | (q > quantizer.grid.qmax)).any()):
            found.add(quantizer.layer)

    handles = [q.register_forward_hook(note) for q in student.activation_quantizers()]
    with torch.no_grad():
        student.network(images)
    for handle in handles:
        handle.remove()
    return found


def reach(layer: QuantLayer, x: Tensor, grad: Tensor) -> Tensor:
    """What a weight's gradient sums, without signs: 0 where no image's data meets the weight."""
    x, grad = x.detach().abs().double(), grad.abs().double()
    if not isinstance(layer, QuantConv2d):
        return grad.T @ x
    return torch.nn.grad.conv2d_weight(
        x, layer.weight.shape, grad, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def reaches(student: Student, images: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def note(layer: QuantLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name, x = f"network.{layer.layer}.factor", inputs[0]
        output.register_hook(lambda grad: found.update({name: reach(layer, x, grad)}))

    handles = [layer.register_forward_hook(note) for layer in student.layers()]
    gradients(student, images)
    for handle in handles:
        handle.remove()
    return found


def gradients(student: Student, images: Tensor) -> dict[str, Tensor]:
    student.zero_grad()
    error = student.float_logits(images) - student(images)
    error.square().mean().sqrt().backward()
    result = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    return result


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_every_parameter_gets_a_gradient_and_moves(
    tiny: nn.Module, images: Tensor, scheme: str, granularity: str
) -> None:
    # Room above 1, so that a factor may go either way.
    student = prepared(
        tiny, images, scheme=scheme, granularity=granularity, alpha_range=(0.5, 1.3), bits=6
    )
    gradient = gradients(student, images)
    before = trained(student)
    outside = values_outside(student, images)
    shifts = {
        f"network.activation_quantizers.{q.layer.replace('.', '_')}.thresholds.shift": q.layer
        for q in student.activation_quantizers()
        if q.grid.kind == "affine"
    }
    assert bool(shifts) is (scheme == "asymmetric")
    reached = reaches(student, images)
    without = 0
    for name, values in gradient.items():
        if name in reached:
            # Behind a pixel or a channel that is 0 in all images no weight can matter.
            assert torch.equal(values != 0, reached[name] != 0), name
            without += int((values == 0).sum())
        elif name in shifts and shifts[name] not in outside:
            # ∂out/∂z is 0 inside the grid, and nothing else depends on the shift.
            assert not values.any()
        else:
            assert bool((values != 0).all()), name
    assert without < 0.02 * sum(values.numel() for values in reached.values())

    after: dict[str, Tensor] = {}
    fat.fit(
        student,
        images,
        epochs=1,
        bias_correction=False,
        callbacks=[AtStep(1, lambda _, s: after.update(trained(s)))],
        **QUIET,
    )

    for name, values in gradient.items():
        moved = after[name] != before[name]
        assert torch.equal(moved, values != 0), name
        down = torch.sign(before[name] - after[name])
        assert torch.equal(down, torch.sign(values)), name  # a step of Adam from rest follows it


def test_factors_at_the_upper_edge_move_down_and_do_not_leave(
    tiny: nn.Module, images: Tensor
) -> None:
    student = prepared(tiny, images, weights="frozen", bias="frozen")
    names = [name for name in gradients(student, images) if name.endswith("alpha")]
    gradient = gradients(student, images)
    seen: list[dict[str, Tensor]] = []
    fat.fit(
        student,
        images,
        epochs=5,
        bias_correction=False,
        schedule="constant",
        callbacks=[AtStep(step, lambda _, s: seen.append(trained(s))) for step in range(1, 6)],
        **QUIET,
    )
    assert len(seen) == 5
    for name in names:
        down = gradient[name] > 0
        assert bool((seen[0][name][down] < 1).all())
        assert bool((seen[0][name][~down] == 1).all())  # stopped at the edge, not beyond
        assert all(bool(((s[name] >= 0.5) & (s[name] <= 1.0)).all()) for s in seen)
    # One that was stopped at the edge still gets a gradient and may come back.
    stopped = {name: seen[0][name] == 1 for name in names}
    assert sum(int((seen[-1][name][stopped[name]] < 1).sum()) for name in names) > 0


# --- what comes out -----------------------------------------------------------


def test_training_lowers_the_loss_in_the_result(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    student = prepared(tiny, images, bits=4)
    calibrated = loss_of(student, batches)
    result = fat.fit(
        student,
        batches,
        validation=batches,
        epochs=10,
        bias_correction=False,
        lr=2e-3,
        weight_scale_lr=1e-3,
        bias_lr=1e-3,
        **QUIET,
    )
    assert result.calibrated_loss == pytest.approx(calibrated, rel=1e-4)
    assert result.best_loss == pytest.approx(loss_of(student, batches), rel=1e-4)
    assert result.best_loss < 0.85 * calibrated
    assert (result.steps, result.restored, result.interrupted) == (40, 0, False)
    assert 0 < result.best_step <= 40
    assert not student.training


@pytest.mark.parametrize("lr", [5e-3, 0.5])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_never_worse_than_calibrated(
    tiny: nn.Module, images: Tensor, batches: list[Tensor], lr: float, bias_correction: bool
) -> None:
    student = prepared(tiny, images, bits=6)
    held = [torch.randn(5, 3, 16, 16)]
    calibrated = loss_of(student, held)
    result = fat.fit(
        student,
        batches,
        validation=held,
        epochs=2,
        lr=lr,
        bias_lr=lr,
        weight_scale_lr=lr,
        bias_correction=bias_correction,
        **QUIET,
    )
    assert loss_of(student, held) <= calibrated * (1 + 1e-6)
    assert result.best_loss <= result.calibrated_loss
    assert result.best_loss == pytest.approx(loss_of(student, held), rel=1e-4)


def test_a_training_that_only_harms_leaves_the_calibrated_student(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    student = prepared(tiny, images, weights="frozen", bias="frozen")
    expected = student(images)
    result = fat.fit(
        student,
        [x * 0.01 for x in batches],
        validation=batches,
        epochs=2,
        lr=0.4,
        schedule="constant",
        bias_correction=False,
        **QUIET,
    )
    assert result.best_step == 0
    assert result.best_loss == result.calibrated_loss
    assert torch.equal(student(images), expected)


def test_same_seed_same_bits(tiny: nn.Module, images: Tensor, batches: list[Tensor]) -> None:
    runs, results = [], []
    for seed, disturb in ((3, 0), (3, 7)):
        torch.manual_seed(disturb)
        student = prepared(tiny, images, bits=4)
        loader = torch.utils.data.DataLoader(images, batch_size=4, shuffle=True)
        results.append(fat.fit(student, loader, validation=batches, epochs=3, seed=seed, **QUIET))
        runs.append(student.state_dict())
    assert results[0].best_step > 0
    assert results[0] == results[1]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_the_seed_reaches_the_users_own_randomness(tiny: nn.Module, images: Tensor) -> None:
    def run(seed: int) -> Tensor:
        student = prepared(tiny, images, bits=4)
        loader = torch.utils.data.DataLoader(images, batch_size=4, shuffle=True)
        fat.fit(student, loader, validation=[images], epochs=2, seed=seed, **QUIET)
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    assert not torch.equal(run(0), run(1))


def test_no_epoch_only_corrects(tiny: nn.Module, images: Tensor, batches: list[Tensor]) -> None:
    student = prepared(tiny, images, bits=4)
    before = trained(student)
    result = fat.fit(student, batches, epochs=0, bias_correction=False, **QUIET)
    assert (result.steps, result.best_step, result.bias_correction) == (0, 0, "off")
    assert result.best_loss == result.calibrated_loss
    assert all(torch.equal(value, before[name]) for name, value in trained(student).items())


def test_a_trained_student_can_be_trained_again(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    student = prepared(tiny, images, bits=4)
    first = fat.fit(student, batches, validation=batches, epochs=3, **QUIET)
    second = fat.fit(student, batches, validation=batches, epochs=3, **QUIET)
    assert second.calibrated_loss == pytest.approx(first.best_loss, rel=1e-5)
    assert second.best_loss <= first.best_loss


# --- bias correction ----------------------------------------------------------


def test_bias_correction_is_kept_when_it_helps(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    student = prepared(tiny, images, bits=4)
    before = trained(student)
    result = fat.fit(student, batches, validation=batches, epochs=0, **QUIET)
    assert result.bias_correction == "kept"
    assert result.best_loss < result.calibrated_loss
    assert result.best_loss == pytest.approx(loss_of(student, batches), rel=1e-4)
    changed = {
        name for name, value in trained(student).items() if not torch.equal(value, before[name])
    }
    assert changed == {name for name in before if name.endswith(".bias")}


@pytest.mark.parametrize("bias", ["trained", "frozen"])
@pytest.mark.parametrize("harm", [0.3, float("nan")])
def test_bias_correction_is_undone_when_it_harms(
    tiny: nn.Module,
    images: Tensor,
    batches: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    bias: str,
    harm: float,
) -> None:
    def spoil(student: Student, _: Any) -> None:
        for layer in student.layers():
            layer.bias.data += harm

    monkeypatch.setattr(sys.modules["fat.training.fitting"], "correct_biases", spoil)
    student = prepared(tiny, images, bias=bias)
    expected = student(images)
    result = fat.fit(student, batches, validation=batches, epochs=0, **QUIET)
    assert result.bias_correction == "undone"
    assert result.best_loss == result.calibrated_loss
    assert torch.equal(student(images), expected)


# --- what comes in ------------------------------------------------------------


class Unsized:
    """Can be iterated repeatedly, has no length, and counts the passes."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.batches)


def fits_like(
    tiny: nn.Module, images: Tensor, training: Any, validation: Any
) -> tuple[FitResult, dict[str, Tensor]]:
    student = prepared(tiny, images, bits=4)
    return fat.fit(student, training, validation=validation, epochs=1, **QUIET), trained(student)


FORMS = {
    "list": lambda x: x,
    "tuple": tuple,
    "unsized": Unsized,
    "labelled": lambda x: [(batch, torch.arange(len(batch))) for batch in x],
    "loader": lambda x: torch.utils.data.DataLoader(torch.cat(x), batch_size=4),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_batches_trains_the_same(
    tiny: nn.Module, images: Tensor, batches: list[Tensor], form: str
) -> None:
    expected, parameters = fits_like(tiny, images, batches, batches)
    result, got = fits_like(tiny, images, FORMS[form](batches), FORMS[form](batches))
    assert result == expected
    assert result.steps == 4
    assert all(torch.equal(value, parameters[name]) for name, value in got.items())


@pytest.mark.parametrize(("count", "steps"), [(1, 1), (2, 1), (4, 3), (10, 9), (16, 15)])
def test_some_batches_are_set_aside_without_validation(
    tiny: nn.Module, images: Tensor, count: int, steps: int
) -> None:
    student = prepared(tiny, images)
    parts = list(images.split(16 // count)[:count])
    held = parts[0] if count == 1 else parts[min(count, 10) - 1]
    calibrated = loss_of(student, [held])
    result = fat.fit(student, parts, epochs=1, bias_correction=False, **QUIET)
    assert result.steps == steps
    assert result.calibrated_loss == pytest.approx(calibrated, rel=1e-4)


def test_one_tensor_is_one_batch(tiny: nn.Module, images: Tensor) -> None:
    student = prepared(tiny, images, bits=4)
    result = fat.fit(student, images, epochs=3, **QUIET)
    assert result.steps == 3
    assert result.best_loss == pytest.approx(loss_of(student, [images]), rel=1e-4)
    result = fat.fit(student, images, validation=images[:5], epochs=1, **QUIET)
    assert result.best_loss == pytest.approx(loss_of(student, [images[:5]]), rel=1e-4)


def test_samplers_get_the_epoch(tiny: nn.Module, images: Tensor) -> None:
    class Sampler(torch.utils.data.Sampler[int]):
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

        def __len__(self) -> int:
            return 16

        def __iter__(self) -> Iterator[int]:
            return iter(range(16))

    sampler = Sampler()
    loader = torch.utils.data.DataLoader(images, batch_size=4, sampler=sampler)
    fat.fit(prepared(tiny, images), loader, validation=[images], epochs=3, **QUIET)
    assert sorted(set(sampler.epochs)) == [0, 1, 2]


@pytest.mark.parametrize("validations", [2, 3, 50])
def test_validations_within_an_epoch(
    tiny: nn.Module, images: Tensor, batches: list[Tensor], validations: int
) -> None:
    held = Unsized(batches[:1])
    student = prepared(tiny, images)
    fat.fit(
        student,
        batches,
        validation=held,
        epochs=2,
        validations=validations,
        bias_correction=False,
        **QUIET,
    )
    # Once to count them, once before training.
    interval = max(int(len(batches) / validations), 1)
    assert held.passes - 2 == 2 * (len(batches) // interval)


def refused(images: Tensor) -> dict[str, tuple[Any, Any, str]]:
    batches = list(images.split(4))
    return {
        "generator": ((x for x in batches), None, "training images come from an iterator"),
        "iterator": (iter(batches), batches, "training images come from an iterator"),
        "no images": ([], None, "There are no training images"),
        "none of unknown number": (Unsized([]), None, "There are no training images"),
        "validation from a generator": (batches, (x for x in batches), "validation images come"),
        "no validation images": (batches, [], "There are no validation images"),
        "no batch": (batches, [images[0]], r"\[3, 16, 16\]"),
        "NaN to validate on": (batches, [images * float("nan")], "validation images is nan"),
    }


@pytest.mark.parametrize("case", list(refused(torch.zeros(16, 3, 16, 16))))
def test_images_that_cannot_be_trained_on(tiny: nn.Module, images: Tensor, case: str) -> None:
    student = prepared(tiny, images)
    expected = student(images)
    training, validation, message = refused(images)[case]
    with pytest.raises(FatError, match=message):
        fat.fit(student, training, validation=validation, epochs=1, **QUIET)
    assert torch.equal(student(images), expected)


def test_an_uncalibrated_student_is_rejected(tiny: nn.Module, images: Tensor) -> None:
    with pytest.raises(FatError, match="not calibrated"):
        fat.fit(fat.prepare(tiny, images), images, **QUIET)


def test_nothing_to_train_is_rejected(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    student = prepared(tiny, images, thresholds="frozen", bias="frozen", weights="frozen")
    with pytest.raises(FatError, match="Nothing to train"):
        fat.fit(student, batches, **QUIET)
    assert fat.fit(student, batches, epochs=0, **QUIET).steps == 0


def test_an_unknown_option_is_rejected(tiny: nn.Module, images: Tensor) -> None:
    with pytest.raises(FatError, match="loss"):
        fat.fit(prepared(tiny, images), images, loss="l1", **QUIET)


# --- NaN, interruption, threads -----------------------------------------------


def test_a_batch_with_nan_is_undone_and_training_continues(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    poison = torch.full((4, 3, 16, 16), float("nan"))
    student = prepared(tiny, images, bits=4)
    states: list[dict[str, Tensor]] = []
    rates: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            states.append(trained(pl_module.student))
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    result = fat.fit(
        student,
        [*batches[:2], poison, *batches[2:]],
        validation=batches,
        epochs=2,
        lr=0.01,
        bias_correction=False,
        callbacks=[Watch()],
        **QUIET,
    )

    assert (result.steps, result.restored) == (10, 2)
    assert all(bool(v.isfinite().all()) for state in states for v in state.values())
    # Restored to a state that was seen before, and moving again afterwards.
    seen = [trained(prepared(tiny, images, bits=4)), *states]
    for step in (2, 7):
        assert any(all(torch.equal(states[step][n], s[n]) for n in s) for s in seen[: step + 1])
        assert any(not torch.equal(states[step][n], states[step + 1][n]) for n in states[step])
    # The restored optimizer goes on at the schedule's rate, not at that of the saved state.
    schedule = [0.01 * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    for step in set(range(10)) - {2, 7}:
        assert rates[step] == pytest.approx(schedule[step])
    assert result.best_step > 0
    assert result.best_loss < result.calibrated_loss


def test_nothing_but_nan_is_an_error_and_leaves_a_finite_student(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    poison = [torch.full((4, 3, 16, 16), float("nan"))] * 8
    student = prepared(tiny, images)
    expected = student(images)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(FatError, match="4 steps in a row gave NaN"):
        fat.fit(
            student,
            poison,
            validation=batches,
            epochs=1,
            nan_patience=4,
            bias_correction=False,
            **QUIET,
        )
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.equal(student(images), expected)


def test_nan_in_the_correction_is_undone(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    poison = torch.full((4, 3, 16, 16), float("nan"))
    student = prepared(tiny, images)
    result = fat.fit(student, [poison, *batches], validation=batches, epochs=1, **QUIET)
    assert (result.bias_correction, result.restored) == ("undone", 1)
    assert student(images).isfinite().all()


def test_interrupting_keeps_the_best_student(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    student = prepared(tiny, images, bits=4)
    handler = signal.getsignal(signal.SIGINT)
    result = fat.fit(
        student, batches, validation=batches, epochs=50, callbacks=[AtStep(10, interrupt)], **QUIET
    )
    assert result.interrupted
    assert result.steps == 10
    assert result.best_step in (4, 8)
    assert result.best_loss < result.calibrated_loss
    assert result.best_loss == pytest.approx(loss_of(student, batches), rel=1e-4)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not student.training
    assert fat.fit(student, batches, epochs=1, **QUIET).interrupted is False


def test_interrupting_the_correction_leaves_the_calibrated_student(
    tiny: nn.Module, images: Tensor, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(student: Student, _: Any) -> None:
        student.layers()[0].bias.data += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["fat.training.fitting"], "correct_biases", half)
    student = prepared(tiny, images)
    expected = student(images)
    result = fat.fit(student, batches, validation=batches, epochs=1, **QUIET)
    assert result.interrupted
    assert result.steps == 0
    assert torch.equal(student(images), expected)


def test_interrupting_before_anything_is_known(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    class Interrupting(Unsized):
        def __iter__(self) -> Iterator[Any]:
            if self.passes:
                raise KeyboardInterrupt
            return super().__iter__()

    student = prepared(tiny, images)
    expected = student(images)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fat.fit(student, batches, validation=Interrupting(batches), **QUIET)
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.equal(student(images), expected)


def test_training_in_a_thread(tiny: nn.Module, images: Tensor, batches: list[Tensor]) -> None:
    student = prepared(tiny, images, bits=4)
    results: list[FitResult] = []
    thread = threading.Thread(
        target=lambda: results.append(
            fat.fit(student, batches, validation=batches, epochs=1, **QUIET)
        )
    )
    thread.start()
    thread.join()
    assert [result.steps for result in results] == [4]


# --- schedule and optimizer ---------------------------------------------------


@pytest.mark.parametrize(
    ("reset", "poisoned", "expected"),
    [(True, False, [1, 2, 1, 2, 1, 2, 1, 2]), (False, False, [1, 2, 3, 4, 5, 6, 7, 8])],
)
def test_a_new_cycle_clears_adams_state(
    tiny: nn.Module,
    images: Tensor,
    batches: list[Tensor],
    reset: bool,
    poisoned: bool,
    expected: list[int],
) -> None:
    counts: list[set[int]] = []
    rates: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            optimizer = trainer.optimizers[0]
            counts.append({int(state["step"]) for state in optimizer.state.values()})
            rates.append(optimizer.param_groups[0]["lr"])

    fat.fit(
        prepared(tiny, images),
        batches,
        validation=batches,
        epochs=2,
        lr=0.01,
        period=2,
        reset_optimizer=reset,
        bias_correction=False,
        callbacks=[Watch()],
        **QUIET,
    )
    assert counts == [{count} for count in expected]
    assert rates == pytest.approx([0.01, 0.005] * 4)


def test_after_a_reset_a_step_is_one_from_rest(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    # Adam's first step from rest has length lr in every coordinate; with moments it has not.
    student = prepared(tiny, images, weights="frozen", alpha_range=(0.01, 9.0))
    states = [trained(student)]

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            states.append(trained(pl_module.student))

    fat.fit(
        student,
        batches,
        validation=batches,
        epochs=1,
        lr=1e-3,
        bias_lr=1e-3,
        period=2,
        schedule="constant",
        bias_correction=False,
        callbacks=[Watch()],
        **QUIET,
    )
    steps = [
        torch.cat([(after[n] - before[n]).flatten().abs() for n in after if n.endswith("bias")])
        for before, after in itertools.pairwise(states)
    ]
    for first in (steps[0], steps[2]):
        first = first[first > 0]  # a channel that no image of the batch lets through stays
        assert len(first) > 0.9 * len(steps[0])
        torch.testing.assert_close(first, torch.full_like(first, 1e-3), rtol=2e-2, atol=1e-7)
    assert float((steps[1] - 1e-3).abs().max()) > 1e-4


@pytest.mark.parametrize("weights", ["scale", "adaround"])
def test_each_kind_of_parameter_has_its_own_rate(
    tiny: nn.Module, images: Tensor, batches: list[Tensor], weights: str
) -> None:
    student = prepared(tiny, images, weights=weights, alpha_range=(0.01, 9.0))
    before = trained(student)
    after: dict[str, Tensor] = {}
    fat.fit(
        student,
        batches,
        validation=batches,
        epochs=1,
        lr=4e-3,
        weight_scale_lr=2e-3,
        adaround_lr=5e-3,
        bias_lr=1e-3,
        bias_correction=False,
        callbacks=[AtStep(1, lambda _, s: after.update(trained(s)))],
        **QUIET,
    )
    factor = {"scale": 2e-3, "adaround": 5e-3}[weights]
    rates = {"alpha": 4e-3, "shift": 4e-3, "factor": factor, "bias": 1e-3}
    kinds = set()
    for name, value in after.items():
        kind = name.rsplit(".", 1)[1]
        kinds.add(kind)
        largest = float((value - before[name]).abs().max())
        if largest:
            assert largest == pytest.approx(rates[kind], rel=2e-2), name
    assert {"alpha", "factor", "bias"} <= kinds


def test_gradient_clipping_changes_the_course(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    norms: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            norms.append(float(torch.stack([p.grad.norm() for p in pl_module.parameters()]).norm()))

    fat.fit(
        prepared(tiny, images, bits=4),
        batches,
        validation=batches,
        epochs=1,
        gradient_clip=1e-3,
        callbacks=[Watch()],
        **QUIET,
    )
    assert len(norms) == 4
    assert norms == pytest.approx([1e-3] * 4, rel=1e-2)


def test_an_unused_gpu_is_not_recommended(
    tiny: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = prepared(tiny, images)
    cuda = "pytorch_lightning.trainer.setup.CUDAAccelerator.is_available"
    monkeypatch.setattr(cuda, lambda: True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pl.Trainer(accelerator="cpu", logger=False)
        assert "GPU available but not used" in str(caught[0].message)
        caught.clear()
        fat.fit(student, [images], epochs=1, **QUIET)
    assert not [one for one in caught if "not used" in str(one.message)]
