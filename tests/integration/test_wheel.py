"""The wheel, installed by itself: the ``fat`` command does what train.py does in a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.integration.running import ROOT
from tests.integration.test_commands import TINY

pytest.importorskip("hatchling", reason="needs hatchling: pip install -e '.[test]'")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    (source,) = folder.glob("fat_quant-*/")
    return source


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel that is built from the source distribution, as pip does it."""
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(sdist.parent)]
    subprocess.run(words, cwd=sdist, check=True, capture_output=True)
    (file,) = sdist.parent.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel alone; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target"]
    subprocess.run([*words, str(folder), str(wheel)], check=True, capture_output=True)
    return folder


def fat(site: Path, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a folder outside the checkout."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    return subprocess.run(
        [str(site / "bin" / "fat"), *words],
        cwd=place,
        env={**variables, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_sdist_holds_what_its_own_tests_need(sdist: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("needs a git checkout")
    missing = [name for name in tracked.stdout.splitlines() if not (sdist / name).is_file()]
    assert missing == []


def test_the_wheel_holds_the_package_and_conf(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fat", "fat_quant"}
    installed = {name for name in names if name.startswith("fat/")}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fat").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {f"fat/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert installed == wanted
    kinds = {Path(name).suffix for name in installed}
    assert {".py", ".pyi", ".typed", ".c", ".css", ".js", ".yaml"} <= kinds | {
        Path(name).name.removeprefix("py") for name in installed
    }


def test_the_main_job_outside_a_checkout(site: Path, tmp_path: Path) -> None:
    mine = tmp_path / "my conf" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\nquant:\n  bits: 5\noptim:\n  epochs: 1\n")
    words = [*TINY, "data.train_images=16", "experiment=mine", "trainer.progress=false"]
    run = fat(site, tmp_path, "train", "--config-dir", "my conf", *words)
    assert run.returncode == 0, run.stderr
    (folder,) = (tmp_path / "outputs").glob("*/*")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["bits"]["weight"] == 5
    assert metrics["training"]["steps"] == 2
    assert metrics["command"].startswith("fat train --config-dir '")
    assert (folder / "train.log").is_file()

    judged = fat(site, tmp_path, "evaluate", f"run={folder}", "trainer.progress=false")
    assert judged.returncode == 0, judged.stderr
    assert f"{metrics['trained']['agreement']:.2f}" in judged.stdout + judged.stderr

    (folder / "report.html").unlink()
    written = fat(site, tmp_path, "report", str(folder))
    assert written.returncode == 0, written.stderr
    assert (folder / "report.html").is_file()

    assert fat(site, tmp_path, "train", f"resume={folder}").returncode == 0
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert stored["quant"]["bits"] == 5


def test_messages_name_the_installed_command(site: Path, tmp_path: Path) -> None:
    assert fat(site, tmp_path, "--version").stdout == f"fat {version()}\n"
    assert "fat evaluate" in fat(site, tmp_path, "--help").stdout
    for name in ("train", "evaluate", "report", "search", "dashboard"):
        told = fat(site, tmp_path, name, "--help")
        assert told.returncode == 0, told.stderr
        assert f"fat {name}" in told.stdout
        assert "python train.py" not in told.stdout
    asked = fat(site, tmp_path, "evaluate")
    assert asked.returncode == 2
    assert "Type fat evaluate run=DIR" in asked.stderr
    wrong = fat(site, tmp_path, "trian")
    assert wrong.returncode == 2
    assert "Did you mean 'train'?" in wrong.stderr


def version() -> str:
    import fat

    return fat.__version__
