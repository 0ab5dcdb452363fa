"""Options that are chosen for the machine, with and without (pretended) GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fat.experiment import machine
from fat.experiment.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    TrainerConfig,
    parse_run,
)
from fat.experiment.jobs import _config_of_run
from fat.experiment.machine import check_batch_size, check_devices, describe, device_of, resolve
from fat.experiment.run_directory import METRICS, resumable_config, stored_config
from fat.experiment.runner import run
from fat.utils.errors import FatError


def config(**trainer: Any) -> RunConfig:
    return RunConfig(
        ModelConfig(name="resnet18"),
        DataConfig(source="photos", workers=3),
        trainer=TrainerConfig(**trainer),
    )


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that support bf16, as far as these functions ask."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def chosen(options: RunConfig | EvaluateConfig) -> tuple[str, str, int | None]:
    return options.trainer.accelerator, options.trainer.precision, options.data.batch_size


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_everything_is_as_on_a_cpu() -> None:
    assert chosen(resolve(config())) == ("cpu", "32-true", 16)
    assert describe(resolve(config())) == "the CPU, 32-true, batches of 16, 3 workers"
    with pytest.raises(FatError, match=r"accelerator=gpu, but torch finds no GPU.*trainer=cpu"):
        resolve(config(accelerator="gpu"))


@pytest.mark.usefixtures("no_gpu")
def test_the_message_without_a_gpu_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(FatError, match=r"is a build for CUDA 13\.0, whose driver is missing"):
        resolve(config(accelerator="gpu"))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(FatError, match=r"is a build for CPUs\. Install one for GPUs"):
        resolve(config(accelerator="gpu"))


@pytest.mark.usefixtures("gpus")
def test_a_gpu_is_used_in_bf16_with_larger_batches() -> None:
    assert chosen(resolve(config())) == ("gpu", "bf16-mixed", 64)
    assert chosen(resolve(config(accelerator="gpu"))) == ("gpu", "bf16-mixed", 64)
    assert chosen(resolve(config(accelerator="cpu"))) == ("cpu", "32-true", 16)
    text = describe(resolve(config()))
    assert text == "Test GPU (cuda:1), bf16-mixed, batches of 64, 3 workers"


@pytest.mark.usefixtures("gpus")
def test_one_and_several_gpus_have_one_precision_and_batch_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = resolve(config())
    monkeypatch.setattr(machine.distributed, "size", lambda: 8)
    assert chosen(resolve(config(devices=8))) == chosen(one)
    text = describe(resolve(config(devices=8)))
    assert text == "8 GPUs (Test GPU), bf16-mixed, batches of 64, 3 workers each"
    # Every process has the same number of images.
    monkeypatch.setattr(machine.distributed, "size", lambda: 3)
    assert resolve(config(devices=3)).data.batch_size == 66


@pytest.mark.usefixtures("gpus")
def test_gpus_without_bf16_train_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert resolve(config()).trainer.precision == "32-true"


@pytest.mark.usefixtures("gpus")
def test_given_values_stay() -> None:
    given = config(precision="32-true")
    given = replace(given, data=replace(given.data, batch_size=5))
    assert chosen(resolve(given)) == ("gpu", "32-true", 5)


def test_a_resumed_run_keeps_its_precision_and_batch_size(
    gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = resolve(config())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen(resolve(config(), stored)) == ("cpu", "bf16-mixed", 64)
    again = parse_run(stored_config(stored))
    assert chosen(again) == ("gpu", "bf16-mixed", 64)


@pytest.mark.usefixtures("no_gpu")
def test_workers_are_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(config(), data=DataConfig(source="photos"))
    monkeypatch.setattr(machine, "usable_workers", lambda: 5)
    stored = resolve(options)
    assert stored.data.workers == 5
    assert describe(stored) == "the CPU, 32-true, batches of 16, 5 workers"
    monkeypatch.setattr(machine, "usable_workers", lambda: 1)
    assert resolve(options, stored).data.workers == 5
    assert resolve(config(), stored).data.workers == 3  # as typed


@pytest.mark.usefixtures("gpus")
def test_more_devices_than_gpus_are_refused(tmp_path: Path) -> None:
    check_devices(config(devices=2).trainer)
    check_devices(config(devices=8, accelerator="cpu").trainer)
    wanted = (
        r"trainer.devices is 8, but torch finds 2 GPU\(s\) here. Type trainer.devices=2, or "
        "trainer.accelerator=cpu"
    )
    with pytest.raises(FatError, match=wanted):
        run(config(devices=8), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_step_that_the_processes_cannot_divide_is_refused_before_they_start(
    tmp_path: Path,
) -> None:
    uneven = config(devices=3, accelerator="cpu")
    uneven = replace(uneven, data=replace(uneven.data, batch_size=16))
    wanted = "data.batch_size is 16, .* 3 processes: it must be a multiple of 3, .*batch_size=18"
    with pytest.raises(FatError, match=wanted):
        run(uneven, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_batch_size(replace(uneven, data=replace(uneven.data, batch_size=18)))
    check_batch_size(replace(uneven, data=replace(uneven.data, batch_size=None)))
    check_batch_size(replace(uneven, optim=replace(uneven.optim, epochs=0)))


def test_options_of_a_new_run_are_not_those_of_an_interrupted_one(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored_config(config())))
    assert resumable_config(tmp_path, resume=True) is None  # it has no metrics yet
    (tmp_path / METRICS).write_text("{}")
    assert resumable_config(tmp_path, resume=False) is None
    assert resumable_config(tmp_path, resume=True) == config()


@pytest.mark.usefixtures("no_gpu")
def test_a_run_of_a_gpu_is_resumed_on_the_cpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(stored_config(config(accelerator="gpu", precision="bf16-mixed")))
    )
    composed: Any = {}
    with caplog.at_level("INFO"):
        resumed, _ = _config_of_run(tmp_path, [f"resume={tmp_path}"], composed)
    assert (resumed.trainer.accelerator, resumed.trainer.precision) == ("cpu", "bf16-mixed")
    assert "started on a GPU, and torch finds none here: using the CPU" in caplog.text


@pytest.mark.usefixtures("no_gpu")
def test_evaluation_chooses_too() -> None:
    options = EvaluateConfig(data=DataConfig(source="photos"))
    assert chosen(resolve(options)) == ("cpu", "32-true", 16)
    assert device_of(options.trainer) == torch.device("cpu")
    options = replace(options, data=replace(options.data, workers=1))
    assert describe(resolve(options)) == "the CPU, batches of 16, 1 worker"
