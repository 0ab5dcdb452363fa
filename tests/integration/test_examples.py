"""The scripts of examples/ run, on small images and untrained networks."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from skimage import data as photographs

import fat

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL_NETWORK = ("--model", "mobilenetv3_small_050", "--weights", "random", "--size", "64")


def run(script: str, *arguments: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0 or "skipped:" in result.stderr, result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def folder_of_images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        image = Image.fromarray(getattr(photographs, name)())
        for shift in range(4):
            image.crop((shift, shift, 160 + shift, 160 + shift)).save(folder / f"{name}{shift}.jpg")
    return folder


def test_every_example_is_tried_and_short() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    text = Path(__file__).read_text(encoding="utf-8")
    assert [
        path.name for path in scripts if f'run("{path.name}"' not in text.replace("\n        ", "")
    ] == []
    assert [path.name for path in scripts if len(path.read_text().splitlines()) > 80] == []


def test_quantize_timm_network(tmp_path: Path, folder_of_images: Path) -> None:
    counts = ("--count", "8", "--test-count", "4", "--epochs", "1")
    images = ("--images", str(folder_of_images))
    output = run("quantize_timm_network.py", *SMALL_NETWORK, *counts, *images, folder=tmp_path)
    assert "100.0 % agreement with the student" in output
    assert fat.load(tmp_path / "quantized/student.safetensors").spec.bits == 8
    assert (tmp_path / "quantized/student.onnx").is_file()


def test_own_module(tmp_path: Path) -> None:
    assert "verified:" in run("own_module.py", "--epochs", "1", folder=tmp_path)
    assert (tmp_path / "own.onnx").is_file()


def test_compare_init_strategies(tmp_path: Path) -> None:
    small = (
        "model.name=mobilenetv3_small_050 model.weights=random data.image_size=64 "
        "data.train_images=16 data.calibration_images=8 data.validation_images=8 "
        "data.test_images=8 data.workers=0 optim.epochs=1 trainer.threads=1 logger=none"
    )
    output = run("compare_init_strategies.py", *small.split(), "init=minmax,mse", folder=tmp_path)
    assert "agreement, %" in output
    (directory,) = tmp_path.glob("init_strategies_*")
    with (directory / "sweep.csv").open(encoding="utf-8", newline="") as file:
        assert [row["option.init"] for row in csv.DictReader(file)] == ["minmax", "mse"]


def test_phone(tmp_path: Path, folder_of_images: Path) -> None:
    images = ("--images", str(folder_of_images), "--epochs", "1")
    output = run("phone.py", *SMALL_NETWORK, *images, folder=tmp_path)
    if "skipped:" in output:
        pytest.skip(output.splitlines()[-1])
    assert "float layers: ()" in output
    assert (tmp_path / "student.tflite").is_file()
