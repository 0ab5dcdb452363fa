"""Hard cases of folding and equalization keep their function and run in integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import timm.layers
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import fat
from fat.graph.passes.batch_norm_folding import FoldReport, fold_batch_norms
from fat.graph.passes.equalization import equalize
from fat.graph.patterns import module_of, source
from fat.graph.tracing.capture import trace
from fat.quant.metrics import logits_sqnr_db
from fat.quant.quantizers import ActivationQuantizer
from tests.conftest import realistic

EXACT = fat.QuantSpec(equalize=fat.EqualizeSpec("exact"))


def chain(*layers: nn.Module) -> nn.Module:
    """Put layers between a stem and a head."""
    stem = (nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))


class Parts(nn.Module):
    """A block whose forward is a function of its parts."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = forward
        self.names = tuple(parts)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *(getattr(self, name) for name in self.names))


def frozen(kind: type[nn.Module], eps: float = 1e-5) -> nn.Module:
    """A frozen batch norm with statistics, one of whose channels has no variance."""
    norm = kind(8, eps=eps)
    generator = torch.Generator().manual_seed(2)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data.copy_(0.5 + torch.rand(8, generator=generator))
    norm.running_var[3] = 0.0
    return norm


def shared_twice() -> nn.Module:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    return chain(conv, nn.BatchNorm2d(8), nn.ReLU(), conv, nn.BatchNorm2d(8))


def squeeze_excite() -> nn.Module:
    return Parts(
        lambda x, a, b: x * torch.sigmoid(b(F.relu(a(x.mean((2, 3), keepdim=True))))),
        a=nn.Conv2d(8, 4, 1),
        b=nn.Conv2d(4, 8, 1),
    )


class Statistics(nn.Module):
    """Normalizes with statistics that are not in its state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-0.5, 0.5, 8)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean


def called_twice() -> nn.Module:
    """A block with arithmetic, used twice."""
    block = Parts(lambda x, c: (x + c(x)) * 0.5, c=nn.Conv2d(8, 8, 3, padding=1))
    return chain(block, nn.ReLU(), block)


def divided(x: Tensor) -> Tensor:
    """Linear attention: without positive channels the divisor is ε."""
    x = F.relu(x - 1.0)
    return x / (x.sum(1, keepdim=True) + 1e-2)


def over_channels(x: Tensor) -> Tensor:
    """Normalization written out as in some networks."""
    x = x - x.mean(1, keepdim=True)
    return x / torch.sqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)


def for_each_image(x: Tensor, s: Statistics) -> Tensor:
    constant = s.mean.expand(x.shape[0], -1, 1, 1)
    return torch.cat([x, constant.tile(1, 1, x.shape[2], x.shape[3])], 1)


class Quiet(nn.Module):
    """A norm over channels whose input is almost zero at most pixels."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(F.relu(x - 2.0) + 0.01 * x))


def conv(*arguments: int, **options: int) -> nn.Module:
    return nn.Conv2d(*arguments, bias=False, **options)  # type: ignore[arg-type]


CASES: dict[str, Callable[[], nn.Module]] = {
    "norm after a pad": lambda: chain(conv(8, 8, 3), nn.ZeroPad2d(1), nn.BatchNorm2d(8), nn.ReLU()),
    "norm after dropout": lambda: chain(conv(8, 8, 3), nn.Dropout2d(0.3), nn.BatchNorm2d(8)),
    "norm before a padded convolution": lambda: chain(nn.BatchNorm2d(8), conv(8, 8, 3, padding=1)),
    "norm before a pointwise convolution": lambda: chain(nn.BatchNorm2d(8), conv(8, 6, 1)),
    "norm before a grouped convolution": lambda: chain(nn.BatchNorm2d(8), conv(8, 6, 3, groups=2)),
    "norm, activation, convolution": lambda: chain(nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, 3)),
    "norm before the classifier": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(8),
        nn.Linear(8, 5),
    ),
    "norm of the images": lambda: nn.Sequential(nn.BatchNorm2d(3), chain(nn.Identity())),
    "shared weights": shared_twice,
    "a network used twice": lambda: Parts(
        lambda x, net: net(x) + net(torch.flip(x, [3])), net=chain(conv(8, 8, 3), nn.BatchNorm2d(8))
    ),
    "grouped and dilated": lambda: chain(
        conv(8, 16, 3, groups=4, dilation=2, padding=2),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        conv(16, 8, 3, groups=8),
        nn.BatchNorm2d(8),
    ),
    "transposed": lambda: chain(
        nn.ConvTranspose2d(8, 6, 2, 2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 8, 1)
    ),
    "transposed in groups": lambda: chain(
        nn.ConvTranspose2d(8, 12, 3, (2, 3), 1, (1, 2), groups=4, dilation=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        conv(12, 8, 1),
    ),
    "padding by reflection": lambda: chain(
        nn.Conv2d(8, 8, 3, 2, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8)
    ),
    "1×1 on one pixel": lambda: chain(
        nn.AdaptiveAvgPool2d(1), conv(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 8, 1)
    ),
    "squeeze and excite": lambda: chain(squeeze_excite(), conv(8, 8, 3), nn.BatchNorm2d(8)),
    "hard-swish": lambda: chain(conv(8, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), conv(8, 8, 1)),
    "residual": lambda: chain(
        Parts(
            lambda x, b: F.relu(x + b(x)),
            b=nn.Sequential(
                conv(8, 8, 3, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU6(),
                conv(8, 8, 1),
                nn.BatchNorm2d(8),
            ),
        )
    ),
    "concatenation": lambda: chain(
        Parts(lambda x, a, n: n(torch.cat([x, a(x)], 1)), a=conv(8, 8, 1), n=nn.BatchNorm2d(16)),
        nn.ReLU(),
        conv(16, 8, 1),
    ),
    "anti-aliased pooling": lambda: chain(
        conv(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), timm.layers.BlurPool2d(8)
    ),
    "padding in a circle, in one dimension": lambda: Parts(
        lambda x, stem, conv, head: head(conv(stem(x).flatten(2))[..., None]),
        stem=nn.Conv2d(3, 8, 3, 2, 1),
        conv=nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"),
        head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    ),
    "channel attention in one dimension": lambda: chain(timm.layers.EcaModule(8), conv(8, 8, 1)),
    "several branches": lambda: chain(
        timm.models.byobnet.RepVggBlock(8, 8), timm.models.byobnet.MobileOneBlock(8, 8, 3)
    ),
    "standardized weights": lambda: chain(
        timm.layers.StdConv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        timm.layers.ScaledStdConv2dSame(8, 8, 3, stride=2, padding="same"),
    ),
    "frozen, timm's": lambda: chain(conv(8, 8, 1), frozen(timm.layers.FrozenBatchNormAct2d)),
    "frozen, torchvision's": lambda: chain(
        conv(8, 8, 1), frozen(torchvision.ops.FrozenBatchNorm2d, eps=1e-2)
    ),
    "statistics of its own": lambda: chain(Statistics(), conv(8, 8, 1)),
    "a block used twice": called_twice,
    "a product with a matrix": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.Flatten(2),
        Parts(lambda x, s: x.transpose(1, 2) @ s.weight + 0.5, s=nn.Linear(6, 8)),
        nn.Flatten(),
        nn.LazyLinear(5),
    ),
    "a constant for each image": lambda: chain(
        Parts(for_each_image, s=Statistics()), conv(16, 8, 1)
    ),
    "a constant of the images' type": lambda: chain(
        Parts(lambda x, s: x + s.mean.to(x.dtype).flatten()[:, None, None], s=Statistics()),
        conv(8, 8, 1),
    ),
    "divided by what may be zero": lambda: chain(Parts(divided), conv(8, 8, 1)),
    "norm by root mean squares": lambda: chain(
        conv(8, 8, 3), Quiet(timm.layers.RmsNorm2d(8)), conv(8, 8, 1)
    ),
    "norm over channels": lambda: chain(conv(8, 8, 3), Quiet(Parts(over_channels)), conv(8, 8, 1)),
    "norm in float32": lambda: chain(conv(8, 8, 3), timm.layers.LayerNorm2dFp32(8), conv(8, 8, 1)),
    "activation that is only divided by": lambda: chain(
        Parts(lambda x, c: x / (F.relu(c(x)) + 0.5), c=conv(8, 8, 1)), conv(8, 8, 1)
    ),
    "activation before a softmax": lambda: chain(
        Parts(lambda x, c: 4 * torch.softmax(F.relu(c(x)), 1), c=conv(8, 8, 1)), conv(8, 8, 1)
    ),
    "maxima within an uneven border": lambda: chain(
        conv(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        timm.layers.create_pool2d("max", 3, 2, padding="same"),
        timm.layers.create_pool2d("max", 2, 1, padding="same"),
        conv(8, 8, 1),
    ),
    "activation within a norm": lambda: chain(
        conv(8, 8, 1), timm.layers.BatchNormAct2d(8, act_layer=timm.layers.activations.GELU)
    ),
    "layer scale": lambda: chain(
        Parts(
            lambda x, c, s: x + c(x) * s.gamma.reshape(1, -1, 1, 1),
            c=conv(8, 8, 1),
            s=timm.layers.LayerScale(8, 0.3),
        )
    ),
}

BECOME_CONVOLUTIONS = {
    "norm after a pad": 1,
    "norm before a padded convolution": 1,
    "norm, activation, convolution": 1,
    "norm of the images": 1,
    "concatenation": 1,
}
"""Number of batch norms without a layer to be folded into."""


def case(name: str, images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    network = CASES[name]()
    network.eval()(images)  # initialize lazy layers
    return realistic(network, images)


def fold(network: nn.Module, images: Tensor) -> tuple[nn.Module, FoldReport]:
    graph = trace(network, images)
    return graph, fold_batch_norms(graph)


@pytest.mark.parametrize("name", CASES)
def test_all_norms_are_folded_and_the_function_is_kept(name: str, images: Tensor) -> None:
    network = case(name, images)
    graph, report = fold(network, images)
    assert logits_sqnr_db(network(images), graph(images)) > 100
    assert not [m for m in graph.modules() if isinstance(m, _BatchNorm)]
    assert len(report.convolutions) == BECOME_CONVOLUTIONS.get(name, 0)


@pytest.mark.parametrize("name", CASES)
def test_equalization_keeps_the_function(name: str, images: Tensor) -> None:
    network = case(name, images)
    graph, _ = fold(network, images)
    equalize(graph, [images], EXACT)
    assert logits_sqnr_db(network(images), graph(images)) > 90


@pytest.mark.parametrize("name", CASES)
def test_students_are_accurate_and_survive_saving(
    name: str, images: Tensor, tmp_path: object
) -> None:
    network = case(name, images)
    student = fat.prepare(network, images)
    fat.calibrate(student, images)
    expected = student(images)
    assert logits_sqnr_db(network(images), expected) > 15
    fat.save(student, f"{tmp_path}/student.safetensors")
    loaded = fat.load(f"{tmp_path}/student.safetensors")
    assert torch.equal(loaded(images), expected)
    assert torch.equal(loaded.float_logits(images), student.float_logits(images))


@pytest.mark.parametrize(
    ("name", "quantized"),
    [
        ("norm by root mean squares", ["mul", "mul"]),
        ("norm over channels", ["mean", "sub", "truediv"]),
        ("divided by what may be zero", ["truediv"]),
        ("norm in float32", ["layer_norm"]),
    ],
)
def test_divisors_are_not_quantized(name: str, quantized: list[str], images: Tensor) -> None:
    network = fat.prepare(case(name, images), images).network
    found = [
        getattr(before.target, "__name__", str(before.target))
        for node in network.graph.nodes
        if isinstance(module_of(network, node), ActivationQuantizer)
        and (before := cast(fx.Node, source(node))).op in ("call_function", "call_method")
    ]
    assert found[-len(quantized) :] == quantized  # earlier ones shift the input


@pytest.mark.parametrize(
    "name",
    [
        "norm after a pad",
        "a network used twice",
        "grouped and dilated",
        "transposed in groups",
        "concatenation",
        "anti-aliased pooling",
        "channel attention in one dimension",
        "activation that is only divided by",
        "activation before a softmax",
        "maxima within an uneven border",
        "a product with a matrix",
    ],
)
def test_onnx_file_equals_the_student(name: str, images: Tensor, tmp_path: object) -> None:
    student = fat.prepare(case(name, images), images)
    fat.calibrate(student, images)
    report = fat.export_onnx(student, f"{tmp_path}/student.onnx", images)
    assert report["layers"]["differing"] == 0
    assert report["kernels"]["integer_layers"] == len(student.layers())


def test_a_norm_that_cannot_be_folded_is_named_with_a_remedy(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.ReLU(), nn.BatchNorm1d(784))
    with pytest.raises(fat.FatError, match=r"'3' is a BatchNorm1d .* Put a linear layer before"):
        fold(network.eval(), images)
