"""Processes that train one student together: ranks, reductions, and starting them.

In a single process every call returns its argument.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.multiprocessing import get_context

from fat.utils.errors import FatError

__all__ = [
    "all_max",
    "all_sum",
    "all_sum_",
    "broadcast_object",
    "broadcast_state",
    "check_devices",
    "gather_batch",
    "gather_batches",
    "gather_objects",
    "gather_rows",
    "is_main_process",
    "join",
    "launch",
    "local_only",
    "main_process_first",
    "rank",
    "size",
    "started_outside",
]

T = TypeVar("T")

TIMEOUT = timedelta(hours=12)
"""Time limit of a collective operation: others wait while one process works alone."""

_alone: ContextVar[bool] = ContextVar("fat_alone", default=False)


def _together() -> bool:
    return not _alone.get() and distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Return the rank of this process; 0 is the main process."""
    return distributed.get_rank() if _together() else 0


def size() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if _together() else 1


def is_main_process() -> bool:
    """Return whether this process writes files, also inside :func:`local_only`."""
    return not (distributed.is_available() and distributed.is_initialized()) or (
        distributed.get_rank() == 0
    )


@contextmanager
def local_only() -> Iterator[None]:
    """Make this process behave as if there were no others: it sees all images itself."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block in the main process first, then in the others, each :func:`local_only`.

    For work whose result the main process writes to disk, where the others read it.
    """
    if not _together():
        yield
        return
    if rank() != 0:
        distributed.barrier()
    with local_only():
        yield
    if rank() == 0:
        distributed.barrier()


def all_sum(x: Tensor) -> Tensor:
    """Return the sum over all processes of a tensor of one shape; ``x`` is not changed."""
    if size() == 1:
        return x
    total = _movable(x)
    distributed.all_reduce(total)
    return total.to(x.device)


def all_sum_(x: Tensor) -> Tensor:
    """Replace a contiguous tensor of one shape by its sum over all processes, in place."""
    if size() > 1:
        shared = x if x.device.type in _device_types() else _movable(x)
        distributed.all_reduce(shared)
        if shared is not x:
            x.copy_(shared)
    return x


def all_max(x: Tensor) -> Tensor:
    """Return the element-wise maximum over all processes of a tensor of one shape."""
    if size() == 1:
        return x
    largest = _movable(x)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return largest.to(x.device)


def gather_rows(x: Tensor) -> Tensor:
    """Return the tensors [...] of all processes, stacked to [processes, ...] by rank."""
    if size() == 1:
        return x.unsqueeze(0)
    mine = _movable(x)
    parts = [torch.empty_like(mine) for _ in range(size())]
    distributed.all_gather(parts, mine)
    return torch.stack(parts).to(x.device)


def gather_batch(x: Tensor) -> Tensor:
    """Return the rows [n, ...] of all processes as one batch [N, ...], see :func:`gather_batches`.

    Examples:
        >>> gather_batch(torch.zeros(2, 5)).shape
        torch.Size([2, 5])
    """
    return gather_batches(x)[0]


def gather_batches(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of n rows each as tensors of the N rows of all processes, by rank.

    Gradients flow only to the rows of this process. A loss L of the whole batch, multiplied by
    :func:`size`, therefore has the exact gradient of L after DDP averages over processes, even if
    L is not a mean over images, such as RMSE.

    All tensors travel in one collective on their device. The numbers of rows are exchanged between
    CPUs, so that no process waits for its GPU.

    Args:
        *tensors: Tensors [n, ...] of any dtypes on one device; n may differ by process, the other
            sizes may not.
    """
    if size() == 1:
        return tensors
    mine = torch.cat([_as_bytes(x.detach()) for x in tensors], dim=1)
    counts = gather_rows(torch.tensor(len(mine))).tolist()
    padded = mine.new_zeros((max(counts), mine.shape[1]))
    padded[: len(mine)] = mine
    gathered = gather_rows(padded)
    rows = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
    widths = [_row_bytes(x) for x in tensors]
    before, after = sum(counts[: rank()]), sum(counts[rank() + 1 :])
    result = []
    for x, column in zip(tensors, torch.split(rows, widths, dim=1), strict=True):
        # A copy, because a view of a wider dtype has to start at a multiple of its size.
        copied = column.clone(memory_format=torch.contiguous_format)
        everything = copied.view(x.dtype).reshape(len(rows), *x.shape[1:])
        parts = torch.split(everything, [before, len(x), after])
        result.append(torch.cat([parts[0], x, parts[2]]))
    return tuple(result)


def _row_bytes(x: Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()


def _as_bytes(x: Tensor) -> Tensor:
    """Return the memory of a tensor [n, ...] as uint8 [n, bytes per row]."""
    flat = x.reshape(len(x), math.prod(x.shape[1:]))
    return flat.contiguous().view(torch.uint8)


def broadcast_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the main process's tensors; all processes must give the same names and shapes."""
    if size() == 1:
        return state
    result = {}
    for name, tensor in state.items():
        shared = _movable(tensor)
        distributed.broadcast(shared, 0)
        result[name] = shared.to(tensor.device)
    return result


def broadcast_object(value: T) -> T:
    """Return the main process's value, which must be picklable."""
    if size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, 0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Return the picklable values of all processes, by rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    distributed.all_gather_object(values, value)
    return values


def _device_types() -> set[str]:
    """Return the types of devices whose tensors the process group can send."""
    pairs = distributed.get_backend_config().split(",")  # such as "cpu:gloo,cuda:nccl"
    return {pair.split(":")[0] for pair in pairs}


def _movable(x: Tensor) -> Tensor:
    """Return a copy on a device that the process group sends from, its own if possible."""
    types = _device_types()
    if x.device.type in types:
        device = x.device
    else:
        device = torch.device("cpu" if "cpu" in types else "cuda")
    return x.detach().to(device, copy=True).contiguous()


def started_outside() -> bool:
    """Return whether torchrun, or anything that sets its variables, started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_devices(devices: int) -> None:
    """Raise a FatError if torchrun started another number of processes than ``devices``."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", devices))
    if here != devices:
        raise FatError(
            f"torchrun started {here} processes on this machine, and trainer.devices is {devices}: "
            f"type trainer.devices={here}, or torchrun --nproc-per-node {devices}."
        )


def join(accelerator: str) -> None:
    """Join the process group of torchrun, from the variables that it sets."""
    if not distributed.is_initialized():
        _init_process_group(accelerator, int(os.environ.get("LOCAL_RANK", "0")))


def _init_process_group(accelerator: str, local_rank: int, **options: Any) -> None:
    """Join a process group: gloo for tensors on the CPU, and NCCL for those on a GPU.

    Counts, flags and objects thus travel between CPUs, without waiting for work on a GPU.

    Raises:
        FatError: If there is no GPU for this process.
    """
    backend = "gloo"
    if accelerator == "gpu":
        found = torch.cuda.device_count()
        if local_rank >= found:
            raise FatError(
                f"Process {local_rank} of this machine needs a GPU of its own, but torch finds "
                f"{found}. Type trainer.devices={max(found, 1)}, or set CUDA_VISIBLE_DEVICES."
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
        options["device_id"] = torch.device("cuda", local_rank)
    distributed.init_process_group(backend, timeout=TIMEOUT, **options)


def launch(work: Callable[..., Any], arguments: Sequence[Any], count: int, accelerator: str) -> Any:
    """Call ``work(*arguments)`` in ``count`` new processes of this machine that form a group.

    torch's ``elastic_launch`` is not used: after Ctrl-C, which a terminal sends to all processes,
    it interrupts each a second time, while the best student is being saved; and it reports the
    first process whose connection broke, often not the one that failed.

    Args:
        work: A picklable function with a picklable result.
        arguments: Its arguments.
        count: Number of processes.
        accelerator: ``"cpu"`` (gloo) or ``"gpu"`` (NCCL; each process uses one GPU).

    Returns:
        The result of process 0.

    Raises:
        FatError: If a process fails, with its message; the others are terminated.
        KeyboardInterrupt: When all processes have ended after Ctrl-C.
    """
    context = get_context("spawn")
    threads = max(torch.get_num_threads() // count, 1)
    method = multiprocessing.get_start_method()
    workers, receivers = [], []
    with tempfile.TemporaryDirectory(prefix="fat-") as folder:
        store = Path(folder, "store").as_uri()
        try:
            for index in range(count):
                receiver, sender = context.Pipe(duplex=False)
                options = (index, count, accelerator, store, threads, method)
                worker = context.Process(
                    target=_worker, args=(sender, work, arguments, *options), name=f"fat-{index}"
                )
                worker.start()
                sender.close()
                workers.append(worker)
                receivers.append(receiver)
            return _wait(workers, receivers)
        except KeyboardInterrupt:  # all processes got it, and the first saves the best student
            for worker in workers:
                worker.join(60)
            raise
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.terminate()
            for worker in workers:
                worker.join(30)
                if worker.is_alive():
                    worker.kill()


def _wait(workers: Sequence[Any], receivers: Sequence[Any]) -> Any:
    """Return the result of process 0, or raise the cause of the first failure."""
    messages: dict[int, tuple[str, Any]] = {}
    deadline = math.inf
    while len(messages) < len(workers) and time.monotonic() < deadline:
        waiting = {receivers[index]: index for index in set(range(len(workers))) - messages.keys()}
        for receiver in connection.wait(list(waiting), timeout=0.2):
            messages[waiting.pop(receiver)] = _message(receiver)
        for receiver, index in waiting.items():  # its children may keep the connection open
            if not workers[index].is_alive() and not receiver.poll():
                messages[index] = ("silent", None)
        found = dict(messages.values())
        if "interrupted" in found:
            for worker in workers:
                worker.join(30)
            raise KeyboardInterrupt
        if "error" in found:
            raise FatError(found["error"])
        if found.keys() - {"result"}:
            # The end of one process breaks the connections of others, and may be noticed later.
            deadline = min(deadline, time.monotonic() + 2.0)
    for index, worker in enumerate(workers):
        kind, value = messages.get(index, ("late", None))
        if kind == "result":
            worker.join()
        if kind == "silent" or (kind == "result" and worker.exitcode):
            worker.join(1)
            raise FatError(
                f"Process {worker.name} of {len(workers)} ended with status {worker.exitcode} and "
                "no message: the system may have run out of memory. Type fewer trainer.devices, or "
                "a smaller data.batch_size."
            )
    for kind, value in messages.values():
        if kind == "broken":
            raise FatError(value)
    return messages[0][1]


def _message(receiver: Any) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = receiver.recv()
    except (EOFError, OSError):
        return "silent", None
    return message


def _worker(
    sender: Any,
    work: Callable[..., Any],
    arguments: Sequence[Any],
    index: int,
    count: int,
    accelerator: str,
    store: str,
    threads: int,
    start_method: str,
) -> None:
    # A spawned process would spawn the workers of its data loaders too, which each import torch.
    multiprocessing.set_start_method(start_method, force=True)
    os.environ.update(
        RANK=str(index),
        LOCAL_RANK=str(index),
        GROUP_RANK="0",
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
    )
    torch.set_num_threads(threads)
    try:
        _init_process_group(accelerator, index, init_method=store, rank=index, world_size=count)
        result = work(*arguments)
        sender.send(("result", result if index == 0 else None))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            sender.send(("interrupted", None))
        elif isinstance(error, FatError):
            sender.send(("error", str(error)))
        else:
            text = f"Process {index} of {count} failed:\n{traceback.format_exc()}"
            sender.send(("broken", text))
        os._exit(1)  # without waiting for the others
    sender.close()
    distributed.destroy_process_group()
