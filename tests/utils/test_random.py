from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from fat.utils import random as fat_random
from fat.utils.random import random_states, set_random_states


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_states_are_restored() -> None:
    states = random_states()
    expected = draws()
    set_random_states(states)
    assert draws() == expected


@pytest.mark.parametrize("saved", [0, 1, 8])
def test_states_of_gpus_are_restored_where_they_fit(
    saved: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    restored: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    state = torch.zeros(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state])
    monkeypatch.setattr(
        torch.cuda, "set_rng_state_all", lambda states: restored.append(len(states))
    )
    fat_random._log_difference.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(3):
            set_random_states({**random_states(), "cuda": [state] * saved})
    assert restored == ([1] * 3 if saved == 1 else [])
    message = f"has the random states of {saved} GPU(s), and this process has 1: GPUs start"
    assert caplog.text.count(message) == (saved != 1)


def test_a_process_without_gpus_ignores_their_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    states = {**random_states(), "cuda": [torch.zeros(16, dtype=torch.uint8)]}
    expected = draws()
    set_random_states(states)
    assert draws() == expected
