"""The ``fat`` command, and what train.py and evaluate.py run."""

from __future__ import annotations

import argparse
import functools
import importlib
import io
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import fat
from fat.experiment import jobs
from fat.experiment.arguments import arguments
from fat.experiment.config import (
    EvaluateConfig,
    RunConfig,
    current_overrides,
    option_table,
    parse,
    suggest_key,
)
from fat.experiment.help import help_text
from fat.utils.commands import VARIABLE
from fat.utils.errors import FatError, nearest, unknown_name

__all__ = ["conf_directory", "evaluate", "explain", "guarded", "main", "task", "train"]

INTERRUPTED = 130
"""Exit status after Ctrl-C, by the convention of shells."""
FAILED = 1
"""Exit status of a sweep with a failed job."""
LAUNCHERS = ("submitit", "joblib")
"""Packages that raise errors when the process of a job is killed, for example out of memory."""

COMMANDS = {
    "train": "quantize a network and train its thresholds; -m for a sweep",
    "evaluate": "evaluate, analyze or export a finished run, or evaluate a model file",
    "report": "write the HTML pages of runs and sweeps again, or compare several",
    "search": "search for the options with the lowest validation loss",
    "dashboard": "save a Weights & Biases workspace that compares the runs of a project",
}
_MODULES = {
    "report": "fat.report.__main__",
    "search": "fat.experiment.recipe_search",
    "dashboard": "fat.report.wandb_dashboard",
}

_COMPLETION_FLAGS = ("-sc", "--shell-completion")
_COMPLETION = """\
_fat_complete() {
    COMPREPLY=($(compgen -W "$(COMP_LINE="$COMP_LINE" fat -sc query=bash)" -- "${COMP_LINE##* }"))
    if (( COMP_CWORD == 1 )); then compopt +o nospace; fi
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _fat_complete fat
"""

_errors: list[FatError] = []


def main(given: Sequence[str] | None = None) -> int:
    """Run the ``fat`` command and return its exit status.

    Args:
        given: The command line without the program's name; ``None`` for that of this process.
    """
    os.environ[VARIABLE] = "fat"
    name, *words = (sys.argv[1:] if given is None else given) or ["--help"]
    if name in ("-h", "--help"):
        _print(usage())
    elif name == "--version":
        print(f"fat {fat.__version__}")
    elif name in _COMPLETION_FLAGS:
        return _complete(words[0] if words else "")
    elif words[:1] and words[0] in _COMPLETION_FLAGS and words[1:] == ["install=bash"]:
        return _complete("install=bash")
    elif name in _MODULES:
        status: int = importlib.import_module(_MODULES[name]).main(words)
        return status
    elif name in ("train", "evaluate"):
        sys.argv = [f"fat {name}", *words]
        (train if name == "train" else evaluate)()
    else:
        print(f"Error: {unknown_name('command', name, COMMANDS)}", file=sys.stderr)
        return 2
    return 0


def usage() -> str:
    """Return the text of ``fat --help``."""
    lines = [
        "usage: fat COMMAND [OPTION=VALUE ...]",
        "",
        "Quantize pretrained networks to integers, without labels.",
        "",
        *(f"  fat {name:10} {meaning}" for name, meaning in COMMANDS.items()),
        "",
        "fat COMMAND --help explains a command; fat --version prints the version.",
        'Completion in bash: eval "$(fat --shell-completion install=bash)"',
    ]
    return "\n".join(lines)


def _complete(request: str) -> int:
    """Answer ``-sc install=bash``, and the ``-sc query=bash`` of the function that it installs."""
    if request == "install=bash":
        print(_COMPLETION, end="")
        return 0
    if request != "query=bash":
        print(
            f"Error: {request or 'nothing'} was requested; completion is for bash: type "
            "fat --shell-completion install=bash.",
            file=sys.stderr,
        )
        return 2
    _, _, line = os.environ.get("COMP_LINE", "").lstrip().partition(" ")
    name, space, _ = line.lstrip().partition(" ")
    if not space:
        print(*COMMANDS)
    elif name in ("train", "evaluate"):
        os.environ["COMP_LINE"] = line
        return main([name, "-sc", request])
    return 0


def conf_directory() -> Path:
    """Return the folder of the YAML files, in a checkout or in an installed wheel."""
    package = Path(fat.__file__).parent
    return next(path for path in (package / "conf", package.parent / "conf") if path.is_dir())


def train() -> None:
    """Run ``fat train`` with the arguments of this process."""
    _run("train", _train, RunConfig)


def evaluate() -> None:
    """Run ``fat evaluate`` with the arguments of this process."""
    _run("evaluate", _evaluate, EvaluateConfig)


def _run(name: str, function: Callable[[DictConfig], Any], schema: type) -> None:
    conf = conf_directory().resolve()
    if {"-h", "--help"} & set(sys.argv[1:]):
        _print(help_text(name, [*_config_folders(sys.argv[1:]), conf]))
        return
    start = hydra.main(version_base="1.3", config_path=str(conf), config_name=name)
    guarded(start(function), schema)


def _config_folders(words: Sequence[str]) -> list[Path]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path, action="append", default=[])
    found: list[Path] = parser.parse_known_args(words)[0].config_dir
    return found


def task(function: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Wrap a Hydra task so that :func:`guarded` reports its errors, not Hydra."""

    @functools.wraps(function)
    def quiet(composed: DictConfig) -> Any:
        try:
            return function(composed)
        except FatError as error:
            _errors.append(error)
            return math.nan

    return quiet


@task
def _train(composed: DictConfig) -> float:
    return jobs.job(composed)


@task
def _evaluate(composed: DictConfig) -> dict[str, Any]:
    config = parse(EvaluateConfig, composed)
    requested = {
        "artifact": config.artifact is not None,
        "export": config.export.target != "none",
        "analysis": config.analysis is not None,
    }
    names = [name for name, is_requested in requested.items() if is_requested]
    if len(names) > 1:
        raise FatError(f"{'= and '.join(names)}= are different tasks: type one at a time.")
    # Slow imports wait until the config is known to be valid.
    from fat.experiment.evaluate import analyze_run, evaluate_artifact, evaluate_run, export_run

    functions: dict[str, Callable[[EvaluateConfig], dict[str, Any]]] = {
        "artifact": evaluate_artifact,
        "export": export_run,
        "analysis": analyze_run,
    }
    return functions.get(names[0] if names else "", evaluate_run)(config)


def guarded(main: Callable[[], Any], schema: type) -> None:
    """Call a Hydra main function; print errors that the user can fix without a traceback.

    Args:
        main: The function that :func:`hydra.main` returned.
        schema: The dataclass of its config, for suggestions.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing
    for stream in (sys.stdout, sys.stderr):  # file names may not be encodable
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _check_flags(sys.argv[1:])
        words = sys.argv[1:]
        if not {"--config-path", "-cp"} & set(words):  # else conf/ may be that of version 0.1
            words = current_overrides(words, schema)
        sys.argv[1:] = arguments(words)
        main()
        if _errors:
            raise _errors[0]
    except FatError as error:
        _exit(2, f"Error: {error}")
    except (HydraException, ConfigCompositionException, OmegaConfBaseException) as error:
        _exit(2, f"Error: {explain(error, schema)}")
    except BrokenPipeError:
        _close_output()
        sys.exit(FAILED)
    except OSError as error:
        if error.filename is None:
            raise
        _exit(2, f"Error: {error.filename}: {error.strerror}. Choose another place.")
    except KeyboardInterrupt:
        _exit(INTERRUPTED, "Interrupted.", *_resume_hints())
    except Exception as error:
        if not jobs.running_sweep() or type(error).__module__.partition(".")[0] not in LAUNCHERS:
            raise
        _exit(
            FAILED,
            f"Error: The sweep stopped: {str(error).strip()}",
            *_resume_hints(),
            "Jobs that were submitted to a queue do not stop: check that none is still running.",
        )
    if jobs.failed_jobs():
        sys.exit(FAILED)


def _check_flags(words: Sequence[str]) -> None:
    """Raise a FatError at an unknown flag, which Hydra would answer with all of its own."""
    parser = get_args_parser()
    for word in parser.parse_known_args(words)[1]:
        flag = word.partition("=")[0]
        if flag.startswith("-"):
            close = nearest(flag, parser._option_string_actions, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise FatError(f"Unknown flag {flag}.{hint} --help lists all flags.")


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _close_output()


def _close_output() -> None:
    """Keep Python from flushing to a reader, such as head, that has ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _exit(status: int, *lines: str) -> None:
    print("\n" + "\n".join(lines), file=sys.stderr)
    sys.exit(status)


def _resume_hints() -> list[str]:
    """Say where the report of an interrupted sweep is and how to resume it."""
    from fat.report.sweep_page import write_sweep

    directory = jobs.running_sweep()
    if directory is None:
        return []
    resume = f"To resume, add sweep.resume=true or sweep.resume={directory} to the same command."
    try:
        return [f"Report of the finished jobs: {write_sweep(directory)[1]}", resume]
    except FatError:  # no job has started
        return [resume]


def explain(error: Exception, schema: type) -> str:
    """Return Hydra's message in short, with the nearest names where one was mistyped.

    Args:
        error: The error that Hydra or OmegaConf raised.
        schema: The dataclass of the config.
    """
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(dict.fromkeys(str(link).strip() for link in chain))
    unknown = re.search(r"Could not (?:override|append) '([^']+)'", text)
    if unknown:
        given = unknown[1].split("@")[0]
        groups = [path.name for path in conf_directory().iterdir() if path.is_dir()]
        last_words = [entry.key.rpartition(".")[2] for entry in option_table(schema)]
        if "." not in given and given not in last_words and (close := nearest(given, groups, 1)):
            return f"Unknown group '{given}'. Did you mean '{close[0]}'? --help lists all groups."
        return suggest_key(given, schema)
    several = re.search(r"Ambiguous value for argument '([^=']+)=", text)
    if several:
        return (
            f"{several[1]} has several values: add -m to run a sweep over them, or quote a value "
            f"that contains a comma, as in '{several[1]}=\"a,b\"'."
        )
    unreadable = re.search(r"Error parsing override '(.*)'", text)
    if unreadable:
        return (
            f"'{unreadable[1]}' cannot be read; allowed are GROUP=CHOICE and OPTION=VALUE, as in "
            "model=resnet18 or quant.bits=6. Quote a value with special characters, as in "
            "'data.root=\"/my photos/a=b\"'."
        )
    folder = re.search(r"Additional config directory '([^']+)' not found", text)
    if folder:
        return f"There is no directory {folder[1]}: type --config-dir DIR with your YAML files."
    missing = re.search(r"Could not (?:find|load) '([^']+)'", text)
    options = re.search(r"Available options in '[^']*':\n((?:\s+\S+\n?)+)", text)
    if missing and options:
        group, _, given = missing[1].rpartition("/")
        names = options[1].split()
        close = nearest(given, names)
        hint = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
        more = " Any other timm network: model.name=NAME." if group == "model" else ""
        return f"Unknown choice {group}={given}.{hint} Allowed: {', '.join(names)}.{more}"
    if "Missing mandatory value" in text:
        key = re.search(r"Missing mandatory value: (\S+)", text)
        return f"{key[1] if key else 'A value'} is required: type {key[1] if key else 'KEY'}=VALUE."
    return text.splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
