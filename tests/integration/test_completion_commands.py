"""What TAB gives in a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.running import ROOT, command


@pytest.mark.parametrize(
    ("script", "typed", "wanted"),
    [
        ("train.py", "model=mobilenet_v", {"model=mobilenet_v1", "model=mobilenet_v2"}),
        ("train.py", "quant.gran", {"quant.granularity="}),
        ("train.py", "-m quant.bits=4 hydra/launcher=ba", {"hydra/launcher=basic"}),
        ("evaluate.py", "export=on", {"export=onnx"}),
    ],
)
def test_tab_completes(script: str, typed: str, wanted: set[str]) -> None:
    line = f"python {script} {typed}"
    result = command(script, "-sc", "query=bash", COMP_LINE=line)
    assert result.returncode == 0, result.stderr
    offered = set(result.stdout.split())
    assert wanted <= offered
    assert all(entry.startswith(typed.split()[-1]) for entry in offered)


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("t", "train "),
        ("train quant.gran", "train quant.granularity="),
        ("evaluate export=on", "evaluate export=onnx"),
    ],
)
def test_tab_completes_the_installed_command(typed: str, wanted: str, tmp_path: Path) -> None:
    program = tmp_path / "fat"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m fat.experiment.cli "$@"\n')
    program.chmod(0o755)
    script = f"""
        eval "$(fat -sc install=bash)"
        compopt() {{ after=" "; }}  # outside a completion Bash refuses the real one
        COMP_LINE="fat {typed}" COMP_CWORD={len(typed.split())}
        _fat_complete
        printf "%s" "{typed.rpartition(" ")[0]}" "{" " if " " in typed else ""}" "$COMPREPLY$after"
    """
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True
    )
    assert result.stdout.decode() == wanted, result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_is_told_what_to_call(shell: str) -> None:
    result = command("train.py", "-sc", f"install={shell}")
    assert result.returncode == 0, result.stderr
    assert f"query={'bash' if shell == 'zsh' else shell}" in result.stdout


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_nothing_slow_is_loaded_to_answer(script: str) -> None:
    code = f"import sys, {script}; assert not {{'torch', 'timm', 'wandb'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
