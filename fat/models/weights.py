"""Weights files: safetensors or torch.save, matched to a network by name or by order."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fat.models.factory import build_network, count_classes, head_prefixes
from fat.utils.errors import FatError, abbreviated, first_line
from fat.utils.io import torn_part

__all__ = ["load_weights_file"]

logger = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Keys under which training scripts store the state dict."""


def load_weights_file(name: str, path: Path, num_classes: int | None) -> nn.Module:
    """Build the network and load a state dict into it, matching tensors by name or by order.

    Args:
        name: timm's name of the network.
        path: A .safetensors file, or a .pth or .pt file written by ``torch.save``.
        num_classes: Number of logits that the weights must have; ``None`` accepts any.

    Raises:
        FatError: If the file cannot be read, holds no state dict or code, or does not fit.
    """
    state = _read_state(path)
    network = build_network(name, num_classes)
    names = _match(network, state)
    if names is None:
        raise FatError(_misfit(name, network, path, state))
    expected = network.state_dict()
    wrong = [key for key, given in names.items() if state[given].shape != expected[key].shape]
    if wrong:  # _match allows this only for the classifier
        found, wanted = len(state[names[wrong[0]]]), count_classes(network)
        if num_classes is not None:
            raise FatError(
                f"{path} has a classifier of {found} classes, but num_classes is {wanted}. "
                f"Type model.num_classes={found} (or null), or give other weights."
            )
        network = build_network(name, found)
    odd = {key: kind for key, given in names.items() if (kind := _odd(state[given], expected[key]))}
    if odd:
        listed = abbreviated([f"{key} ({kind})" for key, kind in odd.items()])
        raise FatError(
            f"{path} holds {len(odd)} tensor(s) that are not plain floating-point: {listed}. Save "
            "the weights as float32, float16 or bfloat16 and type model.weights=PATH with that."
        )
    # num_batches_tracked may be missing: eval mode does not use it.
    network.load_state_dict({key: state[given] for key, given in names.items()}, strict=False)
    return network


def _read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running code from the file."""
    try:
        exists, problem = path.is_file(), "is a directory" if path.is_dir() else "does not exist"
    except OSError as error:  # for example, the name is too long
        exists, problem = False, f"cannot be opened ({error.strerror})"
    if not exists:
        raise FatError(
            f"The weights file {path} {problem}. Type model.weights=PATH with a .safetensors or a "
            ".pth file, or model.weights=random."
        )
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if part := torn_part(path):
                logger.warning(
                    "The weights file %s may be damaged: the checksum of %s does not match.",
                    path,
                    part,
                )
    # The readers raise nearly anything for a damaged file: OSError, RuntimeError, EOFError,
    # UnpicklingError, KeyError, SafetensorError, …
    except Exception as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise FatError(
                f"The weights file {path} holds pickled Python code ({code[1]}), which FAT never "
                "runs. If you trust the file, save only its tensors: "
                "torch.save(network.state_dict(), 'weights.pth'), or as .safetensors."
            ) from error
        reason = first_line(error)
        raise FatError(
            f"The weights file {path} ({path.stat().st_size} bytes) cannot be read; it is "
            f"truncated, damaged or not a weights file: {reason:.200} "
            "Allowed: .safetensors, or .pth/.pt written by torch.save."
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        found = list(content) if isinstance(content, Mapping) else type(content).__name__
        raise FatError(
            f"The weights file {path} holds no state dict, but {found!s:.200}. Allowed: a dict of "
            f"tensors, at the top level or under one of the keys {', '.join(WRAPPERS)}."
        )
    return {
        str(key).removeprefix("module."): value
        for key, value in content.items()
        if isinstance(value, Tensor)
    }


def _odd(given: Tensor, wanted: Tensor) -> str:
    """Return why the values of one tensor cannot be copied into another; "" if they can."""
    if given.is_quantized:
        return "quantized"
    if given.layout != torch.strided:
        return "sparse"
    if given.device.type == "meta":
        return "without values"
    if wanted.is_floating_point() and not given.is_floating_point():
        return str(given.dtype).removeprefix("torch.")
    return ""


def _match(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Map the network's tensor names to those of the state dict; ``None`` if they do not match.

    Tensors match by name, or else by order if all pairs have the same role (the last part of the
    name: weight, bias, running_mean, …) and shape, and no name contradicts it. The classifier's
    tensors may differ in their first dimension, the number of classes.
    """
    expected, given = _essential(network.state_dict()), _essential(state)
    heads = head_prefixes(network)

    def fits(key: str, value: Tensor) -> bool:
        want = expected[key].shape
        return value.shape == want or (
            key.startswith(heads) and value.ndim == len(want) and value.shape[1:] == want[1:]
        )

    if len(given) != len(expected):
        return None
    if given.keys() == expected.keys():
        pairs = {key: key for key in expected}
    else:
        pairs = dict(zip(expected, given, strict=True))
    for key, other in pairs.items():
        same_role = key.rpartition(".")[2] == other.rpartition(".")[2]
        contradicted = other in expected and other != key
        if not same_role or contradicted or not fits(key, given[other]):
            return None
    return pairs


def _essential(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop BatchNorm's step counters, which some frameworks do not store."""
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def _misfit(name: str, network: nn.Module, path: Path, state: Mapping[str, Tensor]) -> str:
    """Describe how a state dict differs from the network's, by name if any names are shared."""
    expected, given = _essential(network.state_dict()), _essential(state)
    pairs: list[tuple[str | None, str | None]]
    if expected.keys() & given.keys():
        pairs = [(key, key if key in given else None) for key in expected]
        pairs += [(None, key) for key in given if key not in expected]
    else:
        pairs = list(zip_longest(expected, given))

    def describe(key: str | None, tensors: Mapping[str, Tensor]) -> str:
        return "nothing" if key is None else f"{key} {tuple(tensors[key].shape)}"

    def differ(key: str | None, other: str | None) -> bool:
        if key is None or other is None or expected[key].shape != given[other].shape:
            return True
        return key.rpartition(".")[2] != other.rpartition(".")[2]

    wrong = [pair for pair in pairs if differ(*pair)]
    first = "; ".join(
        f"expected {describe(a, expected)}, found {describe(b, given)}" for a, b in wrong[:4]
    )
    return (
        f"{path} does not hold weights of {name} but of another network: {len(wrong)} of "
        f"{len(expected)} tensors do not match (the file has {len(given)}). {first}. "
        "Type model.name=NAME with the network that the file was saved from, or another "
        "model.weights=PATH."
    )
