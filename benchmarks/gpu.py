"""Measure FAT on one GPU: training, inference, calibration, reconstruction, the feeding pipeline.

    python benchmarks/gpu.py                          # ten minutes, no data, no network connection
    python benchmarks/gpu.py --full --dollars 2.50    # also each step of the paper's protocol
    python benchmarks/gpu.py --device cpu --quick     # try the script; says nothing about GPUs

Weights are random and images are drawn on the device, because costs do not depend on them. The
result is a table and the JSON file ``--output``, which is written after each cell. ``--list``
prints the cells in order of importance; those that do not fit into ``--minutes`` are named at the
end. A cell that fails, for example for lack of memory, is a line of the table. The next run
measures what is missing or failed. A file of another device, of other versions or of another
source code is replaced, as with ``--fresh``.

Columns:

* ``ms``: median time of one call. The rows of a cell take turns, and the device is waited for
  after several calls, so that the host can run ahead as it does in a training.
* ``ratio``: median over these rounds of the ratio to the cell's first row.
* ``kernels``, ``GB``: operations that start a kernel, and the bytes that they read and write,
  counted by the rule of tools/counting.py.
* ``launches``: kernels, copies and fills that torch's profiler sees. ``busy``: their time as a
  fraction of the call's; far below 100 % the host is the limit. On a CPU: operations.
* ``copies``: bytes per second as a fraction of what copying 1 GB reaches. ``products``: FLOP/s of
  the layers as a fraction of what a bf16 product of 8192 x 8192 matrices reaches.
* ``peak MB``: peak of torch's allocator in the first two calls above its state before them:
  activations, gradients, optimizer state and temporaries.

Cells:

* ``step``: ``float fine-tuning`` trains all weights and biases of the folded network, ``student``
  thresholds, biases and learned rounding, both with precomputed targets. ``teacher`` is the float32
  forward pass that computes targets. ``float32`` is without TF32, as in ``fat.fit``.
* ``fit``: the training step of ``fat.fit`` with Lightning, the teacher and the check for NaN,
  beside the same step in a plain loop. ``compile``: the same with the modes of ``trainer.compile``.
* ``inference``: integer inference, with integer weights computed for each batch or cached, and
  ``fat.evaluate``, which includes the teacher and the metrics.
* ``calibrate``, ``reconstruct`` (a step of a block, mean over all blocks), ``feeding`` (JPEG files
  of ImageNet's average size, decoded by worker processes and delivered on the device).
* ``protocol``: the paper's protocol trains on 100,000 images for 5 epochs, evaluates on 50,000
  images before and after, and selects on 1,000 images after each epoch. It is computed from the
  measured cells. ``full`` takes each step of it, on images drawn on the device.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from feeding import photographs, preprocessing
from step import FLOAT, NETWORKS, Setting, distilling, fine_tuning, forward, machine_name, networks
from step import with_batch as draw_batch
from tools.measuring import Call, Device, Row, Rows, Turns, cost, ratio, take_turns
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import fat
from fat.data.datamodule import FatDataModule
from fat.data.dataset import ImageDataset
from fat.data.sources.folder import FolderSource
from fat.data.transforms import DeviceCropTransform, RandomCropTransform
from fat.models.self_test import self_test
from fat.training.block_reconstruction import reconstruct
from fat.utils.errors import first_line
from fat.utils.io import write_json
from fat.utils.precision import full_precision

ROOT = Path(__file__).parents[1]
STUDENT, TEACHER = "student", "teacher"
PRECISIONS = {"bf16": torch.bfloat16, "float32": None}
TRAINER = {"bf16": "bf16-mixed", "float32": "32-true"}
INITS = ("percentile", "entropy")
TURNS = Turns(several=5, rounds=15, seconds=5.0)
WARM = 4
"""First steps of a training that are not timed."""
COLUMNS = {
    "ms": "{:.2f}",
    "images/s": "{:.0f}",
    "ratio": "{:.2f}x",
    "kernels": "{:.0f}",
    "GB": "{:.3g}",
    "launches": "{:.0f}",
    "busy": "{:.0%}",
    "copies": "{:.0%}",
    "products": "{:.0%}",
    "peak MB": "{:.0f}",
}


@dataclass(frozen=True)
class Sizes:
    """Amounts of work.

    Attributes:
        side: Side of the images, pixels.
        turns: Calls and rounds of a measurement.
        copied: Bytes of the array that is copied.
        product: Side of the matrices that are multiplied.
        fit: Timed steps of ``fat.fit``.
        calibrated: Images of a calibration.
        blocks: Two numbers of steps per block; their difference gives the time of a step.
        files: JPEG files.
        fed: Images that the feeding pipeline delivers.
        trained: Training images of the protocol.
        epochs: Its epochs.
        evaluated: Its test images.
        selecting: Its validation images.
    """

    side: int = 224
    turns: Turns = TURNS
    copied: int = 10**9
    product: int = 8192
    fit: int = 40
    calibrated: int = 100
    blocks: tuple[int, int] = (5, 25)
    files: int = 200
    fed: int = 6400
    trained: int = 100_000
    epochs: int = 5
    evaluated: int = 50_000
    selecting: int = 1000


QUICK = Sizes(
    side=32,
    turns=Turns(several=1, rounds=1, seconds=0.0),
    copied=10**6,
    product=64,
    fit=2,
    calibrated=4,
    blocks=(1, 2),
    files=4,
    fed=8,
    trained=8,
    epochs=2,
    evaluated=4,
    selecting=2,
)


@dataclass(frozen=True)
class Cell:
    """A measurement.

    Attributes:
        name: Its key in the file.
        measure: Returns its rows.
        seconds: Upper estimate of its duration on a GPU; −inf ignores ``--minutes``.
    """

    name: str
    measure: Callable[[Bench], Rows]
    seconds: float


class Bench:
    """Options, device, networks and results so far, which all cells use."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = Device(options.device)
        self.sizes = QUICK if options.quick else Sizes()
        self.signature = signature(options)
        self.cells: dict[str, dict[str, Any]] = {}
        self.network = cache(self._network)
        self._calibrated = cache(self._calibrate)

    def _network(self, model: str) -> tuple[nn.Module, fx.GraphModule]:
        """Return a network, and its folded copy with trainable parameters."""
        return networks(model, self.options.device)

    def _calibrate(self, model: str) -> fat.Student:
        images = next(iter(self.drawn(8, 8)))
        student = fat.prepare(self.network(model)[0], images, fat.QuantSpec(weights="adaround"))
        fat.calibrate(student, images)
        return student

    def student(self, model: str) -> fat.Student:
        """Return a new copy of a calibrated student."""
        return copy.deepcopy(self._calibrated(model))

    def given(self, model: str, batch: int, precision: str) -> Setting:
        """Draw a batch for a new copy of the folded network."""
        network, folded = self.network(model)
        autocast = PRECISIONS[precision]
        return draw_batch(network, copy.deepcopy(folded), batch, self.sizes.side, autocast)

    def drawn(self, count: int, batch: int) -> Drawn:
        """Return batches of random images."""
        return Drawn(count, batch, self.sizes.side, self.device.torch)

    def compared(self, calls: dict[str, Call], batch: int) -> Rows:
        """Measure calls that take turns."""
        rows = {name: cost(call, self.device) for name, call in calls.items()}
        taken = take_turns(calls, self.device, self.sizes.turns)
        base = next(iter(taken.values()))
        copied = self.rate("copies")
        for name, seconds in taken.items():
            found = rows[name]
            found |= timed(statistics.median(seconds), batch) | {"ratio": ratio(seconds, base)}
            found["busy"] = found["busy ms"] / found["ms"]
            if copied:
                found["copies"] = 1e9 * found["GB"] / (1e-3 * found["ms"]) / copied
        return rows

    def rate(self, ceiling: str) -> float | None:
        """Return bytes/s of ``copies`` or FLOP/s of ``products``; ``None`` if not measured."""
        rows = self.cells.get("ceilings", {}).get("rows", {})
        return rows[ceiling]["rate"] if rows else None

    def measured(self, cell: str, name: str, metric: str) -> float | None:
        """Return a measured number; ``None`` if the cell is missing or failed."""
        value = self.cells.get(cell, {}).get("rows", {}).get(name, {}).get(metric)
        return None if value is None else float(value)


class Drawn:
    """Batches of random images, drawn on the device; the same in each pass."""

    def __init__(self, count: int, batch: int, side: int, device: torch.device) -> None:
        self.sizes = [min(batch, count - start) for start in range(0, count, batch)]
        self.side, self.device = side, device

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the batches."""
        generator = torch.Generator(self.device).manual_seed(0)
        for size in self.sizes:
            shape = (size, 3, self.side, self.side)
            yield torch.randn(shape, generator=generator, device=self.device)


def timed(seconds: float, images: int) -> Row:
    """Return the metrics of a call that handles some images."""
    return {"ms": 1e3 * seconds, "images/s": images / seconds}


def ceilings(bench: Bench) -> Rows:
    """Measure the rates of copies and of matrix products."""
    sizes, device = bench.sizes, bench.device.torch
    source = torch.zeros(sizes.copied // 4, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(sizes.product, sizes.product, device=device).to(torch.bfloat16)
    calls: dict[str, Call] = {
        "copies": lambda: target.copy_(source),
        "products": lambda: matrix @ matrix,
    }
    taken = take_turns(calls, bench.device, sizes.turns)
    copied = 2 * source.nbytes / statistics.median(taken["copies"])
    flops = 2 * sizes.product**3 / statistics.median(taken["products"])
    return {
        "copies": {"rate": copied, "note": f"{copied / 1e9:,.4g} GB/s read and written"},
        "products": {"rate": flops, "note": f"{flops / 1e12:,.4g} TFLOP/s in bf16"},
    }


class Lines(logging.Handler):
    """Collects logged lines."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Add a line."""
        self.said.append(record.getMessage())


def tested(bench: Bench, model: str) -> Rows:
    """Run FAT's self-test with the layers of a network."""
    student, lines, logger = bench.student(model), Lines(), logging.getLogger("fat")
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        self_test(student)
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
    return {"self-test": {"note": " ".join(lines.said) or "nothing to compare on a CPU"}}


def steps(bench: Bench, model: str, batch: int, precision: str) -> Rows:
    """Compare training steps of the student with float fine-tuning."""
    given, student = bench.given(model, batch, precision), bench.student(model)
    rows = bench.compared(
        {
            FLOAT: fine_tuning(given.folded, given),
            STUDENT: distilling(student, given),
            TEACHER: lambda: student.float_logits(given.images),
        },
        batch,
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        given.folded(given.images[:1])
    work, products = batch * counter.get_total_flops(), bench.rate("products")
    if products:
        for name, row in rows.items():
            passes = 1 if name == TEACHER else 3
            row["products"] = passes * work / (1e-3 * row["ms"]) / products
    return rows


class Timer(pl.Callback):
    """Takes the time of a training between two steps."""

    def __init__(self, device: Device, first: int, last: int) -> None:
        self.device, self.first, self.last = device, first, last
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note the time."""
        if trainer.global_step in (self.first, self.last):
            self.device.wait()
            self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Return the seconds of a step."""
        first, last = self.times
        return (last - first) / (self.last - self.first)


def fitted(bench: Bench, model: str, batch: int, precision: str) -> Rows:
    """Compare a step of fat.fit with the same step in a plain loop."""
    given, student = bench.given(model, batch, precision), bench.student(model)
    step = distilling(student, given)

    def both() -> None:
        given.target = student.float_logits(given.images)
        step()

    rows = bench.compared({"plain loop": both}, batch)
    row = timed(fit_seconds(bench, model, given.images, precision), batch)
    return rows | {"fat.fit": row | {"ratio": row["ms"] / rows["plain loop"]["ms"]}}


def fit_seconds(
    bench: Bench, model: str, images: Tensor, precision: str, mode: str = "none"
) -> float:
    """Return the seconds of a training step of fat.fit."""
    count = WARM + bench.sizes.fit
    timer = Timer(bench.device, WARM, count)
    fat.fit(
        bench.student(model),
        [images] * count,
        validation=[images],
        epochs=1,
        bias_correction=False,
        callbacks=[timer],
        progress=False,
        trainer_options={"precision": TRAINER[precision]},
        compile=mode,
    )
    return timer.seconds


def compiled(bench: Bench, model: str, batch: int, precision: str) -> Rows:
    """Compare the modes of ``trainer.compile``."""
    images, rows = next(iter(bench.drawn(batch, batch))), {}
    for mode in ("none", "reduce-overhead", "default"):
        started = time.perf_counter()
        row = timed(fit_seconds(bench, model, images, precision, mode), batch)
        whole = time.perf_counter() - started
        rows[mode] = row | {"note": f"{whole:.0f} s with compilation and validation"}
        rows[mode]["ratio"] = row["ms"] / rows["none"]["ms"]
    return rows


@torch.no_grad()
def inference(bench: Bench, model: str, batch: int) -> Rows:
    """Compare inference of the student with that of the float network."""
    given, student = bench.given(model, batch, "float32"), bench.student(model)
    half = replace(given, autocast=torch.bfloat16)
    exact: dict[str, Call] = {"float, float32": lambda: student.float_logits(given.images)}
    calls: dict[str, Call] = {
        "float, bf16": lambda: forward(given.folded, half),
        STUDENT: lambda: student(given.images),
    }
    rows = bench.compared(exact | calls, batch)
    with student.cached_integers():
        cached = bench.compared(exact | {"student, cached integers": calls[STUDENT]}, batch)
    rows["student, cached integers"] = cached["student, cached integers"]
    count = 2 * bench.sizes.turns.several
    fat.evaluate(student, [given.images])
    bench.device.wait()
    started = time.perf_counter()
    fat.evaluate(student, [given.images] * count)
    return rows | {"fat.evaluate": timed((time.perf_counter() - started) / count, batch)}


def calibrated(bench: Bench, model: str, batch: int) -> Rows:
    """Measure calibration with several init strategies, once each after a smaller one."""
    rows = {}
    count = bench.sizes.calibrated
    images = list(bench.drawn(count, batch))
    student = bench.student(model)
    for init in INITS:
        for quantizer in student.activation_quantizers():
            quantizer.init = fat.InitSpec(name=init)
        fat.calibrate(student, images[0][:2])
        bench.device.wait()
        started = time.perf_counter()
        fat.calibrate(student, images)
        bench.device.wait()
        rows[init] = timed(time.perf_counter() - started, count)
    return rows


def reconstructed(bench: Bench, model: str, batch: int) -> Rows:
    """Measure a step of block-wise reconstruction."""
    images = bench.drawn(2 * batch, batch)
    held = bench.drawn(batch, batch)
    taken, blocks = [], 0
    for count in (1, *bench.sizes.blocks):  # the first warms up
        spec = fat.TrainSpec(
            reconstruction=fat.ReconstructSpec(steps=count, images=2 * batch, batch_size=batch)
        )
        student = bench.student(model)
        bench.device.wait()
        started = time.perf_counter()
        blocks = len(reconstruct(student, images, held, spec, progress=False))
        bench.device.wait()
        taken.append(time.perf_counter() - started)
    few, many = bench.sizes.blocks
    seconds = max(taken[2] - taken[1], 1e-9) / (many - few) / blocks
    note = f"mean of {blocks} blocks; {taken[1] - few * blocks * seconds:.1f} s without steps"
    return {"step of a block": timed(seconds, batch) | {"note": note}}


def fed(bench: Bench, batch: int) -> Rows:
    """Measure how many images per second the feeding pipeline delivers on the device."""
    sizes, rows = bench.sizes, {}
    config = preprocessing(sizes.side, sizes.side)
    transforms = {
        "cut by workers": RandomCropTransform(config),
        "augment=device": DeviceCropTransform(config),
    }
    with tempfile.TemporaryDirectory(prefix="fat-gpu-") as scratch:
        source = FolderSource(photographs(Path(scratch, "images"), sizes.files))
        for name, transform in transforms.items():
            indices = [number % sizes.files for number in range(sizes.fed)]
            images = ImageDataset(source, transform, indices=indices)
            data = FatDataModule(images, images, images, images, batch_size=batch)
            batches = iter(data.train_dataloader().to(bench.device.torch))
            next(batches)  # starts the workers
            bench.device.wait()
            started, count = time.perf_counter(), 0
            for pixels, _ in batches:
                count += len(pixels)
            bench.device.wait()
            seconds = time.perf_counter() - started
            rows[name] = {
                "images/s": count / seconds,
                "note": f"{data.workers} workers, {len(os.sched_getaffinity(0))} cores",
            }
    return rows


def full(bench: Bench, model: str, batch: int) -> Rows:
    """Take each step of the paper's protocol, and return its time."""
    sizes, student = bench.sizes, bench.student(model)
    tests = bench.drawn(sizes.evaluated, batch)
    started = time.perf_counter()
    fat.calibrate(student, bench.drawn(sizes.calibrated, batch))
    fat.evaluate(student, tests)
    result = fat.fit(
        student,
        bench.drawn(sizes.trained, batch),
        validation=bench.drawn(sizes.selecting, batch),
        epochs=sizes.epochs,
        bias_correction=False,
        progress=not bench.options.quick,
        trainer_options={"precision": TRAINER["bf16"]},
    )
    fat.evaluate(student, tests)
    bench.device.wait()
    seconds = time.perf_counter() - started
    return {"each step taken": price(bench, seconds) | {"steps": result.steps}}


def price(bench: Bench, seconds: float) -> Row:
    """Return the row of a protocol's time."""
    dollars = seconds / 3600 * bench.options.dollars
    return {"seconds": seconds, "note": f"{seconds / 60:.3g} min, ${dollars:.2f}"}


def protocol(bench: Bench, model: str, batch: int) -> Rows:
    """Compute the time of the paper's protocol from measured cells."""
    sizes = bench.sizes
    step = bench.measured(f"fit {model} {batch} bf16", "fat.fit", "ms")
    evaluated = bench.measured(f"inference {model} {batch}", "fat.evaluate", "images/s")
    prepared = bench.measured(f"calibrate {model}", INITS[0], "ms")
    if step is None or evaluated is None:
        return {}
    seconds = 1e-3 * step * sizes.epochs * math.ceil(sizes.trained / batch)
    images = 2 * sizes.evaluated + (1 + sizes.epochs) * sizes.selecting
    seconds += images / evaluated + 1e-3 * (prepared or 0.0)
    return {"computed from the cells": price(bench, seconds)}


def plan(options: argparse.Namespace) -> list[Cell]:
    """Return the cells in order of importance."""
    middle = middle_of(options.batch)
    cells: dict[str, Cell] = {}

    def add(name: str, seconds: float, measure: Callable[..., Rows], **arguments: Any) -> None:
        cells.setdefault(name, Cell(name, partial(measure, **arguments), seconds))

    add("ceilings", 10, ceilings)
    for model in options.model:
        add(f"self-test {model}", 25, tested, model=model)
    for model in options.model:
        same = {"model": model, "batch": middle}
        add(f"step {model} {middle} bf16", 15, steps, **same, precision="bf16")
    for model in options.model:
        same = {"model": model, "batch": middle}
        add(f"fit {model} {middle} bf16", 15, fitted, **same, precision="bf16")
        add(f"inference {model} {middle}", 20, inference, **same)
    add("feeding", 40, fed, batch=middle)
    for model in options.model:
        add(f"calibrate {model}", 20, calibrated, model=model, batch=50)
        add(f"reconstruct {model}", 40, reconstructed, model=model, batch=32)
    for precision in PRECISIONS:
        for batch in options.batch:
            for model in options.model:
                same = {"model": model, "batch": batch}
                add(f"step {model} {batch} {precision}", 15, steps, **same, precision=precision)
    for model in options.model:
        same = {"model": model, "batch": middle}
        add(f"compile {model} {middle} bf16", 150, compiled, **same, precision="bf16")
    if options.full:
        for model in options.model:
            add(f"full {model} {middle}", -math.inf, full, model=model, batch=middle)
    return list(cells.values())


def main() -> None:
    """Measure and print."""
    options = parse()
    cells = plan(options)
    if options.list:
        print("\n".join(cell.name for cell in cells))
        return
    quieten()
    bench = Bench(options)
    bench.cells = {} if options.fresh else earlier(options.output, bench.signature)
    print(", ".join(f"{name} {value}" for name, value in bench.signature.items()))
    if not bench.device.is_gpu:
        print("Measured on a CPU: NONE OF THE FIGURES IS ABOUT A GPU.")
    print(f"{'':28}" + "".join(f"{name:>10}" for name in COLUMNS))
    begun, skipped, failed = time.monotonic(), [], 0
    for cell in cells:
        if "rows" not in bench.cells.get(cell.name, {}):
            left = 60 * options.minutes - (time.monotonic() - begun)
            if left < cell.seconds:
                skipped.append(cell.name)
                continue
            bench.cells[cell.name] = attempt(cell, bench)
            write_json(options.output, {"signature": bench.signature, "cells": bench.cells})
        failed += "failed" in bench.cells[cell.name]
        show(cell.name, bench.cells[cell.name])
    for model in options.model:
        show(f"protocol {model}", {"rows": protocol(bench, model, middle_of(options.batch))})
    print(f"\nWritten to {options.output}.")
    if skipped:
        print(
            f"No time for {len(skipped)} cells (--minutes {options.minutes:g}): "
            + ", ".join(skipped)
        )
    if skipped or failed:
        print("To measure what is missing or failed, type: python " + " ".join(sys.argv))


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", choices=NETWORKS, help="default: all")
    add("--batch", type=int, nargs="+", help="images per step; default: 64 128 256")
    add("--minutes", type=float, default=9.0, help="start no cell that ends later; default: 9")
    add("--full", action="store_true", help="also each step of the protocol")
    add("--fresh", action="store_true", help="replace all results of the file")
    add("--list", action="store_true", help="print the names of the cells and stop")
    add("--output", type=Path, help="default: benchmarks/results/gpu.json")
    add("--dollars", type=float, default=2.5, help="price of an hour of the device; default: 2.50")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    add("--quick", action="store_true", help="tiny sizes, to try the script")
    options = parser.parse_args()
    options.model = options.model or (["mobilenet_v2"] if options.quick else list(NETWORKS))
    options.batch = options.batch or ([2] if options.quick else [64, 128, 256])
    where = "gpu" if options.device == "cuda" and not options.quick else "gpu_trial"
    options.output = options.output or ROOT / f"benchmarks/results/{where}.json"
    if options.device == "cuda" and not options.list and not torch.cuda.is_available():
        parser.error(
            "torch finds no GPU here. To try the script on the processor, type: "
            "python benchmarks/gpu.py --device cpu --quick"
        )
    return options


def middle_of(batches: list[int]) -> int:
    """Return the batch size of cells that are measured at one size."""
    return batches[len(batches) // 2]


def quieten() -> None:
    """Silence messages that would be lines between those of the table."""
    for name in ("fat", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def signature(options: argparse.Namespace) -> dict[str, str]:
    """Return device, versions and source code, on which results depend."""
    cuda = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else machine_name(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda if cuda else "none",
        "triton": version("triton"),
        "fat": fat.__version__,
        "code": code(),
        "size": "quick" if options.quick else "full",
    }


def version(package: str) -> str:
    """Return the version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def code() -> str:
    """Return a hash of the source code that is measured."""
    files = [path for path in (ROOT / "fat").rglob("*") if path.suffix in (".py", ".c")]
    files += [Path(__file__), Path(__file__).with_name("step.py")]
    files += (Path(__file__).parent / "tools").glob("*ing.py")
    contents = (path.read_bytes() for path in sorted(files))
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:12]


def earlier(path: Path, wanted: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the cells of a file, if it is of the same device, versions and source code."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    differing = [name for name, value in wanted.items() if content["signature"].get(name) != value]
    if differing:
        print(f"{path} has other values of: {', '.join(differing)}. It will be replaced.")
        return {}
    return content["cells"]


def attempt(cell: Cell, bench: Bench) -> dict[str, Any]:
    """Measure a cell; a failure becomes its result."""
    started = time.monotonic()
    try:
        bench.device.release()
        with full_precision(bench.device.torch):
            result: dict[str, Any] = {"rows": cell.measure(bench)}
    except Exception as error:
        result = {"failed": f"{type(error).__name__}: {first_line(error)}"}
    return result | {"seconds": round(time.monotonic() - started, 1)}


def show(name: str, result: dict[str, Any]) -> None:
    """Print a cell."""
    print(name)
    if "failed" in result:
        print(f"    failed: {result['failed']}", flush=True)
    for label, row in result.get("rows", {}).items():
        values = (
            form.format(row[key]) if row.get(key) is not None else ""
            for key, form in COLUMNS.items()
        )
        line = f"    {label:24}" + "".join(f"{value:>10}" for value in values)
        print(line.rstrip() + f"  {row.get('note', '')}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
