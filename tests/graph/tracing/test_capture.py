"""Tracing keeps names and the function, and gives a canonical form."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fat.graph.tracing.capture import layer_name, mark_data, trace
from fat.quant.layers import SameConv2d
from fat.utils.errors import FatError


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def modules_called(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_module"]


class Spelled(nn.Module):
    """Convolution, an activation in some form, convolution."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 4, 1)
        self.activation = activation  # a function: not a submodule

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))


SPELLINGS = {
    "F.relu": (F.relu, nn.ReLU),
    "F.relu in place": (lambda x: F.relu(x, inplace=True), nn.ReLU),
    "F.relu by keyword": (lambda x: F.relu(input=x), nn.ReLU),
    "torch.relu": (torch.relu, nn.ReLU),
    "torch.relu_": (torch.relu_, nn.ReLU),
    "x.relu()": (lambda x: x.relu(), nn.ReLU),
    "x.relu_()": (lambda x: x.relu_(), nn.ReLU),
    "x.clamp(min=0)": (lambda x: x.clamp(min=0), nn.ReLU),
    "torch.clamp(x, 0)": (lambda x: torch.clamp(x, 0), nn.ReLU),
    "F.relu6": (F.relu6, nn.ReLU6),
    "F.relu6 in place": (lambda x: F.relu6(x, inplace=True), nn.ReLU6),
    "F.hardtanh": (lambda x: F.hardtanh(x, 0, 6), nn.Hardtanh),
    "F.hardtanh by keyword": (lambda x: F.hardtanh(x, min_val=0.0, max_val=6.0), nn.Hardtanh),
    "F.hardtanh_": (lambda x: F.hardtanh_(x, 0.0, 6.0), nn.Hardtanh),
    "x.clamp(0, 6)": (lambda x: x.clamp(0, 6), nn.Hardtanh),
    "x.clamp_(0, 6)": (lambda x: x.clamp_(0, 6), nn.Hardtanh),
    "x.clip(0, 6)": (lambda x: x.clip(0, 6), nn.Hardtanh),
    "torch.clamp": (lambda x: torch.clamp(x, min=0, max=6), nn.Hardtanh),
    "bounds as tensors": (lambda x: x.clamp(torch.tensor(0.0), torch.tensor(6.0)), nn.Hardtanh),
    "F.hardswish": (F.hardswish, nn.Hardswish),
    "F.silu in place": (lambda x: F.silu(x, inplace=True), nn.SiLU),
    "F.gelu": (lambda x: F.gelu(x, approximate="tanh"), nn.GELU),
    "F.leaky_relu": (lambda x: F.leaky_relu(x, 0.2), nn.LeakyReLU),
    "x.sigmoid()": (lambda x: x.sigmoid(), nn.Sigmoid),
    "torch.sigmoid": (torch.sigmoid, nn.Sigmoid),
    "x.tanh_()": (lambda x: x.tanh_(), nn.Tanh),
    "F.hardsigmoid": (F.hardsigmoid, nn.Hardsigmoid),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_form_of_an_activation_becomes_a_module(spelling: str) -> None:
    function, kind = SPELLINGS[spelling]
    network = Spelled(function).eval()
    images = 20 * torch.randn(2, 3, 8, 8)  # above 6 and below 0
    expected = network(images)

    traced = trace(network)

    names = modules_called(traced)
    assert [names[0], names[2]] == ["first", "second"]
    activation = traced.get_submodule(names[1])
    assert type(activation) is kind
    if kind is nn.Hardtanh:
        assert (activation.min_val, activation.max_val) == (0.0, 6.0)
    assert [node.op for node in traced.graph.nodes] == [
        "placeholder",
        *["call_module"] * 3,
        "output",
    ]
    torch.testing.assert_close(traced(images), expected, rtol=0, atol=0)


def test_additions_and_multiplications_have_one_form() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.add(x, 1)
            y = y.add(x)
            y += x
            z = torch.mul(y, x)
            return z.mul(x) * 2 + x

    images = torch.randn(1, 3, 4, 4)
    traced = trace(Sums().eval())
    targets = [
        node.target for node in traced.graph.nodes if node.op not in ("placeholder", "output")
    ]
    assert targets == [operator.add] * 3 + [operator.mul] * 3 + [operator.add]
    assert torch.equal(traced(images), Sums()(images))


def test_a_scaled_addition_is_kept() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.add(x, x.abs(), alpha=3)

    images = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(trace(Scaled().eval())(images), images + 3 * images.abs())


@pytest.mark.parametrize("name", ["mobilenetv2_050", "mobilenetv3_small_050", "resnet18"])
def test_names_are_kept_and_the_original_is_unchanged(name: str) -> None:
    network = timm.create_model(name).eval()
    images = torch.randn(2, 3, 64, 64)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    expected = network(images)
    kinds = {key: type(module) for key, module in network.named_modules()}
    inplace = {
        key: module.inplace for key, module in network.named_modules() if hasattr(module, "inplace")
    }

    traced = trace(network)

    theirs = {n for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    ours = {n for n, m in traced.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert ours == theirs
    torch.testing.assert_close(traced(images), expected)
    for parameter in traced.parameters():  # a copy, not a view, of the weights
        parameter.data.zero_()
    assert {key: type(module) for key, module in network.named_modules()} == kinds
    assert all(network.get_submodule(key).inplace == value for key, value in inplace.items())
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(network(images), expected)


def test_a_batch_norm_with_an_activation_becomes_two_modules() -> None:
    network = timm.create_model("mobilenetv2_050").eval()
    traced = trace(network)
    names = modules_called(traced)
    place = names.index("blocks.1.0.bn2")
    assert names[place - 1 : place + 3] == [
        "blocks.1.0.conv_dw",
        "blocks.1.0.bn2",
        "blocks.1.0.bn2_act",
        "blocks.1.0.conv_pwl",
    ]
    assert type(traced.get_submodule("blocks.1.0.bn2")) is nn.BatchNorm2d
    assert type(traced.get_submodule("blocks.1.0.bn2_act")) is nn.ReLU6
    # The projection's batch norm has no activation, and no module for one.
    assert "blocks.1.0.bn3" in names
    assert "blocks.1.0.bn3_act" not in names


def test_no_activation_works_in_place() -> None:
    for name in ("mobilenetv2_050", "mobilenetv3_small_050", "resnet18"):
        traced = trace(timm.create_model(name).eval())
        assert not any(getattr(module, "inplace", False) for module in traced.modules())


@pytest.mark.parametrize("size", [64, 65, 79])
def test_conv2d_same_of_timm_becomes_same_conv2d(size: int) -> None:
    network = timm.create_model("tf_efficientnet_lite0").eval()
    traced = trace(network)
    assert type(traced.get_submodule("conv_stem")) is SameConv2d
    assert type(traced.get_submodule("blocks.0.0.conv_dw")) is nn.Conv2d  # stride 1
    images = torch.randn(1, 3, size, size)  # odd sizes pad differently
    torch.testing.assert_close(traced(images), network(images))


def test_linear_of_timm_becomes_torch_linear() -> None:
    network = timm.create_model("mobilenetv3_small_050").eval()
    assert type(network.classifier) is not nn.Linear
    traced = trace(network)
    assert type(traced.get_submodule("classifier")) is nn.Linear
    assert torch.equal(traced.get_submodule("classifier").weight, network.classifier.weight)


def test_operations_without_effect_at_inference_are_removed() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop, self.idle = nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.idle(self.drop(self.conv(x))), 0.5, self.training)

    network = Idle().eval()
    traced = trace(network)
    assert modules_called(traced) == ["conv"]
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    images = torch.randn(1, 3, 4, 4)
    assert torch.equal(traced(images), network(images))


class Undecided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_an_untraceable_module_is_named() -> None:
    network = nn.Sequential()
    network.add_module("stem", nn.Conv2d(3, 4, 1))
    network.add_module("gate", nn.Sequential(nn.ReLU(), Undecided()))
    with pytest.raises(FatError, match=r"'gate\.1' \(Undecided\) cannot be traced"):
        trace(network.eval())


def test_an_untraceable_network_as_a_whole_is_named() -> None:
    with pytest.raises(FatError, match="the network's own forward"):
        trace(Undecided().eval())


def test_training_mode_is_rejected() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(FatError, match="training mode"):
        trace(network)
    network.eval()
    network[1].train()  # would fold statistics that are not used
    with pytest.raises(FatError, match="training mode"):
        trace(network)


def test_a_convolution_with_other_arithmetic_is_rejected_by_name() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias) + x.mean()

    with pytest.raises(FatError, match="'1' is a Standardized"):
        trace(nn.Sequential(nn.ReLU(), Standardized(3, 4, 1)).eval())


def test_layer_names_of_functions_include_their_owner(tiny: nn.Module, images: Tensor) -> None:
    traced = trace(tiny)
    names = [layer_name(node) for node in traced.graph.nodes if node.op != "output"]
    assert names[:4] == ["input", "stem", "bn", "act"]
    assert [name for name in names if name.endswith("add")] == ["blocks.0.add", "blocks.1.add"]
    assert "flatten" in names


def test_mark_data_distinguishes_tensors_from_sizes() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n, c = x.shape[:2]
            return x.reshape(n, c * 2, -1) + 1

    traced = trace(Sizes().eval())
    mark_data(traced, torch.zeros(2, 4, 4, 4))
    data = {node.name for node in traced.graph.nodes if node.op != "output" and node.meta["data"]}
    assert data == {"x", "reshape", "add"}
    shapes = {node.name: node.meta["shape"] for node in traced.graph.nodes}
    assert shapes["reshape"] == (2, 8, 8)
