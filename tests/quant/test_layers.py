from __future__ import annotations

import math

import pytest
import timm.layers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fat.quant.layers import ChannelClip, SameConv2d, pad_same

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=PAIRS,
    dilation=PAIRS,
)
@settings(deadline=None, max_examples=80)
def test_padding_against_timm_and_the_formula(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    x = torch.arange(1.0, 1 + size[0] * size[1]).reshape(1, 1, *size)
    padded = pad_same(x, kernel, stride, dilation)
    torch.testing.assert_close(padded, timm.layers.pad_same(x, kernel, stride, dilation))
    made = F.conv2d(padded, torch.ones(1, 1, *kernel), stride=stride, dilation=dilation)
    assert made.shape[2:] == tuple(math.ceil(s / d) for s, d in zip(size, stride, strict=True))


def test_an_odd_pixel_is_padded_at_the_bottom_and_right() -> None:
    padded = pad_same(torch.ones(1, 1, 4, 4), (3, 3), (2, 2), (1, 1))
    assert padded[0, 0].tolist() == [[1, 1, 1, 1, 0]] * 4 + [[0, 0, 0, 0, 0]]


@given(
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=PAIRS,
    dilation=PAIRS,
    bias=st.booleans(),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
@settings(deadline=None, max_examples=40)
def test_same_convolution_against_timm(
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    bias: bool,
    size: tuple[int, int],
) -> None:
    reference = timm.layers.Conv2dSame(
        4, 8, kernel, stride, dilation=dilation, groups=groups, bias=bias
    )
    x = torch.randn(2, 4, *size)
    own = SameConv2d(reference)
    torch.testing.assert_close(own(x), reference(x))
    assert isinstance(own, nn.Conv2d)
    assert own.weight is not reference.weight


@pytest.mark.parametrize("bias", [True, False])
def test_same_convolution_copies_its_source(bias: bool) -> None:
    source = nn.Conv2d(2, 2, 3, bias=bias)
    own = SameConv2d(source)
    before = own(torch.ones(1, 2, 5, 5)).detach()
    with torch.no_grad():
        source.weight.zero_()
    torch.testing.assert_close(own(torch.ones(1, 2, 5, 5)), before)


def test_a_clip_per_channel_is_relu6_of_the_scaled_channel() -> None:
    x = 10 * torch.randn(4, 5, 3, 3)
    scales = torch.logspace(-2, 2, 5)
    clip = ChannelClip((6 * scales).tolist())
    scaled = scales.reshape(1, 5, 1, 1)
    torch.testing.assert_close(clip(scaled * x), scaled * nn.functional.relu6(x))
    assert torch.equal(clip(x[:, :, 0, 0]), clip(x)[:, :, 0, 0])
    assert clip.state_dict() == {}  # the bounds define the layer
