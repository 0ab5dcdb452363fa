from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fat.training.resumable_loader import whole
from fat.utils import distributed
from fat.utils.batches import as_batches, counted, passes, split, to_device
from fat.utils.errors import FatError

IMAGES = torch.arange(2.0 * 3 * 4 * 4).reshape(2, 3, 4, 4)
LABELS = torch.tensor([5, 7])


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("cuda", False), ("mps", False)])
def test_only_copies_to_a_device_do_not_wait(
    monkeypatch: pytest.MonkeyPatch, device: str, waits: bool
) -> None:
    """A copy to the CPU that does not wait is a tensor without its values."""
    copies = []

    def record(x: torch.Tensor, target: torch.device, non_blocking: bool = False) -> torch.Tensor:
        copies.append((target.type, not non_blocking))
        return x

    monkeypatch.setattr(torch.Tensor, "to", record)
    to_device((IMAGES, LABELS), torch.device(device))
    assert copies[-2:] == [(device, waits)] * 2


@pytest.mark.parametrize("make", [tuple, list])
def test_images_and_labels(make: type) -> None:
    images, labels = split(make((IMAGES, LABELS)))
    assert images is IMAGES
    assert torch.equal(labels, LABELS)


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES,), [IMAGES], (IMAGES, None)])
def test_images_alone_get_labels_that_mean_unknown(batch: Any) -> None:
    images, labels = split(batch)
    assert images is IMAGES
    assert labels.tolist() == [-1, -1]
    assert labels.dtype == torch.int64


def test_what_comes_after_the_labels_is_ignored() -> None:
    assert torch.equal(split((IMAGES, LABELS, torch.zeros(2)))[1], LABELS)


@pytest.mark.parametrize(
    ("batch", "came"),
    [
        (IMAGES[0], r"\[3, 4, 4\]"),
        (torch.zeros(()), r"\[\]"),
        ((LABELS, IMAGES), r"\[2\]"),
        ([], "list"),
        ((), "tuple"),
        ({"image": IMAGES}, "dict"),
        (None, "NoneType"),
        (("a.jpg", 1), "str"),
        ("a.jpg", "str"),
        (IMAGES.numpy(), "ndarray"),
    ],
)
def test_anything_else_says_what_came_and_what_is_wanted(batch: Any, came: str) -> None:
    wanted = (
        rf"A batch of images is {came}; it must be a tensor \[N, 3, H, W\] or \(images, labels\)"
    )
    with pytest.raises(FatError, match=wanted):
        split(batch)


def test_labels_that_are_no_tensor() -> None:
    with pytest.raises(
        FatError, match=r"labels of a batch are list; they must be an int64 tensor \[N\]"
    ):
        split((IMAGES, [5, 7]))  # type: ignore[arg-type]


def test_one_batch_is_an_iterable_of_one() -> None:
    (only,) = as_batches(IMAGES)
    assert only is IMAGES
    two = [IMAGES, (IMAGES, LABELS)]
    assert as_batches(two) is two


class Loader:
    """A loader whose batches say their epoch, as the product's do by other crops."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch, self.sampler = length, -1, self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([torch.full((2, 3, 4, 4), float(self.epoch))] * self.length)


def test_passes_go_on_with_the_next_epoch() -> None:
    drawn = list(itertools.islice(passes(Loader(2)), 5))
    assert [int(split(batch)[0][0, 0, 0, 0]) for batch in drawn] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("images", [[IMAGES, IMAGES], [(IMAGES, LABELS)] * 2, iter([IMAGES] * 2)])
def test_images_that_would_come_again_come_once(images: Any) -> None:
    assert len(list(passes(images))) == 2
    assert list(passes(IMAGES)) == [IMAGES]


def test_a_loader_without_a_batch_ends_the_passes() -> None:
    assert list(passes(Loader(0))) == []


def test_a_process_may_have_no_batches_if_another_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FatError, match="There are no validation images"):
        counted("validation", [], elsewhere=True)
    monkeypatch.setattr(distributed, "all_max", lambda count: count + 2)  # those of the others
    assert counted("validation", [], elsewhere=True) == ([], 0)
    with pytest.raises(FatError, match="There are no training images"):
        counted("training", [])
    (empty,) = list(whole("validation", [], elsewhere=True))
    assert split(empty)[0].shape == (0, 3, 1, 1)
