"""What a training step of the student costs, as a ratio to a float fine-tuning step.

    python benchmarks/step.py [--model efficientnet_lite0] [--batch 16] [--repeats 7]

Both steps run in this process, alternating, on the same folded network and the same batch; medians
and the ratio are printed. The student's step includes the teacher's forward pass in the last row.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import fat
from fat.graph.fold import fold_batch_norms
from fat.graph.trace import trace
from fat.losses import rmse
from fat.memory import keep_freed_memory
from fat.models import load_float_network

NETWORKS = {"efficientnet_lite0": "tf_efficientnet_lite0", "mobilenet_v2": "mobilenetv2_100"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="efficientnet_lite0", choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--weights", default="frozen", choices=("frozen", "pointwise"))
    parser.add_argument("--plain-malloc", action="store_true", help="leave glibc's default")
    options = parser.parse_args()
    if not options.plain_malloc:
        keep_freed_memory()

    torch.manual_seed(0)
    network = load_float_network(NETWORKS[options.model], weights="random").network
    images = torch.randn(options.batch, 3, options.size, options.size)
    images = images.contiguous(memory_format=torch.channels_last)
    student = fat.prepare(network, images[:2], fat.QuantSpec(weights=options.weights))
    fat.calibrate(student, images)
    floating = trace(network)
    fold_batch_norms(floating)
    floating.to(memory_format=torch.channels_last).requires_grad_(True)
    target = student.float_logits(images)

    def step(model: Callable[[Tensor], Tensor], with_teacher: bool = False) -> None:
        for parameter in [*student.parameters(), *floating.parameters()]:
            parameter.grad = None
        wanted = student.float_logits(images) if with_teacher else target
        rmse(wanted, model(images)).backward()

    steps: dict[str, Callable[[], None]] = {
        "float fine-tuning step": lambda: step(floating),
        "student step": lambda: step(student),
        "student step with teacher": lambda: step(student, with_teacher=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 1):
        for name, run in steps.items():
            started = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = medians["float fine-tuning step"]
    print(
        f"{options.model}, batch {options.batch}, {options.size} px, weights {options.weights}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
    )
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        print(f"{name:28} {median:7.3f} s ({low:.3f} to {high:.3f})  {median / base:5.2f}x")


if __name__ == "__main__":
    main()
