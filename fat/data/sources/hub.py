"""Datasets of the Hugging Face hub that are stored as parquet."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub

from fat.utils.errors import FatError, first_line

__all__ = ["asked_for", "fetch"]

PREFIX = "hub:"


def asked_for(root: str | None) -> bool:
    """Whether ``data.root`` names a dataset of the hub.

    Examples:
        >>> asked_for("hub:ILSVRC/imagenet-1k"), asked_for("/data/imagenet"), asked_for(None)
        (True, False, False)
    """
    return root is not None and root.startswith(PREFIX)


def fetch(root: str | None) -> Path:
    """Download a dataset's parquet files, or find them from an earlier download.

    Args:
        root: ``"hub:OWNER/NAME"``.

    Returns:
        The folder that holds them, inside the hub's cache.

    Raises:
        FatError: If the name is no dataset's, or it cannot be had.
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
    # No route, no such dataset, no permission, a full disk: one way on.
    except Exception as error:
        raise FatError(
            f"The dataset {name} could not be had from the Hugging Face hub: {first_line(error)} "
            "Log in with hf auth login if it asks for permission (ImageNet does), or type "
            "data.root=DIR with a copy on this machine."
        ) from error
    return Path(folder)
