"""Parquet datasets of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub

from fat.utils.errors import FatError, first_line

__all__ = ["fetch", "is_hub_root"]

PREFIX = "hub:"


def is_hub_root(root: str | None) -> bool:
    """Return whether ``data.root`` names a dataset of the hub.

    Examples:
        >>> is_hub_root("hub:ILSVRC/imagenet-1k"), is_hub_root("/data/imagenet"), is_hub_root(None)
        (True, False, False)
    """
    return root is not None and root.startswith(PREFIX)


def fetch(root: str | None) -> Path:
    """Download the parquet files of a dataset, unless they are in the hub's cache.

    Args:
        root: ``"hub:OWNER/NAME"``.

    Returns:
        The folder of the files in the hub's cache.

    Raises:
        FatError: If the name is invalid, or the dataset cannot be downloaded.
    """
    name = (root or "").removeprefix(PREFIX)
    if len(name.split("/")) != 2 or not all(name.split("/")):
        raise FatError(
            f"data.root is {root}; a dataset of the hub is written hub:OWNER/NAME, such as "
            "data.root=hub:ILSVRC/imagenet-1k."
        )
    try:
        folder = huggingface_hub.snapshot_download(
            name, repo_type="dataset", allow_patterns=["*.parquet"], ignore_patterns=["*test-*"]
        )
    # No route, no such dataset, no permission, a full disk: the advice is the same for all.
    except Exception as error:
        reason = first_line(error).rstrip(".")
        raise FatError(
            f"Cannot download the dataset {name} from the Hugging Face hub: {reason}. "
            "If it requires permission (as ImageNet does), log in with hf auth login; or type "
            "data.root=DIR with a local copy."
        ) from error
    return Path(folder)
