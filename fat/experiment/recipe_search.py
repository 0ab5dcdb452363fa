"""Search for the options with the lowest validation loss: ``fat search 'optim.lr=1e-3,1e-4' …``.

Trials are compared by the validation loss of their students. Test images take no part: metrics on
images that the recipe was selected on would be too optimistic.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import re
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
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fat.experiment.cli import conf_directory, explain
from fat.experiment.config import RunConfig, current_overrides, parse
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
"""Files of a search: its options, optuna's journal of the trials, and the log of each trial."""
INTERRUPTED = 130
NOT_IN_A_SEARCH = ("hydra", "resume", "sweep", "hub")
"""Options of a run that have no meaning in a search."""
DEFINE_THE_LOSS = ("model", "teacher", "seed", "optim.loss", "optim.temperature")
"""Options that define the validation loss, as do those of ``data`` except FREE_DATA.

Also the batch size: the mean of the RMSE of several batches is not that of their union.
"""
FREE_DATA = ("train_images", "workers", "cache", "cache_dir", "augment", "flip")

Objective = Callable[[int, Sequence[str], bool], float]
"""(number of the trial, its overrides, whether it is resumed) -> loss; NaN for a failed trial."""


@dataclass(frozen=True)
class Space:
    """The search space.

    Attributes:
        fixed: Overrides that all trials have in common.
        free: The options that are searched, and the distribution of each.
    """

    fixed: tuple[str, ...]
    free: Mapping[str, BaseDistribution]

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        """Return the overrides of one trial in Hydra's grammar.

        Args:
            values: optuna's value of each free option.
        """
        return [*self.fixed, *(f"{name}={values[name]}" for name in self.free)]


def read_space(words: Sequence[str]) -> Space:
    """Read the search space from overrides in Hydra's grammar.

    ``interval(a,b)`` draws real numbers, ``int(interval(a,b))`` integers including both ends,
    ``range(a,b,step)`` the numbers of that range, ``choice(…)`` or ``a,b,c`` one of the values.
    ``tag(log, interval(a,b))`` draws uniformly in the logarithm. All other overrides are fixed.

    Args:
        words: The overrides.

    Raises:
        FatError: If one cannot be parsed, or none has several values.
    """
    _optuna()
    parser = OverridesParser.create()
    fixed: list[str] = []
    free: dict[str, BaseDistribution] = {}
    for word in words:
        try:
            override = parser.parse_override(word)
        except HydraException as error:
            raise FatError(f"{word} is not an override: {str(error).splitlines()[0]}.") from error
        name = override.get_key_element()
        if re.split(r"[.@/=]", name.lstrip("+~"))[0] in NOT_IN_A_SEARCH:
            raise FatError(
                f"{word} has no meaning in a search: leave it out. --directory DIR is where the "
                "trials go, --resume DIR resumes a search."
            )
        if not override.is_sweep_override():
            fixed.append(word)
        elif name.startswith("~") or override.type == OverrideType.DEL:
            raise FatError(f"{word} deletes an option: leave out its values.")
        elif name in free:
            raise FatError(f"{name} is given twice: type it once.")
        else:
            _check_comparable(name, word)
            free[name] = _distribution(override, word)
    if not free:
        raise FatError(
            "There is nothing to search for: give an option several values, for example "
            "'optim.lr=tag(log, interval(1e-4,1e-2))' or 'optim.epochs=choice(1,2,4)'."
        )
    return Space(tuple(fixed), free)


def _check_comparable(name: str, word: str) -> None:
    key = name.lstrip("+")
    data = key.partition(".")
    defines = key in DEFINE_THE_LOSS or data[0] in ("model", "teacher")
    if defines or (data[0] == "data" and data[2] not in FREE_DATA):
        raise FatError(
            f"{word} changes the validation loss itself, so that trials could not be compared by "
            f"it. Give {key} one value here, or sweep over it: {command_line('train', '-m', word)}"
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
            raise FatError(f"{word}: the step of range(FROM,TO,STEP) must not be 0.")
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
        # As text: optuna has no lists, and Hydra parses it again.
        assert given.list is not None
        values = tuple(
            text.partition("=")[2] for text in _each(override.get_key_element(), given.list)
        )
        if len(set(values)) < 2:
            raise FatError(f"{word} has one value: give it another, or leave out choice().")
        return CategoricalDistribution(values)
    raise FatError(f"{word} is not allowed in a search; type interval(), range() or choice().")


def _each(key: str, values: Sequence[Any]) -> list[str]:
    return [f"{key}={Override._get_value_element_as_str(value)}" for value in values]


def _check_ends(word: str, low: float, high: float, *, log: bool) -> None:
    if not low < high or not all(map(math.isfinite, (low, high))):
        raise FatError(f"{word}: the second number of an interval must be the larger one.")
    if log and low <= 0:
        raise FatError(f"{word}: numbers on a log scale must be above 0.")


def search(
    space: Space, objective: Objective, directory: Path, *, trials: int, seed: int = 0
) -> Study:
    """Minimize an objective with optuna's TPE sampler.

    The options of a trial depend on the seed, its number and the earlier trials only, so a resumed
    search tries the same options as one that was not interrupted. That, and running an interrupted
    trial again under its number, is why ``study.optimize`` is not used.

    Args:
        space: The search space.
        objective: Called for each trial.
        directory: Folder of the journal. Its trials count; an interrupted one is repeated first,
            with the same options.
        trials: Total number of trials, including failed ones.
        seed: Seed of the sampler.

    Raises:
        FatError: If the journal cannot be read.
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
        raise FatError(f"{path} cannot be read: {error}. Use another directory.") from error

    def run(number: int, values: Mapping[str, Any], resumed: bool) -> None:
        tried = " ".join(f"{name}={values[name]}" for name in space.free)
        logger.info("Trial %d of %d: %s", number + 1, trials, tried)
        loss = objective(number, space.overrides(values), resumed)
        if math.isfinite(loss):
            study.tell(number, loss)
            logger.info("Validation loss %.6g; lowest so far %.6g.", loss, study.best_value)
        else:
            study.tell(number, state=TrialState.FAIL)

    for trial in earlier:
        if trial.state != TrialState.RUNNING:
            continue
        if set(trial.params) == set(space.free):
            run(trial.number, trial.params, True)
        else:  # interrupted while its options were drawn
            study.tell(trial.number, state=TrialState.FAIL)
    for number in range(len(earlier), trials):
        study.sampler = optuna.samplers.TPESampler(seed=_seed(seed, number))
        asked = study.ask(dict(space.free))
        run(asked.number, asked.params, False)
    return study


def _seed(seed: int, number: int) -> int:
    """A seed for each trial: a sampler that is created again would repeat its first draw."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def validation_loss(metrics: Mapping[str, Any]) -> float:
    """Return the validation loss of a run's best student, by which trials are compared.

    Args:
        metrics: Content of metrics.json.

    Raises:
        FatError: If the run has no training, and therefore no validation loss.
    """
    training = metrics.get("training")
    if not training:
        raise FatError(
            "A run without training has no validation loss to compare trials by. Type "
            "optim.epochs=1 or more, or optim.reconstruction.steps."
        )
    return float(training["best_loss"])


def comparable(config: RunConfig) -> dict[str, Any]:
    """Return the options that define the validation loss; they must be equal in all trials.

    Args:
        config: The options of a trial.
    """
    data = {key: value for key, value in asdict(config.data).items() if key not in FREE_DATA}
    return {
        "model": asdict(config.model),
        "teacher": [config.teacher, asdict(config.finetune)],
        "seed": config.seed,
        "optim.loss": config.optim.loss,
        "optim.temperature": config.optim.temperature,
        "data": data,
    }


def _compose(folders: Sequence[Path], overrides: Sequence[str]) -> DictConfig:
    conf, *others = [folder.resolve() for folder in folders]
    words = current_overrides(overrides, RunConfig)
    words += [f"hydra.searchpath=['file://{folder}']" for folder in others]
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            return compose("train", overrides=words)
    except (HydraException, OmegaConfBaseException) as error:
        raise FatError(explain(error, RunConfig)) from error


class _Trials:
    """The objective: each trial is a run in a directory of its own, as in a sweep."""

    def __init__(self, folders: Sequence[Path], directory: Path) -> None:
        from fat.experiment.run_directory import read_config

        self.folders, self.directory = folders, directory
        self.compared: dict[str, Any] | None = None
        for file in directory.glob("*/config.yaml"):  # of a resumed search
            self.compared = comparable(read_config(file.parent))
            break

    def __call__(self, number: int, overrides: Sequence[str], resumed: bool) -> float:
        from fat.experiment.run_directory import read_metrics
        from fat.experiment.sweep import Sweep, job_failed, run_job

        composed = _compose(self.folders, overrides)
        name = str(composed.model.name).rpartition("/")[2].replace(":", "-")
        place = self.directory / f"{number}-{name}"
        command = _train_command(self.folders, overrides)
        sweep = Sweep(self.directory.as_posix(), self.directory, resumed, number)
        try:
            config = parse(RunConfig, composed)
        except FatError as error:  # a value out of range fails its trials alone
            return job_failed(place, error, command, sweep)
        self._check(config)
        place.mkdir(parents=True, exist_ok=True)
        log = logging.FileHandler(place / LOG)
        logging.getLogger().addHandler(log)
        try:
            run_job(config, place, command=command, sweep=sweep)
            metrics = read_metrics(place)
            if (place / "failure.json").is_file() or metrics is None:
                return math.nan
            try:
                return validation_loss(metrics)
            except FatError as error:
                return job_failed(place, error, command, sweep)
        finally:
            logging.getLogger().removeHandler(log)
            log.close()

    def _check(self, config: RunConfig) -> None:
        mine = comparable(config)
        self.compared = self.compared or mine
        for key, value in mine.items():
            if self.compared[key] != value:
                raise FatError(
                    f"Trials differ in {key} ({self.compared[key]} and {value}), so that their "
                    "validation losses cannot be compared. Search among choices with the same "
                    f"value, or sweep over them: {command_line('train', '-m')}"
                )


def _train_command(folders: Sequence[Path], overrides: Sequence[str]) -> str:
    own = [word for folder in folders[1:] for word in ("--config-dir", str(folder))]
    return command_line("train", *own, *overrides)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        arguments: The command line without the program's name; ``None`` for this process's.
    """
    program = command_line("search")
    parser = argparse.ArgumentParser(
        prog=program,
        description=(
            "Search for the options with the lowest validation loss. Options are written as for "
            f"{command_line('train')}; those with interval(), range() or choice() are searched."
        ),
        epilog=(
            f"example: {program} --trials 20 'optim.lr=tag(log, interval(1e-4,1e-2))' "
            "'optim.epochs=choice(1,2,4)' quant.bits=4"
        ),
    )
    parser.add_argument("overrides", nargs="*", metavar="OPTION=VALUES")
    parser.add_argument("--trials", type=int, help="total number of trials (default: 20)")
    parser.add_argument(
        "--seed", type=int, help="seed of the sampler (default: 0); seed=N is that of the runs"
    )
    parser.add_argument("--directory", type=Path, metavar="DIR", help="folder of the trials")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="resume the search in DIR")
    parser.add_argument(
        "--conf", type=Path, metavar="DIR", help="folder of train.yaml (default: FAT's own)"
    )
    parser.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="folder with further files, see fat train"
    )
    given = parser.parse_intermixed_args(arguments)
    console = logging.StreamHandler(sys.stdout)
    # The runs' own messages, with their test metrics, go into their directories.
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
    folders = [given.conf or conf_directory()]
    if not (folders[0] / "train.yaml").is_file():
        raise FatError(f"There is no {folders[0] / 'train.yaml'}: leave out --conf {folders[0]}.")
    if given.config_dir is not None:
        if not given.config_dir.is_dir():
            raise FatError(f"There is no folder {given.config_dir}: --config-dir takes a folder.")
        folders.append(given.config_dir.resolve())
    words, seed, trials, directory = _options(given)
    space = read_space(words)
    if trials < 1:
        raise FatError(f"--trials is {trials}; it must be 1 or more.")
    parse(
        RunConfig, _compose(folders, space.fixed)
    )  # reports a mistyped option before the first trial
    from fat.experiment.sweep import SHARED, failures, start_sweep

    own = [word for folder in folders[1:] for word in ("--config-dir", str(folder))]
    command = command_line("search", "--trials", str(trials), "--seed", str(seed), *own, *words)
    start_sweep(directory, directory.as_posix(), command, trials)
    notes = {"words": words, "seed": seed, "trials": trials, "optuna": version("optuna")}
    write_json(directory / SEARCH, notes)
    logger.info("Searching: %s", ", ".join(word for word in words if word not in space.fixed))
    logger.info(
        "Trials are compared by the validation loss; test images take no part. The log of each "
        "trial is its %s under %s",
        LOG,
        directory,
    )
    try:
        study = search(space, _Trials(folders, directory), directory, trials=trials, seed=seed)
    except KeyboardInterrupt:
        resume = command_line("search", "--resume", str(directory), *own)
        print(f"\nInterrupted. Resume with: {resume}", file=sys.stderr)
        return INTERRUPTED
    _conclude(study, space, directory, folders)
    failed = failures(directory)
    if failed:
        logger.error("%d of %d trials failed; see their failure.json.", len(failed), trials)
        return 1
    shutil.rmtree(directory / SHARED, ignore_errors=True)
    return 0


def _options(given: argparse.Namespace) -> tuple[list[str], int, int, Path]:
    """Options, seed, number of trials and directory, of a new search or of a resumed one."""
    if given.resume is None:
        directory = given.directory or Path(
            "multirun", datetime.now().strftime("%Y-%m-%d/%H-%M-%S-search")
        )
        if (directory / SEARCH).is_file():
            raise FatError(
                f"{directory} already holds a search: type --resume {directory} to resume it, or "
                "give another --directory."
            )
        trials = 20 if given.trials is None else given.trials
        return list(given.overrides), given.seed or 0, trials, directory
    path = given.resume / SEARCH
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
        words, seed, trials = list(notes["words"]), int(notes["seed"]), int(notes["trials"])
        if not all(isinstance(word, str) for word in words):
            raise ValueError("words must be strings")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise FatError(
            f"{given.resume} is not the directory of a search: {SEARCH} is missing or damaged. A "
            "search prints its directory at the start."
        ) from error
    for what, ours, theirs in (
        ("options", given.overrides or words, words),
        ("--seed", seed if given.seed is None else given.seed, seed),
        ("--directory", given.directory or given.resume, given.resume),
    ):
        if ours != theirs:
            raise FatError(
                f"--resume uses the options of the search itself; its {what} are {theirs}. Leave "
                "them out; only --trials may differ."
            )
    return words, seed, trials if given.trials is None else given.trials, given.resume


def _conclude(study: Study, space: Space, directory: Path, folders: Sequence[Path]) -> None:
    from fat.report.sweep_page import write_sweep
    from fat.report.text import format_metrics

    table, page = write_sweep(directory)
    best = _best(study)
    if best is None:
        logger.error("All trials failed.\nTable: %s\nReport: %s", table, page)
        return
    logger.info("\nLowest validation loss %.6g: trial %d.", best.value, best.number + 1)
    for found in directory.glob(f"{best.number}-*/metrics.json"):
        metrics = json.loads(found.read_text(encoding="utf-8"))
        rows = {name: metrics[name] for name in ("float", "calibrated", "trained")}
        logger.info("On test images, which took no part:\n%s", format_metrics(rows))
    logger.info("Table: %s\nReport: %s\nRun the best trial again with:", table, page)
    logger.info(_train_command(folders, space.overrides(best.params)))


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
