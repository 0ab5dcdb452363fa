"""What logging and reporting cost beside the run itself.

    python benchmarks/overhead.py [OVERRIDES]

does one run of train.py in this process with every function under a stopwatch that logs or
reports: the loggers' own, the callbacks that keep figures, histograms and checkpoints, details of
layers, the page. Overrides are train.py's; without any it is the default run with its default
logger, W&B offline. Printed is each part's wall time and its share of the run. What FAT imports
before the run is not counted, what logging imports is. W&B writes its file in another process: what
that takes of the processor shows in the time of the run only, to be compared with logger=none.
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
    "α in figures and histograms": ((AlphaHistory, ("on_validation_end",)),),
    "checkpoints to go on from": (
        (PeriodicCheckpoint, ("on_train_batch_end", "on_validation_end")),
    ),
    "logger, while training": ((WandbLogger, ("log_metrics", "log_hyperparams")),),
    "logger, start and end": ((experiment, ("make_logger", "log_results", "finish")),),
    "details of layers and images": ((experiment, ("write_details", "run_figures")),),
    "metrics.json, tables and page": ((experiment, ("_keep", "write_thresholds")),),
}
"""What is timed: by part, the owners of functions and the functions' names."""


class Stopwatch:
    """Wall time of the outermost timed call, by part, so that nothing counts twice."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inside = False

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, under the stopwatch."""

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
        """Put every function of PARTS under the stopwatch."""
        for part, places in PARTS.items():
            for owner, names in places:
                for name in names:
                    setattr(owner, name, self.timed(part, getattr(owner, name)))


def table(seconds: dict[str, float], whole: float) -> str:
    """Markdown: seconds and percent of the run, by part and together."""
    lines = ["| part | seconds | of the run |", "|---|---|---|"]
    for name, spent in [*seconds.items(), ("all of it", sum(seconds.values()))]:
        lines.append(f"| {name} | {spent:.2f} | {100 * spent / whole:.2f} % |")
    return "\n".join([*lines, f"| the run | {whole:.1f} | |"])


def main() -> None:
    """Run once and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("overrides", nargs="*", help="of train.py")
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
