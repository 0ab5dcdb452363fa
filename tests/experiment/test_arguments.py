"""The places that resume= and sweep.resume= mean, found before Hydra sees the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fat.experiment.arguments import arguments
from fat.utils.errors import FatError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a process that torchrun did not start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("sys.argv", ["train.py"])
    return tmp_path


def run_in(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("seed: 0\n")
    return directory


def sweep_in(directory: Path, command: str, age: float = 0.0) -> Path:
    directory.mkdir(parents=True)
    path = directory / "sweep.json"
    path.write_text(json.dumps({"command": command}))
    os.utime(path, (1e9 - age, 1e9 - age))
    return directory


def test_other_words_stay_as_they_are() -> None:
    words = ["-m", "model=resnet18", "quant.bits=8,4", "optim.epochs=1", "sweep.resume=false"]
    assert arguments(words) == words


def test_resume_runs_in_the_directory_of_the_run(here: Path) -> None:
    run_in(here / "out" / "one")
    assert arguments(["resume=out/one", "name=x"]) == [
        "name=x",
        "resume=out/one",
        "hydra.run.dir=out/one",
        "hydra.output_subdir=null",
    ]


@pytest.mark.parametrize("name", ["a run", "it's", "a=b,c", "(1)", "größer"])
@pytest.mark.parametrize("quote", ["", "'"])
def test_names_reach_hydra_as_they_are(here: Path, name: str, quote: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if quote in name and quote:
        pytest.skip("not what a user types")
    run_in(here / name)
    words = arguments([f"resume={quote}{name}{quote}"])
    parsed = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(words)}
    assert parsed["resume"] == parsed["hydra.run.dir"] == name


def test_of_two_values_the_last_counts(here: Path) -> None:
    run_in(here / "new")
    assert "hydra.run.dir=new" in arguments(["resume=old", "resume=new"])


def test_auto_takes_the_directory_that_is_typed_beside_it() -> None:
    assert arguments(["resume=auto", "hydra.run.dir=x"]) == ["hydra.run.dir=x", "resume=auto"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["resume=nowhere"], "There is no directory nowhere"),
        (["resume=auto"], "type hydra.run.dir=DIR too"),
        (["-m", "resume=nowhere"], "for a sweep type sweep.resume=true"),
        (["--multirun", "resume=auto"], "for a sweep type sweep.resume=true"),
        (["sweep.resume=true"], "type -m too"),
        (["-m", "sweep.resume=nowhere"], "There is no sweep in nowhere"),
        (
            ["-m", "seed=1,2", "sweep.resume=true"],
            r"No sweep under multirun/ was started by: python train\.py -m seed=1,2",
        ),
    ],
)
def test_what_cannot_go_on(here: Path, words: list[str], wanted: str) -> None:
    with pytest.raises(FatError, match=wanted):
        arguments(words)
    assert list(here.iterdir()) == []


def test_sweep_resume_finds_the_newest_sweep_of_the_same_command(here: Path) -> None:
    command = "python train.py -m seed=1,2"
    sweep_in(here / "multirun" / "day" / "1", command, age=200)
    wanted = sweep_in(here / "multirun" / "day" / "2", command, age=100)
    sweep_in(here / "multirun" / "day" / "3", "python train.py -m seed=1,2,3", age=0)
    words = arguments(["-m", "seed=1,2", "sweep.resume=true"])
    found = wanted.relative_to(here).as_posix()
    assert words == ["-m", "seed=1,2", "sweep.resume=true", f"hydra.sweep.dir={found}"]


@pytest.mark.parametrize(
    "earlier",
    ["fat train -m quant.granularity=per_channel", "python train.py -m quant.granularity=vector"],
)
def test_the_same_command_by_another_program_or_with_earlier_names(
    here: Path, earlier: str
) -> None:
    sweep_in(here / "multirun" / "day" / "1", earlier)
    words = arguments(["-m", "quant.granularity=per_channel", "sweep.resume=true"])
    assert words[-1] == "hydra.sweep.dir=multirun/day/1"


def test_sweep_resume_takes_a_directory(here: Path) -> None:
    sweep_in(here / "mine", "python train.py -m seed=1")
    for words in (
        ["-m", "seed=1", "sweep.resume=mine"],
        ["-m", "seed=1", "sweep.resume=true", "hydra.sweep.dir=mine"],
    ):
        assert arguments(words)[-2:] == ["sweep.resume=true", "hydra.sweep.dir=mine"]


def test_a_sweep_does_not_begin_where_one_is(here: Path) -> None:
    sweep_in(here / "mine", "python train.py -m seed=1")
    with pytest.raises(FatError, match=r"mine already holds a sweep\. Type sweep\.resume=mine"):
        arguments(["-m", "seed=1", "hydra.sweep.dir=mine"])
    assert arguments(["-m", "hydra.sweep.dir=other"]) == ["-m", "hydra.sweep.dir=other"]


def test_of_torchruns_processes_the_first_alone_has_a_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["seed=1", "hydra.run.dir=x"]
    monkeypatch.setenv("RANK", "0")
    assert arguments(words) == words
    monkeypatch.setenv("RANK", "1")
    assert arguments(words) == [
        "seed=1",
        "hydra.run.dir=.",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
    ]


@pytest.mark.parametrize("word", ["resume=", "sweep.resume=", "resume=''"])
def test_an_empty_directory_is_a_shell_variable_that_was_not_set(word: str) -> None:
    with pytest.raises(FatError, match="names no directory: type"):
        arguments([word])
