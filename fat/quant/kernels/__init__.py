"""Fake-quantization kernels in C, compiled on first use.

Their forward results equal those of the torch operations in :mod:`fat.quant.functional` bit for
bit, and a training step of a mobile network takes a third less time (``benchmarks/step.py``).
Without a C compiler the torch operations are used.

torch.utils.cpp_extension.load would not replace this module: it needs ninja beside the compiler,
builds C++ only, and its cache neither depends on the processor (``-march=native`` in a shared home
directory) nor detects damaged files, and waits forever for the lock of a killed process. Building
with the package would tie the wheel to one platform.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fat.utils.errors import FatError
from fat.utils.io import cache_folder, write_atomic

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
BLOCK = 4096
"""Number of elements whose sum the kernels compute at a time."""
FLAGS = (
    "-O3",
    "-march=native",
    "-funroll-loops",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fopenmp",
    "-shared",
    "-fPIC",
    f"-DBLOCK={BLOCK}",
    *(["-mprefer-vector-width=256"] if platform.machine() in ("x86_64", "AMD64") else []),
)
SWITCH = "FAT_KERNELS"
"""Environment variable; ``off`` disables the kernels."""

POINTER, FLOAT, INT, LONG = ctypes.c_void_p, ctypes.c_float, ctypes.c_int, ctypes.c_int64
ROWS = (LONG, LONG, FLOAT, INT, FLOAT, FLOAT)
SIGNATURES = {
    "fat_forward": (POINTER, POINTER, LONG, FLOAT, FLOAT, FLOAT, INT),
    "fat_forward_code": (POINTER, POINTER, POINTER, LONG, FLOAT, FLOAT, FLOAT, INT),
    "fat_backward_code": (POINTER, POINTER, POINTER, POINTER, LONG, FLOAT, FLOAT, INT),
    "fat_forward_rows": (POINTER, POINTER, POINTER, POINTER, *ROWS),
    "fat_backward_rows": (POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, *ROWS),
}


def backend() -> str:
    """Return ``compiled``, or ``torch`` without a compiler or with ``FAT_KERNELS=off``."""
    return "torch" if _library() is None else "compiled"


def usable(*tensors: Tensor) -> bool:
    """Return True if the kernels support the tensors: float32, on the CPU, dense, same layout."""
    return (
        all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and (
            all(tensor.is_contiguous() for tensor in tensors)
            or all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)
        )
        and _library() is not None
    )


def forward(x: Tensor, out: Tensor, scale: float, low: float, high: float) -> None:
    """Compute out = scale · clip(round(x / scale), low, high); ``out`` may be ``x``."""
    _call("fat_forward", x, out, x.numel(), scale, low, high, torch.get_num_threads())


def forward_code(x: Tensor, out: Tensor, scale: float, low: float, high: float) -> Tensor:
    """Compute :func:`forward` and return what the backward pass needs, int8 in ``x``'s layout.

    The code is the rounding error in units of 1/252 step; ±127 marks values outside the grid, and
    −128 marks NaN.
    """
    code = torch.empty_like(x, dtype=torch.int8)
    _call("fat_forward_code", x, out, code, x.numel(), scale, low, high, torch.get_num_threads())
    return code


def backward_code(
    code: Tensor, grad: Tensor, low: float, high: float
) -> tuple[Tensor, float, float]:
    """Return ∂/∂x, ∂/∂scale, and the sum of the gradient of values outside the grid."""
    grad_x = torch.empty_like(grad)
    blocks = -(-grad.numel() // BLOCK)
    sums = torch.empty(blocks + 1, 2, dtype=torch.float64)  # totals in the last row
    threads = torch.get_num_threads()
    _call("fat_backward_code", code, grad, grad_x, sums, grad.numel(), low, high, threads)
    scale, outside = sums[-1].tolist()
    return grad_x, scale, outside


def forward_rows(
    weight: Tensor, factor: Tensor, scale: Tensor, qmax: int, adjust: int, low: float, high: float
) -> Tensor:
    """Return weights [C, ...] on −qmax…qmax with steps [C]; ``adjust`` as in the C source."""
    out = torch.empty_like(weight)
    _call("fat_forward_rows", weight, factor, out, scale, *_size(weight), qmax, adjust, low, high)
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
    """Return ∂/∂factor in the weight's shape (empty for ``adjust`` 0) and ∂/∂scale [C]."""
    grad_factor = torch.empty_like(weight) if adjust else weight.new_empty(0)
    grad_scale = torch.empty_like(scale)
    tensors = (weight, factor, grad, grad_factor, grad_scale, scale)
    _call("fat_backward_rows", *tensors, *_size(weight), qmax, adjust, low, high)
    return grad_factor, grad_scale


def _size(weight: Tensor) -> tuple[int, int]:
    rows = len(weight)
    return rows, weight.numel() // max(rows, 1)


def _call(name: str, *arguments: Tensor | float) -> None:
    library = _library()
    assert library is not None
    getattr(library, name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "false"):
        return None
    try:
        library = _load()
    except (OSError, FatError, subprocess.SubprocessError) as error:
        lines = str(error).strip().splitlines()
        logger.info(
            "No compiled kernels (%s). Using torch operations instead: same results, but about a "
            "third more time for a training step.",
            lines[0][:200] if lines else type(error).__name__,
        )
        return None
    for name, signature in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = signature, None
    return library


def _load() -> ctypes.CDLL:
    """Load the library for this source, compiler and processor from the cache, or build it.

    Raises:
        OSError: If there is no compiler, or the library cannot be loaded.
        subprocess.SubprocessError: If compilation fails.
    """
    compiler = _compiler()
    name = f"fake_quantize-{_key(compiler)}.so"
    cache = _cache()
    if cache is not None:
        if _intact(cache / name):
            return ctypes.CDLL(str(cache / name))
        try:
            return ctypes.CDLL(str(_build(compiler, cache / name)))
        except FatError:  # the cache is read-only
            pass
    # Without a cache every process builds the library; the file can be deleted once loaded.
    with tempfile.TemporaryDirectory(prefix="fat-") as folder:
        return ctypes.CDLL(str(_build(compiler, Path(folder) / name)))


def _compiler() -> list[str]:
    given = shlex.split(os.environ.get("CC", ""))
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not given and not found:
        raise OSError("no C compiler found")
    return given or [str(found)]


def _cache() -> Path | None:
    try:
        return cache_folder()
    except FatError:  # no home directory
        return None


def _key(compiler: list[str]) -> str:
    """Return a hash of everything that the library depends on."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60)
    parts = (SOURCE.read_bytes(), *(text.encode() for text in (*FLAGS, *compiler, _processor())))
    return hashlib.sha256(b"\0".join((version.stdout, *parts))).hexdigest()[:16]


def _build(compiler: list[str], target: Path) -> Path:
    """Compile to ``target`` and append a checksum, which loaders ignore."""

    def write(temporary: Path) -> None:
        command = [*compiler, *FLAGS, "-x", "c", str(SOURCE), "-o", str(temporary), "-lm"]
        done = subprocess.run(command, capture_output=True, timeout=120)
        if done.returncode:
            raise subprocess.SubprocessError(done.stderr.decode(errors="replace"))
        with temporary.open("ab") as file:
            file.write(hashlib.sha256(temporary.read_bytes()).digest())

    return write_atomic(target, write)


def _intact(library: Path) -> bool:
    """Return True if the file exists undamaged: loading a damaged one would crash the process."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _processor() -> str:
    """Return a description of the processor, on which ``-march=native`` depends."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() + platform.machine()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in text.splitlines() if line.startswith(kept)}))
