"""Calibrated students of small networks with all kinds of operations, and their ONNX files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fat
from fat import QuantSpec, Student
from fat.export.base import Program
from fat.export.lowering import lower
from fat.export.onnx import Onnx, OnnxRuntime
from fat.export.verify import check_kernels, compare, compare_layers
from fat.quant.layers import ChannelClip
from tests.conftest import TinyNet, realistic

SCHEMES = [
    QuantSpec(granularity=granularity, scheme=scheme)
    for granularity, scheme in itertools.product(
        ("per_tensor", "per_channel"), ("asymmetric", "symmetric")
    )
]
NAMES = [f"{spec.granularity}-{spec.scheme}" for spec in SCHEMES]


def structured(count: int, size: int, seed: int = 0) -> Tensor:
    """Images [N, 3, size, size] with some structure."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 4, size // 4, generator=generator)
    smooth = F.interpolate(coarse, size=size, mode="bilinear")
    return smooth + 0.2 * torch.randn(count, 3, size, size, generator=generator)


def student_of(
    network: nn.Module | str, spec: QuantSpec | None = None, *, size: int = 32, count: int = 16
) -> Student:
    """A calibrated student of a network, or of one of timm's with random weights."""
    torch.manual_seed(0)
    images = structured(count, size)
    if isinstance(network, str):
        network = timm.create_model(network, num_classes=10)
    realistic(network, images)
    student = fat.prepare(network, images, spec or QuantSpec())
    fat.calibrate(student, images.split(8))
    student.origin = {
        "name": type(network).__name__,
        "num_classes": 10,
        "preprocessing": {
            "size": [size, size],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
        },
    }
    return student


def tiny_student(spec: QuantSpec | None = None, act: type[nn.Module] = nn.ReLU6) -> Student:
    """A student of a TinyNet: convolutions, ReLU6, sums, pooling and a linear layer."""
    torch.manual_seed(0)
    return student_of(TinyNet(act=act), spec, size=16)


class ClipAtOne(nn.Hardtanh):
    """A ReLU6 with the bound 1, which the activations of these networks reach."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0)


def clipped_student(**options: Any) -> Student:
    """A student of a TinyNet with per-channel clips, which ``exact`` equalization creates."""
    spec = QuantSpec(granularity="per_tensor", equalize=fat.EqualizeSpec("exact"), **options)
    student = tiny_student(spec, act=ClipAtOne)
    clips = [q for q in student.activation_quantizers() if isinstance(q.activation, ChannelClip)]
    assert len(clips) > 1
    return student


class Heads(nn.Module):
    """A layer, a softmax and another layer, as in talking-heads attention."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(3 * self.before(x).softmax(1)).mean((2, 3))


class Everything(nn.Module):
    """All operations between layers: asymmetric padding, sums, products, pools, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # reproducible weights
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.right = nn.Conv2d(8, 8, (1, 4), padding="same")
        self.gate = nn.Conv2d(8, 8, 1)
        self.mix = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        a, b = F.relu6(self.left(x)), self.right(x)
        gate = F.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = torch.cat([(a + b) * gate, F.hardswish(b)], 1)
        x = F.max_pool2d(x, 3, 2, 1)
        x = F.silu(self.mix(x)) + F.leaky_relu(x, 0.1)
        x = F.avg_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


def written(
    student: Student,
    folder: Path,
    target: Onnx | None = None,
    metadata: dict[str, str] | None = None,
) -> tuple[Path, Program]:
    """Write the file of a student; return it with its program."""
    target = target or Onnx()
    size = student.origin["preprocessing"]["size"][0]
    example = structured(2, size)
    lowered = lower(student, example, target.style)
    program = Program(
        lowered.network, example, lowered.tensors, lowered.weight_bits, metadata or {}
    )
    path = folder / "student.onnx"
    target.write(program, path)
    return path, program


def check_equal(student: Student, folder: Path, target: Onnx | None = None) -> OnnxRuntime:
    """Assert that integers and logits of the file equal the student's on new images."""
    target = target or Onnx()
    path, program = written(student, folder, target)
    size = student.origin["preprocessing"]["size"][0]
    images = structured(8, size, seed=5)
    runtime = OnnxRuntime(path)
    check_kernels(runtime.kernels(), student)
    target.write_with_integers(program, path, folder / "tapped.onnx")
    differences = compare_layers(
        student, OnnxRuntime(folder / "tapped.onnx"), program.tensors, images
    )
    assert len(differences) == len(student.activation_quantizers())
    assert [entry for entry in differences if entry.steps] == []
    figures = compare(student, runtime, images.split(4))
    assert figures["simulation"] == {"agreement": 100.0, "sqnr_db": 200.0, "largest_step": 0.0}
    return runtime
