"""The search: what it reads, what it tries, and that it goes on where it stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fat.utils.errors import FatError

pytest.importorskip("optuna", reason="optuna is not installed")

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from fat.experiment.config import DataConfig, ModelConfig, RunConfig
from fat.experiment.recipe_search import (
    _Trials,
    comparable,
    main,
    read_space,
    search,
    validation_loss,
)
from fat.training.config import TrainSpec
from tests.integration.running import ROOT

WORDS = ["quant.bits=4", "optim.lr=tag(log, interval(1e-4, 1e-2))", "optim.epochs=choice(1,2,3)"]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ("interval(0.5,2)", FloatDistribution(0.5, 2.0)),
        ("interval(1e-4,1e-2)", FloatDistribution(1e-4, 1e-2)),
        ("tag(log, interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("interval(1,8)", FloatDistribution(1, 8)),
        ("tag(log, int(interval(1,8)))", IntDistribution(1, 8, log=True)),
        ("int(interval(1.0,8.0))", IntDistribution(1, 8)),
        ("range(1,8)", IntDistribution(1, 7)),  # as Python's, without its end
        ("range(1,8,3)", IntDistribution(1, 7, step=3)),
        ("range(8,1,-3)", IntDistribution(2, 8, step=3)),
        ("range(0,1,0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("choice(0.5,1,2)", CategoricalDistribution(("0.5", "1", "2"))),
        ("0.5,1", CategoricalDistribution(("0.5", "1"))),
        ("null,true,'a b'", CategoricalDistribution(("null", "True", "'a b'"))),
        ("[0.5,1.0],[0,1]", CategoricalDistribution(("[0.5,1.0]", "[0,1]"))),
    ],
)
def test_values_in_hydras_grammar(values: str, wanted: BaseDistribution) -> None:
    space = read_space([f"optim.x={values}", "quant.bits=4"])
    assert space.free == {"optim.x": wanted}
    assert space.fixed == ("quant.bits=4",)


def test_overrides_of_a_trial_are_hydras_again() -> None:
    space = read_space(["quant.bits=4", "optim.lr=interval(1e-5,1e-3)", "+optim.x='a b',null"])
    assert space.overrides({"optim.lr": 1.25e-05, "+optim.x": "'a b'"}) == [
        "quant.bits=4",
        "optim.lr=1.25e-05",
        "+optim.x='a b'",
    ]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "There is nothing to search for"),
        (["quant.bits=4"], "There is nothing to search for"),
        (["optim.lr=interval(2"], "is not an override"),
        (["optim.lr=interval(2,1)"], "must be the larger one"),
        (["optim.lr=tag(log, interval(0,1))"], "must be above 0"),
        (["optim.lr=tag(log, range(1,5))"], "needs interval"),
        (["optim.lr=range(5,5)"], "is empty"),
        (["optim.lr=choice(1)"], "has one value"),
        (["optim=glob(*)"], "is not allowed in a search"),
        (["optim.lr=1,2", "optim.lr=3,4"], "given twice"),
        (["resume=somewhere", *WORDS], "--resume DIR"),
        (["hydra.sweep.dir=x", *WORDS], "--directory DIR"),
        (["model=resnet18,resnet50"], "could not be compared"),
        (["optim.loss=rmse,kl"], "could not be compared"),
        (["data.validation_images=10,20"], "could not be compared"),
        (["data.batch_size=8,16"], "could not be compared"),
        (["seed=1,2"], "could not be compared"),
    ],
)
def test_what_cannot_be_searched_is_answered_in_words(words: list[str], wanted: str) -> None:
    with pytest.raises(FatError, match=wanted):
        read_space(words)


def test_only_training_images_may_differ_between_trials() -> None:
    assert "data.train_images" in read_space(["data.train_images=10,20"]).free
    one = RunConfig(ModelConfig("a"), DataConfig("photos", train_images=1))
    two = RunConfig(ModelConfig("a"), DataConfig("photos", train_images=2))
    assert comparable(one) == comparable(two)
    other = replace(two, optim=TrainSpec(loss="kl"))
    assert comparable(one) != comparable(other)


class Bowl:
    """Lowest at lr = 1e-3 and 2 epochs; notes what it was asked."""

    def __init__(self, stop_at: int | None = None, fail_at: int | None = None) -> None:
        self.asked: list[tuple[int, tuple[str, ...], bool]] = []
        self.stop_at, self.fail_at = stop_at, fail_at

    def __call__(self, number: int, overrides: Sequence[str], going_on: bool) -> float:
        self.asked.append((number, tuple(overrides), going_on))
        if number == self.stop_at:
            raise KeyboardInterrupt
        if number == self.fail_at:
            return math.nan
        values = dict(word.split("=") for word in overrides)
        rate = math.log10(float(values["optim.lr"])) + 3
        return rate**2 + abs(int(values["optim.epochs"]) - 2)


def test_it_finds_the_bottom_and_gives_all_trials_the_fixed_options(tmp_path: Path) -> None:
    bowl = Bowl()
    study = search(read_space(WORDS), bowl, tmp_path, trials=30, seed=1)
    assert [number for number, *_ in bowl.asked] == list(range(30))
    assert all(overrides[0] == "quant.bits=4" for _, overrides, _ in bowl.asked)
    assert study.best_params["optim.epochs"] == "2"
    assert study.best_value < 0.02  # the rate within a factor of 1.4
    assert len({overrides for _, overrides, _ in bowl.asked}) == 30


def test_the_seed_decides(tmp_path: Path) -> None:
    asked = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        bowl = Bowl()
        search(read_space(WORDS), bowl, tmp_path / name, trials=12, seed=seed)
        asked.append(bowl.asked)
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]


@pytest.mark.parametrize("stop", [0, 4, 13])
def test_a_search_that_was_cut_off_tries_what_it_would_have_tried(
    tmp_path: Path, stop: int
) -> None:
    whole = Bowl()
    search(read_space(WORDS), whole, tmp_path / "whole", trials=15, seed=5)
    cut = Bowl(stop_at=stop)
    with pytest.raises(KeyboardInterrupt):
        search(read_space(WORDS), cut, tmp_path / "cut", trials=15, seed=5)
    rest = Bowl()
    study = search(read_space(WORDS), rest, tmp_path / "cut", trials=15, seed=5)
    assert rest.asked[0] == (*cut.asked[-1][:2], True)  # the same trial, which goes on
    assert [a[:2] for a in cut.asked[:-1] + rest.asked] == [a[:2] for a in whole.asked]
    assert len(study.trials) == 15


def test_a_failed_trial_counts_and_is_never_the_best(tmp_path: Path) -> None:
    bowl = Bowl(fail_at=0)
    study = search(read_space(WORDS), bowl, tmp_path, trials=3)
    assert len(bowl.asked) == 3
    assert study.best_trial.number > 0
    again = Bowl()
    search(read_space(WORDS), again, tmp_path, trials=3)
    assert again.asked == []
    search(read_space(WORDS), again, tmp_path, trials=5)
    assert [number for number, *_ in again.asked] == [3, 4]


def test_a_value_that_is_not_allowed_fails_its_trial_alone(tmp_path: Path) -> None:
    trials = _Trials([ROOT / "conf"], tmp_path)
    assert math.isnan(trials(0, ["quant.bits=9"], False))
    (failure,) = tmp_path.glob("0-*/failure.json")
    assert "quant.bits is 9; allowed are" in failure.read_text()
    with pytest.raises(FatError, match=r"Unknown choice init=mze\. Did you mean 'mse'"):
        trials(1, ["init=mze"], False)


def test_the_objective_is_the_validation_loss_and_no_test_figure() -> None:
    metrics = {"training": {"best_loss": 0.25}, "accuracy_drop": 3.0, "trained": {"top1": 1.0}}
    assert validation_loss(metrics) == 0.25
    with pytest.raises(FatError, match="without training"):
        validation_loss({"training": None, "accuracy_drop": 3.0})


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["optim.lr=1,2", "--conf", "nowhere"], "nowhere/train.yaml"),
        (["optim.lr=1,2", "quant.bitz=3"], "Did you mean 'quant.bits'"),
        (["optim.lr=1,2", "--trials", "0"], "1 or more"),
        (["--resume", "nowhere"], "not the directory of a search"),
    ],
)
def test_the_command_answers_in_words(
    arguments: list[str],
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    place = [] if "--resume" in arguments else ["--directory", str(tmp_path / "here")]
    assert main([*arguments, *place]) == 2
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "here").exists()


def test_a_search_is_not_begun_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    notes = {"words": WORDS, "seed": 0, "trials": 3}
    (tmp_path / "search.json").write_text(json.dumps(notes))
    assert main([*WORDS, "--directory", str(tmp_path)]) == 2
    assert f"--resume {tmp_path}" in capsys.readouterr().err
    assert main(["optim.lr=1,2", "--resume", str(tmp_path)]) == 2
    assert "uses the options of the search itself" in capsys.readouterr().err
