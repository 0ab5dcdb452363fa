"""``python -m fat.report``: written files, and messages on wrong arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fat.report.__main__ import main
from tests.report.fake_runs import fake_run, metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two runs, and a sweep of two under ``sweeps``."""
    for place, bits in enumerate((8, 4)):
        told = metrics(bits=(bits, bits))
        fake_run(tmp_path / f"runs/{bits}", told, tensors=2)
        fake_run(tmp_path / f"sweeps/s/{place}-a", told, tensors=2)
    (tmp_path / "sweeps/s/multirun.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_as_a_command(place: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "fat.report", "runs/8"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.split() == ["runs/8/report.html"]
    assert (place / "runs/8/report.html").stat().st_size > 1_000_000


def test_a_sweep_and_its_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweeps/s"]) == 0
    assert capsys.readouterr().out.split() == [
        "sweeps/s/0-a/report.html",
        "sweeps/s/1-a/report.html",
        "sweeps/s/sweep.csv",
        "sweeps/s/report.html",
    ]
    text = (place / "sweeps/s/report.html").read_text(encoding="utf-8")
    assert 'href="0-a/report.html"' in text  # the page was written before the link to it
    assert not (place / "comparison.html").exists()


def test_several_are_compared(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs/8", "runs/4", "sweeps/s", "--out", "all/c.html"]) == 0
    assert capsys.readouterr().out.split()[-2:] == ["all/c.csv", "all/c.html"]
    text = (place / "all/c.html").read_text(encoding="utf-8")
    assert 'href="../runs/8/report.html"' in text
    assert "Comparison of 4 runs" in text
    assert main(["runs/8", "runs/4"]) == 0
    assert (place / "comparison.html").is_file()
    assert (place / "comparison.csv").is_file()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["runs"], ["contains 2 of them", "python -m fat.report runs/4 runs/8"]),
        (["sweeps"], ["contains 1 of them", "python -m fat.report sweeps/s."]),
        (["runs/8", "nowhere"], ["no directory nowhere", "outputs/"]),
        (["empty"], ["neither a run nor a sweep", "metrics.json"]),
        (["runs/8", "--out", "x.html"], ["--out=x.html", "omit --out"]),
        (["runs/8", "./runs/8", "--out", "x.html"], ["only one directory was given"]),
        (["runs/8", "runs/4", "--out", "x.csv"], ["--out=x.csv", "suffix .html"]),
    ],
)
def test_mistakes(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], wanted: list[str]
) -> None:
    (place / "empty").mkdir()
    assert main(arguments) == 2
    out, told = capsys.readouterr()
    assert out == ""
    for words in wanted:
        assert words in told
    assert list(place.rglob("*.html")) == []  # nothing is written before all is in order


def test_help_has_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "comparison.html" in capsys.readouterr().out


def test_a_place_that_cannot_be_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "file").write_text("")
    assert main(["runs/8", "runs/4", "--out", "file/c.html"]) == 2
    assert "Cannot write" in capsys.readouterr().err
