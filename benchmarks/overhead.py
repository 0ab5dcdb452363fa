"""Measure what logging and reporting cost relative to the run.

    python benchmarks/overhead.py [OVERRIDES]

Runs train.py once in this process with a stopwatch around every function that logs or reports:
loggers, callbacks that record metrics, histograms and checkpoints, details of layers, the page.
OVERRIDES are those of train.py; the default is the default run with its default logger, W&B
offline. Printed are the wall time of each part and its fraction of the run. Imports of FAT before
the run are not counted, those of loggers are. W&B writes its file in another process; its CPU time
shows only in the time of the run, compared with logger=none.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from pytorch_lightning.loggers import WandbLogger

from fat.experiment import runner as experiment
from fat.experiment.config import RunConfig, parse
from fat.training.callbacks import AlphaHistory, CSVHistory, PeriodicCheckpoint

CONF = Path(__file__).parents[1] / "conf"
PARTS: dict[str, tuple[tuple[Any, tuple[str, ...]], ...]] = {
    "history.csv": (
        (CSVHistory, ("setup", "on_train_start", "on_train_batch_end", "on_validation_end")),
    ),
    "α in metrics and histograms": ((AlphaHistory, ("on_validation_end",)),),
    "checkpoints for resuming": (
        (PeriodicCheckpoint, ("on_train_batch_end", "on_validation_end")),
    ),
    "logger, while training": ((WandbLogger, ("log_metrics", "log_hyperparams")),),
    "logger, start and end": ((experiment, ("make_logger", "log_results", "finish")),),
    "details of layers and images": ((experiment, ("write_details", "run_figures")),),
    "metrics.json, tables and page": ((experiment, ("_keep", "write_thresholds")),),
}
"""Timed functions by part: their owners and names."""


class Stopwatch:
    """Wall time of the outermost timed call by part, so that nothing counts twice."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inside = False

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with the stopwatch around it."""

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if self._inside:
                return function(*arguments, **named)
            self._inside = True
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[part] += time.perf_counter() - started
                self._inside = False

        return call

    def attach(self) -> None:
        """Wrap every function of PARTS."""
        for part, places in PARTS.items():
            for owner, names in places:
                for name in names:
                    setattr(owner, name, self.timed(part, getattr(owner, name)))


def table(seconds: dict[str, float], whole: float) -> str:
    """Return a Markdown table: seconds and percent of the run by part and in total."""
    lines = ["| part | seconds | of the run |", "|---|---|---|"]
    for name, spent in [*seconds.items(), ("all of it", sum(seconds.values()))]:
        lines.append(f"| {name} | {spent:.2f} | {100 * spent / whole:.2f} % |")
    return "\n".join([*lines, f"| the run | {whole:.1f} | |"])


def main() -> None:
    """Run once and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("overrides", nargs="*", help="overrides of train.py")
    options = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = parse(RunConfig, compose("train", overrides=options.overrides))
    stopwatch = Stopwatch()
    stopwatch.attach()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        experiment.run(config, Path(folder))
        whole = time.perf_counter() - started
    print(table(stopwatch.seconds, whole))


if __name__ == "__main__":
    sys.exit(main())
