"""The ``fat`` command without what it starts; tests/integration/test_wheel.py runs that."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

import fat
from fat.experiment import cli
from fat.experiment.config import RunConfig
from fat.utils.commands import VARIABLE


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """main() says in the environment how it was started, which must not reach other tests."""
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr("sys.argv", ["fat"])


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_without_a_command_all_are_listed(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    for name in ("train", "evaluate", "report", "search", "dashboard"):
        assert f"\n  fat {name} " in told


def test_the_version_is_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fat {fat.__version__}\n"


def test_a_mistyped_command_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["evalute", "run=x"]) == 2
    assert "Unknown command 'evalute'. Did you mean 'evaluate'?" in capsys.readouterr().err


def test_other_commands_get_their_words_and_return_their_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["report", "/no/such/run"]) == 2
    assert "/no/such/run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_conf_is_found(name: str) -> None:
    assert (cli.conf_directory() / f"{name}.yaml").is_file()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("fat", cli.COMMANDS),
        ("fat ev", cli.COMMANDS),
        ("fat report outp", []),
        ("fat unknown x", []),
    ],
)
def test_completion_of_commands(
    line: str,
    wanted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(os.environ, "COMP_LINE", line)
    assert cli.main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == list(wanted)


def test_completion_of_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-sc", "install=tcsh"]) == 2
    assert "install=bash" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("quant.bits=8,6", "quant.bits has several values: add -m to run a sweep over them"),
        ("foo", "'foo' cannot be read; allowed are GROUP=CHOICE and OPTION=VALUE, as in"),
        ("bits=4", "Unknown key 'bits'. Did you mean 'quant.bits' or 'quant.weight.bits' or"),
        ("modle=resnet18", "Unknown group 'modle'. Did you mean 'model'?"),
        ("quant.bit=8", "Unknown key 'quant.bit'. Did you mean 'quant.bits'?"),
        ("model=resnet19", "Unknown choice model=resnet19. Did you mean 'resnet18'"),
        ("--config-dir nowhere", "There is no directory "),
        ("--multrun quant.bits=8,6", "Unknown flag --multrun. Did you mean --multirun?"),
        ("data=folder", "data=folder needs a folder: type data.root=DIR."),
        ("resume=nowhere", "There is no directory nowhere. A run prints its directory"),
        ("quant.equalize.method=exat", "Unknown quant.equalize.method 'exat'. Did you mean"),
    ],
)
def test_mistakes_on_the_command_line_are_answered_with_what_to_type(
    words: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_errors", [])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", *words.split()])
    GlobalHydra.instance().clear()
    assert stopped.value.code == 2
    assert f"Error: {told}" in capfd.readouterr().err


def test_files_with_earlier_keys_give_way_to_what_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (tmp_path / "conf" / "optim").mkdir(parents=True)
    file = tmp_path / "conf" / "optim" / "mine.yaml"
    file.write_text("# @package optim\nrounding_lr: 0.5\npointwise_lr: 5e-4\n")
    found: list[RunConfig] = []
    monkeypatch.setattr(
        "fat.experiment.sweep.run_job", lambda config, *_, **__: found.append(config)
    )
    monkeypatch.chdir(tmp_path)
    words = ["--config-dir", "conf", "optim=mine"]
    for typed in ([], ["optim.pointwise_lr=7e-4"], ["optim.weight_scale_lr=1e-4"]):
        GlobalHydra.instance().clear()
        cli.main(["train", *words, *typed])
    GlobalHydra.instance().clear()
    assert [config.optim.weight_scale_lr for config in found] == [5e-4, 7e-4, 1e-4]
    assert {config.optim.adaround_lr for config in found} == {0.5}


def test_a_sweep_file_with_earlier_keys_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (tmp_path / "conf" / "sweep").mkdir(parents=True)
    params = "hydra:\n  sweeper:\n    params:\n      optim.pointwise_lr: 1e-4,2e-4\n"
    params += "      quant.granularity: vector\n"
    (tmp_path / "conf" / "sweep" / "mine.yaml").write_text(f"# @package _global_\n{params}")
    found: list[RunConfig] = []

    def job(config: RunConfig, *_: Any, **__: Any) -> float:
        found.append(config)
        return 0.0

    monkeypatch.setattr("fat.experiment.sweep.run_job", job)
    monkeypatch.setattr("fat.experiment.sweep.end_sweep", lambda directory: [])
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    cli.main(["train", "--config-dir", "conf", "-m", "sweep=mine"])
    GlobalHydra.instance().clear()
    assert [config.optim.weight_scale_lr for config in found] == [1e-4, 2e-4]
    assert {config.quant.granularity for config in found} == {"per_channel"}
