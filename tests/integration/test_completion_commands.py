"""What TAB gives in a shell."""

from __future__ import annotations

import subprocess
import sys

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


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_is_told_what_to_call(shell: str) -> None:
    result = command("train.py", "-sc", f"install={shell}")
    assert result.returncode == 0, result.stderr
    assert f"query={'bash' if shell == 'zsh' else shell}" in result.stdout


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_nothing_slow_is_loaded_to_answer(script: str) -> None:
    code = f"import sys, {script}; assert not {{'torch', 'timm', 'wandb'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
