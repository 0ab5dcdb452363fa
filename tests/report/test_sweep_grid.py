"""Differing options, layout of heat maps, and Pareto fronts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fat.report.records import Run, read_sweep
from fat.report.sweep_grid import (
    choose_measure,
    final_loss,
    labels_of,
    loss,
    panels,
    pareto_front,
    varied_options,
)
from tests.report.fake_runs import config, metrics


def run(
    told: dict[str, Any] | None = None,
    typed: tuple[str, ...] = (),
    asked: dict[str, Any] | None = None,
    status: str = "finished",
) -> Run:
    told = told or {}
    return Run(Path("x"), "x", status, told, None, asked or {}, typed)


numbers = st.one_of(st.integers(0, 5).map(float), st.floats(-1e6, 1e6))


@given(st.lists(st.tuples(numbers, numbers), max_size=30))
def test_the_front_is_what_no_other_point_beats(points: list[tuple[float, float]]) -> None:
    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in points)

    front = pareto_front(points)
    assert sorted(front) == [i for i, point in enumerate(points) if not beaten(point)]
    assert [points[i] for i in front] == sorted(points[i] for i in front)


def test_what_is_lost() -> None:
    one = run(metrics(drops=(4.0, 1.0)))
    assert loss(one, "calibrated", "accuracy") == pytest.approx(4.0)
    assert loss(one, "trained", "accuracy") == pytest.approx(1.0)
    assert loss(one, "trained", "agreement") == pytest.approx(1.5)
    assert final_loss(one, "accuracy") == pytest.approx(1.0)
    assert loss(run(), "trained", "agreement") is None


def test_a_run_that_was_stopped_has_no_final_loss() -> None:
    told = metrics(drops=(4.0, None))
    assert final_loss(run(told), "accuracy") == pytest.approx(4.0)  # nothing was to be trained
    assert final_loss(run(told, status="unfinished"), "accuracy") is None
    trained = metrics(status="trained")  # its export failed
    assert final_loss(run(trained, status="failed"), "accuracy") == pytest.approx(1.0)


def test_accuracy_only_where_all_have_labels() -> None:
    labelled, other = run(metrics()), run(metrics(labelled=False))
    assert choose_measure([labelled, run()]) == "accuracy"
    assert choose_measure([labelled, other]) == "agreement"
    assert choose_measure([]) == "agreement"


def test_what_was_typed_names_the_options() -> None:
    a = run(config(metrics()), ("model=a", "quant.bits=8", "data=photos", "logger=csv"))
    b = run(config(metrics()), ("model=a", "quant.bits=4", "+data=photos", "logger=wandb"))
    assert varied_options([a, b]) == {"quant.bits": ["8", "4"]}


def test_loose_runs_are_told_apart_by_their_configurations() -> None:
    a = run(asked=config(metrics(bits=(8, 8))), typed=("quant.bits=8",))
    b = run(asked=config(metrics(bits=(4, 8), granularity="per_tensor")))
    failed = run(typed=("quant.bits=6", "model=x"), status="failed")
    assert varied_options([a, b, failed]) == {
        "quant.bits": ["8", "4", "6"],
        "quant.granularity": ["per_channel", "per_tensor", ""],
    }
    assert varied_options([failed, run(typed=("model=y",))]) == {"model": ["x", "y"]}


def test_names_of_runs() -> None:
    told = metrics(model="tf_efficientnet_lite0", bits=(4, 8), init="mse")
    by_config, by_metrics = run(asked=config(told)), run(told)
    for label in labels_of([by_config, by_metrics]):
        assert (label.network, label.bits, label.init) == ("tf_efficientnet_lite0", "W4A8", "mse")
    # Mixed bits: what came of them, not what was asked for.
    mixed = config(told) | {}
    mixed["quant"] = mixed["quant"] | {"mixed": "DIR"}
    told = told | {"bits": {"weight": 3.4567, "activation": 8}}
    assert labels_of([run(told, asked=mixed)])[0].bits == "W3.46A8"
    other = told | {"init": {"weight": "minmax", "activation": "percentile"}}
    assert labels_of([run(other)])[0].init == "minmax / percentile"
    assert labels_of([run()])[0].bits == ""


def test_a_job_that_never_started_has_the_name_of_those_that_did() -> None:
    told = metrics(model="tf_efficientnet_lite0")
    done = run(told, ("model=lite0", "init=mse", "quant.bits=8"), config(told))
    waiting = run(typed=("model=lite0", "init=percentile", "quant.bits=4"), status="not started")
    first, second = labels_of([done, waiting])
    assert (first.network, second.network) == ("lite0", "lite0")
    assert (second.bits, second.init) == ("W4A4", "percentile")


def test_a_panel_for_each_init_and_further_option(sweep_directory: Path) -> None:
    runs = read_sweep(sweep_directory).runs
    varied = varied_options(runs)
    assert list(varied) == ["model", "quant.bits", "init", "quant.granularity"]
    laid, along = panels(runs, varied, "accuracy")
    assert along == []
    assert [(panel.init, dict(panel.options)) for panel in laid] == [
        ("mse", {"quant.granularity": "per_channel"}),
        ("mse", {"quant.granularity": "per_tensor"}),
        ("percentile", {"quant.granularity": "per_channel"}),
        ("percentile", {"quant.granularity": "per_tensor"}),
    ]
    for panel in laid:
        assert panel.networks == ("mobilenet_v2", "mnasnet_100", "efficientnet_lite0")
        assert panel.bits == ("W8A8", "W6A6", "W4A4")
        assert len(panel.cells) == 9
    cell = laid[0].cells["mobilenet_v2", "W6A6"]
    assert [runs[i].name for i in cell.runs] == ["4-mobilenet_v2"]
    # place 4: bad = 4 + 1 + 4 % 3, drops 0.4 + 2.6 bad and -0.2 + 0.45 bad
    assert cell.mean("calibrated") == pytest.approx(0.4 + 2.6 * 6)
    assert cell.mean("trained") == pytest.approx(-0.2 + 0.45 * 6)
    assert laid[3].cells["mobilenet_v2", "W6A6"].mean("trained") is None  # it failed


def test_options_that_go_along_need_no_panel() -> None:
    runs = [
        run(
            metrics(model=model, granularity=granularity),
            asked=config(metrics(model=model, granularity=granularity)),
        )
        for model, granularity in (("a", "per_channel"), ("b", "per_tensor"))
    ]
    laid, along = panels(runs, varied_options(runs), "accuracy")
    assert len(laid) == 1
    assert along == ["quant.granularity"]


def test_seeds_share_a_cell() -> None:
    told = [metrics(drops=(4.0, drop), seed=seed) for seed, drop in enumerate((1.0, 2.0, 4.5))]
    runs = [run(one, asked=config(one)) for one in told]
    runs.append(run(asked=config(metrics(seed=3)), status="failed"))
    laid, _ = panels(runs, varied_options(runs), "accuracy")
    (cell,) = laid[0].cells.values()
    assert cell.runs == (0, 1, 2, 3)
    assert cell.mean("trained") == pytest.approx(2.5)


def test_wide_bits_come_first_and_unknown_bits_have_no_cell() -> None:
    told = [metrics(bits=bits) for bits in ((4, 4), (8, 8), (4, 8), (3.5, 8))]
    runs = [run(one) for one in told] + [run(typed=("experiment=x",), status="not started")]
    ((panel,), _) = panels(runs, varied_options(runs), "accuracy")
    assert panel.bits == ("W8A8", "W4A8", "W4A4", "W3.5A8")
