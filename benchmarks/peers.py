"""Compare FAT with other quantization tools: same float networks, same images, one scorer.

    pip install -e '.[lite,plot]'
    python benchmarks/peers.py --data DIR
    python benchmarks/peers.py --data DIR --tools nncf-accurate --settings w8a8-per-channel
    python benchmarks/peers.py --report-only

``DIR`` holds ``train/<wnid>/*.jpg``, which every tool may use without labels, and
``val/<wnid>/*.jpg``, which is only evaluated on. Each tool has its own environment with pinned
versions (``--venvs``) and a script in ``tools/``, whose docstring names the documented recipe that
it follows. A cell is one recipe on one network in one setting; it runs in its own process with
``--threads`` cores and is stopped after ``--limit`` seconds.

* Time: from the float network and the images in memory to the exported file, without the start of
  Python, loading and evaluation. FAT reads its images from JPEG files instead.
* Memory: peak of the process up to that point, Python and libraries included.
* *simulation*: the tool's fake-quantized network; *file*: the exported file in its runtime. Both
  are compared with the float network's logits by :class:`fat.evaluation.metrics.Comparison`.

The benchmark can be interrupted at any time: cells that finished or failed do not run again
(``--retry`` repeats failures). The report is written from ``--results``.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers_report import markdown, plot
from tools.common import LOGITS, RESULT, SHIPPED

import fat
from fat.evaluation.metrics import Comparison
from fat.experiment.build import InputSpec, make_data
from fat.experiment.config import DataConfig
from fat.export.base import Program
from fat.export.onnx import Onnx, OnnxRuntime
from fat.models.float_model import load_float_network
from fat.utils.errors import FatError
from fat.utils.io import write_atomic, write_json

ROOT = Path(__file__).parents[1]
TOOLS_FOLDER = Path(__file__).parent / "tools"
RESULTS = Path(__file__).parent / "results" / "peers.json"
PAGE, FIGURE = ROOT / "docs" / "benchmarks.md", Path("figures", "benchmarks.png")
MODELS = {
    "efficientnet_lite0": "tf_efficientnet_lite0",
    "efficientnet_lite2": "tf_efficientnet_lite2",
}
SETTINGS = {
    "w8a8-per-channel": (8, 8, "per_channel"),
    "w8a8-per-tensor": (8, 8, "per_tensor"),
    "w6a6-per-channel": (6, 6, "per_channel"),
    "w4a8-per-channel": (4, 8, "per_channel"),
    "w4a4-per-channel": (4, 4, "per_channel"),
}
"""Name → bits of weights, bits of activations, granularity."""

TORCH = ("torch==2.14.1", "torchvision==0.29.1", "timm==1.0.31", "safetensors==0.8.0")
PINS = {
    "onnxruntime": ("onnxruntime==1.32.0", "onnx==1.23.2", "sympy==1.14.0"),
    "nncf": ("nncf==3.4.0", "openvino==2026.4.1"),
    "aimet": (
        "aimet-torch==2.42.0",
        "onnx==1.23.2",
        "onnxscript==0.7.2",
        "onnxruntime==1.32.0",
        *TORCH,
    ),
    "torchao": ("torchao==0.18.0", *TORCH),
    "brevitas": (
        "brevitas==0.13.4",
        "onnx==1.23.2",
        "onnxscript==0.7.2",
        "onnxoptimizer==0.4.2",
        *TORCH,
    ),
}
"""Requirements of each environment."""


@dataclass(frozen=True)
class Tool:
    """One recipe of one tool.

    Attributes:
        script: Stem of the file in tools/ that runs it.
        recipe: Name of the recipe in the script.
        venv: Environment, a key of PINS; ``None`` is FAT's own.
        label: Name in the report.
    """

    script: str
    recipe: str
    venv: str | None
    label: str


def _tools() -> dict[str, Tool]:
    peers = {
        "onnxruntime": ("onnxruntime_tool", ("minmax", "entropy", "percentile")),
        "nncf": ("nncf_tool", ("fast", "accurate", "overflow")),
        "aimet": ("aimet_tool", ("minmax", "adaround", "seqmse")),
        "torchao": ("torchao_tool", ("x86",)),
        "brevitas": ("brevitas_tool", ("ptq", "gptq")),
    }
    found = {
        f"{name}-{recipe}": Tool(script, recipe, name, f"{name} {recipe}")
        for name, (script, recipes) in peers.items()
        for recipe in recipes
    }
    for recipe in ("calibration", "paper", "swift", "quick", "best"):
        found[f"ours-{recipe}"] = Tool("ours", recipe, None, f"**FAT {recipe}**")
    return found


TOOLS = _tools()


SHORTER = {"swift": (10, 128), "quick": (40, 256)}
"""Steps per block (1.5 times as many at 4 bits) and crops; otherwise the presets ``best_*``.

Loss on the 50 validation images, Lite0: W8A8 0.061 (quick), 0.074 (swift), 0.114 calibrated; W4A8
0.41, 0.59, 1.49."""

EXACT = "quant.equalize.method=exact"
"""For per-tensor thresholds: channels are equalized, each is clipped at its own bound.

Loss on the 50 validation images, Lite0, quick: W8A8 per tensor 0.076 with it, 0.140 without; with
per-channel thresholds it does not help (W6A6 0.226 with it, 0.206 without)."""


def ours(recipe: str, setting: str) -> list[str]:
    """Return the overrides of train.py for one of FAT's recipes."""
    weights, activations, granularity = SETTINGS[setting]
    given = {
        "quant.bits": str(weights),
        "quant.activation.bits": str(activations),
        "quant.granularity": granularity,
    }
    if recipe == "best":
        if granularity == "per_tensor":
            return [f"experiment=best_{setting.partition('-')[0]}_scalar", EXACT]
        return [f"experiment=best_{setting.partition('-')[0]}"]
    if recipe in SHORTER:
        steps, images = SHORTER[recipe]
        return [
            *ours("best", setting),
            f"optim.reconstruction.steps={steps * 3 // 2 if weights == 4 else steps}",
            f"optim.reconstruction.images={images}",
        ]
    paper = {"per_channel": "paper_vector", "per_tensor": "paper_scalar"}[granularity]
    experiment = "calibration_only" if recipe == "calibration" else paper
    return [f"experiment={experiment}", *(f"{key}={value}" for key, value in given.items())]


# ------------------------------------------------------------------------------------------ inputs


def prepare(model: str, options: argparse.Namespace) -> Path:
    """Write the inputs of all tools for a network, unless they exist, and return their folder.

    ``train.npy`` and ``val.npy`` (float32 [N, 3, H, W], normalized, the network's evaluation crop),
    ``labels.npy`` and ``float.npy`` (logits) of val, ``float.onnx`` (batch norms folded) and
    ``weights.safetensors`` (timm's names).
    """
    from safetensors.torch import save_file

    folder: Path = options.out / "inputs" / model
    about = {"model": MODELS[model], "data": str(options.data), "seed": options.seed}
    try:
        if json.loads((folder / "inputs.json").read_text()) == about:
            return folder
    except (OSError, ValueError):
        pass
    folder.mkdir(parents=True, exist_ok=True)
    source = load_float_network(MODELS[model])
    config = DataConfig(
        source="folder", root=str(options.data), calibration_images=10**6, workers=0
    )
    data = make_data(config, InputSpec.of(source), options.seed)
    train = [x for loader in (data.calibration_dataloader(), data.val_dataloader()) for x in loader]
    val = list(data.test_dataloader())
    with torch.no_grad():
        logits = torch.cat([source.network(images) for images, _ in val])
    student = fat.prepare(source.network, val[0][0][:2])
    Onnx().write(Program(student.teacher, val[0][0]), folder / "float.onnx")
    save_file(source.network.state_dict(), folder / "weights.safetensors")
    np.save(folder / "train.npy", torch.cat([images for images, _ in train]).numpy())
    np.save(folder / "val.npy", torch.cat([images for images, _ in val]).numpy())
    np.save(folder / "labels.npy", torch.cat([labels for _, labels in val]).numpy())
    np.save(folder / "float.npy", logits.numpy())
    write_json(folder / "inputs.json", about)
    return folder


def python_of(venv: str | None, options: argparse.Namespace) -> str:
    """Return the interpreter of an environment, created if a pinned version is missing."""
    if venv is None:
        return sys.executable
    folder = options.venvs / venv
    python = str(folder / "bin" / "python")
    pins = PINS[venv]
    check = (
        "import sys, importlib.metadata as m\n"
        "for pin in sys.argv[1:]:\n"
        "    name, _, wanted = pin.partition('==')\n"
        "    assert m.version(name).split('+')[0] == wanted, pin\n"
    )
    if (
        Path(python).exists()
        and not subprocess.run(
            [python, "-c", check, *pins], capture_output=True, check=False
        ).returncode
    ):
        return python
    print(f"{venv}: installing {', '.join(pins)} into {folder}", flush=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [python, "-m", "pip", "install", "--quiet", *pins],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FatError(f"{venv} cannot be installed: {last_line(done.stderr or done.stdout)}")
    return python


# ------------------------------------------------------------------------------------------- cells


def command(tool: str, model: str, setting: str) -> str:
    """Return the command that runs one cell."""
    return (
        f"python benchmarks/peers.py --data DIR --tools {tool} --models {model} "
        f"--settings {setting}"
    )


def run_cell(
    tool: str, model: str, setting: str, inputs: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Run one cell in its own process and score its results; a failure is a result too."""
    about = TOOLS[tool]
    weights, activations, granularity = SETTINGS[setting]
    out = options.out / "cells" / f"{tool}-{model}-{setting}"
    out.mkdir(parents=True, exist_ok=True)
    for name in (RESULT, LOGITS, SHIPPED):
        (out / name).unlink(missing_ok=True)
    overrides = [
        "data=folder",
        f"data.root={options.data}",
        f"model={model}",
        f"seed={options.seed}",
        *(ours(about.recipe, setting) if about.venv is None else ()),
    ]
    job = {
        "recipe": about.recipe,
        "weight_bits": weights,
        "activation_bits": activations,
        "granularity": granularity,
        "model": MODELS[model],
        "inputs": str(inputs),
        "out": str(out),
        "threads": options.threads,
        "seed": options.seed,
        "overrides": overrides,
    }
    write_json(out / "job.json", job)
    cell: dict[str, Any] = {
        "tool": tool,
        "model": model,
        "setting": setting,
        "command": command(tool, model, setting),
        "machine": machine(options.threads),
    }
    if about.venv is None:
        cell["train"] = " ".join(
            ["python train.py data=folder data.root=DIR export=onnx", *overrides[2:]]
        )
    started = time.perf_counter()
    try:
        python = python_of(about.venv, options)
        with (out / "output.log").open("w") as log:
            done = subprocess.run(
                [python, TOOLS_FOLDER / f"{about.script}.py", out / "job.json"],
                cwd=out,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=options.limit,
                env=environment(about, options.threads),
            )
        if done.returncode:
            text = (out / "output.log").read_text(errors="replace")
            return cell | {"failed": f"{last_line(text)} (exit status {done.returncode})"}
        found = json.loads((out / RESULT).read_text())
        if "refused" in found:
            return cell | {"refused": found["refused"]}
        return cell | found | score(out, inputs, found, options.threads)
    except subprocess.TimeoutExpired:
        return cell | {"failed": f"not finished after {options.limit:g} s", "timeout": True}
    except (FatError, OSError, ValueError) as error:
        return cell | {"failed": last_line(str(error))}
    finally:
        cell["process_seconds"] = time.perf_counter() - started


def environment(tool: Tool, threads: int) -> dict[str, str]:
    """Return the environment variables of a cell: its threads, and FAT's path for FAT only."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    given = {**os.environ, **dict.fromkeys(names, str(threads))}
    if tool.venv is None:
        given["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [given.get("PYTHONPATH")])])
    else:
        given.pop("PYTHONPATH", None)
    return given


def last_line(text: str) -> str:
    """Return the last error line of an output, without folders, at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    line = (errors or lines or ["no output"])[-1]
    return re.sub(r"\s+", " ", re.sub(r"(/[\w.+-]+){2,}/", "", line))[:300]


def score(out: Path, inputs: Path, found: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Return the metrics of the simulation and of the exported file in its runtime."""
    reference, labels = np.load(inputs / "float.npy"), np.load(inputs / "labels.npy")
    simulated = np.load(out / LOGITS)
    shipped: dict[str, Any] | None = None
    if found.get("runtime") == "onnxruntime":
        try:
            file = open_file(out / found["file"], threads)
        except FatError as error:  # keep the simulation
            unopened = {"export_failed": last_line(str(error)), "shipped": None}
            return {"simulation": metrics_of(simulated, reference, labels), **unopened}
        images = torch.from_numpy(np.load(inputs / "val.npy"))
        logits = torch.cat([file.run(part)[0] for part in torch.split(images, 1)]).numpy()
        kernels = file.kernels()
        shipped = {
            "runtime": file.name,
            "integer_layers": kernels.integer_layers,
            "float_layers": len(kernels.float_layers),
            "size_mb": (out / found["file"]).stat().st_size / 1e6,
        }
    elif (out / SHIPPED).is_file():  # run by the tool's own script
        logits, shipped = np.load(out / SHIPPED), dict(found["shipped"])
    if shipped is not None:
        shipped |= metrics_of(logits, reference, labels)
        shipped["agrees_with_simulation"] = metrics_of(logits, simulated, labels)["agreement"]
    return {"simulation": metrics_of(simulated, reference, labels), "shipped": shipped}


def open_file(path: Path, threads: int) -> OnnxRuntime:
    """Open a file in ONNX Runtime, with shared constants duplicated if it fails otherwise.

    With ``session.x64quantprecision``, ONNX Runtime 1.32 converts an int8 constant once per use
    under the same name and stops at the second; Brevitas' files share constants.
    """
    import onnx

    try:
        return OnnxRuntime(path, threads=threads)
    except FatError:
        model = onnx.load(path)
        constants = {constant.name: constant for constant in model.graph.initializer}
        used: set[str] = set()
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name in used:
                    copy = model.graph.initializer.add()
                    copy.CopyFrom(constants[name])
                    copy.name = node.input[place] = f"{name}.{len(model.graph.initializer)}"
                elif name in constants:
                    used.add(name)
        apart = path.with_name(f"apart-{path.name}")
        onnx.save(model, apart)
        return OnnxRuntime(apart, threads=threads)


def metrics_of(logits: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Compare logits [N, classes] with those of the float network."""
    compared, exact = Comparison(), Comparison()
    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in (logits, reference, labels)]
    compared.update(*tensors)
    exact.update(tensors[1], tensors[1], tensors[2])
    found, floats = compared.compute(), exact.compute()
    drop = None if found["top1"] is None else floats["top1"] - found["top1"]
    return {
        "top1": found["top1"],
        "top1_drop": drop,
        "agreement": found["agreement"],
        "sqnr_db": found["sqnr_db"],
        "images": len(labels),
    }


# ----------------------------------------------------------------------------------------- results


def load_results(path: Path) -> dict[str, Any]:
    """Return the stored results: ``cells`` by key."""
    if not path.is_file():
        return {"cells": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def key_of(tool: str, model: str, setting: str) -> str:
    """Return the key of a cell in the results."""
    return f"{model} {setting} {tool}"


def save_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results sorted, so that a diff shows new ones."""
    text = json.dumps(rounded(results), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def rounded(value: Any) -> Any:
    """Round all numbers to four decimals."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(child) for key, child in value.items()}
    return [rounded(child) for child in value] if isinstance(value, list | tuple) else value


def is_done(cell: Mapping[str, Any] | None, *, retry: bool) -> bool:
    """Return whether a cell needs no run."""
    return cell is not None and not (retry and "failed" in cell)


def run_all(cells: Sequence[tuple[str, str, str]], options: argparse.Namespace) -> None:
    """Run the missing cells and store each result at once."""
    results = load_results(options.results)
    waiting = [
        cell
        for cell in cells
        if not is_done(results["cells"].get(key_of(*cell)), retry=options.retry)
    ]
    print(f"{len(cells)} cells, {len(cells) - len(waiting)} of them finished before.", flush=True)
    spent: list[float] = []
    for number, (tool, model, setting) in enumerate(waiting, 1):
        left = ""
        if spent:
            minutes = sum(spent) / len(spent) * (len(waiting) - number + 1) / 60
            left = f", about {minutes:.0f} min left"
        print(f"{number} of {len(waiting)}{left}: {key_of(tool, model, setting)}", flush=True)
        started = time.perf_counter()
        cell = run_cell(tool, model, setting, prepare(model, options), options)
        spent.append(time.perf_counter() - started)
        results = load_results(options.results)  # another process may have added some
        results["cells"][key_of(tool, model, setting)] = cell
        save_results(options.results, results)
        print(f"    {said(cell)}", flush=True)


def write_report(options: argparse.Namespace) -> None:
    """Write docs/benchmarks.md and its plot from all results."""
    results = load_results(options.results)
    labels = {name: tool.label for name, tool in TOOLS.items()}
    scripts = dict.fromkeys(tool.script for tool in TOOLS.values())
    recipes = {
        name: ast.get_docstring(ast.parse((TOOLS_FOLDER / f"{name}.py").read_text())) or ""
        for name in scripts
    }
    text = markdown(results, labels, MODELS, list(SETTINGS), PINS, recipes)
    write_atomic(options.page, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"Written: {options.page}")
    try:
        plot(results, labels, list(MODELS), list(SETTINGS), options.page.parent / FIGURE)
    except ImportError:
        print("No figure: pip install -e '.[plot]' brings matplotlib.")


def machine(threads: int) -> str:
    """Return the processor and the cores per cell."""
    from step import machine_name

    return f"{machine_name()}, {threads} core{'s' if threads > 1 else ''}"


def said(cell: Mapping[str, Any]) -> str:
    """Return a one-line summary of a cell."""
    if "simulation" not in cell:
        return str(cell.get("refused") or cell.get("failed"))
    found = cell["simulation"]
    return (
        f"top-1 {found['top1']:.1f}, agreement {found['agreement']:.1f} %, "
        f"{found['sqnr_db']:.1f} dB, {cell['seconds']:.0f} s, {cell['peak_mb']:.0f} MB"
    )


# ------------------------------------------------------------------------------------------- main


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train/ and val/")
    for name, known in (("tools", TOOLS), ("models", MODELS), ("settings", SETTINGS)):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            default=list(known),
            choices=known,
            metavar="X",
            help=", ".join(known),
        )
    parser.add_argument("--threads", type=int, default=1, help="cores per cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1800, help="time limit of a cell in seconds")
    parser.add_argument("--out", type=Path, default=Path("outputs/peers"))
    parser.add_argument(
        "--venvs", type=Path, help="folder of the environments, OUT/venvs by default"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE, help="the report")
    parser.add_argument("--retry", action="store_true", help="repeat failed cells")
    parser.add_argument("--report-only", action="store_true", help="write the report, run nothing")
    options = parser.parse_args(arguments)
    if options.data is None and not options.report_only:
        parser.error("--data DIR is needed: a folder with train/ and val/")
    options.out, options.page = options.out.resolve(), options.page.resolve()
    options.venvs = (options.venvs or options.out / "venvs").absolute()
    if options.data is not None:
        options.data = options.data.expanduser().resolve()
    return options


def main() -> None:
    """Run the missing cells, then write the report."""
    options = parse()
    if not options.report_only:
        torch.set_num_threads(options.threads)
        cells = [
            (tool, model, setting)
            for model in options.models
            for setting in options.settings
            for tool in options.tools
        ]
        run_all(cells, options)
    write_report(options)


if __name__ == "__main__":
    main()
