from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fat.data.dataset import (
    DistributedBatchSampler,
    EpochSampler,
    ImageDataset,
    ImageLoader,
    SequentialBatchSampler,
    SkippedImages,
    collate,
)
from fat.data.sources.decoding import UnreadableImage
from fat.utils.errors import FatError


class Numbers:
    """Image i has the color i; those in ``bad`` cannot be read."""

    labelled = True

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count = count
        self.bad = bad

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, short_side: int | None = None) -> Image.Image:
        self.asked = short_side
        if index in self.bad:
            raise UnreadableImage(self.name(index), "truncated")
        return Image.new("RGB", (2, 2), (index, index, index))

    def label(self, index: int) -> int:
        return index

    def name(self, index: int) -> str:
        return f"{index}.jpg"


class Noisy:
    """Returns the image's color and a random number; ``finish`` adds them."""

    short_side = 7

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, ...]:
        value = int(np.asarray(image)[0, 0, 0])
        return torch.full((3, 1, 1), value, dtype=torch.uint8), torch.tensor(
            rng.random(), dtype=torch.float64
        )

    def finish(self, *parts: Tensor) -> Tensor:
        colours, drawn = parts
        return colours + drawn.view(-1, 1, 1, 1)


noisy = Noisy()


def loader(data: ImageDataset, batch_size: int = 4, workers: int = 0) -> ImageLoader:
    return ImageLoader(data, batch_size=batch_size, collate_fn=collate, num_workers=workers)


def test_keys_name_the_draw() -> None:
    data = ImageDataset(Numbers(10), noisy, indices=[7, 3], seed=5)
    (pixels, drawn), label = data[1]  # type: ignore[misc]
    assert label == 3
    assert pixels.unique().tolist() == [3]
    assert float(drawn) == np.random.default_rng((5, 0, 3)).random()
    (_, later), _ = data[(2, 1)]  # type: ignore[misc]
    assert float(later) == np.random.default_rng((5, 2, 3)).random()
    data.set_epoch(2)
    assert torch.equal(data[1][0][1], later)  # type: ignore[index]


def test_decoder_is_told_how_many_pixels_are_needed() -> None:
    source = Numbers(3)
    ImageDataset(source, noisy)[0]
    assert source.asked == noisy.short_side


def test_batches_are_finished_together() -> None:
    data = ImageDataset(Numbers(6), noisy, seed=1)
    batches = list(loader(data))
    assert [images.shape for images, _ in batches] == [(4, 3, 1, 1), (2, 3, 1, 1)]
    expected = [i + np.random.default_rng((1, 0, i)).random() for i in range(6)]
    got = torch.cat([images for images, _ in batches])[:, 0, 0, 0]
    assert torch.allclose(got, torch.tensor(expected, dtype=got.dtype))


def test_batches_are_finished_on_the_device_asked_for() -> None:
    data = ImageDataset(Numbers(6), noisy)
    ((images, labels),) = list(loader(data, batch_size=6).to("meta"))
    assert images.device.type == labels.device.type == "meta"


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


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretend to samplers that this process is one of several."""

    def become(rank: int, size: int) -> None:
        monkeypatch.setattr("fat.utils.distributed.rank", lambda: rank)
        monkeypatch.setattr("fat.utils.distributed.size", lambda: size)

    return become


Process = Callable[[int, int], None]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("length", "processes"), [(24, 2), (25, 3), (29, 2), (5, 3)])
def test_processes_share_each_step_that_one_would_have(
    process: Process, length: int, processes: int, drop_last: bool
) -> None:
    size = 2 * processes
    sampler = EpochSampler(length, 7)
    sampler.set_epoch(2)
    batches = DistributedBatchSampler(
        sampler, size, drop_last=drop_last
    )  # created before the process group
    alone = list(batches)
    order = list(sampler)
    expected = [order[i : i + size] for i in range(0, length, size)]
    if drop_last and len(expected[-1]) < size:
        expected.pop()
    assert alone == expected
    assert len(batches) == len(alone)
    shares = []
    for rank in range(processes):
        process(rank, processes)
        assert len(batches) == len(alone)
        shares.append(list(batches))
    for step, whole in enumerate(alone):
        together = [share[step] for share in shares]
        assert sorted(key for part in together for key in part) == sorted(whole)
        assert max(map(len, together)) - min(map(len, together)) <= 1


def test_a_pass_that_starts_later_is_the_rest_of_the_whole_one() -> None:
    batches = DistributedBatchSampler(EpochSampler(10, 0), 3, drop_last=False)
    whole = list(batches)
    batches.skip = 2
    assert list(batches) == whole[2:]
    assert list(batches) == whole  # only that pass


@pytest.mark.parametrize(("length", "processes"), [(24, 2), (25, 3), (4, 3), (1, 2), (9, 1)])
def test_processes_share_whole_batches_and_every_image_once(
    process: Process, length: int, processes: int
) -> None:
    batches = SequentialBatchSampler(length, 4)
    alone = list(batches)
    assert alone == [list(range(i, min(i + 4, length))) for i in range(0, length, 4)]
    shares = []
    for rank in range(processes):
        process(rank, processes)
        shares.append(list(batches))
        assert len(batches) == len(shares[-1])  # no batch for some processes
    assert sorted(batch for share in shares for batch in share) == sorted(alone)


def stepping(data: ImageDataset, workers: int = 0) -> ImageLoader:
    batches = DistributedBatchSampler(EpochSampler(len(data), 0), 4, drop_last=False)
    return ImageLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_starts_later_loads_the_rest_alone(workers: int) -> None:
    whole = [labels.tolist() for _, labels in stepping(ImageDataset(Numbers(18), noisy))]
    source = Numbers(18, bad=tuple(whole[0] + whole[1]))  # skipped images are never opened
    later = stepping(ImageDataset(source, noisy), workers)
    later.start_at(2)
    assert len(later) == 5
    drawn = []
    got = []
    for _, labels in later:
        got.append(labels.tolist())
        drawn.append(later.drawn)
    assert got == whole[2:]
    assert drawn == [3, 4, 5]
    assert not later.dataset.skipped  # type: ignore[attr-defined]
    healthy = stepping(ImageDataset(Numbers(18), noisy))
    healthy.start_at(2)
    list(healthy)
    assert [labels.tolist() for _, labels in healthy] == whole  # the next pass is complete


def test_batches_of_nothing_count_as_drawn() -> None:
    order = [p for _, p in EpochSampler(120, 0)]
    batches = stepping(ImageDataset(Numbers(120, bad=tuple(order[4:8])), noisy))
    numbers = [batches.drawn for _ in batches]
    assert numbers == [1, *range(3, 31)]


def test_only_training_images_start_later() -> None:
    data = ImageDataset(Numbers(8), noisy)
    judged = ImageLoader(data, batch_sampler=SequentialBatchSampler(8, 4), collate_fn=collate)
    with pytest.raises(FatError, match="Only a loader of training images"):
        judged.start_at(1)


def test_a_process_without_images_of_a_step_stops_all_of_them(process: Process) -> None:
    order = [p for _, p in EpochSampler(80, 0)]
    batches = stepping(ImageDataset(Numbers(80, bad=(order[1], order[3])), noisy))
    process(0, 2)
    assert [len(labels) for _, labels in batches] == [2] * 20
    process(1, 2)
    with pytest.raises(FatError, match=rf"others would wait.*{order[1]}\.jpg.*one process"):
        list(batches)


def test_collate_drops_the_unreadable() -> None:
    good = ((torch.ones(3, 2, 2), torch.ones(5)), 4)
    parts, labels, skipped, fatal = collate([good, UnreadableImage("a", "b"), good])
    assert [part.shape for part in parts] == [(2, 3, 2, 2), (2, 5)]
    assert labels.tolist() == [4, 4]
    assert labels.dtype == torch.int64
    assert skipped == [("a", "b")]
    assert not fatal
    parts, labels, _, _ = collate([UnreadableImage("a", "b")])
    assert len(parts) == len(labels) == 0


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


def test_names_are_those_of_the_images_that_come() -> None:
    data = ImageDataset(Numbers(80, bad=(5, 41)), noisy, indices=[7, 5, 3, *range(10, 60)])
    assert data.readable_names()[:3] == ["7.jpg", "5.jpg", "3.jpg"]
    labels = torch.cat([labels for _, labels in loader(data)])
    assert data.readable_names() == [f"{label}.jpg" for label in labels.tolist()]


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
    class Broken(Noisy):
        def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, ...]:
            raise ValueError("a mistake of the program")

    with pytest.raises(ValueError, match="a mistake"):
        list(loader(ImageDataset(Numbers(4), Broken())))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_another_stops_the_run(workers: int) -> None:
    """The message is the same for every process."""

    class Changed(Numbers):
        def load(self, index: int, short_side: int | None = None) -> Image.Image:
            if index == 6:
                raise FatError("The image 6.jpg has changed.")
            return super().load(index)

    with pytest.raises(FatError, match=r"^The image 6\.jpg has changed\.$"):
        list(loader(ImageDataset(Changed(8), noisy), workers=workers))


def test_images_are_left_out_for_good() -> None:
    data = ImageDataset(Numbers(5), noisy, indices=[4, 2, 0])
    data.keep([True, False, True])
    assert data.indices.tolist() == [4, 0]
    assert (len(data), data.skipped.total) == (2, 2)
    with pytest.raises(FatError, match="No given image is left"):
        data.keep([False, False])


def test_empty_split_and_negative_seed() -> None:
    with pytest.raises(FatError, match="test split has no image"):
        ImageDataset(Numbers(4), noisy, indices=[], split="test")
    with pytest.raises(FatError, match="seed is -1"):
        ImageDataset(Numbers(4), noisy, seed=-1)
