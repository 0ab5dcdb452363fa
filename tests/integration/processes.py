"""Functions that run in the processes of tests/utils/test_distributed.py, imported by name."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fat.utils import distributed
from fat.utils.errors import FatError

INITS = ("minmax", "percentile", "mse", "lsq")


def logits(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of a student and its teacher, and labels, some of which are unknown."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(rows, 10, generator=generator)
    student = teacher + 0.6 * torch.randn(rows, 10, generator=generator)
    return student, teacher, torch.randint(-1, 10, (rows,), generator=generator)


def mixed(seed: int, rows: int) -> tuple[Tensor, ...]:
    """Return tensors of several dtypes and shapes with the same number of rows."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 5, generator=generator),
        torch.randn(rows, 2, 3, generator=generator).bfloat16(),
        torch.randint(-1, 10, (rows,), generator=generator),
        torch.randint(0, 2, (rows, 3), generator=generator).bool(),
    )


def rmse_gradient(rows: list[Tensor], weight: Tensor) -> Tensor:
    """Return DDP's mean gradient of the root mean square of x·w over the rows of all processes."""
    weight = weight.clone().requires_grad_()
    mine = rows[distributed.rank()] @ weight
    loss = distributed.gather_batch(mine).square().mean().sqrt() * distributed.size()
    loss.backward()
    assert weight.grad is not None
    return distributed.all_sum(weight.grad) / distributed.size()


def thresholds(network: nn.Module, batches: list[Tensor], init: str) -> dict[str, Tensor]:
    """Return the thresholds after calibration on this process's batches."""
    import fat

    spec = fat.QuantSpec(bits=4, activation_init=fat.InitSpec(init))
    student = fat.prepare(network, torch.zeros(2, 3, 16, 16), spec)
    fat.calibrate(student, batches)
    return {
        f"{layer}.{kind}.{name}": value
        for layer, kind, quantizer in student.quantizers()
        for name, value in quantizer.thresholds.state_dict().items()
    }


def everything(folder: Path, network: nn.Module, batches: list[Tensor]) -> str:
    """Run everything that succeeds; every process saves its results as RANK.pt."""
    import fat
    from fat.evaluation.evaluator import Disagreements, evaluate
    from fat.evaluation.metrics import Comparison

    rank = distributed.rank()
    found: dict[str, Any] = {"rank": rank, "size": distributed.size()}
    x = torch.tensor([[1.0, -5.0], [3.0, float(10 * rank)]])
    found["sum"], found["max"] = distributed.all_sum(x), distributed.all_max(x)
    found["kept"], found["rows"] = x, distributed.gather_rows(x)
    found["batches"] = [
        distributed.gather_batch(torch.full((counts[rank], 2), float(rank)))
        for counts in ((3, 1), (0, 2), (2, 0))
    ]
    with mock.patch("torch.distributed.all_gather", wraps=torch.distributed.all_gather) as gather:
        found["several"] = distributed.gather_batches(*mixed(rank, (3, 1)[rank]))
    found["collectives"] = [call.args[1].dtype for call in gather.call_args_list]
    found["several, one row"] = distributed.gather_batches(*mixed(rank, (1, 0)[rank]))
    found["several, one without"] = distributed.gather_batches(*mixed(rank, (0, 2)[rank]))
    found["in place"] = torch.full((3,), 1.0 + rank)
    distributed.all_sum_(found["in place"])
    found["told"] = distributed.broadcast_object({"from": rank})
    found["all"] = distributed.gather_objects({"from": rank})
    found["state"] = distributed.broadcast_state({"a": torch.tensor([float(rank)])})

    note = folder / "left-by-the-first"
    with distributed.main_process_first():
        found["inside"] = (
            distributed.rank(),
            distributed.size(),
            float(distributed.all_sum(x)[1, 1]),
        )
        found["was there"] = note.exists()
        if rank == 0:
            time.sleep(0.3)  # long enough for the other to be too early
            note.touch()
    with distributed.local_only():
        found["alone"] = (distributed.rank(), distributed.size())
    found["after"] = (distributed.rank(), distributed.size())

    rows = [torch.arange(6.0).view(3, 2) + 1, torch.tensor([[-2.0, 7.0]])]
    found["gradient"] = rmse_gradient(rows, torch.tensor([[0.5], [-1.5]]))

    for name, shares in {"uneven": ((5, 0), (2, 1)), "none": ((7, 0), (0, 1))}.items():
        comparison = Comparison()
        count, seed = shares[rank]
        if count:
            comparison.update(*logits(count, seed))
        found[name] = dict(comparison.compute())

    mine = batches[rank::2]  # 2 and 1 of 3, of which the last is short
    spec = fat.QuantSpec(bits=4)
    student = fat.prepare(network, batches[0], spec)
    fat.calibrate(student, mine)
    differing = Disagreements()
    found["evaluate"] = evaluate(student, mine, differing=differing)
    shared = differing.gather()
    found["differing"] = (
        shared.images,
        shared.differing,
        [entry.confidence for entry in shared.kept],
    )
    for init in INITS:
        found[f"thresholds {init}"] = thresholds(network, mine, init)
        nothing = batches if rank == 0 else []
        found[f"thresholds {init}, one without"] = thresholds(network, nothing, init)
    try:
        thresholds(network, [], "minmax")
    except FatError as error:
        found["no images"] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    return f"result of {rank}"


def reconstructed(
    network: nn.Module,
    parts: list[Tensor],
    validation: list[Tensor],
    done: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what block-wise reconstruction on this process's images gives."""
    import fat
    from fat.training.block_reconstruction import reconstruct

    everything = fat.QuantSpec(bits=3, weights="adaround")
    student = fat.prepare(network, torch.zeros(2, 3, 16, 16), everything)
    with distributed.local_only():
        fat.calibrate(student, realistic_images())
    options = fat.ReconstructSpec(steps=6, batch_size=4, images=9)
    spec = fat.TrainSpec(epochs=0, bias_lr=1e-3, reconstruction=options)
    saved: list[dict[str, Any]] = []
    results = reconstruct(
        student, parts, validation, spec, progress=False, done=done, keep=saved.append
    )
    return {"results": results, "state": student.trained_state(), "saved": saved}


def realistic_images() -> list[Tensor]:
    """Return eleven smooth images in batches of four, four and three."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(11, 3, 4, 4, generator=generator)
    return list(nn.functional.interpolate(coarse, size=16, mode="bilinear").split(4))


def failing(batches: list[Tensor]) -> Iterator[Tensor]:
    """Yield one batch, then fail in the last process."""
    yield batches[0]
    if distributed.rank() == distributed.size() - 1:
        raise FatError("This file is gone.")
    yield from batches[1:]


def reconstruct_together(folder: Path, network: nn.Module, done: dict[str, Any] | None) -> None:
    """Reconstruct in several processes; every process saves its results as RANK.pt."""
    rank, size = distributed.rank(), distributed.size()
    batches = realistic_images()
    parts, validation = [batch[rank::size] for batch in batches], batches[rank::size]
    if done is None:
        alone = [] if rank == 1 else [batch[min(rank, 1) :: size - 1] for batch in batches]
        found = {
            "divided": reconstructed(network, parts, validation),
            "one without": reconstructed(network, alone, [] if rank else batches),
        }
    else:
        found = {"resumed": reconstructed(network, parts, validation, done)}
    torch.save(found, folder / f"{rank}.pt")
    reconstructed(network, failing(parts), validation)  # type: ignore[arg-type]


def one_of_them(folder: Path, how: str) -> None:
    """Fail in the second process while the first waits for it."""
    (folder / f"{os.getpid()}.pid").touch()
    if distributed.rank() == distributed.size() - 1:
        distributed.gather_rows(torch.zeros(1))
        if how == "told":
            raise FatError("Type something else.")
        if how == "broken":
            raise ValueError("a mistake of the program")
        if how == "Ctrl-C":
            raise KeyboardInterrupt
        os._exit(9)
    distributed.gather_rows(torch.zeros(1))
    distributed.gather_rows(torch.zeros(1))  # to which the other never comes
