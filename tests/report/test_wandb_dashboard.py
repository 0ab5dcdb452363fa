"""The workspace matches the library's own model of it, and the names that runs log."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fat
from fat import FatError, QuantSpec
from fat.evaluation.bit_allocation import size_mb
from fat.evaluation.evaluator import evaluate
from fat.experiment.config import DataConfig, ModelConfig, RunConfig, to_config
from fat.report.wandb_dashboard import COLUMNS, build, main, save, spec
from fat.training.callbacks import AlphaHistory

pytest.importorskip("wandb_workspaces")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No API key is found, and W&B is never contacted."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("W&B was asked")

    monkeypatch.setattr("wandb.Api", refuse)


def panels(content: dict[str, Any]) -> list[dict[str, Any]]:
    sections = content["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def keys(content: dict[str, Any], section: str) -> set[str]:
    """All keys of a section, ``config`` or ``summary``, that the workspace refers to."""
    text = json.dumps(content)
    found = set(re.findall(rf'"{section}:([\w.]+)"', text))
    for panel in panels(content):
        config = panel["config"]
        if section == "config" and "groupBy" in config:
            found.add(config["groupBy"])
        if section == "summary" and panel["viewType"] == "Bar Chart":
            found.update(config["metrics"])
        if section == "summary" and "targetKey" in config:
            found.add(config["targetKey"])
    return found


def test_the_library_reads_back_what_it_is_sent() -> None:
    from wandb_workspaces.workspaces import Workspace
    from wandb_workspaces.workspaces.internal import View

    for sweep in (None, "multirun/2025-01-31/12-00-00"):
        content = spec(build("team", "fat", sweep))
        view = View.model_validate_json(json.dumps(content))
        assert json.loads(view.model_dump_json(by_alias=True, exclude_none=True)) == content
        again = Workspace._from_model(view)
        assert spec(again) == content
        assert (view.entity, view.project) == ("team", "fat")
        assert not any("Unknown" in type(p).__name__ for s in again.sections for p in s.panels)


def test_what_is_shown() -> None:
    content = spec(build("team", "fat"))
    sections = content["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [
        "Accuracy drop",
        "Init strategies",
        "Agreement and SQNR",
        "Training",
        "Thresholds",
        "Options that differ",
    ]
    kinds = {panel["viewType"] for panel in panels(content)}
    assert kinds == {
        "Bar Chart",
        "Scatter Plot",
        "Parallel Coordinates Plot",
        "Run History Line Plot",
        "Parameter Importance",
        "Run Comparer",
    }
    titles = [panel["config"].get("chartTitle") for panel in panels(content)]
    named = [title for title in titles if title]
    assert len(named) == len(set(named)) == len(titles) - 2
    drops = [
        panel["config"]
        for panel in panels(content)
        if panel["viewType"] == "Bar Chart" and panel["config"]["metrics"] == ["accuracy_drop"]
    ]
    assert {config["groupBy"] for config in drops} == {
        "model.value.name",
        "quant.value.bits",
        "quant.value.granularity",
        "init.value.activation.name",
    }
    assert content["spec"]["section"]["settings"]["maxRuns"] == 100
    pinned = content["spec"]["section"]["runSets"][0]["runFeed"]["columnOrder"]
    assert pinned == ["run:displayName", *COLUMNS]


def test_every_option_that_is_asked_for_exists() -> None:
    config = RunConfig(model=ModelConfig("x"), data=DataConfig("photos"))
    logged = to_config(config)
    asked = keys(spec(build("team", "fat")), "config")
    assert len(asked) > 5
    for key in asked:
        section, value, *path = key.split(".")
        assert value == "value"
        content = logged[section]
        for name in path:
            content = content[name]
        assert not isinstance(content, dict)
    assert logged.keys() >= {key.split(".")[0] for key in asked}


def dotted(nested: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of the metrics in metrics.json, as loggers receive them."""
    names: set[str] = set()
    for key, value in nested.items():
        inner = dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
        names |= inner
    return names


class Heard:
    """A logger that records the names of metrics."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def log_metrics(self, figures: dict[str, float], step: int) -> None:
        self.names |= figures.keys()


def test_every_figure_that_is_asked_for_is_logged(
    tiny: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = fat.prepare(tiny, images, QuantSpec(scheme="asymmetric"))
    fat.calibrate(student, images)
    figures = evaluate(student, [(images, torch.arange(16) % 10)])
    metrics = {
        "float": figures["float"],
        "calibrated": figures["quantized"],
        "trained": figures["quantized"],
        "accuracy_drop": figures["accuracy_drop"],
        "size_mb": size_mb(student),
    }
    content = spec(build("team", "fat"))
    asked = keys(content, "summary")
    assert {"accuracy_drop", "trained.agreement", "trained.sqnr_db", "size_mb.quantized"} < asked
    assert asked <= dotted(metrics)

    heard = Heard()
    trainer = type("Trainer", (), {"loggers": [heard], "global_step": 0, "is_global_zero": True})()
    monkeypatch.setattr("fat.training.callbacks.student_of", lambda module: module)
    AlphaHistory().on_validation_end(trainer, student)
    curves = [panel["config"] for panel in panels(content) if "Line" in panel["viewType"]]
    patterns = [config["metricRegex"] for config in curves if "metricRegex" in config]
    matched = [{name for name in heard.names if re.match(p, name)} for p in patterns]
    assert len(patterns) == 4
    assert {config["xAxis"] for config in curves} == {"trainer/global_step"}
    assert all(matched)
    assert sum(map(len, matched)) == len(set().union(*matched))  # no curve is in two panels
    plain = {name for config in curves for name in config["metrics"]}
    assert plain == {"train/loss", "val/loss", "train/lr"}
    module = (ROOT / "fat/training/module.py").read_text(encoding="utf-8")
    assert [name for name in plain if f'"{name}"' not in module] == []


def test_a_sweep_alone() -> None:
    name = "multirun/2025-01-31/12-00-00"
    content = spec(build("team", "fat", name))
    assert content["displayName"] == f"FAT: {name}"
    filters = content["spec"]["section"]["runSets"][0]["filters"]["filters"]
    assert [(f["key"]["section"], f["key"]["name"], f["op"], f["value"]) for f in filters] == [
        ("run", "group", "=", name),
        ("config", "sweep", "=", name),
        ("summary", "sweep", "=", name),
    ]
    assert [f.get("connector") for f in filters] == [None, "OR", "OR"]
    everything = spec(build("team", "fat"))
    assert everything["displayName"] == "FAT"
    assert everything["spec"]["section"]["runSets"][0]["filters"]["filters"] == []


@pytest.mark.parametrize("name", ["", "a'b", 'a"b', "a\\", "x' or 'y", "a\nb", "ä"])
def test_names_that_a_filter_cannot_hold(name: str) -> None:
    with pytest.raises(
        FatError, match=r"contains a character that filters do not support.*--sweep"
    ):
        build("team", "fat", name)


# ------------------------------------------------------------------------------- the command line


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["my-team/my.project_1", "--dry-run", "--sweep", "lr 3e-4"]) == 0
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert (content["entity"], content["project"]) == ("my-team", "my.project_1")
    assert content["displayName"] == "FAT: lr 3e-4"
    assert printed.err == ""


def test_dry_run_as_typed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fat.dashboard", "team/fat", "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert json.loads(done.stdout)["displayName"] == "FAT"


@pytest.mark.parametrize(
    "place", ["fat", "team/", "/fat", "a/b/c", "team/my fat", "https://wandb.ai/team/fat", ""]
)
def test_form_of_the_argument(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([place, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"Error: {place!r} is not a W&B project. Type ENTITY/PROJECT" in said.err


def test_not_logged_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["team/fat"]) == 2
    assert "You are not logged in to W&B. Type wandb login" in capsys.readouterr().err


def test_the_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main(["team/fat", "--dry-run"]) == 2
    assert (
        "wandb-workspaces is not installed: type pip install -e '.[dashboard]'."
        in capsys.readouterr().err
    )


def test_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request equals the output of --dry-run; the response determines the URL."""
    sent: list[Any] = []

    def upsert(view: Any) -> dict[str, Any]:
        sent.append(view)
        return {"upsertView": {"view": {"name": "nw-abc-v", "id": "1"}}}

    monkeypatch.setattr("wandb_workspaces.workspaces.internal.upsert_view2", upsert)
    monkeypatch.setattr("wandb.Api", lambda: None)
    monkeypatch.setattr(
        "wandb_workspaces.workspaces.interface.get_app_url", lambda _: "https://wandb.ai"
    )
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    workspace = build("team", "fat")
    assert save(workspace) == "https://wandb.ai/team/fat?nw=abc"
    (view,) = sent
    content = json.loads(view.model_dump_json(by_alias=True, exclude_none=True))
    assert content["spec"] == spec(workspace)["spec"]


def test_a_key_in_netrc_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 123\n")
    (tmp_path / ".netrc").chmod(0o600)
    with pytest.raises(FatError, match=r"could not be saved in team/fat: W&B was asked"):
        save(build("team", "fat"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")  # that key is not for it
    with pytest.raises(FatError, match="You are not logged in"):
        save(build("team", "fat"))


def test_the_page_lists_the_sections() -> None:
    page = (ROOT / "docs/sharing.md").read_text(encoding="utf-8")
    table = page.partition("| section |")[2]
    listed = re.findall(r"^\| ([\w ]+) \|", table, re.M)
    sections = spec(build("a", "b"))["spec"]["section"]["panelBankConfig"]["sections"]
    assert listed == [section["name"] for section in sections]
