"""Predicates on nodes, compared with the effect of the operation on values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fat.graph.patterns import (
    activation_cap,
    is_compute,
    is_fused_activation,
    is_value_preserving,
    module_of,
    non_negative,
    only_user,
    source,
)
from fat.graph.tracing.capture import trace


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function = (function,)
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function[0](x, *self.parts) if len(self.parts) else self.function[0](x)


def last_node(
    function: Callable[..., Tensor], *modules: nn.Module
) -> tuple[fx.GraphModule, fx.Node]:
    graph = trace(Apply(function, *modules).eval())
    return graph, list(graph.graph.nodes)[-2]


PRESERVING = {
    "flatten": lambda x: torch.flatten(x, 1),
    "x.flatten": lambda x: x.flatten(2),
    "reshape": lambda x: x.reshape(2, -1),
    "view": lambda x: x.view(2, -1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: torch.transpose(x, 1, 2),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "slice": lambda x: x[:, 1:3],
    "chunk": lambda x: x.chunk(2, dim=1)[1],
    "max pool": lambda x: F.max_pool2d(x, 2),
    "zero pad": lambda x: F.pad(x, (1, 1, 0, 2)),
    "zero pad, said": lambda x: F.pad(x, (1, 1), mode="constant", value=0),
}
CHANGING = {
    "pad with one": lambda x: F.pad(x, (1, 1), value=1.0),
    "pad with one, by place": lambda x: F.pad(x, (1, 1), "constant", 1.0),
    "average": lambda x: F.avg_pool2d(x, 2),
    "mean": lambda x: x.mean((2, 3)),
    "add": lambda x: x + x,
    "mul": lambda x: x * 0.5,
    "cat": lambda x: torch.cat([x, x + 1], 1),
    "relu": F.relu,
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
}


@pytest.mark.parametrize("name", PRESERVING)
def test_value_preserving_operations(name: str) -> None:
    graph, node = last_node(PRESERVING[name])
    assert is_value_preserving(graph, node)
    images = torch.randn(2, 4, 4, 4)
    came = {*images.flatten().tolist(), 0.0}
    assert set(graph(images).flatten().tolist()) <= came


@pytest.mark.parametrize("name", CHANGING)
def test_operations_that_compute(name: str) -> None:
    graph, node = last_node(CHANGING[name])
    assert not is_value_preserving(graph, node)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.MaxPool2d(2), True),
        (nn.Flatten(), True),
        (nn.ZeroPad2d(1), True),
        (nn.ConstantPad2d(1, 0), True),
        (nn.ConstantPad2d(1, 2.0), False),
        (nn.ReflectionPad2d(1), True),
        (nn.AvgPool2d(2), False),
        (nn.Conv2d(4, 4, 1), False),
        (nn.PixelShuffle(2), True),
        (nn.Hardswish(), False),
        (nn.AdaptiveMaxPool2d(1), True),
    ],
)
def test_value_preserving_modules(layer: nn.Module, expected: bool) -> None:
    graph, node = last_node(lambda x, layer: layer(x), layer)
    assert is_value_preserving(graph, node) is expected
    images = torch.randn(2, 4, 4, 4)
    if expected:
        assert set(graph(images).flatten().tolist()) <= {*images.flatten().tolist(), 0.0}


NON_NEGATIVE = {
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "clamp": lambda x: x.clamp(0, 3),
    "mean of relu": lambda x: F.relu(x).mean((2, 3)),
    "torch.mean of relu": lambda x: torch.mean(F.relu(x), 1),
    "average of relu": lambda x: F.avg_pool2d(F.relu(x), 2),
    "max pool and flatten of relu": lambda x: F.max_pool2d(F.relu(x), 2).flatten(1),
    "product of relu and sigmoid": lambda x: F.relu(x) * torch.sigmoid(x),
    "sum of relus": lambda x: F.relu(x) + F.relu6(x),
    "half a relu": lambda x: F.relu(x) * 0.5,
    "cat of relus": lambda x: torch.cat([F.relu(x), torch.sigmoid(x)], 1),
}
SIGNED = {
    "input": lambda x: x.flatten(1),
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "tanh": torch.tanh,
    "symmetric clamp": lambda x: x.clamp(-1, 1),
    "mean": lambda x: x.mean((2, 3)),
    "relu minus": lambda x: F.relu(x) - 1,
    "relu plus a negative": lambda x: F.relu(x) + (-1),
    "relu plus input": lambda x: F.relu(x) + x,
    "sigmoid times input": lambda x: torch.sigmoid(x) * x,
    "negative times relu": lambda x: F.relu(x) * -0.5,
    "cat with input": lambda x: torch.cat([F.relu(x), x], 1),
}


@pytest.mark.parametrize("name", NON_NEGATIVE)
def test_non_negative_results(name: str) -> None:
    graph, node = last_node(NON_NEGATIVE[name])
    assert non_negative(graph, node)
    assert float(graph(10 * torch.randn(2, 4, 8, 8)).min()) >= 0


@pytest.mark.parametrize("name", SIGNED)
def test_results_that_may_be_negative(name: str) -> None:
    graph, node = last_node(SIGNED[name])
    assert float(graph(10 * torch.randn(2, 4, 8, 8)).min()) < 0
    assert not non_negative(graph, node)


def test_fused_activations_need_a_computing_operation_that_they_alone_read() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.on_input, self.alone, self.beside = nn.ReLU(), nn.ReLU6(), nn.ReLU()
            self.after_flatten, self.swish, self.after_sum = nn.ReLU(), nn.SiLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.alone(self.a(self.on_input(x)))
            z = self.b(y)
            s = self.after_sum(z + self.beside(z))
            return self.after_flatten(self.swish(s).flatten(1))

    graph = trace(Net().eval())
    fused = [str(node.target) for node in graph.graph.nodes if is_fused_activation(graph, node)]
    assert fused == ["alone", "after_sum"]
    assert [str(n.target) for n in graph.graph.nodes if is_compute(graph, n)] == ["a", "b"]


def test_neighbors_of_a_node(tiny: nn.Module) -> None:
    graph = trace(tiny)
    nodes = {str(node.target): node for node in graph.graph.nodes}
    assert only_user(nodes["stem"]) is nodes["bn"]
    assert only_user(nodes["act"]) is None  # the block's first layer and its addition
    assert source(nodes["bn"]) is nodes["stem"]
    assert source(nodes["x"]) is None
    assert module_of(graph, nodes["stem"]) is graph.get_submodule("stem")
    assert module_of(graph, nodes["x"]) is None


def test_activation_cap() -> None:
    assert activation_cap(nn.ReLU6()) == 6.0
    assert activation_cap(nn.Hardtanh(0.0, 4.0)) == 4.0
    assert activation_cap(nn.ReLU()) is None
    assert activation_cap(None) is None
