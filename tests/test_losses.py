from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fat.losses import LOSSES, authors_code, rmse
from fat.spec import LossName


def logits(seed: int, images: int, classes: int, scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = scale * torch.randn(2, images, classes, generator=generator)
    return both[0], both[1].requires_grad_()


SHAPES = {
    "seed": st.integers(0, 2**31),
    "images": st.integers(1, 9),
    "classes": st.integers(1, 30),
    "scale": st.sampled_from([1e-6, 1e-2, 1.0, 100.0]),
}


@given(**SHAPES)
@settings(deadline=None, max_examples=40)
def test_rmse_and_its_gradient(seed: int, images: int, classes: int, scale: float) -> None:
    teacher, student = logits(seed, images, classes, scale)
    loss = rmse(teacher, student)
    loss.backward()
    difference = student.detach().numpy().astype(np.float64) - teacher.numpy()
    wanted = np.sqrt(np.sum(difference**2) / difference.size)
    np.testing.assert_allclose(loss.item(), wanted, rtol=1e-5)
    assert student.grad is not None
    # d √(Σδ²/n) / dδ = δ / (n·√(Σδ²/n))
    np.testing.assert_allclose(
        student.grad.numpy(), difference / (difference.size * wanted), rtol=1e-4, atol=1e-9
    )


@given(**SHAPES)
@settings(deadline=None, max_examples=40)
def test_authors_code_and_its_gradient(seed: int, images: int, classes: int, scale: float) -> None:
    teacher, student = logits(seed, images, classes, scale)
    loss = authors_code(teacher, student)
    loss.backward()
    difference = student.detach().numpy().astype(np.float64) - teacher.numpy()
    root = np.sqrt(difference**2 + 1e-5)
    np.testing.assert_allclose(loss.item(), np.mean(np.sum(root, axis=1)), rtol=1e-5)
    assert student.grad is not None
    np.testing.assert_allclose(
        student.grad.numpy(), difference / root / images, rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("name", LOSSES)
def test_equal_logits_give_a_gradient_of_zero(name: LossName) -> None:
    student = torch.randn(4, 10, requires_grad=True)
    loss = LOSSES[name](student.detach().clone(), student)
    loss.backward()
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros(4, 10))
    assert loss.item() == pytest.approx(0.0 if name == "rmse" else 10 * 1e-5**0.5, abs=1e-6)


def test_the_paper_averages_over_all_and_the_code_sums_over_classes() -> None:
    teacher, student = torch.zeros(2, 3), torch.full((2, 3), 2.0)
    assert rmse(teacher, student).item() == pytest.approx(2.0)
    assert authors_code(teacher, student).item() == pytest.approx(6.0, rel=1e-5)


def test_every_name_has_its_loss() -> None:
    assert set(LOSSES) == set(get_args(LossName))
