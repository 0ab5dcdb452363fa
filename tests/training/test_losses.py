from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fat import FatError
from fat.training.config import LossName
from fat.training.losses import (
    LOSSES,
    authors_code,
    cosine,
    kl,
    label_loss,
    make_loss,
    mse,
    relative_error,
    rmse,
)


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


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@given(**SHAPES)
@settings(deadline=None, max_examples=40)
def test_mse_and_its_gradient(seed: int, images: int, classes: int, scale: float) -> None:
    teacher, student = logits(seed, images, classes, scale)
    loss = mse(teacher, student)
    loss.backward()
    difference = student.detach().numpy().astype(np.float64) - teacher.numpy()
    np.testing.assert_allclose(loss.item(), np.mean(difference**2), rtol=1e-5)
    assert student.grad is not None
    np.testing.assert_allclose(
        student.grad.numpy(), 2 * difference / difference.size, rtol=1e-4, atol=1e-12
    )


@given(**SHAPES, temperature=st.sampled_from([0.5, 1.0, 4.0, 20.0]))
@settings(deadline=None, max_examples=40)
def test_kl_and_its_gradient(
    seed: int, images: int, classes: int, scale: float, temperature: float
) -> None:
    teacher, student = logits(seed, images, classes, scale)
    loss = kl(teacher, student, temperature)
    loss.backward()
    z_t = teacher.numpy().astype(np.float64) / temperature
    z_a = student.detach().numpy().astype(np.float64) / temperature
    p, q = softmax(z_t), softmax(z_a)

    def log_softmax(z: np.ndarray) -> np.ndarray:
        top = z.max(axis=1, keepdims=True)
        return z - top - np.log(np.exp(z - top).sum(axis=1, keepdims=True))

    wanted = temperature**2 * np.mean(np.sum(p * (log_softmax(z_t) - log_softmax(z_a)), axis=1))
    np.testing.assert_allclose(loss.item(), wanted, rtol=1e-4, atol=1e-6 * temperature**2)
    assert loss.item() >= -1e-7 * temperature**2
    assert student.grad is not None
    # ∂KL/∂z_A = (q − p) / T
    np.testing.assert_allclose(
        student.grad.numpy(), temperature * (q - p) / images, rtol=1e-4, atol=3e-6 * temperature
    )


def test_kl_at_a_high_temperature_compares_the_logits_themselves() -> None:
    # Hinton et al. 2015, eq. 4: gradient (z_A − z_T) / classes for logits of zero mean.
    teacher, student = logits(0, 3, 10, 1.0)
    student = (student.detach() - student.detach().mean(1, keepdim=True)).requires_grad_()
    teacher = teacher - teacher.mean(1, keepdim=True)
    kl(teacher, student, 1000.0).backward()
    assert student.grad is not None
    torch.testing.assert_close(
        student.grad, (student.detach() - teacher) / 10 / 3, rtol=1e-2, atol=1e-3
    )


def test_kl_of_certain_networks_stays_finite() -> None:
    teacher = torch.tensor([[1e4, 0.0, -1e4]])
    student = torch.tensor([[-1e4, 0.0, 1e4]], requires_grad=True)
    loss = kl(teacher, student)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert student.grad is not None
    assert student.grad.tolist() == [[-1.0, 0.0, 1.0]]


@given(**SHAPES)
@settings(deadline=None, max_examples=40)
def test_cosine_and_its_gradient(seed: int, images: int, classes: int, scale: float) -> None:
    teacher, student = logits(seed, images, classes + 1, scale)
    loss = cosine(teacher, student)
    loss.backward()
    z_t, z_a = teacher.numpy().astype(np.float64), student.detach().numpy().astype(np.float64)
    norm_a = np.linalg.norm(z_a, axis=1, keepdims=True)
    u_t, u_a = z_t / np.linalg.norm(z_t, axis=1, keepdims=True), z_a / norm_a
    cos = np.sum(u_t * u_a, axis=1, keepdims=True)
    np.testing.assert_allclose(loss.item(), np.mean(1 - cos), rtol=1e-5, atol=1e-7)
    assert student.grad is not None
    np.testing.assert_allclose(
        student.grad.numpy(),
        -(u_t - cos * u_a) / norm_a / images,
        rtol=1e-3,
        atol=float(1e-6 / norm_a.min()),
    )


def test_what_each_loss_is_blind_to() -> None:
    teacher, _ = logits(1, 4, 10, 3.0)
    for name in LOSSES:
        scaled, shifted = (float(LOSSES[name](teacher, z)) for z in (2 * teacher, teacher + 5))
        assert (scaled < 1e-6) is (name == "cosine"), name
        assert (shifted < 1e-6) is (name == "kl"), name


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3])
def test_equal_logits_give_a_gradient_of_zero(name: LossName, scale: float) -> None:
    student = (scale * torch.randn(4, 10)).requires_grad_()
    loss = LOSSES[name](student.detach().clone(), student)
    loss.backward()
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros(4, 10))
    least = 10 * 1e-5**0.5 if name == "authors_code" else 0.0
    assert loss.item() == pytest.approx(least, abs=1e-6)


def test_a_temperature_is_for_kl() -> None:
    teacher, student = (z.detach() for z in logits(2, 4, 10, 3.0))
    for name in LOSSES:
        warm, cold = (float(make_loss(name, t)(teacher, student)) for t in (4.0, 1.0))
        assert cold == float(LOSSES[name](teacher, student))
        assert (warm != cold) is (name == "kl")
    assert float(make_loss("kl", 4.0)(teacher, student)) == float(kl(teacher, student, 4.0))


# --- terms --------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), scales=st.lists(st.sampled_from([1e-4, 1.0, 1e4]), min_size=1))
@settings(deadline=None, max_examples=40)
def test_relative_error_and_its_gradient(seed: int, scales: list[float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    exact = [s * torch.randn(3, 2 + i, 4, generator=generator) for i, s in enumerate(scales)]
    given_ = [
        (f + 0.1 * s * torch.randn(f.shape, generator=generator)).requires_grad_()
        for f, s in zip(exact, scales, strict=True)
    ]
    loss = relative_error(exact, given_)
    loss.backward()
    shares = []
    for f_t, f_a in zip(exact, given_, strict=True):
        t, a = f_t.numpy().astype(np.float64), f_a.detach().numpy().astype(np.float64)
        shares.append(np.sum((t - a) ** 2) / np.sum(t**2))
        assert f_a.grad is not None
        gradient = 2 * (a - t) / np.sum(t**2) / len(scales)
        np.testing.assert_allclose(
            f_a.grad.numpy(), gradient, rtol=1e-3, atol=1e-5 * np.abs(gradient).max()
        )
    np.testing.assert_allclose(loss.item(), np.mean(shares), rtol=1e-4)


def test_relative_error_of_a_dead_place_and_of_half_precision() -> None:
    nothing = [torch.zeros(2, 3)]
    assert relative_error(nothing, nothing).item() == 0.0
    large = [torch.full((2, 3), 6e4, dtype=torch.float16)]  # its square is no float16
    assert relative_error(large, [0.5 * large[0]]).item() == pytest.approx(0.25, rel=1e-3)
    with pytest.raises(ValueError, match="shorter"):
        relative_error([*large, *large], large)


LABELS = {
    "all": [3, 0, 9, 1],
    "some": [3, -1, 9, -1],
    "other marks for unknown": [-100, 2, -7, 2],
    "none": [-1, -1, -1, -1],
}


@pytest.mark.parametrize("case", LABELS)
def test_label_loss_and_its_gradient(case: str) -> None:
    _, student = logits(4, 4, 10, 3.0)
    labels = np.array(LABELS[case])
    loss = label_loss(student, torch.tensor(labels))
    loss.backward()
    q = softmax(student.detach().numpy().astype(np.float64))
    known = np.flatnonzero(labels >= 0)
    wanted = np.zeros_like(q)
    wanted[known] = q[known]
    wanted[known, labels[known]] -= 1
    count = max(len(known), 1)
    np.testing.assert_allclose(
        loss.item(), -np.log(q[known, labels[known]]).sum() / count, rtol=1e-5
    )
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), wanted / count, rtol=1e-4, atol=1e-7)


def test_a_label_beyond_the_classes_is_named() -> None:
    with pytest.raises(FatError, match=r"label is 10, but .* 0 to 9.*optim\.label_weight=0"):
        label_loss(torch.zeros(2, 10), torch.tensor([-1, 10]))


def test_the_paper_averages_over_all_and_the_code_sums_over_classes() -> None:
    teacher, student = torch.zeros(2, 3), torch.full((2, 3), 2.0)
    assert rmse(teacher, student).item() == pytest.approx(2.0)
    assert authors_code(teacher, student).item() == pytest.approx(6.0, rel=1e-5)


def test_every_name_has_its_loss() -> None:
    assert set(LOSSES) == set(get_args(LossName))
