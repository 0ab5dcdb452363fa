from __future__ import annotations

import torch

from fat.utils.deferred import Deferred


def test_the_value_is_that_of_the_time_of_the_copy() -> None:
    value = torch.arange(3.0, requires_grad=True)
    deferred = Deferred(value)
    with torch.no_grad():
        value.zero_()
    assert deferred.tensor().tolist() == [0.0, 1.0, 2.0]
    assert not deferred.tensor().requires_grad
