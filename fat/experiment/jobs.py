"""Runs as Hydra starts them: alone, or as the jobs of a sweep."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

from fat.experiment.arguments import AUTO, sweep_command
from fat.experiment.config import RunConfig, current_overrides, parse
from fat.utils.commands import command_line
from fat.utils.errors import FatError

__all__ = ["SweepReport", "job", "running_sweep", "share_of_cores"]

logger = logging.getLogger(__name__)

CHANGEABLE = ("trainer", "logger", "name", "hydra")
"""Groups that may be given beside ``resume=DIR``: they do not change the result."""

_running: list[Path] = []
_failed: list[Path] = []


def running_sweep() -> Path | None:
    """Return the directory of the sweep that this process started and that has not ended."""
    return _running[0] if _running else None


def failed_jobs() -> Sequence[Path]:
    """Return the run directories of the jobs that failed in sweeps of this process."""
    return _failed


def job(composed: DictConfig) -> float:
    """Run the experiment that Hydra composed, alone or as a job of a sweep.

    Returns:
        The value that a sweeper minimizes, see :func:`fat.experiment.runner.run`.

    Raises:
        FatError: For anything that the user can fix, except in a sweep, which goes on.
    """
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    directory = Path(hydra.runtime.output_dir)
    if hydra.mode == RunMode.MULTIRUN:
        return _job_of_sweep(composed, hydra, directory)
    command: str | None = command_line("train", *_config_folder(hydra), *overrides)
    if composed.get("resume") in (None, AUTO):
        config = parse(RunConfig, composed)
    else:
        config, command = _config_of_run(Path(composed.resume), overrides, composed)

    from fat.experiment.sweep import run_job

    return run_job(config, directory, command=command, resume=composed.get("resume") is not None)


def _job_of_sweep(composed: DictConfig, hydra: HydraConf, directory: Path) -> float:
    """Run a job in the process that the launcher chose; a failure is recorded in a file."""
    if (multiprocessing.get_start_method(allow_none=True) or "").startswith("loky"):
        # Workers of joblib would start the data loader's workers by joblib's own method, which
        # torch's processes do not support.
        multiprocessing.set_start_method(None, force=True)
    from fat.experiment.sweep import Sweep, job_failed, log_progress, run_job

    place = Path(hydra.sweep.dir)
    overrides = [word for word in hydra.overrides.task if not word.startswith("sweep.")]
    command = command_line("train", *_config_folder(hydra), *overrides)
    resume = bool(composed.sweep.resume)
    sweep = Sweep(place.as_posix(), place, resume, int(hydra.job.num), _threads(place, hydra))
    try:
        config = parse(RunConfig, composed)
    except FatError as error:  # raised in a launcher's process it would reach nobody
        log_progress(sweep)
        return job_failed(directory, error, command, sweep)
    with _exit_status_of_submitit():
        return run_job(config, directory, command=command, sweep=sweep)


def _config_folder(hydra: HydraConf) -> list[str]:
    """The ``--config-dir`` that this run was started with, as words of its command line."""
    return [
        word
        for source in hydra.runtime.config_sources
        if source.provider == "command-line"
        for word in ("--config-dir", source.path)
    ]


@contextmanager
def _exit_status_of_submitit() -> Iterator[None]:
    """Keep the exit status of a job that submitit stops in order to queue it again.

    submitit raises SystemExit, whose status says so, in a signal handler. Training takes that for
    Ctrl-C: it saves the best student and raises KeyboardInterrupt, which has another status.
    """
    raised: list[SystemExit] = []

    def recording(handler: Callable[..., Any]) -> Callable[..., Any]:
        def handle(*arguments: Any) -> None:
            try:
                handler(*arguments)
            except SystemExit as end:
                raised.append(end)
                raise

        return handle

    replaced: dict[int, Callable[..., Any]] = {}
    numbers = (getattr(signal, name, None) for name in ("SIGUSR1", "SIGUSR2"))  # not on Windows
    for number in filter(None, numbers):
        handler = signal.getsignal(number)
        if callable(handler) and str(getattr(handler, "__module__", "")).startswith("submitit"):
            replaced[number] = handler
            signal.signal(number, recording(handler))
    try:
        yield
    except KeyboardInterrupt:
        if raised:
            raise raised[0] from None
        raise
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def share_of_cores(
    launcher: str, cores: int, jobs: int, environment: Mapping[str, str]
) -> int | None:
    """Return the number of torch threads for one job, so that concurrent jobs share the machine.

    joblib does this itself: it sets ``OMP_NUM_THREADS`` in its workers.

    Args:
        launcher: Class path of Hydra's launcher.
        cores: Number of cores available to this process.
        jobs: Number of jobs of the sweep.
        environment: Environment variables of this process.

    Returns:
        ``None`` to keep torch's default.

    Examples:
        >>> share_of_cores("hydra_submitit_launcher.LocalLauncher", 16, 3, {})
        5
        >>> share_of_cores("x.SlurmLauncher", 16, 3, {"SLURM_CPUS_PER_TASK": "4"})
        4
    """
    if "OMP_NUM_THREADS" in environment:
        return None
    kind = launcher.rpartition(".")[2]
    if kind == "LocalLauncher":  # starts all jobs at once
        return max(1, cores // max(1, jobs))
    if kind == "SlurmLauncher" and environment.get("SLURM_CPUS_PER_TASK", "").isdigit():
        return int(environment["SLURM_CPUS_PER_TASK"])
    return None


def _threads(directory: Path, hydra: HydraConf) -> int | None:
    from fat.experiment.sweep import jobs_of

    affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    launcher = str(OmegaConf.select(cast(Any, hydra), "launcher._target_") or "")
    return share_of_cores(launcher, cores, jobs_of(directory), os.environ)


def _config_of_run(
    directory: Path, overrides: Sequence[str], composed: DictConfig
) -> tuple[RunConfig, str | None]:
    """The options and the command of a run to resume, with the given changes applied."""
    from fat.experiment.run_directory import read_config, read_metrics, stored_config

    given = [word for word in overrides if not word.startswith("resume=")]
    for word in given:
        group = re.split(r"[.=@]", word.lstrip("+~"))[0]
        if group not in CHANGEABLE:
            raise FatError(
                f"resume= uses the options of the run itself: leave out {word}. Only trainer, "
                "logger and name may differ."
            )
    merged = OmegaConf.create(stored_config(read_config(directory)))
    for word in given:
        key = word.lstrip("+~").partition("=")[0]
        OmegaConf.update(merged, key, OmegaConf.select(composed, key), force_add=True)
    typed = [word.lstrip("+~").partition("=")[0] for word in given]
    if "trainer" not in typed and "trainer.accelerator" not in typed:
        _use_cpu_without_gpu(merged)
    metrics = read_metrics(directory)
    return parse(RunConfig, merged), None if metrics is None else metrics["command"]


def _use_cpu_without_gpu(merged: DictConfig) -> None:
    """Replace a GPU that this machine lacks by the CPU, which gives the same network."""
    import torch

    if OmegaConf.select(merged, "trainer.accelerator") == "gpu" and not torch.cuda.is_available():
        logger.info("The run was started on a GPU, and torch finds none here: using the CPU.")
        OmegaConf.update(merged, "trainer.accelerator", "cpu")


class SweepReport(Callback):
    """Hydra callback that writes sweep.json before a sweep and its report at the end."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Write sweep.json; give the options that a sweep's file names by earlier keys today's."""
        from fat.experiment.sweep import start_sweep

        params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
        current = [word.partition("=") for word in current_overrides(params, RunConfig)]
        with flag_override(config, ["readonly", "struct"], [False, False]):
            config.hydra.sweeper.params = {key: value for key, _, value in current} or None

        directory = Path(config.hydra.sweep.dir)
        _running[:] = [directory]
        parsed = OverridesParser.create().parse_overrides(
            ["=".join((key, value)) for key, _, value in current]
            + list(config.hydra.overrides.task)
        )
        choices = {
            override.get_key_element(): len(list(override.sweep_string_iterator()))
            if override.is_discrete_sweep()
            else 1
            for override in parsed
        }
        start_sweep(
            directory,
            directory.as_posix(),
            sweep_command(sys.argv[1:]),
            math.prod(choices.values()),
        )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the report, log the failures, and delete what only the jobs needed."""
        from fat.experiment.sweep import end_sweep

        _running.clear()
        _failed.extend(end_sweep(Path(config.hydra.sweep.dir)))
