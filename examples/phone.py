"""Make a full-integer LiteRT file for phones from a folder of images.

    pip install -e '.[litert]'
    python examples/phone.py --images DIR --model mobilenetv2_100

The file takes and gives int8; its scales and zero points are printed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import fat
from fat.data import FatDataModule
from fat.export import export, make_target
from fat.models import load_float_network


def main() -> None:
    """Quantize per tensor, train, export and verify."""
    parser = argparse.ArgumentParser(description="Export a full-integer .tflite file.")
    parser.add_argument("--images", type=Path, required=True, help="a folder of images")
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="a name that timm knows")
    parser.add_argument("--weights", help="a .safetensors or .pth file, or 'random'")
    parser.add_argument("--out", type=Path, default=Path("student.tflite"))
    parser.add_argument(
        "--size", type=int, help="side of the input, pixels; default: the network's"
    )
    parser.add_argument("--epochs", type=int, default=3, help="passes over the images")
    options = parser.parse_args()

    target = make_target("litert", integer_io=True)
    try:
        target.check()
    except fat.FatError as error:
        sys.exit(f"skipped: {error}")

    network = load_float_network(options.model, weights=options.weights)
    preprocessing = network.preprocessing
    if options.size:
        preprocessing = replace(preprocessing, size=(options.size, options.size))
    data = FatDataModule.folder(options.images, preprocessing)
    data.setup()
    student = fat.prepare(network.network, data.example_batch()[0])
    fat.calibrate(student, data.calibration_dataloader())
    fat.fit(
        student, data.train_dataloader(), validation=data.val_dataloader(), epochs=options.epochs
    )
    report = export(student, options.out, target, data.test_dataloader())

    metrics, kernels = report["quantized"], report["kernels"]
    print(f"{options.out} in {report['runtime']}, {report['images']} images:")
    print(f"agreement with float {metrics['agreement']:.1f} %, SQNR {metrics['sqnr_db']:.1f} dB")
    print(f"integer layers: {kernels['integer_layers']}, float layers: {kernels['float_layers']}")
    print(
        f"size: {report['size_mb']['quantized']:.2f} MB, {report['size_mb']['ratio']:.2f} of float"
    )


if __name__ == "__main__":
    try:
        main()
    except fat.FatError as error:
        sys.exit(f"Error: {error}")
