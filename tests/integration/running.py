"""Run train.py and evaluate.py as a user does, without a W&B login."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.integration.warm import ROOT, environment, server

__all__ = ["ROOT", "command", "command_from_cold"]

LIMIT = 300.0


def command(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run train.py, evaluate.py or ``-m`` and a module in a process forked after the imports."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        pid = server().start(script, *arguments, output=output, errors=errors, **variables)
        status = server().wait(pid, LIMIT)
        assert status is not None, f"not done after {LIMIT:g} s:\n{errors.read_text()}"
        words = [script, *arguments]
        return subprocess.CompletedProcess(words, status, output.read_text(), errors.read_text())


def command_from_cold(
    script: str, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in a new Python process, for scripts that start themselves again."""
    return subprocess.run(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=environment(variables),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
