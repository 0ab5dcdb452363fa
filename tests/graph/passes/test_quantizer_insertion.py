"""Positions of quantizers by layer name, and their grids."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fat.graph.passes.batch_norm_folding import fold_batch_norms
from fat.graph.passes.quantizer_insertion import (
    QUANTIZERS,
    InsertReport,
    insert_quantizers,
    link_inputs,
)
from fat.graph.patterns import module_of, source
from fat.graph.tracing.capture import trace
from fat.quant.config import QuantSpec
from fat.quant.quantized_layers import QuantConv2d, QuantLayer, QuantLinear
from fat.quant.quantizers import ActivationQuantizer
from fat.utils.errors import FatError
from tests.conftest import TinyNet

SYMMETRIC = QuantSpec(scheme="symmetric")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inserted(
    network: nn.Module, example: Tensor, spec: QuantSpec = SYMMETRIC
) -> tuple[fx.GraphModule, InsertReport]:
    graph = trace(network.eval())
    fold_batch_norms(graph)
    return graph, insert_quantizers(graph, spec, example)


def quantizer_table(graph: fx.GraphModule) -> dict[str, ActivationQuantizer]:
    """Return the activation quantizers by key, in graph order."""
    return dict(graph.get_submodule(QUANTIZERS).named_children())  # type: ignore[arg-type]


def places(graph: fx.GraphModule) -> list[str]:
    return [quantizer.layer for quantizer in quantizer_table(graph).values()]


def grids(graph: fx.GraphModule) -> dict[str, tuple[int, str]]:
    return {q.layer: (q.grid.bits, q.grid.kind) for q in quantizer_table(graph).values()}


def what_runs_between(graph: fx.GraphModule, name: str) -> list[str]:
    """Return the chain of modules from the layer on."""
    nodes = {str(node.target): node for node in graph.graph.nodes}
    node, found = nodes[name], []
    while len(node.users) == 1 and (node := next(iter(node.users))).op == "call_module":
        found.append(type(module_of(graph, node)).__name__)
    return found


TINY_PLACES = [
    "input",
    "act",
    "blocks.0.act1",
    "blocks.0.act2",
    "blocks.0.conv_pwl",
    "blocks.0.add",
    "blocks.1.act1",
    "blocks.1.act2",
    "blocks.1.conv_pwl",
    "blocks.1.add",
    "pool",
    "classifier",
]


def test_places_in_a_mobile_network(tiny: nn.Module, images: Tensor) -> None:
    graph, report = inserted(tiny, images)
    assert places(graph) == TINY_PLACES
    assert report.activations == tuple(name.replace(".", "_") for name in TINY_PLACES)
    assert report.layers == (
        "stem",
        "blocks.0.conv_pw",
        "blocks.0.conv_dw",
        "blocks.0.conv_pwl",
        "blocks.1.conv_pw",
        "blocks.1.conv_dw",
        "blocks.1.conv_pwl",
        "classifier",
    )
    for name in report.layers:
        kind = QuantLinear if name == "classifier" else QuantConv2d
        assert type(graph.get_submodule(name)) is kind
        assert graph.get_submodule(name).layer == name
    assert what_runs_between(graph, "stem")[0] == "ActivationQuantizer"
    assert isinstance(quantizer_table(graph)["act"].activation, nn.ReLU6)


def test_bias_grid_matches_the_grid_of_the_layers_input(tiny: nn.Module, images: Tensor) -> None:
    graph, report = inserted(tiny, images, QuantSpec(bits=4, scheme="symmetric"))
    seen: dict[str, Tensor] = {}
    for name in report.layers:
        graph.get_submodule(name).register_forward_hook(
            lambda layer, inputs, _: seen.update({layer.layer: inputs[0]})
        )
    logits = graph(images)
    for name in report.layers:
        quantizer = graph.get_submodule(name).input_quantizer
        steps = seen[name].double() / float(quantizer.thresholds()[0].detach())
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
        assert float(steps.detach().abs().max()) <= quantizer.grid.qmax + 1e-5
        assert steps.unique().numel() > 1
    last = quantizer_table(graph)["classifier"]
    steps = logits.double() / float(last.thresholds()[0].detach())
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)


def test_weights_biases_and_geometry_are_copied(images: Tensor) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=(1, 2), dilation=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4, bias=False),
        nn.Flatten(),
        nn.Linear(8 * 5 * 6, 4),
    )
    graph, _ = inserted(network, images)
    first, second = graph.get_submodule("0"), graph.get_submodule("2")
    assert (first.stride, first.padding, first.dilation, first.groups) == (
        (2, 2),
        (1, 2),
        (2, 2),
        1,
    )
    assert (second.groups, second.bias) == (4, None)
    assert torch.equal(first.weight, network[0].weight)
    assert torch.equal(first.bias, network[0].bias)
    for module in graph.modules():
        if hasattr(module, "enabled"):
            module.enabled = False
    torch.testing.assert_close(graph(images), network(images))


@pytest.mark.parametrize("name", ["mobilenetv2_050", "mnasnet_small", "tf_efficientnet_lite0"])
def test_no_quantizer_between_a_convolution_and_its_clip(name: str) -> None:
    network = timm.create_model(name)
    graph, _ = inserted(network, torch.zeros(1, 3, 64, 64))
    clips = 0
    for node in graph.graph.nodes:
        quantizer = module_of(graph, node)
        assert not isinstance(quantizer, (nn.ReLU, nn.ReLU6)), "left to compute in float"
        if isinstance(quantizer, ActivationQuantizer) and quantizer.activation is not None:
            clips += 1
            assert isinstance(module_of(graph, source(node)), QuantConv2d)
            assert quantizer.grid.kind == "symmetric_unsigned"
    assert clips == sum(isinstance(m, (nn.ReLU, nn.ReLU6)) for m in network.modules())
    here = places(graph)
    assert "bn1.act" not in here
    assert {"bn1_act", "blocks.1.0.bn1_act", "blocks.1.0.bn2_act", "blocks.1.0.conv_pwl"} <= set(
        here
    )
    assert not {"conv_stem", "blocks.1.0.conv_pw", "blocks.1.0.conv_dw"} & set(here)


def test_places_in_timms_mobilenetv2() -> None:
    network = timm.create_model("mobilenetv2_050")
    graph, _ = inserted(network, torch.zeros(1, 3, 64, 64))
    here = places(graph)
    assert here[:4] == ["input", "bn1_act", "blocks.0.0.bn1_act", "blocks.0.0.conv_pw"]
    assert here[-3:] == ["bn2_act", "global_pool.pool", "classifier"]
    # One addition for each block that keeps its resolution and width.
    residual = [n for n, m in network.named_modules() if getattr(m, "has_skip", False)]
    assert [name for name in here if name.endswith(".add")] == [f"{name}.add" for name in residual]
    assert len(residual) > 5
    assert not any("flatten" in name for name in here)


def test_other_activations_are_separate_operations_in_mobilenetv3() -> None:
    graph, _ = inserted(timm.create_model("mobilenetv3_small_050"), torch.zeros(1, 3, 64, 64))
    here = places(graph)
    assert here[:3] == ["input", "conv_stem", "bn1_act"]
    assert isinstance(graph.get_submodule("bn1_act"), nn.Hardswish)
    assert what_runs_between(graph, "conv_stem")[:3] == [
        "ActivationQuantizer",
        "Hardswish",
        "ActivationQuantizer",
    ]
    # ReLU in the first block is fused, hard-swish from the third on is not.
    assert "blocks.1.0.conv_pw" not in here
    assert {"blocks.2.0.conv_pw", "blocks.2.0.bn1_act", "blocks.2.0.conv_dw"} <= set(here)
    # The squeeze: its mean, its two convolutions (the first with its ReLU), its gate, its product.
    se = [name.removeprefix("blocks.2.0.se.") for name in here if name.startswith("blocks.2.0.se.")]
    assert se == ["mean", "act1", "conv_expand", "gate", "mul"]
    assert {"blocks.1.1.add", "global_pool.pool", "act2", "classifier"} <= set(here)


def test_max_pools_keep_their_grid_in_a_resnet() -> None:
    network = timm.create_model("resnet18")
    graph, _ = inserted(network, torch.zeros(1, 3, 64, 64))
    here = places(graph)
    assert "maxpool" not in here
    # The addition is clipped by a ReLU that follows it: one operation.
    assert {"layer1.0.act1", "layer1.0.conv2", "layer1.0.act2", "layer2.0.downsample.0"} <= set(
        here
    )
    assert not any(name.endswith("add") for name in here)
    # Biases after the max-pool are on the grid of its input.
    assert graph.get_submodule("layer1.0.conv1").input_quantizer.layer == "act1"
    assert graph.get_submodule("fc").input_quantizer.layer == "global_pool.pool"
    assert graph.get_submodule("layer2.0.downsample.0").input_quantizer.layer == "layer1.1.act2"


class Mixture(nn.Module):
    """Sizes, slices, pads, concatenation, products and a pool, around two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(6, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, _ = x.shape
        y = self.a(F.pad(x, (1, 1, 1, 1)))
        left, right = y.chunk(2, dim=1)
        z = torch.cat([left, left * torch.sigmoid(right), right], 1)
        z = F.relu(self.b(z)) + h // c
        z = F.avg_pool2d(F.max_pool2d(z, 2), (h // 2, h // 2))
        return self.out(z.reshape(n, -1))


def test_only_computed_data_is_quantized(images: Tensor) -> None:
    graph, report = inserted(Mixture(), images)
    assert places(graph) == [
        "input",
        "a",
        "sigmoid",
        "mul",
        "cat",
        "relu",
        "add",
        "avg_pool2d",
        "out",
    ]
    assert report.layers == ("a", "b", "out")
    assert graph.get_submodule("a").input_quantizer.layer == "input"
    assert graph.get_submodule("b").input_quantizer.layer == "cat"
    assert graph.get_submodule("out").input_quantizer.layer == "avg_pool2d"
    kinds = {name: kind for name, (_, kind) in grids(graph).items()}
    assert kinds == {
        "input": "symmetric",
        "a": "symmetric",
        "sigmoid": "symmetric_unsigned",
        "mul": "symmetric",
        "cat": "symmetric",
        "relu": "symmetric_unsigned",
        "add": "symmetric",
        "avg_pool2d": "symmetric",
        "out": "symmetric",
    }


def test_grids_follow_the_sign_of_the_values(tiny: nn.Module, images: Tensor) -> None:
    unsigned = {"act", "blocks.0.act1", "blocks.0.act2", "blocks.1.act1", "blocks.1.act2"}
    for scheme, other in (("symmetric", "symmetric"), ("asymmetric", "affine")):
        graph, _ = inserted(tiny, images, QuantSpec(scheme=scheme))
        assert grids(graph) == {
            name: (8, "symmetric_unsigned" if name in unsigned else other) for name in TINY_PLACES
        }
        for layer in ("stem", "classifier"):
            assert graph.get_submodule(layer).weight_quantizer.grid.kind == "symmetric"


def test_averages_and_products_of_non_negative_values_are_unsigned() -> None:
    graph, _ = inserted(timm.create_model("mnasnet_small"), torch.zeros(1, 3, 64, 64))
    kinds = {name: kind for name, (_, kind) in grids(graph).items()}
    assert kinds["bn2_act"] == kinds["global_pool.pool"] == "symmetric_unsigned"
    for part in ("mean", "act1", "gate", "mul"):
        assert kinds[f"blocks.3.0.se.{part}"] == "symmetric_unsigned"
    assert kinds["blocks.3.0.se.conv_expand"] == kinds["blocks.0.0.add"] == "symmetric"


def test_first_and_last_layers_have_their_own_bits(tiny: nn.Module, images: Tensor) -> None:
    spec = QuantSpec(bits=4, activation_bits=5, first_bits=7, last_bits=6)
    graph, _ = inserted(tiny, images, spec)
    weights = {
        name: module.weight_quantizer.grid.bits
        for name, module in graph.named_modules()
        if isinstance(module, QuantLayer)
    }
    assert weights.pop("stem") == 7
    assert weights.pop("classifier") == 6
    assert set(weights.values()) == {4}
    bits = {name: bits for name, (bits, _) in grids(graph).items()}
    assert bits.pop("input") == 7
    assert bits.pop("pool") == 6  # the last layer's input, through the flattening
    assert set(bits.values()) == {5}


def test_one_layer_alone_is_first_and_last(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    graph, _ = inserted(network, images, QuantSpec(bits=4, first_bits=7))
    assert graph.get_submodule("0").weight_quantizer.grid.bits == 7
    assert grids(graph)["input"][0] == 7
    graph, _ = inserted(network, images, QuantSpec(bits=4, first_bits=7, last_bits=6))
    assert graph.get_submodule("0").weight_quantizer.grid.bits == 6
    assert grids(graph)["input"][0] == 6


def test_input_quantizers_are_those_the_graph_shows(tiny: nn.Module, images: Tensor) -> None:
    graph, _ = inserted(tiny, images)
    reads = {
        name: module.input_quantizer.layer
        for name, module in graph.named_modules()
        if isinstance(module, QuantLayer)
    }
    assert reads == {
        "stem": "input",
        "blocks.0.conv_pw": "act",
        "blocks.0.conv_dw": "blocks.0.act1",
        "blocks.0.conv_pwl": "blocks.0.act2",
        "blocks.1.conv_pw": "blocks.0.add",
        "blocks.1.conv_dw": "blocks.1.act1",
        "blocks.1.conv_pwl": "blocks.1.act2",
        "classifier": "pool",
    }
    # Identity: the module whose step the bias needs.
    assert graph.get_submodule("classifier").input_quantizer is graph.get_submodule(
        f"{QUANTIZERS}.pool"
    )


def test_an_activation_of_the_input_keeps_the_inputs_grid(images: Tensor) -> None:
    graph, _ = inserted(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten()), images)
    assert grids(graph) == {
        "input": (8, "symmetric"),
        "0": (8, "symmetric_unsigned"),
        "1": (8, "symmetric"),
    }


def test_a_network_without_layers_is_rejected(images: Tensor) -> None:
    with pytest.raises(FatError, match="no convolution or linear layer"):
        inserted(nn.Sequential(nn.ReLU(), nn.Flatten()), images)


def test_a_layer_used_twice_becomes_two_with_separate_thresholds(images: Tensor) -> None:
    shared = nn.Conv2d(3, 3, 1)
    graph, report = inserted(nn.Sequential(shared, nn.ReLU(), shared), images)
    assert report.layers == ("0", "0_1")
    first, second = graph.get_submodule("0"), graph.get_submodule("0_1")
    assert torch.equal(first.weight, second.weight)
    assert first.input_quantizer is not second.input_quantizer


def test_padding_by_reflection_moves_values(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))
    graph, report = inserted(network, images)
    assert report.activations == ("input", "0")  # none on the padded image
    layer = graph.get_submodule("0")
    assert layer.padding == (0, 0)
    assert layer.input_quantizer is graph.get_submodule(f"{QUANTIZERS}.input")


def test_names_with_dots_do_not_collide(images: Tensor) -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 3, 1))
            self.a_0 = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a_0(self.a(x))

    graph, report = inserted(Names(), images)
    assert report.activations == ("input", "a_0", "a_0_1")
    assert places(graph) == ["input", "a.0", "a_0"]


def test_relu_and_relu6_get_the_same_quantizers(images: Tensor) -> None:
    graph, _ = inserted(TinyNet(act=nn.ReLU), images)
    assert places(graph) == TINY_PLACES
    graph, _ = inserted(TinyNet(act=nn.Hardswish), images)
    assert len(places(graph)) == len(TINY_PLACES) + 5  # before and after each activation


def test_layer_bits_of_an_unknown_layer(tiny: nn.Module, images: Tensor) -> None:
    spec = QuantSpec(layer_bits={"stem": 8, "blocks.0.conv_dv": 4})
    with pytest.raises(FatError, match=r"'blocks.0.conv_dv'. Did you mean 'blocks.0.conv_dw'"):
        insert_quantizers(trace(tiny), spec, images)


# --- in-place quantization -----------------------------------------------------------------------


def overwriting(graph: fx.GraphModule) -> set[str]:
    return {name for name, quantizer in quantizer_table(graph).items() if quantizer.may_overwrite}


def test_results_of_layers_and_additions_may_be_overwritten(
    tiny: nn.Module, images: Tensor
) -> None:
    """Neither the caller's images, nor tensors that the backward pass of a pool may need."""
    graph, report = inserted(tiny, images)
    assert overwriting(graph) == set(report.activations) - {"input", "pool"}


def test_inputs_of_other_operations_are_not_overwritten(images: Tensor) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.act = nn.Hardswish()

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.a(x))
            return (self.b(y) + y) * torch.sigmoid(y)

    graph, _ = inserted(Shared(), images)
    # Hard-swish and sigmoid save their input or output, the product its factors.
    assert overwriting(graph) == {"a", "b", "add"}


def test_a_second_reader_forbids_overwriting(tiny: nn.Module, images: Tensor) -> None:
    """Passes create no other reader, but a graph from a file may have one."""
    graph, _ = inserted(tiny, images)
    before = overwriting(graph)
    (node,) = (node for node in graph.graph.nodes if node.target == "blocks.0.conv_pwl")
    with graph.graph.inserting_after(node):
        graph.graph.call_function(torch.abs, (node,))
    link_inputs(graph)
    assert overwriting(graph) == before - {"blocks_0_conv_pwl"}


@pytest.mark.parametrize("act", [nn.ReLU6, nn.ReLU, nn.Hardswish])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_overwriting_changes_neither_the_output_nor_a_gradient(
    images: Tensor, act: type[nn.Module], scheme: str
) -> None:
    graph, _ = inserted(TinyNet(act=act), images, QuantSpec(bits=6, scheme=scheme))  # type: ignore[arg-type]
    assert overwriting(graph)
    kept = images.clone()
    results = []
    for on in (True, False):
        if not on:
            for quantizer in quantizer_table(graph).values():
                quantizer.may_overwrite = False
        graph.zero_grad()
        logits = graph(images)
        logits.square().sum().backward()
        results.append([logits, *(parameter.grad for parameter in graph.parameters())])
        assert torch.equal(images, kept)
    assert len(results[0]) == 1 + len(list(graph.parameters())) > 30
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
