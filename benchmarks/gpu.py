"""Measure training on a GPU against hardware limits and float fine-tuning: images/s, hours, cost.

    python benchmarks/gpu.py [--model mobilenet_v2] [--batch 128] [--dollars 2.50] [--full]

* **Ceilings** of the device, measured first: bf16 matrix products (8192³) in TFLOP/s and copies of
  1 GB in GB/s. Mobile networks do few operations per byte, so the second is their limit.
* **Steps** as in step.py, medians: float fine-tuning, the student, the forward pass of the teacher.
  ``of bytes`` is the least possible memory traffic of a step (each layer's input, output and weight
  once forward and twice backward in bf16) divided by what copies reach in that time; ``of FLOPs``
  is the same for operations.
* **The paper's protocol**: 100,000 images for 5 epochs through teacher and student, and 50,000
  images evaluated twice. It is computed from the measured steps; ``--full`` also takes every step
  of it, on images drawn on the device. ``--dollars`` is the price of an hour of the device.

Reading and decoding images is not included: see benchmarks/feeding.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from step import (
    FLOAT,
    NETWORKS,
    STUDENT,
    TEACHER,
    Setting,
    forward,
    machine,
    make_step,
    setting,
    wait,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

PROTOCOL = {"images": 100_000, "epochs": 5, "evaluated": 2 * 50_000}
FORM = "{:20}{:22}{:>10}{:>12}{:>10}{:>10}{:>10}"
HEADINGS = ("network", "step", "ms", "images/s", "ratio", "of bytes", "of FLOPs")


def main() -> None:
    """Measure and print."""
    options = parse()
    print(machine(options))
    flops, copied = ceilings(options)
    print(f"ceilings: {flops / 1e12:.3g} TFLOP/s of products, {copied / 1e9:.3g} GB/s of copies")
    print(FORM.format(*HEADINGS), flush=True)
    for model in options.model:
        given = setting(model, options)
        work, traffic = least_work(given)
        steps = {name: make_step(name, given) for name in (FLOAT, STUDENT + "adaround", TEACHER)}
        seconds = medians(steps, options)
        for name, value in seconds.items():
            passes = 1 if name == TEACHER else 3
            cells = (
                f"{1e3 * value:.1f}",
                f"{options.batch / value:.0f}",
                f"{value / seconds[FLOAT]:.2f}x",
                f"{passes * traffic / copied / value:.0%}",
                f"{passes * work / flops / value:.0%}",
            )
            print(FORM.format(model, name, *cells), flush=True)
        both = seconds[STUDENT + "adaround"] + seconds[TEACHER]
        trained = PROTOCOL["images"] * PROTOCOL["epochs"] / options.batch
        evaluated = PROTOCOL["evaluated"] / options.batch * 2 * seconds[TEACHER]
        tell(model, "computed", trained * both + evaluated, options)
        if options.full:
            tell(model, "every step taken", full(steps, given, int(trained), options), options)


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--threads", type=int, help="torch's own choice by default")
    parser.add_argument("--dollars", type=float, default=2.5, help="price of an hour of the device")
    parser.add_argument("--full", action="store_true", help="take every step of the protocol")
    options = parser.parse_args()
    options.cpu_time = False
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "torch finds no GPU here. --device cpu runs on the processor in float32; the results "
            "say nothing about GPUs."
        )
    return options


def ceilings(options: argparse.Namespace) -> tuple[float, float]:
    """Measure FLOP/s of matrix products and bytes/s of copies on this device."""
    cuda = options.device == "cuda"
    side, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a = torch.randn(side, side, device=options.device, dtype=dtype)
    source = torch.empty((10**9 if cuda else 10**8) // 4, device=options.device)
    target = torch.empty_like(source)
    product = median(lambda: a @ a, options)
    copy = median(lambda: target.copy_(source), options)
    return 2 * side**3 / product, 2 * source.nbytes / copy


def least_work(given: Setting) -> tuple[int, int]:
    """Return FLOPs and the least memory traffic of a forward pass: each tensor of a layer once."""
    elements = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal elements
        elements += inputs[0].numel() + output.numel()
        elements += sum(parameter.numel() for parameter in module.parameters())

    layers = [m for m in given.folded.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(given.folded, given.images)
    for hook in hooks:
        hook.remove()
    width = 2 if given.images.is_cuda else 4
    return counter.get_total_flops(), width * elements


def medians(
    steps: dict[str, Callable[[], object]], options: argparse.Namespace
) -> dict[str, float]:
    """Return the median seconds of each step; they take turns, the first round is a warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 1):
        for name, step in steps.items():
            seconds = timed(step, options)
            if repeat:
                taken[name].append(seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


def median(step: Callable[[], object], options: argparse.Namespace) -> float:
    """Return the median seconds of a step."""
    return medians({"": step}, options)[""]


def timed(step: Callable[[], object], options: argparse.Namespace) -> float:
    """Return the seconds until a step is done on the device."""
    wait(options.device)
    started = time.perf_counter()
    step()
    wait(options.device)
    return time.perf_counter() - started


def full(
    steps: dict[str, Callable[[], object]], given: Setting, count: int, options: argparse.Namespace
) -> float:
    """Run every step of the protocol on new images and return the seconds."""
    started = time.perf_counter()
    for _ in tqdm(range(count), desc="Protocol"):
        given.images.normal_()
        steps[TEACHER]()
        steps[STUDENT + "adaround"]()
    for _ in tqdm(range(PROTOCOL["evaluated"] // options.batch), desc="Evaluation", leave=False):
        given.images.normal_()
        steps[TEACHER]()
        steps[TEACHER]()
    wait(options.device)
    return time.perf_counter() - started


def tell(model: str, how: str, seconds: float, options: argparse.Namespace) -> None:
    """Print time and cost of the protocol."""
    cost = seconds / 3600 * options.dollars
    print(f"{model:20}the paper's protocol, {how}: {seconds / 60:.1f} min, ${cost:.2f}", flush=True)


if __name__ == "__main__":
    main()
