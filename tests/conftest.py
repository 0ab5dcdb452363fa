"""Fixtures of all tests: small networks, random images, a sample of ImageNet if there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per worker, and per command it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

DATA = Path(
    os.environ.get("FAT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data/imagenet-sample")
)


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    """Folder with train/<wnid>/*.jpg and val/<wnid>/*.jpg."""
    if not (DATA / "train").is_dir():
        pytest.skip(
            "needs a sample of ImageNet: set FAT_TEST_DATA to a folder with train/ and val/"
        )
    return DATA


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the caches of tests, and of commands that they start, out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def often(examples: int) -> settings:
    """Hypothesis draws the same examples each time, and FAT_EXAMPLES times as many if it is set."""
    return settings(
        max_examples=int(os.environ.get("FAT_EXAMPLES", "1")) * examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


class MobileBlock(nn.Module):
    """Expansion, depthwise, projection with batch norms, and a residual addition."""

    def __init__(self, channels: int, expansion: int = 4, act: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        wide = channels * expansion
        self.conv_pw = nn.Conv2d(channels, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.act1 = act()
        self.conv_dw = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.act2 = act()
        self.conv_pwl = nn.Conv2d(wide, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv_pw(x)))
        y = self.act2(self.bn2(self.conv_dw(y)))
        return x + self.bn3(self.conv_pwl(y))


class TinyNet(nn.Module):
    """A mobile network with a few thousand weights: stem, two blocks, pooling, classifier."""

    def __init__(self, classes: int = 10, act: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.act = act()
        self.blocks = nn.Sequential(MobileBlock(8, act=act), MobileBlock(8, act=act))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act(self.bn(self.stem(x))))
        return self.classifier(torch.flatten(self.pool(x), 1))


def realistic(network: nn.Module, images: Tensor) -> nn.Module:
    """Give batch norms statistics and parameters as training would leave them, then eval mode."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = 0.5 + torch.rand(module.num_features, generator=generator)
            module.bias.data = 0.3 * torch.randn(module.num_features, generator=generator)
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(images)
    return network.eval().requires_grad_(False)


@pytest.fixture
def images() -> Tensor:
    """Sixteen images [16, 3, 16, 16] with some structure."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(16, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=16, mode="bilinear")
    return smooth + 0.2 * torch.randn(16, 3, 16, 16, generator=generator)


@pytest.fixture
def batches(images: Tensor) -> list[Tensor]:
    """The images in four batches."""
    return list(images.split(4))


@pytest.fixture
def tiny(images: Tensor) -> nn.Module:
    """A TinyNet with realistic batch norms, in eval mode."""
    torch.manual_seed(0)
    return realistic(TinyNet(), images)
