"""Runs of train.py and evaluate.py on a pretended GPU, in this process."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from PIL import Image

import fat
from fat.experiment.config import EvaluateConfig, RunConfig, parse
from fat.experiment.evaluate import evaluate_run
from fat.experiment.runner import run
from tests.gpu.pretended import PretendedGpu
from tests.legacy import with_network

ROOT = Path(__file__).parents[2]
NETWORK = with_network.legacy_tiny.__name__  # registered with timm


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with images of two classes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 4)):
        for name in ("n01440764", "n01443537"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((40, 32)).save(folder / f"{index}.png")
    return root


def composed(schema: type, name: str, *words: str) -> Any:
    with initialize_config_dir(version_base=None, config_dir=str(ROOT / "conf")):
        return parse(schema, compose(name, overrides=list(words)))


def train(root: Path, directory: Path, *words: str) -> dict[str, Any]:
    config = composed(
        RunConfig,
        "train",
        f"model.name={NETWORK}",
        "model.weights=random",
        "data=folder",
        f"data.root={root}",
        "data.workers=0",
        "trainer.threads=1",
        "trainer.progress=false",
        "optim.epochs=1",
        *words,
    )
    run(config, directory)
    return json.loads((directory / "metrics.json").read_text())


def test_a_gpu_is_used_where_there_is_one(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("optim.feature_weight=0.1", "data.augment=device")
    with PretendedGpu() as gpu, caplog.at_level(logging.INFO):
        metrics = train(images, tmp_path, *words, "export=onnx", "quant.bits=4")
    assert gpu.total.of("fat::fake_quantize_backward") > 0
    assert "Pretended GPU (cuda:0), bf16-mixed, batches of 64" in caplog.text
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["trainer"]["accelerator"] == "gpu"
    assert config["trainer"]["precision"] == "bf16-mixed"
    assert config["data"]["batch_size"] == 64
    assert metrics["status"] == "finished"
    assert metrics["trained"]["sqnr_db"] >= metrics["calibrated"]["sqnr_db"]
    assert fat.load(tmp_path / "student.safetensors").device.type == "cpu"

    # The file computes what the student on the GPU computed, to the last digit that is stored.
    exported = metrics["exported"]["onnx"]
    assert exported["quantized"]["sqnr_db"] == pytest.approx(metrics["trained"]["sqnr_db"])

    evaluated = []
    for context in (PretendedGpu, torch.no_grad):
        with context():
            words = (f"run={tmp_path}", "trainer.threads=1", "trainer.progress=false")
            config = composed(EvaluateConfig, "evaluate", *words, "data.workers=0")
            evaluated.append(evaluate_run(config)["quantized"])
    assert evaluated[0] == evaluated[1]
    assert evaluated[0]["sqnr_db"] == pytest.approx(metrics["trained"]["sqnr_db"])


def test_a_run_in_float32_is_that_of_the_cpu(images: Path, tmp_path: Path) -> None:
    words = ("data.batch_size=16", "trainer.precision=32-true", "quant.weights=adaround")
    wanted = train(images, tmp_path / "cpu", "trainer=cpu", *words)
    with PretendedGpu(tf32=True):
        found = train(images, tmp_path / "gpu", "trainer=gpu", *words)
    for key in ("float", "calibrated", "trained", "accuracy_drop"):
        assert found[key] == wanted[key]
    for name in ("thresholds.csv", "student.safetensors"):
        assert (tmp_path / "gpu" / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes()
