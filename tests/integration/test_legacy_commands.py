"""Commands of version 0.1 on runs of version 0.1 (tests/legacy), as a user types them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.warm import ROOT, environment

LEGACY = ROOT / "tests" / "legacy"
SWEEP = [
    "model.name=legacy_tiny",
    "model.weights=random",
    "data.batch_size=8",
    "data.train_images=32",
    "data.calibration_images=16",
    "data.validation_images=16",
    "data.test_images=16",
    "data.workers=0",
    "trainer.threads=1",
    "trainer.progress=false",
    "logger=none",
    "optim.epochs=1",
    "quant.bits=8,4,9",
]
RUN = ("trainer.threads=1", "trainer.progress=false")


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the network of the runs registered."""
    return subprocess.run(
        [sys.executable, str(LEGACY / "with_network.py"), *words],
        cwd=ROOT,
        env=environment({}) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_an_unfinished_sweep_is_resumed_by_its_command(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(LEGACY / "sweep_unfinished", tmp_path / "sweep"))
    finished = (folder / "0-legacy_tiny" / "metrics.json").read_bytes()
    result = command("train.py", "-m", *SWEEP, f"sweep.resume={folder}")
    assert result.returncode == 1, result.stderr  # 9 bits fail again
    assert (folder / "0-legacy_tiny" / "metrics.json").read_bytes() == finished
    metrics = json.loads((folder / "1-legacy_tiny" / "metrics.json").read_text())
    assert metrics["status"] == "finished"
    failure = json.loads((folder / "2-legacy_tiny" / "failure.json").read_text())
    assert "allowed are whole numbers from 2 to 8" in failure["message"]
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize("option", ["quant.granularity=vector", "optim.pointwise_lr=1e-4"])
def test_a_finished_run_is_known_by_its_earlier_options(tmp_path: Path, option: str) -> None:
    folder = Path(shutil.copytree(LEGACY / "run", tmp_path / "run"))
    stored = json.loads((LEGACY / "run" / "metrics.json").read_text())["command"]
    words = [word for word in stored.split()[2:] if not word.startswith("hydra.run.dir=")]
    result = command("train.py", *words, option, "resume=auto", f"hydra.run.dir={folder}")
    assert result.returncode == 0, result.stderr
    assert "is finished already" in result.stdout


def test_a_file_is_evaluated_by_its_earlier_name() -> None:
    file = LEGACY / "artefact" / "student.onnx"
    result = command("evaluate.py", f"artefact={file}", f"run={LEGACY / 'run'}", *RUN)
    assert result.returncode == 0, result.stderr
    assert "16 test images" in result.stdout
