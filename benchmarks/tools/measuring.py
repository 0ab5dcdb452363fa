"""Measurements of calls on a device: time, kernels, bytes, peak memory."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tools.counting import kernels, traffic
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report its start and end

__all__ = ["Call", "Counter", "Device", "Row", "Rows", "Turns", "cost", "ratio", "take_turns"]

Call = Callable[[], object]
Row = dict[str, Any]
"""Metrics of a call by name, as in the columns of gpu.py."""
Rows = dict[str, Row]


class Device:
    """The measured device.

    Args:
        kind: ``"cuda"`` or ``"cpu"``.
    """

    def __init__(self, kind: str) -> None:
        self.torch = torch.device(kind)
        self.is_gpu = kind == "cuda"

    def wait(self) -> None:
        """Wait until everything that was started is done."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Free memory that is no longer used."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def start_peak(self) -> int:
        """Start a measurement of the peak and return the bytes in use."""
        if not self.is_gpu:
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int | None:
        """Return the largest number of bytes in use since then; ``None`` on a CPU."""
        return torch.cuda.max_memory_allocated() if self.is_gpu else None


class Counter(TorchDispatchMode):
    """Counts the kernels of operations and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Count an operation."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if launched := kernels(func, args):
            self.kernels += launched
            self.bytes += sum(traffic(func, args, kwargs, result))
        return result


def cost(call: Call, device: Device) -> Row:
    """Return kernels, bytes, launches and peak memory of a call; it is called four times."""
    device.wait()
    before = device.start_peak()
    call()
    call()
    device.wait()
    peak = device.peak()
    with Counter() as counted:
        call()
    launches, busy = profiled(call, device)
    return {
        "kernels": counted.kernels,
        "GB": counted.bytes / 1e9,
        "launches": launches,
        "busy ms": busy,
        "peak MB": None if peak is None else (peak - before) / 1e6,
    }


def profiled(call: Call, device: Device) -> tuple[int, float]:
    """Return the number of kernels, copies and fills on the device and their milliseconds.

    On a CPU these are the operations and the time of their own.
    """
    kind = ProfilerActivity.CUDA if device.is_gpu else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        call()
        device.wait()
    wanted = DeviceType.CUDA if device.is_gpu else DeviceType.CPU
    events = [
        event
        for event in profiler.key_averages()
        if event.device_type == wanted and not event.is_user_annotation  # ranges of kernels
    ]
    microseconds = sum(
        event.self_device_time_total if device.is_gpu else event.self_cpu_time_total
        for event in events
    )
    return sum(event.count for event in events), microseconds / 1e3


@dataclass(frozen=True)
class Turns:
    """Numbers of calls and rounds in which several functions are timed in turns.

    Attributes:
        several: Calls between two waits for the device.
        rounds: Largest number of rounds.
        seconds: Time after which no round starts, if there were three.
    """

    several: int
    rounds: int
    seconds: float


def take_turns(calls: Mapping[str, Call], device: Device, turns: Turns) -> dict[str, list[float]]:
    """Return the seconds of one call in each round, by name, after a call that warms up."""
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for done in range(turns.rounds):
        if done >= 3 and time.perf_counter() - begun > turns.seconds:
            break
        for name, call in calls.items():
            device.wait()
            started = time.perf_counter()
            for _ in range(turns.several):
                call()
            device.wait()
            taken[name].append((time.perf_counter() - started) / turns.several)
    return taken


def ratio(taken: list[float], base: list[float]) -> float:
    """Return the median over rounds of the ratio of two calls that took turns."""
    return statistics.median(ours / theirs for ours, theirs in zip(taken, base, strict=True))
