"""Allocator settings of the C library."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


def keep_freed_memory() -> bool:
    """Stop glibc from returning the memory of each large tensor to the kernel when it is freed.

    By default every activation of more than a few megabytes is mapped again, and the kernel clears
    each page at its first use, which costs more than the arithmetic. Element-wise operations on a
    CPU are three to four times faster without (benchmarks/step.py). The process then keeps its peak
    memory until it ends, so only the commands call this; a library must not decide it for its host.

    Returns:
        Whether the setting was applied; C libraries other than glibc are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
