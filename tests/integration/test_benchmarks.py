"""The benchmarks' commands, small: tables of step.py and gpu.py, networks of coverage.py."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

import fat
from benchmarks.tests.loading import load_coverage
from tests.gpu.pretended import PretendedGpu

FOLDER = Path(__file__).parents[2] / "benchmarks"
STEP = "--size 32 --batch 2 --repeats 1 --threads 1 --model mobilenet_v2 --weights frozen adaround"


def run(script: str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    folders = [str(path)] if path else []
    folders += [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, FOLDER / script, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Output of step.py where one peer is missing and the other fails."""
    folder = tmp_path_factory.mktemp("peers")
    for name, error in (("brevitas", "ImportError"), ("torchao", "ZeroDivisionError")):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise {error}('none here\\nsecond line')\n")
    result = run("step.py", *STEP.split(), "--peers", path=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_the_first_line_names_the_machine(lines: list[str]) -> None:
    assert f"1 threads, torch {torch.__version__}, kernels " in lines[0]
    assert lines[0].endswith("batch 2, 32 px")


def test_each_step_is_a_row_of_figures(lines: list[str]) -> None:
    assert lines[1].split() == [
        "network",
        "step",
        "median",
        "s",
        "min",
        "max",
        "ratio",
        "peak",
        "MB",
        "ratio",
    ]
    steps = [line[20:41].strip() for line in lines[2:]]
    assert steps == [
        "float fine-tuning",
        "student, frozen",
        "student, adaround",
        "teacher alone",
        "Brevitas",
        "torchao",
    ]
    for line in lines[2:6]:
        assert line.startswith("mobilenet_v2 ")
        median, low, high, ratio, peak, share = line[41:].split()
        assert 0.0 < float(low) <= float(median) <= float(high)
        assert float(ratio.removesuffix("x")) > 0.0
        assert float(peak) > 0.0
        assert float(share.removesuffix("x")) > 0.0
    assert lines[2].count("1.00x") == 2
    # Adam's two moments and the gradient of 3.5 million factors.
    frozen, rounding = (float(line[41:].split()[4]) for line in lines[3:5])
    assert rounding - frozen > 30.0


def test_a_peer_that_fails_is_a_line_of_the_table(lines: list[str]) -> None:
    assert lines[6][41:] == "not installed (none here); type: pip install -e '.[peers]'"
    assert lines[7][41:] == "failed with ZeroDivisionError: none here"


@pytest.fixture
def presets(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("presets")
    sys.modules.pop("presets")


def test_a_cell_that_failed_is_shown_and_tried_again(
    presets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "best_w4a4-mse"
    presets.run_cell(["quant.bits=9"], directory, 1)
    assert (
        presets.table(["best_w4a4"], ["mse"], tmp_path)
        .splitlines()[2]
        .startswith("| best_w4a4 | failed: Error: quant.bits is 9; allowed are whole numbers")
    )
    assert not (directory / "command.txt").exists()
    figures = {"agreement": 75.04, "sqnr_db": 5.25}
    (directory / "metrics.json").write_text(json.dumps({"trained": figures, "calibrated": {}}))
    failed = subprocess.CompletedProcess([], 2)
    monkeypatch.setattr(presets.subprocess, "run", lambda *_, **__: failed)
    presets.run_cell(["quant.bits=9"], directory, 1)  # left by a run that never finished
    assert not (directory / "metrics.json").exists()


def test_the_gpu_benchmark_measures_every_cell(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    words = ("--device", "cpu", "--quick", "--full", "--dollars", "6", "--output", str(file))
    result = run("gpu.py", *words)
    assert result.returncode == 0, result.stderr
    assert "NONE OF THE FIGURES IS ABOUT A GPU" in result.stdout
    cells = json.loads(file.read_text())["cells"]
    assert {name: cell["failed"] for name, cell in cells.items() if "failed" in cell} == {}
    assert set(cells) == set(run("gpu.py", *words, "--list").stdout.splitlines())
    steps = cells["step mobilenet_v2 2 bf16"]["rows"]
    assert list(steps) == ["float fine-tuning", "student", "teacher"]
    assert steps["float fine-tuning"]["ratio"] == 1.0
    assert steps["student"]["kernels"] > steps["float fine-tuning"]["kernels"]
    assert steps["teacher"]["GB"] < steps["student"]["GB"]
    fit = cells["fit mobilenet_v2 2 bf16"]["rows"]["fat.fit"]["ms"]
    judged = cells["inference mobilenet_v2 2"]["rows"]["fat.evaluate"]["images/s"]
    calibration = cells["calibrate mobilenet_v2"]["rows"]["percentile"]["ms"]
    # 8 images for 2 epochs in steps of 2, twice 4 test images, three times 2 validation images.
    seconds = 1e-3 * (8 * fit + calibration) + 14 / judged
    told = re.search(r"computed from the cells +([\d.e-]+) min, \$([\d.]+)", result.stdout)
    assert told is not None
    assert float(told[1]) == pytest.approx(seconds / 60, rel=0.01)
    assert cells["full mobilenet_v2 2"]["rows"]["each step taken"]["steps"] == 8
    again = run("gpu.py", *words)
    assert again.stdout == result.stdout  # everything is in the file


class Tiny(nn.Module):
    """A network with each kind of layer that the measured ones have."""

    def __init__(self) -> None:
        super().__init__()

        def block(before: int, after: int, kernel: int, groups: int = 1) -> nn.Sequential:
            padding = kernel // 2
            layer = nn.Conv2d(before, after, kernel, 1, padding, groups=groups, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU6())

        self.stem, self.depthwise, self.point = block(3, 8, 3), block(8, 8, 3, 8), block(8, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(nn.functional.max_pool2d(images, 8))
        return self.head((x + self.point(self.depthwise(x))).mean((2, 3)))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module benchmarks/gpu.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu")


@pytest.fixture
def tiny(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The command, on a tiny network with tiny sizes."""
    found = SimpleNamespace(network=Tiny().eval())
    monkeypatch.setattr("step.load_float_network", lambda name, weights: found)
    monkeypatch.setattr(gpu, "quieten", lambda: None)
    return ["gpu.py", "--quick", "--full", "--output", str(tmp_path / "gpu.json")]


def test_every_cell_on_a_pretended_gpu(
    gpu: ModuleType,
    tiny: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @contextlib.contextmanager
    def profile(activities: list[Any]) -> Iterator[Any]:
        assert activities == [torch.profiler.ProfilerActivity.CUDA]
        events = [
            SimpleNamespace(
                device_type=kind,
                is_user_annotation=annotation,
                count=7,
                self_device_time_total=2000.0,
            )
            for kind in (DeviceType.CUDA, DeviceType.CPU)
            for annotation in (False, True)
        ]
        yield SimpleNamespace(key_averages=lambda: events)

    monkeypatch.setattr("tools.measuring.profile", profile)
    # It has no compiler.
    monkeypatch.setattr(fat.Student, "compiled", lambda student, mode: student.forward)
    monkeypatch.setattr("sys.argv", [*tiny, "--device", "cuda"])
    with PretendedGpu():
        gpu.main()
    content = json.loads((tmp_path / "gpu.json").read_text())
    cells = content["cells"]
    assert {name: cell["failed"] for name, cell in cells.items() if "failed" in cell} == {}
    assert content["signature"]["device"] == "Pretended GPU"
    assert "bit for bit" in cells["self-test mobilenet_v2"]["rows"]["self-test"]["note"]
    rows = cells["step mobilenet_v2 2 bf16"]["rows"]
    assert {row["launches"] for row in rows.values()} == {7}
    assert rows["student"]["busy ms"] == 2.0
    assert rows["teacher"]["peak MB"] is not None
    assert "NONE OF THE FIGURES" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    """The module benchmarks/coverage.py."""
    return load_coverage()


def options(**changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"size": 64, "memory": 6.0, "limit": 600, **changed})


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_a_network_goes_through_everything(coverage: ModuleType, name: str) -> None:
    found = coverage.run(name, options())
    assert found["error"] is None
    assert found["passed"] == list(coverage.STAGES)
    assert found["integer_layers"] == found["layers"]
    assert found["moved"] <= found["trained"]


def test_a_network_that_takes_too_long_is_stopped_and_named(coverage: ModuleType) -> None:
    found = coverage.run("test_vit", options(limit=0))
    assert (found["network"], found["error_kind"]) == ("test_vit", "stopped")
    assert found["error"] == "took more than 0 s (--limit)"


def test_a_process_that_dies_is_a_row(coverage: ModuleType) -> None:
    found = coverage.run("no_such_network", options())
    assert found["error_kind"] == "crashed"
    assert "no_such_network" in found["error"]
