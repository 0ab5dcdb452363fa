from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fat.evaluation.metrics import Comparison
from fat.quant.metrics import agreement, logits_sqnr_db, sqnr_db


def make(seed: int, images: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher, and labels of which some are unknown."""
    generator = torch.Generator().manual_seed(seed)
    reference = 3.0 * torch.randn(images, classes, generator=generator)
    logits = reference + torch.randn(images, classes, generator=generator)
    labels = torch.randint(-1, classes, (images,), generator=generator)
    return logits, reference, labels


def plain(logits: Tensor, reference: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Compute the same metrics with NumPy in float64."""
    student, teacher = logits.double().numpy(), reference.double().numpy()
    order = np.argsort(-student, axis=1)
    known = labels.numpy() >= 0
    hits = order[known] == labels.numpy()[known, None]
    noise = np.sum((student - teacher) ** 2)
    return {
        "top1": 100.0 * float(np.mean(hits[:, :1].any(axis=1))) if known.any() else None,
        "top5": 100.0 * float(np.mean(hits[:, :5].any(axis=1))) if known.any() else None,
        "agreement": 100.0 * float(np.mean(student.argmax(1) == teacher.argmax(1))),
        "sqnr_db": 10.0 * math.log10(np.sum(teacher**2) / noise),
        "rmse": math.sqrt(noise / student.size),
    }


@given(
    seed=st.integers(0, 2**31),
    images=st.integers(1, 40),
    classes=st.integers(2, 12),
    batch=st.integers(1, 15),
)
@settings(deadline=None, max_examples=40)
def test_comparison_is_the_plain_formula_in_batches_of_any_size(
    seed: int, images: int, classes: int, batch: int
) -> None:
    data = make(seed, images, classes)
    metric = Comparison()
    for part in zip(*(tensor.split(batch) for tensor in data), strict=True):
        metric.update(*part)
    wanted = plain(*data)
    found = metric.compute()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == (None if value is None else pytest.approx(value, rel=1e-9)), name
    json.dumps(found, allow_nan=False)


def test_counts_are_exact() -> None:
    logits, reference, labels = make(0, 997, 7)
    known = labels >= 0
    metric = Comparison()
    metric.update(logits, reference, labels)
    hits = int((logits.argmax(1) == labels)[known].sum())
    assert metric.compute()["top1"] == 100.0 * hits / int(known.sum())


def test_images_without_label_count_for_agreement_only() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    metric = Comparison()
    metric.update(logits, reference, torch.tensor([0, -1, 1]))
    found = metric.compute()
    assert found["top1"] == 50.0
    assert found["agreement"] == pytest.approx(200 / 3)
    nothing = Comparison()
    nothing.update(logits, reference, torch.full((3,), -1))
    assert (nothing.compute()["top1"], nothing.compute()["top5"]) == (None, None)
    assert nothing.compute()["agreement"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_five_guesses_among_five_classes_or_fewer_are_always_right(classes: int) -> None:
    metric = Comparison()
    metric.update(*(torch.randn(9, classes) for _ in range(2)), torch.arange(9) % classes)
    assert metric.compute()["top5"] == 100.0


def test_six_classes_may_miss() -> None:
    logits = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]).repeat(2, 1)
    metric = Comparison()
    metric.update(logits, logits, torch.tensor([4, 5]))
    assert metric.compute()["top5"] == 50.0


def test_nothing_came() -> None:
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        found = Comparison().compute()
    assert set(found.values()) == {None}


def test_reset_forgets() -> None:
    metric = Comparison()
    metric.update(*make(0, 5, 4))
    metric.reset()
    data = make(1, 6, 4)
    metric.update(*data)
    assert metric.compute()["rmse"] == pytest.approx(plain(*data)["rmse"])


def test_two_devices_are_one() -> None:
    data = make(2, 20, 8)
    halves = [Comparison(), Comparison()]
    for metric, part in zip(halves, zip(*(t.split(13) for t in data), strict=True), strict=True):
        metric.update(*part)
    both = Comparison()
    for name in both.metric_state:
        # dist_reduce_fx="sum" is what torchmetrics does between devices.
        setattr(both, name, sum(getattr(metric, name) for metric in halves))
    both._update_count = 2
    whole = Comparison()
    whole.update(*data)
    assert both.compute() == pytest.approx(whole.compute())


def test_sums_do_not_lose_small_errors_beside_large_ones() -> None:
    reference = torch.full((4, 1000), 1e4)
    metric = Comparison()
    for _ in range(50):
        metric.update(reference + 1.0, reference, torch.full((4,), -1))
    assert metric.compute()["sqnr_db"] == pytest.approx(80.0)
    assert metric.compute()["rmse"] == pytest.approx(1.0)


@given(signal=st.floats(1e-12, 1e12), decibel=st.floats(-150.0, 150.0))
@settings(deadline=None, max_examples=50)
def test_decibels_are_ten_times_the_exponent(signal: float, decibel: float) -> None:
    assert sqnr_db(signal, signal / 10 ** (decibel / 10)) == pytest.approx(decibel, abs=1e-9)


@pytest.mark.parametrize(
    ("signal", "noise", "wanted"),
    [
        (1.0, 0.0, 200.0),
        (0.0, 0.0, 200.0),
        (0.0, 1.0, -200.0),
        (1.0, 1e-30, 200.0),
        (1e-300, 1e300, -200.0),
        (5e-324, 1e308, -200.0),
        (1.0, math.inf, -200.0),
        (1.0, math.nan, -200.0),
        (math.nan, math.nan, -200.0),
    ],
)
def test_decibels_that_json_can_hold(signal: float, noise: float, wanted: float) -> None:
    assert sqnr_db(signal, noise) == wanted


def test_a_network_that_broke_down_does_not_look_perfect() -> None:
    reference = torch.randn(3, 5)
    assert logits_sqnr_db(reference, torch.full((3, 5), torch.nan)) == -200.0
    metric = Comparison()
    metric.update(torch.full((3, 5), torch.nan), reference, torch.full((3,), -1))
    assert metric.compute()["sqnr_db"] == -200.0


def test_functions_against_numpy() -> None:
    logits, reference, labels = make(3, 50, 6)
    wanted = plain(logits, reference, labels)
    assert agreement(reference, logits) == pytest.approx(wanted["agreement"])
    assert logits_sqnr_db(reference, logits) == pytest.approx(wanted["sqnr_db"])
    assert logits_sqnr_db(reference, reference) == 200.0
