"""Quantize your own nn.Module with images from any iterable of batches.

python examples/own_module.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fat


class Residual(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images of features [N, C, H, W] to the same."""
        return x + self.second(torch.relu(self.norm(self.first(x))))


class OwnNetwork(nn.Module):
    """Images [N, 3, H, W] to logits [N, classes]: any network that torch.fx can trace works."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Residual(16), nn.ReLU6(), Residual(16), nn.ReLU6())
        self.head = nn.Linear(16, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class Patterns(Dataset[Tensor]):
    """A stand-in for your own data: smooth random images, prepared for the network."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> Tensor:
        noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(index))
        return nn.functional.interpolate(noise, size=32, mode="bilinear")[0]


def main() -> None:
    """Quantize to 8-bit activations and 4-bit weights, train, export."""
    parser = argparse.ArgumentParser(description="Quantize your own nn.Module.")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the images")
    parser.add_argument("--out", type=Path, default=Path("own.onnx"))
    options = parser.parse_args()
    torch.manual_seed(0)
    network = OwnNetwork().eval()  # load your trained weights here
    batches = list(DataLoader(Patterns(), batch_size=32))
    train, held_out = batches[:6], batches[6:]

    student = fat.prepare(network, train[0], fat.QuantSpec(weight_bits=4, weights="adaround"))
    fat.calibrate(student, train)
    print("calibrated:", fat.evaluate(student, held_out)["quantized"])
    fat.fit(student, train, epochs=options.epochs, progress=False)
    print("trained:   ", fat.evaluate(student, held_out)["quantized"])
    fat.export_onnx(student, options.out, held_out)
    print("verified:  ", options.out)


if __name__ == "__main__":
    main()
