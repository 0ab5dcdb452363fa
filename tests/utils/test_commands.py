"""Commands that messages print can be typed where they are printed."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from fat.utils import commands
from fat.utils.commands import command_line, install_command


@pytest.mark.parametrize(
    ("name", "script", "installed"),
    [
        ("train", "python train.py", "fat train"),
        ("evaluate", "python evaluate.py", "fat evaluate"),
        ("report", "python -m fat.report", "fat report"),
        ("search", "python -m fat.search", "fat search"),
        ("dashboard", "python -m fat.dashboard", "fat dashboard"),
    ],
)
def test_commands_are_those_that_started_the_process(
    name: str, script: str, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(commands.VARIABLE, raising=False)
    assert command_line(name, "a b") == f"{script} 'a b'"
    monkeypatch.setenv(commands.VARIABLE, "fat")
    assert command_line(name) == installed


def test_outside_a_checkout_there_are_no_scripts_and_extras_are_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(commands.VARIABLE, raising=False)
    monkeypatch.setattr(commands, "_CHECKOUT", tmp_path)
    required = ["torch>=2.9", "optuna<6,>=4.4; extra == 'search'", 'x>=1; extra == "searching"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    assert command_line("train", "seed=1") == "fat train seed=1"
    assert install_command("search") == "pip install 'optuna<6,>=4.4'"
