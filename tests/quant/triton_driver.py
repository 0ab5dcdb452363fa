"""A driver for Triton without a GPU: kernels are compiled for one, and launches are recorded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class Driver:
    """Driver of a GPU of the given compute capability, such as 90; its launches do nothing.

    Attributes:
        launches: Name and number of programs of each launched kernel.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.launches: list[tuple[str, int]] = []
        self.utils = self

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps the compiled kernels of each device

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 100 * 1024}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def launcher_cls(self, _: Any, metadata: Any) -> Callable[..., None]:
        return lambda *grid: self.launches.append((metadata.name, grid[0]))

    def assembly(self, *kernels: Any) -> list[str]:
        """Return the PTX of everything that was compiled of the kernels for this GPU."""
        return [
            compiled.asm["ptx"]
            for kernel in kernels
            for compiled in kernel.device_caches[self.capability][0].values()
        ]


@contextmanager
def pretended_driver(capability: int) -> Iterator[Driver]:
    """Let Triton compile for and launch on a GPU that is not there.

    Skips the test if Triton is missing, or interprets kernels.
    """
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=1: kernels are not compiled")
    made = Driver(capability)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(made)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "current_device", lambda: 0)
            yield made
    finally:
        triton.runtime.driver._active = before


def inexact_instructions(ptx: str) -> set[str]:
    """Return instructions on floats that round differently from the C kernels.

    Fused multiply-add, approximate division, and flushing of denormal numbers to 0.
    """
    words = set(re.findall(r"\b[a-z]+[.][a-z0-9.]*f(?:32|64)\b", ptx))
    assert words
    return {word for word in words if re.search("fma|approx|full|ftz", word)}
