"""A run that is killed, stopped or asked to end goes on with resume=, and ends the same."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.running import command
from tests.integration.test_commands import TINY
from tests.integration.warm import Trainings

RUN = [
    *TINY,
    "data.train_images=64",
    "optim.epochs=2",
    "optim.reconstruction.steps=2",
    "optim.validations=2",
    "trainer.progress=false",
    "trainer.checkpoint_every=0",
    "logger=none",
]
STEPS = 16
KILLS = 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("warm") / "output.txt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, server: Trainings) -> tuple[Path, float]:
    """A run that nobody disturbed, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("whole")
    server.run("--help")
    started = time.monotonic()
    status, output = server.run(*RUN, f"hydra.run.dir={folder}")
    assert status == 0, output
    return folder, time.monotonic() - started


def assert_same(folder: Path, whole: Path) -> None:
    """Student, figures of training, and judgement are those of the undisturbed run."""
    wanted, got = (load_file(place / "student.safetensors") for place in (whole, folder))
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        assert torch.equal(value, got[name]), name
    assert (folder / "history.csv").read_text() == (whole / "history.csv").read_text()
    one, other = (json.loads((place / "metrics.json").read_text()) for place in (whole, folder))
    assert other["status"] == "finished"
    for key in ("float", "calibrated", "trained", "training", "accuracy_drop", "data", "bits"):
        assert one[key] == other[key], key


def test_killed_ten_times_at_random_a_run_ends_the_same(
    whole: tuple[Path, float], server: Trainings, tmp_path: Path
) -> None:
    finished, seconds = whole
    rng = random.Random(0)
    kills, number, moments = 0, 0, []
    # One in each tenth of the run's time, the first of all at its beginning.
    tenths = [0, *rng.sample(range(1, KILLS), KILLS - 1)]
    while kills < KILLS:
        number += 1
        folder = tmp_path / str(number)
        anew = [*RUN, f"hydra.run.dir={folder}"]
        arguments, here = anew, 0
        status: int | None = None
        while status is None:
            pid = server.start(*arguments)
            patience = 200.0
            if here < 4 and kills < KILLS:
                patience = (tenths[kills] + rng.random()) * seconds / KILLS
            status = server.wait(pid, patience)
            if status is None:
                status = server.kill(pid)
                if status == 0:  # it had just finished
                    break
                assert status == -signal.SIGKILL
                status = None
                kills, here = kills + 1, here + 1
                begun = (folder / "config.yaml").is_file()
                arguments = [f"resume={folder}"] if begun else anew
                names = ("config.yaml", "metrics.json", "checkpoints/last.ckpt")
                moments.append(sum((folder / name).is_file() for name in names))
        assert status == 0, server.log.read_text()
        assert_same(folder, finished)
    assert min(moments) < 3 == max(moments), moments  # before anything was trained, and while


def step_of(folder: Path) -> int:
    """The last step of which history.csv tells."""
    path = folder / "history.csv"
    lines = path.read_text().splitlines()[1:] if path.is_file() else []
    return int(lines[-1].partition(",")[0]) if lines and "," in lines[-1] else 0


def stopped(server: Trainings, folder: Path, how: signal.Signals, *arguments: str) -> int | None:
    """Start a run and send a signal in its second epoch."""
    pid = server.start(*RUN, *arguments, f"hydra.run.dir={folder}")
    deadline = time.monotonic() + 100
    while step_of(folder) < 9:
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.005)
    return server.kill(pid, how)


def test_sigterm_leaves_a_checkpoint_of_that_moment(
    whole: tuple[Path, float], server: Trainings, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    status = stopped(server, folder, signal.SIGTERM, "trainer.checkpoint_every=1e9")
    assert status not in (0, None)
    assert "Traceback" not in server.log.read_text()
    kept = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == step_of(folder) < STEPS
    status, output = server.run(f"resume={folder}")
    assert status == 0, output
    assert_same(folder, whole[0])


def test_after_ctrl_c_the_printed_command_goes_on(
    whole: tuple[Path, float], server: Trainings, tmp_path: Path
) -> None:
    folder = tmp_path / "a run"  # a name that Hydra's grammar and a shell would take apart
    assert stopped(server, folder, signal.SIGINT) == 130
    output = server.log.read_text()
    assert f"Resume with: python train.py 'resume={folder}'" in output
    assert "Traceback" not in output
    status, output = server.run(f"resume={folder}", "trainer.threads=1", "name=another")
    assert status == 0, output
    assert_same(folder, whole[0])


def test_resuming_a_finished_run_changes_nothing(
    whole: tuple[Path, float], server: Trainings
) -> None:
    folder, _ = whole
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix != ".log"}
    status, output = server.run(f"resume={folder}")
    assert status == 0
    assert f"{folder} is finished already." in output
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.suffix != ".log"} == files


def test_a_second_run_does_not_take_the_place_of_a_first(
    whole: tuple[Path, float], server: Trainings
) -> None:
    status, output = server.run(*RUN, f"hydra.run.dir={whole[0]}")
    assert status == 2
    assert f"Type resume={whole[0]} to resume it" in output
    assert not (whole[0] / "failure.json").exists()


def test_auto_begins_and_goes_on_in_the_same_directory(server: Trainings, tmp_path: Path) -> None:
    short = [
        *TINY,
        "experiment=calibration_only",
        "logger=none",
        "resume=auto",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    status, output = server.run(*short)
    assert status == 0, output
    assert "Run directory:" in output
    status, output = server.run(*short)
    assert status == 0, output
    assert "is finished already" in output
    status, output = server.run(*short, "quant.bits=4")  # not the run that is there
    assert status == 2
    assert "a run with other options" in output
    assert not (tmp_path / "run" / "failure.json").exists()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["bits"]["weight"] == 8


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["resume={run}", "quant.bits=4"], "leave out quant.bits=4"),
        (["resume={run}", "model=resnet18"], "leave out model=resnet18"),
        (["resume={none}"], "There is no directory "),
        (["-m", "resume={run}"], "for a sweep type sweep.resume=true"),
        (["resume=auto"], "type hydra.run.dir=DIR too"),
    ],
)
def test_what_cannot_go_on_is_answered_in_words(
    whole: tuple[Path, float], server: Trainings, tmp_path: Path, arguments: list[str], wanted: str
) -> None:
    folder = tmp_path / "nothing"
    before = sorted(os.listdir(whole[0]))
    words = [word.format(run=whole[0], none=folder) for word in arguments]
    status, output = server.run(*words)
    assert status == 2, output
    assert wanted in output
    assert "Traceback" not in output
    assert not folder.exists()  # asking is not making
    assert sorted(os.listdir(whole[0])) == before


def test_a_cold_process_says_the_same() -> None:
    result = command("train.py", "resume=/no/such/run")
    assert result.returncode == 2
    assert "There is no directory /no/such/run" in result.stderr
