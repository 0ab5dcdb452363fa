"""Reading runs and sweeps, complete, incomplete and damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from fat import FatError
from fat.experiment.config import RunConfig
from fat.report.records import (
    RENAMED_OPTIONS,
    RENAMED_VALUES,
    find_runs,
    finite,
    is_run,
    is_sweep,
    latencies,
    leaves,
    number,
    read_csv,
    read_run,
    read_sweep,
    total_seconds,
    word,
)
from fat.utils.options import entries
from tests.report.fake_runs import fail, fake_run, metrics


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (2, 2.0),
        ("1e3", 1000.0),
        (float("inf"), None),
        ("nan", None),
        (True, None),
        (None, None),
        ([1], None),
        ("three", None),
        (10**400, None),
    ],
)
def test_what_can_be_drawn(value: object, wanted: float | None) -> None:
    assert finite(value) == wanted


def test_paths_into_what_is_not_there() -> None:
    told = {"a": {"b": 1.5, "name": "x"}, "c": None, "d": [1]}
    assert number(told, "a.b") == 1.5
    assert number(told, "c.b") is None
    assert number(told, "d.0") is None
    assert number(told, "a.name") is None
    assert word(told, "a.name") == "x"
    assert word(told, "a.b") is None
    assert word(None, "a") is None


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run(fake_run(tmp_path / "run", metrics(command="python train.py model=x")))
    assert (run.status, run.name, run.error) == ("finished", "run", None)
    assert run.command == "python train.py model=x"
    assert run.problems == ()
    assert latencies(run.metrics) == {"onnx": 12.0}
    assert total_seconds(run.metrics) == pytest.approx(0.6 + 1.4 + 24.4 + 58.0 + 310.25 + 30.0)


@pytest.mark.parametrize(
    ("stage", "stated", "wanted"),
    [
        ("calibrated", None, "unfinished"),
        ("trained", None, "unfinished"),
        ("trained", "failed", "failed"),
        ("finished", "failed", "finished"),
        ("calibrated", "finished", "unfinished"),
    ],
)
def test_a_runs_own_files_come_before_the_list(
    tmp_path: Path, stage: str, stated: str | None, wanted: str
) -> None:
    directory = fake_run(tmp_path / "run", metrics(status=stage), tensors=2)
    assert read_run(directory, stated=stated).status == wanted


def test_runs_from_before_the_status_was_noted(tmp_path: Path) -> None:
    told = metrics()
    del told["status"]
    assert read_run(fake_run(tmp_path / "new", told, tensors=2)).status == "finished"
    told["trained"] = None
    assert read_run(fake_run(tmp_path / "old", told, tensors=2)).status == "unfinished"


def test_files_of_version_0_1_read_with_todays_names(tmp_path: Path) -> None:
    """Keys and values that were renamed since then; nothing else changes."""
    told = metrics(
        granularity="vector", command="python train.py quant.weights=rounding 'name=a b'"
    )
    overrides = ["+quant.granularity=scalar", "optim.pointwise_lr=0.1", "model.weights=rounding"]
    directory = fake_run(tmp_path / "run", told, tensors=2, overrides=overrides)
    asked = {"weights": "pointwise", "granularity": "scalar", "pointwise_range": [0.5, 2]}
    asked |= {"rounding_range": [-1, 1], "name": "vector"}
    optim = {"pointwise_lr": 1, "rounding_lr": 2, "reconstruction": {"float_share": 0.5}}
    (directory / "config.yaml").write_text(yaml.safe_dump({"quant": asked, "optim": optim}))
    run = read_run(directory)
    assert run.metrics == told | {"granularity": "per_channel"}
    assert run.config == {
        "quant": {
            "weights": "scale",
            "granularity": "per_tensor",
            "weight_scale_range": [0.5, 2],
            "adaround_range": [-1, 1],
            "name": "vector",
        },
        "optim": {
            "weight_scale_lr": 1,
            "adaround_lr": 2,
            "reconstruction": {"float_fraction": 0.5},
        },
    }
    assert run.overrides == (
        "+quant.granularity=per_tensor",
        "optim.weight_scale_lr=0.1",
        "model.weights=rounding",
    )
    assert run.command == "python train.py quant.weights=adaround 'name=a b'"
    (directory / "thresholds.csv").write_text("layer,grid\nvector,unsigned\nb,asymmetric\n")
    assert read_csv(directory / "thresholds.csv", []) == [
        {"layer": "vector", "grid": "symmetric_unsigned"},
        {"layer": "b", "grid": "affine"},
    ]


def test_all_renamed_options_are_known() -> None:
    """The names are those that the options declare, as far as version 0.1 wrote them."""
    declared = {
        f"{entry.key.rpartition('.')[0]}.{earlier}": entry.key
        for entry in entries(RunConfig)
        for earlier in entry.rule.earlier
    }
    file = Path(__file__).parents[1] / "legacy/config_keys.yaml"
    written = leaves(yaml.safe_load(file.read_text())["train"])
    assert {key: declared[key] for key in written if key in declared} == RENAMED_OPTIONS
    values = {entry.key: entry.rule.renamed for entry in entries(RunConfig) if entry.rule.renamed}
    assert values == {key: RENAMED_VALUES[key] for key in RENAMED_VALUES if "." in key}


def test_a_sweep_of_version_0_1_has_todays_command(tmp_path: Path) -> None:
    fake_run(tmp_path / "0-a", tensors=2)
    command = "python train.py -m quant.granularity=vector,scalar 'model.weights=a\"b'"
    jobs = [{"directory": "0-a", "overrides": ["quant.granularity=vector"], "status": "finished"}]
    (tmp_path / "sweep.json").write_text(json.dumps({"command": command, "jobs": jobs}))
    sweep = read_sweep(tmp_path)
    assert sweep.command == (
        "python train.py -m quant.granularity=per_channel,per_tensor 'model.weights=a\"b'"
    )
    assert sweep.runs[0].overrides == ("quant.granularity=per_channel",)
    (tmp_path / "sweep.json").write_text(json.dumps({"command": "python 'unclosed", "jobs": jobs}))
    assert read_sweep(tmp_path).command == "python 'unclosed"


def test_a_config_that_contains_itself_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: &a {b: *a}\n")
    run = read_run(tmp_path)
    assert run.config == {}
    assert "config.yaml is damaged" in run.problems[0]


def test_a_failure_says_why_in_one_line(tmp_path: Path) -> None:
    directory = fail(
        tmp_path / "run", error="FatError", message="No weights.\nTry:  X", command="python a b"
    )
    run = read_run(directory)
    assert (run.status, run.command) == ("failed", "python a b")
    assert run.error == "FatError: No weights. Try: X"


def test_an_export_that_failed_leaves_figures_and_the_failure(tmp_path: Path) -> None:
    directory = fake_run(tmp_path / "run", metrics(status="trained"), tensors=2)
    (directory / "failure.json").write_text('{"error": "FatError", "message": "m"}')
    run = read_run(directory)
    assert run.status == "failed"
    assert number(run.metrics, "trained.top1") == 71.5


def test_the_command_is_put_together_from_what_was_typed(tmp_path: Path) -> None:
    run = read_run(tmp_path / "none", overrides=["model=x", "name=two words"])
    assert run.status == "not started"
    assert run.command == "python train.py model=x 'name=two words'"
    assert read_run(tmp_path / "none").command is None


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("{", "metrics.json is damaged"),
        ("[1]", "contains a list, not a mapping"),
        (b"\xff\xfe", "metrics.json cannot be read"),
        ("[" * 100_000, "metrics.json is damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: str | bytes, wanted: str) -> None:
    text = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "metrics.json").write_bytes(text)
    run = read_run(tmp_path)
    assert run.metrics == {}
    assert run.status == "unfinished"
    (problem,) = run.problems
    assert wanted in problem


def test_a_damaged_failure_is_still_one(tmp_path: Path) -> None:
    (tmp_path / "failure.json").write_text("{")
    run = read_run(tmp_path)
    assert run.status == "failed"
    assert run.error is None


def test_rows_of_a_table(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('a,b\n1,"two\nlines"\n2\n3,4,5\n')
    problems: list[str] = []
    assert read_csv(file, problems) == [
        {"a": "1", "b": "two\nlines"},
        {"a": "2", "b": ""},
        {"a": "3", "b": "4"},
    ]
    assert read_csv(tmp_path / "b.csv", problems) is None
    assert problems == []


def test_jobs_are_found_in_their_order(tmp_path: Path) -> None:
    for name in ("10-a", "2-a", "deep/1-b"):
        fake_run(tmp_path / name, tensors=2)
    (tmp_path / "2-a/checkpoints").mkdir()
    (tmp_path / "2-a/checkpoints/config.yaml").write_text("{}")  # a run holds no runs
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/config.yaml").write_text("{}")
    found = [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)]
    assert found == ["2-a", "10-a", "deep/1-b"]
    assert is_run(tmp_path / "2-a")
    assert not is_run(tmp_path)


def test_a_job_that_stopped_before_its_configuration_is_one(tmp_path: Path) -> None:
    (tmp_path / "0-a/.hydra").mkdir(parents=True)
    (tmp_path / "0-a/.hydra/overrides.yaml").write_text("- model=x\n")
    (tmp_path / "multirun.yaml").write_text("{}")
    (run,) = read_sweep(tmp_path).runs
    assert (run.name, run.status, run.overrides) == ("0-a", "unfinished", ("model=x",))


def test_a_sweep_by_its_list(sweep_directory: Path) -> None:
    sweep = read_sweep(sweep_directory)
    assert sweep.title == "2026-11-26/08-00-00"
    assert sweep.command is not None
    assert sweep.command.startswith("python train.py -m model=")
    assert [run.name for run in sweep.runs[:2]] == ["0-mobilenet_v2", "1-mobilenet_v2"]
    states = [run.status for run in sweep.runs]
    assert {state: states.count(state) for state in states} == {
        "finished": 31,
        "failed": 2,
        "unfinished": 1,
        "not started": 2,
    }
    assert sweep.runs[35].command == (
        "python train.py model=efficientnet_lite0 quant.bits=4 init=percentile "
        "quant.granularity=per_tensor"
    )


def test_a_sweep_without_its_list(sweep_directory: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(sweep_directory, tmp_path / "sweep"))
    (directory / "sweep.json").unlink()
    sweep = read_sweep(directory)
    assert sweep.title == "sweep"
    assert sweep.command == (
        "python train.py -m model=mobilenet_v2,mnasnet_100,efficientnet_lite0 quant.bits=8,6,4 "
        "init=mse,percentile quant.granularity=per_channel,per_tensor"
    )
    # An empty folder and folders that are not there cannot be known.
    assert len(sweep.runs) == 33
    assert [run.status for run in sweep.runs].count("failed") == 1


def test_a_sweep_that_was_moved(tmp_path: Path) -> None:
    here = fake_run(tmp_path / "sweep/0-a", tensors=2).parent
    jobs = [{"directory": "/elsewhere/0-a", "overrides": ["model=x"], "status": "finished"}]
    (here / "sweep.json").write_text(json.dumps({"id": "s", "command": None, "jobs": jobs}))
    (run,) = read_sweep(here).runs
    assert (run.name, run.status) == ("0-a", "finished")


@pytest.mark.parametrize(
    "notes", ["{", "[]", '{"jobs": 3}', '{"jobs": [1, {"directory": 5}]}', "{}"]
)
def test_a_damaged_list_leaves_the_runs(tmp_path: Path, notes: str) -> None:
    fake_run(tmp_path / "0-a", tensors=2)
    (tmp_path / "sweep.json").write_text(notes)
    sweep = read_sweep(tmp_path)
    assert [run.name for run in sweep.runs] == ["0-a"]
    assert bool(sweep.problems) == (notes not in ("{}", '{"jobs": 3}'))


def test_a_sweep_without_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").write_text(yaml.safe_dump({}))
    assert is_sweep(tmp_path)
    with pytest.raises(FatError, match=r"a sweep without any run.*python train\.py -m"):
        read_sweep(tmp_path)
