"""Lightning loggers by name; Weights & Biases never asks a question and never needs a network."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from fat.errors import FatError, unknown_name

__all__ = ["LOGGERS", "make_logger", "wandb_mode"]

LOGGERS = ("wandb", "csv", "tensorboard", "none")


def make_logger(
    name: str,
    folder: Path,
    run_name: str,
    config: Mapping[str, Any],
    *,
    project: str = "fat",
    group: str | None = None,
    entity: str | None = None,
    tags: list[str] | None = None,
) -> Logger | None:
    """Build a logger that writes into a run directory.

    Args:
        name: ``wandb``, ``csv``, ``tensorboard`` or ``none``.
        folder: The run directory.
        run_name: Name of the run.
        config: The run's configuration in plain containers.
        project: W&B project.
        group: W&B group.
        entity: W&B user or team; the default one when ``None``.
        tags: W&B tags.

    Raises:
        FatError: If the name is unknown or the logger's package is not installed.
    """
    if name == "none":
        return None
    if name == "csv":
        logger: Logger = CSVLogger(folder, name="csv", version="")
    elif name == "tensorboard":
        try:
            logger = TensorBoardLogger(folder, name="tensorboard", version="")
        except ModuleNotFoundError as error:
            raise FatError(
                "logger=tensorboard needs its package: pip install tensorboard"
            ) from error
    elif name == "wandb":
        import wandb  # slow to import, and other loggers do without

        logger = WandbLogger(
            name=run_name,
            save_dir=folder,
            project=project,
            group=group,
            entity=entity,
            tags=tags or None,
            config=dict(config),
            settings=wandb.Settings(mode=wandb_mode(), silent=True, console="off"),
        )
    else:
        raise unknown_name("logger", name, LOGGERS)
    if name != "wandb":
        logger.log_hyperparams(dict(config))
    return logger


def wandb_mode() -> Any:
    """``WANDB_MODE`` where it is set; else online when there is a key, otherwise offline."""
    asked = os.environ.get("WANDB_MODE")
    if asked:
        return asked
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return "online" if netrc.netrc().authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def sync_command(logger: Logger | None) -> str | None:
    """The line that uploads an offline W&B run, or ``None`` where there is nothing to upload."""
    if not isinstance(logger, WandbLogger) or wandb_mode() != "offline":
        return None
    return f"wandb sync {Path(logger.experiment.dir).parent}"
