"""Compare the files of an export target with the students that they were exported from.

    python benchmarks/targets.py [--target litert] [--data DIR] [--model mobilenet_v2] [--bits 8]
    python benchmarks/targets.py --granularity per_tensor --equalize exact

Each row is one verified ``fat.export``: six networks (see benchmarks/export.py for their weights
and images), per-tensor and per-channel, symmetric and asymmetric, calibrated but not trained.

* ``sim dB``, ``sim %``: SQNR and agreement of the file's logits with the student's.
* ``differing``: operations of which some integers differ when all get the same integers, of all;
  ``worst %``: the largest fraction of integers that differ in one (each by one step).
* ``file dB``, ``student dB``: SQNR against the float network.
* ``ratio``: latency of one image, file / float file, alternating in one process; ``size``: ratio of
  their sizes.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from export import NETWORKS, setting
from step import machine_name

import fat
from fat.export.base import ExportBackend
from fat.export.exporter import export
from fat.export.registry import TARGETS, make_target
from fat.utils.batches import Images
from fat.utils.errors import FatError

HEADINGS = (
    "sim dB",
    "sim %",
    "differing",
    "worst %",
    "file dB",
    "student dB",
    "layers",
    "ratio",
    "size",
)
FORM = "{:20} {:7} {:11}" + "{:>11}" * len(HEADINGS)


def main() -> None:
    """Export, verify and print."""
    options = parse()
    target = make_target(options.target)
    target.check()
    print(
        f"{machine_name()}, {torch.get_num_threads()} threads, weights of {options.bits} bits, "
        f"equalized: {options.equalize}"
    )
    print(FORM.format(options.target, "", "", *HEADINGS), flush=True)
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for model in options.model:
            source, calibration, test = setting(model, options)
            for granularity, scheme in itertools.product(options.granularity, options.scheme):
                spec = fat.QuantSpec(
                    weight_bits=options.bits,
                    granularity=granularity,
                    scheme=scheme,
                    equalize=fat.EqualizeSpec(options.equalize),
                )
                student = fat.prepare(source, calibration, spec)
                fat.calibrate(student, calibration)
                path = folder / f"{model}-{granularity}-{scheme}{target.suffix}"
                try:
                    cells = row(student, path, target, test)
                    text = FORM.format(model, granularity, scheme, *cells)
                except FatError as error:
                    text = f"{model} {granularity} {scheme}: {error}"
                print(text, flush=True)


def row(student: fat.Student, path: Path, target: ExportBackend, test: Images) -> Iterator[str]:
    """Yield the cells of one file's row."""
    report = export(student, path, target, test)
    simulation, layers = report["simulation"], report["layers"]
    worst = layers["worst"]
    yield f"{simulation['sqnr_db']:.1f}"
    yield f"{simulation['agreement']:.1f}"
    yield f"{layers['differing']} of {layers['compared']}"
    yield f"{100 * worst['share']:.1g}" if worst else "0"
    yield f"{report['quantized']['sqnr_db']:.2f}"
    yield f"{fat.evaluate(student, test)['quantized']['sqnr_db']:.2f}"
    yield str(report["kernels"]["integer_layers"])
    yield f"{report['latency_ms']['ratio']:.2f}"
    yield f"{report['size_mb']['ratio']:.3f}"


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="onnx", choices=TARGETS)
    parser.add_argument("--model", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--images", type=int, default=64, help="test images")
    for name, choices in (
        ("granularity", ("per_tensor", "per_channel")),
        ("scheme", ("asymmetric", "symmetric")),
    ):
        parser.add_argument(f"--{name}", nargs="+", default=list(choices), choices=choices)
    parser.add_argument("--bits", type=int, default=8, help="bits of the weights")
    parser.add_argument("--equalize", default="none", help="a value of quant.equalize.method")
    parser.add_argument("--out", type=Path, help="keep the files in this folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
