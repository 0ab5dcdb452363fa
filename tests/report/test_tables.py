"""sweep.csv against values computed by hand."""

from __future__ import annotations

import csv
from pathlib import Path

from fat.report.records import read_sweep
from fat.report.tables import KNOWN, flatten_metrics, sweep_table, write_table
from tests.report.fake_runs import fail, fake_run, metrics


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_one_row_per_job(tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    fake_run(
        place / "0-a",
        metrics(command="python train.py quant.bits=8", drops=(4.0, 1.5)),
        tensors=2,
        overrides=["quant.bits=8", "model=a"],
    )
    fail(place / "1-a", error="FatError", message='No weights,\nsay "why"', command="python t")
    (place / "sweep.json").write_text(
        '{"id": "s", "command": "c", "jobs": ['
        '{"directory": "0-a", "overrides": ["quant.bits=8", "model=a"], "status": "finished"},'
        '{"directory": "1-a", "overrides": ["quant.bits=4", "model=a"], "status": "failed"},'
        '{"directory": "2-a", "overrides": ["quant.bits=2", "model=a"], "status": "not started"}]}'
    )
    write_table(tmp_path / "sweep.csv", read_sweep(place))
    first, second, third = rows_of(tmp_path / "sweep.csv")
    wanted = {
        "directory": "0-a",
        "status": "finished",
        "error": "",
        "command": "python train.py quant.bits=8",
        "option.quant.bits": "8",
        "model": "mobilenet_v2",
        "data.labelled": "true",
        "data.splits.test.images": "500",
        "data.splits.test.first_skipped": "[]",
        "bits.weight": "8",
        "granularity": "per_channel",
        "init.activation": "mse",
        "float.top1": "72.5",
        "calibrated.top1": "68.5",
        "trained.top1": "71.0",
        "trained.agreement": "97.75",
        "accuracy_drop": "1.5",
        "seconds.train": "310.25",
        "seconds.finetune": "",
        "training.best_step": "150",
        "size_mb.quantized": "3.5",
        "exported.onnx.latency_ms.quantized": "12.0",
        "exported.onnx.kernels.operators.QLinearConv": "52",
        "versions.torch": "2.15.0",
    }
    assert {key: first[key] for key in wanted} == wanted
    assert "option.model" not in first  # the same in all jobs
    assert second["error"] == 'FatError: No weights, say "why"'
    assert (second["status"], second["command"]) == ("failed", "python t")
    assert second["trained.top1"] == second["exported.onnx.latency_ms.quantized"] == ""
    assert (third["directory"], third["status"]) == ("2-a", "not started")
    assert third["command"] == "python train.py quant.bits=2 model=a"
    assert third["option.quant.bits"] == "2"


def test_columns_come_in_one_order(sweep_directory: Path) -> None:
    sweep = read_sweep(sweep_directory)
    header, rows = sweep_table(sweep)
    assert header[:8] == [
        "directory",
        "status",
        "error",
        "command",
        "option.model",
        "option.quant.bits",
        "option.init",
        "option.quant.granularity",
    ]
    assert len(set(header)) == len(header)
    assert [name for name in header if name in KNOWN] == sorted(KNOWN, key=header.index)
    assert {len(row) for row in rows} == {len(header)}
    # Which runs there are does not move a column that is always there.
    few, _ = sweep_table(type(sweep)(sweep.directory, "t", None, sweep.runs[34:]))
    assert [name for name in few if name in KNOWN] == [name for name in header if name in KNOWN]
    assert set(KNOWN) <= set(few)
    for group in ("calibrated.", "seconds.", "exported."):
        places = [i for i, name in enumerate(header) if name.startswith(group)]
        assert places == list(range(places[0], places[0] + len(places)))


def test_what_says_nothing_is_empty() -> None:
    told = {"a": {"b": float("nan"), "c": float("-inf"), "d": None, "e": 0.0, "f": False}, "g": []}
    assert flatten_metrics(told) == {
        "a.b": "",
        "a.c": "",
        "a.d": "",
        "a.e": "0.0",
        "a.f": "false",
        "g": "[]",
    }


def test_texts_no_file_can_hold(tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    told = metrics(model="half \ud800 =cmd")
    fake_run(place / "0", told, tensors=2)
    (place / "multirun.yaml").write_text("{}")
    write_table(tmp_path / "t.csv", read_sweep(place))
    assert rows_of(tmp_path / "t.csv")[0]["model"] == "half ? =cmd"
