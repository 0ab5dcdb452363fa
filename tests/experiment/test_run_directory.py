"""A directory is one run's: what it keeps, who may go on in it, and who is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fat.experiment.config import RunConfig, option_table, parse_run
from fat.experiment.run_directory import begin, objective, read_config, read_metrics, stored_config
from fat.utils.errors import FatError
from tests.conf.test_compose import composed

FILES = {"config.yaml"}


@pytest.fixture
def config() -> RunConfig:
    return composed("model=mobilenet_v2", "hub=me/mine", "name=first")


def judged(directory: Path, status: str = "calibrated") -> dict[str, Any]:
    """Leave in a directory what a run leaves once it is calibrated."""
    metrics = {
        "status": status,
        "command": None,
        "float": {"top1": None},
        "trained": None,
        "calibrated": {"top1": None, "agreement": 90.0},
        "accuracy_drop": None,
        "seconds": {"load": 1.5},
    }
    (directory / "metrics.json").write_text(json.dumps(metrics))
    return metrics


def changed(config: RunConfig, group: str, **options: Any) -> RunConfig:
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **options)}
    )


def test_a_new_run_keeps_its_options(config: RunConfig, tmp_path: Path) -> None:
    assert begin(tmp_path / "run", config, resume=False) is None
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    found = read_config(tmp_path / "run")
    assert found.model.name == "mobilenetv2_100"
    assert found == dataclasses.replace(config, hub=None)


def test_options_that_say_how_to_get_a_result_are_not_kept(config: RunConfig) -> None:
    config = dataclasses.replace(config, resume="auto", sweep="somewhere")
    kept = stored_config(config)
    names = {entry.key.partition(".")[0] for entry in option_table(RunConfig)}
    assert names - kept.keys() == {"resume", "sweep", "hub"}
    assert yaml.safe_load(yaml.safe_dump(kept)) == kept  # plain containers
    assert stored_config(parse_run(kept)) == kept


def test_a_run_is_not_written_over(config: RunConfig, tmp_path: Path) -> None:
    begin(tmp_path, config, resume=False)
    judged(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FatError, match=rf"already holds a run.*Type resume={tmp_path} to resume"):
        begin(tmp_path, config, resume=False)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("resume", [False, True])
def test_before_anything_was_found_out_a_directory_is_free(
    config: RunConfig, tmp_path: Path, resume: bool
) -> None:
    begin(tmp_path, config, resume=False)
    other = changed(config, "quant", bits=4)
    assert begin(tmp_path, other, resume=resume) is None
    assert read_config(tmp_path).quant.bits == 4


@pytest.mark.parametrize("status", ["calibrated", "finished"])
def test_a_run_goes_on_with_what_it_knew(config: RunConfig, tmp_path: Path, status: str) -> None:
    begin(tmp_path, config, resume=False)
    metrics = judged(tmp_path, status)
    assert begin(tmp_path, config, resume=True) == metrics


def test_where_it_runs_may_be_another_place(config: RunConfig, tmp_path: Path) -> None:
    begin(tmp_path, config, resume=False)
    metrics = judged(tmp_path)
    moved = changed(config, "trainer", devices=2, threads=1, checkpoint_every=1.0)
    moved = changed(moved, "logger", name="csv")
    moved = dataclasses.replace(moved, name="another", hub=None, resume="auto")
    assert begin(tmp_path, moved, resume=True) == metrics
    assert read_config(tmp_path).trainer.devices == 1  # as it began


@pytest.mark.parametrize(
    ("group", "option", "value", "words"),
    [
        ("quant", "bits", 4, r"bits is 8, the run's is 4 \(under quant\)"),
        ("optim", "lr", 0.5, r"the run's is 0.5 \(under optim\)"),
        ("data", "batch_size", 3, r"the run's is 3 \(under data\)"),
        ("model", "weights", "random", r"the run's is random \(under model\)"),
        ("export", "target", "onnx", r"target is none, the run's is onnx \(under export\)"),
    ],
)
def test_other_options_are_named(
    config: RunConfig, tmp_path: Path, group: str, option: str, value: Any, words: str
) -> None:
    begin(tmp_path, config, resume=False)
    judged(tmp_path)
    with pytest.raises(FatError, match=words):
        begin(tmp_path, changed(config, group, **{option: value}), resume=True)


def test_another_seed_is_named(config: RunConfig, tmp_path: Path) -> None:
    begin(tmp_path, config, resume=False)
    judged(tmp_path)
    with pytest.raises(FatError, match=r"0, the run's is 7 \(under seed\)"):
        begin(tmp_path, dataclasses.replace(config, seed=7), resume=True)


def test_a_place_that_cannot_be_written_is_named(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FatError, match="Choose another place"):
        begin(tmp_path / "file" / "run", config, resume=False)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FatError, match=r"is not a run directory: it has no config\.yaml"):
        read_config(tmp_path)
    assert read_metrics(tmp_path) is None
    (tmp_path / "config.yaml").write_text("a: [")
    (tmp_path / "metrics.json").write_text('{"a": 1')
    with pytest.raises(FatError, match=r"config\.yaml cannot be read"):
        read_config(tmp_path)
    with pytest.raises(FatError, match=r"metrics\.json is damaged"):
        read_metrics(tmp_path)
    (tmp_path / "config.yaml").write_text("quant: {bitz: 4}\nmodel: {name: x}\n")
    with pytest.raises(FatError, match="bitz"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("drop", "calibrated", "trained", "wanted"),
    [
        (1.25, 60.0, 90.0, 1.25),
        (-0.5, 60.0, 90.0, -0.5),  # better than the float network
        (0.0, 60.0, 90.0, 0.0),
        (None, 60.0, 90.0, 10.0),
        (None, 60.0, None, 40.0),
    ],
)
def test_what_a_sweeper_makes_small(
    drop: float | None, calibrated: float, trained: float | None, wanted: float
) -> None:
    metrics = {
        "accuracy_drop": drop,
        "calibrated": {"agreement": calibrated},
        "trained": None if trained is None else {"agreement": trained},
    }
    assert objective(metrics) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "holds 'None' in place of options"),
        ("- a\n- b\n", "in place of options"),
        ("model: !!python/object/apply:os.system [touch executed]\n", "cannot be read"),
        ("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n", "holds YAML aliases"),
        ("&a {a: *a}\n", "holds YAML aliases"),
    ],
)
def test_a_config_that_was_changed_is_refused(tmp_path: Path, text: str, wanted: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(FatError, match=wanted):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"status": None}, "its status is 'None'"),
        ({"float": []}, "its float is"),
        ({"calibrated": {"top1": None}}, "its calibrated.agreement is 'missing'"),
        ({"seconds": {"load": "x"}}, "its seconds.load is 'x'"),
        ({"accuracy_drop": "much"}, "its accuracy_drop is 'much'"),
    ],
)
def test_metrics_that_were_changed_are_named(
    tmp_path: Path, change: dict[str, Any], wanted: str
) -> None:
    metrics = judged(tmp_path) | change
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(FatError, match=wanted):
        read_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(FatError, match="in place of metrics"):
        read_metrics(tmp_path)
