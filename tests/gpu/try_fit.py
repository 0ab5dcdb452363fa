"""Print what a pretended GPU does for each step of the pipeline: ``python tests/gpu/try_fit.py``.

Every case says ok, or what was raised and at which line of fat; then follow the kernels, bytes and
host reads of a training step and of inference. The exit status is 0 if all cases are ok and neither
reads on the host. ``--network NAME`` takes a network of timm with random weights, by default it is
a tiny one.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import fat  # noqa: E402
from fat.evaluation.layer_analysis import layer_errors  # noqa: E402
from fat.models.self_test import self_test  # noqa: E402
from fat.quant.range_estimators import STRATEGIES  # noqa: E402
from tests.conftest import TinyNet, realistic  # noqa: E402
from tests.gpu.pretended import PretendedGpu  # noqa: E402

BLOCKS = fat.ReconstructSpec(steps=2, images=8, batch_size=4)
RECIPES: dict[str, dict[str, Any]] = {
    "thresholds alone": {"bias_correction": False},
    "the default recipe": {},
    "block by block": {"epochs": 0, "reconstruction": BLOCKS},
    "with a loss of features": {"feature_weight": 0.1},
    "in bf16": {"trainer_options": {"precision": "bf16-mixed"}},
}


def case(title: str, function: Callable[[], object]) -> bool:
    """Run a case and print its result, or the error and where in fat it was raised."""
    try:
        result = function()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "/fat/" in f.filename]
        print(f"{title}: {type(error).__name__}: {str(error)[:200]} at {own[-3:]}")
        return False
    print(f"{title}: ok{'' if result is None else f', {result}'}")
    return True


def main() -> int:
    """Run all cases; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", help="name of a network of timm; by default a tiny network")
    parser.add_argument("--size", type=int, default=32, help="pixels on each side of the images")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(8, 3, given.size, given.size)
    network = timm.create_model(given.network, pretrained=False) if given.network else TinyNet()
    with PretendedGpu(tf32=True, reciprocal=True) as gpu:
        return _cases(gpu, realistic(network, images), images)


def _cases(gpu: PretendedGpu, network: nn.Module, images: Tensor) -> int:
    x = images.to("cuda")
    batches = list(images.split(4))

    def prepared(**spec: Any) -> fat.Student:
        student = fat.prepare(network, images, fat.QuantSpec(**spec)).to("cuda")
        fat.calibrate(student, batches)
        places = {tensor.device for tensor in (*student.parameters(), *student.buffers())}
        assert places == {student.device}, f"a student on {places}"
        return student

    def on_the_device() -> None:
        student = fat.prepare(copy.deepcopy(network).to("cuda"), x)
        fat.calibrate(student, [x])
        assert student.device == x.device

    def calibrated(strategy: str) -> None:
        init = fat.InitSpec(name=strategy, candidates=10)
        prepared(weight_init=init, activation_init=init)

    def fitted(recipe: dict[str, Any]) -> str:
        student = prepared(weights="adaround")
        recipe = {"epochs": 1, "progress": False, **recipe}
        result = fat.fit(student, batches, validation=batches[:1], **recipe)
        assert student.device == x.device, f"the student is on {student.device}"
        return f"loss {result.calibrated_loss:.4g} -> {result.best_loss:.4g}"

    student = prepared(weights="adaround")

    def exported() -> str:
        with tempfile.TemporaryDirectory() as folder:
            report = fat.export_onnx(student, Path(folder) / "student.onnx", batches)
        assert student.device == x.device
        return f"agreement with the student {report['simulation']['agreement']} %"

    good = [case("prepare a network that is on the GPU", on_the_device)]
    good += [
        case(f"calibrate with init={name}", lambda n=name: calibrated(n)) for name in STRATEGIES
    ]
    good += [case(f"fit {name}", lambda r=recipe: fitted(r)) for name, recipe in RECIPES.items()]
    good += [
        case(
            "evaluate", lambda: f"{fat.evaluate(student, batches)['quantized']['sqnr_db']:.1f} dB"
        ),
        case("sensitivity", lambda: f"{len(fat.sensitivity(student, batches[:1]))} tensors"),
        case("layer analysis", lambda: f"{len(layer_errors(student, batches))} tensors"),
        case("self-test", lambda: self_test(student)),
        case("export to ONNX", exported),
    ]

    wanted = student.float_logits(x)
    optimizer = torch.optim.Adam(student.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = (student(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        student.project()

    def infer() -> None:
        with torch.no_grad():
            student(x)

    quantizers = len(student.activation_quantizers()), len(student.layers())
    print(f"{quantizers[0]} activation quantizers and {quantizers[1]} layers:")
    for title, function in (("a training step", step), ("a batch of inference", infer)):
        function()
        with gpu.counting() as counts:
            function()
        print(f"{title}: {counts.table()}")
        good.append(not counts.reads and not counts.waiting_copies)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
