"""Runs on images of every kind, as a user types them, on a tiny network of timm's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fat.data.sources.manifest import ImageIndex
from tests.data.fake_imagenet import fake
from tests.integration.running import command

TINY = [
    "model.name=test_efficientnet",
    "model.weights=random",
    "data.batch_size=8",
    "trainer.threads=1",
    "trainer.progress=false",
    "logger=none",
]


def trained(folder: Path, *arguments: str, cache: Path) -> dict[str, object]:
    result = command(
        "train.py", *TINY, *arguments, f"hydra.run.dir={folder}", XDG_CACHE_HOME=str(cache)
    )
    assert result.returncode == 0, result.stderr
    metrics: dict[str, object] = json.loads((folder / "metrics.json").read_text())
    return metrics


def test_imagenet_by_seed_and_by_index(tmp_path: Path) -> None:
    root, cache = fake(tmp_path / "images", "class archives", "flat folder"), tmp_path / "cache"
    sampled = [
        "data=imagenet",
        f"data.root={root}",
        "data.fraction=0.5",
        "data.calibration_images=5",
        "data.validation_images=5",
        "optim.epochs=1",
        "data.image_size=32",
    ]
    first = trained(tmp_path / "one", *sampled, cache=cache)
    assert first["accuracy_drop"] is not None
    index = ImageIndex.load(tmp_path / "one" / "images.csv")
    assert index.counts() == {"calibration": 5, "train": 30, "validation": 5, "test": 20}
    again = trained(
        tmp_path / "two",
        "data=imagenet",
        f"data.index={tmp_path / 'one' / 'images.csv'}",
        "optim.epochs=1",
        "data.image_size=32",
        "data.cache=jpeg",
        f"data.cache_dir={tmp_path / 'caches'}",
        cache=cache,
    )
    assert again["calibrated"] == first["calibrated"]
    assert ImageIndex.load(tmp_path / "two" / "images.csv") == index
    judged = command("evaluate.py", f"run={tmp_path / 'two'}", XDG_CACHE_HOME=str(cache))
    assert judged.returncode == 0, judged.stderr
    assert "20 test images" in judged.stdout + judged.stderr

    changed = next(root.glob("train/*.tar"))
    changed.write_bytes(changed.read_bytes().replace(b"\xff\xd8", b"\xff\xd9"))
    refused = command(
        "train.py",
        *TINY,
        "data=imagenet",
        f"data.index={tmp_path / 'one' / 'images.csv'}",
        f"hydra.run.dir={tmp_path / 'three'}",
        XDG_CACHE_HOME=str(cache),
    )
    assert refused.returncode == 2
    assert "has changed since the index was written" in refused.stderr


def test_fine_tuning_and_quantizing_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    options = [
        "data=digits",
        "teacher=finetune",
        "teacher.epochs=2",
        "data.image_size=32",
        "data.train_images=200",
        "data.test_images=100",
        "optim.epochs=1",
    ]
    first = trained(tmp_path / "one", *options, cache=tmp_path / "cache")
    teacher = first["teacher"]
    assert isinstance(teacher, dict)
    assert (teacher["classes"], teacher["cached"]) == (10, False)
    assert first["weights"] == "random, fine-tuned on 10 classes"
    assert isinstance(first["float"], dict)
    assert first["float"]["top1"] is not None
    again = trained(tmp_path / "two", *options, "quant.bits=6", cache=tmp_path / "cache")
    assert again["teacher"] == {**teacher, "cached": True}
    assert again["float"] == first["float"]
    judged = command("evaluate.py", f"run={tmp_path / 'one'}", "trainer.progress=false")
    assert judged.returncode == 0, judged.stderr
    assert f"{first['float']['top1']:.2f}" in judged.stdout + judged.stderr

    refused = command("train.py", *TINY, "data=digits", f"hydra.run.dir={tmp_path / 'three'}")
    assert refused.returncode == 2
    assert "Type teacher=finetune" in refused.stderr


def test_no_data_at_all(tmp_path: Path) -> None:
    metrics = trained(
        tmp_path / "run",
        "data=distilled",
        "data.distill.images=12",
        "data.distill.batch_size=6",
        "data.distill.coarse_steps=2",
        "data.distill.steps=1",
        "data.image_size=32",
        "data.test_images=16",
        "optim.epochs=1",
        cache=tmp_path / "cache",
    )
    assert isinstance(metrics["trained"], dict)
    assert metrics["trained"]["agreement"] is not None
    sheets = list((tmp_path / "cache" / "fat" / "distilled").rglob("contact_sheet.png"))
    assert len(sheets) == 1
    assert str(sheets[0]) in (tmp_path / "run" / "train.log").read_text()
    cache = str(tmp_path / "cache")
    judged = command("evaluate.py", f"run={tmp_path / 'run'}", XDG_CACHE_HOME=cache)
    assert judged.returncode == 0, judged.stderr
    assert "16 test images of distilled" in judged.stdout + judged.stderr
    assert f"{metrics['trained']['sqnr_db']:.2f}" in judged.stdout + judged.stderr


def test_a_key_of_another_source_is_named() -> None:
    result = command("train.py", "data=photos", "data.fraction=0.5")
    assert result.returncode == 2
    told = (
        "data.fraction=0.5 has no effect with data=photos; it is for data=imagenet. Leave it out."
    )
    assert told in result.stderr
