"""The measurements of benchmarks/gpu.py, its file, and its limit of time."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module benchmarks/gpu.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu")


@pytest.fixture
def run(
    gpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[list[str], dict[str, Any]]]:
    """Runs the command on the CPU with other cells; returns its lines and the file's content."""
    file = tmp_path / "results" / "gpu.json"

    def run(cells: list[Any], *words: str) -> tuple[list[str], dict[str, Any]]:
        monkeypatch.setattr(gpu, "plan", lambda options: cells)
        monkeypatch.setattr(gpu, "quieten", lambda: None)
        command = ["benchmarks/gpu.py", "--device", "cpu", "--quick", "--output", str(file), *words]
        monkeypatch.setattr("sys.argv", command)
        gpu.main()
        content = json.loads(file.read_text()) if file.exists() else {}
        return capsys.readouterr().out.splitlines(), content

    return run


class Counted:
    """A cell's measurement that counts its calls and fails on request."""

    def __init__(self, *failures: bool) -> None:
        self.failures = [*failures]
        self.calls = 0

    def __call__(self, bench: Any) -> dict[str, Any]:
        self.calls += 1
        if self.failures and self.failures.pop(0):
            raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB.\nSecond line")
        return {"a row": {"ms": 12.345, "ratio": 1.5, "peak MB": None, "note": "a note"}}


def test_calls_take_turns_and_stop_in_time(gpu: ModuleType) -> None:
    made: list[str] = []
    calls = {name: lambda name=name: made.append(name) for name in "ab"}
    turns = gpu.Turns(several=2, rounds=9, seconds=0.0)
    taken = gpu.take_turns(calls, gpu.Device("cpu"), turns)
    assert "".join(made) == "ab" + 3 * "aabb"
    assert [len(taken[name]) for name in "ab"] == [3, 3]
    taken = gpu.take_turns(calls, gpu.Device("cpu"), gpu.Turns(1, rounds=5, seconds=60.0))
    assert len(taken["a"]) == 5
    assert gpu.ratio([1.0, 9.0, 3.0], [1.0, 1.0, 1.0]) == 3.0


def test_kernels_and_bytes_of_a_call(gpu: ModuleType) -> None:
    a, b = torch.ones(10, 10, requires_grad=True), torch.ones(10, 10)

    def call() -> None:
        a.grad = None
        (a * b).view(100).sum().backward()

    row = gpu.cost(call, gpu.Device("cpu"))
    # Product, sum, a gradient of 1, and its product with b, which is read through an expanded
    # scalar.
    assert row["kernels"] == 4
    assert 1e9 * row["GB"] == pytest.approx(1200 + 404 + 8 + 804)
    assert row["launches"] > row["kernels"]  # on a CPU, all operations
    assert row["peak MB"] is None


def test_drawn_images_are_the_same_in_each_pass(gpu: ModuleType) -> None:
    images = gpu.Drawn(5, 2, 8, torch.device("cpu"))
    first, second = list(images), list(images)
    assert len(images) == 3
    assert [tuple(batch.shape) for batch in first] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert all(map(torch.equal, first, second))


def test_the_important_cells_come_first(gpu: ModuleType) -> None:
    options = argparse.Namespace(
        model=["mobilenet_v2", "resnet50"], batch=[64, 128, 256], full=True
    )
    names = [cell.name for cell in gpu.plan(options)]
    assert names[:4] == [
        "ceilings",
        "self-test mobilenet_v2",
        "self-test resnet50",
        "step mobilenet_v2 128 bf16",
    ]
    assert len(set(names)) == len(names)
    steps = {name for name in names if name.startswith("step ")}
    assert len(steps) == 2 * 3 * 2
    assert {name.split()[0] for name in names} == {
        *("ceilings", "self-test", "step", "fit", "inference", "feeding", "calibrate"),
        *("reconstruct", "compile", "full"),
    }


def test_a_cell_that_fails_is_a_line_and_is_tried_again(gpu: ModuleType, run: Any) -> None:
    good, bad = Counted(), Counted(True)
    cells = [gpu.Cell("first", bad, 1), gpu.Cell("second", good, 1)]
    lines, content = run(cells)
    assert "    failed: RuntimeError: CUDA out of memory. Tried to allocate 9 GiB." in lines
    assert lines[lines.index("second") + 1].split() == ["a", "row", "12.35", "1.50x", "a", "note"]
    assert content["cells"]["first"]["failed"].startswith("RuntimeError: CUDA out of memory")
    assert lines[-1].startswith(
        "To measure what is missing or failed, type: python benchmarks/gpu.py --device cpu --quick"
    )
    lines, content = run(cells)
    assert (bad.calls, good.calls) == (2, 1)
    assert "rows" in content["cells"]["first"]
    assert lines[-1].startswith("Written to ")
    run(cells, "--fresh")
    assert (bad.calls, good.calls) == (3, 2)


def test_cells_without_time_are_named(gpu: ModuleType, run: Any) -> None:
    long, short = Counted(), Counted()
    cells = [gpu.Cell("long", long, 90), gpu.Cell("short", short, 20)]
    lines, content = run(cells, "--minutes", "1")
    assert (long.calls, short.calls) == (0, 1)
    assert lines[-2] == "No time for 1 cells (--minutes 1): long"
    assert "--minutes 1" in lines[-1]
    assert list(content["cells"]) == ["short"]


def test_results_of_another_device_are_replaced(
    gpu: ModuleType, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [gpu.Cell("only", Counted(), 1)]
    _, content = run(cells)
    assert content["signature"]["torch"] == torch.__version__
    monkeypatch.setattr(gpu, "machine_name", lambda: "another machine")
    lines, content = run(cells)
    assert lines[0].endswith("has other values of: device. It will be replaced.")
    assert content["signature"]["device"] == "another machine"
    assert cells[0].measure.calls == 2


def test_a_machine_without_a_gpu_is_told_what_to_type(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "python benchmarks/gpu.py --device cpu --quick" in capsys.readouterr().err


def test_the_protocol_is_computed_from_the_cells(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", "--dollars", "6"])
    bench = gpu.Bench(gpu.parse())
    assert gpu.protocol(bench, "resnet50", 128) == {}
    bench.cells = {
        "fit resnet50 128 bf16": {"rows": {"fat.fit": {"ms": 20.0}}},
        "inference resnet50 128": {"rows": {"fat.evaluate": {"images/s": 2000.0}}},
        "calibrate resnet50": {"rows": {"percentile": {"ms": 500.0}}},
    }
    (row,) = gpu.protocol(bench, "resnet50", 128).values()
    # 782 steps an epoch; 50,000 images twice, and 1,000 six times; calibration.
    seconds = 5 * 782 * 0.02 + 106_000 / 2000 + 0.5
    assert row["seconds"] == pytest.approx(seconds)
    assert row["note"] == f"{seconds / 60:.3g} min, ${seconds / 600:.2f}"
