"""Make the C library keep the memory that tensors free, instead of handing it back each time."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


def keep_freed_memory() -> bool:
    """Stop glibc from returning each large tensor to the kernel when it is freed.

    By default every activation of more than a few megabytes is mapped anew, and the kernel clears
    each page at first touch: more work than the arithmetic on it. Element-wise operations on a CPU
    run three to four times as fast without (benchmarks/step.py). The process keeps its peak
    memory until it ends, which is what a training does anyway; a library has no business deciding
    that for its host, so only the entry points call this.

    Returns:
        Whether it was done; other C libraries than glibc are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
