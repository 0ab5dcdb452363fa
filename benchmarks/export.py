"""Compare FAT's int8 files with onnxruntime's static quantization: speed, size, fidelity.

    python benchmarks/export.py [--data DIR] [--model mobilenet_v2] [--scheme symmetric]

Both tools get the same folded float network, the same calibration images and the same format: uint8
activations, int8 weights, int32 biases, quantize-dequantize pairs. FAT only calibrates, it does not
train. onnxruntime's tool runs its own pre-processing first, with the same granularity and min-max
calibration, its default.

* EfficientNet-Lite0 has its ImageNet weights. Other networks have random ones, with batch norms
  that saw the calibration images: the speed of a kernel does not depend on them.
* Each file is compared with the float network on test images. ``--data DIR`` is a folder with
  train/ and val/; the default are FAT's photographs.
* Latency: medians of single images over rounds in which the files take turns, in one process, with
  the same options of ONNX Runtime. ``ours/theirs`` and ``ours/float`` are ratios of medians.
* ``float`` counts convolutions and linear layers that ONNX Runtime computes in float.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from step import machine_name
from torch import Tensor, nn

import fat
from fat.experiment.build import InputSpec, make_data
from fat.experiment.config import DataConfig
from fat.export.base import Program
from fat.export.file_evaluation import evaluate_file
from fat.export.onnx import Onnx, OnnxRuntime, saturates
from fat.models.float_model import load_float_network
from fat.utils.batches import AtMost

NETWORKS = {
    "efficientnet_lite0": "tf_efficientnet_lite0",
    "mobilenet_v1": "mobilenetv1_100",
    "mobilenet_v2": "mobilenetv2_100",
    "mnasnet_100": "mnasnet_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "resnet18": "resnet18",
}
HEADINGS = (
    "network",
    "float ms",
    "theirs ms",
    "ours ms",
    "ours/theirs",
    "ours/float",
    "size ratio",
    "theirs float",
    "ours float",
    "theirs dB",
    "ours dB",
    "theirs %",
    "ours %",
)
FORM = "{:20}" + "{:>13}" * (len(HEADINGS) - 1)


class Reader(CalibrationDataReader):
    """Calibration images for onnxruntime's tool."""

    def __init__(self, images: Sequence[Tensor]) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """Return the next batch by input name, ``None`` at the end."""
        batch = next(self.images, None)
        return None if batch is None else {"input": batch.numpy()}


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    exact = ", session.x64quantprecision=1" if saturates() else ""
    print(
        f"{machine_name()}, {torch.get_num_threads()} threads, "
        f"onnxruntime {onnxruntime.__version__}{exact}, {options.granularity}, {options.scheme}"
    )
    print(FORM.format(*HEADINGS), flush=True)
    logging.getLogger().setLevel(logging.ERROR)  # its tool recommends what is done here
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for model in options.model:
            print(FORM.format(model, *measure(model, folder, options)), flush=True)


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--images", type=int, default=64, help="test images")
    parser.add_argument(
        "--granularity", default="per_channel", choices=("per_channel", "per_tensor")
    )
    parser.add_argument("--scheme", default="asymmetric", choices=("asymmetric", "symmetric"))
    parser.add_argument("--repeats", type=int, default=5, help="rounds of latency measurements")
    parser.add_argument("--threads", type=int, help="torch's own choice by default")
    parser.add_argument("--out", type=Path, help="keep the files in this folder")
    return parser.parse_args()


def measure(model: str, folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Yield the cells of one network's row."""
    network, calibration, test = setting(model, options)
    spec = fat.QuantSpec(granularity=options.granularity, scheme=options.scheme)
    student = fat.prepare(network, calibration[:1], spec)
    fat.calibrate(student, calibration)
    paths = {kind: folder / f"{model}-{kind}.onnx" for kind in ("float", "theirs", "ours")}
    Onnx().write(Program(student.teacher, calibration[0]), paths["float"])
    fat.export_onnx(student, paths["ours"], test)
    quantize(paths["float"], paths["theirs"], calibration, options)

    files = {kind: OnnxRuntime(path) for kind, path in paths.items()}
    times = medians(files, calibration[0][:1], options.repeats)
    figures = {
        kind: evaluate_file(files[kind], test, student.teacher)["quantized"] for kind in times
    }
    sizes = {kind: path.stat().st_size for kind, path in paths.items()}
    yield from (f"{times[kind]:.2f}" for kind in ("float", "theirs", "ours"))
    yield f"{times['ours'] / times['theirs']:.3f}"
    yield f"{times['ours'] / times['float']:.3f}"
    yield f"{sizes['ours'] / sizes['float']:.3f}"
    yield from (str(len(files[kind].kernels().float_layers)) for kind in ("theirs", "ours"))
    yield from (f"{figures[kind]['sqnr_db']:.1f}" for kind in ("theirs", "ours"))
    yield from (f"{figures[kind]['agreement']:.1f}" for kind in ("theirs", "ours"))


def setting(
    model: str, options: argparse.Namespace
) -> tuple[nn.Module, list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Return a network with calibration and test images of its size."""
    pretrained = model == "efficientnet_lite0"
    source = load_float_network(NETWORKS[model], **({} if pretrained else {"weights": "random"}))
    config = DataConfig(source="photos", batch_size=8, test_images=options.images)
    if options.data:
        config.source, config.root = "folder", str(options.data)
    data = make_data(config, InputSpec.of(source), seed=0)
    calibration = [images for images, _ in data.calibration_dataloader()]
    if not pretrained:
        see(source.network, calibration)
    return source.network, calibration, list(AtMost(data.test_dataloader(), options.images))


@torch.no_grad()
def see(network: nn.Module, images: Sequence[Tensor]) -> None:
    """Give batch norms the statistics of images, and a weight to those that start at zero.

    The last norm of each block of a residual network does, so the block would compute zeros.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.weight.masked_fill_(norm.weight == 0.0, 1.0)
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
    network.train()
    for batch in images:
        network(batch)
    network.eval()


def quantize(
    source: Path, path: Path, calibration: Sequence[Tensor], options: argparse.Namespace
) -> None:
    """Quantize as recommended in onnxruntime's documentation."""
    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared)
    quantize_static(
        prepared,
        path,
        Reader(calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=options.granularity == "per_channel",
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": options.scheme == "symmetric"},
    )
    prepared.unlink()


def medians(files: dict[str, OnnxRuntime], image: Tensor, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of one image for each file; the files take turns."""
    times: dict[str, list[float]] = {kind: [] for kind in files}
    for turn in range(40 * repeats):
        for kind in sorted(files, reverse=bool(turn % 2)):
            started = time.perf_counter()
            files[kind].run(image)
            if turn >= 5:  # warm-up
                times[kind].append(1e3 * (time.perf_counter() - started))
    return {kind: statistics.median(values) for kind, values in times.items()}


if __name__ == "__main__":
    main()
