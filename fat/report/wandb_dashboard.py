"""A saved W&B workspace that compares a project's runs: ``python -m fat.dashboard ENTITY/PROJECT``.

:func:`build` makes it without a network; :func:`save` sends it to W&B.
"""

from __future__ import annotations

import argparse
import json
import netrc
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from fat.utils.commands import command_line
from fat.utils.errors import FatError, first_line

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

__all__ = ["build", "main", "save", "spec"]

PLACE = re.compile(r"([\w.-]+)/([\w.-]+)", re.ASCII)
# The library writes names into an expression between quotes and escapes nothing.
SWEEP = re.compile(r"[\w./: +-]+", re.ASCII)
RUNS = 100
"""How many runs a chart shows."""
COLUMNS = (
    "config:model.value.name",
    "config:quant.value.bits",
    "config:quant.value.granularity",
    "summary:float.top1",
    "summary:trained.top1",
    "summary:accuracy_drop",
    "summary:trained.agreement",
    "summary:trained.sqnr_db",
    "summary:size_mb.quantized",
)
"""What the table of runs shows first."""


def build(entity: str, project: str, sweep: str | None = None) -> Workspace:
    """The workspace: accuracy lost, first thresholds, agreement and SQNR, training, thresholds.

    Nothing is sent anywhere. The ids of its panels are drawn at random, all else follows from the
    arguments.

    Args:
        entity: W&B user or team.
        project: W&B project, ``logger.project`` of the runs.
        sweep: Show the runs of this sweep alone: what the runs' group is called, or the value of
            the key ``sweep`` in their config or summary.

    Raises:
        FatError: If wandb-workspaces is not installed, or the sweep's name holds a character that
            a filter cannot.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise FatError(
            "The dashboard needs wandb-workspaces: pip install 'wandb-workspaces>=0.4.13,<0.5'."
        ) from error
    return ws.Workspace(
        entity=entity,
        project=project,
        name="FAT" if sweep is None else f"FAT: {sweep}",
        sections=[
            ws.Section(
                name=name,
                panels=panels,
                is_open=True,
                layout_settings=ws.SectionLayoutSettings(columns=columns, rows=rows),
            )
            for name, panels, columns, rows in _sections()
        ],
        settings=ws.WorkspaceSettings(max_runs=RUNS),
        runset_settings=ws.RunsetSettings(
            filters="" if sweep is None else _of_sweep(sweep), pinned_columns=list(COLUMNS)
        ),
    )


def spec(workspace: Workspace) -> dict[str, Any]:
    """What W&B is sent, as plain values."""
    # Through JSON: that is how it is sent, and what the library itself reads back.
    text = workspace._to_model().model_dump_json(by_alias=True, exclude_none=True)
    content: dict[str, Any] = json.loads(text)
    return content


def save(workspace: Workspace) -> str:
    """Save a workspace as a new view of its project, and return its address.

    Raises:
        FatError: If nobody is logged in, W&B cannot be reached, or it refuses.
    """
    if not _has_key():
        raise FatError(
            "Nobody is logged in to W&B. Type wandb login, or set WANDB_API_KEY. --dry-run prints "
            "the workspace without an account."
        )
    try:
        workspace.save()
        return str(workspace.url)
    # Whatever fails on the way (no route, a refusal, no such project) is the user's to mend.
    except Exception as error:
        raise FatError(
            f"The workspace could not be saved in {workspace.entity}/{workspace.project}: "
            f"{first_line(error)} Check the names and your key; --dry-run prints the workspace "
            "without a network."
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status.

    Args:
        arguments: What follows the command's name; ``None`` takes the process's own.
    """
    parser = argparse.ArgumentParser(
        prog=command_line("dashboard"),
        description="Save a W&B workspace that compares the runs of a project.",
    )
    parser.add_argument("place", metavar="ENTITY/PROJECT", help="user or team, and project")
    parser.add_argument("--sweep", metavar="NAME", help="show the runs of this sweep alone")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the workspace as JSON and send nothing"
    )
    given = parser.parse_args(arguments)
    try:
        workspace = build(*_place(given.place), sweep=given.sweep)
        if given.dry_run:
            print(json.dumps(spec(workspace), indent=2, ensure_ascii=False))
        else:
            print(save(workspace))
    except FatError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


def _place(text: str) -> tuple[str, str]:
    found = PLACE.fullmatch(text)
    if found is None:
        raise FatError(
            f"{text!r} is no project of W&B. Type ENTITY/PROJECT, your user or team and the "
            "project, such as my-team/fat; logger.project of a run is fat by default."
        )
    return found[1], found[2]


def _of_sweep(sweep: str) -> str:
    if not SWEEP.fullmatch(sweep):
        raise FatError(
            f"The sweep {sweep!r} holds a character that a filter cannot. Allowed are letters, "
            "digits, spaces and . / : _ + -, as in --sweep multirun/2025-01-31/12-00-00."
        )
    keys = ("Metric('Group')", "Config('sweep')", "SummaryMetric('sweep')")
    return " or ".join(f"{key} == '{sweep}'" for key in keys)


def _has_key() -> bool:
    """Whether W&B would find a key, without it asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


# ------------------------------------------------------------------------------------- the panels


def _sections() -> list[tuple[str, list[Any], int, int]]:
    """(name, panels, columns, rows) of each section."""
    import wandb_workspaces.reports.v2 as wr

    config, summary = wr.Config, wr.SummaryMetric
    drop, points = "accuracy_drop", "points of top-1 lost"

    def bars(title: str, metrics: Sequence[str], by: str, unit: str) -> Any:
        return wr.BarPlot(
            title=title,
            metrics=list(metrics),
            groupby=config(by),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            title_x=unit,
            max_runs_to_show=RUNS,
            max_bars_to_show=RUNS,
        )

    def scatter(title: str, x: str, y: str) -> Any:
        return wr.ScatterPlot(
            title=title,
            x=summary(x),
            y=summary(y),
            z=config("quant.bits"),
            legend_template="${run:displayName}",
        )

    # W&B's own step counts calls of the logger; this is what Lightning logs beside every figure.
    steps: Any = {"x": "trainer/global_step", "title_x": "optimizer steps"}

    def lines(title: str, metrics: Sequence[str], *, log: bool = False) -> Any:
        return wr.LinePlot(title=title, y=list(metrics), log_y=log, max_runs_to_show=RUNS, **steps)

    def factors(title: str, pattern: str) -> Any:
        # Each quantizer's mean, smallest and largest factor. Distributions are no lines.
        return wr.LinePlot(title=title, metric_regex=pattern, max_runs_to_show=RUNS, **steps)

    def parallel(title: str, *columns: Any) -> Any:
        return wr.ParallelCoordinatesPlot(
            title=title, columns=[wr.ParallelCoordinatesPlotColumn(column) for column in columns]
        )

    lost = [
        bars("Accuracy lost, by network", [drop], "model.name", points),
        bars("Accuracy lost, by bits", [drop], "quant.bits", points),
        bars(
            "Accuracy lost, by thresholds per filter or tensor", [drop], "quant.granularity", points
        ),
        scatter("Accuracy lost against size", "size_mb.quantized", drop),
        parallel(
            "Network, bits, size and what is lost",
            config("model.name"),
            config("quant.bits"),
            config("quant.granularity"),
            config("quant.scheme"),
            summary("size_mb.quantized"),
            summary(drop),
            summary("trained.agreement"),
            summary("trained.sqnr_db"),
        ),
        bars(
            "Top-1: float, calibrated, trained",
            ["float.top1", "calibrated.top1", "trained.top1"],
            "model.name",
            "%",
        ),
    ]
    inits = [
        bars(
            "Agreement after calibration, by init of activations",
            ["calibrated.agreement"],
            "init.activation.name",
            "%",
        ),
        bars(
            "Agreement after calibration, by init of weights",
            ["calibrated.agreement"],
            "init.weight.name",
            "%",
        ),
        bars(
            "Accuracy lost after training, by init of activations",
            [drop],
            "init.activation.name",
            points,
        ),
        bars(
            "SQNR before and after training, by init of activations",
            ["calibrated.sqnr_db", "trained.sqnr_db"],
            "init.activation.name",
            "dB",
        ),
        parallel(
            "Init strategies and what comes of them",
            config("init.weight.name"),
            config("init.activation.name"),
            config("quant.bits"),
            summary("calibrated.agreement"),
            summary("trained.agreement"),
            summary(drop),
        ),
        wr.ParameterImportancePlot(with_respect_to="trained.sqnr_db"),
    ]
    closeness = [
        bars(
            "Agreement with the float network",
            ["calibrated.agreement", "trained.agreement"],
            "model.name",
            "%",
        ),
        bars("SQNR of the logits", ["calibrated.sqnr_db", "trained.sqnr_db"], "model.name", "dB"),
        scatter("SQNR before and after training", "calibrated.sqnr_db", "trained.sqnr_db"),
        scatter("Agreement against size", "size_mb.quantized", "trained.agreement"),
    ]
    training = [
        lines("Training loss", ["train/loss"], log=True),
        lines("Validation loss", ["val/loss"], log=True),
        lines("Learning rate", ["train/lr"]),
    ]
    thresholds = [
        factors("α of activations", r"^alpha/.*\.activation$"),
        factors("α of weights, mean over the filters", r"^alpha/.*\.weight$"),
        factors("α of weights, smallest", r"^alpha/.*\.weight\.min$"),
        factors("Shift of the lower threshold", r"^shift/.*\.activation$"),
    ]
    return [
        ("Accuracy lost", lost, 3, 2),
        ("First thresholds", inits, 3, 2),
        ("Agreement and SQNR", closeness, 2, 2),
        ("Training", training, 3, 1),
        ("Thresholds", thresholds, 2, 2),
        ("Options that differ", [wr.RunComparer(diff_only="split")], 1, 1),
    ]


if __name__ == "__main__":
    sys.exit(main())
