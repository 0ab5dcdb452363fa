"""The commands as a user types them, on a tiny network of timm's with random weights."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import fat
from fat.report.text import METRICS_KEYS
from fat.training.loggers import flatten
from tests import wandb_file
from tests.integration.running import ROOT, command

TINY = [
    "model.name=test_efficientnet",
    "model.weights=random",
    "data.batch_size=8",
    "data.calibration_images=16",
    "data.validation_images=16",
    "data.test_images=24",
    "trainer.threads=1",
]
FIGURES = {"top1", "top5", "agreement", "sqnr_db", "rmse"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with the default logger, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "here"
    # A home without a login: W&B must go offline without a question.
    home = tmp_path_factory.mktemp("home")
    result = command(
        "train.py",
        *TINY,
        "data.train_images=32",
        "optim.epochs=2",
        f"hydra.run.dir={folder}",
        HOME=str(home),
    )
    assert result.returncode == 0, result.stderr
    return folder, result.stdout + result.stderr


def test_the_run_directory_holds_what_is_promised(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    for name in (
        "config.yaml",
        "metrics.json",
        "student.safetensors",
        "thresholds.csv",
        "history.csv",
        "layers.csv",
        "details.json",
        "report.html",
        "checkpoints/last.ckpt",
    ):
        assert (folder / name).is_file(), name
    assert list((folder / "checkpoints").glob("step=*.ckpt"))
    assert not (folder / "failure.json").exists()
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    assert "Folded" in (folder / "train.log").read_text()


def test_metrics_follow_the_schema(finished: tuple[Path, str]) -> None:
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    assert tuple(metrics) == METRICS_KEYS
    assert set(metrics["calibrated"]) == set(metrics["trained"]) == FIGURES
    assert metrics["float"] == {"top1": None, "top5": None}
    assert metrics["accuracy_drop"] is None
    assert metrics["model"] == "test_efficientnet"
    assert metrics["weights"] == "random"
    assert metrics["bits"] == {"weight": 8, "activation": 8}
    assert set(metrics["seconds"]) == {
        "load",
        "prepare",
        "calibrate",
        "evaluate",
        "train",
        "report",
    }
    assert metrics["status"] == "finished"
    assert metrics["sweep"] is None
    assert metrics["command"].startswith("python train.py model.name=test_efficientnet")
    assert metrics["training"]["steps"] == 8
    documented = (ROOT / "docs" / "metrics.md").read_text()
    assert all(f"| `{key}` |" in documented for key in METRICS_KEYS)


def test_the_summary_says_what_came_before_and_after(finished: tuple[Path, str]) -> None:
    folder, text = finished
    assert text.index("Before training, on 24 test images") < text.index("Run directory:")
    assert "RANDOM WEIGHTS" in text
    assert "agreement" in text
    assert str(folder) in text


def test_wandb_is_offline_without_a_login_and_says_how_to_sync(finished: tuple[Path, str]) -> None:
    folder, text = finished
    runs = list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 1
    assert f"wandb sync {runs[0].parent}" in text


def test_thresholds_are_the_students(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    rows = list(csv.DictReader((folder / "thresholds.csv").open()))
    student = fat.load(folder / "student.safetensors")
    quantizers = list(student.quantizers())
    assert [(row["layer"], row["kind"]) for row in rows] == [q[:2] for q in quantizers]
    for row, (_, _, quantizer) in zip(rows, quantizers, strict=True):
        assert int(row["bits"]) == quantizer.grid.bits
        high = float(quantizer.thresholds.high.max())
        assert float(row["T_max"]) == pytest.approx(high, rel=1e-5)
        alpha = float(quantizer.thresholds.factors()["alpha"].mean())
        assert float(row["alpha"]) == pytest.approx(alpha, rel=1e-5)


def test_evaluate_repeats_the_figures_from_the_directory_alone(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    moved = folder.parent / "moved"
    folder.rename(moved)
    try:
        result = command("evaluate.py", f"run={moved}", "data.batch_size=8")
    finally:
        moved.rename(folder)
    assert result.returncode == 0, result.stderr
    trained = json.loads((folder / "metrics.json").read_text())["trained"]
    line = next(line for line in result.stdout.splitlines() if line.startswith("quantized"))
    agreement, sqnr, rmse = map(float, line.split()[1:])
    assert agreement == pytest.approx(trained["agreement"], abs=0.01)
    assert sqnr == pytest.approx(trained["sqnr_db"], abs=0.01)
    assert rmse == pytest.approx(trained["rmse"], abs=1e-4)


def test_evaluate_judges_a_checkpoint_of_the_run_and_no_other(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = finished
    own = next((folder / "checkpoints").glob("*.ckpt"))
    good = command("evaluate.py", f"run={folder}", f"checkpoint='{own}'", "data.batch_size=8")
    assert good.returncode == 0, good.stderr

    content = torch.load(own, weights_only=True)
    content["fat"]["spec"]["bits"] = 4
    other = tmp_path / "other.ckpt"
    torch.save(content, other)
    bad = command("evaluate.py", f"run={folder}", f"checkpoint={other}")
    assert bad.returncode == 2
    assert "another quantization than the run: bits is 4, the run's is 8" in bad.stderr


def test_same_seed_same_thresholds_and_another_seed_others(tmp_path: Path) -> None:
    texts = []
    for number, seed in enumerate((3, 3, 4)):
        folder = tmp_path / str(number)
        result = command(
            "train.py",
            *TINY,
            "data.train_images=16",
            "optim.epochs=1",
            "logger=none",
            f"seed={seed}",
            f"hydra.run.dir={folder}",
        )
        assert result.returncode == 0, result.stderr
        texts.append((folder / "student.safetensors").read_bytes())
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_multirun_runs_every_job(tmp_path: Path) -> None:
    result = command(
        "train.py",
        "-m",
        *TINY,
        "experiment=calibration_only",
        "quant.bits=8,4",
        "logger=none",
        f"hydra.sweep.dir={tmp_path}",
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/metrics.json"))]
    assert [metrics["bits"]["weight"] for metrics in found] == [8, 4]
    assert all(metrics["trained"] is None for metrics in found)
    assert found[0]["calibrated"]["sqnr_db"] > found[1]["calibrated"]["sqnr_db"]


def test_a_labelled_folder_gives_accuracies(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in ("n01440764", "n01443537"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    result = command(
        "train.py",
        *TINY,
        "data=folder",
        f"data.root={tmp_path / 'images'}",
        "optim.epochs=1",
        "optim.feature_weight=0.1",
        "optim.label_weight=0.1",
        "logger=wandb",
        "logger.group=mine",
        "export=onnx",
        f"hydra.run.dir={tmp_path / 'run'}",
        WANDB_MODE="offline",
    )
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["data"]["labelled"] is True
    assert metrics["float"]["top1"] is not None
    drop = metrics["float"]["top1"] - metrics["trained"]["top1"]
    assert metrics["accuracy_drop"] == pytest.approx(drop)

    # W&B's own file holds all of it, by the names of the schema.
    run = wandb_file.read(wandb_file.find(tmp_path / "run"))
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {key: run.config[key] for key in stored} == stored
    assert run.group == "mine"
    numbers = flatten(metrics)
    assert {"float.top1", "calibrated.top1", "trained.top1", "accuracy_drop"} <= numbers.keys()
    assert {key: run.summary[key] for key in numbers} == pytest.approx(numbers)
    assert run.summary["status"] == "finished"
    steps = metrics["training"]["steps"]
    for name in ("train/loss", "train/features", "train/labels", "train/lr"):
        assert len(run.logged(name)) == steps, name
    assert len(run.logged("val/loss")) >= 2
    student = fat.load(tmp_path / "run" / "student.safetensors")
    for layer, kind, _ in student.quantizers():
        histograms = run.logged(f"histograms/alpha/{layer}.{kind}")
        assert len(histograms) == len(run.logged(f"alpha/{layer}.{kind}")) >= 2
        assert all(histogram["_type"] == "histogram" for histogram in histograms)
    (table,) = run.logged("layers")
    assert table["nrows"] == len(list(student.quantizers()))
    plots = {key for row in run.history for key in row if key.startswith("plots/")}
    assert "plots/sqnr_db" in plots
    assert any(key.startswith("plots/thresholds/") for key in plots)
    models = [paths for (kind, _), paths in run.artifacts.items() if kind == "model"]
    assert models == [[metrics["exported"]["onnx"]["file"]]]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["model=mobilnet_v2"], "Did you mean 'mobilenet_v2'"),
        (["model.name=resnet19"], "Did you mean 'resnet18'"),
        (["quant.bitz=8"], "Did you mean 'quant.bits'"),
        (["quant.bits=9"], "allowed are whole numbers from 2 to 8"),
        (["quant.scheme=lopsided"], "Allowed: symmetric, asymmetric."),
        (["data=folder"], "data.root"),
        (["data=folder", "data.root=/no/such/folder"], "/no/such/folder"),
        (["model.weights=/no/such/file.pth"], "model.weights=random"),
        (["optim.epochs=many"], "optim.epochs"),
        (["optim.label_weight=1"], "no training image has a label. Type optim.label_weight=0"),
        (["hydra.run.dir=/dev/null/x"], "/dev/null"),
    ],
)
def test_bad_input_is_answered_in_words(arguments: list[str], wanted: str, tmp_path: Path) -> None:
    place = [] if "hydra.run.dir" in arguments[0] else [f"hydra.run.dir={tmp_path}"]
    result = command("train.py", *TINY[1:], *place, *arguments)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "Error: " in result.stderr
    assert wanted in result.stderr


def test_evaluate_says_what_a_run_is(tmp_path: Path) -> None:
    for arguments, wanted in (
        ([], "Type python evaluate.py run=DIR"),
        ([f"run={tmp_path}"], "is not a run directory"),
    ):
        result = command("evaluate.py", *arguments)
        assert result.returncode == 2
        assert wanted in result.stderr


def test_ctrl_c_keeps_and_names_the_best_student(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable,
            "train.py",
            *TINY,
            "data.train_images=4000",
            "optim.epochs=50",
            "logger=csv",
            f"hydra.run.dir={folder}",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "csv").is_dir():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert f"python evaluate.py run={folder}" in output
    student = fat.load(folder / "student.safetensors")
    assert bool(student.is_calibrated)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["trained"] is None
    assert metrics["calibrated"]["agreement"] is not None
