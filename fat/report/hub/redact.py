"""Removing paths, folder names and accounts from the files of a run before it is published."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "public_command",
    "public_config",
    "public_metrics",
    "public_overrides",
    "public_weights",
]

PRIVATE_SECTIONS = frozenset({"logger", "hub", "hydra", "sweep", "resume"})
"""Sections of a config about accounts and places, not about the network."""
PRIVATE_KEYS = frozenset(
    {"root", "test_root", "index", "cache_dir", "mixed", "entity", "first_skipped", "sweep"}
)
"""Keys whose values are places or names of files."""
TUNED = re.compile(r", fine-tuned on \d+ classes$")
SEPARATOR = re.compile(r"[\\/]")
WEIGHTS_FILE = re.compile(r"[^\\/]+\.(safetensors|pth|pt)", re.IGNORECASE)


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's configuration without private values.

    The sections on loggers and the hub are left out; the run's name, folders and files become null,
    except that a weights file keeps its own name. Any other text that contains a folder becomes
    null as well, so that an option unknown here is hidden.

    Args:
        config: Content of config.yaml.

    Examples:
        >>> public_config({"model": {"weights": "/home/me/w.pth"}, "data": {"root": "/home/me"}})
        {'model': {'weights': 'w.pth'}, 'data': {'root': None}}
    """
    kept = {key: value for key, value in config.items() if key not in PRIVATE_SECTIONS}
    if "name" in kept:
        kept["name"] = None
    cleaned = _cleaned(kept)
    assert isinstance(cleaned, dict)
    return cleaned


def public_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's metrics without private values: folders, and names of images.

    Args:
        metrics: Content of metrics.json.

    Examples:
        >>> public_metrics({"weights": "file /home/me/w.pth", "data": {"root": "/home/me/photos"}})
        {'weights': 'file w.pth', 'data': {'root': None}}
    """
    cleaned = _cleaned(metrics)
    assert isinstance(cleaned, dict)
    # Two texts of which more may be told than of a text that nobody knows.
    for key, public in (("weights", public_weights), ("command", public_command)):
        text = metrics.get(key)
        if key in metrics:
            cleaned[key] = public(text) if isinstance(text, str) else None
    return cleaned


def public_weights(weights: str) -> str:
    """Return the origin of weights without the folders of a file.

    Examples:
        >>> public_weights("file /home/me/my weights.pth, fine-tuned on 3 classes")
        'file my weights.pth, fine-tuned on 3 classes'
        >>> public_weights("hub timm/resnet18.a1_in1k")
        'hub timm/resnet18.a1_in1k'
    """
    source, _, place = weights.partition(" ")
    if source != "file":
        return weights
    tuned = TUNED.search(place)
    path = place[: tuned.start()] if tuned else place
    return f"file {SEPARATOR.split(path)[-1]}{tuned[0] if tuned else ''}"


def public_overrides(overrides: Iterable[str]) -> list[str]:
    """Return overrides of ``train.py`` with DIR or FILE in place of private values.

    Args:
        overrides: Overrides such as ``"quant.bits=4"``.

    Examples:
        >>> public_overrides(["quant.bits=4", "data.root=/home/me", "logger.entity=me"])
        ['quant.bits=4', 'data.root=DIR']
    """
    public = []
    for override in overrides:
        key, equals, value = override.partition("=")
        name = key.lstrip("+~").partition("@")[0]
        section, last = name.split(".")[0], name.split(".")[-1]
        if section in PRIVATE_SECTIONS or name == "name":
            continue
        if not equals and _is_place(key):  # of --config-dir DIR
            key = "DIR"
        elif last in PRIVATE_KEYS or _is_place(value):
            value = "FILE" if last in ("weights", "index") else "DIR"
        public.append(f"{key}{equals}{value}")
    return public


def public_command(command: str) -> str | None:
    """Return a command line of train.py redacted by :func:`public_overrides`.

    Args:
        command: A shell command.

    Returns:
        The command on one line; ``None`` if it cannot be parsed.

    Examples:
        >>> public_command("python train.py -m quant.bits=8,4 data.root='/home/me/my photos'")
        'python train.py -m quant.bits=8,4 data.root=DIR'
        >>> public_command("fat train --config-dir /home/me/conf experiment=mine")
        'fat train --config-dir DIR experiment=mine'
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    program = [SEPARATOR.split(word)[-1] for word in words[:2]]
    kept = [" ".join(word.split()) for word in public_overrides(words[2:])]
    return shlex.join([*program, *kept])


def _is_place(text: str) -> bool:
    return bool(SEPARATOR.search(text)) or text.startswith("~")


def _cleaned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key): ([] if isinstance(part, list) else None)
            if key in PRIVATE_KEYS
            else _cleaned(part)
            for key, part in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_cleaned(part) for part in value]
    if isinstance(value, str) and _is_place(value):
        name = SEPARATOR.split(value)[-1]
        return name if WEIGHTS_FILE.fullmatch(name) else None
    return value
