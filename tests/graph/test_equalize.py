"""Equalization: the right pairs, filters closer together, and the same function."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from conftest import TinyNet, realistic
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fat.graph.equalize import (
    DEAD,
    SANE_SCALE,
    DepthwisePair,
    channel_maxima,
    depthwise_scales,
    equalize_depthwise,
    find_depthwise_pairs,
)
from fat.graph.fold import fold_batch_norms
from fat.graph.trace import trace
from fat.metrics import logits_sqnr_db
from fat.spec import EqualizeSpec

OPTIONS = EqualizeSpec("depthwise")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def folded_graph(network: nn.Module) -> fx.GraphModule:
    graph = trace(network)
    fold_batch_norms(graph)
    return graph


class Chain(nn.Module):
    """Depthwise, activation or none, convolution; ranges of the filters far apart."""

    def __init__(self, act: nn.Module | None, following: nn.Module | None = None) -> None:
        super().__init__()
        self.dw = nn.Conv2d(6, 6, 3, groups=6)
        self.dw.weight.data *= torch.logspace(-2, 1, 6).reshape(-1, 1, 1, 1)
        self.dw.bias.data = torch.randn(6)
        self.act = act or nn.Identity()
        self.next = following or nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.act(self.dw(x)))


def ranges(layer: nn.Module) -> Tensor:
    return layer.weight.detach().abs().amax(dim=(1, 2, 3))


def test_pairs_of_a_mobile_network_by_name(tiny: nn.Module) -> None:
    assert find_depthwise_pairs(folded_graph(tiny)) == [
        DepthwisePair("blocks.0.conv_dw", "blocks.0.act2", "blocks.0.conv_pwl", 6.0),
        DepthwisePair("blocks.1.conv_dw", "blocks.1.act2", "blocks.1.conv_pwl", 6.0),
    ]


def test_pairs_of_timms_mobilenet_are_its_depthwise_convolutions() -> None:
    network = timm.create_model("mobilenetv2_050").eval()
    pairs = find_depthwise_pairs(folded_graph(network))
    depthwise = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [pair.depthwise for pair in pairs] == depthwise
    assert all(pair.cap == 6.0 for pair in pairs)
    assert pairs[1].following == "blocks.1.0.conv_pwl"


@pytest.mark.parametrize("act", [nn.Hardswish(), nn.SiLU(), nn.Hardtanh(-1.0, 1.0), nn.Sigmoid()])
def test_activations_that_no_scale_passes_are_left_alone(act: nn.Module) -> None:
    assert find_depthwise_pairs(folded_graph(Chain(act).eval())) == []


def test_a_depthwise_result_that_others_read_is_left_alone() -> None:
    class Residual(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.dw(x))
            return self.next(y).sum(1, keepdim=True) + y

    assert find_depthwise_pairs(folded_graph(Residual(nn.ReLU()).eval())) == []


@pytest.mark.parametrize("act", [None, nn.ReLU()], ids=["none", "relu"])
def test_without_an_upper_bound_the_function_is_kept_exactly(act: nn.Module | None) -> None:
    graph = folded_graph(Chain(act).eval()).double()
    images = torch.randn(4, 6, 12, 12, dtype=torch.float64)
    unseen = 50 * torch.randn(4, 6, 12, 12, dtype=torch.float64)
    expected, expected_unseen = graph(images), graph(unseen)
    before = graph.get_submodule("dw").weight.detach().clone()

    report = equalize_depthwise(graph, [images], OPTIONS)

    after = ranges(graph.get_submodule("dw"))
    torch.testing.assert_close(after, after.mean().expand(6))  # all filters have one range now
    assert not torch.allclose(before, graph.get_submodule("dw").weight)
    (pair,) = report.pairs
    assert (pair.depthwise, pair.following, pair.locked) == ("dw", "next", 0)
    assert pair.spread_before > 100
    assert pair.spread_after == pytest.approx(1.0)
    assert report.locked_share == 0.0
    torch.testing.assert_close(graph(images), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(graph(unseen), expected_unseen, rtol=1e-10, atol=1e-10)


def test_relu6_keeps_the_function_on_the_images_seen() -> None:
    images = torch.randn(32, 3, 32, 32)
    graph = folded_graph(realistic(TinyNet(), images))
    pairs = find_depthwise_pairs(graph)
    expected = copy.deepcopy(graph).double()(images.double())
    before = {p.depthwise: graph.get_submodule(p.depthwise).weight.clone() for p in pairs}
    maxima = channel_maxima(graph, [p.depthwise for p in pairs], [images])

    report = equalize_depthwise(graph, [images[:20], images[20:]], OPTIONS)

    moved = channel_maxima(graph, [p.depthwise for p in pairs], [images])
    for pair, told in zip(pairs, report.pairs, strict=True):
        after = graph.get_submodule(pair.depthwise).weight
        scales = ranges(graph.get_submodule(pair.depthwise)) / before[pair.depthwise].abs().amax(
            dim=(1, 2, 3)
        )
        locked = maxima[pair.depthwise] >= 5.9
        assert int(locked.sum()) == told.locked
        assert torch.equal(after[locked], before[pair.depthwise][locked])
        assert float(moved[pair.depthwise][~locked].max()) <= 6.0 + 1e-4
        assert not torch.allclose(scales[~locked], torch.ones(()))
        assert told.spread_after < told.spread_before
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


def test_dead_filters_and_channels_that_never_fire() -> None:
    # Channel 0 is dead and takes no part in the control value (1 + 3)/2 = 2, although its bias
    # alone passes the bound; channel 2 never fires: no cap.
    scales, locked = depthwise_scales(
        torch.tensor([0.0, 1.0, 3.0]), torch.tensor([7.0, 2.0, -1.0]), 6.0, OPTIONS
    )
    assert not locked.any()
    torch.testing.assert_close(scales, torch.tensor([1.0, 2.0, 2 / 3], dtype=torch.float64))
    # One that never fires and is tiny may take any scale, within reason.
    scales, _ = depthwise_scales(torch.tensor([1e-7, 1.0]), torch.tensor([-1.0, 1.0]), 6.0, OPTIONS)
    assert scales[0] == SANE_SCALE
    # All dead: nothing to do.
    scales, _ = depthwise_scales(torch.zeros(3), torch.zeros(3), 6.0, OPTIONS)
    assert scales.tolist() == [1.0, 1.0, 1.0]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 100, width=32), st.floats(-100, 100, width=32)
        ),
        min_size=1, max_size=8,
    ),
    st.sampled_from([None, 6.0, 1.0]),
    st.floats(1.0, 6.0),
)  # fmt: skip
def test_scales_are_always_safe(
    channels: list[tuple[float, float]], cap: float | None, margin: float
) -> None:
    options = EqualizeSpec("depthwise", cap=margin)
    t, m = (torch.tensor(values, dtype=torch.float32) for values in zip(*channels, strict=True))
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
    assert report.pairs[0].spread_after < report.pairs[0].spread_before < float("inf")
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
    assert report.pairs[0].depthwise == "dw"
    assert report.pairs[0].following == "next"
    assert not torch.allclose(graph.get_submodule("next").weight, before)
    assert logits_sqnr_db(expected, graph(images)) > 100


def test_a_chain_of_three_depthwise_convolutions_keeps_the_function() -> None:
    network = nn.Sequential(
        nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(),
        nn.Conv2d(6, 4, 1),
    )  # fmt: skip
    graph = folded_graph(network.eval()).double()
    images = torch.randn(2, 6, 12, 12, dtype=torch.float64)
    expected = graph(images)
    report = equalize_depthwise(graph, [images], OPTIONS)
    assert [(p.depthwise, p.following) for p in report.pairs] == [("0", "2"), ("2", "4")]
    torch.testing.assert_close(graph(images), expected, rtol=1e-10, atol=1e-10)


def test_a_grouped_convolution_after_it_is_left_alone() -> None:
    graph = folded_graph(Chain(nn.ReLU(), nn.Conv2d(6, 6, 1, groups=2)).eval())
    assert find_depthwise_pairs(graph) == []


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
