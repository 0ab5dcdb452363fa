"""--help names every command line option that there is, in lines that fit a terminal."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fat.experiment.cli import conf_directory
from fat.experiment.config import EvaluateConfig, RunConfig, option_table
from fat.experiment.help import help_text
from fat.utils.commands import VARIABLE


@pytest.mark.parametrize(("name", "schema"), [("train", RunConfig), ("evaluate", EvaluateConfig)])
def test_every_group_and_every_option_is_listed(name: str, schema: type) -> None:
    lines = help_text(name, [conf_directory()]).splitlines()
    for entry in option_table(schema):
        assert any(line.startswith(f"  {entry.key}={entry.default_text}") for line in lines)
    for group in ("model", "data", "export", "trainer"):
        assert any(line.startswith(f"  {group} ") for line in lines), group
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize(("variable", "program"), [(None, "python train.py"), ("fat", "fat train")])
def test_examples_can_be_typed(
    variable: str | None, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if variable:
        monkeypatch.setenv(VARIABLE, variable)
    text = help_text("train", [conf_directory()])
    assert text.startswith(f"usage: {program} [")
    assert f"\n  {program} data=folder data.root=DIR\n" in text
    assert ("python" in text) is (variable is None)


def test_choices_of_ones_own_folder_are_listed(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").touch()
    assert "calibration_only, paper" in help_text("train", [conf_directory()])
    listed = help_text("train", [tmp_path, conf_directory()])
    assert "calibration_only, mine, paper" in listed


def test_help_does_without_torch() -> None:
    code = "import sys, runpy; sys.argv = ['train.py', '--help']\n"
    code += "try: runpy.run_path('train.py', run_name='__main__')\n"
    code += "except SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    root = conf_directory().parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, stdout=subprocess.DEVNULL)


def test_the_reader_of_the_help_may_end_early() -> None:
    command = f"{shlex.quote(sys.executable)} train.py --help | head -1"
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=conf_directory().parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("usage: ")
    assert result.stderr == ""
