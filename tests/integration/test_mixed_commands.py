"""Sensitivity of a finished run, and bits per layer from it, as a user types them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fat
from fat import QuantSpec
from fat.evaluation.bit_allocation import mean_bits, size_mb
from tests.integration.running import command

TINY = [
    "model.name=test_efficientnet",
    "model.weights=random",
    "data.batch_size=8",
    "data.calibration_images=16",
    "data.validation_images=8",
    "data.test_images=8",
    "data.workers=0",
    "trainer.threads=1",
    "logger=none",
]
MEASURE = ["analysis=sensitivity", "analysis_images=12", "data.workers=0", "data.batch_size=8"]


def succeeded(script: str, *arguments: str) -> str:
    result = command(script, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def failed(script: str, *arguments: str) -> str:
    result = command(script, *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def metrics_of(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A calibrated run of four bits that was measured, and what that printed."""
    folder = tmp_path_factory.mktemp("runs") / "w4"
    succeeded("train.py", *TINY, "optim.epochs=0", "quant.bits=4", f"hydra.run.dir={folder}")
    return folder, succeeded("evaluate.py", f"run={folder}", *MEASURE)


@pytest.fixture(scope="module")
def mixed(measured: tuple[Path, str]) -> tuple[Path, str]:
    """A trained run with bits per layer at the size of the measured one."""
    folder = measured[0].parent / "mixed"
    budget = metrics_of(measured[0])["size_mb"]["quantized"]
    printed = succeeded(
        "train.py",
        *TINY,
        "data.train_images=8",
        "optim.epochs=1",
        f"quant.mixed={measured[0]}",
        f"quant.budget_mb={budget}",
        f"hydra.run.dir={folder}",
    )
    return folder, printed


def test_a_measurement_leaves_tables_and_a_plot(measured: tuple[Path, str]) -> None:
    folder, printed = measured
    student = fat.load(folder / "student.safetensors")
    rows = list(csv.DictReader((folder / "sensitivity.csv").open()))
    assert {(row["layer"], row["kind"]) for row in rows} == {q[:2] for q in student.quantizers()}
    damage = [float(row["alone_db"]) for row in rows]
    assert damage == sorted(damage)
    content = json.loads((folder / "sensitivity.json").read_text())
    assert content["model"] == "test_efficientnet"
    assert content["images"]["split"] == "calibration"
    assert content["images"]["count"] == 12
    assert f"of {len(rows)} tensors on 12 calibration images" in printed
    assert printed.index(rows[0]["layer"]) < printed.index(rows[9]["layer"])
    assert (folder / "sensitivity.png").read_bytes().startswith(b"\x89PNG")


def test_measuring_changes_nothing_of_the_run_and_repeats(measured: tuple[Path, str]) -> None:
    folder, _ = measured
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    succeeded("evaluate.py", f"run={folder}", *MEASURE)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    del before["sensitivity.png"], after["sensitivity.png"]
    assert before == after


def test_a_run_takes_its_bits_from_the_measurement(
    measured: tuple[Path, str], mixed: tuple[Path, str]
) -> None:
    folder, printed = mixed
    student = fat.load(folder / "student.safetensors")
    bits = {x.layer: x.weight_quantizer.grid.bits for x in student.layers()}
    assert len(set(bits.values())) > 1
    assert dict(student.spec.layer_bits) == bits
    assert "Bits of weights for" in printed
    widest = max(bits.values())
    first = next(layer for layer, width in bits.items() if width == widest)
    assert f"{widest} bits: {first}" in printed
    rows = list(csv.DictReader((folder / "thresholds.csv").open()))
    written = {row["layer"]: int(row["bits"]) for row in rows if row["kind"] == "weight"}
    assert written == bits

    even, ours = metrics_of(measured[0]), metrics_of(folder)
    assert even["bits"] == {"weight": 4, "activation": 4}
    assert ours["bits"] == {"weight": pytest.approx(mean_bits(student)), "activation": 8}
    assert ours["size_mb"] == pytest.approx(size_mb(student))
    assert ours["size_mb"]["quantized"] <= even["size_mb"]["quantized"]
    assert ours["size_mb"]["float"] == even["size_mb"]["float"]
    assert f"MB -> {ours['size_mb']['quantized']:.3f} MB" in printed


def test_checkpoints_of_mixed_bits_load(mixed: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = mixed
    own = next((folder / "checkpoints").glob("*.ckpt"))
    succeeded("evaluate.py", f"run={folder}", f"checkpoint='{own}'", "data.workers=0")
    content = torch.load(own, weights_only=True)
    name, width = content["fat"]["spec"]["layer_bits"][0]
    content["fat"]["spec"]["layer_bits"] = ((name, 10 - width),)
    other = tmp_path / "other.ckpt"
    torch.save(content, other)
    text = failed("evaluate.py", f"run={folder}", f"checkpoint={other}")
    assert "another quantization than the run: layer_bits is" in text


def test_a_checkpoint_without_a_later_option_loads(mixed: tuple[Path, str], tmp_path: Path) -> None:
    from fat.experiment.run_directory import load_checkpoint

    folder, _ = mixed
    content = torch.load(next((folder / "checkpoints").glob("*.ckpt")), weights_only=True)
    student = fat.load(folder / "student.safetensors")
    object.__setattr__(student, "spec", QuantSpec())
    content["fat"]["spec"] = QuantSpec().to_dict()
    del content["fat"]["spec"]["layer_bits"]
    earlier = tmp_path / "earlier.ckpt"
    torch.save(content, earlier)
    wanted = content["state_dict"]["student.network.classifier.bias"]
    load_checkpoint(student, earlier)
    assert torch.equal(student.state_dict()["network.classifier.bias"], wanted)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["quant.mixed={run}"], "type quant.mixed=DIR"),
        (["quant.budget_mb=1"], "type quant.mixed=DIR"),
        (["quant.mixed={run}", "quant.budget_mb=0.01"], "(2 bits) to"),
        (
            ["quant.mixed=/nowhere", "quant.budget_mb=1"],
            "There is no /nowhere. First analyze a run",
        ),
        (
            ["quant.mixed={run}", "quant.budget_mb={budget}", "model.name=test_resnet"],
            "was measured on test_efficientnet, and this run is of test_resnet",
        ),
        (
            ["quant.mixed={run}", "quant.budget_mb={budget}", "model.num_classes=7"],
            "where 'classifier' has",
        ),
    ],
)
def test_what_cannot_be_mixed_is_answered_in_words(
    measured: tuple[Path, str], tmp_path: Path, arguments: list[str], wanted: str
) -> None:
    folder = measured[0]
    budget = metrics_of(folder)["size_mb"]["quantized"]
    filled = [text.format(run=folder, budget=budget) for text in arguments]
    assert wanted in failed("train.py", *TINY, *filled, f"hydra.run.dir={tmp_path / 'run'}")


def test_what_cannot_be_measured_is_answered_in_words(measured: tuple[Path, str]) -> None:
    folder = measured[0]
    for arguments, wanted in (
        (["analysis=sensitivty"], "Did you mean 'sensitivity'"),
        (["analysis=sensitivity", "analysis_images=0"], "analysis_images is 0"),
        (["analysis=sensitivity", "run=/nowhere"], "There is no directory /nowhere"),
    ):
        assert wanted in failed("evaluate.py", f"run={folder}", *arguments)


def test_a_place_that_cannot_be_written_is_said_before_measuring(
    measured: tuple[Path, str],
) -> None:
    folder = measured[0]
    blocked = folder / ".write-probe"  # a folder where a file should go; root may write anywhere
    blocked.mkdir()
    try:
        text = failed("evaluate.py", f"run={folder}", *MEASURE)
    finally:
        blocked.rmdir()
    assert "Cannot write" in text
    assert "Sensitivity:" not in text  # no bar
