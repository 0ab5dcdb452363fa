"""Made-up run and sweep directories for the tests of report pages.

``python -m tests.report.fake_runs DIR`` writes an example of each, with its pages.
"""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from fat.evaluation.sensitivity_analysis import TensorSensitivity
from fat.evaluation.sensitivity_file import SensitivityReport, write_sensitivity
from fat.quant.config import BITS, QuantSpec

HOSTILE = (
    "</script><script>document.title='broken'</script><b onmouseover=\"x\">&amp; 'q' %{x} $1$ 日本"
)
"""Hostile name of a layer, a class or a message; every page must show it verbatim."""
MEGABYTES = {"mobilenet_v2": 14.0, "mnasnet_100": 17.5, "efficientnet_lite0": 18.5}


def picture(seed: int) -> str:
    """A small picture as details.json holds it."""
    x, y = np.meshgrid(np.linspace(0, 6, 96), np.linspace(0, 6, 96))
    channels = [127 + 120 * np.sin(x * (1 + 0.3 * i) + y * (seed % 5) * 0.4 + i) for i in range(3)]
    stream = io.BytesIO()
    Image.fromarray(np.stack(channels, 2).astype(np.uint8)).save(stream, "JPEG", quality=70)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def figures(top1: float | None, agreement: float, db: float) -> dict[str, float | None]:
    return {
        "top1": top1,
        "top5": None if top1 is None else min(100.0, top1 + 8),
        "agreement": agreement,
        "sqnr_db": db,
        "rmse": 10 ** (-db / 20),
    }


def metrics(
    *,
    model: str = "mobilenet_v2",
    bits: tuple[float, float] = (8, 8),
    init: str = "mse",
    granularity: str = "per_channel",
    drops: tuple[float, float | None] = (4.0, 1.0),
    labelled: bool = True,
    latency: float | None = 12.0,
    status: str = "finished",
    command: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """metrics.json of a run with accuracy ``drops`` after calibration and training, points."""
    size = MEGABYTES.get(model, 10.0)
    before, after = drops
    float_top1 = 72.5 if labelled else None

    def judged(drop: float) -> dict[str, float | None]:
        top1 = None if float_top1 is None else float_top1 - drop
        return figures(top1, 100 - 1.5 * drop, 30 - 8 * math.log2(1 + drop))

    done = after is not None and status != "calibrated"
    exported = None
    if latency is not None and status == "finished":
        exported = {
            "onnx": {
                "file": "student.onnx",
                "runtime": "onnxruntime 1.32.0",
                "on": "images",
                "images": 200,
                "float": {"top1": float_top1, "top5": None},
                "quantized": judged(after if done else before),
                "simulation": {"agreement": 100.0, "sqnr_db": 200.0, "largest_step": 0.0},
                "layers": {"compared": 61, "images": 8, "differing": 0, "worst": None},
                "kernels": {
                    "operators": {"QLinearConv": 52},
                    "integer_operators": 60,
                    "integer_layers": 53,
                    "float_layers": [],
                },
                "latency_ms": {
                    "float": 1.4 * latency,
                    "quantized": latency,
                    "ratio": 1 / 1.4,
                    "threads": 1,
                    "batch": 1,
                },
                "size_mb": {"float": size, "quantized": size * bits[0] / 32 + 0.2, "ratio": 0.3},
                "seconds": 26.2,
            }
        }
    return {
        "command": command,
        "sweep": None,
        "status": status,
        "model": model,
        "weights": "hub timm",
        "teacher": None,
        "data": {
            "source": "folder",
            "root": "DIR",
            "labelled": labelled,
            "seed": seed,
            "splits": {"test": {"images": 500, "first_skipped": []}},
        },
        "bits": {"weight": bits[0], "activation": bits[1]},
        "granularity": granularity,
        "scheme": "asymmetric",
        "init": {"weight": init, "activation": init},
        "seed": seed,
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "float": {"top1": float_top1, "top5": 90.5 if labelled else None},
        "calibrated": judged(before),
        "trained": judged(after) if done and after is not None else None,
        "accuracy_drop": (after if done else before) if labelled else None,
        "seconds": {
            "load": 0.6,
            "prepare": 1.4,
            "calibrate": 24.4,
            "evaluate": 58.0,
            "train": 310.25 if done else 0.0,
            "export": 30.0,
        },
        "equalization": {
            "method": "balanced",
            "pairs": 3,
            "locked_share": 0.0,
            "float_shift_db": 23.4,
        },
        "training": {
            "steps": 180,
            "calibrated_loss": 0.41,
            "best_loss": 0.083,
            "best_step": 150,
            "bias_correction": "kept",
            "reconstruction": "off",
            "restored": 0,
            "interrupted": False,
        }
        if done
        else None,
        "size_mb": {"float": size, "quantized": size * bits[0] / 32},
        "exported": exported,
    }


def config(told: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """config.yaml that matches metrics.json."""
    content: dict[str, Any] = {
        "model": {"name": told["model"], "weights": None},
        "data": {"source": "folder", "root": "DIR"},
        "quant": {
            "bits": int(told["bits"]["weight"]),
            "weight": {"bits": None},
            "activation": {"bits": int(told["bits"]["activation"])},
            "granularity": told["granularity"],
            "mixed": None,
        },
        "init": {
            "weight": {"name": told["init"]["weight"]},
            "activation": {"name": told["init"]["activation"]},
        },
        "seed": told["seed"],
        "name": None,
    }
    for entry in overrides:
        name, _, value = entry.partition("=")
        if name == "optim.lr":
            content["optim"] = {"lr": float(value)}
    return content


def table(file: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])


def fake_run(
    directory: Path,
    told: Mapping[str, Any] | None = None,
    *,
    tensors: int = 40,
    name: str = "blocks.{}.conv",
    overrides: Sequence[str] = (),
) -> Path:
    """A finished run with every file that a page reads.

    Args:
        directory: Where.
        told: From :func:`metrics`.
        tensors: Quantized tensors, weights and activations in turn.
        name: What layers are called, with a place for their number.
        overrides: What Hydra notes.
    """

    def called(place: int) -> str:
        return name.replace("{}", str(place))

    told = metrics() if told is None else told
    random_ = random.Random(7)
    directory.mkdir(parents=True)
    (directory / "metrics.json").write_text(json.dumps(told))
    (directory / "config.yaml").write_text(yaml.safe_dump(config(told, overrides)))
    if overrides:
        (directory / ".hydra").mkdir()
        (directory / ".hydra/overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    history: list[tuple[int, str, float]] = []
    for step in range(1, 181):
        loss = 0.4 * math.exp(-step / 60) + 0.08
        rate = 0.001 * (1 + math.cos(math.pi * step / 180))
        history += [(step, "train/loss", loss * random_.uniform(0.8, 1.2))]
        history += [(step, "train/lr", rate)]
    for step in range(0, 181, 30):
        loss = 0.33 * math.exp(-step / 60) + 0.083 + (0.004 if step == 180 else 0)
        history += [
            (step, "val/loss", loss),
            (step, "val/agreement", 98 - 20 * loss),
            (step, "val/sqnr_db", 26 - 25 * loss),
        ]
    table(directory / "history.csv", ("step", "name", "value"), history)
    layers = []
    for place in range(tensors):
        kind = "weight" if place % 2 else "activation"
        db = 38 - 20 * random_.random() ** 3
        alpha = random_.uniform(0.72, 0.99)
        trained = place % 7 != 3
        layers.append(
            (
                called(place // 2),
                kind,
                8,
                64 if kind == "weight" else 1,
                f"{db:.3f}",
                f"{10 ** random_.uniform(-5, -2):.6g}",
                2.5,
                2.5 * alpha,
                *(
                    (f"{alpha:.4f}", f"{alpha - 0.1:.4f}", 1.0, f"{random_.random() * 0.2:.4f}")
                    if trained
                    else ("", "", "", "")
                ),
            )
        )
    table(
        directory / "layers.csv",
        (
            "layer",
            "kind",
            "bits",
            "thresholds",
            "sqnr_db",
            "saturated",
            "threshold_before",
            "threshold_after",
            "alpha_mean",
            "alpha_min",
            "alpha_max",
            "alpha_at_edge",
        ),
        layers,
    )
    table(
        directory / "equalization.csv",
        ("method", "first", "following", "channels", "locked", "first_before", "first_after"),
        [("balanced", called(i), called(i + 1), 32, 0, 120.5 / (i + 1), 4.25) for i in range(3)],
    )
    (directory / "details.json").write_text(json.dumps(_details(layers, name)))
    rows = [
        TensorSensitivity(
            i,
            str(row[0]),
            str(row[1]),
            8,
            float(str(row[4])) - 6,
            97.0,
            22.0,
            96.0,
            576 if row[1] == "weight" else 0,
            0,
            dict.fromkeys(BITS, 30.0) if row[1] == "weight" else {},
        )
        for i, row in enumerate(sorted(layers, key=lambda row: float(str(row[4]))))
    ]
    images = {"source": "folder", "root": None, "split": "calibration", "count": 64}
    write_sensitivity(
        directory, SensitivityReport(rows, str(told["model"]), "hub", images, QuantSpec())
    )
    (directory / "train.log").write_text("…")
    return directory


def _details(layers: Sequence[Sequence[object]], name: str) -> dict[str, Any]:
    generator = np.random.default_rng(3)
    worst = sorted(layers, key=lambda row: float(str(row[4])))[:8]
    histograms = []
    for row in worst:
        spread = generator.uniform(0.5, 1.5)
        values = generator.standard_t(4, 20000) * spread
        values = values if row[1] == "weight" else np.clip(values, 0, None)
        counts, edges = np.histogram(values, bins=400)
        high = float(np.abs(values).max())
        low = -high if row[1] == "weight" else 0.0
        histograms.append(
            {
                "layer": row[0],
                "kind": row[1],
                "sqnr_db": float(str(row[4])),
                "edges": edges.tolist(),
                "counts": counts.astype(float).tolist(),
                "before": [low, high],
                "after": [0.8 * low, 0.8 * high],
            }
        )
    filters = []
    for place in range(3):
        before = np.exp(generator.normal(-2, 1.2, 64))
        filters.append(
            {
                "layer": name.replace("{}", str(place)),
                "before": before.tolist(),
                "after": (before**0.2 * 0.5).tolist(),
            }
        )
    classes = ["tabby cat", "Egyptian cat", "tiger cat", "lynx", "remote control"]
    examples = []
    for place in range(5):
        floats = [
            {"class": classes[(place + i) % 5], "p": p} for i, p in enumerate((0.48, 0.3, 0.1))
        ]
        integers = [floats[1] | {"p": 0.44}, floats[0] | {"p": 0.41}, floats[2] | {"p": 0.06}]
        examples.append(
            {
                "image": picture(place),
                "name": f"n0212304{place}/img_{place}.jpg",
                "label": classes[place] if place else None,
                "float": floats,
                "quantized": integers,
            }
        )
    return {
        "histograms": histograms,
        "filters": filters,
        "examples": examples,
        "images": 500,
        "differing": 9,
    }


def fail(directory: Path, *, error: str, message: str, command: str | None = None) -> Path:
    """A run that failed before its first metrics."""
    directory.mkdir(parents=True)
    traceback = (
        f'Traceback (most recent call last):\n  File "fat/models.py", line 3\n{error}: {message}\n'
    )
    (directory / "failure.json").write_text(
        json.dumps({"error": error, "message": message, "traceback": traceback, "command": command})
    )
    return directory


def fake_sweep(directory: Path, *, labelled: bool = True) -> Path:
    """Three networks at three bit-widths with two inits and two granularities; some fail.

    Args:
        directory: Where.
        labelled: Whether there are accuracies.
    """
    directory.mkdir(parents=True)
    swept = [
        "model=mobilenet_v2,mnasnet_100,efficientnet_lite0",
        "quant.bits=8,6,4",
        "init=mse,percentile",
        "quant.granularity=per_channel,per_tensor",
    ]
    (directory / "multirun.yaml").write_text(
        yaml.safe_dump({"hydra": {"overrides": {"task": swept, "hydra": ["hydra.mode=MULTIRUN"]}}})
    )
    jobs = []
    grid = itertools.product(
        MEGABYTES, (8, 6, 4), ("mse", "percentile"), ("per_channel", "per_tensor")
    )
    for place, (model, bits, init, granularity) in enumerate(grid):
        overrides = [
            f"model={model}",
            f"quant.bits={bits}",
            f"init={init}",
            f"quant.granularity={granularity}",
        ]
        command = "python train.py " + " ".join(overrides)
        job = directory / f"{place}-{model}"
        status = "finished"
        bad = (
            (8 - bits) ** 2
            + (3 if granularity == "per_tensor" else 0)
            + (init == "mse")
            + place % 3
        )
        told = metrics(
            model=model,
            bits=(bits, bits),
            init=init,
            granularity=granularity,
            labelled=labelled,
            drops=(0.4 + 2.6 * bad, -0.2 + 0.45 * bad),
            command=command,
            latency=MEGABYTES[model] * (0.5 + bits / 16) if place % 5 else None,
        )
        if place == 7:
            status = "failed"
            fail(
                job,
                error="HubError",
                command=command,
                message=f"No weights of {model} in reach:"
                f" timm's hub did not answer.\nTry model.weights=FILE, or {HOSTILE}",
            )
        elif place == 20:
            status = "failed"
            job.mkdir()
        elif place == 33:
            status = "unfinished"
            fake_run(
                job,
                {**told, "status": "calibrated", "trained": None, "exported": None},
                tensors=6,
                overrides=overrides,
            )
        elif place >= 34:
            status = "not started"
        else:
            fake_run(job, told, tensors=6, overrides=overrides)
        jobs.append({"directory": job.name, "overrides": overrides, "status": status})
    command = "python train.py -m " + " ".join(swept)
    content = {"id": "2026-11-26/08-00-00", "jobs": jobs, "command": command}
    (directory / "sweep.json").write_text(json.dumps(content))
    return directory


if __name__ == "__main__":
    from fat.report.__main__ import report

    place = Path(sys.argv[1])
    report([fake_run(place / "run"), fake_sweep(place / "sweep")], place / "comparison.html")
