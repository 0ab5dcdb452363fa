"""Options that depend on the machine: the device, and the values that are chosen for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch

from fat.data.datamodule import BATCH_SIZE, usable_workers
from fat.experiment.config import EvaluateConfig, RunConfig, TrainerConfig
from fat.utils import distributed
from fat.utils.errors import FatError

__all__ = [
    "accelerator_of",
    "check_batch_size",
    "check_devices",
    "describe",
    "device_of",
    "resolve",
]

C = TypeVar("C", RunConfig, EvaluateConfig)

GPU_BATCH_SIZE = 64
"""``data.batch_size=null`` on a GPU, where small batches leave most of it idle."""


def device_of(trainer: TrainerConfig) -> torch.device:
    """Return the device of ``trainer.accelerator``.

    Raises:
        FatError: If there is no GPU.
    """
    found = torch.cuda.is_available()
    if trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not found):
        return torch.device("cpu")
    if not found:
        raise FatError(
            f"trainer.accelerator={trainer.accelerator}, but torch finds no GPU here: "
            f"{_why_no_gpu()}. Type trainer=cpu to run without one."
        )
    return torch.device("cuda")


def accelerator_of(trainer: TrainerConfig) -> str:
    """Return Lightning's name of :func:`device_of`, ``"cpu"`` or ``"gpu"``."""
    return "cpu" if device_of(trainer).type == "cpu" else "gpu"


def check_devices(trainer: TrainerConfig) -> None:
    """Raise a FatError if this machine has fewer GPUs than ``trainer.devices``."""
    if device_of(trainer).type == "cpu":
        return
    there = torch.cuda.device_count()
    if trainer.devices > there:
        raise FatError(
            f"trainer.devices is {trainer.devices}, but torch finds {there} GPU(s) here. Type "
            f"trainer.devices={there}, or trainer.accelerator=cpu for processes on the CPU."
        )


def check_batch_size(config: RunConfig) -> None:
    """Raise a FatError if the processes of ``trainer.devices`` cannot divide a training step."""
    size, devices = config.data.batch_size, config.trainer.devices
    if config.optim.trains and size is not None and size % devices:
        raise FatError(
            f"data.batch_size is {size}, the images per step over all {devices} processes: it must "
            f"be a multiple of {devices}, as data.batch_size={-(-size // devices) * devices} is."
        )


def resolve(config: C, stored: RunConfig | None = None) -> C:
    """Return the options with a value for each that is left to the machine.

    These are ``trainer.accelerator``, ``trainer.precision``, ``data.batch_size`` and
    ``data.workers``.

    Args:
        config: The options of the command.
        stored: The options of the run that is resumed, which keeps its precision, batch size and
            workers on any machine.
    """
    accelerator = accelerator_of(config.trainer)
    precision, batch_size = config.trainer.precision, config.data.batch_size
    if precision == "auto" and stored is not None:
        precision = stored.trainer.precision
    if precision == "auto":
        precision = "bf16-mixed" if accelerator == "gpu" and _has_bf16() else "32-true"
    if batch_size is None and stored is not None:
        batch_size = stored.data.batch_size
    if batch_size is None:
        whole = BATCH_SIZE if accelerator == "cpu" else GPU_BATCH_SIZE
        processes = distributed.size()
        batch_size = -(-whole // processes) * processes  # a multiple, see FatDataModule
    workers = config.data.workers
    if workers is None and stored is not None:
        workers = stored.data.workers
    if workers is None:
        workers = usable_workers()
    return replace(
        config,
        trainer=replace(
            config.trainer,
            accelerator="cpu" if accelerator == "cpu" else "gpu",
            precision=precision,
        ),
        data=replace(config.data, batch_size=batch_size, workers=workers),
    )


def describe(config: RunConfig | EvaluateConfig) -> str:
    """Return in words where a resolved config runs; evaluation has no choice of precision.

    Examples:
        >>> from fat.experiment.config import DataConfig, ModelConfig
        >>> config = RunConfig(ModelConfig(name="resnet18"), DataConfig(source="photos", workers=2))
        >>> describe(resolve(replace(config, trainer=TrainerConfig(accelerator="cpu"))))
        'the CPU, 32-true, batches of 16, 2 workers'
    """
    device, processes = device_of(config.trainer), distributed.size()
    if device.type == "cpu":
        where = "the CPU" if processes == 1 else f"the CPU ({processes} processes)"
    else:
        name = torch.cuda.get_device_name(device)
        where = f"{name} (cuda:{torch.cuda.current_device()})"
        where = where if processes == 1 else f"{processes} GPUs ({name})"
    workers = config.data.workers
    parts = [
        where,
        *([config.trainer.precision] if isinstance(config, RunConfig) else []),
        f"batches of {config.data.batch_size}",
        f"{workers} worker{'' if workers == 1 else 's'}{' each' if processes > 1 else ''}",
    ]
    return ", ".join(parts)


def _has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is a build for CPUs. Install one for GPUs, see "
            "https://pytorch.org/get-started/locally/"
        )
    wanted = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return (
        f"torch {torch.__version__} is a build for {wanted}, whose driver is missing or too old, "
        "or CUDA_VISIBLE_DEVICES hides the GPUs (nvidia-smi lists them)"
    )
