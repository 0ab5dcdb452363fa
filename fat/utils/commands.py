"""Command lines that messages and reports tell users to type."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
from pathlib import Path

__all__ = ["command_line", "install_command", "started_as_fat"]

VARIABLE = "FAT_COMMAND"
"""Set in processes that the installed ``fat`` command starts, and inherited by their children."""

_CHECKOUT = Path(__file__).parents[2]
_SCRIPTS = {"train": ("python", "train.py"), "evaluate": ("python", "evaluate.py")}


def started_as_fat() -> bool:
    """Return whether commands are typed as ``fat train`` rather than as ``python train.py``.

    That is so when the installed command started this process, and always outside a checkout,
    where there is no train.py.
    """
    return VARIABLE in os.environ or not (_CHECKOUT / "train.py").is_file()


def command_line(name: str, *words: str) -> str:
    """Return the shell command that runs one of FAT's commands, as the user started this process.

    Args:
        name: ``"train"``, ``"evaluate"``, ``"report"``, ``"search"`` or ``"dashboard"``.
        *words: Arguments, quoted where the shell needs it.

    Examples:
        >>> command_line("train", "quant.bits=4", "name=my run")
        "python train.py quant.bits=4 'name=my run'"
        >>> command_line("report", "outputs/one")
        'python -m fat.report outputs/one'
    """
    if started_as_fat():
        program: tuple[str, ...] = ("fat", name)
    else:
        program = _SCRIPTS.get(name, ("python", "-m", f"fat.{name}"))
    return shlex.join([*program, *words])


def install_command(extra: str) -> str:
    """Return the shell command that installs an optional dependency.

    In a checkout that is the extra itself. Elsewhere the packages of the extra are named, since
    the installed wheel may come from a file that pip does not find again.

    Args:
        extra: A name under ``[project.optional-dependencies]`` of pyproject.toml.

    Examples:
        >>> install_command("litert")
        "pip install -e '.[litert]'"
    """
    if (_CHECKOUT / "pyproject.toml").is_file():
        return f"pip install -e '.[{extra}]'"
    required = importlib.metadata.requires("fat-quant") or []
    marker = re.compile(rf"extra == ['\"]{re.escape(extra)}['\"]")
    names = [line.partition(";")[0].strip() for line in required if marker.search(line)]
    return shlex.join(["pip", "install", *names])
