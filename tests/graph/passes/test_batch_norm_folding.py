"""Folding: pairs by name, weights against the float64 closed form, equal outputs."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fat.graph.passes.batch_norm_folding import (
    find_foldable,
    fold_batch_norms,
    folded,
    folded_into_next,
)
from fat.graph.tracing.capture import trace
from fat.quant.metrics import logits_sqnr_db
from fat.utils.errors import FatError
from tests.conftest import realistic

TINY_PAIRS = (
    ("bn", "stem"),
    ("blocks.0.bn1", "blocks.0.conv_pw"),
    ("blocks.0.bn2", "blocks.0.conv_dw"),
    ("blocks.0.bn3", "blocks.0.conv_pwl"),
    ("blocks.1.bn1", "blocks.1.conv_pw"),
    ("blocks.1.bn2", "blocks.1.conv_dw"),
    ("blocks.1.bn3", "blocks.1.conv_pwl"),
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def norms_left(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, _BatchNorm)]


def test_pairs_weights_and_outputs_of_a_mobile_network(tiny: nn.Module, images: Tensor) -> None:
    graph = trace(tiny)
    expected = copy.deepcopy(tiny).double()(images.double())
    found = [(str(norm.target), str(layer.target)) for layer, norm in find_foldable(graph)]
    assert tuple(found) == TINY_PAIRS

    report = fold_batch_norms(graph)

    assert report.pairs == TINY_PAIRS
    assert norms_left(graph) == []
    for norm_name, layer_name in TINY_PAIRS:
        norm, before = tiny.get_submodule(norm_name), tiny.get_submodule(layer_name)
        after = graph.get_submodule(layer_name)
        sigma = (norm.running_var.double() + norm.eps).sqrt()
        factor = (norm.weight.double() / sigma).reshape(-1, 1, 1, 1)
        weight = before.weight.double() * factor
        bias = norm.bias.double() - norm.running_mean.double() * factor.flatten()
        torch.testing.assert_close(after.weight.double(), weight, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(after.bias.double(), bias, rtol=1e-6, atol=1e-8)
        assert not torch.equal(after.weight, before.weight)
    assert torch.equal(graph.get_submodule("classifier").weight, tiny.classifier.weight)
    assert logits_sqnr_db(expected, graph(images)) > 100


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.booleans(),
    st.booleans(),
    st.floats(1e-6, 1e-1),
    st.sampled_from(["conv", "linear"]),
)
def test_the_closed_form_is_the_layer_and_its_norm(
    seed: int, with_bias: bool, affine: bool, eps: float, kind: str
) -> None:
    torch.manual_seed(seed)
    if kind == "conv":
        layer: nn.Module = nn.Conv2d(3, 5, 3, bias=with_bias)
        norm: _BatchNorm = nn.BatchNorm2d(5, eps=eps, affine=affine)
        x = torch.randn(2, 3, 6, 6)
    else:
        layer, norm = nn.Linear(7, 5, bias=with_bias), nn.BatchNorm1d(5, eps=eps, affine=affine)
        x = torch.randn(4, 7)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.01, 4)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    both = nn.Sequential(layer, norm).eval()
    expected = copy.deepcopy(both).double()(x.double())

    weight, bias = folded(layer.weight, layer.bias, norm)

    assert weight.dtype == bias.dtype == torch.float32
    assert weight.shape == layer.weight.shape
    operation = torch.conv2d if kind == "conv" else torch.nn.functional.linear
    got = operation(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_convolution_with_bias_and_a_linear_layer_are_folded() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=True),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 6),
        nn.BatchNorm1d(6),
    )
    images = 3 + torch.randn(16, 3, 8, 8)
    network.train()
    for _ in range(5):
        network(images)
    network.eval()
    graph = trace(network)
    report = fold_batch_norms(graph)
    assert report.pairs == (("1", "0"), ("5", "4"))
    assert norms_left(graph) == []
    assert not torch.equal(graph.get_submodule("0").bias, network[0].bias)
    assert logits_sqnr_db(network(images), graph(images)) > 100


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv2_050",
        "mnasnet_small",
        "mobilenetv3_small_050",
        "tf_efficientnet_lite0",
        "resnet18",
        "mobilenetv4_conv_small",
    ],
)
def test_timm_networks_keep_their_function(name: str) -> None:
    images = torch.randn(4, 3, 64, 64)
    network = realistic(timm.create_model(name), images)
    graph = trace(network)
    report = fold_batch_norms(graph)
    assert {norm for norm, _ in report.pairs} == set(norms_left(network))
    assert norms_left(graph) == []
    assert logits_sqnr_db(network(images), graph(images)) > 80


def test_a_norm_without_a_neighboring_layer_becomes_a_convolution() -> None:
    images = torch.randn(4, 3, 8, 8)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    network = realistic(network, images)
    graph = trace(network)
    report = fold_batch_norms(graph)
    assert (report.pairs, report.convolutions) == ((), ("2",))
    layer = graph.get_submodule("2")
    assert isinstance(layer, nn.Conv2d)
    assert (layer.groups, layer.kernel_size) == (4, (1, 1))
    assert logits_sqnr_db(network(images), graph(images)) > 100


def test_a_layer_with_other_readers_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + self.norm(y)

    graph = trace(Shared().eval())
    assert find_foldable(graph) == []
    assert fold_batch_norms(graph).convolutions == ("norm",)


def test_a_convolution_used_twice_is_folded_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.conv(self.one(self.conv(x))))

    images = torch.randn(4, 3, 8, 8)
    network = realistic(Twice(), images)
    graph = trace(network)
    assert fold_batch_norms(graph).pairs == (("one", "conv"), ("two", "conv_1"))
    assert logits_sqnr_db(network(images), graph(images)) > 100


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([1, 2, 3, 6]))
def test_the_closed_form_is_the_norm_and_the_layer_after_it(
    seed: int, with_bias: bool, groups: int
) -> None:
    torch.manual_seed(seed)
    norm, layer = nn.BatchNorm2d(6), nn.Conv2d(6, 12, 3, groups=groups, bias=with_bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.01, 4)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    expected = copy.deepcopy(nn.Sequential(norm, layer)).double().eval()(x)
    weight, bias = folded_into_next(layer.weight, layer.bias, norm, groups)
    got = torch.conv2d(x, weight.double(), bias.double(), groups=groups)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_one_norm_after_two_convolutions_is_folded_into_both() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.a(x)) + self.norm(self.b(x))

    images = torch.randn(4, 3, 8, 8)
    network = realistic(Both(), images)
    graph = trace(network)
    assert fold_batch_norms(graph).pairs == (("norm", "a"), ("norm_1", "b"))
    assert logits_sqnr_db(network(images), graph(images)) > 100


def test_a_norm_without_running_statistics_is_named() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(FatError, match="'1' has no running statistics"):
        fold_batch_norms(trace(network.eval()))
