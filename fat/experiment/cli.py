"""What the entry points share: errors without a traceback, run directories, sweeps."""

from __future__ import annotations

import functools
import io
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fat.experiment.config import RunConfig, parse, suggest_key
from fat.utils.errors import FatError, nearest, no_run

__all__ = ["SweepReport", "arguments", "explain", "guarded", "job", "share_of_cores", "task"]

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells expect it."""
FAILED = 1
"""Exit status of a sweep of which a job failed."""
AUTO = "auto"
LAUNCHERS = ("submitit", "joblib")
"""Where errors come from when a job's process is killed, for example for memory."""
CHANGEABLE = ("trainer", "logger", "name", "hydra")
"""Groups that may be given beside ``resume=DIR``: they do not change the result."""

_errors: list[Exception] = []
_failed_jobs: list[Path] = []
_under_way: list[Path] = []
"""The sweep that this process started and that has not come to its end."""


def task(function: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Let errors of a Hydra task reach :func:`guarded` without Hydra's own lines about them."""

    @functools.wraps(function)
    def quiet(composed: DictConfig) -> Any:
        try:
            return function(composed)
        except FatError as error:
            _errors.append(error)
            return math.nan

    return quiet


def guarded(main: Callable[[], Any], schema: type) -> None:
    """Call a Hydra main; print what the user can mend as one text, without a traceback.

    Args:
        main: The function under ``hydra.main``.
        schema: The dataclass of its config, for suggestions.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions come here instead of being printed
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what cannot be printed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.argv[1:] = arguments(sys.argv[1:])
        main()
        if _errors:
            raise _errors[0]
    except FatError as error:
        print(f"\nError: {error}", file=sys.stderr)
        sys.exit(2)
    except (HydraException, ConfigCompositionException, OmegaConfBaseException) as error:
        print(f"\nError: {explain(error, schema)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(
            f"\nError: {error.filename}: {error.strerror}. Choose another place.", file=sys.stderr
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        if _under_way:
            print(_say_stopped(_under_way[0]), file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not _under_way or type(error).__module__.partition(".")[0] not in LAUNCHERS:
            raise
        print(f"\nError: The sweep stopped: {str(error).strip()}", file=sys.stderr)
        print(
            f"{_say_stopped(_under_way[0])} Jobs that were handed to a queue do not stop: see that "
            "none still runs.",
            file=sys.stderr,
        )
        sys.exit(FAILED)
    if _failed_jobs:
        sys.exit(FAILED)


def _say_stopped(directory: Path) -> str:
    """What there is of a sweep that did not come to its end, and how it goes on."""
    from fat.report.sweep_page import write_sweep

    goes_on = f"The same command with sweep.resume=true, or sweep.resume={directory}, goes on."
    try:
        _, page = write_sweep(directory)
    except FatError:  # not one job has begun
        return goes_on
    return f"Report of what is there: {page}\n{goes_on}"


def arguments(given: Sequence[str]) -> list[str]:
    """The command line with the places that ``resume`` and ``sweep.resume`` mean.

    Args:
        given: Without the program's name.

    Raises:
        FatError: If there is nothing to go on with.

    Examples:
        >>> arguments(["model=resnet18"])
        ['model=resnet18']
    """
    words = list(given)
    for word in words:
        key, _, value = word.partition("=")
        if key in ("resume", "sweep.resume") and "=" in word and not value.strip("'\""):
            raise FatError(f"{word} names no directory: type {key}=DIR, or leave it out.")
    resume, sweep_resume = _value(words, "resume"), _value(words, "sweep.resume")
    multirun = any(word in ("-m", "--multirun") for word in words)
    if resume is not None:
        if multirun:
            raise FatError("resume= goes on with one run; for a sweep type sweep.resume=true.")
        words = [word for word in words if not word.startswith("resume=")]
        words.append(f"resume={_quoted(resume)}")
        if resume == AUTO:
            if _value(words, "hydra.run.dir") is None:
                raise FatError(
                    "resume=auto goes on with the run in a directory, or begins it there: type "
                    "hydra.run.dir=DIR too."
                )
        else:
            if not (Path(resume) / "config.yaml").is_file():  # Hydra would make the folder
                raise no_run(resume, "config.yaml")
            # What was composed first stays in .hydra.
            words += [f"hydra.run.dir={_quoted(resume)}", "hydra.output_subdir=null"]
    if sweep_resume is not None and sweep_resume.lower() not in ("false", "null"):
        if not multirun:
            raise FatError("sweep.resume goes on with a sweep: type -m too.")
        found = _sweep_of(words) if sweep_resume.lower() == "true" else Path(sweep_resume)
        if not found.is_dir():
            raise FatError(f"There is no sweep in {found}: sweep.resume takes its directory.")
        words = [word for word in words if not word.startswith("sweep.resume=")]
        words += ["sweep.resume=true", f"hydra.sweep.dir={_quoted(str(found))}"]
    elif multirun:
        taken = _value(words, "hydra.sweep.dir")
        if taken is not None and (Path(taken) / "sweep.json").is_file():
            raise FatError(
                f"{taken} holds a sweep already. Type sweep.resume={taken} to go on with it, or "
                "give another directory: hydra.sweep.dir=DIR."
            )
    if int(os.environ.get("RANK", "0")) > 0:  # torchrun: the first process alone writes
        words = [word for word in words if not word.startswith("hydra.run.dir=")]
        words += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]
    return words


def _value(words: Sequence[str], key: str) -> str | None:
    found = [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]
    if not found:
        return None
    return found[-1].strip("'\"") or None


def _quoted(value: str) -> str:
    """As Hydra's grammar wants it, where the value is more than plain letters and slashes."""
    if re.fullmatch(r"[\w./:-]+", value, re.ASCII):
        return value
    escaped = value.replace("'", r"\'")
    return f"'{escaped}'"


def _sweep_of(words: Sequence[str]) -> Path:
    """The newest sweep that the same command line started."""
    command = _command_line(words)
    given = _value(words, "hydra.sweep.dir")
    if given is not None:
        return Path(given)
    noted = sorted(Path("multirun").glob("*/*/sweep.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(noted):
        if json.loads(path.read_text(encoding="utf-8")).get("command") == command:
            return path.parent
    raise FatError(
        f"No sweep under multirun/ was started by: {command}\nType sweep.resume=DIR with the "
        "directory of the sweep, or leave sweep.resume out to start one."
    )


def _command_line(words: Sequence[str]) -> str:
    """The command that starts the same, whatever it says about going on and where."""
    kept = [
        word
        for word in words
        if not word.startswith(("sweep.resume=", "hydra.sweep.dir=", "resume="))
    ]
    return shlex.join(["python", Path(sys.argv[0]).name, *kept])


def job(composed: DictConfig) -> float:
    """Do the run that Hydra composed, alone or as a job of a sweep.

    Raises:
        FatError: For anything the user can mend, of a run by itself.
    """
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    command: str | None = shlex.join(["python", "train.py", *overrides])
    directory = Path(hydra.runtime.output_dir)
    if hydra.mode == RunMode.MULTIRUN:
        command = shlex.join(
            ["python", "train.py", *(o for o in overrides if not o.startswith("sweep."))]
        )
        return _job_of_sweep(composed, hydra, directory, command)
    if composed.get("resume") in (None, AUTO):
        config = parse(RunConfig, composed)
    else:
        config, command = _config_of_run(Path(composed.resume), overrides, composed)

    from fat.experiment.sweep import run_job

    return run_job(config, directory, command=command, resume=composed.get("resume") is not None)


def _job_of_sweep(composed: DictConfig, hydra: HydraConf, directory: Path, command: str) -> float:
    """Do a job in whatever process the launcher chose; what fails stays behind as a file."""
    if (multiprocessing.get_start_method(allow_none=True) or "").startswith("loky"):
        # A worker of joblib would start the workers that load images as joblib starts its own,
        # which torch's processes do not fit.
        multiprocessing.set_start_method(None, force=True)
    from fat.experiment.sweep import Sweep, job_failed, run_job

    place = Path(hydra.sweep.dir)
    resume = bool(composed.sweep.resume)
    sweep = Sweep(place.as_posix(), place, resume, int(hydra.job.num), _threads(place, hydra))
    try:
        config = parse(RunConfig, composed)
    except FatError as error:  # the process that started the sweep would not hear of it
        return job_failed(directory, error, command, sweep)
    with _leaves_as_asked():
        return run_job(config, directory, command=command, sweep=sweep)


@contextmanager
def _leaves_as_asked() -> Iterator[None]:
    """Keep the exit status of a job that submitit stops to queue it again.

    submitit leaves by SystemExit from a signal's handler, with a status that says so. Training
    takes that for Ctrl-C: it saves what there is and ends with KeyboardInterrupt, which has another
    status.
    """
    asked: list[SystemExit] = []

    def remembering(handler: Callable[..., Any]) -> Callable[..., Any]:
        def handle(*arguments: Any) -> None:
            try:
                handler(*arguments)
            except SystemExit as leaving:
                asked.append(leaving)
                raise

        return handle

    changed: dict[int, Callable[..., Any]] = {}
    numbers = (getattr(signal, name, None) for name in ("SIGUSR1", "SIGUSR2"))  # not on Windows
    for number in filter(None, numbers):
        handler = signal.getsignal(number)
        if callable(handler) and str(getattr(handler, "__module__", "")).startswith("submitit"):
            changed[number] = handler
            signal.signal(number, remembering(handler))
    try:
        yield
    except KeyboardInterrupt:
        if asked:
            raise asked[0] from None
        raise
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)


def share_of_cores(
    launcher: str, cores: int, jobs: int, environment: Mapping[str, str]
) -> int | None:
    """Torch threads of one job of a sweep, so that jobs that run at once share the machine.

    joblib sees to it itself: it gives its workers ``OMP_NUM_THREADS``.

    Args:
        launcher: Hydra's class of it.
        cores: Cores that this process may use.
        jobs: Jobs of the sweep.
        environment: Of this process.

    Returns:
        ``None`` to leave it to torch.

    Examples:
        >>> share_of_cores("hydra_submitit_launcher.LocalLauncher", 16, 3, {})
        5
        >>> share_of_cores("x.SlurmLauncher", 16, 3, {"SLURM_CPUS_PER_TASK": "4"})
        4
    """
    if "OMP_NUM_THREADS" in environment:  # somebody has chosen
        return None
    kind = launcher.rpartition(".")[2]
    if kind == "LocalLauncher":  # starts all jobs at once
        return max(1, cores // max(1, jobs))
    if kind == "SlurmLauncher" and environment.get("SLURM_CPUS_PER_TASK", "").isdigit():
        return int(environment["SLURM_CPUS_PER_TASK"])
    return None


def _threads(directory: Path, hydra: HydraConf) -> int | None:
    from fat.experiment.sweep import jobs_of

    able = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if able else os.cpu_count() or 1
    target = str(OmegaConf.select(cast(Any, hydra), "launcher._target_") or "")
    return share_of_cores(target, cores, jobs_of(directory), os.environ)


def _config_of_run(
    directory: Path, overrides: Sequence[str], composed: DictConfig
) -> tuple[RunConfig, str | None]:
    """The options of the run in a directory, with what may be changed of them."""
    from fat.experiment.run_directory import read_config, read_metrics, stored_config

    given = [word for word in overrides if not word.startswith("resume=")]
    for word in given:
        group = re.split(r"[.=@]", word.lstrip("+~"))[0]
        if group not in CHANGEABLE:
            raise FatError(
                f"resume= takes the options of the run itself; leave out {word}. Only trainer, "
                "logger and name may be others."
            )
    merged = OmegaConf.create(stored_config(read_config(directory)))
    for word in given:
        key = re.split("=", word.lstrip("+~"))[0]
        OmegaConf.update(merged, key, OmegaConf.select(composed, key), force_add=True)
    metrics = read_metrics(directory)
    return parse(RunConfig, merged), None if metrics is None else metrics["command"]


class SweepReport(Callback):
    """Notes what a sweep is before its first job, and writes its report after the last."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Write sweep.json."""
        from fat.experiment.sweep import start_sweep

        directory = Path(config.hydra.sweep.dir)
        _under_way[:] = [directory]
        overrides = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
        parsed = OverridesParser.create().parse_overrides(
            [*overrides, *config.hydra.overrides.task]
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
            _command_line(sys.argv[1:]),
            math.prod(choices.values()),
        )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the report, say what failed, and drop what only jobs needed."""
        from fat.experiment.sweep import end_sweep

        _under_way.clear()
        _failed_jobs.extend(end_sweep(Path(config.hydra.sweep.dir)))


def explain(error: Exception, schema: type) -> str:
    """Hydra's message in short, with the nearest names where one was mistyped."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(dict.fromkeys(str(link).strip() for link in chain))
    unknown = re.search(r"Could not (?:override|append) '([^']+)'", text)
    if unknown:
        return suggest_key(unknown[1].split("@")[0], schema)
    missing = re.search(r"Could not (?:find|load) '([^']+)'", text)
    options = re.search(r"Available options in '[^']*':\n((?:\s+\S+\n?)+)", text)
    if missing and options:
        group, _, given = missing[1].rpartition("/")
        names = options[1].split()
        close = nearest(given, names)
        hint = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
        more = ""
        if group == "model":
            more = " Any other timm network: model.name=NAME."
        return f"Unknown choice {group}={given}.{hint} Allowed: {', '.join(names)}.{more}"
    if "Missing mandatory value" in text:
        key = re.search(r"Missing mandatory value: (\S+)", text)
        return f"{key[1] if key else 'A value'} is needed: type {key[1] if key else 'KEY'}=VALUE."
    return text.splitlines()[0]
