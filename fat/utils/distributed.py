"""Several processes that train one student: who is who, sums over all, and starting them.

Nothing here is needed by a single process, where all calls give back what they were given.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
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

PATIENCE = timedelta(hours=12)
"""So long the others wait while one of them works alone, for example fine-tunes."""

_alone: ContextVar[bool] = ContextVar("fat_alone", default=False)


def _together() -> bool:
    return not _alone.get() and distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Which of the processes this is, from 0; 0 is the one that writes."""
    return distributed.get_rank() if _together() else 0


def size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _together() else 1


def is_main_process() -> bool:
    """Whether this is the process that writes files, also while it works :func:`local_only`."""
    return not (distributed.is_available() and distributed.is_initialized()) or (
        distributed.get_rank() == 0
    )


@contextmanager
def local_only() -> Iterator[None]:
    """Inside, this process behaves as if there were no others: it sees all images itself."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let process 0 through, and the others when it has left; each is :func:`local_only` inside.

    For work whose result process 0 leaves on disk, where the others find it.
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
    """Sum of a tensor of one shape over all processes; ``x`` itself stays as it is."""
    if size() == 1:
        return x
    total = _movable(x)
    distributed.all_reduce(total)
    return total.to(x.device)


def all_max(x: Tensor) -> Tensor:
    """Element-wise maximum of a tensor of one shape over all processes."""
    if size() == 1:
        return x
    largest = _movable(x)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return largest.to(x.device)


def gather_rows(x: Tensor) -> Tensor:
    """The tensors [...] of all processes, stacked to [processes, ...] in the order of ranks."""
    if size() == 1:
        return x.unsqueeze(0)
    mine = _movable(x)
    parts = [torch.empty_like(mine) for _ in range(size())]
    distributed.all_gather(parts, mine)
    return torch.stack(parts).to(x.device)


def gather_batch(x: Tensor) -> Tensor:
    """The rows [n, ...] of all processes, of which each may have another n, as one batch [N, ...].

    Gradients pass to this process's own rows alone. A loss L of the whole batch, times
    :func:`size`, thus gives after DDP's mean over processes the gradient of L: exact also where L
    is no mean over images, as RMSE.
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
    """Process 0's tensors; all must come with the same names and shapes."""
    if size() == 1:
        return state
    result = {}
    for name, tensor in state.items():
        shared = _movable(tensor)
        distributed.broadcast(shared, 0)
        result[name] = shared.to(tensor.device)
    return result


def broadcast_object(value: T) -> T:
    """Process 0's value, any that can be pickled."""
    if size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, 0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """The values of all processes in the order of ranks, any that can be pickled."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    distributed.all_gather_object(values, value)
    return values


def _movable(x: Tensor) -> Tensor:
    """A copy where the backend can send it from: NCCL knows GPUs only."""
    device = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
    return x.detach().to(device, copy=True).contiguous()


def started_outside() -> bool:
    """Whether torchrun, or whatever sets its variables, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_devices(devices: int) -> None:
    """Raise a FatError if torchrun started another number of processes here than is asked for."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", devices))
    if here != devices:
        raise FatError(
            f"torchrun started {here} processes on this machine, and trainer.devices is {devices}: "
            f"type trainer.devices={here}, or torchrun --nproc-per-node {devices}."
        )


def join(accelerator: str) -> None:
    """Meet the other processes that torchrun started, by the variables it sets."""
    if not distributed.is_initialized():
        backend = "nccl" if accelerator == "gpu" else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group(backend, timeout=PATIENCE)


def launch(work: Callable[..., Any], arguments: Sequence[Any], count: int, accelerator: str) -> Any:
    """Call ``work(*arguments)`` in ``count`` new processes of this machine that know each other.

    Args:
        work: A function that can be pickled, and so can what it returns.
        arguments: For it.
        count: How many processes.
        accelerator: ``"cpu"`` (gloo) or ``"gpu"`` (NCCL; each process takes one GPU).

    Returns:
        What process 0 returned.

    Raises:
        FatError: What one of them raised, or how it ended. The others are ended then.
        KeyboardInterrupt: When all ended after Ctrl-C.
    """
    context = get_context("spawn")
    threads = max(torch.get_num_threads() // count, 1)
    with tempfile.TemporaryDirectory(prefix="fat-meet-") as folder:
        meeting = Path(folder, "place").as_uri()
        receiver, sender = context.Pipe(duplex=False)
        workers = [
            context.Process(
                target=_worker,
                args=(
                    sender,
                    work,
                    tuple(arguments),
                    index,
                    count,
                    accelerator,
                    meeting,
                    threads,
                    multiprocessing.get_start_method(),
                ),
                name=f"fat-{index}",
            )
            for index in range(count)
        ]
        for worker in workers:
            worker.start()
        sender.close()
        try:
            return _wait(workers, receiver)
        except KeyboardInterrupt:  # which all of them got: the first saves what it has
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


def _wait(workers: list[Any], receiver: Any) -> Any:
    """The message of process 0, or the first failure."""
    answer: tuple[str, Any] | None = None
    left = list(workers)
    while left:
        if receiver.poll(0.2):
            try:
                kind, value = receiver.recv()
            except EOFError:
                kind = "closed"
            if kind == "interrupted":
                for worker in left:
                    worker.join(30)
                raise KeyboardInterrupt
            if kind == "error":
                raise FatError(value)
            if kind == "broken":
                raise FatError(_cause(workers, receiver, *value))
            if kind == "result":
                answer = (kind, value)
            if kind == "closed":
                for worker in left:
                    worker.join()
        ended = [worker for worker in left if not worker.is_alive()]
        left = [worker for worker in left if worker.is_alive()]
        for worker in ended:
            if worker.exitcode and not receiver.poll():
                raise FatError(_silent(worker, len(workers)))
    while receiver.poll():
        try:
            kind, value = receiver.recv()
        except EOFError:
            break
        if kind == "result":
            answer = (kind, value)
        elif kind == "error":
            raise FatError(value)
        elif kind == "broken":
            raise FatError(value[1])
    if answer is None:
        raise FatError("The processes ended without a result.")
    return answer[1]


def _cause(workers: list[Any], receiver: Any, index: int, text: str) -> str:
    """What to say of a process that broke: another one's end may have broken its connection."""
    spoke = {index}
    deadline = time.monotonic() + 2.0
    for worker in workers:
        worker.join(max(deadline - time.monotonic(), 0.0))
    while receiver.poll():
        try:
            kind, value = receiver.recv()
        except EOFError:
            break
        if kind == "error":  # it knew what to say
            return str(value)
        if kind == "broken":
            spoke.add(value[0])
    for number, worker in enumerate(workers):
        if worker.exitcode and number not in spoke:
            return _silent(worker, len(workers))
    return text


def _silent(worker: Any, count: int) -> str:
    return (
        f"Process {worker.name} of {count} ended with status {worker.exitcode} and without a word: "
        "the system may have run out of memory. Type fewer trainer.devices, or a smaller "
        "data.batch_size."
    )


def _worker(
    sender: Any,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    index: int,
    count: int,
    accelerator: str,
    meeting: str,
    threads: int,
    start_method: str,
) -> None:
    # A spawned process would spawn its loaders' workers too, each of which imports torch anew.
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
        backend, init_method=meeting, rank=index, world_size=count, timeout=PATIENCE
    )
    try:
        result = work(*arguments)
    except KeyboardInterrupt:
        sender.send(("interrupted", None))
        os._exit(1)  # the others may wait for this one in vain
    except FatError as error:
        sender.send(("error", str(error)))
        os._exit(1)
    except BaseException:
        text = f"Process {index} of {count} failed:\n{traceback.format_exc()}"
        sender.send(("broken", (index, text)))
        os._exit(1)
    if index == 0:
        sender.send(("result", result))
    sender.close()
    distributed.destroy_process_group()
