"""What the doors are tried with: a scratch folder, a finished run, one that was cut off, files."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from doors.trial import Case, Result, _program, command, run
from PIL import Image

__all__ = ["TINY", "Lab"]

TINY = (
    "model.name=test_efficientnet",
    "model.weights=random",
    "model.num_classes=10",
    "data=digits",
    "data.image_size=32",
    "data.batch_size=8",
    "data.workers=0",
    "data.train_images=32",
    "data.calibration_images=8",
    "data.validation_images=8",
    "data.test_images=16",
    "trainer.threads=1",
    "trainer.progress=false",
    "logger=none",
)
"""A run of two seconds: a small random network on digits."""


class Lab:
    """Makes what doors need once, and does their cases.

    Args:
        folder: For everything; the caller removes it.
        seed: What random bytes and texts follow.
        share: Share of the cases that is done, for a quick look.
    """

    def __init__(self, folder: Path, seed: int = 0, share: float = 1.0) -> None:
        self.folder = folder
        self.seed, self.share = seed, share
        self.canary = folder / "executed"
        self._made = 0

    def random(self, name: str) -> random.Random:
        """Random numbers for one purpose."""
        return random.Random(f"{self.seed} {name}")

    def new(self, name: str = "place") -> Path:
        """A place that nothing is at yet."""
        self._made += 1
        return self.folder / f"{os.getpid()}-{self._made}-{name}"

    def said(self, place: Path | str) -> str:
        """How the page names a place: the same in every run."""
        return str(place).replace(str(self.folder), "a folder")[-30:]

    def copy(self, directory: Path) -> Path:
        """A copy of a run that may be damaged."""
        target = self.new(directory.name)
        shutil.copytree(directory, target)
        return target

    def run(self, cases: Sequence[Case]) -> list[Result]:
        """Do the cases, or a seeded share of them."""
        if self.share < 1.0:
            few = max(1, round(self.share * len(cases)))
            chosen = sorted(self.random("share").sample(range(len(cases)), min(few, len(cases))))
            cases = [cases[index] for index in chosen]
        return run(cases, self.canary)

    def command(self, program: str, *words: str) -> str:
        """A command in a scratch folder of its own, see :func:`doors.trial.command`."""
        folder = self.new("here")
        folder.mkdir()
        return command(program, *words, folder=folder)

    @functools.cached_property
    def images(self) -> Path:
        """A folder of 40 small images in two classes of ImageNet."""
        root = self.folder / "images"
        rng = np.random.default_rng(self.seed)
        for number in range(40):
            place = root / ("n01440764", "n01443537")[number % 2] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(place)
        return root

    @functools.cached_property
    def finished(self) -> Path:
        """A finished run with an exported file."""
        place = self.folder / "finished"
        self.command("train.py", *TINY, "optim.epochs=1", "export=onnx", f"hydra.run.dir={place}")
        return place

    @functools.cached_property
    def cut_off(self) -> Path:
        """A run whose process was killed in the middle of its training."""
        place = self.folder / "cut-off"
        words = (*TINY, "optim.epochs=8", "trainer.checkpoint_every=0", f"hydra.run.dir={place}")
        pid = os.fork()
        if pid == 0:
            _program("train.py", words, self.folder, os.open(os.devnull, os.O_WRONLY))
        last, deadline = place / "checkpoints" / "last.ckpt", time.monotonic() + 120
        while not last.is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert last.is_file(), "the run to cut off did not train"
        return place

    @functools.cached_property
    def resumed(self) -> str:
        """SHA-256 of the student that the run becomes when it goes on undisturbed."""
        place = self.copy(self.cut_off)
        self.command("train.py", f"resume={place}", "trainer.progress=false")
        return hashlib.sha256((place / "student.safetensors").read_bytes()).hexdigest()

    @functools.cached_property
    def measured(self) -> Path:
        """The finished run with a measured sensitivity."""
        place = self.copy(self.finished)
        self.command(
            "evaluate.py",
            f"run={place}",
            "analysis=sensitivity",
            "analysis_images=4",
            "data.workers=0",
            "trainer.progress=false",
        )
        return place

    @functools.cached_property
    def indexed(self) -> Path:
        """A finished run on files, which images.csv names."""
        place = self.folder / "indexed"
        words = [word for word in TINY if not word.startswith(("data=", "model.num_classes"))]
        self.command(
            "train.py",
            *words,
            "data=folder",
            f"data.root={self.images}",
            "optim.epochs=0",
            f"hydra.run.dir={place}",
        )
        return place

    @functools.cached_property
    def sweep(self) -> Path:
        """A sweep of two runs, made of the finished one."""
        place = self.folder / "sweep"
        for name in ("0-a", "1-b"):
            shutil.copytree(self.finished, place / name)
        jobs = [
            {"directory": name, "overrides": ["seed=0"], "status": "finished"}
            for name in ("0-a", "1-b")
        ]
        notes = {"id": "s", "command": "python train.py -m", "total": 2, "started": 0, "jobs": jobs}
        (place / "sweep.json").write_text(json.dumps(notes))
        hydra = {"overrides": {"task": ["seed=0,1"], "hydra": ["hydra.mode=MULTIRUN"]}}
        (place / "multirun.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
        return place

    @functools.cached_property
    def small_sweep(self) -> Path:
        """A finished sweep of two jobs that only calibrate."""
        place = self.folder / "small-sweep"
        self.command(
            "train.py", "-m", *TINY, "optim.epochs=0", "seed=0,1", f"hydra.sweep.dir={place}"
        )
        return place
