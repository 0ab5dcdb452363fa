"""Tests on a real GPU: ``pytest tests/gpu/test_real_gpu.py``.

Each also runs on the pretended GPU, if it can, which shows that the test itself works.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import fat
from fat import QuantSpec, ReconstructSpec, Student
from fat.data.config import DistillSpec
from fat.data.distill.synthesis import distill
from fat.models.float_model import Preprocessing
from fat.models.self_test import self_test
from fat.quant import kernels
from fat.quant.config import Grid
from fat.quant.functional import Adjust, fake_quantize, fake_quantize_weight
from tests.conftest import MobileBlock, realistic
from tests.gpu.pretended import PretendedGpu

REAL = torch.cuda.is_available()
NEEDS_GPU = "needs a GPU: run `pytest tests/gpu/test_real_gpu.py` on a machine that has one"
needs_gpu = pytest.mark.skipif(not REAL, reason=NEEDS_GPU)
DEVICES = [
    pytest.param("real", marks=needs_gpu),
    pytest.param("pretended", marks=pytest.mark.skipif(REAL, reason="there is a real GPU")),
]


@pytest.fixture(params=DEVICES)
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the GPU's kind, ``real`` or ``pretended``."""
    if request.param == "real":
        yield "real"
    else:
        with PretendedGpu():
            yield "pretended"


class Geometries(nn.Module):
    """Layers of many geometries: strides, paddings, dilations, groups, long sums, large biases."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 7, stride=2, padding=3)
        self.dilated = nn.Conv2d(16, 32, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.block = MobileBlock(32)
        self.depthwise = nn.Conv2d(32, 32, 5, stride=2, padding=2, groups=32)
        self.uneven = nn.Conv2d(32, 24, (1, 3), padding=(0, 1))
        self.wide = nn.Conv2d(24, 512, 1)
        self.long = nn.Conv2d(512, 64, 3, padding=1)  # sums of 4,608 products
        self.head = nn.Linear(64, 10)
        self.relu, self.relu6 = nn.ReLU(), nn.ReLU6()
        with torch.no_grad():
            self.long.weight.abs_()  # its accumulators pass 2^24
            self.head.weight.mul_(1e-3)
            self.head.bias.copy_(torch.linspace(-50, 50, 10))  # large beside the steps

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu6(self.dilated(self.relu(self.stem(x))))
        x = self.block(self.relu(self.grouped(x)))
        x = self.relu6(self.uneven(self.relu(self.depthwise(x))))
        x = self.long(self.relu6(self.wide(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def geometries(images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return realistic(Geometries(), images)


def made(network: nn.Module, images: Tensor, device: str, **spec: Any) -> Student:
    network = copy.deepcopy(network).to(device)
    student = fat.prepare(network, images.to(device), QuantSpec(**spec))
    fat.calibrate(student, images.to(device))
    return student


GRIDS = [Grid(8, "symmetric"), Grid(4, "symmetric_unsigned"), Grid(8, "affine")]


class TestKernels:
    @needs_gpu
    def test_triton_is_used(self) -> None:
        assert kernels.backend("cuda") == "triton"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.kind)
    def test_activations(self, gpu: str, grid: Grid, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        zero_point = torch.tensor(100.0 if grid.kind == "affine" else 0.0)
        shapes = [(0,), (1,), (1023,), (4, 8, 9, 7), (3, 5, 64, 65)]
        for shape, channels_last in itertools.product(shapes, (False, True)):
            if channels_last and len(shape) < 4:
                continue
            x = torch.randn(shape, generator=generator).to(dtype)
            special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e30]).to(dtype)
            x.view(-1)[: len(special)] = special[: x.numel()]
            grad = torch.randn(shape, generator=generator).to(dtype)
            if channels_last:
                layout = torch.channels_last
                x, grad = x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
            results = []
            for device in ("cpu", "cuda"):
                own = x.detach().to(device, copy=True).requires_grad_()
                scale = torch.tensor(0.0173, device=device, requires_grad=True)
                zero = zero_point.detach().to(device, copy=True).requires_grad_()
                y = fake_quantize(own, scale, zero, grid.qmin, grid.qmax)
                y.backward(grad.to(device))
                results.append([t.detach().cpu() for t in (y, own.grad, scale.grad, zero.grad)])
            (y, grad_x, *sums), (other_y, other_grad, *other_sums) = results
            assert y.dtype == other_y.dtype == dtype
            assert torch.equal(y, other_y)
            assert torch.equal(torch.signbit(y), torch.signbit(other_y))
            assert torch.equal(grad_x, other_grad)
            for one, other in zip(sums, other_sums, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)

    @pytest.mark.parametrize("adjust", list(Adjust))
    @pytest.mark.parametrize("per_channel", [True, False])
    def test_weights(self, gpu: str, adjust: Adjust, per_channel: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        for shape in ((8, 3, 3, 3), (33, 1, 5, 5), (10, 1280), (7, 130, 1, 1)):
            weight, grad = (torch.randn(shape, generator=generator) for _ in range(2))
            factor = 1 + 0.1 * torch.randn(shape, generator=generator)
            step = 0.02 + 0.01 * torch.rand(shape[0], generator=generator)
            results = []
            for device in ("cpu", "cuda"):
                scale = (step if per_channel else step[0]).detach().to(device, copy=True)
                scale.requires_grad_()
                own = factor.detach().to(device, copy=True).requires_grad_()
                y = fake_quantize_weight(
                    weight.to(device),
                    scale,
                    127,
                    None if adjust is Adjust.NOTHING else own,
                    adjust,
                    (0.75, 1.25),
                )
                y.backward(grad.to(device))
                found = [y, scale.grad] if adjust is Adjust.NOTHING else [y, scale.grad, own.grad]
                results.append([x.detach().cpu() for x in found])
            for position, (one, other) in enumerate(zip(*results, strict=True)):
                if position == 1:
                    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)
                else:
                    assert torch.equal(one, other)


class TestSameNetwork:
    @pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
    @pytest.mark.parametrize("bits", [8, 4])
    def test_thresholds_integers_and_logits(
        self, geometries: nn.Module, images: Tensor, gpu: str, bits: int, granularity: str
    ) -> None:
        student = made(geometries, images, "cuda", bits=bits, granularity=granularity)
        twin = copy.deepcopy(student).cpu()
        for ours, other in zip(student.thresholds(), twin.thresholds(), strict=True):
            assert all(torch.equal(a.cpu(), b) for a, b in zip(ours(), other(), strict=True))
        for ours, other in zip(student.layers(), twin.layers(), strict=True):
            for one, two in zip(ours.integers(), other.integers(), strict=True):
                assert one is two is None or torch.equal(one.cpu(), two)
        with torch.no_grad():
            assert torch.equal(student(images.to("cuda")).cpu(), twin(images))
            with student.cached_integers():
                assert torch.equal(student(images.to("cuda")).cpu(), twin(images))

    def test_self_test(self, geometries: nn.Module, images: Tensor, gpu: str) -> None:
        self_test(made(geometries, images, "cuda"))

    def test_the_calibrated_network_is_that_of_the_cpu(
        self, geometries: nn.Module, images: Tensor, gpu: str
    ) -> None:
        # The thresholds of weights are equal; those of activations follow float convolutions.
        student, twin = (made(geometries, images, device) for device in ("cuda", "cpu"))
        for ours, other in zip(student.layers(), twin.layers(), strict=True):
            scale = ours.weight_quantizer.scale().cpu()
            torch.testing.assert_close(scale, other.weight_quantizer.scale())
        for ours, other in zip(student.thresholds(), twin.thresholds(), strict=True):
            torch.testing.assert_close(ours()[0].cpu(), other()[0], rtol=1e-3, atol=0)

    def test_the_teacher_computes_in_float32(
        self, geometries: nn.Module, images: Tensor, gpu: str
    ) -> None:
        student = made(geometries, images, "cuda")
        exact = copy.deepcopy(student.teacher).cpu().double()(images.double())
        with torch.autocast("cuda", torch.bfloat16):
            logits = student.float_logits(images.to("cuda")).cpu().double()
        error = (logits - exact).square().mean() / exact.square().mean()
        assert 10 * math.log10(1 / error) > 90  # TF32 gives about 50 dB

    def test_the_exported_file(
        self, geometries: nn.Module, images: Tensor, gpu: str, tmp_path: Path
    ) -> None:
        student = made(geometries, images, "cuda")
        fat.fit(student, images.split(4), epochs=1, progress=False)
        report = fat.export_onnx(student, tmp_path / "student.onnx", images.split(4))
        found = fat.evaluate(student, images.split(4))["quantized"]
        assert report["simulation"]["agreement"] == 100.0
        assert report["quantized"]["sqnr_db"] == pytest.approx(found["sqnr_db"], rel=1e-6)


class Watch(pl.Callback):
    """Makes each host read between the third and the last step an error; notes the memory."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == trainer.num_training_batches - 1:
            torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


class TestTraining:
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_steps(self, tiny: nn.Module, images: Tensor, gpu: str, precision: str) -> None:
        student = made(tiny, images, "cuda", bits=4, weights="adaround")
        watchers = [Watch()] if gpu == "real" else []
        result = fat.fit(
            student,
            list(images.to("cuda").split(4)) * 3,
            validation=[images],
            epochs=1,
            progress=False,
            callbacks=watchers,
            bias_correction=False,
            trainer_options={"precision": precision},
        )
        assert result.steps == 12
        assert result.restored == 0
        assert result.best_loss < result.calibrated_loss
        assert student.device.type == "cuda"

    def test_it_learns_what_a_cpu_learns(self, tiny: nn.Module, images: Tensor, gpu: str) -> None:
        losses = []
        for device in ("cpu", "cuda"):
            student = made(tiny, images, device, bits=4)
            result = fat.fit(
                student, images.split(4), validation=[images], epochs=1, progress=False
            )
            losses.append(result.best_loss)
        assert losses[0] == pytest.approx(losses[1], rel=0.1)

    def test_reconstruction(self, tiny: nn.Module, images: Tensor, gpu: str) -> None:
        student = made(tiny, images, "cuda", bits=4, weights="adaround")
        blocks = ReconstructSpec(steps=20, images=16, batch_size=8)
        result = fat.fit(
            student,
            images.split(4),
            validation=[images],
            epochs=0,
            reconstruction=blocks,
            bias_correction=False,
            progress=False,
        )
        assert result.best_loss <= result.calibrated_loss
        assert student.device.type == "cuda"

    @needs_gpu
    def test_memory_of_a_step(self, geometries: nn.Module) -> None:
        images = torch.randn(64, 3, 64, 64, device="cuda")
        student = made(geometries, images, "cuda")
        floats = copy.deepcopy(student.teacher)
        for module in floats.modules():
            for name, tensor in list(module.named_buffers(recurse=False)):
                delattr(module, name)
                setattr(module, name, nn.Parameter(tensor))

        def peak(network: nn.Module) -> int:
            network(images).square().mean().backward()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16):
                loss = network(images).square().mean()
            loss.backward()
            return torch.cuda.max_memory_allocated() - before

        assert peak(student) <= 1.3 * peak(floats)


def test_distilled_images(tiny: nn.Module, images: Tensor, gpu: str) -> None:
    for module in tiny.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network = tiny.train()
    network(1.5 * images.tanh())
    preprocessing = Preprocessing(
        size=(16, 16),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode="center",
    )
    spec = DistillSpec(images=24, coarse_steps=20, steps=40, lr=0.02, smoothness=0.01)
    (found,) = distill(network.eval(), preprocessing, spec, progress=False, device="cuda")
    assert not found.images.is_cuda
    assert found.error < 0.25 * found.error_before
    assert not next(network.parameters()).is_cuda


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep Lightning's hints out of the tests' output."""
    lightning = logging.getLogger("pytorch_lightning")
    level = lightning.level
    lightning.setLevel(logging.ERROR)
    yield
    lightning.setLevel(level)
