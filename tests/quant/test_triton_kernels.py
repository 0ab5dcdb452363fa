"""Triton's kernels without a GPU: in Triton's interpreter, and compiled to machine code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quant.triton_driver import inexact_instructions, pretended_driver

ROOT = Path(__file__).parents[2]


def test_kernels_in_the_interpreter() -> None:
    """Bit for bit what the C kernels compute: see interpreted.py."""
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [
            sys.executable,
            *["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"],
            "tests/quant/interpreted.py",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None
    assert int(found[1]) > 100


Call = Callable[[], Any]
BOUNDS = (-1.0, 1.0)


def calls(size: int, dtype: torch.dtype, offset: int = 0) -> list[Call]:
    """Return one call of each kernel, with steps ``offset`` elements behind an aligned address."""
    from fat.quant.kernels import triton_kernels as kernels

    x, grad, code = torch.zeros(size, 4, dtype=dtype), torch.zeros(size, 4), torch.zeros(size, 4)
    grad, code = grad.to(dtype), code.to(torch.int8)
    scale, zero_point = (torch.ones(8)[offset].expand(1024) for _ in range(2))
    grid = (scale, zero_point, 0, 255)
    weight = torch.zeros(size, 64)
    steps = torch.ones(size + 8)[offset : offset + size]
    found: list[Call] = [
        partial(kernels.fake_quantize, x, *grid),
        partial(kernels.fake_quantize_code, x, *grid),
        partial(kernels.fake_quantize_backward, code, grad, *grid),
    ]
    for adjust in (0, 1, 2):
        for steps_of, rows in ((steps, True), (scale, False)):
            options = (weight, weight, steps_of, 7, adjust, *BOUNDS, rows, dtype)
            found.append(partial(kernels.fake_quantize_weight, *options))
            backward = (weight, weight, weight.to(dtype), *options[2:-1])
            found.append(partial(kernels.fake_quantize_weight_backward, *backward))
    return found


@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, torch.float32), (90, torch.bfloat16)], ids=["sm_80", "sm_90"]
)
def test_kernels_compile_to_exact_arithmetic(
    capability: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """True division, nothing fused, denormal numbers kept, and wide accesses to memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with pretended_driver(capability) as driver:
        from fat.quant.kernels import triton_kernels as kernels

        for call in calls(64, dtype):
            assert call() is not None
        functions = (kernels._forward, kernels._backward)
        rows = (kernels._forward_rows, kernels._backward_rows)
        # One launch for each call; programs: blocks, lanes, or filters.
        names = ["_forward", "_forward", "_backward", *["_forward_rows", "_backward_rows"] * 6]
        assert [name for name, _ in driver.launches] == names
        assert [count for _, count in driver.launches][:7] == [1, 1, 1024, 64, 64, 4, 1024]
        assembly = driver.assembly(*functions, *rows)
        assert len(assembly) == 3 + 12
        for ptx in assembly:
            assert inexact_instructions(ptx) == set()
            assert "div.rn.f32" in ptx
        for ptx in driver.assembly(*functions):
            assert re.search(r"ld[.]global[.]v4[.]b32", ptx)

        # Steps of all alignments, other sizes and later calls use the same kernels.
        for offset in (1, 2, 4):
            for call in calls(128, dtype, offset):
                assert call() is not None
        assert driver.assembly(*functions, *rows) == assembly
        assert len(driver.launches) == 4 * 15


def test_importing_the_kernels_does_not_import_triton() -> None:
    code = "import sys, torch\nbefore = 'triton' in sys.modules\nimport fat.quant.functional\n"
    code += "assert before or 'triton' not in sys.modules\n"
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=True,
    )
