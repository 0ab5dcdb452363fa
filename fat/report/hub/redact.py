"""What of a run may be shown to everybody: without paths, folders' names and accounts."""

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
"""Parts of a config that say nothing of the network, but of accounts and places."""
PRIVATE_KEYS = frozenset(
    {"root", "test_root", "index", "cache_dir", "mixed", "entity", "first_skipped", "sweep"}
)
"""Keys whose values are places, or names of files, wherever they stand."""
TUNED = re.compile(r", fine-tuned on \d+ classes$")
SEPARATOR = re.compile(r"[\\/]")
WEIGHTS_FILE = re.compile(r"[^\\/]+\.(safetensors|pth|pt)", re.IGNORECASE)


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration without what is private.

    The sections on loggers and the hub are left out, the run's name, folders and files are null; of
    a file of weights its own name stays. Any other text with a folder in it is null too, so that an
    option that is new here hides rather than tells.

    Args:
        config: What config.yaml holds.

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
    """A run's metrics without what is private: folders, and names of images.

    Args:
        metrics: What metrics.json holds.

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
    """Where weights came from, without the folders of a file.

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
    """What was typed after ``train.py``, with DIR or FILE in place of what is private.

    Args:
        overrides: Words such as ``"quant.bits=4"``.

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
        if last in PRIVATE_KEYS or _is_place(value):
            value = "FILE" if last in ("weights", "index") else "DIR"
        public.append(f"{key}{equals}{value}")
    return public


def public_command(command: str) -> str | None:
    """A command line of train.py, made public as in :func:`public_overrides`.

    Args:
        command: As for a shell.

    Returns:
        The same on one line; ``None`` where it cannot be read.

    Examples:
        >>> public_command("python train.py -m quant.bits=8,4 data.root='/home/me/my photos'")
        'python train.py -m quant.bits=8,4 data.root=DIR'
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
