"""Everything that a user does runs on a pretended GPU, with the results of a CPU.

The pretended GPU computes on the CPU, so that all results in float32 are equal bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import fat
from fat import QuantSpec, ReconstructSpec, Student, TrainSpec
from fat.evaluation.details import filter_changes, layer_rows
from fat.evaluation.evaluator import Disagreements
from fat.evaluation.layer_analysis import float_shift_db, layer_errors
from fat.quant.range_estimators import STRATEGIES
from fat.training.bias_correction import correct_biases
from fat.training.block_reconstruction import reconstruct
from tests.gpu.pretended import CUDA, PretendedGpu, on_cpu

EPOCH = {"epochs": 1, "progress": False}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep Lightning's hints out of the tests' output."""
    lightning = logging.getLogger("pytorch_lightning")
    level = lightning.level
    lightning.setLevel(logging.ERROR)
    yield
    lightning.setLevel(level)


def on_one_device(student: Student) -> bool:
    tensors = [*student.parameters(), *student.buffers()]
    return {x.device for x in tensors} == {student.device}


def made(
    network: nn.Module, images: Tensor, device: str, *, calibrated: bool = True, **spec: Any
) -> Student:
    """Prepare and calibrate a student with the network and the images on a device."""
    network = copy.deepcopy(network).to(device)
    images = images.to(device)
    student = fat.prepare(network, images, QuantSpec(**spec))
    if calibrated:
        fat.calibrate(student, list(images.split(4)))
    assert on_one_device(student)
    return student


def state(student: Student) -> dict[str, Tensor]:
    return on_cpu({**student.state_dict(), **student.trained_state()})


def same(given: Any, wanted: Any) -> bool:
    """Compare nested results bit for bit; NaN equals NaN."""
    given, wanted = on_cpu(given), on_cpu(wanted)
    if dataclasses.is_dataclass(wanted):
        return same(vars(given), vars(wanted))
    if isinstance(wanted, dict):
        assert given.keys() == wanted.keys()
        return all(same(given[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        assert len(given) == len(wanted)
        return all(same(a, b) for a, b in zip(given, wanted, strict=True))
    if isinstance(wanted, Tensor):
        return torch.equal(given.nan_to_num(1.5), wanted.nan_to_num(1.5))
    return given == wanted or (given != given and wanted != wanted)


class TestPrepare:
    @pytest.mark.parametrize("equalize", ["none", "depthwise+cross_layer"])
    def test_a_network_on_the_device(self, tiny: nn.Module, images: Tensor, equalize: str) -> None:
        spec = QuantSpec(equalize=fat.EqualizeSpec(method=equalize))
        wanted = fat.prepare(tiny, images, spec)
        with PretendedGpu(tf32=True, reciprocal=True):
            moved = copy.deepcopy(tiny).to("cuda")
            student = fat.prepare(moved, images.to("cuda"), spec)
            assert student.device == CUDA
            assert on_one_device(student)
            assert {x.device for x in moved.state_dict().values()} == {CUDA}
            assert same(student.state_dict(), wanted.state_dict())
            assert same(dict(student.teacher.named_buffers()), dict(wanted.teacher.named_buffers()))
            assert same(student.report, wanted.report)

    def test_images_on_the_cpu(self, tiny: nn.Module, images: Tensor, gpu: PretendedGpu) -> None:
        student = fat.prepare(copy.deepcopy(tiny).to("cuda"), images)
        assert student.device == CUDA
        assert on_one_device(student)

    def test_a_student_that_is_moved(
        self, tiny: nn.Module, images: Tensor, gpu: PretendedGpu
    ) -> None:
        student = fat.prepare(tiny, images).to("cuda")
        assert student.device == CUDA
        assert on_one_device(student)
        fat.calibrate(student, images)  # images stay on the CPU
        assert on_one_device(student)
        assert student(images.to("cuda")).device == CUDA
        student.cpu()
        assert student.device.type == "cpu"
        assert on_one_device(student)
        assert student(images).device.type == "cpu"


class TestCalibrate:
    @pytest.mark.parametrize("name", sorted(STRATEGIES))
    def test_thresholds_are_those_of_the_cpu(
        self, tiny: nn.Module, images: Tensor, name: str
    ) -> None:
        init = fat.InitSpec(name=name, candidates=10)
        per_tensor = len(name) % 2 == 0  # each with some of the strategies
        spec: dict[str, Any] = {
            "granularity": "per_tensor" if per_tensor else "per_channel",
            "scheme": "symmetric" if per_tensor else "asymmetric",
            "weight_init": init,
            "activation_init": init,
        }
        wanted = made(tiny, images, "cpu", **spec)
        with torch.no_grad():
            logits, teacher = wanted(images), wanted.float_logits(images)
        with PretendedGpu(tf32=True, reciprocal=True):
            student = made(tiny, images, "cuda", **spec)
            assert same(student.state_dict(), wanted.state_dict())
            scales = [x() for x in student.thresholds()]
            assert same(scales, [x() for x in wanted.thresholds()])
            integers = [layer.integers() for layer in student.layers()]
            assert same(integers, [layer.integers() for layer in wanted.layers()])
            with torch.no_grad():
                assert same(student.float_logits(images.to("cuda")), teacher)
                assert same(student(images.to("cuda")), logits)

    def test_power_of_two(self, tiny: nn.Module, images: Tensor) -> None:
        wanted = made(tiny, images, "cpu", power_of_two=True)
        with PretendedGpu(reciprocal=True):
            student = made(tiny, images, "cuda", power_of_two=True)
            assert same([x() for x in student.thresholds()], [x() for x in wanted.thresholds()])


RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "thresholds alone": ({"weights": "frozen", "bias": "frozen"}, {"bias_correction": False}),
    "lsq, adaround": ({"thresholds": "lsq", "weights": "adaround"}, {}),
    "tqt, one threshold per tensor": ({"thresholds": "tqt", "granularity": "per_tensor"}, {}),
    "fat, symmetric, adaround, one threshold per tensor": (
        {"scheme": "symmetric", "weights": "adaround", "granularity": "per_tensor"},
        {},
    ),
    "frozen thresholds": ({"thresholds": "frozen", "weights": "adaround"}, {}),
    "powers of two": ({"power_of_two": True, "bits": 6}, {"loss": "kl"}),
    "features and labels": ({"bits": 4}, {"feature_weight": 0.5, "label_weight": 0.1}),
    "reconstruction": (
        {"weights": "adaround", "bits": 4},
        {"reconstruction": ReconstructSpec(steps=4, images=16, batch_size=8, float_fraction=0.0)},
    ),
    "clipped gradients, two cycles, two validations": (
        {"activation_bits": 8, "weight_bits": 4},
        {"gradient_clip": 0.1, "period": 2, "validations": 2, "loss": "mse"},
    ),
}


def fitted(
    network: nn.Module, images: Tensor, device: str, name: str, **options: Any
) -> tuple[Student, fat.FitResult]:
    quantization, recipe = RECIPES[name]
    student = made(network, images, device, **quantization)
    labels = torch.arange(len(images)) % 10
    batches: list[Any] = list(zip(images.split(4), labels.split(4), strict=True))
    result = fat.fit(student, batches, validation=batches[:2], **EPOCH, **recipe, **options)
    return student, result


class TestFit:
    @pytest.mark.parametrize("name", sorted(RECIPES))
    def test_every_recipe_gives_what_a_cpu_gives(
        self, tiny: nn.Module, images: Tensor, name: str
    ) -> None:
        wanted, summary = fitted(tiny, images, "cpu", name)
        figures = fat.evaluate(wanted, images.split(4))
        # Not reciprocal=True: the gradient of a mean divides by a number.
        with PretendedGpu(tf32=True):
            student, result = fitted(tiny, images, "cuda", name)
            assert student.device == CUDA
            assert on_one_device(student)
            assert result == summary
            assert same(state(student), state(wanted))
            on_device = fat.evaluate(student, images.to("cuda").split(4))
            assert same({**on_device, "seconds": 0}, {**figures, "seconds": 0})

    def test_half_precision(self, tiny: nn.Module, images: Tensor, gpu: PretendedGpu) -> None:
        torch.manual_seed(0)
        teacher = made(tiny, images, "cuda").float_logits(images.to("cuda"))
        options = {"trainer_options": {"precision": "bf16-mixed"}}
        full, _ = fitted(tiny, images, "cuda", "features and labels")
        student, result = fitted(tiny, images, "cuda", "features and labels", **options)
        assert on_one_device(student)
        assert student.device == CUDA
        assert all(x.dtype == torch.float32 for x in student.parameters())
        assert not same(state(student), state(full))  # it has been used
        assert result.best_loss < result.calibrated_loss
        assert same(student.float_logits(images.to("cuda")), teacher)

    def test_reconstruction_with_mixed_inputs(
        self, tiny: nn.Module, images: Tensor, gpu: PretendedGpu
    ) -> None:
        student = made(tiny, images, "cuda", bits=4)
        before = state(student)
        spec = TrainSpec(reconstruction=ReconstructSpec(steps=4, images=16, batch_size=8))
        reconstruct(student, list(images.split(4)), [images], spec, seed=0, progress=False)
        assert on_one_device(student)
        assert not same(state(student), before)

    def test_bias_correction(self, tiny: nn.Module, images: Tensor) -> None:
        wanted = made(tiny, images, "cpu", bits=4)
        correct_biases(wanted, list(images.split(4)))
        with PretendedGpu(tf32=True):
            student = made(tiny, images, "cuda", bits=4)
            correct_biases(student, list(images.split(4)))  # images on the CPU
            assert on_one_device(student)
            assert same(state(student), state(wanted))

    def test_an_error_leaves_the_student_where_it_was(
        self, tiny: nn.Module, images: Tensor, gpu: PretendedGpu
    ) -> None:
        student = made(tiny, images, "cuda")
        with pytest.raises(ZeroDivisionError):
            fat.fit(student, images.split(4), callbacks=[Stops(2, ZeroDivisionError)], **EPOCH)
        assert student.device == CUDA
        assert on_one_device(student)


class Stops(pl.Callback):
    """Raises an error at the end of a step."""

    def __init__(self, step: int, error: type[BaseException]) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


class TestResume:
    RECIPE = ({"bits": 4, "weights": "adaround"}, {"epochs": 2, "progress": False, "lr": 1e-3})

    def train(
        self, network: nn.Module, images: Tensor, device: str, folder: Path | None, **options: Any
    ) -> dict[str, Tensor]:
        quantization, recipe = self.RECIPE
        student = made(network, images, device, **quantization)
        with contextlib.suppress(ZeroDivisionError):
            fat.fit(
                student,
                list(images.split(4)),
                validation=[images],
                checkpoints=folder,
                checkpoint_every=0.0,
                **recipe,
                **options,
            )
        assert on_one_device(student)
        return state(student)

    @pytest.mark.parametrize(
        ("first", "then"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")]
    )
    def test_a_training_that_moves(
        self, tiny: nn.Module, images: Tensor, tmp_path: Path, first: str, then: str
    ) -> None:
        def gpu_for(device: str) -> Any:
            return PretendedGpu() if device == "cuda" else contextlib.nullcontext()

        wanted = self.train(tiny, images, "cpu", None)
        with gpu_for(first):
            stop = Stops(5, ZeroDivisionError)
            stopped = self.train(tiny, images, first, tmp_path, callbacks=[stop])
        assert not same(stopped, wanted)
        with gpu_for(then):
            assert same(self.train(tiny, images, then, tmp_path, resume=True), wanted)

    @pytest.mark.parametrize(
        ("first", "then"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")]
    )
    def test_a_reconstruction_that_moves(
        self, tiny: nn.Module, images: Tensor, first: str, then: str
    ) -> None:
        blocks = ReconstructSpec(steps=3, images=16, batch_size=8, float_fraction=0.0)
        spec, batches = TrainSpec(reconstruction=blocks), list(images.split(4))

        def train(device: str, **options: Any) -> dict[str, Tensor]:
            gpu = PretendedGpu() if device == "cuda" else contextlib.nullcontext()
            with gpu:
                student = made(tiny, images, device, bits=4)
                with contextlib.suppress(ZeroDivisionError):
                    reconstruct(student, batches, [images], spec, seed=0, progress=False, **options)
                assert on_one_device(student)
                return state(student)

        saved: list[Any] = []

        def keep(content: Any) -> None:
            saved.append(on_cpu(content))
            if len(saved) == 2:
                raise ZeroDivisionError

        wanted = train("cpu")
        train(first, keep=keep)
        assert same(train(then, done=saved[0]), wanted)


class TestEvaluate:
    @pytest.fixture
    def labeled(self, images: Tensor) -> list[Any]:
        labels = torch.arange(len(images)) % 10
        return list(zip(images.split(4), labels.split(4), strict=True))

    def test_evaluate(self, tiny: nn.Module, images: Tensor, labeled: list[Any]) -> None:
        wanted_differing, differing = Disagreements(), Disagreements()
        student = made(tiny, images, "cpu", bits=2)
        wanted = fat.evaluate(student, labeled, differing=wanted_differing)
        assert wanted_differing.kept
        with PretendedGpu(tf32=True, reciprocal=True):
            student = made(tiny, images, "cuda", bits=2)
            found = fat.evaluate(student, labeled, differing=differing)  # batches on the CPU
            assert same({**found, "seconds": 0}, {**wanted, "seconds": 0})
            assert differing.differing == wanted_differing.differing
            assert same(differing.kept, wanted_differing.kept)
            assert all(x.image.device.type == "cpu" for x in differing.kept)

    def test_layer_analysis(self, tiny: nn.Module, images: Tensor) -> None:
        student = made(tiny, images, "cpu", bits=4)
        with torch.no_grad():
            wanted = (layer_errors(student, images.split(4)), float_shift_db(student, images))
            changes = filter_changes(student)
        with PretendedGpu(tf32=True, reciprocal=True), torch.no_grad():
            student = made(tiny, images, "cuda", bits=4)
            found = (layer_errors(student, images.split(4)), float_shift_db(student, images))
            assert same(found, wanted)
            assert same(filter_changes(student), changes)

    def test_layers_of_the_report(self, tiny: nn.Module, images: Tensor) -> None:
        rows = layer_rows(made(tiny, images, "cpu", bits=4), list(images.split(4)))
        with PretendedGpu(tf32=True, reciprocal=True):
            student = made(tiny, images, "cuda", bits=4)
            assert same(layer_rows(student, list(images.split(4))), rows)

    def test_sensitivity(self, tiny: nn.Module, images: Tensor) -> None:
        wanted = fat.sensitivity(made(tiny, images, "cpu"), images[:4])
        with PretendedGpu(tf32=True, reciprocal=True):
            student = made(tiny, images, "cuda")
            assert same(fat.sensitivity(student, images[:4]), wanted)
            assert on_one_device(student)


class TestFiles:
    def test_save_and_load(self, tiny: nn.Module, images: Tensor, tmp_path: Path) -> None:
        wanted = made(tiny, images, "cpu")
        fat.save(wanted, tmp_path / "cpu.safetensors")
        with torch.no_grad():
            logits = wanted(images)
        with PretendedGpu():
            fat.save(made(tiny, images, "cuda"), tmp_path / "cuda.safetensors")
            loaded = fat.load(tmp_path / "cuda.safetensors")
            assert loaded.device.type == "cpu"
            assert on_one_device(loaded)
            with torch.no_grad():
                assert same(loaded(images), logits)
                assert same(loaded.to("cuda")(images.to("cuda")), logits)
        files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("cpu", "cuda")]
        assert files[0] == files[1]

    def test_export(self, tiny: nn.Module, images: Tensor, tmp_path: Path) -> None:
        pytest.importorskip("onnx")
        fat.export_onnx(made(tiny, images, "cpu"), tmp_path / "cpu.onnx", images[:4])
        with PretendedGpu():
            student = made(tiny, images, "cuda")
            fat.export_onnx(student, tmp_path / "cuda.onnx", images[:4])
            assert student.device == CUDA
            assert on_one_device(student)
        assert (tmp_path / "cpu.onnx").read_bytes() == (tmp_path / "cuda.onnx").read_bytes()
