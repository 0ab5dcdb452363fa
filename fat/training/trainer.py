"""Setup of Lightning's trainer that distillation and fine-tuning share."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch

from fat.utils.random import set_random_states

__all__ = [
    "UNUSED_GPU",
    "RestoresRandomStates",
    "fused",
    "ignore_warnings",
    "keep_interrupt_handler",
    "trainer_options_with_defaults",
]


UNUSED_GPU = "GPU available but not used.*"
"""Lightning's advice to pass ``accelerator="gpu"``. The device is that of the network."""


def trainer_options_with_defaults(
    trainer_options: dict[str, Any] | None, device: torch.device, **options: Any
) -> dict[str, Any]:
    """Merge arguments of :class:`pytorch_lightning.Trainer`: FAT's defaults, then the user's.

    Args:
        trainer_options: Arguments from the user, which take precedence.
        device: Device to train on, unless the user's arguments name another.
        **options: Arguments of this training.
    """
    given = trainer_options or {}
    where: dict[str, Any] = {"accelerator": device.type, "devices": 1}
    if device.type == "cuda" and given.get("accelerator", "cuda") in ("cuda", "gpu"):
        where["devices"] = [device.index or 0]
    return {
        **where,
        "logger": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        **options,
        **given,
    }


@contextlib.contextmanager
def keep_interrupt_handler() -> Iterator[None]:
    """Restore the handler of Ctrl-C, which Lightning leaves disabled after an interrupt."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def ignore_warnings(*patterns: str) -> Iterator[None]:
    """Ignore warnings whose messages match one of the regular expressions.

    So is Lightning's advice to allow TF32 on GPUs, which FAT turns off on purpose.
    """
    with warnings.catch_warnings(), _without_advice():
        for pattern in patterns:
            warnings.filterwarnings("ignore", pattern)
        yield


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    def wanted(record: logging.LogRecord) -> bool:
        return "set_float32_matmul_precision" not in record.getMessage()

    lightning = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    lightning.addFilter(wanted)
    try:
        yield
    finally:
        lightning.removeFilter(wanted)


def fused(module: pl.LightningModule, device: torch.device) -> bool | None:
    """Return the option ``fused`` of Adam: ``True``, a single kernel, on CUDA."""
    # Lightning does not clip gradients with it.
    trainer = module._trainer
    clips = trainer is not None and bool(trainer.gradient_clip_val)
    return True if device.type == "cuda" and not clips else None


class RestoresRandomStates(pl.LightningModule):
    """Module that restores the random states of a checkpoint, given as ``_random``, last.

    Loading a checkpoint may draw from them.
    """

    _random: dict[str, Any] | None = None

    def use_fused(self, checkpoint: dict[str, Any], device: torch.device) -> None:
        """Set the option :func:`fused` of this device, since a checkpoint may be of another."""
        for state in checkpoint["optimizer_states"]:
            for group in state["param_groups"]:
                group["fused"] = fused(self, device)

    def on_train_start(self) -> None:
        """Restore the random states of a checkpoint."""
        if self._random is not None:
            set_random_states(self._random)
            self._random = None
