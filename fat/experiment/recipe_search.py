"""A search over options of the recipe: ``python -m fat.search 'optim.lr=interval(1e-4,1e-2)' …``.

What a trial is judged by is the validation loss of its student. Test images choose nothing here:
figures on images that the recipe was chosen by would promise too much.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    OverrideType,
    RangeSweep,
)
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from fat.experiment.cli import explain
from fat.experiment.config import RunConfig, parse
from fat.utils.commands import command_line
from fat.utils.errors import FatError, missing_extra
from fat.utils.io import write_json

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

__all__ = ["Space", "comparable", "main", "read_space", "search", "validation_loss"]

logger = logging.getLogger(__name__)

SEARCH, TRIALS, LOG = "search.json", "trials.log", "train.log"
"""Files of a search: what it is, optuna's journal of its trials, and a trial's own lines."""
INTERRUPTED = 130
NOT_HERE = ("hydra", "resume", "sweep", "hub")
"""Options of a run that make no sense in a search."""
JUDGES = ("model", "teacher", "seed", "optim.loss", "optim.temperature")
"""Options that decide which validation loss is meant; so do those of data but for FREE.

Also the size of a batch: the mean of several batches' RMSE is not that of their union.
"""
FREE = ("train_images", "workers", "cache", "cache_dir", "augment", "flip")

Objective = Callable[[int, Sequence[str], bool], float]
"""Number of the trial, its overrides, whether it goes on → what is made small; NaN: it failed."""


@dataclass(frozen=True)
class Space:
    """What a search goes through.

    Attributes:
        fixed: Overrides that all trials have.
        free: What else each trial has: option → the values it may take.
    """

    fixed: tuple[str, ...]
    free: Mapping[str, BaseDistribution]

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        """The overrides of one trial, in Hydra's grammar.

        Args:
            values: Of each free option, as optuna has it.
        """
        return [*self.fixed, *(f"{name}={values[name]}" for name in self.free)]


def read_space(words: Sequence[str]) -> Space:
    """What a command line asks for, in Hydra's grammar of overrides.

    ``interval(a,b)`` draws real numbers, ``int(interval(a,b))`` whole ones with both ends,
    ``range(a,b,step)`` the numbers of that row, ``choice(…)`` or ``a,b,c`` one of the values.
    ``tag(log, interval(a,b))`` draws evenly in the logarithm. All else is the same in all trials.

    Args:
        words: The overrides.

    Raises:
        FatError: If one cannot be read, or nothing is left to search for.
    """
    _optuna()
    parser = OverridesParser.create()
    fixed: list[str] = []
    free: dict[str, BaseDistribution] = {}
    for word in words:
        try:
            override = parser.parse_override(word)
        except HydraException as error:
            raise FatError(f"{word} is no override: {str(error).splitlines()[0]}.") from error
        name = override.get_key_element()
        if re.split(r"[.@/=]", name.lstrip("+~"))[0] in NOT_HERE:
            raise FatError(
                f"{word} has no meaning in a search: leave it out. --directory DIR says where its "
                "trials go, --resume DIR goes on with one."
            )
        if not override.is_sweep_override():
            fixed.append(word)
        elif name.startswith("~") or override.type == OverrideType.DEL:
            raise FatError(f"{word} deletes something: give it one value.")
        elif name in free:
            raise FatError(f"{name} is given twice: type it once.")
        else:
            _check_judges(name, word)
            free[name] = _distribution(override, word)
    if not free:
        raise FatError(
            "Nothing is left to search for: give an option several values, for example "
            "'optim.lr=tag(log, interval(1e-4,1e-2))' or 'optim.epochs=choice(1,2,4)'."
        )
    return Space(tuple(fixed), free)


def _check_judges(name: str, word: str) -> None:
    key = name.lstrip("+")
    data = key.partition(".")
    judges = key in JUDGES or data[0] in ("model", "teacher")
    if judges or (data[0] == "data" and data[2] not in FREE):
        raise FatError(
            f"{word} changes what the validation loss is of, so that trials could not be compared "
            f"by it. Give {key} one value here, or sweep over it: python train.py -m {word}"
        )


def _distribution(override: Override, word: str) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    given = override.value()
    log = "log" in getattr(given, "tags", ())
    if isinstance(given, IntervalSweep):
        low, high = given.start, given.end
        assert low is not None
        assert high is not None
        _check_ends(word, low, high, log=log)
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(float(low), float(high), log=log)
    if isinstance(given, RangeSweep):
        if not given.step:
            raise FatError(f"{word} goes nowhere: range(FROM,TO,STEP) needs a step that is not 0.")
        row = sorted(float(value) for value in given.range())
        if not row:
            raise FatError(f"{word} is empty: range(FROM,TO) ends before TO.")
        if log:
            raise FatError(f"{word}: a range has steps; tag(log, …) needs interval(FROM,TO).")
        assert given.step is not None
        if all(isinstance(value, int) for value in (given.start, given.stop, given.step)):
            return IntDistribution(int(row[0]), int(row[-1]), step=abs(int(given.step)))
        return FloatDistribution(row[0], row[-1], step=abs(float(given.step)))
    if isinstance(given, ChoiceSweep):
        # As text, since optuna takes no lists, and Hydra reads it again.
        assert given.list is not None
        values = tuple(
            text.partition("=")[2] for text in _each(override.get_key_element(), given.list)
        )
        if len(set(values)) < 2:
            raise FatError(f"{word} leaves no choice: give it two values, or one without choice().")
        return CategoricalDistribution(values)
    raise FatError(f"{word}: a search knows interval(), range() and choice(); name the values.")


def _each(key: str, values: Sequence[Any]) -> list[str]:
    return [f"{key}={Override._get_value_element_as_str(value)}" for value in values]


def _check_ends(word: str, low: float, high: float, *, log: bool) -> None:
    if not low < high or not all(map(math.isfinite, (low, high))):
        raise FatError(f"{word}: an interval goes from a number to a larger one.")
    if log and low <= 0:
        raise FatError(f"{word}: a logarithm needs numbers above 0.")


def search(
    space: Space, objective: Objective, directory: Path, *, trials: int, seed: int = 0
) -> Study:
    """Ask optuna's TPE sampler for trials, and tell it what came of them.

    What a trial tries follows from the seed, its number and the trials before, so a search that
    was cut off and goes on tries what it would have tried.

    Args:
        space: What is searched.
        objective: Called for each trial.
        directory: Where trials are noted. Those that are there count; one that was cut off is done
            first, with what it had.
        trials: How many there shall be in all, failed ones too.
        seed: Of the sampler.

    Raises:
        FatError: If the notes of earlier trials cannot be read.
    """
    optuna = _optuna()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / TRIALS
    try:
        study: Study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name="search",
            direction="minimize",
            load_if_exists=True,
        )
        earlier = study.get_trials(deepcopy=False)
    except (OSError, ValueError, KeyError) as error:
        raise FatError(f"{path} cannot be read: {error}. Begin in another directory.") from error

    def judge(number: int, values: Mapping[str, Any], again: bool) -> None:
        tried = " ".join(f"{name}={values[name]}" for name in space.free)
        logger.info("Trial %d of %d: %s", number + 1, trials, tried)
        loss = objective(number, space.overrides(values), again)
        if math.isfinite(loss):
            study.tell(number, loss)
            logger.info("Validation loss %.6g, the lowest so far %.6g.", loss, study.best_value)
        else:
            study.tell(number, state=TrialState.FAIL)

    for trial in earlier:
        if trial.state != TrialState.RUNNING:
            continue
        if set(trial.params) == set(space.free):
            judge(trial.number, trial.params, True)
        else:  # cut off while it was drawn
            study.tell(trial.number, state=TrialState.FAIL)
    for number in range(len(earlier), trials):
        study.sampler = optuna.samplers.TPESampler(seed=_seed(seed, number))
        asked = study.ask(dict(space.free))
        judge(asked.number, asked.params, False)
    return study


def _seed(seed: int, number: int) -> int:
    """One stream of random numbers a trial: a sampler that began anew would repeat its first."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def validation_loss(metrics: Mapping[str, Any]) -> float:
    """Validation loss of the student that a run kept: what trials are compared by.

    Args:
        metrics: Content of metrics.json.

    Raises:
        FatError: If the run trained nothing, and so measured none.
    """
    training = metrics.get("training")
    if not training:
        raise FatError(
            "The run trained nothing, so it has no validation loss to compare trials by. Type "
            "optim.epochs=1 or more, or optim.reconstruction.steps."
        )
    return float(training["best_loss"])


def comparable(config: RunConfig) -> dict[str, Any]:
    """The options that decide which validation loss is meant; trials must agree in them.

    Args:
        config: A trial's options.
    """
    data = {key: value for key, value in asdict(config.data).items() if key not in FREE}
    return {
        "model": asdict(config.model),
        "teacher": asdict(config.teacher),
        "seed": config.seed,
        "optim.loss": config.optim.loss,
        "optim.temperature": config.optim.temperature,
        "data": data,
    }


def _compose(conf: Path, overrides: Sequence[str]) -> RunConfig:
    try:
        with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
            return parse(RunConfig, compose("train", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise FatError(explain(error, RunConfig)) from error


class _Trials:
    """Runs as trials: one directory each, as a sweep has them."""

    def __init__(self, conf: Path, directory: Path) -> None:
        from fat.experiment.run_directory import read_config

        self.conf, self.directory = conf, directory
        self.compared: dict[str, Any] | None = None
        for file in directory.glob("*/config.yaml"):  # of a search that goes on
            self.compared = comparable(read_config(file.parent))
            break

    def __call__(self, number: int, overrides: Sequence[str], going_on: bool) -> float:
        from fat.experiment.run_directory import read_metrics
        from fat.experiment.sweep import Sweep, job_failed, run_job

        config = _compose(self.conf, overrides)
        self._check(config)
        name = (config.model.name or "network").rpartition("/")[2].replace(":", "-")
        place = self.directory / f"{number}-{name}"
        command = shlex.join(["python", "train.py", *overrides])
        sweep = Sweep(self.directory.as_posix(), self.directory, going_on, number)
        place.mkdir(parents=True, exist_ok=True)
        log = logging.FileHandler(place / LOG)
        logging.getLogger().addHandler(log)
        try:
            run_job(config, place, command=command, sweep=sweep)
            metrics = read_metrics(place)
            if (place / "failure.json").is_file() or metrics is None:
                return math.nan
            try:
                loss = validation_loss(metrics)
            except FatError as error:
                return job_failed(place, error, command, sweep)
        finally:
            logging.getLogger().removeHandler(log)
            log.close()
        return loss

    def _check(self, config: RunConfig) -> None:
        mine = comparable(config)
        self.compared = self.compared or mine
        for key, value in mine.items():
            if self.compared[key] != value:
                raise FatError(
                    f"Trials differ in {key}, so that their validation losses are of different "
                    f"things: {self.compared[key]} and {value}. Search among choices that agree in "
                    "it, or sweep over them: python train.py -m"
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status.

    Args:
        arguments: What follows the command's name; ``None`` takes the process's own.
    """
    parser = argparse.ArgumentParser(
        prog=command_line("search"),
        description=(
            "Search for the options with the lowest validation loss. Options are written as for "
            "train.py; interval(), range() and choice() are searched."
        ),
        epilog=(
            "example: python -m fat.search --trials 20 'optim.lr=tag(log, interval(1e-4,1e-2))' "
            "'optim.epochs=choice(1,2,4)' quant.bits=4"
        ),
    )
    parser.add_argument("overrides", nargs="*", metavar="OPTION=VALUES")
    parser.add_argument("--trials", type=int, help="how many in all; 20")
    parser.add_argument("--seed", type=int, help="of the sampler; 0 (seed=N is that of the runs)")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="for the trials")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the search in DIR")
    parser.add_argument("--conf", type=Path, default=Path("conf"), help="folder of train.yaml")
    given = parser.parse_intermixed_args(arguments)
    console = logging.StreamHandler(sys.stdout)
    # The runs' own lines, with their test figures, are for their directories.
    console.addFilter(lambda record: record.name == logger.name or record.levelno >= logging.ERROR)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(console)
    try:
        return _main(given)
    except FatError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    finally:
        root.removeHandler(console)


def _main(given: argparse.Namespace) -> int:
    if not (given.conf / "train.yaml").is_file():
        raise FatError(
            f"There is no {given.conf / 'train.yaml'} here: go to the folder that train.py lies "
            "in, or type --conf DIR."
        )
    words, seed, trials, directory = _asked(given)
    space = read_space(words)
    if trials < 1:
        raise FatError(f"--trials is {trials}; it must be 1 or more.")
    _compose(given.conf, space.fixed)  # a mistyped option is known now
    from fat.experiment.sweep import SHARED, failures, start_sweep

    goes_on = shlex.join(["python", "-m", "fat.search", "--resume", str(directory)])
    command = shlex.join(
        [
            "python",
            "-m",
            "fat.experiment.recipe_search",
            "--trials",
            str(trials),
            "--seed",
            str(seed),
            *words,
        ]
    )
    start_sweep(directory, directory.as_posix(), command, trials)
    notes = {"words": words, "seed": seed, "trials": trials, "optuna": version("optuna")}
    write_json(directory / SEARCH, notes)
    logger.info("Searched: %s", ", ".join(word for word in words if word not in space.fixed))
    logger.info(
        "Trials are compared by the validation loss; test images choose nothing. Each trial's "
        "lines are in its %s under %s",
        LOG,
        directory,
    )
    try:
        study = search(space, _Trials(given.conf, directory), directory, trials=trials, seed=seed)
    except KeyboardInterrupt:
        print(f"\nInterrupted. Go on with: {goes_on}", file=sys.stderr)
        return INTERRUPTED
    _conclude(study, space, directory)
    failed = failures(directory)
    if failed:
        logger.error("%d of %d trials failed; failure.json says why.", len(failed), trials)
        return 1
    shutil.rmtree(directory / SHARED, ignore_errors=True)
    return 0


def _asked(given: argparse.Namespace) -> tuple[list[str], int, int, Path]:
    """Options, seed, number of trials and directory, of a new search or of one that goes on."""
    if given.resume is None:
        directory = given.directory or Path(
            "multirun", datetime.now().strftime("%Y-%m-%d/%H-%M-%S-search")
        )
        if (directory / SEARCH).is_file():
            raise FatError(
                f"{directory} holds a search already: type --resume {directory} to go on with it, "
                "or give another --directory."
            )
        trials = 20 if given.trials is None else given.trials
        return list(given.overrides), given.seed or 0, trials, directory
    path = given.resume / SEARCH
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
        words, seed, trials = list(notes["words"]), int(notes["seed"]), int(notes["trials"])
        if not all(isinstance(word, str) for word in words):
            raise ValueError("words are no texts")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise FatError(
            f"{given.resume} is no directory of a search: {SEARCH} is missing or damaged. A "
            "search prints its directory at its start."
        ) from error
    for what, ours, theirs in (
        ("options", given.overrides or words, words),
        ("--seed", seed if given.seed is None else given.seed, seed),
        ("--directory", given.directory or given.resume, given.resume),
    ):
        if ours != theirs:
            raise FatError(
                f"--resume goes on with what the search began with; its {what} are {theirs}. "
                "Leave them out; only --trials may be another."
            )
    return words, seed, trials if given.trials is None else given.trials, given.resume


def _conclude(study: Study, space: Space, directory: Path) -> None:
    from fat.report.sweep_page import write_sweep
    from fat.report.text import format_metrics

    table, page = write_sweep(directory)
    best = _best(study)
    if best is None:
        logger.error("No trial came to its end.\nTable: %s\nReport: %s", table, page)
        return
    logger.info("\nLowest validation loss %.6g: trial %d.", best.value, best.number + 1)
    for found in directory.glob(f"{best.number}-*/metrics.json"):
        metrics = json.loads(found.read_text(encoding="utf-8"))
        rows = {name: metrics[name] for name in ("float", "calibrated", "trained")}
        logger.info("On test images, which did not choose it:\n%s", format_metrics(rows))
    logger.info("Table: %s\nReport: %s\nThe best again:", table, page)
    logger.info(shlex.join(["python", "train.py", *space.overrides(best.params)]))


def _best(study: Study) -> FrozenTrial | None:
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return min(done, key=lambda trial: (trial.value, trial.number), default=None)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise missing_extra("search", "optuna, which proposes the trials,") from error
    return optuna


if __name__ == "__main__":
    sys.exit(main())
