from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from fat.data import datamodule
from fat.data.datamodule import TEST_PHOTOS, TRAIN_PHOTOS, VALIDATION_PHOTOS, FatDataModule
from fat.data.dataset import Batch, DistributedBatchSampler, ImageLoader
from fat.data.transforms import EvalTransform, apply
from fat.models.float_model import Preprocessing
from fat.utils.errors import FatError

PREPROCESSING = Preprocessing(
    size=(32, 32),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bilinear",
    crop_pct=0.875,
    crop_mode="center",
)
SPLITS = ("calibration", "train", "validation", "test")


def fill(root: Path, count: int, start: int = 0) -> Path:
    """Images of one color each, by which batches identify them."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        Image.new("RGB", (40, 40), (i, i, i)).save(root / f"{i:03d}.png")
    return root


def ids(batches: Iterable[Batch]) -> list[int]:
    images = torch.cat([images for images, _ in batches])
    return [round(value) for value in ((images[:, 0, 0, 0] + 1) * 127.5).tolist()]


def names(data: FatDataModule, split: str) -> set[str]:
    chosen = getattr(data, split)
    return {str(chosen.source.root / chosen.source.name(int(i))) for i in chosen.indices}


def epoch(loader: ImageLoader, number: int) -> list[Batch]:
    assert isinstance(loader.batch_sampler, DistributedBatchSampler)
    loader.batch_sampler.sampler.set_epoch(number)
    return list(loader)


# ------------------------------------------------------------------------------------- the splits


def test_photos_of_the_splits_differ() -> None:
    lists = (TRAIN_PHOTOS, VALIDATION_PHOTOS, TEST_PHOTOS)
    assert len({name for photos in lists for name in photos}) == sum(map(len, lists))
    data = FatDataModule.photos(PREPROCESSING, workers=0)
    used = {
        split: {
            getattr(data, split).source.name(i).split("#")[0]
            for i in range(len(getattr(data, split)))
        }
        for split in SPLITS
    }
    assert used["train"] == used["calibration"] == set(TRAIN_PHOTOS)
    assert used["validation"] == set(VALIDATION_PHOTOS)
    assert used["test"] == set(TEST_PHOTOS)


def test_folder_without_a_test_folder_is_split(tmp_path: Path) -> None:
    data = FatDataModule.folder(fill(tmp_path, 100), PREPROCESSING, workers=0, batch_size=10)
    parts = [names(data, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [70, 10, 20]
    assert len(set.union(*parts)) == 100
    assert names(data, "calibration") == parts[0]  # no more than exist
    again = FatDataModule.folder(tmp_path, PREPROCESSING, workers=0)
    assert [names(again, split) for split in ("train", "validation", "test")] == parts
    other = FatDataModule.folder(tmp_path, PREPROCESSING, workers=0, seed=1)
    assert names(other, "test") != parts[2]


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_folder_with_train_and_held_out(tmp_path: Path, held_out: str) -> None:
    fill(tmp_path / "train" / "0", 20)
    fill(tmp_path / held_out / "1", 5, start=100)
    data = FatDataModule.folder(
        tmp_path, PREPROCESSING, workers=0, calibration_images=7, num_classes=10
    )
    assert names(data, "test") == {str(p) for p in (tmp_path / held_out).rglob("*.png")}
    assert len(names(data, "train")) == 18
    assert len(names(data, "validation")) == 2
    assert len(names(data, "calibration")) == 7
    assert names(data, "calibration") <= names(data, "train")
    assert not names(data, "train") & names(data, "validation")
    assert data.labelled
    _, labels = next(iter(data.test_dataloader()))
    assert labels.tolist() == [1] * 5
    assert labels.dtype == torch.int64


def test_caps_and_test_root(tmp_path: Path) -> None:
    fill(tmp_path / "a", 50)
    fill(tmp_path / "b", 9, start=100)
    data = FatDataModule.folder(
        tmp_path / "a",
        PREPROCESSING,
        test_root=tmp_path / "b",
        train_images=12,
        validation_images=3,
        test_images=4,
        calibration_images=5,
        workers=0,
    )
    assert [len(getattr(data, split)) for split in SPLITS] == [5, 12, 3, 4]
    assert min(ids(data.test_dataloader())) >= 100
    for inside in (tmp_path, tmp_path / "a", tmp_path / "a" / "deep"):
        with pytest.raises(FatError, match=r"overlap.*data.test_root=DIR"):
            FatDataModule.folder(tmp_path / "a", PREPROCESSING, test_root=inside)


def test_only_training_images_are_cropped_at_random(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    data = FatDataModule.folder(tmp_path, PREPROCESSING, workers=0)
    for split, loader in (
        ("calibration", data.calibration_dataloader()),
        ("validation", data.val_dataloader()),
        ("test", data.test_dataloader()),
    ):
        chosen = getattr(data, split)
        middle = EvalTransform(PREPROCESSING)
        expected = [apply(middle, chosen.source.load(int(i))) for i in chosen.indices]
        assert torch.equal(torch.cat([images for images, _ in loader]), torch.stack(expected))
    assert not torch.equal(data.train[0][0][0], data.train[(1, 0)][0][0])  # type: ignore[index]


# -------------------------------------------------------------------------------------- determinism


def test_same_pixels_whatever_the_workers_and_the_global_state() -> None:
    def run(workers: int, seed: int = 3) -> list[torch.Tensor]:
        torch.manual_seed(workers)
        np.random.seed(workers)
        random.seed(workers)
        data = FatDataModule.photos(
            PREPROCESSING,
            train_images=16,
            calibration_images=8,
            validation_images=4,
            test_images=6,
            batch_size=5,
            workers=workers,
            seed=seed,
        )
        train = data.train_dataloader()
        before = torch.get_rng_state()
        passes = [epoch(train, 0), epoch(train, 1), list(data.calibration_dataloader())]
        passes += [list(data.val_dataloader()), list(data.test_dataloader())]
        assert torch.equal(torch.get_rng_state(), before)
        return [torch.cat([images for images, _ in batches]) for batches in passes]

    alone, two, other = run(0), run(2), run(0, seed=4)
    assert all(map(torch.equal, alone, two))
    assert not torch.equal(alone[0], alone[1])  # new crops in a new epoch
    assert not torch.equal(alone[0], other[0])
    assert torch.equal(alone[3], other[3])  # all seeds are evaluated on the same crops
    assert torch.equal(alone[4], other[4])


def test_training_order(tmp_path: Path) -> None:
    data = FatDataModule.folder(fill(tmp_path, 60), PREPROCESSING, workers=0, batch_size=6)
    loader = data.train_dataloader()
    first, second = ids(epoch(loader, 0)), ids(epoch(loader, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    # A run that resumes at epoch 1 continues as the first would have.
    assert ids(epoch(data.train_dataloader(), 1)) == second


class Recorder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[int]] = {}

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        self.seen.setdefault(self.current_epoch, []).extend(ids([batch]))
        return self.weight.sum()

    def validation_step(self, batch: Batch, index: int) -> None:
        assert batch[0].shape[1:] == (3, 32, 32)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_lightning_sets_the_epoch(tmp_path: Path) -> None:
    data = FatDataModule.folder(fill(tmp_path, 60), PREPROCESSING, workers=0, batch_size=6)
    module = Recorder()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    by_hand = [ids(epoch(data.train_dataloader(), number)) for number in (0, 1)]
    assert [module.seen[0], module.seen[1]] == by_hand


# ------------------------------------------------------------------------------------------ batches


def test_short_last_batch(tmp_path: Path) -> None:
    fill(tmp_path / "a", 20)
    fill(tmp_path / "b", 7, start=100)
    data = FatDataModule.folder(
        tmp_path / "a", PREPROCESSING, test_root=tmp_path / "b", workers=0, batch_size=5
    )
    assert [len(labels) for _, labels in data.train_dataloader()] == [5, 5, 5]  # of 18
    assert [len(labels) for _, labels in data.test_dataloader()] == [5, 2]
    data.batch_size = 50
    assert [len(labels) for _, labels in data.train_dataloader()] == [18]


def test_contract_and_summary(tmp_path: Path) -> None:
    data = FatDataModule.folder(fill(tmp_path, 40), PREPROCESSING, workers=0)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        images, labels = next(iter(loader))
        assert images.dtype == torch.float32
        assert images.shape[1:] == (3, 32, 32)
        assert set(labels.tolist()) == {-1}
    images, labels = data.example_batch(3)
    assert torch.equal(images, next(iter(data.calibration_dataloader()))[0][:3])
    assert len(labels) == 3
    held_out, _ = data.example_batch(3, "validation")
    assert torch.equal(held_out, next(iter(data.val_dataloader()))[0][:3])
    with pytest.raises(FatError, match=r"Unknown split 'val'. Allowed: calibration, train, "):
        data.example_batch(3, "val")
    summary = data.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["labelled"] is False
    assert summary["splits"]["train"] == {
        "images": 28,
        "labelled": False,
        "skipped": 0,
        "first_skipped": [],
    }


def test_unreadable_images_show_in_the_summary(tmp_path: Path) -> None:
    fill(tmp_path / "train", 60)
    fill(tmp_path / "val", 40, start=100)
    (tmp_path / "val" / "111.png").write_bytes(b"")
    data = FatDataModule.folder(tmp_path, PREPROCESSING, workers=0)
    assert len(ids(data.test_dataloader())) == 39
    assert data.summary()["splits"]["test"]["skipped"] == 1
    assert data.summary()["splits"]["test"]["first_skipped"] == ["111.png"]
    for i in range(3):
        (tmp_path / "val" / f"{100 + i}.png").write_bytes(b"")
    with pytest.raises(FatError, match=r"of the 40 test images cannot be read, more than 5%"):
        list(data.test_dataloader())


def test_example_batch_passes_over_the_unreadable(tmp_path: Path) -> None:
    fill(tmp_path, 30)
    data = FatDataModule.folder(tmp_path, PREPROCESSING, workers=0)
    first = data.calibration.source.name(int(data.calibration.indices[0]))
    (tmp_path / first).write_bytes(b"")
    assert len(data.example_batch(4)[0]) == 4
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(FatError, match="None of the calibration images"):
        data.example_batch()


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, r"data.batch_size is 0; allowed are whole numbers from 1"),
        ({"workers": -1}, r"data.workers is -1"),
        ({"seed": -1}, r"[Ss]eed"),
        ({"train_images": 0}, r"data.train_images is 0"),
        ({"calibration_images": 0}, r"data.calibration_images is 0"),
        (
            {"scale": (0.0, 1.0)},
            r"data.crop_scale is \[0.0, 1.0\]; allowed are two numbers above 0",
        ),
        ({"validation_fraction": 1.5}, r"data.validation_fraction is 1.5"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, r"leave nothing to train on"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    fill(tmp_path, 10)
    with pytest.raises(FatError, match=says):
        FatDataModule.folder(tmp_path, PREPROCESSING, **options)
    if not any("fraction" in key for key in options):
        with pytest.raises(FatError, match=says):
            FatDataModule.photos(PREPROCESSING, **options)


def test_too_few_images(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    with pytest.raises(FatError, match=r"holds 2 image\(s\).*at least 3"):
        FatDataModule.folder(tmp_path, PREPROCESSING)
    fill(tmp_path, 3)
    data = FatDataModule.folder(tmp_path, PREPROCESSING)
    assert [len(getattr(data, split)) for split in SPLITS] == [1, 1, 1, 1]


def test_workers_follow_the_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((1, 0), (2, 1), (4, 3), (64, 8)):
        usable = set(range(cores))
        monkeypatch.setattr(datamodule.os, "sched_getaffinity", lambda pid, u=usable: u)
        assert FatDataModule.photos(PREPROCESSING).workers == workers


@pytest.mark.parametrize(("batch_size", "images"), [(7, 100), (16, 3)])
def test_a_step_must_be_shared_evenly_among_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, images: int
) -> None:
    data = FatDataModule.folder(
        fill(tmp_path, 100), PREPROCESSING, workers=0, batch_size=batch_size
    )
    data.train.indices = data.train.indices[:images]
    data.train_dataloader()  # one process accepts any batch size
    monkeypatch.setattr("fat.utils.distributed.size", lambda: 4)
    with pytest.raises(FatError, match=rf"batch_size is {batch_size}, .*a multiple of 4"):
        data.train_dataloader()
    # Evaluation images are distributed for any batch size.
    assert sum(len(labels) for _, labels in data.test_dataloader()) > 0


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(1, 1, 0), (2, 1, 1), (8, 1, 7), (64, 1, 8), (64, 8, 7), (16, 8, 1), (8, 8, 0), (4, 8, 0)],
)
def test_processes_of_a_machine_divide_its_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, workers: int
) -> None:
    monkeypatch.setattr(datamodule.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert datamodule.usable_workers() == workers
    assert FatDataModule.photos(PREPROCESSING).workers == workers
    assert FatDataModule.photos(PREPROCESSING, workers=3).workers == 3


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_evaluation_end_where_starting_them_is_cheap(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(datamodule.multiprocessing, "get_start_method", lambda: method)
    data = FatDataModule.photos(PREPROCESSING, workers=1)
    assert data.train_dataloader().persistent_workers
    for loader in (data.val_dataloader(), data.test_dataloader(), data.calibration_dataloader()):
        assert loader.persistent_workers == (method == "spawn")
    assert not FatDataModule.photos(PREPROCESSING, workers=0).train_dataloader().persistent_workers


def test_batches_for_a_gpu_are_pinned_and_fetched_further_ahead() -> None:
    data = FatDataModule.photos(PREPROCESSING, workers=1)
    on_cpu, on_gpu = data.train_dataloader().to("cpu"), data.train_dataloader().to("cuda")
    assert (on_cpu.pin_memory, on_cpu.prefetch_factor) == (False, 2)
    assert (on_gpu.pin_memory, on_gpu.prefetch_factor) == (True, 4)
    alone = FatDataModule.photos(PREPROCESSING, workers=0).train_dataloader().to("cuda")
    assert (alone.pin_memory, alone.prefetch_factor) == (True, None)
