"""The float network in plain torch modules, for tools that work on torch modules.

timm's network has layers that those tools fail on or skip: a batch norm that contains its
activation, and "same" convolutions that compute their padding from the image size. They become a
batch norm and an activation, and a ZeroPad2d of fixed size and a convolution. ReLU6 stays ReLU6,
but not in place.
"""

from __future__ import annotations

import timm
import torch
from common import Job
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn


def network(job: Job) -> nn.Module:
    """Return the network of the job with batch norms, checked against the float logits."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    model = timm.create_model(job.fields["model"], pretrained=False)
    model.load_state_dict(load_file(job.inputs / "weights.safetensors"))
    model.eval().requires_grad_(False)
    images = torch.from_numpy(job.array("val")[:8])
    plain = _plain(model, images)
    wanted = torch.from_numpy(job.array("float")[:8])
    with torch.no_grad():
        error = (plain(images) - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-4, f"the plain network is another function: {error}"
    return plain


def batches(images, size: int) -> list[torch.Tensor]:
    """Split numpy images [N, 3, H, W] into torch batches."""
    return list(torch.split(torch.from_numpy(images), size))


@torch.no_grad()
def logits(model, images) -> torch.Tensor:
    """Return the logits of all images."""
    return torch.cat([model(batch) for batch in batches(images, 20)])


def _plain(model: nn.Module, images: torch.Tensor) -> nn.Module:
    sizes: dict[str, torch.Size] = {}
    handles = [
        module.register_forward_hook(
            lambda _, given, __, name=name: sizes.__setitem__(name, given[0].shape)
        )
        for name, module in model.named_modules()
        if isinstance(module, Conv2dSame)
    ]
    with torch.no_grad():
        model(images[:1])
    for handle in handles:
        handle.remove()
    for name, module in list(model.named_modules()):
        if isinstance(module, BatchNormAct2d):
            norm = nn.BatchNorm2d(module.num_features, module.eps)
            norm.load_state_dict(module.state_dict(), strict=False)
            found = {nn.ReLU6: nn.ReLU6, nn.ReLU: nn.ReLU, nn.Identity: nn.Identity}
            act = found[type(module.act)]()
            parts = [norm] if isinstance(act, nn.Identity) else [norm, act]
            model.set_submodule(name, nn.Sequential(*parts))
        elif isinstance(module, Conv2dSame):
            model.set_submodule(name, _padded(module, sizes[name]))
    return model.eval().requires_grad_(False)


def _padded(module: Conv2dSame, shape: torch.Size) -> nn.Module:
    amounts = []
    for size, kernel, stride, dilation in zip(
        shape[2:], module.kernel_size, module.stride, module.dilation, strict=True
    ):
        total = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
        amounts.append((total // 2, total - total // 2))
    (top, bottom), (left, right) = amounts
    conv = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        dilation=module.dilation,
        groups=module.groups,
        bias=module.bias is not None,
    )
    conv.load_state_dict(module.state_dict())
    return nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), conv)
