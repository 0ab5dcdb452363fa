"""Fake quantization in one pass over memory, compiled on first use where a C compiler is at hand.

The kernels compute what :mod:`fat.quant.functional` computes with torch's operations, forward bit
for bit, and cost a training step of a mobile network a third of its time less
(``benchmarks/step.py``). Without a compiler torch's operations do the work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fat.errors import FatError
from fat.files import write_atomic

__all__ = [
    "backend",
    "backward_code",
    "backward_rows",
    "forward",
    "forward_code",
    "forward_rows",
    "usable",
]

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("fake_quantize.c")
FLAGS = (
    "-O3", "-march=native", "-mprefer-vector-width=256", "-funroll-loops", "-fno-math-errno",
    "-fno-trapping-math", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip
SWITCH = "FAT_KERNELS"
"""Environment variable; ``off`` leaves the work to torch's operations."""

BLOCK = 4096
P, F, I, L = ctypes.c_void_p, ctypes.c_float, ctypes.c_int, ctypes.c_int64
SIGNATURES = {
    "fat_forward": (P, P, L, F, F, F, I),
    "fat_forward_code": (P, P, P, L, F, F, F, I),
    "fat_backward_code": (P, P, P, P, L, F, F, I),
    "fat_forward_rows": (P, P, P, P, L, L, F, I, F, F),
    "fat_backward_rows": (P, P, P, P, P, P, L, L, F, I, F, F),
}


def backend() -> str:
    """``compiled``, or ``torch`` where no kernel could be built or ``FAT_KERNELS=off``."""
    return "torch" if _library() is None else "compiled"


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these: float32 on the CPU, dense, all laid out alike."""
    first = tensors[0]
    return (
        all(
            tensor.dtype == torch.float32
            and tensor.device.type == "cpu"
            and tensor.stride() == first.stride()
            for tensor in tensors
        )
        and _dense(first)
        and _library() is not None
    )


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )


def forward(x: Tensor, out: Tensor, scale: float, low: float, high: float) -> None:
    """out = scale · clip(round(x / scale), low, high); ``out`` may be ``x``."""
    _call("fat_forward", x, out, x.numel(), scale, low, high, torch.get_num_threads())


def forward_code(x: Tensor, out: Tensor, scale: float, low: float, high: float) -> Tensor:
    """The same; returns int8 of ``x``'s layout, the rounding error in 1/252 of a step.

    ±127 marks values outside the grid, whose gradient is another.
    """
    code = torch.empty_like(x, dtype=torch.int8)
    _call("fat_forward_code", x, out, code, x.numel(), scale, low, high, torch.get_num_threads())
    return code


def backward_code(
    code: Tensor, grad: Tensor, low: float, high: float
) -> tuple[Tensor, float, float]:
    """(∂/∂x, ∂/∂scale, sum of the gradient that fell outside the grid)."""
    grad_x = torch.empty_like(grad)
    sums = torch.empty(-(-grad.numel() // BLOCK), 2, dtype=torch.float64)
    threads = torch.get_num_threads()
    _call("fat_backward_code", code, grad, grad_x, sums, grad.numel(), low, high, threads)
    scale, outside = sums.sum(0).tolist()
    return grad_x, scale, outside


def forward_rows(
    weight: Tensor, factor: Tensor, scale: Tensor, qmax: int, adjust: int, low: float, high: float
) -> Tensor:
    """Weights [C, ...] on −qmax…qmax with steps [C]; see ``adjust`` in the C source."""
    out = torch.empty_like(weight)
    rows = len(weight)
    columns = weight.numel() // max(rows, 1)
    _call(
        "fat_forward_rows", weight, factor, out, scale, rows, columns, qmax, adjust, low, high
    )  # fmt: skip
    return out


def backward_rows(
    weight: Tensor,
    factor: Tensor,
    grad: Tensor,
    scale: Tensor,
    qmax: int,
    adjust: int,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """(∂/∂factor of the weight's shape, ∂/∂scale [C]); the first is empty for ``adjust`` 0."""
    grad_factor = torch.empty_like(weight) if adjust else weight.new_empty(0)
    grad_scale = torch.empty_like(scale)
    rows = len(weight)
    columns = weight.numel() // max(rows, 1)
    _call(
        "fat_backward_rows", weight, factor, grad, grad_factor, grad_scale, scale, rows, columns,
        qmax, adjust, low, high,
    )  # fmt: skip
    return grad_factor, grad_scale


def _call(name: str, *arguments: Tensor | float) -> None:
    library = _library()
    assert library is not None
    getattr(library, name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "false"):
        return None
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, FatError, subprocess.SubprocessError) as error:
        logger.info(
            "No compiled kernels (%s): torch's operations quantize instead, with the same numbers; "
            "a training step then takes about a third longer.",
            str(error).strip().splitlines()[0][:200] or type(error).__name__,
        )
        return None
    for name, signature in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = signature, None
    return library


def _built() -> Path:
    """The shared library for this source, compiler and processor, built if it is not there."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise OSError("no C compiler found")
    source = SOURCE.read_bytes()
    told = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60)
    key = hashlib.sha256(
        b"\0".join((source, " ".join(FLAGS).encode(), told.stdout, _processor().encode()))
    ).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fat"
    target = cache / f"fake_quantize-{key}.so"
    if target.is_file():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: built anew by each process
        target = Path(tempfile.mkdtemp(prefix="fat-")) / target.name

    def build(temporary: Path) -> None:
        command = [compiler, *FLAGS, "-x", "c", str(SOURCE), "-o", str(temporary), "-lm"]
        done = subprocess.run(command, capture_output=True, timeout=120)
        if done.returncode:
            raise FatError(done.stderr.decode(errors="replace"))

    write_atomic(target, build)
    return target


def _processor() -> str:
    """What -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() + platform.machine()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in text.splitlines() if line.startswith(kept)}))
