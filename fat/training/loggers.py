"""Lightning loggers by name. Weights & Biases never prompts and works offline."""

from __future__ import annotations

import csv
import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from fat.utils.errors import FatError, unknown_name
from fat.utils.io import write_text
from fat.utils.nested import leaves as nested_leaves

__all__ = [
    "LOGGERS",
    "finish",
    "flatten",
    "leaves",
    "log_histograms",
    "log_results",
    "make_logger",
    "sync_command",
    "wandb_mode",
]

LOGGERS = ("wandb", "csv", "tensorboard", "none")
WANDB_ID = "wandb-id.txt"
"""File in the run directory with the W&B run id, so that a resumed run stays the same run."""


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
        config: Configuration of the run in plain containers.
        project: W&B project.
        group: W&B group.
        entity: W&B user or team; ``None`` for the default.
        tags: W&B tags.

    Raises:
        FatError: If the name is unknown or the logger's package is not installed.
    """
    if name == "none":
        return None
    if name == "csv":
        # Lightning's logger deletes its folder: rename what an interrupted run left there.
        _set_aside(folder / "csv")
        logger: Logger = CSVLogger(folder, name="csv", version="")
    elif name == "tensorboard":
        try:
            logger = TensorBoardLogger(folder, name="tensorboard", version="")
        except ModuleNotFoundError as error:
            raise FatError(
                "logger=tensorboard needs its package: pip install tensorboard"
            ) from error
    elif name == "wandb":
        logger = WandbLogger(
            experiment=_wandb_run(folder, run_name, config, project, group, entity, tags)
        )
    else:
        raise unknown_name("logger", name, LOGGERS)
    if name != "wandb":
        logger.log_hyperparams(dict(config))
    return logger


def _wandb_run(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    project: str,
    group: str | None,
    entity: str | None,
    tags: list[str] | None,
) -> Any:
    """Start a W&B run, or continue it after a crash."""
    import wandb  # slow to import

    known = folder / WANDB_ID
    id_ = known.read_text(encoding="utf-8").strip() if known.is_file() else None
    # Not created by Lightning, which passes a deprecated argument.
    run = wandb.init(
        name=name,
        dir=folder,
        id=id_,
        resume="allow" if id_ is not None and wandb_mode() == "online" else None,
        project=project,
        group=group,
        entity=entity,
        tags=tags or None,
        config=dict(config),
        settings=wandb.Settings(mode=wandb_mode(), silent=True, console="off"),
    )
    write_text(known, f"{run.id}\n")
    return run


def log_histograms(logger: Logger, values: Mapping[str, Tensor], step: int) -> None:
    """Log histograms of tensors, if the logger supports them.

    Args:
        logger: From :func:`make_logger`.
        values: Tensors of any shape by name.
        step: Number of optimizer steps.
    """
    if isinstance(logger, WandbLogger):
        import wandb

        logger.experiment.log(
            {
                **{
                    f"histograms/{name}": wandb.Histogram(np_histogram=_histogram(tensor))
                    for name, tensor in values.items()
                },
                "trainer/global_step": step,
            }
        )
    elif isinstance(logger, TensorBoardLogger):
        for name, tensor in values.items():
            logger.experiment.add_histogram(f"histograms/{name}", tensor.cpu(), step)


def _histogram(tensor: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return np.histogram(tensor.detach().float().cpu().numpy(), bins=min(64, max(tensor.numel(), 1)))


def log_results(
    logger: Logger,
    metrics: Mapping[str, Any],
    step: int,
    *,
    table: Path | None = None,
    figures: Mapping[str, Any] | None = None,
    files: Sequence[Path] = (),
) -> None:
    """Log the results of a finished run under the names of docs/metrics.md.

    All loggers get the numbers. W&B also gets numbers and strings in the run's summary, the table
    of layers, the plots, and the files as one artifact ``student-ID`` of type ``model``.

    Args:
        logger: From :func:`make_logger`.
        metrics: Content of metrics.json.
        step: Number of optimizer steps.
        table: CSV file with one row per quantizer.
        figures: Plotly figures {data, layout} by name.
        files: Files of the artifact.
    """
    logger.log_metrics(flatten(metrics), step=step)
    if not isinstance(logger, WandbLogger):
        return
    import plotly.graph_objects
    import wandb

    run = logger.experiment
    run.summary.update(leaves(metrics))
    content: dict[str, Any] = {
        f"plots/{name}": wandb.Plotly(plotly.graph_objects.Figure(figure))
        for name, figure in (figures or {}).items()
    }
    if table is not None:
        with table.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file))
        content["layers"] = wandb.Table(
            columns=[*header], data=[[_number(x) for x in r] for r in rows]
        )
    if content:
        run.log({**content, "trainer/global_step": step})
    if files:
        # Nested: W&B rejects more than a hundred keys, and an export has more.
        artifact = wandb.Artifact(f"student-{run.id}", type="model", metadata=dict(metrics))
        for path in files:
            artifact.add_file(str(path))
        run.log_artifact(artifact)


def finish(logger: Logger) -> None:
    """Close a logger at the end of a run, so that the next run in this process gets a new one."""
    logger.finalize("success")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()


def leaves(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers and strings of a nested mapping by dotted name.

    Examples:
        >>> leaves({"trained": {"top1": 90.0, "top5": None}, "model": "x"})
        {'trained.top1': 90.0, 'model': 'x'}
    """
    values = nested_leaves(nested)
    return {key: value for key, value in values.items() if isinstance(value, (str, int, float))}


def flatten(nested: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a nested mapping by dotted name.

    Examples:
        >>> flatten({"trained": {"top1": 90.0, "top5": None}, "model": "x"})
        {'trained.top1': 90.0}
    """
    return {
        name: value
        for name, value in leaves(nested).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _number(text: str) -> float | str | None:
    try:
        return float(text)
    except ValueError:
        return text or None


def _set_aside(folder: Path) -> None:
    if not folder.is_dir():
        return
    number = 1
    while (free := folder.with_name(f"{folder.name}-before-{number}")).exists():
        number += 1
    folder.rename(free)


def wandb_mode() -> Any:
    """Return ``WANDB_MODE`` if it is set, otherwise online with an API key and offline without."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return "online" if netrc.netrc().authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def sync_command(logger: Logger | None) -> str | None:
    """Return the command that uploads an offline W&B run, ``None`` for other runs."""
    if not isinstance(logger, WandbLogger) or wandb_mode() != "offline":
        return None
    return f"wandb sync {Path(logger.experiment.dir).parent}"
