"""Equalization: pairs, smaller spread of filters, and the same function."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fat
from fat import Student
from fat.evaluation.layer_analysis import float_shift_db
from fat.graph.passes.balance import NoiseModel, balanced_scales
from fat.graph.passes.batch_norm_folding import fold_batch_norms
from fat.graph.passes.channel_statistics import (
    LOG_SCALES,
    clip_bounds,
    clip_shift,
    gather_statistics,
)
from fat.graph.passes.equalization import (
    DEAD,
    MAX_SCALE,
    METHODS,
    EqualizeReport,
    channel_maxima,
    cross_layer_scales,
    depthwise_scales,
    equalize,
)
from fat.graph.passes.quantizer_insertion import find_quantized
from fat.graph.passes.scale_groups import (
    Clip,
    ScaleGroup,
    channel_clips,
    column_ranges,
    filter_ranges,
    find_depthwise_pairs,
    find_groups,
    find_pairs,
    rescale,
)
from fat.graph.tracing.capture import mark_data, trace
from fat.quant.config import EQUALIZATIONS, EqualizeSpec, QuantSpec
from fat.quant.layers import ChannelClip
from fat.quant.metrics import logits_sqnr_db
from tests.conftest import TinyNet, realistic

OPTIONS = EqualizeSpec("depthwise")
SCALAR = QuantSpec(granularity="per_tensor")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def folded_graph(network: nn.Module) -> fx.GraphModule:
    graph = trace(network)
    fold_batch_norms(graph)
    return graph


class Chain(nn.Module):
    """Depthwise convolution, optional activation, convolution; very different filter ranges."""

    def __init__(self, act: nn.Module | None, following: nn.Module | None = None) -> None:
        super().__init__()
        self.dw = nn.Conv2d(6, 6, 3, groups=6)
        self.dw.weight.data *= torch.logspace(-2, 1, 6).reshape(-1, 1, 1, 1)
        self.dw.bias.data = torch.randn(6)
        self.act = act or nn.Identity()
        self.next = following or nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.act(self.dw(x)))


def marked(network: nn.Module, example: Tensor | None = None) -> fx.GraphModule:
    graph = folded_graph(network)
    mark_data(graph, torch.zeros(1, 6, 12, 12) if example is None else example)
    return graph


def equalize_depthwise(
    graph: fx.GraphModule, images: list[Tensor], options: EqualizeSpec
) -> EqualizeReport:
    return equalize(graph, images, QuantSpec(equalize=options))


def with_method(method: str, spec: QuantSpec = SCALAR, **options: float) -> QuantSpec:
    return dataclasses.replace(spec, equalize=EqualizeSpec(method, **options))  # type: ignore[arg-type]


def ranges(layer: nn.Module) -> Tensor:
    return layer.weight.detach().abs().amax(dim=(1, 2, 3))


def test_pairs_of_a_mobile_network_by_name(tiny: nn.Module) -> None:
    def pair(block: int) -> ScaleGroup:
        name, node = f"blocks.{block}", f"blocks_{block}"
        return ScaleGroup(
            (f"{name}.conv_dw",),
            (f"{name}.conv_pwl",),
            (f"{name}.act2",),
            (Clip(f"{node}_act2", f"{node}_conv_dw", 6.0),),
            (f"{node}_conv_dw", f"{node}_act2"),
            32,
        )

    assert find_depthwise_pairs(marked(tiny, torch.zeros(1, 3, 16, 16))) == [pair(0), pair(1)]


def test_pairs_of_timms_mobilenet_are_its_depthwise_convolutions() -> None:
    network = timm.create_model("mobilenetv2_050").eval()
    pairs = find_depthwise_pairs(marked(network, torch.zeros(1, 3, 32, 32)))
    depthwise = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [pair.first[0] for pair in pairs] == depthwise
    assert all([clip.cap for clip in pair.clips] == [6.0] for pair in pairs)
    assert pairs[1].following == ("blocks.1.0.conv_pwl",)


@pytest.mark.parametrize("act", [nn.Hardswish(), nn.SiLU(), nn.Hardtanh(-1.0, 1.0), nn.Sigmoid()])
def test_activations_that_do_not_commute_with_scales_are_excluded(act: nn.Module) -> None:
    graph = marked(Chain(act).eval())
    assert find_depthwise_pairs(graph) == find_groups(graph) == []


def test_a_depthwise_result_with_other_readers_is_excluded() -> None:
    class Residual(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.dw(x))
            return self.next(y).sum(1, keepdim=True) + y

    assert find_groups(marked(Residual(nn.ReLU()).eval())) == []


@pytest.mark.parametrize("act", [None, nn.ReLU()], ids=["none", "relu"])
def test_without_an_upper_bound_the_function_is_unchanged(act: nn.Module | None) -> None:
    graph = folded_graph(Chain(act).eval()).double()
    images = torch.randn(4, 6, 12, 12, dtype=torch.float64)
    unseen = 50 * torch.randn(4, 6, 12, 12, dtype=torch.float64)
    expected, expected_unseen = graph(images), graph(unseen)
    before = graph.get_submodule("dw").weight.detach().clone()

    report = equalize_depthwise(graph, [images], OPTIONS)

    after = ranges(graph.get_submodule("dw"))
    torch.testing.assert_close(after, after.mean().expand(6))  # all filters have the same range
    assert not torch.allclose(before, graph.get_submodule("dw").weight)
    (pair,) = report.pairs
    assert (pair.first, pair.following, pair.locked) == ("dw", "next", 0)
    assert pair.first_before > 100
    assert pair.first_after == pytest.approx(1.0)
    assert report.locked_share == 0.0
    torch.testing.assert_close(graph(images), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(graph(unseen), expected_unseen, rtol=1e-10, atol=1e-10)


def test_relu6_keeps_the_function_on_the_images_seen() -> None:
    images = torch.randn(32, 3, 32, 32)
    graph = marked(realistic(TinyNet(), images), images)
    layers = [pair.first[0] for pair in find_depthwise_pairs(graph)]
    expected = copy.deepcopy(graph).double()(images.double())
    before = {name: graph.get_submodule(name).weight.clone() for name in layers}
    maxima = channel_maxima(graph, layers, [images])

    report = equalize_depthwise(graph, [images[:20], images[20:]], OPTIONS)

    moved = channel_maxima(graph, layers, [images])
    for name, told in zip(layers, report.pairs, strict=True):
        after = graph.get_submodule(name).weight
        scales = ranges(graph.get_submodule(name)) / before[name].abs().amax(dim=(1, 2, 3))
        locked = maxima[name] >= 5.9
        assert int(locked.sum()) == told.locked
        assert torch.equal(after[locked], before[name][locked])
        assert float(moved[name][~locked].max()) <= 6.0 + 1e-4
        assert not torch.allclose(scales[~locked], torch.ones(()))
        assert told.first_after < told.first_before
    assert logits_sqnr_db(expected, graph(images)) > 100


def test_a_margin_under_the_cap_is_respected() -> None:
    graph = folded_graph(Chain(nn.ReLU6()).eval())
    images = 2 * torch.randn(4, 6, 12, 12)
    locked = channel_maxima(graph, ["dw"], [images])["dw"] >= 4.0
    assert 0 < int(locked.sum()) < 6
    report = equalize_depthwise(
        graph, [images], EqualizeSpec("depthwise", locked_from=4.0, cap=3.0)
    )
    moved = channel_maxima(graph, ["dw"], [images])["dw"]
    assert report.pairs[0].locked == int(locked.sum())
    assert report.locked_share == pytest.approx(int(locked.sum()) / 6)
    assert float(moved[~locked].max()) <= 3.0 + 1e-5


def test_bounds_other_than_six_scale_the_options() -> None:
    # A clip at 3: locked from 5.9·3/6 = 2.95, capped at 3.
    control = 1.0
    scales, locked = depthwise_scales(
        torch.tensor([1.0, 0.1, 0.5]), torch.tensor([2.96, 2.94, 1.0]), 3.0, OPTIONS
    )
    assert locked.tolist() == [True, False, False]
    expected = [1.0, min(control / 0.1, 3 / 2.94), min(control / 0.5, 3.0)]
    torch.testing.assert_close(
        scales, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_the_control_value_by_hand() -> None:
    # Channels 0 and 1 are locked: control = (2 + 4)/2 = 3. Channel 2: 3/0.5 = 6, and 6·0.5 ≤ 6.
    scales, locked = depthwise_scales(
        torch.tensor([2.0, 4.0, 0.5]), torch.tensor([6.0, 5.95, 0.5]), 6.0, OPTIONS
    )
    assert locked.tolist() == [True, True, False]
    assert scales.tolist() == [1.0, 1.0, 6.0]
    # It reaches 3 before the activation: 6/3 = 2 is the cap.
    scales, _ = depthwise_scales(
        torch.tensor([2.0, 4.0, 0.5]), torch.tensor([6.0, 5.95, 3.0]), 6.0, OPTIONS
    )
    assert scales.tolist() == [1.0, 1.0, 2.0]
    # None locked: control = (1 + 2 + 3)/3 = 2, and large filters shrink.
    scales, locked = depthwise_scales(
        torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 1.0]), 6.0, OPTIONS
    )
    assert not locked.any()
    torch.testing.assert_close(scales, torch.tensor([2.0, 1.0, 2 / 3], dtype=torch.float64))


def test_dead_filters_and_inactive_channels() -> None:
    # Channel 0 is dead and excluded from the control value (1 + 3)/2 = 2, although its bias
    # alone exceeds the bound; channel 2 is never active: no cap.
    scales, locked = depthwise_scales(
        torch.tensor([0.0, 1.0, 3.0]), torch.tensor([7.0, 2.0, -1.0]), 6.0, OPTIONS
    )
    assert not locked.any()
    torch.testing.assert_close(scales, torch.tensor([1.0, 2.0, 2 / 3], dtype=torch.float64))
    # A tiny, inactive channel may take any scale up to the bound.
    scales, _ = depthwise_scales(torch.tensor([1e-7, 1.0]), torch.tensor([-1.0, 1.0]), 6.0, OPTIONS)
    assert scales[0] == MAX_SCALE
    # All dead: nothing to do.
    scales, _ = depthwise_scales(torch.zeros(3), torch.zeros(3), 6.0, OPTIONS)
    assert scales.tolist() == [1.0, 1.0, 1.0]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 100, width=32), st.floats(-100, 100, width=32)),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([None, 6.0, 1.0]),
    st.floats(1.0, 6.0),
)
def test_scales_are_always_safe(
    channels: list[tuple[float, float]], cap: float | None, margin: float
) -> None:
    options = EqualizeSpec("depthwise", cap=margin)
    t, m = (torch.tensor(values, dtype=torch.float64) for values in zip(*channels, strict=True))
    scales, locked = depthwise_scales(t, m, cap, options)
    assert bool(torch.isfinite(scales).all())
    assert bool((scales > 0).all())
    assert bool((scales[(t < DEAD) | locked] == 1).all())
    if cap is None:
        assert not locked.any()
    else:
        free = ~locked & (t >= DEAD) & (m > 0)
        assert bool((scales * m.double() <= margin * cap / 6 * (1 + 1e-9))[free].all())
        assert bool((m < 5.9 * cap / 6 * (1 + 1e-6))[free].all())


def test_a_dead_filter_in_a_network_changes_nothing() -> None:
    network = Chain(nn.ReLU6()).eval()
    network.dw.weight.data[2] = 0
    graph = folded_graph(network)
    images = torch.randn(4, 6, 12, 12)
    expected = graph(images)
    old = graph.get_submodule("next").weight.detach().clone()
    report = equalize_depthwise(graph, [images], OPTIONS)
    assert torch.equal(graph.get_submodule("next").weight[:, 2], old[:, 2])
    assert report.pairs[0].first_after < report.pairs[0].first_before < float("inf")
    assert logits_sqnr_db(expected, graph(images)) > 100


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_followed_by_depthwise(multiplier: int) -> None:
    second = nn.Conv2d(6, 6 * multiplier, 3, groups=6)
    graph = folded_graph(Chain(nn.ReLU(), second).eval())
    images = torch.randn(4, 6, 12, 12)
    expected = graph.double()(images.double())
    graph.float()
    before = second.weight.detach().clone()
    report = equalize_depthwise(graph, [images], OPTIONS)
    assert report.pairs[0].first == "dw"
    assert report.pairs[0].following == "next"
    assert not torch.allclose(graph.get_submodule("next").weight, before)
    assert logits_sqnr_db(expected, graph(images)) > 100


def test_a_chain_of_three_depthwise_convolutions_keeps_the_function() -> None:
    network = nn.Sequential(
        nn.Conv2d(6, 6, 3, groups=6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
    )
    graph = folded_graph(network.eval()).double()
    images = torch.randn(2, 6, 12, 12, dtype=torch.float64)
    expected = graph(images)
    report = equalize_depthwise(graph, [images], OPTIONS)
    assert [(p.first, p.following) for p in report.pairs] == [("0", "2"), ("2", "4")]
    torch.testing.assert_close(graph(images), expected, rtol=1e-10, atol=1e-10)


def test_a_following_grouped_convolution_is_excluded() -> None:
    graph = marked(Chain(nn.ReLU(), nn.Conv2d(6, 6, 1, groups=2)).eval())
    assert find_groups(graph) == []


def test_channel_maxima_equal_brute_force_and_leave_no_hooks(images: Tensor) -> None:
    graph = folded_graph(Chain(nn.ReLU6()).eval())
    x = torch.randn(5, 6, 8, 8)
    values = graph.get_submodule("dw")(x)
    got = channel_maxima(graph, ["dw"], [x[:2], x[2:4], x[4:]])["dw"]
    assert torch.equal(got, values.permute(1, 0, 2, 3).flatten(1).amax(1))
    assert not graph.get_submodule("dw")._forward_hooks
    with pytest.raises(RuntimeError):
        channel_maxima(graph, ["dw"], [images])  # three channels in place of six
    assert not graph.get_submodule("dw")._forward_hooks


# ------------------------------------------------------------------------------------- groups


def test_groups_of_a_mobile_network(tiny: nn.Module) -> None:
    groups = find_groups(marked(tiny, torch.zeros(1, 3, 16, 16)))
    # The stem and both projections write to one residual stream; the pool passes its scale on.
    assert [(group.first, group.following) for group in groups] == [
        (
            ("stem", "blocks.0.conv_pwl", "blocks.1.conv_pwl"),
            ("blocks.0.conv_pw", "blocks.1.conv_pw", "classifier"),
        ),
        (("blocks.0.conv_pw",), ("blocks.0.conv_dw",)),
        (("blocks.0.conv_dw",), ("blocks.0.conv_pwl",)),
        (("blocks.1.conv_pw",), ("blocks.1.conv_dw",)),
        (("blocks.1.conv_dw",), ("blocks.1.conv_pwl",)),
    ]
    assert [group.channels for group in groups] == [8, 32, 32, 32, 32]


class Everything(nn.Module):
    """Every kind of channel group: multiplier, stream, pool, linear, shared ReLU6."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(6, 4, 3, padding=1)
        self.wide = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.back = nn.Conv2d(8, 4, 1)
        self.act = act  # used twice
        self.average, self.pool = nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.hidden, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.back(self.act(self.wide(x)))
        x = torch.flatten(self.pool(self.average(self.act(x))), 1)
        return self.out(self.hidden(x))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6()])
def test_any_scale_of_any_group_keeps_the_function(act: nn.Module) -> None:
    network = Everything(act).eval()
    graph = folded_graph(network).double()
    images = 4 * torch.randn(4, 6, 8, 8, dtype=torch.float64)
    mark_data(graph, images)
    expected = graph(images)
    groups = find_groups(graph)
    assert [(group.first, group.following) for group in groups] == [
        (("stem", "back"), ("wide", "hidden")),
        (("wide",), ("back",)),
        (("hidden",), ("out",)),
    ]
    for group in groups:
        scales = torch.logspace(-1, 1, group.channels, dtype=torch.float64)
        rescale(graph, group, scales)
        channel_clips(graph, group, scales)
    # The bounds of the clips are float32, as they are stored.
    torch.testing.assert_close(graph(images), expected, rtol=1e-5, atol=1e-5)
    kept = [module for module in graph.modules() if isinstance(module, nn.ReLU6)]
    assert kept == []


@pytest.mark.parametrize("name", ["mobilenetv2_050", "resnet18", "mobilenetv3_small_050"])
def test_any_scale_of_any_group_of_timms_networks(name: str) -> None:
    images = torch.randn(2, 3, 64, 64)
    graph = marked(realistic(timm.create_model(name), torch.randn(8, 3, 32, 32)), images)
    expected = copy.deepcopy(graph).double()(images.double())
    groups = find_groups(graph)
    assert len(groups) >= 5
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        scales = torch.randn(group.channels, dtype=torch.float64, generator=generator).exp()
        rescale(graph, group, scales)
        channel_clips(graph, group, scales)
    assert logits_sqnr_db(expected, graph(images)) > 100


# ----------------------------------------------------------------------------- cross-layer


def test_cross_layer_makes_the_ranges_of_every_pair_equal() -> None:
    images = torch.randn(16, 3, 32, 32)
    graph = marked(realistic(TinyNet(act=nn.ReLU), images), images).double()
    expected = graph(images.double())
    report = equalize(graph, [images.double()], with_method("cross_layer"))
    pairs = find_pairs(graph)
    assert [pair.first for pair in report.pairs] == [pair.first[0] for pair in pairs]
    assert len(pairs) == 4
    for pair in pairs:
        first, following = (graph.get_submodule(names[0]) for names in (pair.first, pair.following))
        torch.testing.assert_close(
            filter_ranges(first), column_ranges(following), rtol=5e-3, atol=0
        )
    torch.testing.assert_close(graph(images.double()), expected, rtol=1e-9, atol=1e-9)


def test_one_sweep_of_cross_layer_by_hand() -> None:
    graph = marked(Chain(None).eval())
    r1, r2 = filter_ranges(graph.get_submodule("dw")), column_ranges(graph.get_submodule("next"))
    torch.testing.assert_close(cross_layer_scales(r1, r2), (r2 / r1).double().sqrt())
    (told,) = equalize(
        graph, [torch.randn(2, 6, 12, 12)], with_method("cross_layer", iterations=1)
    ).pairs
    torch.testing.assert_close(filter_ranges(graph.get_submodule("dw")), (r1 * r2).sqrt())
    torch.testing.assert_close(column_ranges(graph.get_submodule("next")), (r1 * r2).sqrt())
    assert told.method == "cross_layer"
    assert told.first_before == pytest.approx(float(r1.max() / r1.min()))
    assert told.following_before == pytest.approx(float(r2.max() / r2.min()))
    spread = float(((r1 * r2).max() / (r1 * r2).min()).sqrt())
    assert (told.first_after, told.following_after) == pytest.approx((spread, spread))


def test_cross_layer_respects_relu6() -> None:
    images = torch.randn(64, 3, 32, 32)
    graph = marked(realistic(TinyNet(), images), images)
    layers = [pair.first[0] for pair in find_pairs(graph)]
    before = {name: graph.get_submodule(name).bias.clone() for name in layers}
    maxima = channel_maxima(graph, layers, [images])
    expected = copy.deepcopy(graph).double()(images.double())
    report = equalize(graph, [images], with_method("cross_layer", locked_from=4.0))
    moved = channel_maxima(graph, layers, [images])
    assert sum(pair.locked for pair in report.pairs) > 0
    for name in layers:
        locked = maxima[name] >= 4.0
        assert torch.equal(graph.get_submodule(name).bias[locked], before[name][locked])
        assert float(moved[name][~locked].max()) <= 6.0 + 1e-4
    assert logits_sqnr_db(expected, graph(images)) > 100


def test_every_method_is_an_option() -> None:
    assert set(METHODS) == set(EQUALIZATIONS) - {"none"}


def test_methods_are_applied_in_order() -> None:
    images = torch.randn(16, 3, 32, 32)
    network = realistic(TinyNet(), images)
    one, other = (marked(network, images) for _ in range(2))
    report = equalize(one, [images], with_method("depthwise+cross_layer"))
    for method in ("depthwise", "cross_layer"):
        equalize(other, [images], with_method(method))
    assert [pair.method for pair in report.pairs] == ["depthwise"] * 2 + ["cross_layer"] * 4
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


# -------------------------------------------------------------------------- balanced and exact


class Uneven(nn.Module):
    """Three convolutions with ReLU6 at its bound; filter ranges differ by a factor of 1000."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 1)
        self.act2, self.out = nn.ReLU6(), nn.Conv2d(8, 4, 1)
        self.a.weight.data *= 30 * torch.logspace(-3, 0, 8).reshape(-1, 1, 1, 1)
        self.a.bias.data *= 30 * torch.logspace(-3, 0, 8)
        self.b.weight.data *= torch.logspace(2, 0, 8).reshape(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.out(self.act2(self.b(self.act(self.a(x)))))
        return x.mean((2, 3))


def uneven(images: Tensor) -> tuple[fx.GraphModule, list[ScaleGroup]]:
    graph = marked(Uneven().eval().requires_grad_(False), images)
    return graph, find_groups(graph)


def model_of(
    graph: fx.GraphModule,
    groups: list[ScaleGroup],
    images: Tensor,
    spec: QuantSpec,
    *,
    keeps_clips: bool = False,
) -> NoiseModel:
    names = {name for group in groups for name in group.tensors}
    quantized = {node.name for node in find_quantized(graph)}
    clips = [clip for group in groups for clip in group.clips]
    statistics = gather_statistics(graph, [images], names, quantized, clips)
    return NoiseModel(graph, groups, statistics, spec, keeps_clips=keeps_clips)


def test_statistics_against_autograd(images: Tensor) -> None:
    graph, groups = uneven(images)
    names = {name for group in groups for name in group.tensors}
    state = torch.random.get_rng_state()
    got = gather_statistics(graph, images.split(5), names, {"act", "act2"})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in graph.parameters())
    assert set(got.low) == set(got.high) == names
    assert set(got.activation) == {"act", "act2"}
    a = graph.get_submodule("a")(images)
    # Not bit for bit: convolutions of one image and of a batch sum in different orders.
    torch.testing.assert_close(got.high["a"].float(), a.amax((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.low["a"].float(), a.amin((0, 2, 3)), rtol=1e-4, atol=1e-5)

    # Exact expectation over random directions: one backward pass per logit.
    exact_weight, exact_activation = torch.zeros(8, 8), torch.zeros(8)
    weight = graph.get_submodule("b").weight.requires_grad_(True)
    for image in images.split(1):
        act = graph.get_submodule("act")(graph.get_submodule("a")(image)).requires_grad_(True)
        logits = graph.get_submodule("out")(
            graph.get_submodule("act2")(graph.get_submodule("b")(act))
        ).mean((2, 3))
        for logit in logits[0]:
            of_act, of_weight = torch.autograd.grad(logit, (act, weight), retain_graph=True)
            exact_activation += (of_act.square() * (act != 0)).sum((0, 2, 3)) / len(images)
            exact_weight += of_weight.square().sum((2, 3)) / len(images)
    weight.requires_grad_(False)
    many = images.repeat(4, 1, 1, 1)  # the same images along 64 directions
    estimated = gather_statistics(graph, [many], names, {"act", "act2"})
    for estimate, exact in (
        (estimated.activation["act"], exact_activation),
        (estimated.weight["b"], exact_weight),
    ):
        torch.testing.assert_close(estimate.sum().float(), exact.sum(), rtol=0.25, atol=0)
        assert (
            torch.corrcoef(torch.stack([estimate.float().flatten(), exact.flatten()]))[0, 1] > 0.9
        )


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_the_noise_model_against_its_formula(images: Tensor, granularity: str, scheme: str) -> None:
    graph, groups = uneven(images)
    spec = QuantSpec(
        weight_bits=4, activation_bits=6, last_bits=8, granularity=granularity, scheme=scheme
    )  # type: ignore[arg-type]
    model = model_of(graph, groups, images, spec)
    names = {name for group in groups for name in group.tensors}
    statistics = gather_statistics(graph, [images], names, {"act", "act2"})
    logs = torch.linspace(-1, 1, 16, dtype=torch.float64)
    for s in (torch.zeros(16, dtype=torch.float64), logs):
        one, two = s[:8].exp(), s[8:].exp()
        ones = torch.ones(8, dtype=torch.float64)
        expected = 0.0
        for name, rows, columns, q in (
            ("a", one, ones[:3], 7),
            ("b", two, one, 7),
            ("out", ones[:4], two, 127),
        ):
            weight = graph.get_submodule(name).weight.double() * (
                rows.reshape(-1, 1, 1, 1) / columns.reshape(1, -1, 1, 1)
            )
            step = weight.abs().amax((1, 2, 3)) / q
            step = step.max().expand(len(rows)) if granularity == "per_tensor" else step
            back = (columns[None] / rows[:, None]).square() * statistics.weight[name]
            expected += float((step.square()[:, None] / 12 * back).sum())
        for name, scales, q in (("act", one, 63), ("act2", two, 255)):
            step = float((statistics.high[name] * scales).max()) / q
            expected += float((step**2 / 12 * statistics.activation[name] / scales.square()).sum())
        assert float(model(s)) == pytest.approx(expected, rel=1e-9)
    # p-norms are never below the maxima and come close to them.
    exact = float(model(logs))
    assert exact <= float(model(logs, 32)) <= 1.5 * exact
    assert float(model(logs, 32)) < float(model(logs, 8))


def test_log_noise_is_convex_in_the_log_of_the_scales(images: Tensor) -> None:
    model = model_of(*uneven(images), images, SCALAR)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        a, b = 2 * torch.randn(2, 16, dtype=torch.float64, generator=generator)
        middle = float(model((a + b) / 2).log())
        assert middle <= float((model(a).log() + model(b).log()) / 2) + 1e-9


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_no_small_step_improves_balanced_scales_much(images: Tensor, granularity: str) -> None:
    spec = QuantSpec(granularity=granularity)  # type: ignore[arg-type]
    model = model_of(*uneven(images), images, spec)
    logs = balanced_scales(model)
    assert torch.equal(logs, balanced_scales(model))
    best = float(model(logs))
    assert best < 0.5 * float(model(model.zeros())) or granularity == "per_channel"
    assert best <= float(model(model.zeros()))
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0):
        for _ in range(100):
            step = size * torch.randn(16, dtype=torch.float64, generator=generator)
            assert float(model(logs + step)) > 0.97 * best


def test_exact_keeps_the_function_on_all_images(images: Tensor) -> None:
    graph, _ = uneven(images)
    unseen = 20 * torch.randn(8, 3, 16, 16)
    expected = copy.deepcopy(graph).double()(unseen.double())
    before = filter_ranges(graph.get_submodule("a"))
    report = equalize(graph, [images], with_method("exact"))
    assert logits_sqnr_db(expected, graph(unseen)) > 100
    assert [(pair.first, pair.following) for pair in report.pairs] == [("a", "b"), ("b", "out")]
    assert all(pair.locked == 0 for pair in report.pairs)
    scales = filter_ranges(graph.get_submodule("a")) / before
    assert float(scales.max() / scales.min()) > 3
    clip = graph.get_submodule("act")
    assert isinstance(clip, ChannelClip)
    torch.testing.assert_close(torch.tensor(clip.bounds), 6 * scales)


def quantized_sqnr(network: nn.Module, images: Tensor, spec: QuantSpec) -> tuple[Student, float]:
    student = fat.prepare(network, images, spec)
    fat.calibrate(student, images)
    with torch.no_grad():
        return student, logits_sqnr_db(student.float_logits(images), student(images))


def test_exact_equalization_makes_per_tensor_thresholds_sufficient(images: Tensor) -> None:
    network = Uneven().eval()
    _, plain = quantized_sqnr(network, images, SCALAR)
    student, exact = quantized_sqnr(network, images, with_method("exact"))
    assert exact > plain + 6
    assert float_shift_db(student, images) > 100


def test_the_quantizer_clips_each_channel_at_its_bound(images: Tensor) -> None:
    student, _ = quantized_sqnr(Uneven().eval(), images, with_method("exact"))
    quantizer = next(q for q in student.activation_quantizers() if q.layer == "act")
    assert isinstance(quantizer.activation, ChannelClip)
    bounds = torch.tensor(quantizer.activation.bounds)
    assert quantizer.grid.kind == "symmetric_unsigned"
    assert quantizer.thresholds.limit == pytest.approx(float(bounds.max()))
    step = float(quantizer.thresholds()[0].detach())
    top = quantizer(torch.full((1, 8, 1, 1), 1e6)).flatten().detach()
    limit = min(float(quantizer.thresholds.high), float(bounds.max()))
    assert bool(((top - bounds.clamp(max=limit)).abs() <= step / 2 + 1e-6).all())
    assert bool((quantizer(torch.full((1, 8, 1, 1), -1e6)) == 0).all())


def test_clip_shift_equals_its_definition() -> None:
    x, gradient = 4 * torch.randn(1, 3, 9, 9), torch.randn(1, 3, 9, 9)
    got = clip_shift(x, gradient, clip_bounds(6.0))
    assert got.shape == (3, len(LOG_SCALES))
    for index in (0, 40, 60, 69, 72, 90, 138):
        scale = float(LOG_SCALES[index].exp())
        moved = (scale * x).double().clamp(0, 6) / scale - x.double().clamp(0, 6)
        expected = (gradient.double() * moved).sum((0, 2, 3)).square()
        torch.testing.assert_close(got[:, index], expected, rtol=1e-4, atol=1e-8)
    assert float(got[:, 69].max()) == 0.0


def test_balanced_accounts_for_changes_of_the_function(images: Tensor) -> None:
    graph, groups = uneven(images)
    model = model_of(graph, groups, images, SCALAR, keeps_clips=True)
    free = model_of(graph, groups, images, SCALAR)
    assert float(model(model.zeros())) == pytest.approx(float(free(model.zeros())))
    logs = torch.linspace(-1, 1, 16, dtype=torch.float64)
    assert float(model(logs)) == pytest.approx(float(free(logs) + model.shift(logs)))
    tables = [table for _, table in model._shifts]
    assert float(model.shift(LOG_SCALES[[90]].repeat(16))) == pytest.approx(
        float(sum(table[:, 90].sum() for table in tables))
    )
    best = balanced_scales(model)
    assert float(model(best)) < float(model(model.zeros()))
    # Scales that ignore the clips, such as those of exact, would change it more.
    assert 0 < float(model.shift(best)) < float(model.shift(balanced_scales(free)))


def test_balanced_keeps_relu6_and_improves_sqnr(images: Tensor) -> None:
    network = Uneven().eval()
    _, plain = quantized_sqnr(network, images, SCALAR)
    student, balanced = quantized_sqnr(network, images, with_method("balanced"))
    assert balanced > plain + 3
    assert float_shift_db(student, images) > balanced
    kinds = [type(quantizer.activation) for quantizer in student.activation_quantizers()]
    assert kinds.count(nn.ReLU6) == 2
    assert ChannelClip not in kinds


def test_dead_filters_survive_every_method(images: Tensor) -> None:
    for method in ("depthwise", "cross_layer", "balanced", "exact"):
        network = realistic(TinyNet(), images)
        for name in ("stem", "blocks.0.conv_pw", "blocks.0.conv_dw"):
            network.get_submodule(name).weight.data[2] = 0
        student, sqnr = quantized_sqnr(network, images, with_method(method))
        assert sqnr > 5
        assert all(bool(tensor.isfinite().all()) for tensor in student.state_dict().values())
