"""Sizes are evaluated in tracing, values are not; constants are folded."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fat.graph.tracing.capture import mark_data, trace
from fat.utils.errors import FatError


class Net(nn.Module):
    """A forward function with a weight and a table."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.table = nn.Parameter(torch.randn(7))
        self.register_buffer("index", torch.tensor([0, 2, 4, 6]))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def branch(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return y[:, :, 1:] if y.shape[2] % 2 else F.pad(y, (1, 1))


def loop(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return torch.stack([y[:, :, row].mean(-1) for row in range(x.shape[2])], 1)


def unpacked(net: Net, x: Tensor) -> Tensor:
    n, c, h, w = net.conv(x).shape
    assert h == w, "square images only"
    return net.conv(x).reshape(n, c, h * w).transpose(1, 2)


def counted(net: Net, x: Tensor) -> Tensor:
    rows = math.ceil(x.shape[2] / 5) * 5
    return F.interpolate(net.conv(x), size=(rows, int(x.size(3) * 0.5)))


def listed(net: Net, x: Tensor) -> Tensor:
    return net.conv(x).flatten(1) if len(x.shape) == 4 else x


def positions(net: Net, x: Tensor) -> Tensor:
    grid = torch.arange(x.shape[2], device=x.device, dtype=torch.float32).cos()
    return net.conv(x) + grid[:, None]


def counted_positions(net: Net, x: Tensor) -> Tensor:
    ones = torch.ones(x.shape[0], 1, x.shape[2], x.shape[3])
    return torch.cat([net.conv(x), ones.cumsum(2)], 1)


def looked_up(net: Net, x: Tensor) -> Tensor:
    return net.conv(x) * net.table[net.index].sigmoid().reshape(1, -1, 1, 1)


def blocks(net: Net, x: Tensor) -> Tensor:
    """Attention within halves of the rows, as in nested transformers."""
    n, c, h, _ = net.conv(x).shape
    tokens = net.conv(x).unflatten(2, (-1, h // 2 if h % 2 == 0 else h)).transpose(1, 2)
    q = tokens.transpose(3, 4).reshape(n, 1, tokens.shape[1], -1, c)
    return F.scaled_dot_product_attention(q, 2 * q, q + 1).mean((1, 3))


def without_heads(net: Net, x: Tensor) -> Tensor:
    q = net.conv(x).flatten(2)[:, :, : 4 * x.shape[2]]
    x = F.scaled_dot_product_attention(q, q, q - 1, dropout_p=0.0)
    return F.scaled_dot_product_attention(x, q, q, attn_mask=torch.tanh(x @ q.transpose(1, 2)))


ASKING = (
    branch,
    loop,
    unpacked,
    counted,
    listed,
    positions,
    counted_positions,
    looked_up,
    blocks,
    without_heads,
)


@pytest.mark.parametrize("function", [blocks, without_heads])
def test_attention_has_dimensions_images_heads_tokens_channels(
    function: Callable[[Net, Tensor], Tensor],
) -> None:
    images = torch.randn(2, 3, 8, 8)
    graph = trace(Net(function).eval(), images)
    mark_data(graph, images)
    found = [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert found
    assert all(len(read.meta["shape"]) == 4 for node in found for read in node.all_input_nodes)


def added(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.add_(1.0)
    z = y.mul_(y)
    return torch.cat([y, z.sigmoid_(), z], 1)


def added_to_a_view(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x).flatten(2)
    y.add_(net.table.sum())
    return y


def scattered(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.index_add_(2, net.index, y[:, :, :4] * 2)
    return y.masked_fill_(y > 0, 1.0)


def activated(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    F.relu(y, inplace=True)
    z = y - 0.5
    torch.relu_(z)
    return torch.cat([net.act(y - 1.0), y, z], 1)


def activated_before_the_branch(net: Net, x: Tensor) -> Tensor:
    """As in pre-activation networks: the shortcut starts after the activation."""
    y = net.conv(x)
    z = net.act(y)
    return y + z.sigmoid()


def activated_parts(net: Net, x: Tensor) -> Tensor:
    parts = net.conv(x).chunk(2, 1)
    first = net.act(parts[0])
    return torch.cat([first, parts[1].flatten(2).view_as(first)], 1)


def activated_copy(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = net.act(y.transpose(2, 3).contiguous())
    return y + z.transpose(2, 3)


def set_parts(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    y[:, 1:] = y[:, :-1] * 2
    y[:, :2, ..., -3:] = y[:, 1:3, ..., 2:5] + 1
    y[1:-1, :, 2:-2] = net.conv(x)[1:-1, :, 2:-2]
    y[...] = y.sigmoid()
    y[:] = y - y.mean()
    return y


@pytest.mark.parametrize(
    "function",
    [
        added,
        added_to_a_view,
        scattered,
        activated,
        activated_before_the_branch,
        activated_parts,
        activated_copy,
        set_parts,
    ],
)
def test_in_place_results_reach_later_readers(function: Callable[[Net, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net = Net(function).eval()
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():  # allows writing into parts
        torch.testing.assert_close(trace(net, images)(images), net(images))


def added_to_a_part(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    y[:, 1:].flatten(2).add_(1.0)
    return y.mean((2, 3))


def added_below_a_view(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    rows = y.flatten(2)
    y.add_(1.0)
    return rows


def activated_view(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return y + net.act(y.transpose(2, 3)).transpose(2, 3)


def set_below_a_view(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    rows = y.flatten(2)
    y[:, 1:] = y[:, 1:] + 1
    return rows


def set_to_a_number(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    y[:, 1:] = 0.0
    return y


def set_at_an_index(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    y[:, 0] = y[:, 1]
    return y


def set_and_spread(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    y[:, 1:] = y[:, :1]
    return y


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            added_to_a_part,
            r"'add_' modifies a tensor in place, and its view .* is read later.*such as x = x \+ y",
        ),
        (
            added_below_a_view,
            r"'add_' modifies a tensor in place, and its view 'flatten' is read later",
        ),
        (activated_view, r"'act' modifies a tensor in place, and its view 'conv' is read later"),
        (set_below_a_view, r"'setitem' modifies .* view 'flatten' is .* torch\.cat"),
        (set_to_a_number, r"cannot be traced: it writes into part of.*torch\.cat"),
        (set_at_an_index, r"cannot be traced: it writes into part of.*torch\.cat"),
        (set_and_spread, r"cannot be traced: it writes into part of.*torch\.cat"),
    ],
)
def test_unsupported_in_place_writes_are_rejected(
    function: Callable[[Net, Tensor], Tensor], said: str
) -> None:
    with pytest.raises(FatError, match=said):
        trace(Net(function).eval(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("function", ASKING)
@pytest.mark.parametrize("side", [8, 9])
def test_networks_that_depend_on_sizes_keep_their_function(
    function: Callable[[Net, Tensor], Tensor], side: int
) -> None:
    torch.manual_seed(0)
    net = Net(function).eval()
    images = torch.randn(5, 3, side, side)
    graph = trace(net, images)
    for batch in (images, images[:1]):  # for any number of images
        torch.testing.assert_close(graph(batch), net(batch))


def test_a_network_without_sizes_is_traced_for_any_size() -> None:
    net = Net(lambda net, x: net.conv(x).mean((2, 3))).eval()
    graph = trace(net, torch.randn(2, 3, 8, 8))
    images = torch.randn(2, 3, 12, 10)
    torch.testing.assert_close(graph(images), net(images))


def test_size_computations_are_removed_from_the_graph() -> None:
    graph = trace(Net(unpacked).eval(), torch.randn(2, 3, 8, 8))
    (reshape,) = (node for node in graph.graph.nodes if node.target == "reshape")
    assert reshape.args[2:] == (4, 64)
    assert isinstance(reshape.args[1], torch.fx.Node)  # the number of images is not fixed


@pytest.mark.parametrize("function", [positions, looked_up])
def test_constants_become_one_tensor(function: Callable[[Net, Tensor], Tensor]) -> None:
    graph = trace(Net(function).eval(), torch.randn(2, 3, 8, 8))
    kinds = [node.op for node in graph.graph.nodes]
    assert kinds == ["placeholder", "call_module", "get_attr", "call_function", "output"]
    assert {name for name, _ in graph.named_buffers()} == {
        str(node.target) for node in graph.graph.nodes if node.op == "get_attr"
    }


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda net, x: net.conv(x) if x.max() > 0 else x, "depends on values"),
        (lambda net, x: net.conv(x)[: int(x.mean())], "depends on values"),
        (lambda net, x: net.conv(x) if x.shape[0] > 2 else x, "number of images"),
        (lambda net, x: net.conv(x).reshape(x.shape[1], math.ceil(x.shape[0] / 2)), "number of im"),
    ],
)
def test_value_dependent_networks_are_rejected(
    function: Callable[[Net, Tensor], Tensor], said: str
) -> None:
    with pytest.raises(FatError, match=f"cannot be traced: .*{said}"):
        trace(Net(function).eval(), torch.randn(2, 3, 8, 8))


def test_without_a_size_the_error_names_the_reason() -> None:
    with pytest.raises(FatError, match="depends on sizes, and the image size is unknown"):
        trace(Net(branch).eval())


def test_torch_functions_are_restored() -> None:
    before = torch.arange
    with pytest.raises(FatError):
        trace(Net(branch).eval())
    assert torch.arange is before


def test_other_arguments_of_forward_keep_their_defaults() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(
            self, images: Tensor, mask: Tensor | None = None, twice: bool = False
        ) -> Tensor:
            if mask is not None:
                images = images * mask.view(len(images), 1, 4, 4)
            x = self.conv(images)
            return self.conv(x) if twice else x

    network, images = Masked().eval(), torch.randn(2, 3, 8, 8)
    for example in (None, images):
        graph = trace(network, example)
        assert len(graph.graph.find_nodes(op="placeholder")) == 1
        assert torch.equal(graph(images), network(images))
