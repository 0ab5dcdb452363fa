"""The rule by which kernels and their memory traffic are counted.

One operation that reaches a device is one kernel, except that

* views, allocations and questions about metadata are none;
* a ``foreach`` or fused optimizer operation over a list of tensors is as many as CUDA needs for it;
* a custom operator (``torch.ops.fat.*``) is one, since on CUDA it is one Triton kernel.

The traffic of a kernel is the memory of every tensor that it reads, plus that of every tensor that
it writes, each counted once: a tensor given twice is read once, a tensor changed in place is read
and written, and dimensions of stride 0 take no memory. Caches, and the extra passes of algorithms
inside cuDNN, are not modeled. The rule is the same for all networks that are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["kernels", "memory", "traffic"]

NO_KERNEL = {
    "_has_compatible_shallow_copy_type",
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "detach",
    "detach_",
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "is_pinned",
    "is_same_size",
    "lift",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "record_stream",
    "set_",
    "sym_numel",
    "sym_size",
    "sym_storage_offset",
    "sym_stride",
    "unsafe_chunk",
    "unsafe_split",
    "view",
}
"""Operations without a kernel that the dispatcher does not know as views."""

OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_"}
"""Operations in place that do not read what they change."""

TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Tensors that one launch of a foreach kernel takes, by the number of its lists.

Source: depth_to_max_tensors in ATen/native/cuda/MultiTensorApply.cuh.
"""
BLOCKS_PER_LAUNCH = 320
CHUNK = 65_536
"""Elements that one block of a foreach kernel handles."""


def memory(tensor: Tensor) -> int:
    """Return the number of bytes that the elements of a tensor occupy.

    Examples:
        >>> memory(torch.zeros(3, 4)), memory(torch.zeros(()).expand(1024))
        (48, 4)
    """
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


def kernels(func: Any, args: tuple[Any, ...]) -> int:
    """Return the number of kernels that an operation launches on a device."""
    name = func._schema.name.split("::")[1]
    if func.is_view or name in NO_KERNEL:
        return 0
    lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
    if not name.startswith(("_foreach_", "_fused_")):
        return 1
    written = 0 if name.endswith("_") else 1
    fused = name.startswith("_fused_")
    depth = 4 if fused else min(len(lists) + written, 5)
    tensors = len(lists[0])
    blocks = sum(math.ceil(x.numel() / CHUNK) for x in lists[0])
    return max(
        1, math.ceil(tensors / TENSORS_PER_LAUNCH[depth]), math.ceil(blocks / BLOCKS_PER_LAUNCH)
    )


def traffic(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> tuple[int, int]:
    """Return the bytes that an operation reads and writes."""
    name = func._schema.name.split("::")[1]
    read = _distinct(x for x in tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor))
    changed = _distinct(_changed(func, args, kwargs))
    written = _distinct(x for x in tree_leaves(result) if isinstance(x, Tensor))
    written.update(changed)
    if name in OVERWRITES:
        read = {key: x for key, x in read.items() if key not in changed}
    return sum(map(memory, read.values())), sum(map(memory, written.values()))


def _distinct(tensors: Iterable[Tensor]) -> dict[Any, Tensor]:
    return {(x.data_ptr(), x.shape, x.stride()): x for x in tensors}


def _changed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[Tensor]:
    """Yield the arguments that an operation writes to, by its schema."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = kwargs.get(argument.name, args[position] if position < len(args) else None)
        yield from (x for x in tree_leaves(given) if isinstance(x, Tensor))
