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
    "broadcast_object",
    "broadcast_state",
    "check_devices",
    "gather_batch",
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
    """Return the rows [n, ...] of all processes as one batch [N, ...]; n may differ by process.

    Gradients flow only to the rows of this process. A loss L of the whole batch, multiplied by
    :func:`size`, therefore has the exact gradient of L after DDP averages over processes, even if
    L is not a mean over images, such as RMSE.
    """
    if size() == 1:
        return x
    counts = gather_rows(torch.tensor(len(x))).tolist()
    padded = x.detach().new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x.detach()
    parts = [part[:count] for part, count in zip(gather_rows(padded), counts, strict=True)]
    parts[rank()] = x
    return torch.cat(parts)


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


def _movable(x: Tensor) -> Tensor:
    """Return a copy on the device that the backend sends from: NCCL only supports GPUs."""
    device = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
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
        backend = "nccl" if accelerator == "gpu" else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group(backend, timeout=TIMEOUT)


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
    backend = "nccl" if accelerator == "gpu" else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(index)
    distributed.init_process_group(
        backend, init_method=store, rank=index, world_size=count, timeout=TIMEOUT
    )
    try:
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
