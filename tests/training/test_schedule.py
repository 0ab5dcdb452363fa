from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LRScheduler

from fat.training.config import TrainSpec
from fat.training.schedule import learning_rate, starts_cycle


def torch_rates(make: type[LRScheduler], period: int, steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer, period)  # type: ignore[call-arg, arg-type]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("period", [1, 2, 7, 20])
def test_cosine_is_torchs_warm_restart(period: int) -> None:
    spec = TrainSpec(lr=0.3, schedule="cosine", period=period)
    own = [learning_rate(spec, step, 50) for step in range(50)]
    assert own == pytest.approx(torch_rates(CosineAnnealingWarmRestarts, period, 50, 0.3))


def test_cosine_without_a_period_is_one_cycle_over_all() -> None:
    spec = TrainSpec(lr=0.3, schedule="cosine", period=None)
    own = [learning_rate(spec, step, 50) for step in range(50)]
    assert own == pytest.approx(torch_rates(CosineAnnealingLR, 50, 50, 0.3), abs=1e-12)


@given(step=st.integers(0, 5000), period=st.integers(1, 600), lr=st.floats(1e-6, 1.0))
@settings(deadline=None, max_examples=60)
def test_authors_code_formula(step: int, period: int, lr: float) -> None:
    spec = TrainSpec(lr=lr, schedule="authors_code", period=period)
    since = step - period * (step // period)
    wanted = lr * np.exp(-1e-4 * step) * np.abs(np.cos(np.pi * since / (4 * period))) + 1e-7
    assert learning_rate(spec, step, 5000) == pytest.approx(wanted, rel=1e-12)


def test_authors_code_falls_to_about_seven_tenths_and_restarts() -> None:
    spec = TrainSpec(lr=1e-3, schedule="authors_code", period=400)
    rates = [learning_rate(spec, step, 1000) for step in range(401)]
    assert rates[0] == pytest.approx(1e-3 + 1e-7)
    assert rates[399] == pytest.approx(1e-3 * np.exp(-0.0399) * np.cos(np.pi / 4), rel=5e-3)
    assert rates[400] == pytest.approx(1e-3 * np.exp(-0.04) + 1e-7)


@pytest.mark.parametrize("step", [0, 1, 17, 999])
def test_constant(step: int) -> None:
    assert learning_rate(TrainSpec(lr=0.25, schedule="constant", period=4), step, 1000) == 0.25


@pytest.mark.parametrize("schedule", ["cosine", "authors_code", "constant"])
def test_no_steps_at_all(schedule: str) -> None:
    assert learning_rate(TrainSpec(lr=0.5, schedule=schedule), 0, 0) == pytest.approx(0.5, abs=1e-6)  # type: ignore[arg-type]


def test_cycles_start_every_period_but_not_at_the_first_step() -> None:
    spec = TrainSpec(period=3)
    assert [step for step in range(10) if starts_cycle(spec, step)] == [3, 6, 9]
    assert not any(starts_cycle(TrainSpec(period=None), step) for step in range(10))
    # The rate returns to its start exactly there.
    assert [step for step in range(1, 10) if learning_rate(spec, step, 10) == spec.lr] == [3, 6, 9]
