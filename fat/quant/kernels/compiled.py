"""Kernels in C for CPUs, compiled on first use, and the calls of those for fake quantization.

Their outputs equal those of the torch operations in :mod:`fat.quant.kernels.reference` bit for bit,
and a training step of a mobile network takes a third less time (``benchmarks/step.py``). Each
function returns ``None`` for tensors that the kernels do not support, and without a C compiler.

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
from typing import Any

import torch
from torch import Tensor

from fat.quant.kernels.reference import first_lane, laid_out
from fat.utils.errors import FatError
from fat.utils.io import cache_folder, write_atomic

__all__ = [
    "SWITCH",
    "available",
    "call",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_code",
    "fake_quantize_code_",
    "fake_quantize_weight",
    "fake_quantize_weight_backward",
    "integer_weight",
    "switched_off",
    "usable",
]

logger = logging.getLogger(__name__)

SOURCES = tuple(
    Path(__file__).with_name(f"{name}.c") for name in ("fake_quantize", "requantization")
)
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
"""Environment variable; ``off`` disables the kernels of all devices."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
POINTER, FLOAT, INT, LONG = ctypes.c_void_p, ctypes.c_float, ctypes.c_int, ctypes.c_int64
GRID = (POINTER, POINTER, INT, INT)  # step, zero point, bounds of the integers
ROWS = (POINTER, LONG, LONG, LONG, FLOAT, INT, FLOAT, FLOAT)
SIGNATURES = {
    "fat_forward": (POINTER, POINTER, LONG, *GRID, INT),
    "fat_forward_code": (POINTER, POINTER, POINTER, LONG, *GRID, INT),
    "fat_backward_code": (*[POINTER] * 4, LONG, *GRID, POINTER, POINTER, INT),
    "fat_forward_rows": (POINTER, POINTER, POINTER, INT, *ROWS),
    "fat_backward_rows": (*[POINTER] * 5, *ROWS),
}


def switched_off() -> bool:
    """Return True if ``FAT_KERNELS=off`` selects torch operations on every device."""
    return os.environ.get(SWITCH, "").lower() in ("off", "0", "false")


def available() -> bool:
    """Return True if the kernels could be built and are not switched off."""
    return _library() is not None


def usable(*tensors: Tensor) -> bool:
    """Return True if the kernels support the tensors: float32, on the CPU, dense, same layout."""
    return (
        all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and _same_layout(*tensors)
        and _library() is not None
    )


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> Tensor | None:
    """Compute :func:`fat.quant.kernels.reference.fake_quantize` in one pass."""
    if not _supported(x, scale, zero_point):
        return None
    out = torch.empty_like(x, dtype=torch.float32)
    grid = (scale, zero_point, qmin, qmax)
    call("fat_forward", _float32(x, out), out, x.numel(), *grid, torch.get_num_threads())
    return out.to(x.dtype)


def fake_quantize_code(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor] | None:
    """Compute :func:`fat.quant.kernels.reference.fake_quantize_code` in one pass."""
    if not _supported(x, scale, zero_point):
        return None
    out = torch.empty_like(x, dtype=torch.float32)
    code = _forward_code(_float32(x, out), out, scale, zero_point, qmin, qmax)
    return out.to(x.dtype), code


def fake_quantize_code_(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> Tensor | None:
    """Compute :func:`fat.quant.kernels.reference.fake_quantize_code_` in one pass."""
    if not _supported(x, scale, zero_point):
        return None
    out = _float32(x, torch.empty_like(x, dtype=torch.int8))
    code = _forward_code(out, out, scale, zero_point, qmin, qmax)
    if out is not x:
        x.copy_(out)
    return code


def _forward_code(x: Tensor, out: Tensor, *grid: Any) -> Tensor:
    code = torch.empty_like(x, dtype=torch.int8)
    call("fat_forward_code", x, out, code, x.numel(), *grid, torch.get_num_threads())
    return code


def fake_quantize_backward(
    code: Tensor, grad: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute :func:`fat.quant.kernels.reference.fake_quantize_backward` in one pass."""
    if not _supported(grad, scale, zero_point):
        return None
    code = laid_out(code, torch.empty_like(code))
    grad_x = torch.empty_like(code, dtype=torch.float32)
    sums = torch.empty(-(-grad.numel() // BLOCK), 2, dtype=torch.float64)
    by_scale, by_zero_point = _lanes_like(scale), _lanes_like(scale)
    arguments = (code, _float32(grad, code), grad_x, sums, grad.numel())
    results = (by_scale, by_zero_point, torch.get_num_threads())
    call("fat_backward_code", *arguments, scale, zero_point, qmin, qmax, *results)
    return grad_x.to(grad.dtype), by_scale, by_zero_point


def fake_quantize_weight(*arguments: Any) -> Tensor | None:
    """Compute :func:`fat.quant.kernels.reference.fake_quantize_weight` in one pass."""
    return _forward_rows(False, *arguments)


def integer_weight(*arguments: Any) -> Tensor | None:
    """Compute :func:`fat.quant.kernels.requantization_reference.integer_weight` in one pass."""
    return _forward_rows(True, *arguments)


def _forward_rows(
    integers: bool,
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    qmax: int,
    adjust: int,
    low: float,
    high: float,
    per_channel: bool,
    dtype: torch.dtype,
) -> Tensor | None:
    if not (usable(weight, factor) and _scalars(scale)):
        return None
    out = torch.empty_like(weight)
    grid = (*_steps(weight, scale, per_channel), *_size(weight), qmax, adjust, low, high)
    call("fat_forward_rows", weight, factor, out, integers, *grid)
    return out.to(dtype)


def fake_quantize_weight_backward(
    weight: Tensor,
    factor: Tensor,
    grad: Tensor,
    scale: Tensor,
    qmax: int,
    adjust: int,
    low: float,
    high: float,
    per_channel: bool,
) -> tuple[Tensor, Tensor] | None:
    """Compute :func:`fat.quant.kernels.reference.fake_quantize_weight_backward` in one pass."""
    if not (usable(weight, factor) and _scalars(scale)):
        return None
    grad = laid_out(grad, weight).to(torch.float32)
    grad_factor = torch.empty_like(weight) if adjust else weight.new_empty(0)
    rows = weight.new_empty(len(weight))
    grid = (*_steps(weight, scale, per_channel), *_size(weight), qmax, adjust, low, high)
    call("fat_backward_rows", weight, factor, grad, grad_factor, rows, *grid)
    if not per_channel:
        rows = first_lane(rows.sum(), scale.numel())
    return grad_factor, rows


def _supported(x: Tensor, scale: Tensor, zero_point: Tensor) -> bool:
    """Return True if the kernels can compute an activation, perhaps on a float32 copy."""
    return x.dtype in FLOATS and _scalars(scale, zero_point) and available()


def _float32(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x`` in float32 with the strides of ``like``, which fills a block of memory.

    A copy only for half precision, and where ``x`` has gaps.
    """
    return laid_out(x, like).to(torch.float32)


def _same_layout(*tensors: Tensor) -> bool:
    """Return True if all tensors are contiguous, or all in channels-last format."""
    return all(tensor.is_contiguous() for tensor in tensors) or all(
        tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors
    )


def _scalars(*tensors: Tensor) -> bool:
    """Return True if the kernels can read the steps or zero points."""
    return all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.numel()
        for tensor in tensors
    )


def _lanes_like(scale: Tensor) -> Tensor:
    """Return a gradient of lanes, for the kernel to write the total to element 0."""
    lanes = scale.numel()
    return scale.new_zeros(lanes) if lanes > 1 else scale.new_empty(1)


def _steps(weight: Tensor, scale: Tensor, per_channel: bool) -> tuple[Tensor, int]:
    """Return the steps and the distance between those of two rows, in elements."""
    if not per_channel:
        return scale, 0
    if scale.shape != weight.shape[:1]:  # the kernel would read beyond the end
        raise ValueError(f"{len(weight)} filters need as many steps, got {list(scale.shape)}")
    return scale, scale.stride(0)


def _size(weight: Tensor) -> tuple[int, int]:
    rows = len(weight)
    return rows, weight.numel() // max(rows, 1)


def call(name: str, *arguments: Tensor | float | None) -> None:
    """Call a kernel by the name of its function in C; tensors are passed as pointers."""
    library = _library()
    assert library is not None
    getattr(library, name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


@functools.cache
def _library() -> ctypes.CDLL | None:
    if switched_off():
        return None
    try:
        library = _load()
    except (OSError, FatError, subprocess.SubprocessError) as error:
        lines = str(error).strip().splitlines()
        logger.info(
            "No compiled kernels (%s). Using torch operations instead: same results, but about "
            "40 %% more time for a training step.",
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
    name = f"kernels-{_key(compiler)}.so"
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
    sources = (source.read_bytes() for source in SOURCES)
    parts = (*sources, *(text.encode() for text in (*FLAGS, *compiler, _processor())))
    return hashlib.sha256(b"\0".join((version.stdout, *parts))).hexdigest()[:16]


def _build(compiler: list[str], target: Path) -> Path:
    """Compile to ``target`` and append a checksum, which loaders ignore."""

    def write(temporary: Path) -> None:
        command = [*compiler, *FLAGS, "-x", "c", *map(str, SOURCES), "-o", str(temporary), "-lm"]
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
