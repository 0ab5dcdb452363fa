"""Quantize a timm network on a folder of images and export a verified ONNX file.

    python examples/quantize_timm_network.py --model mobilenetv2_100 --images DIR

Without arguments it takes EfficientNet-Lite0 and photographs, which are part of the install.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

import fat
from fat.data import FatDataModule
from fat.models import load_float_network


def main() -> None:
    """Quantize, train, evaluate, save and export."""
    parser = argparse.ArgumentParser(description="Quantize a timm network and export it to ONNX.")
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="a name that timm knows")
    parser.add_argument("--weights", help="a .safetensors or .pth file, or 'random'")
    parser.add_argument("--images", type=Path, help="a folder of images; default: photographs")
    parser.add_argument("--out", type=Path, default=Path("quantized"), help="folder for the result")
    parser.add_argument("--bits", type=int, default=8, help="bits of weights and activations")
    parser.add_argument("--count", type=int, default=450, help="number of training images")
    parser.add_argument("--test-count", type=int, default=200, help="number of test images")
    parser.add_argument(
        "--size", type=int, help="side of the input, pixels; default: the network's"
    )
    parser.add_argument("--epochs", type=int, default=3, help="passes over the images")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.out.mkdir(parents=True, exist_ok=True)

    # 1. The float network, and images prepared as it expects them.
    network = load_float_network(options.model, weights=options.weights)
    preprocessing = network.preprocessing
    if options.size:
        preprocessing = replace(preprocessing, size=(options.size, options.size))
    counts = {
        "train_images": options.count,
        "validation_images": max(options.count // 10, 1),
        "test_images": options.test_count,
    }
    if options.images is None:
        data = FatDataModule.photos(preprocessing, **counts)
    else:
        data = FatDataModule.folder(options.images, preprocessing, **counts)
    data.setup()

    # 2. Insert quantizers, set their thresholds, train them. No labels are needed.
    spec = fat.QuantSpec(bits=options.bits)
    student = fat.prepare(network.network, data.example_batch()[0], spec)
    fat.calibrate(student, data.calibration_dataloader())
    before = fat.evaluate(student, data.test_dataloader())["quantized"]
    fat.fit(
        student, data.train_dataloader(), validation=data.val_dataloader(), epochs=options.epochs
    )
    after = fat.evaluate(student, data.test_dataloader())["quantized"]
    for name, metrics in (("calibrated", before), ("trained", after)):
        print(f"{name}: agreement {metrics['agreement']:.1f} %, SQNR {metrics['sqnr_db']:.1f} dB")

    # 3. Save the student, and export a file that ONNX Runtime computes with the same integers.
    fat.save(student, options.out / "student.safetensors")
    report = fat.export_onnx(student, options.out / "student.onnx", data.test_dataloader())
    print(
        f"{options.out / 'student.onnx'}: {report['simulation']['agreement']:.1f} % agreement with "
        f"the student, {report['size_mb']['ratio']:.2f} of the float file's size"
    )


if __name__ == "__main__":
    try:
        main()
    except fat.FatError as error:
        sys.exit(f"Error: {error}")
