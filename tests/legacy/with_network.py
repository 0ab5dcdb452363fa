"""Registers with timm the tiny network that these runs were made of, and runs a script with it.

python with_network.py train.py resume=DIR   or, in a test:   import with_network
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch
from timm.models import is_model, register_model
from torch import Tensor, nn


class Block(nn.Module):
    """Expansion, depthwise, projection with batch norms, and a residual addition."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.conv_pw = nn.Conv2d(channels, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.act1 = nn.ReLU6()
        self.conv_dw = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.act2 = nn.ReLU6()
        self.conv_pwl = nn.Conv2d(wide, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv_pw(x)))
        y = self.act2(self.bn2(self.conv_dw(y)))
        return x + self.bn3(self.conv_pwl(y))


class LegacyTiny(nn.Module):
    """A mobile network of about two thousand weights: stem, two blocks, pooling, classifier."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pretrained_cfg = {
            "input_size": (3, 32, 32),
            "interpolation": "bicubic",
            "crop_pct": 0.95,
            "crop_mode": "center",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "num_classes": 10,
            "first_conv": "conv_stem",
            "classifier": "classifier",
        }
        self.conv_stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act = nn.ReLU6()
        self.blocks = nn.Sequential(Block(8, 32), Block(8, 32))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8, num_classes)
        for module in self.modules():  # as training would leave them, from timm's seeded generator
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act(self.bn1(self.conv_stem(x))))
        return self.classifier(torch.flatten(self.pool(x), 1))


def legacy_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """The network by its timm name."""
    return LegacyTiny(options.get("num_classes") or 10)


if not is_model("legacy_tiny"):
    register_model(legacy_tiny)

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
