"""The training loss: its terms, and their cost when they are disabled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fat
from fat import FatError, QuantSpec, Student, TrainSpec
from fat.quant.config import EqualizeSpec
from fat.training.config import LossName
from fat.training.module import DistillModule

QUIET: dict[str, Any] = {"progress": False, "bias_correction": False}
CLASSES = 10


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def labeled(tiny: nn.Module, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Batches with labels that differ from the network's predictions."""
    return [(x, (tiny(x).argmax(1) + 3) % CLASSES) for x in batches]


def prepared(network: nn.Module, images: Tensor, **options: Any) -> Student:
    student = fat.prepare(network, images, QuantSpec(**{"bits": 4, **options}))
    fat.calibrate(student, images)
    return student


class Logged(pl.Callback):
    """Figures after each step, and after each validation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.validations: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append({name: float(v) for name, v in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.validations.append(float(trainer.callback_metrics["val/loss"]))


def results_of(module: torch.fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Return the output of every node of a graph by name."""
    found: dict[str, Tensor] = {}

    class Note(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            found[n.name] = super().run_node(n)
            return found[n.name]

    with torch.no_grad():
        Note(module).run(images)
    return found


def block_error(student: Student, images: Tensor) -> float:
    """Mean relative squared error of the outputs of TinyNet's two blocks, in float64."""
    exact, given = results_of(student.teacher, images), results_of(student.network, images)
    errors = []
    for addition, quantizer in (("add", "blocks_0_add"), ("add_1", "blocks_1_add")):
        wanted = exact[addition].double()
        difference = wanted - given[f"activation_quantizers_{quantizer}"].double()
        errors.append(float(difference.square().sum() / wanted.square().sum()))
    return sum(errors) / 2


# --- losses -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("rmse", {}),
        ("authors_code", {}),
        ("mse", {}),
        ("kl", {}),
        ("kl", {"temperature": 4.0}),
        ("cosine", {}),
    ],
)
def test_every_loss_trains(
    tiny: nn.Module, images: Tensor, batches: list[Tensor], loss: LossName, options: dict[str, Any]
) -> None:
    student = prepared(tiny, images)
    result = fat.fit(
        student,
        batches,
        validation=batches,
        loss=loss,
        epochs=8,
        lr=5e-3,
        bias_lr=1e-3,
        weight_scale_lr=1e-3,
        **options,
        **QUIET,
    )
    assert result.best_loss < 0.9 * result.calibrated_loss
    assert result.restored == 0


# --- features -----------------------------------------------------------------


def test_features_are_the_outputs_of_the_blocks(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    student = prepared(tiny, images)
    wanted, logged = block_error(student, batches[0]), Logged()
    with torch.no_grad():
        error = student.float_logits(batches[0]) - student(batches[0])
    loss = float(error.square().mean().sqrt())
    fat.fit(
        student,
        batches[:1],
        validation=batches,
        feature_weight=2.0,
        epochs=1,
        callbacks=[logged],
        **QUIET,
    )
    assert wanted > 1e-3
    assert logged.steps[0]["train/features"] == pytest.approx(wanted, rel=1e-4)
    # The loss between the logits stands beside it, without it.
    assert logged.steps[0]["train/loss"] == pytest.approx(loss, rel=1e-4)


def gradients(student: Student, batch: Any, **options: Any) -> dict[str, Tensor]:
    module = DistillModule(student, TrainSpec(**options))
    module.log = lambda *_, **__: None  # type: ignore[method-assign]  # no trainer here
    student.zero_grad()
    module.training_step(batch, 0).backward()
    return {name: p.grad.clone() for name, p in student.named_parameters()}


def test_terms_add_up_by_their_weights(
    tiny: nn.Module, images: Tensor, labeled: list[tuple[Tensor, Tensor]]
) -> None:
    student = prepared(tiny, images)
    batch = labeled[0]
    plain = gradients(student, batch, loss="mse")
    features = gradients(student, batch, loss="mse", feature_weight=0.5)
    labels = gradients(student, batch, loss="mse", label_weight=0.25)
    both = gradients(student, batch, loss="mse", feature_weight=1.0, label_weight=0.5)
    classifier = [name for name in plain if "classifier" in name]
    assert classifier
    for name, gradient in plain.items():
        expected = gradient + 2 * (features[name] - gradient) + 2 * (labels[name] - gradient)
        scale = float(torch.stack([gradient.abs().max(), both[name].abs().max()]).max())
        torch.testing.assert_close(both[name], expected, rtol=1e-3, atol=1e-5 * scale + 1e-12)
        # No block lies behind the classifier.
        assert torch.equal(features[name], gradient) or name not in classifier
    assert not torch.equal(features["network.stem.bias"], plain["network.stem.bias"])
    assert not torch.equal(labels["network.classifier.bias"], plain["network.classifier.bias"])


def test_training_on_features_brings_the_blocks_closer(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    last: list[float] = []

    class Watch(pl.Callback):  # before the best student, by the logits, is put back
        def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            last.append(block_error(pl_module.student, images))

    for weight in (0.0, 10.0):
        student = prepared(tiny, images)
        before = block_error(student, images)
        fat.fit(
            student,
            batches,
            validation=batches,
            feature_weight=weight,
            epochs=15,
            weight_scale_lr=3e-3,
            bias_lr=3e-3,
            callbacks=[Watch()],
            **QUIET,
        )
    without, with_ = last
    assert with_ < 0.9 * before
    assert with_ < 0.9 * without


def test_features_that_are_off_cost_nothing(
    tiny: nn.Module, images: Tensor, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"student": 0, "teacher": 0}
    student = prepared(tiny, images)
    for name, network in (("student", student), ("teacher", student.teacher)):

        def count(*_: Any, name: str = name) -> None:
            calls[name] += 1

        network.register_forward_hook(count)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("not enabled")

    for name in ("BlockOutputs", "relative_error", "label_loss"):
        monkeypatch.setattr(f"fat.training.module.{name}", forbidden)
    fat.fit(student, batches, validation=batches[:1], epochs=1, **QUIET)
    assert calls == {"student": 4 + 2, "teacher": 4 + 2}  # steps and two validations


def test_a_network_without_blocks_is_rejected(images: Tensor) -> None:
    chain = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 5),
    )
    student = prepared(chain.eval(), images)
    with pytest.raises(FatError, match=r"no blocks.*optim\.feature_weight=0"):
        fat.fit(student, images, feature_weight=1.0, **QUIET)


class Projections(nn.Module):
    """Two linear projections in sequence: equalization may rescale the tensor between them."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            nn.Conv2d(3, 6, 3),
            nn.ReLU6(),
            nn.Conv2d(6, 4, 1),
            nn.Conv2d(4, 6, 1),
            nn.ReLU6(),
            nn.Conv2d(6, 4, 1),
            nn.Conv2d(4, 6, 3),
            nn.ReLU6(),
        ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def rescaled(student: Student, first: str, second: str) -> Student:
    """Multiply the channels between two layers, as cross-layer equalization does."""
    layers = {layer.layer: layer for layer in student.layers()}
    scales = torch.tensor([0.1, 0.5, 3.0, 8.0])
    layers[first].weight.mul_(scales.view(-1, 1, 1, 1))
    layers[first].bias.data.mul_(scales)
    layers[second].weight.div_(scales.view(1, -1, 1, 1))
    student.spec = replace(student.spec, equalize=EqualizeSpec("cross_layer"))
    return student


def test_blocks_that_equalization_rescaled_are_excluded(
    images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    network = Projections().eval()
    student = rescaled(prepared(network, images, bits=8), "features.2", "features.3")
    fat.calibrate(student, images)
    logged = Logged()
    fat.fit(student, images, feature_weight=1.0, epochs=1, callbacks=[logged], **QUIET)
    assert "1 of 2 blocks" in caplog.text
    assert "features_2" in caplog.text
    assert logged.steps[0]["train/features"] < 0.01

    student = rescaled(student, "features.5", "features.6")
    fat.calibrate(student, images)
    with pytest.raises(FatError, match=r"outputs of all blocks.*optim\.feature_weight=0"):
        fat.fit(student, images, feature_weight=1.0, epochs=1, **QUIET)


# --- labels -------------------------------------------------------------------


def test_labels_pull_towards_them(
    tiny: nn.Module, images: Tensor, labeled: list[tuple[Tensor, Tensor]]
) -> None:
    def cross_entropy(student: Student) -> float:
        with torch.no_grad():
            return sum(float(nn.functional.cross_entropy(student(x), y)) for x, y in labeled)

    student, logged = prepared(tiny, images), Logged()
    seen = [cross_entropy(student)]

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            seen.append(cross_entropy(pl_module.student))

    with torch.no_grad():
        first = float(nn.functional.cross_entropy(student(labeled[0][0]), labeled[0][1]))
    fat.fit(
        student,
        labeled,
        validation=labeled,
        label_weight=5.0,
        epochs=10,
        lr=1e-2,
        bias_lr=1e-2,
        weight_scale_lr=1e-2,
        callbacks=[logged, Watch()],
        **QUIET,
    )
    assert logged.steps[0]["train/labels"] == pytest.approx(first, rel=1e-4)
    assert seen[-1] < 0.9 * seen[0]


def test_labels_that_are_off_are_not_used(
    tiny: nn.Module, images: Tensor, batches: list[Tensor], labeled: list[tuple[Tensor, Tensor]]
) -> None:
    results = []
    for data in (batches, labeled, [(x, y + 10**6) for x, y in labeled]):
        student = prepared(tiny, images)
        fat.fit(student, data, validation=batches, epochs=1, **QUIET)
        results.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_batch_without_labels_counts_nothing(
    tiny: nn.Module, images: Tensor, labeled: list[tuple[Tensor, Tensor]]
) -> None:
    student = prepared(tiny, images)
    pixels, labels = labeled[0]
    plain = gradients(student, pixels)
    for batch in (pixels, (pixels, torch.full((4,), -1))):
        assert all(
            torch.equal(g, plain[name])
            for name, g in gradients(student, batch, label_weight=3.0).items()
        )
    logged = Logged()
    mixed = [pixels, (pixels, labels.where(torch.arange(4) > 2, -1)), labeled[2], pixels]
    fat.fit(
        student, mixed, validation=labeled, label_weight=1.0, epochs=1, callbacks=[logged], **QUIET
    )
    values = [step["train/labels"] for step in logged.steps]
    assert values[0] == values[3] == 0.0
    assert min(values[1:3]) > 0


def test_no_label_at_all_is_an_error_and_the_student_stays_good(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    student, logged = prepared(tiny, images), Logged()
    with pytest.raises(FatError, match=r"no training image has a label.*optim\.label_weight=0"):
        fat.fit(
            student,
            batches,
            validation=batches,
            label_weight=1.0,
            epochs=3,
            callbacks=[logged],
            **QUIET,
        )
    assert len(logged.steps) == len(batches)  # after one epoch, not after all
    assert student(images).isfinite().all()


def test_a_label_that_is_no_class_is_an_error(
    tiny: nn.Module, images: Tensor, labeled: list[tuple[Tensor, Tensor]]
) -> None:
    student = prepared(tiny, images)
    wrong = [(x, y + CLASSES) for x, y in labeled]
    with pytest.raises(FatError, match=r"A label is 1\d, but the network has the classes 0 to 9"):
        fat.fit(student, wrong, validation=labeled, label_weight=1.0, **QUIET)


# --- validation ---------------------------------------------------------------


def test_terms_do_not_change_what_is_called_best(
    tiny: nn.Module, images: Tensor, labeled: list[tuple[Tensor, Tensor]]
) -> None:
    student, logged = prepared(tiny, images), Logged()
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            with torch.no_grad():
                errors = [student.float_logits(x) - student(x) for x, _ in labeled]
            seen.append(float(torch.cat(errors).square().mean()))

    result = fat.fit(
        student,
        labeled,
        validation=labeled,
        loss="mse",
        feature_weight=3.0,
        label_weight=3.0,
        epochs=4,
        lr=1e-2,
        callbacks=[logged, Watch()],
        **QUIET,
    )
    assert logged.validations == pytest.approx(seen, rel=1e-4)
    assert result.best_loss == pytest.approx(min(seen), rel=1e-4)
    assert result.best_step == 4 * seen.index(min(seen))


def test_the_checkpoint_holds_the_student_once(tiny: nn.Module, images: Tensor) -> None:
    student = prepared(tiny, images)
    plain = DistillModule(student, TrainSpec())
    widened = DistillModule(student, TrainSpec(feature_weight=1.0))
    assert widened._blocks is not None
    widened._blocks.select(images)
    assert widened.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in widened.named_parameters()] == [n for n, _ in plain.named_parameters()]


def test_compiled_training_equals_eager_training(
    tiny: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling: list[Any] = []

    def compile_and_note(function: Any, mode: str) -> Any:
        assert mode == "reduce-overhead"
        compiling.append(function)
        return torch._dynamo.optimize("aot_eager", nopython=True)(function)

    monkeypatch.setattr(torch, "compile", compile_and_note)
    torch._dynamo.reset()
    results = []
    for compile in ("reduce-overhead", "none"):
        student = prepared(tiny, images)
        module = DistillModule(student, TrainSpec(feature_weight=0.5), compile=compile)
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(images[:8], 4), DataLoader(images[8:], 4))
        results.append({name: p.detach().clone() for name, p in student.named_parameters()})
    assert len(compiling) == 2  # without and with the outputs of blocks
    assert results[0].keys() == results[1].keys()
    for name, wanted in results[1].items():
        assert torch.equal(results[0][name], wanted), name
    torch._dynamo.reset()


def test_a_cpu_does_not_compile(
    tiny: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch, "compile")
    student = prepared(tiny, batches[0])
    assert fat.fit(student, batches, epochs=1, compile="default", **QUIET).steps > 0
