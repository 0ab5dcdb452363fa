"""Compare a training step of the student with float fine-tuning of the same network.

    python benchmarks/step.py [--model mobilenet_v2] [--weights frozen scale adaround] [--peers]

A step is what a training repeats for each batch: clear gradients, forward pass, RMSE of the logits,
backward pass, Adam. All steps take the same batch and the same folded network with random weights,
because the cost does not depend on them.

* ``float fine-tuning`` trains all weights and biases. ReLU6 is not in place: torch would copy its
  input first, which takes the same memory and more time.
* ``student, W`` trains thresholds, biases and what ``--weights`` names, with the optimizer and the
  projection of :func:`fat.fit`. The targets are precomputed.
* ``teacher alone`` is the forward pass that computes such targets, which distillation adds.
* ``--peers`` adds the training steps of Brevitas and torchao, see qat_peers.py; they train all
  weights.

Time: medians over ``--repeats`` rounds in this process. The steps take turns in each round, and the
first round is a warm-up. The ratio is the median of each round's ratio to float fine-tuning, so
that a temporarily slow machine cancels out. On a busy machine, compare the CPU seconds of one
thread: ``--threads 1 --cpu-time``.

Memory: the peak of the bytes that torch has allocated in the first three steps, above those before
them: activations, gradients, optimizer state and temporaries, but not the networks. On a CPU they
are torch's profiler's. (The resident memory of a process also depends on how glibc's heap is
fragmented before.) MB are 10^6 bytes.

On a GPU, forward passes run under bf16 autocast.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from qat_peers import PEERS
from torch import Tensor, fx, nn
from torch.optim import Adam, Optimizer
from torch.profiler import ProfilerActivity, profile

import fat
from fat.graph.passes.batch_norm_folding import fold_batch_norms
from fat.graph.tracing.capture import trace
from fat.models.float_model import load_float_network
from fat.quant import kernels
from fat.training.losses import rmse
from fat.training.parameter_groups import parameter_groups
from fat.utils.memory import keep_freed_memory

NETWORKS = {
    "efficientnet_lite0": "tf_efficientnet_lite0",
    "mobilenet_v2": "mobilenetv2_100",
    "resnet50": "resnet50",
}
MOBILE = ("efficientnet_lite0", "mobilenet_v2")
WEIGHTS = ("frozen", "scale", "adaround")
FLOAT, TEACHER, STUDENT = "float fine-tuning", "teacher alone", "student, "
HEADINGS = ("network", "step", "median s", "min", "max", "ratio", "peak MB", "ratio")
FORM = "{:20}{:21}{:>9}{:>9}{:>9}{:>8}{:>9}{:>8}"
STEPS_FOR_MEMORY = 3
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report its start and end

Step = Callable[[], object]


@dataclass
class Row:
    """Measurements of one step, or the reason why there are none."""

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    failure: str = ""


def main() -> None:
    """Measure and print."""
    options = parse()
    print(machine(options), flush=True)
    print(FORM.format(*HEADINGS))
    for model in options.model:
        rows = {name: Row() for name in names(options)}
        measure_time(model, rows, options)
        if options.memory:
            measure_memory(model, rows, options)
        for name, row in rows.items():
            print(line(model, name, row, rows[FLOAT]), flush=True)


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", nargs="+", default=list(MOBILE), choices=NETWORKS, help="default: the first two")
    add("--weights", nargs="+", default=list(WEIGHTS), choices=WEIGHTS, help="default: all")
    add("--batch", type=int, default=16, help="images per step; default: 16")
    add("--size", type=int, default=224, help="side of the images in pixels; default: 224")
    add("--repeats", type=int, default=7, help="rounds; default: 7; 0 does not measure time")
    add("--no-memory", dest="memory", action="store_false", help="do not measure memory")
    add("--threads", type=int, help="torch threads; default: torch's choice")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    add("--peers", action="store_true", help="also Brevitas and torchao (extra peers)")
    add("--cpu-time", action="store_true", help="CPU seconds instead of wall-clock time")
    add("--plain-malloc", action="store_true", help="keep glibc's default allocator settings")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; leave the option out.")
    return options


def names(options: argparse.Namespace) -> list[str]:
    """Return the names of the requested steps in the order of the table."""
    students = [STUDENT + weights for weights in options.weights]
    return [FLOAT, *students, TEACHER, *(PEERS if options.peers else ())]


def machine_name() -> str:
    """Return the name of the processor."""
    if Path("/proc/cpuinfo").is_file():
        known = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = [line.partition(":")[2].strip() for line in known if line.startswith("model name")]
        if found:
            return found[0]
    return platform.processor() or platform.machine()


def machine(options: argparse.Namespace) -> str:
    """Return a description of the machine and the settings."""
    if options.threads:
        torch.set_num_threads(options.threads)
    parts = [f"{machine_name()}, {torch.get_num_threads()} threads", f"torch {torch.__version__}"]
    if options.device == "cuda":
        parts += [torch.cuda.get_device_name(), "bf16 autocast, channels last"]
    else:
        parts += [f"kernels {kernels.backend()}", "float32, channels last"]
    if options.cpu_time:
        parts.append("CPU seconds")
    return ", ".join([*parts, f"batch {options.batch}", f"{options.size} px"])


@dataclass
class Setting:
    """Inputs shared by all steps of a network.

    Attributes:
        network: The float network.
        folded: The same with folded batch norms; its parameters are trainable.
        images: [N, 3, H, W] in channels-last format.
        target: Precomputed logits [N, classes].
        autocast: Type of autocast in forward passes; ``None`` computes in float32.
    """

    network: nn.Module
    folded: fx.GraphModule
    images: Tensor
    target: Tensor
    autocast: torch.dtype | None = None


def setting(model: str, options: argparse.Namespace) -> Setting:
    """Load a network, and draw a batch and its target logits."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network, folded = networks(model, options.device)
    autocast = torch.bfloat16 if options.device == "cuda" else None
    return with_batch(network, folded, options.batch, options.size, autocast)


def networks(model: str, device: str) -> tuple[nn.Module, fx.GraphModule]:
    """Return a network with random weights, and its folded copy with trainable parameters."""
    network = load_float_network(NETWORKS[model], weights="random").network.to(device)
    folded = trace(network)
    fold_batch_norms(folded)
    folded.to(memory_format=torch.channels_last).requires_grad_(True)
    return network, folded


def with_batch(
    network: nn.Module, folded: fx.GraphModule, batch: int, size: int, autocast: torch.dtype | None
) -> Setting:
    """Draw a batch and its target logits on the device of the network."""
    device = next(folded.parameters()).device
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        target = folded(images) + torch.randn(batch, 1, device=device)
    return Setting(network, folded, images, target, autocast)


def make_step(name: str, given: Setting) -> Step:
    """Build a step with its own copy of the network."""
    if name in PEERS:
        return fine_tuning(PEERS[name](given.folded, given.images), given)
    if name == FLOAT:
        return fine_tuning(given.folded, given)
    weights = WEIGHTS[0] if name == TEACHER else name.removeprefix(STUDENT)
    student = fat.prepare(given.network, given.images[:2], fat.QuantSpec(weights=weights))
    fat.calibrate(student, given.images)
    if name == TEACHER:
        return lambda: student.float_logits(given.images)
    return distilling(student, given)


def distilling(student: fat.Student, given: Setting) -> Step:
    """Return a step that trains a student's parameters as a training does."""
    spec = fat.TrainSpec()
    optimizer = Adam(parameter_groups([student], spec), lr=spec.lr, fused=fused(given))
    return training(student, optimizer, given, student.project)


def fine_tuning(model: nn.Module, given: Setting) -> Step:
    """Return a step that trains every parameter."""
    optimizer = Adam(model.parameters(), lr=1e-6, fused=fused(given))
    return training(model, optimizer, given)


def fused(given: Setting) -> bool | None:
    """Return the option of Adam that fat.fit uses: fused kernels on a GPU."""
    return True if given.images.is_cuda else None


def training(
    model: nn.Module, optimizer: Optimizer, given: Setting, project: Step | None = None
) -> Step:
    """Return a training step, see the module docstring."""

    def step() -> None:
        optimizer.zero_grad()
        rmse(given.target, forward(model, given)).backward()
        optimizer.step()
        if project is not None:
            project()

    return step


def forward(model: Callable[[Tensor], Tensor], given: Setting) -> Tensor:
    """Compute float32 logits of the batch, under autocast if there is any."""
    kind = given.images.device.type
    with torch.autocast(kind, given.autocast, enabled=given.autocast is not None):
        return model(given.images).float()


def measure_time(model: str, rows: dict[str, Row], options: argparse.Namespace) -> None:
    """Measure the seconds of ``--repeats`` rounds in which the steps take turns."""
    if not options.repeats:
        return
    if not options.plain_malloc:
        keep_freed_memory()
    clock = time.process_time if options.cpu_time else time.perf_counter
    given = setting(model, options)
    steps: dict[str, Step] = {}
    for name, row in rows.items():
        with noted(name, row):
            steps[name] = make_step(name, given)
    for repeat in range(options.repeats + 1):
        for name, step in steps.items():
            if rows[name].failure:
                continue
            with noted(name, rows[name]):
                wait(options.device)
                started = clock()
                step()
                wait(options.device)
                if repeat:  # the first round warms up
                    rows[name].seconds.append(clock() - started)


def measure_memory(model: str, rows: dict[str, Row], options: argparse.Namespace) -> None:
    """Measure the peak memory of each step."""
    given = setting(model, options)
    for name, row in rows.items():
        if not row.failure:
            with noted(name, row):
                row.peak = peak_memory(make_step(name, given), options.device)


def peak_memory(step: Step, device: str) -> int:
    """Return the largest number of bytes allocated in the first steps, above those before."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(STEPS_FOR_MEMORY):
            step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(STEPS_FOR_MEMORY):
            step()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


def wait(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def noted(name: str, row: Row) -> Iterator[None]:
    """Turn the failure of a peer into a line of the table."""
    try:
        yield
    except Exception as error:
        if name not in PEERS:
            raise
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        row.failure = (
            f"not installed ({reason}); type: pip install -e '.[peers]'"
            if isinstance(error, ImportError)
            else f"failed with {type(error).__name__}: {reason}"
        )


def line(model: str, name: str, row: Row, base: Row) -> str:
    """Format one line of the table."""
    if row.failure:
        return f"{model:20}{name:21}{row.failure}"
    cells = ["-"] * 6
    if row.seconds:
        values = (statistics.median(row.seconds), min(row.seconds), max(row.seconds))
        cells[:3] = [f"{value:.3f}" for value in values]
        ratios = (ours / floats for ours, floats in zip(row.seconds, base.seconds, strict=True))
        cells[3] = f"{statistics.median(ratios):.2f}x"
    if row.peak is not None and base.peak:
        cells[4:] = [f"{row.peak / 1e6:.1f}", f"{row.peak / base.peak:.2f}x"]
    return FORM.format(model, name, *cells)


if __name__ == "__main__":
    main()
