from __future__ import annotations

from typing import Any

import pytest
import torch

from fat.batches import as_batches, split
from fat.errors import FatError

IMAGES = torch.arange(2.0 * 3 * 4 * 4).reshape(2, 3, 4, 4)
LABELS = torch.tensor([5, 7])


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
    wanted = rf"A batch of images is {came}; wanted a tensor \[N, 3, H, W\], or \(images, labels\)"
    with pytest.raises(FatError, match=wanted):
        split(batch)


def test_labels_that_are_no_tensor() -> None:
    with pytest.raises(FatError, match=r"labels of a batch are list; wanted an int64 tensor \[N\]"):
        split((IMAGES, [5, 7]))  # type: ignore[arg-type]


def test_one_batch_is_an_iterable_of_one() -> None:
    (only,) = as_batches(IMAGES)
    assert only is IMAGES
    two = [IMAGES, (IMAGES, LABELS)]
    assert as_batches(two) is two
