"""What each logger leaves on disk, read back from there."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fat import FatError
from fat.training.loggers import (
    finish,
    log_histograms,
    log_results,
    make_logger,
    sync_command,
    wandb_mode,
)
from tests import wandb_file

CONFIG: dict[str, Any] = {
    "model": {"name": "x", "weights": None},
    "quant": {"bits": 4, "alpha_range": [0.5, 1.0]},
    "seed": 3,
    "optim": {"lr": 1e-3, "reconstruction": {"steps": 0}},
    "tags": [],
}
METRICS: dict[str, Any] = {
    "model": "x",
    "sweep": None,
    "bits": {"weight": 4.5, "activation": 8},
    "float": {"top1": 71.5, "top5": None},
    "calibrated": {"top1": 60.25, "agreement": 80.0},
    "trained": {"top1": 70.0, "agreement": 91.0},
    "accuracy_drop": 1.5,
    "data": {"labelled": True},
    "status": "finished",
    # As many as a run with an exported file has, and more.
    "versions": {f"package{number}": "1.0" for number in range(120)},
}
NUMBERS = {
    "bits.weight": 4.5,
    "bits.activation": 8,
    "float.top1": 71.5,
    "calibrated.top1": 60.25,
    "calibrated.agreement": 80.0,
    "trained.top1": 70.0,
    "trained.agreement": 91.0,
    "accuracy_drop": 1.5,
}
ALPHAS = {
    "alpha/stem.weight": torch.tensor([0.5, 0.6, 0.6, 1.0]),
    "alpha/stem.activation": torch.tensor([0.75]),
}


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def used(name: str, folder: Path, **options: Any) -> Any:
    """Log a small run and return the open logger."""
    logger = make_logger(name, folder, "a name", CONFIG, **options)
    assert logger is not None
    logger.log_metrics({"train/loss": 0.5, "train/lr": 1e-3}, step=1)
    logger.log_metrics({"val/loss": 0.25}, step=2)
    log_histograms(logger, ALPHAS, 2)
    return logger


def results(logger: Any, folder: Path) -> None:
    table = folder / "layers.csv"
    table.write_text("layer,kind,sqnr_db,alpha_mean\nstem,weight,20.5,0.9\nhead,activation,31,\n")
    exported = folder / "student.onnx"
    exported.write_bytes(b"onnx")
    bars = {"data": [{"type": "bar", "x": ["stem"], "y": [20.5]}], "layout": {"title": {}}}
    log_results(logger, METRICS, 2, table=table, figures={"sqnr_db": bars}, files=[exported])
    finish(logger)


def test_csv_has_every_value_at_its_step(tmp_path: Path) -> None:
    logger = used("csv", tmp_path)
    results(logger, tmp_path)
    rows = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").open()))
    found = {
        (int(row["step"]), key): float(value)
        for row in rows
        for key, value in row.items()
        if value and key != "step"
    }
    assert found[1, "train/loss"] == 0.5
    assert found[2, "val/loss"] == 0.25
    assert {key: found[2, key] for key in NUMBERS} == NUMBERS


def test_csv_of_a_resumed_run_keeps_the_earlier_file(tmp_path: Path) -> None:
    for _ in range(3):
        finish(used("csv", tmp_path))
    folders = {"csv", "csv-before-1", "csv-before-2"}
    assert {path.name for path in tmp_path.iterdir()} == folders
    for folder in folders:
        assert "train/loss" in (tmp_path / folder / "metrics.csv").read_text()


def test_tensorboard_holds_figures_and_histograms(tmp_path: Path) -> None:
    results(used("tensorboard", tmp_path), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5)]
    for name, value in NUMBERS.items():
        ((step, found),) = [(e.step, e.value) for e in events.Scalars(name)]
        assert (step, found) == (2, pytest.approx(value))
    for name, tensor in ALPHAS.items():
        (event,) = events.Histograms(f"histograms/{name}")
        assert event.step == 2
        assert event.histogram_value.num == tensor.numel()
        assert event.histogram_value.sum == pytest.approx(float(tensor.sum()))


def test_wandb_offline_has_everything_documented(tmp_path: Path) -> None:
    logger = used("wandb", tmp_path, group="a sweep", tags=["one", "two"], project="p")
    assert sync_command(logger) == f"wandb sync {wandb_file.find(tmp_path).parent}"
    results(logger, tmp_path)
    run = wandb_file.read(wandb_file.find(tmp_path))
    assert {key: run.config[key] for key in CONFIG} == CONFIG
    assert (run.group, run.name, run.tags) == ("a sweep", "a name", ["one", "two"])
    assert {key: run.summary[key] for key in NUMBERS} == NUMBERS
    assert (run.summary["model"], run.summary["status"]) == ("x", "finished")
    assert "float.top5" not in run.summary  # nothing is known of it
    assert run.logged("train/loss") == [0.5]
    assert run.logged("train/lr") == [1e-3]
    assert run.logged("val/loss") == [0.25]
    for name, tensor in ALPHAS.items():
        (histogram,) = run.logged(f"histograms/{name}")
        assert histogram["_type"] == "histogram"
        counts, edges = np.histogram(tensor.numpy(), bins=tensor.numel())
        assert histogram["values"] == counts.tolist()
        assert histogram["bins"] == pytest.approx(edges.tolist())
    (table,) = run.logged("layers")
    assert (table["_type"], table["ncols"], table["nrows"]) == ("table-file", 4, 2)
    (plot,) = run.logged("plots/sqnr_db")
    assert plot["_type"] == "plotly-file"
    media = wandb_file.find(tmp_path).parent / "files"
    assert (media / table["path"]).is_file()
    assert "20.5" in (media / plot["path"]).read_text()
    models = {name: paths for (kind, name), paths in run.artifacts.items() if kind == "model"}
    ((name, paths),) = models.items()
    assert name.startswith("student-")
    assert paths == ["student.onnx"]


def test_the_reader_puts_long_records_together(tmp_path: Path) -> None:
    """Also where they cross blocks of 32 KiB, as a long text does."""
    logger: Any = used("wandb", tmp_path)
    texts = [f"{number}:" + "x" * (20_000 + 7_001 * number) for number in range(6)]
    for text in texts:
        logger.experiment.log({"text": text})
    finish(logger)
    assert wandb_file.read(wandb_file.find(tmp_path)).logged("text") == texts


def test_a_resumed_run_is_the_same_run_for_wandb(tmp_path: Path) -> None:
    finish(used("wandb", tmp_path))
    first = (tmp_path / "wandb-id.txt").read_text()
    logger: Any = used("wandb", tmp_path)
    assert logger.experiment.id == first.strip()
    finish(logger)
    assert (tmp_path / "wandb-id.txt").read_text() == first


def test_no_logger_and_an_unknown_one(tmp_path: Path) -> None:
    assert make_logger("none", tmp_path, "x", {}) is None
    with pytest.raises(FatError, match="Did you mean 'wandb'"):
        make_logger("wandbb", tmp_path, "x", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "login", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "0" * 40}, "", "online"),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "disabled"}, "", "disabled"),
        ({}, "machine api.wandb.ai login user password x", "online"),
        (
            {"WANDB_BASE_URL": "https://my.host"},
            "machine api.wandb.ai login u password x",
            "offline",
        ),
        ({"WANDB_BASE_URL": "https://my.host"}, "machine my.host login u password x", "online"),
        ({}, "machine api.wandb.ai nonsense", "offline"),  # half a file
    ],
)
def test_wandb_never_prompts(
    environment: dict[str, str],
    login: str,
    mode: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text(login)
    (tmp_path / "home" / ".netrc").chmod(0o600)
    assert wandb_mode() == mode
