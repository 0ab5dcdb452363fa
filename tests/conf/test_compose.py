"""Every file of conf/ composes, fits the schema, and gives valid specs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fat.experiment.config import (
    EvaluateConfig,
    RunConfig,
    option_table,
    parse,
    parse_run,
    suggest_key,
    to_config,
)
from fat.quant.config import InitSpec, QuantSpec
from fat.quant.range_estimators import STRATEGIES
from fat.training.config import TrainSpec
from fat.training.loggers import LOGGERS
from fat.utils.errors import FatError

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
CHOICES = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("hydra",) and path.stem != "of_run"
)


def composed(*overrides: str, name: str = "train") -> RunConfig:
    schema = RunConfig if name == "train" else EvaluateConfig
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse(schema, compose(name, overrides=list(overrides)))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_into_valid_specs(choice: str) -> None:
    needs_root = choice in ("data=folder", "data=imagenet", "sweep=paper")
    extra = ["data.root=/somewhere"] if needs_root else []
    config = composed(choice, *extra)
    assert config.quant.bits in range(2, 9)
    assert config.optim.lr > 0


def test_defaults_of_conf_are_those_of_the_library() -> None:
    """A library user and a command-line user get the same network."""
    config = composed()
    spec = config.quant
    assert spec == QuantSpec()
    assert config.optim == TrainSpec()


@pytest.mark.parametrize("choice", [c for c in CHOICES if c.startswith("model=")])
def test_every_model_is_one_timm_knows(choice: str) -> None:
    import timm

    assert timm.is_model(composed(choice).model.name)


def test_bits_are_set_together_and_apart() -> None:
    spec = composed("quant.bits=4", "quant.activation.bits=8", "quant.first.bits=8").quant
    assert (spec.for_weights, spec.for_activations, spec.first_bits) == (4, 8, 8)


def test_paper_presets_train_thresholds_alone() -> None:
    for name in ("paper_vector", "paper_scalar", "authors_code"):
        config = composed(f"experiment={name}")
        spec = config.quant
        assert (spec.thresholds, spec.weights, spec.bias) == ("fat", "frozen", "frozen")
        assert not config.optim.bias_correction
    assert composed("experiment=authors_code").quant.alpha_range == (0.5, 1.3)
    assert composed("experiment=calibration_only").optim.epochs == 0


def test_every_logger_has_a_file() -> None:
    assert {path.stem for path in (CONF / "logger").glob("*.yaml")} == set(LOGGERS)


@pytest.mark.parametrize("name", tuple(STRATEGIES))
def test_every_init_strategy_has_a_file(name: str) -> None:
    spec = composed(f"init={name}").quant
    assert spec.activation_init == InitSpec(name)  # type: ignore[arg-type]
    assert spec.weight_init.name in (name, "minmax")


def test_options_of_a_strategy_come_through() -> None:
    spec = composed("init=lp", "init.weight.exponent=3", "init.activation.candidates=50")
    assert spec.quant.weight_init == InitSpec("lp", exponent=3.0)
    assert spec.quant.activation_init == InitSpec("lp", candidates=50)


def test_evaluate_composes() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert parse(EvaluateConfig, compose("evaluate", overrides=["run=x"])).run == "x"


def test_every_line_of_the_defaults_lists_is_commented() -> None:
    for name in ("train", "evaluate"):
        lines = (CONF / f"{name}.yaml").read_text().splitlines()
        start = lines.index("defaults:")
        for line in lines[start + 1 :]:
            if not line.startswith("  - "):
                break
            assert "#" in line or "_self_" in line, line


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("quant.bitz", "quant.bits"),
        ("bits", "quant.bits"),
        ("quant.wieght.bits", "quant.weight.bits"),
        ("data.batchsize", "data.batch_size"),
    ],
)
def test_a_mistyped_key_is_answered_with_the_nearest(given: str, wanted: str) -> None:
    assert wanted in suggest_key(given, RunConfig)


def test_a_value_of_another_type_is_refused_with_its_key() -> None:
    with pytest.raises(FatError, match=r"optim.epochs"):
        composed("optim.epochs=many")


def test_a_key_that_is_added_is_refused_too() -> None:
    with pytest.raises(FatError, match=r"quant.depth"):
        composed("+quant.depth=3")


def test_run_config_survives_a_round_trip_through_yaml() -> None:
    config = composed("quant.bits=5")
    stored = yaml.safe_load(yaml.safe_dump(to_config(config)))
    assert parse(RunConfig, OmegaConf.create(stored)) == config
    assert parse_run(stored) == config
    assert {entry.key.partition(".")[0] for entry in option_table(RunConfig)} == set(stored)


def test_mixed_bits_need_a_measurement_and_a_budget() -> None:
    assert composed("quant.mixed=outputs/x", "quant.budget_mb=2").quant == QuantSpec()
    for alone in ("quant.mixed=outputs/x", "quant.budget_mb=2"):
        with pytest.raises(FatError, match=r"type quant\.mixed=DIR.*quant\.budget_mb=MB"):
            composed(alone)
    with pytest.raises(FatError, match=r"quant\.weight\.bits=4 has no effect"):
        composed("quant.mixed=x", "quant.budget_mb=2", "quant.weight.bits=4")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "sweep").glob("*.yaml")))
def test_every_job_of_every_sweep_composes(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = compose("train", overrides=[f"sweep={name}"], return_hydra_config=True)
    params = OmegaConf.to_container(whole.hydra.sweeper.params)
    assert isinstance(params, dict)
    choices = [[f"{key}={value}" for value in str(v).split(",")] for key, v in params.items()]
    jobs = list(itertools.product(*choices))
    assert len(jobs) > 1
    for job in jobs:
        given = ["data.root=/somewhere"] if name == "paper" else []
        config = composed(f"sweep={name}", *job, *given)
        assert config.quant.bits in range(2, 9)
        assert config.optim.trains


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["seed=-1"], "seed is -1; allowed are whole numbers from 0 to 4294967295, as in seed=0"),
        (
            ["data.workers=1000000000"],
            "data.workers is 1000000000; allowed are whole numbers from 0 to 1024",
        ),
        (
            ["data.image_size=1000000"],
            "data.image_size is 1000000; allowed are whole numbers from 1 to 8192",
        ),
        (["data.flip=nan"], "data.flip is nan; allowed are numbers from 0 to 1"),
        (
            ["data.crop_scale=[0.5]"],
            r"data.crop_scale is \[0.5\]; allowed are two numbers above 0 and up to 1, the lower",
        ),
        (["data.crop_scale=${oc.env:HOME}"], "data.crop_scale is '/.*'; allowed are two numbers"),
        (["data.batch_size=???"], "data.batch_size: Missing mandatory value"),
        (
            ["model.num_classes=0"],
            "model.num_classes is 0; allowed are whole numbers from 1 to 1000000, or null",
        ),
        (["trainer.devices=0"], "trainer.devices is 0; allowed are whole numbers from 1 to 1024"),
        (["trainer.threads=-1"], "trainer.threads is -1"),
        (["trainer.checkpoint_every=nan"], "allowed are numbers from 0, or inf, as in"),
        (["trainer.precision=32"], "Unknown trainer.precision '32'. Allowed: 32-true"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_begins(
    words: list[str], wanted: str
) -> None:
    with pytest.raises(FatError, match=wanted):
        composed(*words)


def test_what_belongs_to_an_artifact_is_refused_beside_a_run() -> None:
    with pytest.raises(FatError, match=r"model\.name=resnet18 has no effect without artifact=FILE"):
        composed("run=x", "model.name=resnet18", name="evaluate")
    assert composed("artifact=x", "model.name=resnet18", name="evaluate")
    network = composed("artifact=x", "model=mobilenet_v2", name="evaluate").model
    assert network.name == "mobilenetv2_100"
