"""Layers that torch does not have: TensorFlow's "same" convolution and a clip per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ChannelClip", "SameConv2d", "pad_same", "pad_same_sides"]


def pad_same(
    x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """Pad with zeros so that a convolution outputs ⌈H/stride⌉ × ⌈W/stride⌉ pixels.

    An odd pixel is added at the bottom and on the right, as in TensorFlow.

    Args:
        x: Images or activations [N, C, H, W].
        kernel: Height and width of the kernel.
        stride: Vertical and horizontal stride.
        dilation: Vertical and horizontal dilation.

    Examples:
        >>> pad_same(torch.zeros(1, 1, 4, 5), (3, 3), (2, 2), (1, 1)).shape
        torch.Size([1, 1, 5, 7])
    """
    sides = pad_same_sides((x.shape[2], x.shape[3]), kernel, stride, dilation)
    return F.pad(x, sides) if any(sides) else x


def pad_same_sides(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> list[int]:
    """Return the padding of :func:`pad_same` at the left, right, top and bottom of H × W pixels."""
    sides: list[int] = []
    for axis in (1, 0):
        covered = (-(-size[axis] // stride[axis]) - 1) * stride[axis]
        total = max(covered + (kernel[axis] - 1) * dilation[axis] + 1 - size[axis], 0)
        sides += [total // 2, total - total // 2]
    return sides


class SameConv2d(nn.Conv2d):
    """Convolution whose padding depends on the size of its input, see :func:`pad_same`.

    Args:
        layer: Convolution to copy weights and geometry from.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
            groups=layer.groups,
            bias=layer.bias is not None,
        )
        self.load_state_dict(layer.state_dict())
        self.to(layer.weight).train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """Pad, then convolve [N, C, H, W]."""
        kernel, stride, dilation = (
            (pair[0], pair[1]) for pair in (self.kernel_size, self.stride, self.dilation)
        )
        padded = pad_same(input, kernel, stride, dilation)
        return torch.conv2d(padded, self.weight, self.bias, stride, 0, dilation, self.groups)


class ChannelClip(nn.Module):
    """Clip each channel to its own range: y_k = min(max(x_k, 0), bound_k).

    Replaces ReLU6 when channel k is multiplied by s_k: bound_k = 6·s_k preserves the function.
    Runtimes compute it as a minimum with one integer per channel.

    Args:
        bounds: Upper bounds above 0, one per channel (the second dimension).

    Examples:
        >>> ChannelClip([6.0, 1.0])(torch.tensor([[7.0, 7.0], [-1.0, 0.5]])).tolist()
        [[6.0, 1.0], [0.0, 0.5]]
    """

    bound: Tensor
    zero: Tensor

    def __init__(self, bounds: Sequence[float]) -> None:
        super().__init__()
        # Not persistent: the bounds define the layer, as 6 defines ReLU6.
        self.bounds = tuple(float(bound) for bound in bounds)
        self.register_buffer("bound", torch.tensor(self.bounds), persistent=False)
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Clip [N, C, ...]."""
        bound = self.bound.reshape(-1, *[1] * (x.dim() - 2))
        return torch.clamp(x, self.zero, bound)

    def extra_repr(self) -> str:
        """Return the number of channels and the range of their bounds."""
        return f"channels={len(self.bounds)}, bounds={min(self.bounds):g}…{max(self.bounds):g}"
