"""Properties of small random networks: passes keep the function, files compute the same.

``FAT_EXAMPLES=20 pytest tests/test_properties.py`` draws twenty times as many networks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fat
from fat.graph.passes.batch_norm_folding import fold_batch_norms
from fat.graph.passes.equalization import equalize
from fat.graph.tracing.capture import trace
from fat.quant.metrics import logits_sqnr_db
from tests.conftest import often, realistic

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "clip": lambda: nn.Hardtanh(-1.0, 2.0),
}
GRANULARITIES = ("per_tensor", "per_channel")
SIDE = 12


class Block(nn.Module):
    """What a description says: layers in a chain, or beside a branch that is added, joined, …"""

    def __init__(self, channels: int, how: str, layers: list[dict[str, Any]]) -> None:
        super().__init__()
        self.how = how
        built = []
        out = channels
        for layer in layers:
            part, out = built_layer(out, layer)
            built.append(part)
        self.body = nn.Sequential(*built)
        if how == "add":
            self.match = nn.Conv2d(out, channels, 1)
            out = channels
        elif how == "gate":
            self.gate = nn.Conv2d(out, out, 1)
        elif how == "join":
            out += channels
        self.out_channels = out

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.how == "add":
            return x + self.match(y)
        if self.how == "gate":
            return y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return torch.cat([x, y], 1) if self.how == "join" else y


def built_layer(channels: int, layer: dict[str, Any]) -> tuple[nn.Module, int]:
    groups = {"one": 1, "two": 2, "all": channels}[layer["groups"]]
    out = channels if layer["groups"] == "all" else layer["out"]
    kernel, dilation = layer["kernel"], layer["dilation"]
    reach = dilation * (kernel - 1) // 2
    conv = nn.Conv2d(
        channels, out, kernel, padding=reach, dilation=dilation, groups=groups, bias=layer["bias"]
    )
    norm = {"after": [conv, nn.BatchNorm2d(out)], "before": [nn.BatchNorm2d(channels), conv]}
    parts = norm.get(layer["norm"], [conv])
    return nn.Sequential(*parts, ACTIVATIONS[layer["activation"]]()), out


LAYERS = st.fixed_dictionaries(
    {
        "kernel": st.sampled_from([1, 3, 5]),
        "dilation": st.sampled_from([1, 1, 2]),
        "groups": st.sampled_from(["one", "one", "two", "all"]),
        "out": st.sampled_from([4, 6, 8]),
        "bias": st.booleans(),
        "norm": st.sampled_from(["after", "after", "before", "none"]),
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
    }
)
BLOCKS = st.tuples(
    st.sampled_from(["chain", "add", "join", "gate"]), st.lists(LAYERS, min_size=1, max_size=3)
)
NETWORKS = st.tuples(
    st.integers(0, 2**20),
    st.sampled_from([1, 2]),
    st.lists(BLOCKS, min_size=1, max_size=3),
    st.sampled_from(["none", "max", "average"]),
)


def draw(description: tuple[int, int, list[Any], str]) -> tuple[nn.Module, Tensor]:
    """A network with batch norms as if trained, and images for it."""
    seed, stride, described, pool = description
    torch.manual_seed(seed)
    channels = 4
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, stride, 1), nn.ReLU()]
    for how, parts in described:
        block = Block(channels, how, parts)
        layers.append(block)
        channels = block.out_channels
    layers += {"max": [nn.MaxPool2d(2)], "average": [nn.AvgPool2d(2)]}.get(pool, [])
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]
    images = torch.randn(8, 3, SIDE, SIDE)
    return realistic(nn.Sequential(*layers), images), images


def calibrated(network: nn.Module, images: Tensor, **options: Any) -> fat.Student:
    student = fat.prepare(network, images, fat.QuantSpec(**options))
    fat.calibrate(student, images)
    return student


@often(25)
@given(NETWORKS)
def test_folding_and_equalization_keep_the_function(description: Any) -> None:
    network, images = draw(description)
    expected = network(images)
    graph = trace(network, images)
    report = fold_batch_norms(graph)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert len(report.pairs) + len(report.convolutions) == norms
    assert logits_sqnr_db(expected, graph(images)) > 80
    equalize(graph, [images], fat.QuantSpec(equalize=fat.EqualizeSpec("cross_layer+exact")))
    unseen = torch.randn_like(images) * 1.5
    assert logits_sqnr_db(network(unseen), graph(unseen)) > 70


@often(10)
@given(NETWORKS, st.sampled_from(GRANULARITIES), st.sampled_from([8, 6, 4]))
def test_a_student_comes_back_as_it_was(description: Any, granularity: str, bits: int) -> None:
    network, images = draw(description)
    student = calibrated(network, images, granularity=granularity, bits=bits)
    with tempfile.TemporaryDirectory() as folder:
        fat.save(student, Path(folder) / "student.safetensors")
        loaded = fat.load(Path(folder) / "student.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))
        assert torch.equal(loaded.float_logits(images), student.float_logits(images))


@often(3)
@given(
    NETWORKS,
    st.sampled_from(["asymmetric", "symmetric"]),
    st.sampled_from(["per_channel", "per_tensor"]),
)
def test_the_file_computes_the_same(description: Any, scheme: str, granularity: str) -> None:
    network, images = draw(description)
    student = calibrated(network, images, scheme=scheme, granularity=granularity)
    with tempfile.TemporaryDirectory() as folder:
        report = fat.export_onnx(student, Path(folder) / "student.onnx", images)
    assert report["kernels"]["integer_layers"] == len(student.layers())
    assert report["layers"]["worst"] is None or report["layers"]["worst"]["steps"] == 1
