"""Triton's kernels without a GPU: in Triton's interpreter, and compiled to machine code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


COMPILE = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fat.quant.kernels import triton_kernels as kernels

FLOAT32 = ["scale", "zero_point", "weight", "factor", "grad_factor", "grad_scale"]
FLOAT32 += ["grad_zero_point"]
for pointer, capability in (("*fp32", 80), ("*bf16", 90)):
    types = {"code": "*i8", **dict.fromkeys(FLOAT32, "*fp32")}
    types |= dict.fromkeys(["x", "out", "grad", "grad_x"], pointer)
    types |= dict.fromkeys(["n", "blocks", "k", "stride"], "i32")
    types |= dict.fromkeys(["qmin", "qmax", "q", "low", "high"], "fp32")
    cases = [(kernels._forward, {"CODE": True, "BLOCK": 1024})]
    cases += [(kernels._forward, {"CODE": False, "BLOCK": 1024})]
    cases += [(kernels._backward, {"BLOCK": 2048})]
    for adjust in (0, 1, 2):
        cases += [(kernels._forward_rows, {"ADJUST": adjust, "BLOCK": 64})]
        for rows in (True, False):
            options = {"ADJUST": adjust, "PER_CHANNEL": rows, "BLOCK": 64}
            cases += [(kernels._backward_rows, options)]
    for kernel, constants in cases:
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={name: types.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
        options = {"enable_fp_fusion": False, "num_warps": 4}
        target = GPUTarget("cuda", capability, 32)
        ptx = triton.compile(source, target=target, options=options).asm["ptx"]
        words = set(re.findall(r"\\b[a-z]+[.][a-z0-9.]*f32\\b", ptx))
        inexact = {word for word in words if re.search("fma|approx|full|ftz", word)}
        assert not inexact, (kernel, constants, inexact)
        assert "div.rn.f32" in words, (kernel, constants, words)
        print("compiled")
"""


def test_kernels_compile_to_exact_arithmetic(tmp_path: Path) -> None:
    """For two generations of GPUs: true division, nothing fused, denormal numbers kept."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == 2 * 12


def test_importing_the_kernels_does_not_import_triton() -> None:
    code = "import sys, torch\nbefore = 'triton' in sys.modules\nimport fat.quant.functional\n"
    code += "assert before or 'triton' not in sys.modules\n"
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=True,
    )
