from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fat.utils.precision import full_precision

CUDA = torch.device("cuda")
cudnn: Any = torch.backends.cudnn
SETTINGS: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)


def state() -> tuple[Any, ...]:
    """All options of TF32, today's and earlier ones; reading them must not raise."""
    return (
        *(setting.fp32_precision for setting in SETTINGS),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = state()
    yield
    torch.set_float32_matmul_precision(before[3])
    torch.backends.cudnn.allow_tf32 = before[5]
    for setting, precision in zip(SETTINGS, before, strict=False):
        setting.fp32_precision = precision


def earlier(precision: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(precision)


def no_tf32_in_cudnn() -> None:
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize(
    "chosen", [lambda: None, earlier("high"), earlier("medium"), no_tf32_in_cudnn]
)
def test_tf32_is_off_inside_and_as_before_outside(chosen: Callable[[], None]) -> None:
    chosen()
    before = state()
    with full_precision(CUDA):
        assert state() == ("ieee", "ieee", "ieee", "highest", False, False)
        with full_precision(CUDA):
            pass
        assert state() == ("ieee", "ieee", "ieee", "highest", False, False)
    assert state() == before


def test_options_that_contradict_each_other_stay() -> None:
    cudnn.conv.fp32_precision = "ieee"  # and rnn is tf32: allow_tf32 cannot be read
    with pytest.raises(RuntimeError):
        state()
    before = [setting.fp32_precision for setting in SETTINGS]
    with full_precision(CUDA):
        assert {setting.fp32_precision for setting in SETTINGS} == {"ieee"}
    assert [setting.fp32_precision for setting in SETTINGS] == before
    cudnn.conv.fp32_precision = "tf32"  # the fixture can read it


def test_an_error_inside_restores_them() -> None:
    before = state()
    with pytest.raises(KeyError), full_precision(CUDA):
        raise KeyError
    assert state() == before


def test_bf16_is_off_inside_on_a_cpu() -> None:
    settings = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
    torch.set_float32_matmul_precision("medium")
    before = [setting.fp32_precision for setting in settings]
    assert before[0] == "bf16"
    with full_precision(torch.device("cpu")):
        assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
        assert torch.get_float32_matmul_precision() == "highest"
    assert [setting.fp32_precision for setting in settings] == before
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_options_of_other_devices_are_as_before_outside(device: str) -> None:
    settings = (*SETTINGS, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
    before = [setting.fp32_precision for setting in settings]
    with full_precision(torch.device(device)):
        pass
    assert [setting.fp32_precision for setting in settings] == before


def test_autocast_is_off_inside() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision(torch.device("cpu")):
            assert (x @ x).dtype == torch.float32
