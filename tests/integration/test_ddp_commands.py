"""Several processes on the command line: the result of one, and files written once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.integration.running import ROOT, command, command_from_cold
from tests.integration.test_commands import TINY

# At larger rates a network of random weights makes roundings larger from step to step.
RUN = [
    *TINY,
    "data.train_images=32",
    "data.test_images=20",
    "optim.epochs=2",
    "optim.lr=1e-5",
    "optim.bias_lr=1e-5",
    "optim.weight_scale_lr=1e-5",
    "trainer.progress=false",
    "logger=csv",
]
DDP = [*RUN, "trainer=ddp", "trainer.devices=2", "trainer.threads=1", "trainer.progress=false"]


def files(folder: Path) -> set[str]:
    """What a run left, but for the name of the best checkpoint, which tells the step."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return {"checkpoints/best" if "/step=" in name else name for name in found}


def state(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(
        folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu"
    )["state_dict"]
    return found


def metrics(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "metrics.json").read_text())
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "one"
    result = command("train.py", *RUN, f"hydra.run.dir={folder}")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "two"
    result = command_from_cold("train.py", *DDP, f"hydra.run.dir={folder}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Run directory:") == 1
    return folder


def assert_same(one: Path, other: Path) -> None:
    wanted, got = state(one), state(other)
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=name)
    first, second = metrics(one), metrics(other)
    for key in ("float", "data", "bits", "size_mb", "status"):
        assert first[key] == second[key], key
    for key in ("agreement", "sqnr_db", "rmse"):
        figures = first["calibrated"][key], second["calibrated"][key]  # type: ignore[index]
        assert figures[0] == pytest.approx(figures[1], rel=1e-6), key
    for key in ("steps", "bias_correction", "reconstruction", "restored", "interrupted"):
        assert first["training"][key] == second["training"][key], key  # type: ignore[index]
    for key in ("calibrated_loss", "best_loss"):
        losses = first["training"][key], second["training"][key]  # type: ignore[index]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4), key
    drift = [figures["trained"]["sqnr_db"] for figures in (first, second)]  # type: ignore[index]
    assert drift[0] == pytest.approx(drift[1], abs=0.05)


def test_two_processes_give_what_one_gives(one: Path, two: Path) -> None:
    calibrated = state(one)
    assert any("thresholds" in name for name in calibrated)
    assert_same(one, two)


def test_files_are_written_once_and_by_the_first(one: Path, two: Path) -> None:
    assert files(one) == files(two)
    assert sorted(os.listdir(two.parent)) == ["two"]
    rows = (two / "history.csv").read_text().splitlines()
    assert len(rows) == len(set(rows))
    assert len(rows) == len((one / "history.csv").read_text().splitlines())


def test_blocks_are_reconstructed_together_and_one_process_has_no_validation_batch(
    tmp_path: Path,
) -> None:
    recipe = [
        "data.validation_images=8",
        "optim.feature_weight=0.1",
        "optim.epochs=1",
        "optim.reconstruction.steps=4",
        "optim.reconstruction.batch_size=6",
        "optim.reconstruction.images=20",
        "quant.weights=adaround",
    ]
    for name, options in {"one": RUN, "two": DDP}.items():
        result = command("train.py", *options, *recipe, f"hydra.run.dir={tmp_path / name}")
        assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / "one")["training"]["reconstruction"] == "kept"  # type: ignore[index]
    assert_same(tmp_path / "one", tmp_path / "two")


def test_torchrun_starts_them_too(one: Path, tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            "29517",
            "train.py",
            *DDP,
            f"hydra.run.dir={tmp_path / 'run'}",
        ],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert_same(one, tmp_path / "run")
    assert files(tmp_path / "run") == files(one)
    assert sorted(os.listdir(tmp_path)) == ["run"]


def test_a_run_of_two_processes_that_was_killed_goes_on(two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    process = subprocess.Popen(
        [sys.executable, "train.py", *DDP, "trainer.checkpoint_every=0", f"hydra.run.dir={folder}"],
        cwd=ROOT,
        env=clean,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / "last.ckpt").is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert metrics(folder)["status"] == "calibrated"
    result = command_from_cold("train.py", f"resume={folder}")
    assert result.returncode == 0, result.stderr
    wanted, got = (load_file(place / "student.safetensors") for place in (two, folder))
    for name, value in wanted.items():
        assert torch.equal(value, got[name]), name
    assert (folder / "history.csv").read_text() == (two / "history.csv").read_text()
