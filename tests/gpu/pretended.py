"""A pretended GPU: tensors that say they are on ``cuda:0``, with values that a CPU computes.

Within ``with PretendedGpu() as gpu:`` programs find one CUDA device. Tensors on it follow the rules
of a real one where these can stop a program or change its result:

* tensors of different devices do not mix, except that operations by element take 0-dim CPU tensors;
* their memory cannot be read on the host, other than by copies and ``item()``;
* ``torch.autocast("cuda")`` casts by CUDA's lists of operations;
* random numbers on the device come from its own generators;
* a copy to pinned memory that does not wait arrives when the host waits for an event after it.

With ``reciprocal=True`` a division by a number multiplies by its reciprocal, and with ``tf32=True``
float32 convolutions and products round their inputs to ten fraction bits where the settings allow
it; otherwise results are bit for bit those of the CPU.

Kernels, their traffic and what makes the host wait are counted, see :mod:`tests.gpu.counting`.

What differs: C++ code sees tensors of a CPU, so that backward passes run without CUDA's streams;
``torch.load`` leaves tensors on the CPU; there is no second device, no compiler and no profiler.
All patches are undone at the end of the ``with`` block.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before functions that it looks up are replaced
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu.counting import Counts, kernels, source_line, traffic

__all__ = ["CUDA", "PretendedGpu", "PretendedTensor", "on_cpu"]

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
NAME = "Pretended GPU"
MEMORY = 80 << 30

aten = torch.ops.aten

READS_ALWAYS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
"""Operations whose result, or its shape, the host has to wait for."""

PRODUCTS = {"addmm", "baddbmm", "bmm", "convolution", "convolution_backward", "mm"}
"""Operations that sum up products."""
HALF = (torch.bfloat16, torch.float16)

SCALARS_TOO = {"fill_", "index_put", "index_put_", "masked_fill", "masked_fill_"}
"""Operations, besides those by element, that take a 0-dim tensor of a CPU."""

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operations that copy the indices to the device themselves."""

LOWER = {
    F.linear,
    F.scaled_dot_product_attention,
    torch.addbmm,
    torch.addmm,
    torch.addmv,
    torch.baddbmm,
    torch.bmm,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    torch.einsum,
    torch.matmul,
    torch.mm,
    torch.mv,
    torch.prelu,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    Tensor.__matmul__,
    Tensor.addmm,
    Tensor.bmm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.mv,
}
"""Functions that CUDA's autocast computes in half precision."""

FLOAT32_NAMES = (
    "acos asin cosh cosine_similarity cumprod cumsum dist erfinv exp expm1 log log10 log1p log2 "
    "log_softmax norm pow prod reciprocal renorm rsqrt sinh softmax sum square tan"
)
FLOAT32 = {
    *(
        function
        for name in FLOAT32_NAMES.split()
        for owner in (torch, Tensor)
        if (function := getattr(owner, name, None)) is not None
    ),
    F.binary_cross_entropy_with_logits,
    F.cosine_similarity,
    F.cross_entropy,
    F.group_norm,
    F.huber_loss,
    F.kl_div,
    F.l1_loss,
    F.layer_norm,
    F.log_softmax,
    F.mse_loss,
    F.nll_loss,
    F.normalize,
    F.smooth_l1_loss,
    F.softmax,
    F.softplus,
    Tensor.__pow__,
    Tensor.__rpow__,
    Tensor.__rtruediv__,
}
"""Functions that CUDA's autocast computes in float32."""


class PretendedTensor(Tensor):
    """A tensor that says it is on ``cuda:0``.

    Attributes:
        inner: The CPU tensor with its values.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendedTensor:
        # C++ code is told "cpu": autograd would ask a CUDA device for its stream.
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CPU,
        )
        made.inner = inner.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return device().run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def get_device(self) -> int:
        return 0

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, PretendedTensor):
            raise RuntimeError("Tensor.data is set to a tensor of another device.")
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.inner = new.inner

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        # Not an address that the host may read, but the same for views of one memory.
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        # Libraries compare storages to find tensors that share memory.
        return self.inner.untyped_storage()

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def pin_memory(self, device: Any = None) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only CPU tensors can be pinned")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.inner!r} on {CUDA}"

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendedTensor:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user support deepcopy.")
        made = PretendedTensor(self.inner.clone(memory_format=torch.preserve_format))
        made.requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            made._is_param = True
        if self.grad is not None:
            made.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        device().note_read("saved")
        return self.inner.detach().clone().__reduce_ex__(protocol)


def on_cpu(value: Any) -> Any:
    """Return a copy of nested values with all tensors on the CPU, for comparisons in tests."""
    return tree_map(
        lambda x: (
            x.inner.clone()
            if isinstance(x, PretendedTensor)
            else x.detach().clone()
            if isinstance(x, Tensor)
            else x
        ),
        value,
    )


def tree_map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to the leaves of lists, tuples and dicts; torch's takes far longer."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([tree_map(function, x) for x in value])
    if isinstance(value, dict):
        return {key: tree_map(function, x) for key, x in value.items()}
    if isinstance(value, tuple):  # named, as torch's results are
        return torch.utils._pytree.tree_map(function, value)
    return function(value)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors within lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for x in value:
            yield from tensors(x)
    elif isinstance(value, dict):
        for x in value.values():
            yield from tensors(x)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, PretendedTensor) else value


def _is_cuda(given: Any) -> bool:
    if given is None or isinstance(given, Tensor | torch.dtype | bool):
        return False
    return torch.device(given).type == "cuda"


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return PretendedTensor(x.detach().clone(memory_format=torch.preserve_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _inner(grad)


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: PretendedTensor) -> Tensor:
        return x.inner.clone(memory_format=torch.preserve_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return PretendedTensor(grad)


class _GeneratorType(type(torch.Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _GENERATOR)


_GENERATOR = torch.Generator


class _Generator(_GENERATOR, metaclass=_GeneratorType):  # type: ignore[misc, valid-type]
    """Random number generator that remembers which device it was made for."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made: _Generator = super().__new__(cls, "cpu")
        made.__dict__["on"] = CUDA if _is_cuda(device) else torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.__dict__["on"]


class _Stream:
    """A CUDA stream; all work is done in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = CUDA
        self.cuda_stream = 0

    def synchronize(self) -> None:
        device().arrive()

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        event = event or _Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True


class _Event:
    """A CUDA event; waiting for it lets the copies before it arrive."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.position = 0

    def record(self, stream: Any = None) -> None:
        self.position = device().issued

    def synchronize(self) -> None:
        device().arrive(self.position)

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return device().arrived >= self.position

    def elapsed_time(self, end: Any) -> float:
        return 1.0


class _FunctionMode(TorchFunctionMode):
    """Sees calls from Python: copies between devices, autocast, generators."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ == "__get__":  # x.shape
            return func(*args)
        return self.gpu.call(func, args, dict(kwargs or {}))


class _DispatchMode(TorchDispatchMode):
    """Sees operations without a tensor of the device among their arguments, such as factories."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.gpu.run(func, args, kwargs or {})


_current: list[PretendedGpu] = []


def device() -> PretendedGpu:
    """Return the device whose ``with`` block is open."""
    if not _current:
        raise RuntimeError("A tensor of a pretended GPU is used after its with block.")
    return _current[-1]


class PretendedGpu:
    """One pretended CUDA device, for the duration of a ``with`` block.

    Args:
        reciprocal: Divide by numbers as CUDA does, with their reciprocal.
        tf32: Round inputs of float32 convolutions and products where TF32 is allowed.

    Attributes:
        total: Counts since the start.
        watchers: Functions that are called with every operation of the device and its arguments.

    Examples:
        >>> with PretendedGpu() as gpu:
        ...     x = torch.ones(4, 4, device="cuda")
        ...     with gpu.counting() as counts:
        ...         y = float((x + 1).sum())
        >>> y, counts.launched, counts.host_reads  # an addition, a sum, and the item
        (32.0, 3, 1)
    """

    def __init__(self, *, reciprocal: bool = False, tf32: bool = False) -> None:
        self.reciprocal = reciprocal
        self.tf32 = tf32
        self.total = Counts()
        self._sections: list[Counts] = [self.total]
        self.watchers: list[Callable[[Any, tuple[Any, ...], dict[str, Any]], None]] = []
        self._pinned: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._pending: list[tuple[int, Callable[[], None]]] = []
        self.issued = 0
        self.arrived = 0
        self.generator = torch.Generator()
        self._seed(0)
        self._in_function = 0
        # Whether the function that Python called, or the backward pass, was given our tensors.
        self._beside = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PretendedGpu:
        if _current:
            raise RuntimeError("There is a pretended GPU already.")
        for owner, name, value in self._patches():
            self._stack.enter_context(mock.patch.object(owner, name, value))
        self._stack.callback(_restore_tf32, *_tf32_settings())
        future = torch.__future__
        # module.to() keeps the identity of parameters, as it does on a real device.
        self._stack.callback(
            future.set_swap_module_params_on_conversion,
            future.get_swap_module_params_on_conversion(),
        )
        future.set_swap_module_params_on_conversion(True)
        _current.append(self)
        self._stack.callback(_current.pop)
        self._mode = _FunctionMode(self)
        self._stack.enter_context(self._mode)
        self._stack.enter_context(_DispatchMode(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counts]:
        """Count within a section."""
        counts = Counts()
        self._sections.append(counts)
        try:
            yield counts
        finally:
            self._sections.remove(counts)

    # What programs ask about CUDA

    def _patches(self) -> list[tuple[Any, str, Any]]:
        cuda = torch.cuda
        properties = SimpleNamespace(
            name=NAME,
            total_memory=MEMORY,
            multi_processor_count=132,
            major=9,
            minor=0,
            uuid="GPU-00000000-0000-0000-0000-000000000000",
        )

        def answer(value: Any) -> Callable[..., Any]:
            return lambda *args, **kwargs: value

        def state(*args: Any) -> Tensor:
            return self.generator.get_state()

        def set_state(new: Tensor, *args: Any) -> None:
            self.generator.set_state(new)

        def synchronize(*args: Any) -> None:
            self.note_read("synchronize")
            self.arrive()

        optimizer = sys.modules[torch.optim.Optimizer.__module__]
        answers: dict[str, Any] = {
            "_is_in_bad_fork": False,
            "_lazy_init": None,
            "current_device": 0,
            "current_stream": _Stream(),
            "default_stream": _Stream(),
            "device_count": 1,
            "empty_cache": None,
            "get_device_capability": (9, 0),
            "get_device_name": NAME,
            "get_device_properties": properties,
            "init": None,
            "is_available": True,
            "is_bf16_supported": True,
            "is_current_stream_capturing": False,
            "is_initialized": True,
            "max_memory_allocated": 1 << 20,
            "max_memory_reserved": 1 << 20,
            "mem_get_info": (MEMORY // 2, MEMORY),
            "memory_allocated": 1 << 20,
            "memory_reserved": 1 << 20,
            "memory_stats": {},
            "reset_peak_memory_stats": None,
            "set_device": None,
        }
        patches: list[tuple[Any, str, Any]] = [
            *((cuda, name, answer(value)) for name, value in answers.items()),
            (cuda, "manual_seed", self._seed),
            (cuda, "manual_seed_all", self._seed),
            (cuda, "get_rng_state", state),
            (cuda, "get_rng_state_all", lambda: [state()]),
            (cuda, "set_rng_state", set_state),
            (cuda, "set_rng_state_all", lambda states: set_state(states[0])),
            (cuda, "synchronize", synchronize),
            (cuda, "Event", _Event),
            (cuda, "Stream", _Stream),
            (cuda, "stream", lambda stream: contextlib.nullcontext()),
            (cuda, "device", lambda index: contextlib.nullcontext()),
            (torch.accelerator, "is_available", answer(True)),
            (torch.accelerator, "current_accelerator", answer(torch.device("cuda"))),
            (torch.accelerator, "current_device_index", answer(0)),
            (torch.accelerator, "set_device_index", answer(None)),
            (torch, "Generator", _Generator),
            (torch._C, "Generator", _Generator),
            (torch._C._nn, "_parse_to", self._parse_to),
            (torch.utils, "swap_tensors", _swap),
            (torch._C, "_group_tensors_by_device_and_dtype", self._grouped),
            (torch.nn.utils.clip_grad, "_has_foreach_support", lambda x, device: _is_cuda(device)),
            (Tensor, "pin_memory", lambda x, device=None: self._pin(x)),
            (Tensor, "is_pinned", lambda x, device=None: self.is_pinned(x)),
            (torch.autograd, "_engine_run_backward", self._backward),
            (
                optimizer,
                "_foreach_supported_types",
                [*optimizer._foreach_supported_types, PretendedTensor],
            ),
            (optimizer.Optimizer, "_cuda_graph_capture_health_check", answer(None)),
        ]
        patches.append((torch.autograd.graph, "_engine_run_backward", self._backward))
        health = "_accelerator_graph_capture_health_check"
        if hasattr(optimizer.Optimizer, health):
            patches.append((optimizer.Optimizer, health, answer(None)))
        self._engine = torch.autograd.graph._engine_run_backward
        self._parse = torch._C._nn._parse_to
        self._group = torch._C._group_tensors_by_device_and_dtype
        return patches

    def _seed(self, value: int) -> None:
        # Another sequence than that of the CPU for the same seed, as on a real device.
        self.generator.manual_seed((int(value) + 0x5EED) % (1 << 63))

    def _parse_to(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        found = self._parse(*args, **kwargs)
        return (CUDA if _is_cuda(found[0]) else found[0], *found[1:])

    def _grouped(self, *args: Any) -> Any:
        def device_of(lists: Any, told: torch.device) -> torch.device:
            return CUDA if any(isinstance(x, PretendedTensor) for x in lists[0]) else told

        return {
            (device_of(group[0], told), dtype): group
            for (told, dtype), group in self._group(*args).items()
        }

    def _backward(self, *args: Any, **kwargs: Any) -> Any:
        # The function mode is off inside the call of Tensor.backward, which it has seen.
        before = self._in_function, self._beside
        self._in_function = 0
        self._beside = any(isinstance(x, PretendedTensor) for x in args[0])
        try:
            with self._mode:
                return self._engine(*args, **kwargs)
        finally:
            self._in_function, self._beside = before

    # Host and device

    def note_read(self, kind: str) -> None:
        """Count a host read."""
        key = (kind, source_line())
        for counts in self._sections:
            counts.reads[key] += 1

    def _note_copy(self, *, waits: bool) -> None:
        line = source_line()
        for counts in self._sections:
            counts.copies[line] += 1
            if waits:
                counts.waiting_copies[line] += 1

    def _pin(self, x: Tensor) -> Tensor:
        if self.is_pinned(x):
            return x
        pinned = x.detach().clone(memory_format=torch.preserve_format)
        return self._mark_pinned(pinned)

    def _mark_pinned(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self._pinned[storage._cdata] = storage
        return x

    def is_pinned(self, x: Tensor) -> bool:
        """Return whether a CPU tensor is in pinned memory."""
        return not isinstance(x, PretendedTensor) and x.untyped_storage()._cdata in self._pinned

    def arrive(self, position: int | None = None) -> None:
        """Let the copies to pinned memory arrive that were issued up to a position."""
        position = self.issued if position is None else position
        while self._pending and self._pending[0][0] <= position:
            self._pending.pop(0)[1]()
        self.arrived = max(self.arrived, position)

    def upload(self, x: Tensor, *, waits: bool = True) -> Tensor:
        """Copy a tensor to the device."""
        self._note_copy(waits=waits)
        if waits:
            self.arrive()
        moved: Tensor = _ToDevice.apply(x)
        return moved

    def download(self, x: PretendedTensor, kind: str = "copy to the host") -> Tensor:
        """Copy a tensor to the host."""
        self.note_read(kind)
        self.arrive()
        copied: Tensor = _ToHost.apply(x)
        return copied

    # Calls from Python

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out a function of torch that Python code calls."""
        if isinstance(func, torch._ops.OpOverload):  # a dispatch mode above passes it on
            return func(*args, **kwargs)
        before = self._in_function, self._beside
        self._in_function += 1
        given = [y for x in args for y in (x if isinstance(x, list | tuple) else (x,))]
        self._beside = any(isinstance(x, PretendedTensor) for x in given)
        try:
            return self._call(func, args, kwargs)
        finally:
            self._in_function, self._beside = before

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = args[0] if args else None
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.type_as):
            return self._move(func, first, args[1:], kwargs)
        if func is Tensor.data.__set__ and isinstance(args[1], PretendedTensor):  # type: ignore[attr-defined]
            raise RuntimeError("Tensor.data is set to a tensor of another device.")
        wanted = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_cuda(wanted):
            if isinstance(first, PretendedTensor):
                return self._move(Tensor.to, first, (), {"dtype": kwargs.get("dtype")})
            leaf = kwargs.pop("requires_grad", False)
            return self.upload(func(*args, **{**kwargs, "device": None})).requires_grad_(leaf)
        if func is Tensor.new_tensor and isinstance(first, PretendedTensor):
            made = torch.tensor(*args[1:], **{"dtype": first.dtype, **kwargs, "device": None})
            return made if wanted is not None and not _is_cuda(wanted) else self.upload(made)
        if isinstance(first, PretendedTensor) and wanted is not None and not _is_cuda(wanted):
            args = (first.inner, *args[1:])  # torch.zeros_like(x, device="cpu")
        self._check_generator(args, kwargs)
        if torch.is_autocast_enabled("cuda") and (func in LOWER or func in FLOAT32):
            dtype = torch.get_autocast_dtype("cuda") if func in LOWER else torch.float32
            args, kwargs = tree_map(functools.partial(self._cast, dtype), (args, kwargs))
        return func(*args, **kwargs)

    def _cast(self, dtype: torch.dtype, x: Any) -> Any:
        floating = isinstance(x, PretendedTensor) and x.is_floating_point()
        return x.to(dtype) if floating and x.dtype not in (dtype, torch.float64) else x

    def _check_generator(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        generator = kwargs.get("generator")
        if not isinstance(generator, _GENERATOR):
            return
        first = args[0] if args and isinstance(args[0], Tensor) else None
        on_device = _is_cuda(kwargs.get("device")) or isinstance(first, PretendedTensor)
        if _is_cuda(generator.device) != on_device:
            wanted = "cuda" if on_device else "cpu"
            raise RuntimeError(
                f"Expected a '{wanted}' device type for generator but found "
                f"'{generator.device.type}' at {source_line()}"
            )

    def _move(self, func: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Carry out x.to(…), x.cuda(…), x.cpu() or x.type_as(…)."""
        forced = kwargs.pop("copy", False)
        if func is Tensor.type_as:
            (other,) = args
            args = (other.device, other.dtype)
        elif func is Tensor.cpu:
            args = (CPU,)
        elif func is Tensor.cuda:
            kwargs.pop("device", None)
            args = (CUDA, x.dtype, kwargs.pop("non_blocking", len(args) > 1 and args[1]))
        if len(args) == 4 or (len(args) == 3 and isinstance(args[0], torch.dtype)):
            forced, args = args[-1], args[:-1]
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        target, dtype, non_blocking, layout = self._parse_to(*args, **kwargs)
        layout = {} if layout is None else {"memory_format": layout}
        on_device = isinstance(x, PretendedTensor)
        if target is not None and target.type == "cuda" and not on_device:
            if dtype not in (None, x.dtype):  # the copy has the source's dtype
                return Tensor.to(self.upload(x, waits=not non_blocking), dtype, **layout)
            moved = self.upload(x, waits=not non_blocking)
            return Tensor.to(moved, moved.dtype, **layout) if layout else moved
        if target is not None and target.type == "cpu" and on_device:
            x = x if dtype in (None, x.dtype) else Tensor.to(x, dtype)
            return Tensor.to(self.download(x), x.dtype, **layout)
        if target is not None and target.type not in ("cpu", "cuda"):
            return Tensor.to(_inner(x), target, dtype or x.dtype)
        return Tensor.to(x, dtype or x.dtype, copy=forced, **layout)

    # Operations

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out an operation that the dispatcher was given."""
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func.namespace == "prim":
            return func(*tree_map(_inner, args), **kwargs)
        name = func._schema.name.split("::")[1]
        leaves = [*tensors(args), *tensors(kwargs)]
        ours = [x for x in leaves if isinstance(x, PretendedTensor)]
        kwargs = dict(kwargs)
        wanted = kwargs.get("device")
        on_device = bool(ours) or _is_cuda(wanted)
        if wanted is not None:
            kwargs["device"] = CPU
            # C++ code takes tensors of the device for those of a CPU, and asks for memory there.
            on_device = on_device or (self._beside and not leaves)
        if kwargs.pop("pin_memory", False):
            return self._mark_pinned(func(*args, **kwargs))
        if not on_device:
            return func(*args, **kwargs)
        if name == "copy_" and len(ours) < 2:
            return self._copy(*args, **kwargs)
        self._check_devices(func, name, leaves, ours)
        for watch in self.watchers:
            watch(func, args, kwargs)
        if name in READS_ALWAYS or self._masks(name, args):
            self.note_read("item" if name == "_local_scalar_dense" else name)
            self.arrive()
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.note_read(name)
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        if self.reciprocal and name in ("div", "div_") and _is_number(args[1]):
            result = self._divide(func, inner_args, inner_kwargs)
        else:
            result = self._compute(func, name, inner_args, inner_kwargs)
        self._count(func, name, inner_args, inner_kwargs, result)
        if name in ("_local_scalar_dense", "equal", "is_nonzero"):
            return result
        known = {id(x.inner): x for x in ours}

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return known[id(x)] if id(x) in known else PretendedTensor(x)

        for x in ours:
            if x.shape != x.inner.shape:
                raise NotImplementedError(f"{name} changes the shape of a tensor in place.")
        if func.is_view and not any(x.is_inference() for x in ours):
            with torch.inference_mode(False):  # a view of a usual tensor is one
                return tree_map(wrap, result)
        return tree_map(wrap, result)

    def _check_devices(self, func: Any, name: str, leaves: list[Any], ours: list[Any]) -> None:
        others = [x for x in leaves if not isinstance(x, PretendedTensor)]
        if not others:
            return
        scalars = all(x.dim() == 0 for x in others)
        if scalars and (torch.Tag.pointwise in func.tags or name in SCALARS_TOO):
            return
        if scalars and name.startswith("_foreach_"):
            return
        if name in INDEXING and isinstance(leaves[0], PretendedTensor):
            self._note_copy(waits=True)
            return
        if name.startswith("_fused_") and all(x.dim() == 0 for x in others):
            raise RuntimeError(f"{name}: step counters are on the CPU at {source_line()}")
        shapes = [tuple(x.shape) for x in others]
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! {name} was given CPU tensors of the shapes {shapes} at "
            f"{source_line()}"
        )

    @staticmethod
    def _masks(name: str, args: tuple[Any, ...]) -> bool:
        if name not in INDEXING:
            return False
        masks = (torch.bool, torch.uint8)
        return any(isinstance(x, PretendedTensor) and x.dtype in masks for x in args[1] or [])

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if isinstance(target, PretendedTensor):
            self._note_copy(waits=not non_blocking)
            target.inner.copy_(source)
            return target
        value = source.inner.clone()  # type: ignore[attr-defined]
        if non_blocking and self.is_pinned(target):
            self.issued += 1
            self._pending.append((self.issued, lambda: target.copy_(value)))
            return target
        self.note_read("copy to the host")
        self.arrive()
        return target.copy_(value)

    def _compute(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if self.tf32:
            args = self._round_inputs(name, args)
        half = next((x.dtype for x in args if isinstance(x, Tensor) and x.dtype in HALF), None)
        if name in PRODUCTS and half is not None:
            # Sums in float32, rounded once, as tensor cores do; a CPU would take much longer, too.
            wide = tree_map(lambda x: x.float() if isinstance(x, Tensor) else x, (args, kwargs))
            result = func(*wide[0], **wide[1])
            return tree_map(lambda x: x.to(half) if isinstance(x, Tensor) else x, result)
        if name == "_fused_adam_":
            return _adam(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            before = torch.get_rng_state()
            torch.set_rng_state(self.generator.get_state())
            try:
                return func(*args, **kwargs)
            finally:
                self.generator.set_state(torch.get_rng_state())
                torch.set_rng_state(before)
        return func(*args, **kwargs)

    @staticmethod
    def _divide(func: Any, args: Any, kwargs: Any) -> Any:
        x, number = args[0], args[1]
        floating = x.is_floating_point()
        if not floating or x.dtype == torch.float64 or kwargs.get("rounding_mode") == "trunc":
            return func(*args, **kwargs)
        factor = torch.reciprocal(torch.tensor(float(number)))  # in float32, as the kernel does
        product = (x.float() * factor).to(x.dtype)
        if kwargs.get("rounding_mode") == "floor":
            product = product.floor()
        return x.copy_(product) if func._schema.name.endswith("_") else product

    @staticmethod
    def _round_inputs(name: str, args: Any) -> Any:
        backends: Any = torch.backends
        if name in ("convolution", "convolution_backward"):
            setting = backends.cudnn.conv.fp32_precision
        elif name in ("mm", "addmm", "bmm", "baddbmm"):
            setting = backends.cuda.matmul.fp32_precision
        else:
            return args
        if setting != "tf32":
            return args
        return tree_map(lambda x: _tf32(x) if isinstance(x, Tensor) and x.dim() > 1 else x, args)

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        launched = kernels(func, args)
        if not launched:
            return
        read, written = traffic(func, args, kwargs, result)
        key = (name if func.namespace == "aten" else f"{func.namespace}::{name}", source_line())
        for counts in self._sections:
            counts.kernels[key] += launched
            counts.read[key[0]] += read
            counts.written[key[0]] += written


def _swap(first: Tensor, second: Tensor) -> None:
    """Swap two tensors as module.to() wants it, even if a graph holds on to the first.

    ``torch.utils.swap_tensors`` refuses that, whereas a real device replaces ``parameter.data``.
    """
    first.__class__, second.__class__ = second.__class__, first.__class__
    first.__dict__, second.__dict__ = second.__dict__, first.__dict__
    torch._C._swap_tensor_impl(first, second)


def _tf32_backends() -> tuple[Any, ...]:
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn


def _tf32_settings() -> tuple[str, bool, list[str]]:
    own = [backend.fp32_precision for backend in _tf32_backends()]
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, own


def _restore_tf32(matmul: str, cudnn: bool, own: list[str]) -> None:
    """Undo what a program set; PyTorch's earlier and today's options must not contradict."""
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    for backend, precision in zip(_tf32_backends(), own, strict=True):
        backend.fp32_precision = precision


def _is_number(x: Any) -> bool:
    """Return whether CUDA knows the value of an argument on the host."""
    return isinstance(x, int | float) or (not isinstance(x, PretendedTensor) and x.dim() == 0)


def _tf32(x: Tensor) -> Tensor:
    """Round float32 values to ten fraction bits, to nearest with ties away from zero."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


def _adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: Any,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Any = None,
    found_inf: Any = None,
) -> None:
    """Make the step of Adam that its loop over parameters makes on a CPU, to the same bits."""
    torch.optim._functional.adam(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        [step - 1 for step in state_steps],  # counted before the fused kernel, within the loop
        foreach=False,
        amsgrad=amsgrad,
        beta1=beta1,
        beta2=beta2,
        lr=float(lr),
        weight_decay=weight_decay,
        eps=eps,
        maximize=maximize,
    )
