"""Networks prepared for quantization-aware training by other frameworks, for step.py.

    pip install -e '.[peers]'

Both follow their documentation on the folded float network: 8 bits, per-channel weights and
per-tensor activations, the student's default.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from fat.graph.patterns import module_of, source
from fat.graph.tracing.capture import mark_data
from fat.quant.layers import SameConv2d, pad_same

__all__ = ["PEERS"]


def brevitas(network: fx.GraphModule, images: Tensor) -> nn.Module:
    """Prepare a network with Brevitas: ``preprocess_for_quantize``, ``quantize``, calibration.

    Weights are per-channel instead of per-tensor, its default, and ReLU6 is not replaced by ReLU,
    so that the function is the same. After calibration the scales of activations are learned, and
    biases are on the int32 grid.
    """
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import COMPUTE_LAYER_MAP, preprocess_for_quantize, quantize
    from brevitas.quant import Int8WeightPerChannelFloat

    layers = dict(COMPUTE_LAYER_MAP)
    for kind in (nn.Conv2d, nn.Linear):
        quantized, options = layers[kind]
        layers[kind] = (quantized, {**options, "weight_quant": Int8WeightPerChannelFloat})
    model = preprocess_for_quantize(_plain(network, images), relu6_to_relu=False)
    model = quantize(model, compute_layer_map=layers).to(images.device)
    with torch.no_grad(), calibration_mode(model):
        model(images)
    return model.train()


def torchao(network: fx.GraphModule, images: Tensor) -> nn.Module:
    """Prepare a network with torchao PT2E: ``torch.export``, ``prepare_qat_pt2e`` for x86.

    Its moving averages of ranges stay on, as its documentation has them during training.
    """
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    exported = torch.export.export(_plain(network, images), (images,)).module()
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    model = prepare_qat_pt2e(exported, quantizer).to(images.device)
    move_exported_model_to_train(model)
    with torch.no_grad():
        model(images)
    return model


PEERS: dict[str, Callable[[fx.GraphModule, Tensor], nn.Module]] = {
    "Brevitas": brevitas,
    "torchao": torchao,
}
"""Name → (folded float network, images) → network ready to be trained."""


def _plain(network: fx.GraphModule, images: Tensor) -> fx.GraphModule:
    """Return a copy in which "same" convolutions, which peers do not know, have fixed padding."""
    plain = copy.deepcopy(network)
    mark_data(plain, images[:1])
    for node in plain.graph.nodes:
        layer, before = module_of(plain, node), source(node)
        if not isinstance(layer, SameConv2d) or before is None:
            continue
        size = before.meta["shape"][2:]
        padded = pad_same(
            torch.empty(1, 1, *size), layer.kernel_size, layer.stride, layer.dilation
        ).shape[2:]
        rows, columns = padded[0] - size[0], padded[1] - size[1]
        pad = nn.ZeroPad2d((columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        conv = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=layer.bias is not None,
        )
        conv.load_state_dict(layer.state_dict())
        name = str(node.target)
        plain.set_submodule(name, conv.to(layer.weight))
        plain.set_submodule(f"{name}_pad", pad)
        node.meta.pop("nn_module_stack", None)  # names the old class; torchao reads it
        with plain.graph.inserting_before(node):
            node.args = (plain.graph.call_module(f"{name}_pad", node.args),)
    plain.recompile()
    return plain
