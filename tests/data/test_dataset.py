from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fat.data.dataset import (
    EpochSampler,
    ImageDataset,
    ImageLoader,
    SkippedImages,
    collate,
)
from fat.data.images import UnreadableImage
from fat.errors import FatError


class Numbers:
    """Image i has the colour i; those in ``bad`` cannot be read."""

    labelled = True

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count = count
        self.bad = bad

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> Image.Image:
        if index in self.bad:
            raise UnreadableImage(self.name(index), "truncated")
        return Image.new("RGB", (2, 2), (index, index, index))

    def label(self, index: int) -> int:
        return index

    def name(self, index: int) -> str:
        return f"{index}.jpg"


def noisy(image: Image.Image, rng: np.random.Generator) -> Tensor:
    value = float(np.asarray(image)[0, 0, 0])
    return torch.full((3, 1, 1), value) + float(rng.random())


def loader(data: ImageDataset, batch_size: int = 4, workers: int = 0) -> ImageLoader:
    return ImageLoader(data, batch_size=batch_size, collate_fn=collate, num_workers=workers)


def test_keys_name_the_draw() -> None:
    data = ImageDataset(Numbers(10), noisy, indices=[7, 3], seed=5)
    pixels, label = data[1]  # type: ignore[misc]
    assert label == 3
    assert float(pixels[0]) == pytest.approx(3 + np.random.default_rng((5, 0, 3)).random())
    later, _ = data[(2, 1)]  # type: ignore[misc]
    assert float(later[0]) == pytest.approx(3 + np.random.default_rng((5, 2, 3)).random())
    data.set_epoch(2)
    assert torch.equal(data[1][0], later)  # type: ignore[index]


def test_sampler_visits_all_and_follows_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = EpochSampler(50, seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == 50
        return list(sampler)

    assert sorted(order(0, 3)) == [(3, i) for i in range(50)]
    assert order(0, 3) == order(0, 3)
    assert [p for _, p in order(0, 3)] != [p for _, p in order(0, 4)]
    assert order(0, 3) != order(1, 3)


def test_collate_drops_the_unreadable() -> None:
    good = (torch.ones(3, 2, 2), 4)
    images, labels, skipped = collate([good, UnreadableImage("a", "b"), good])
    assert images.shape == (2, 3, 2, 2)
    assert labels.tolist() == [4, 4]
    assert labels.dtype == torch.int64
    assert skipped == [("a", "b")]
    images, labels, _ = collate([UnreadableImage("a", "b")])
    assert len(images) == len(labels) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_and_counted_once(
    caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    data = ImageDataset(Numbers(80, bad=(5, 41)), noisy, split="training")
    batches = loader(data, workers=workers)
    for _ in range(2):
        labels = torch.cat([labels for _, labels in batches])
        assert sorted(labels.tolist()) == sorted(set(range(80)) - {5, 41})
    assert data.skipped.reasons == {"5.jpg": "truncated", "41.jpg": "truncated"}
    told = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 1
    assert told[0].getMessage() == (
        "Skipped 2 of the 80 training images, which cannot be read: 5.jpg (truncated), "
        "41.jpg (truncated)."
    )


def test_batch_of_nothing_is_left_out() -> None:
    data = ImageDataset(Numbers(100, bad=(4, 5, 6, 7)), noisy)
    assert sum(1 for _ in loader(data)) == 24


def test_warned_even_if_the_end_is_never_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    data = ImageDataset(Numbers(40, bad=(0,)), noisy)
    batches = iter(loader(data))
    for _ in range(10):
        next(batches)
    assert "Skipped 1 of the 40" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images(workers: int) -> None:
    data = ImageDataset(Numbers(40, bad=(1, 2, 3)), noisy, split="test")
    with pytest.raises(
        FatError, match=r"3 of the 40 test images.*more than 5%: 1.jpg .*data.root="
    ):
        list(loader(data, workers=workers))


def test_exactly_five_percent_is_allowed() -> None:
    skipped = SkippedImages("test", 100)
    skipped.add([(str(i), "bad") for i in range(5)])
    skipped.add([(str(i), "bad") for i in range(5)])
    with pytest.raises(FatError, match="6 of the 100"):
        skipped.add([("one more", "bad")])


def test_other_errors_are_not_swallowed() -> None:
    def broken(image: Image.Image, rng: np.random.Generator) -> Tensor:
        raise ValueError("a mistake of the program")

    with pytest.raises(ValueError, match="a mistake"):
        list(loader(ImageDataset(Numbers(4), broken)))


def test_empty_split_and_negative_seed() -> None:
    with pytest.raises(FatError, match="test split has no image"):
        ImageDataset(Numbers(4), noisy, indices=[], split="test")
    with pytest.raises(FatError, match="seed is -1"):
        ImageDataset(Numbers(4), noisy, seed=-1)
