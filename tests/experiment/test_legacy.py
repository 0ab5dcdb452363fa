"""Files and imports of version 0.1 (tests/legacy, see its README.md) in today's version."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import inspect
import json
import pickle
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

import fat
from fat.evaluation.bit_allocation import choose_bits
from fat.evaluation.sensitivity_file import read_sensitivity
from fat.experiment.config import (
    EvaluateConfig,
    RunConfig,
    current_overrides,
    option_table,
    parse,
    to_config,
)
from fat.experiment.evaluate import evaluate_artifact, evaluate_run
from fat.experiment.machine import resolve
from fat.experiment.run_directory import begin, read_config
from fat.experiment.runner import run
from fat.models.calibration import calibrate
from fat.models.student import Student
from fat.quant.config import Grid, InitSpec, QuantSpec
from fat.report.records import RENAMED_OPTIONS, RENAMED_VALUES
from fat.report.sweep_page import write_sweep
from fat.training.config import TrainSpec
from fat.utils.nested import leaves

ROOT = Path(__file__).parents[2]
LEGACY = ROOT / "tests" / "legacy"
INTERRUPTED = ("interrupted", "interrupted_pointwise", "interrupted_reconstruction")
NAMES = {
    "quant.pointwise_range": "quant.weight_scale_range",
    "quant.rounding_range": "quant.adaround_range",
    "optim.pointwise_lr": "optim.weight_scale_lr",
    "optim.rounding_lr": "optim.adaround_lr",
    "optim.reconstruction.float_share": "optim.reconstruction.float_fraction",
    "artefact": "artifact",
}
VALUES = {
    "quant.granularity": {"vector": "per_channel", "scalar": "per_tensor"},
    "quant.weights": {"pointwise": "scale", "rounding": "adaround"},
}


@pytest.fixture(scope="module", autouse=True)
def network() -> Iterator[None]:
    """The network of the runs, registered with timm."""
    spec = importlib.util.spec_from_file_location("with_network", LEGACY / "with_network.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["with_network"] = module
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    del sys.modules["with_network"]


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(LEGACY / name, folder / name))


def composed(*overrides: str, name: str = "evaluate") -> Any:
    schema: Any = RunConfig if name == "train" else EvaluateConfig
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(schema, compose(name, overrides=current_overrides(overrides, schema)))


def today(values: dict[str, Any]) -> dict[str, Any]:
    """Options of version 0.1 with today's names of keys and values."""
    return {
        NAMES.get(key, key): VALUES.get(key, {}).get(value, value) if key in VALUES else value
        for key, value in leaves(values).items()
    }


def stored(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((LEGACY / name / "config.yaml").read_text())
    return found


IMPORTS = [
    line for line in (LEGACY / "imports.txt").read_text().splitlines() if line.startswith("fat")
]


@pytest.mark.parametrize("module", sorted({line.partition(":")[0] for line in IMPORTS}))
def test_every_public_name_is_imported(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = importlib.import_module(module)
    names = [line.partition(":")[2] for line in IMPORTS if line.startswith(f"{module}:")]
    assert [name for name in names if not hasattr(found, name)] == []


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_composed_options_are_the_same(name: str) -> None:
    earlier = yaml.safe_load((LEGACY / "config_keys.yaml").read_text())[name]
    schema: Any = RunConfig if name == "train" else EvaluateConfig
    # Then, a run was on the CPU unless told otherwise; these were the values for it.
    then = {"trainer.accelerator": "cpu", "trainer.precision": "32-true", "data.batch_size": 16}
    assert then.items() <= today(earlier).items()
    as_then = composed(*(f"{key}={value}" for key, value in then.items()), name=name)
    ours = leaves(to_config(as_then))
    assert today(earlier).items() <= ours.items()
    # Options that the composed config did not hold had the same defaults.
    defaults = {entry.key: entry.default for entry in option_table(schema)}
    for key in ours.keys() - today(earlier).keys():
        default = defaults[key]
        assert ours[key] == (list(default) if isinstance(default, tuple) else default)
    assert to_config(parse(schema, OmegaConf.create(earlier))) == to_config(as_then)
    now = leaves(to_config(composed(name=name)))
    assert {key for key in ours if now[key] != ours[key]} == then.keys()
    everything = replace(as_then, data=replace(as_then.data, workers=2))
    assert to_config(resolve(everything)) == to_config(everything)


@pytest.mark.parametrize("name", ["run", *INTERRUPTED])
def test_options_of_a_run_are_read(name: str) -> None:
    assert today(stored(name)).items() <= leaves(to_config(read_config(LEGACY / name))).items()


@pytest.mark.parametrize("earlier", NAMES)
def test_an_earlier_key_is_replaced_on_the_command_line(earlier: str) -> None:
    schema = EvaluateConfig if earlier == "artefact" else RunConfig
    for sign in ("", "+", "++", "~"):
        words = current_overrides([f"{sign}{earlier}=1,2"], schema)
        # What only a + could set stands in conf/ now.
        assert words == [f"{'++' if sign == '+' else sign}{NAMES[earlier]}=1,2"]


@pytest.mark.parametrize("key", VALUES)
def test_an_earlier_value_is_replaced_on_the_command_line(key: str) -> None:
    (first, second), names = VALUES[key], VALUES[key]
    for shape in ("{}", "{},{}", "choice({},{})", "'{}'", "[{}, {}]"):
        word = f"{key}={shape.format(first, second)}"
        wanted = f"{key}={shape.format(names[first], names[second])}"
        assert current_overrides(["-m", word, f"name={first}"], RunConfig) == [
            "-m",
            wanted,
            f"name={first}",
        ]


def test_specs_take_earlier_names() -> None:
    assert QuantSpec(rounding_range=(-2.0, 2.0)) == QuantSpec(  # type: ignore[call-arg]
        adaround_range=(-2.0, 2.0)
    )
    quant = QuantSpec.from_dict({"granularity": "scalar", "pointwise_range": [0.5, 2.0]})
    assert quant == QuantSpec(granularity="per_tensor", weight_scale_range=(0.5, 2.0))
    recipe = TrainSpec.from_dict({"rounding_lr": 0.5, "reconstruction": {"float_share": 0.25}})
    assert (recipe.adaround_lr, recipe.reconstruction.float_fraction) == (0.5, 0.25)


def test_reports_know_the_same_earlier_names() -> None:
    earlier = {
        f"{entry.key.rpartition('.')[0]}.{name}": entry.key
        for entry in option_table(RunConfig)
        for name in entry.rule.earlier
    }
    assert earlier == RENAMED_OPTIONS | {"data.scale": "data.crop_scale"}
    for entry in option_table(RunConfig):
        if entry.rule.renamed:
            assert RENAMED_VALUES[entry.key] == entry.rule.renamed


def test_a_student_of_the_same_file_gives_the_same_logits() -> None:
    images = torch.from_numpy(np.load(LEGACY / "students" / "images.npy"))
    expected = json.loads((LEGACY / "students" / "expected.json").read_text())
    assert set(expected) == {path.stem for path in (LEGACY / "students").glob("*.safetensors")}
    for name, wanted in expected.items():
        student = fat.load(LEGACY / "students" / f"{name}.safetensors").eval()
        assert student.spec == QuantSpec.from_dict(wanted["spec"])
        assert {key: student.origin[key] for key in wanted["origin"]} == wanted["origin"]
        with torch.no_grad():
            for network, key in ((student, "logits"), (student.teacher, "float_logits")):
                logits = torch.tensor(wanted[key])
                torch.testing.assert_close(network(images), logits, rtol=1e-5, atol=1e-6)


def test_a_finished_run_is_evaluated() -> None:
    words = (f"run={LEGACY / 'run'}", "trainer.threads=1", "trainer.progress=false")
    wanted = json.loads((LEGACY / "run" / "metrics.json").read_text())["trained"]
    figures = evaluate_run(composed(*words))["quantized"]
    assert {key: figures[key] for key in wanted} == pytest.approx(wanted, nan_ok=True)


def test_an_exported_file_is_evaluated() -> None:
    wanted = json.loads((LEGACY / "artefact" / "metrics.json").read_text())["exported"]["onnx"]
    words = (f"artefact={LEGACY / 'artefact' / 'student.onnx'}", f"run={LEGACY / 'run'}")
    figures = evaluate_artifact(composed(*words, "trainer.threads=1", "trainer.progress=false"))
    for key in ("agreement", "sqnr_db", "rmse"):
        assert figures["quantized"][key] == pytest.approx(wanted["quantized"][key], rel=1e-3)


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupted_run_is_resumed(name: str, tmp_path: Path) -> None:
    directory = copied(name, tmp_path)
    config = read_config(directory)
    begin(directory, config, resume=True)  # its options are unchanged
    run(config, directory, resume=True)
    found = load_file(directory / "student.safetensors")
    wanted = load_file(LEGACY / f"{name}_expected.safetensors")
    assert found.keys() == wanted.keys()
    expected = json.loads((LEGACY / f"{name}_expected.metrics.json").read_text())
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["status"] == "finished"
    assert metrics["training"]["steps"] == expected["training"]["steps"]
    for key, value in expected["trained"].items():
        assert metrics["trained"][key] == (value and pytest.approx(value, rel=1e-4))
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5)


def test_the_report_of_a_sweep_is_written(tmp_path: Path) -> None:
    directory = copied("sweep", tmp_path)
    table, page = write_sweep(directory)
    assert "per_tensor" in table.read_text()
    text = page.read_text()
    assert "per_channel" in text
    assert "scalar" not in (cell for cell in table.read_text().split(","))


def test_a_sensitivity_gives_bits_per_layer() -> None:
    report = read_sensitivity(LEGACY / "sensitivity")
    assert report.spec.granularity == "per_channel"
    chosen = choose_bits(report.rows, 0.0012)
    assert chosen.size_mb <= 0.0012
    assert set(chosen.bits) == {row.layer for row in report.rows if row.kind == "weight"}


def test_pickles_of_version_0_1_have_todays_values() -> None:
    spec = QuantSpec(granularity="vector", weights="pointwise")  # type: ignore[arg-type]
    state = {**vars(spec), "granularity": "vector", "pointwise_range": (0.9, 1.1)}
    del state["weight_scale_range"]
    found = object.__new__(QuantSpec)
    found.__setstate__(state)
    assert found == dataclasses.replace(spec, weight_scale_range=(0.9, 1.1))
    grid = object.__new__(Grid)
    grid.__setstate__({"bits": 8, "kind": "signed"})
    assert (grid.qmin, grid) == (-127, Grid(8, "symmetric"))


@pytest.mark.parametrize("value", [QuantSpec(bits=4), InitSpec("mse"), Grid(8, "affine")])
def test_specs_are_copied_and_pickled(value: Any) -> None:
    assert copy.deepcopy(value) == pickle.loads(pickle.dumps(value)) == value


def test_a_student_of_version_0_1_is_unpickled_without_its_cache(tiny: nn.Module) -> None:
    student = fat.prepare(tiny, torch.zeros(1, 3, 16, 16))
    state = {**vars(student), "memo": "any"}
    del state["teacher_cache"]
    found = Student.__new__(Student)
    found.__setstate__(state)
    assert found.teacher_cache is None
    assert not hasattr(found, "memo")


def test_options_are_read_by_their_earlier_names() -> None:
    spec: Any = QuantSpec(pointwise_range=(0.9, 1.1))  # type: ignore[call-arg]
    assert spec.pointwise_range == spec.weight_scale_range == (0.9, 1.1)
    with pytest.raises(AttributeError, match="'QuantSpec' object has no attribute 'pointwise'"):
        spec.pointwise  # noqa: B018
    train: Any = dataclasses.replace(TrainSpec(), pointwise_lr=1e-3)  # type: ignore[call-arg]
    assert train.pointwise_lr == train.weight_scale_lr == 1e-3


def test_signatures_show_the_options() -> None:
    assert list(inspect.signature(QuantSpec).parameters)[:2] == ["bits", "weight_bits"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_earlier_modules_with_the_name_of_a_function_work_like_it(tiny: nn.Module) -> None:
    module: Any = importlib.import_module("fat.calibrate")
    assert inspect.signature(module) == inspect.signature(calibrate)
    assert pickle.loads(pickle.dumps(module)) is calibrate
    student = fat.prepare(tiny, torch.zeros(1, 3, 16, 16))
    fat.calibrate(student, [torch.randn(4, 3, 16, 16)])
    assert student.is_calibrated


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("module", "names"),
    [("spec", "TrainSpec QuantSpec"), ("metrics", "sqnr_db Comparison"), ("kept", "Kept")],
)
def test_star_imports_of_earlier_modules(module: str, names: str) -> None:
    found: dict[str, Any] = {}
    exec(f"from fat.{module} import *", found)
    assert set(names.split()) <= set(found)
    assert set(names.split()) <= set(dir(importlib.import_module(f"fat.{module}")))
