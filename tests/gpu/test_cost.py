"""Kernels, memory traffic and host reads of steps and batches, counted on a pretended GPU.

Times need a real one (benchmarks/gpu.py). Without it can be assured that a step waits for the host
nowhere, launches few kernels and moves little memory.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
from torch import Tensor, nn

import fat
from fat import QuantSpec, ReconstructSpec, Student, TrainSpec
from fat.training.block_reconstruction import reconstruct
from fat.training.callbacks import CSVHistory
from fat.training.losses import make_loss
from tests.gpu.counting import Counts
from tests.gpu.pretended import PretendedGpu
from tests.gpu.test_pipeline import RECIPES, made

STEPS = 12
"""Steps of a counted training; NanGuard looks at the parameters in every tenth."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep Lightning's hints out of the tests' output."""
    lightning = logging.getLogger("pytorch_lightning")
    level = lightning.level
    lightning.setLevel(logging.ERROR)
    yield
    lightning.setLevel(level)


class CountsSteps(pl.Callback):
    """Counts from the start of the second step of an epoch to the end of its last, and each step.

    The first step copies constants to the device.

    Attributes:
        whole: Counts of the steps from the second on, with what Lightning does between them.
        steps: Counts of each step.
    """

    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu = gpu
        self.steps: list[Counts] = []
        self.whole: Counts | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        if len(self.steps) == 1:
            self._all = self.gpu.counting()
            self.whole = self._all.__enter__()
        self._one = self.gpu.counting()
        self.steps.append(self._one.__enter__())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._one.__exit__(None, None, None)
        if len(self.steps) == trainer.num_training_batches:
            self._all.__exit__(None, None, None)


def trained(
    gpu: PretendedGpu, student: Student, batches: list[Any], folder: Path, **recipe: Any
) -> CountsSteps:
    """Train for an epoch with everything that logs, in the precision of a GPU."""
    counter = CountsSteps(gpu)
    # The progress bar reads the loss once per second.
    recipe = {**recipe, "epochs": 1, "validations": 1, "progress": False}
    fat.fit(
        student,
        batches,
        validation=batches[:1],
        callbacks=[counter, CSVHistory(folder / "history.csv")],
        trainer_options={"precision": "bf16-mixed"},
        **recipe,
    )
    return counter


class TestHostReads:
    @pytest.mark.parametrize("name", sorted(RECIPES))
    def test_a_training_step_has_none(
        self, tiny: nn.Module, images: Tensor, gpu: PretendedGpu, tmp_path: Path, name: str
    ) -> None:
        quantization, recipe = RECIPES[name]
        student = made(tiny, images, "cuda", **quantization)
        labels = torch.arange(4)
        batches = [(part, labels) for part in images.split(4) * (STEPS // 4)]
        recipe = {**recipe, "reconstruction": ReconstructSpec(), "bias_correction": False}
        counted = trained(gpu, student, batches, tmp_path, **recipe)
        assert len(counted.steps) == STEPS
        assert counted.whole is not None
        assert not counted.whole.reads
        assert not counted.whole.waiting_copies

    def test_batches_without_labels_that_are_on_the_device(
        self, tiny: nn.Module, images: Tensor, gpu: PretendedGpu, tmp_path: Path
    ) -> None:
        student = made(tiny, images, "cuda")
        batches = list(images.to("cuda").split(4)) * (STEPS // 4)
        counted = trained(gpu, student, batches, tmp_path)
        assert counted.whole is not None
        assert not counted.whole.reads
        assert not counted.whole.waiting_copies

    def test_a_step_of_reconstruction_has_none(
        self, tiny: nn.Module, images: Tensor, gpu: PretendedGpu
    ) -> None:
        def counts(steps: int) -> Counts:
            student = made(tiny, images, "cuda", weights="adaround")
            spec = TrainSpec(reconstruction=ReconstructSpec(steps=steps, images=16, batch_size=8))
            with gpu.counting() as counted:
                reconstruct(student, list(images.split(4)), [images], spec, progress=False)
            return counted

        few, many = counts(3), counts(6)
        assert many.launched > few.launched
        assert many.reads == few.reads
        assert many.waiting_copies == few.waiting_copies

    def test_a_batch_of_an_evaluation_has_none(
        self, tiny: nn.Module, images: Tensor, gpu: PretendedGpu
    ) -> None:
        student = made(tiny, images, "cuda")
        parts = [(part, torch.arange(4)) for part in images.split(4)]

        def counts(number: int) -> Counts:
            with gpu.counting() as counted:
                fat.evaluate(student, parts[:number])
            return counted

        counts(1)
        few, many = counts(2), counts(4)
        assert many.launched > few.launched
        assert many.reads == few.reads
        assert many.waiting_copies == few.waiting_copies


class TestKernels:
    @pytest.mark.parametrize("weights", ["adaround", "scale"])
    @pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
    def test_a_quantizer_is_one_kernel_forward_and_one_backward(
        self, tiny: nn.Module, images: Tensor, gpu: PretendedGpu, granularity: str, weights: str
    ) -> None:
        student = made(tiny, images, "cuda", granularity=granularity, weights=weights)
        x = images.to("cuda")
        student(x).square().sum().backward()
        with gpu.counting() as forward:
            loss = student(x).square().sum()
        with gpu.counting() as backward:
            loss.backward()
        activations, layers = len(student.activation_quantizers()), len(student.layers())
        for_weights = {"fat::fake_quantize_weight", "fat::fake_quantize_weight_backward"}
        counted = {"forward": forward, "backward": backward}
        for counts in counted.values():
            ours = {name: n for (name, _), n in counts.kernels.items() if name.startswith("fat::")}
            assert sum(n for name, n in by_name(counts).items() if name in for_weights) == layers
            assert counts.of("fat::") == activations + layers, ours
            assert not counts.reads


def by_name(counts: Counts) -> dict[str, int]:
    found: dict[str, int] = {}
    for (name, _), n in counts.kernels.items():
        found[name] = found.get(name, 0) + n
    return found


@dataclass
class Traffic:
    """Bytes of a step as a function of the number and the size of the images.

    Feature maps of a network with strides of 2 have a fixed number of elements for each 32 x 32
    pixels, vectors after the pooling for each image, and weights for each step.
    """

    step: float
    image: float
    tile: float

    @classmethod
    def of(cls, small: tuple[int, int], large: tuple[int, int]) -> Traffic:
        """Determine it from the bytes for 1 and 2 images, of 32 and of 64 pixels."""
        by_image = small[1] - small[0], large[1] - large[0]
        tile = (by_image[1] - by_image[0]) / (4 - 1)
        step = small[0] - by_image[0]
        assert step == large[0] - by_image[1]  # else it is not linear
        return cls(step, by_image[0] - tile, tile)

    def __call__(self, images: int, pixels: int) -> float:
        """Return the bytes for square images of a number of pixels on each side."""
        return self.step + images * (self.image + (pixels / 32) ** 2 * self.tile)


@dataclass
class Lite0:
    """Counts of EfficientNet-Lite0 with random weights.

    Attributes:
        quantizers: Number of activation quantizers, number of layers.
        steps: Steps of a training by fat.fit, without the teacher's kernels.
        teacher: The teacher's logits.
        inference: A batch of integer inference, with thresholds and weights computed for it.
        cached: The same within :meth:`fat.Student.cached_integers`.
        student_bytes: Bytes of a training step of the student.
        float_bytes: Bytes of a step of float fine-tuning under the same autocast.
    """

    quantizers: tuple[int, int]
    steps: list[int]
    step: Counts
    teacher: Counts
    inference: Counts
    cached: Counts
    student_bytes: Traffic
    float_bytes: Traffic


def trainable(network: nn.Module) -> nn.Module:
    """Copy a frozen network and make its tensors parameters."""
    network = copy.deepcopy(network)
    for module in network.modules():
        for name, tensor in list(module.named_buffers(recurse=False)):
            delattr(module, name)
            setattr(module, name, nn.Parameter(tensor))
    return network


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> Lite0:
    torch.manual_seed(0)
    network = timm.create_model("efficientnet_lite0", pretrained=False).eval()
    with PretendedGpu() as gpu:
        example = torch.randn(2, 3, 32, 32)
        student = fat.prepare(network, example, QuantSpec(weights="adaround")).to("cuda")
        fat.calibrate(student, example)
        with gpu.counting() as teacher:
            student.float_logits(example.to("cuda"))
        batches = list(example.to("cuda").split(1)) * (STEPS // 2)
        folder = tmp_path_factory.mktemp("lite0")
        counted = trained(gpu, student, batches, folder, bias_correction=False).steps

        x = example.to("cuda").contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            with gpu.counting() as inference:
                student(x)
            with student.cached_integers():
                student(x)
                with gpu.counting() as cached:
                    student(x)

        loss = make_loss("rmse", 1.0)

        def traffic(module: nn.Module) -> Traffic:
            optimizer = torch.optim.Adam(module.parameters(), fused=True)

            def step(images: int, pixels: int) -> int:
                x = torch.randn(images, 3, pixels, pixels, device="cuda")
                x = x.contiguous(memory_format=torch.channels_last)
                with torch.no_grad():
                    wanted = student.float_logits(x)
                with gpu.counting() as counts:
                    optimizer.zero_grad()
                    with torch.autocast("cuda", torch.bfloat16):
                        loss(wanted, module(x)).backward()
                    optimizer.step()
                    if module is student:
                        student.project()
                return counts.bytes

            step(1, 32)  # the optimizer makes its state
            sizes = [(step(1, pixels), step(2, pixels)) for pixels in (32, 64)]
            return Traffic.of(*sizes)

        return Lite0(
            quantizers=(len(student.activation_quantizers()), len(student.layers())),
            steps=[counts.launched - teacher.launched for counts in counted],
            step=counted[-1],
            teacher=teacher,
            inference=inference,
            cached=cached,
            student_bytes=traffic(student),
            float_bytes=traffic(trainable(student.teacher)),
        )


class TestEfficientNetLite0:
    def test_kernels_of_a_training_step(self, lite0: Lite0) -> None:
        activations, layers = lite0.quantizers
        assert (activations, layers) == (61, 50)
        # The first step also makes the optimizer's state, and every tenth looks for NaN.
        assert max(lite0.steps[1:]) <= 900
        assert sorted(lite0.steps)[STEPS // 2] <= 600, lite0.step.table()
        assert lite0.step.of("fat::") == 2 * (activations + layers)
        assert lite0.step.host_reads == 0

    def test_traffic_of_a_training_step(self, lite0: Lite0) -> None:
        for images in (64, 128, 256):
            ratio = lite0.student_bytes(images, 224) / lite0.float_bytes(images, 224)
            assert ratio <= 1.15

    def test_kernels_of_inference(self, lite0: Lite0) -> None:
        assert lite0.inference.launched <= 350, lite0.inference.table()
        assert lite0.inference.host_reads == 0
        assert lite0.cached.launched <= 200, lite0.cached.table()
        assert lite0.cached.host_reads == 0
