"""Check which of timm's networks FAT supports, from tracing to the exported file.

    python benchmarks/coverage.py [--models mobilenetv2_100 ...] [--jobs 2] [--failed]

The smallest network of each timm module and a list of mobile networks go through all stages:

* **trace** the network and **fold** its batch norms: none is left, and the logits keep 80 dB;
* **equalize** with ``exact``: the float logits keep 80 dB;
* **insert** quantizers (into the original network) and **calibrate** with 8 bits and per-channel
  thresholds on four images;
* **train** for one step: the loss is finite, and every trained parameter has a gradient and moves.
  Thresholds where these images clip and round nothing have a gradient of exactly 0; they are
  counted;
* **save** and load: the logits are bit-identical;
* **export** to ONNX and verify in ONNX Runtime, see docs/export.md.

The weights are random, because the question is not accuracy. Batch norms have seen images in
training mode, and parameters that a new network has at or near 0 or at 1 are drawn, so that every
branch counts. The image size is the network's own, but at most ``--size`` where it accepts others.

Every network runs in its own process with one thread, ``--memory`` GB and ``--limit`` seconds.
Results are stored in benchmarks/results/coverage.json as they arrive and are not computed again
without ``--again`` (all) or ``--failed``. At the end docs/coverage.md is written from them.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

import fat
from fat.graph.passes.batch_norm_folding import fold_batch_norms
from fat.graph.passes.equalization import equalize
from fat.graph.tracing.capture import trace
from fat.models.preparation import check_folding
from fat.quant.metrics import logits_sqnr_db
from fat.training.losses import rmse
from fat.training.module import DistillModule
from fat.utils.errors import FatError, first_line
from fat.utils.io import write_atomic

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/coverage.json"
SMALLEST = ROOT / "benchmarks/results/smallest.json"
PAGE = ROOT / "docs/coverage.md"
STAGES = ("trace", "fold", "equalize", "insert", "calibrate", "train", "save", "export")
LEAST_DB = 80.0
MOBILE = (
    *("mobilenetv1_100", "mobilenetv1_125", "mobilenetv2_050", "mobilenetv2_100"),
    *("mobilenetv2_140", "mobilenetv3_small_050", "mobilenetv3_small_100"),
    *("mobilenetv3_large_100", "mobilenetv3_rw", "tf_mobilenetv3_large_minimal_100"),
    *("mobilenetv4_conv_small", "mobilenetv4_conv_medium", "mobilenetv4_hybrid_medium"),
    *("mobilenet_edgetpu_100", "mobilenet_edgetpu_v2_xs", "mobilenetv5_base", "mnasnet_050"),
    *("mnasnet_100", "mnasnet_140", "mnasnet_small", "semnasnet_050", "semnasnet_100"),
    *("spnasnet_100", "efficientnet_b0", "efficientnet_es", "efficientnet_el"),
    *("tf_efficientnet_b0", "tf_efficientnetv2_b0", "efficientnet_lite0"),
    *("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2"),
    *("tf_efficientnet_lite3", "tf_efficientnet_lite4", "tf_efficientnet_cc_b0_4e", "tinynet_a"),
    *("tinynet_e", "lcnet_035", "lcnet_100", "fbnetc_100", "fbnetv3_b", "mixnet_s"),
    *("tf_mixnet_s", "ghostnet_050", "ghostnet_100", "ghostnetv2_100", "ghostnetv3_050"),
    *("hardcorenas_a", "hardcorenas_f", "repvgg_a0", "repghostnet_050", "repvit_m0_9"),
    *("mobileone_s0", "mobileone_s4", "fastvit_t8", "fastvit_mci0", "rexnet_100", "rexnetr_100"),
    *("regnetx_002", "regnety_002", "regnetz_b16", "mobilevit_xxs", "mobilevitv2_050"),
    *("efficientformer_l1", "edgenext_xx_small", "shvit_s1", "starnet_s1", "efficientvit_b0"),
    *("efficientvit_m0", "dla34", "hrnet_w18_small", "resnet18", "resnet50", "resnext50_32x4d"),
    *("seresnet50", "skresnet18", "ecaresnet26t", "resnetblur50", "resnetaa50", "vgg11_bn"),
    *("densenet121", "inception_v3", "xception41"),
)
INTEGER = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "Nhwc")
"""Prefixes of ONNX Runtime's integer operators."""
MOVING = frozenset(
    (
        *("Cast", "Clip", "Concat", "ConstantOfShape", "DepthToSpace", "DequantizeLinear"),
        *("Equal", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity"),
        *("Max", "MaxPool", "Min", "Pad", "QuantizeLinear", "Range", "Reshape", "Shape", "Slice"),
        *("SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
    )
)
"""Operators that move or clip values, compute sizes, quantize or dequantize."""


def main() -> None:
    """Run the missing networks, then write the page."""
    options = parse()
    if options.one:
        print(json.dumps(check(options.one, options.size)))
        return
    results = read()
    wanted = sorted({*smallest(), *MOBILE})
    names = [] if options.report_only else options.models or wanted
    unknown = [name for name in names if not timm.is_model(name)]
    if unknown:
        sys.exit(f"timm {timm.__version__} has no network {unknown[0]}")
    done = {name for name, row in results.items() if not (options.failed and row["error"])}
    missing = [name for name in names if options.again or name not in done]
    bar = tqdm(total=len(missing), desc="Networks", disable=not missing)
    with ThreadPoolExecutor(options.jobs) as pool, bar:
        for done_row in as_completed([pool.submit(run, name, options) for name in missing]):
            row = done_row.result()
            results[row["network"]] = row
            keep(results)
            bar.update()
            tqdm.write(summary(row))
    text = page(list(results.values()), [name for name in wanted if name not in results])
    write_atomic(PAGE, lambda path: path.write_text(text))


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", nargs="+", help="only these of timm's networks")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="networks at a time")
    parser.add_argument(
        "--size", type=int, default=160, help="image size where the network accepts any"
    )
    parser.add_argument("--memory", type=float, default=6.0, help="memory limit of a network in GB")
    parser.add_argument(
        "--limit", type=int, default=1200, help="time limit of a network in seconds"
    )
    parser.add_argument("--again", action="store_true", help="also run networks that have a result")
    parser.add_argument("--failed", action="store_true", help="repeat networks that did not pass")
    parser.add_argument("--report-only", action="store_true", help="only write the page")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


# ------------------------------------------------------------------------------ in its own process


def check(name: str, size: int) -> dict[str, Any]:
    """Run all stages on one network; never raises.

    Args:
        name: timm's name of the network.
        size: Largest image side where the network accepts any.

    Returns:
        The network's row: ``network``, ``parameters``, ``size``, ``passed`` (stages), ``error``,
        the versions of timm and torch, and the results of each stage.
    """
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    row: dict[str, Any] = {"network": name, "passed": [], "error": None, "error_kind": None}
    row |= {"timm": timm.__version__, "torch": torch.__version__.partition("+")[0]}
    try:
        for stage, found in stages(name, size):
            row.update(found)
            if stage:
                row["passed"].append(stage)
    except FatError as error:
        row["error"], row["error_kind"] = str(error), "refused"
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {first_line(error)}"
        row["error_kind"] = "crashed"
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def stages(name: str, size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the results of each stage as it is done."""
    network, images = setting(name, size)
    yield (
        "",
        {
            "parameters": sum(p.numel() for p in network.parameters()),
            "size": list(images.shape[2:]),
        },
    )
    yield from passes(network, images)
    student = fat.prepare(network, images)
    yield "insert", {"layers": len(student.layers())}
    fat.calibrate(student, images)
    yield "calibrate", {"sqnr_db": fat.evaluate(student, images)["quantized"]["sqnr_db"]}
    yield "train", train(student, images)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "student.safetensors"
        fat.save(student, file)
        loaded = fat.load(file)
        with torch.no_grad():
            demand(torch.equal(student(images), loaded(images)), "the loaded student differs")
            same = torch.equal(student.float_logits(images), loaded.float_logits(images))
            demand(same, "the loaded teacher differs")
        yield "save", {}
        exported = fat.export_onnx(
            student, Path(folder) / "student.onnx", images, beside_float=False
        )
    yield (
        "export",
        {
            "integer_layers": exported["kernels"]["integer_layers"],
            "operators": exported["kernels"]["operators"],
            "differing": exported["layers"]["differing"],
            "compared": exported["layers"]["compared"],
            "worst": exported["layers"]["worst"],
            "parity_db": exported["simulation"]["sqnr_db"],
        },
    )


@torch.no_grad()
def passes(network: nn.Module, images: Tensor) -> Iterator[tuple[str, dict[str, Any]]]:
    """Trace, fold and equalize separately."""
    graph = trace(network, images)
    yield "trace", {}
    report = fold_batch_norms(graph)
    check_folding(network, graph, [images])
    left = [name for name, module in graph.named_modules() if isinstance(module, _BatchNorm)]
    demand(not left, f"batch norms are left: {left}")
    yield "fold", {"folded": len(report.pairs), "convolutions": len(report.convolutions)}
    before = graph(images)
    groups, moved = equalized(graph, before, images)
    if not moved > LEAST_DB:  # float32's own rounding, or a mistake; float64 has no rounding
        graph = trace(copy.deepcopy(network).double(), images.double())
        fold_batch_norms(graph)
        groups, moved = equalized(graph, graph(images.double()), images.double())
    demand(moved > LEAST_DB, f"equalizing moved the logits to {moved:.1f} dB")
    yield "equalize", {"equalized": groups}


def equalized(graph: fx.GraphModule, before: Tensor, images: Tensor) -> tuple[int, float]:
    """Return the number of equalized pairs of layers and the SQNR of the moved logits."""
    spec = fat.QuantSpec(equalize=fat.EqualizeSpec("exact"))
    pairs = equalize(graph, [images], spec).pairs
    return len(pairs), logits_sqnr_db(before, graph(images))


def setting(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """Return a network with statistics as if it were trained, and images of its size."""
    torch.manual_seed(0)
    network = timm.create_model(name)
    given = network.default_cfg
    side = given["input_size"][1:]
    if not given.get("fixed_input_size"):
        least = (given.get("min_input_size") or (3, 32, 32))[1:]
        side = tuple(min(full, max(size, low)) for full, low in zip(side, least, strict=True))
    network.eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, *side))
    except Exception:  # its sizes are those of its patches or windows
        side = given["input_size"][1:]
    coarse = torch.randn(4, 3, 8, 8)
    images = F.interpolate(coarse, size=side, mode="bicubic") + 0.2 * torch.randn(4, 3, *side)
    for parameter in network.parameters():
        liven(parameter)
    for buffer in network.buffers():
        if bool(buffer.isinf().any()):  # bounds of clamps, which checkpoints bring
            buffer.copy_(4.0 * buffer.sign())
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = None  # a plain mean over what it sees
    network.train()
    with torch.no_grad():
        for _ in range(2 if norms else 0):
            network(images)
    return network.eval().requires_grad_(False), images


@torch.no_grad()
def liven(parameter: Tensor) -> None:
    """Draw a parameter whose values are all 0, all 1 or all nearly 0, as in new layer scales."""
    first = float(parameter.flatten()[0])
    if bool((parameter != first).any()) or (parameter.numel() == 1 and first not in (0.0, 1.0)):
        return
    if abs(first) >= 0.5:
        parameter.uniform_(0.5, 1.5)
    elif first == 0:
        parameter.normal_(std=0.05)
    else:
        parameter.uniform_(0.1, 0.5)


def train(student: fat.Student, images: Tensor) -> dict[str, int]:
    """Train for one step; return the numbers of trained and of moved parameters."""
    optimizer = DistillModule(student, fat.TrainSpec()).configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    student.train()
    loss = rmse(student.float_logits(images), student(images))
    demand(bool(loss.isfinite()), f"the loss is {float(loss)}")
    loss.backward()
    optimizer.step()
    after = dict(student.named_parameters())
    lost = [name for name, p in after.items() if p.grad is None or not p.grad.isfinite().all()]
    demand(not lost, f"{len(lost)} parameters have no gradient: {', '.join(lost[:3])}")
    still = [name for name, p in after.items() if torch.equal(before[name], p)]
    # Adam divides by the gradient's size, but adds 1e-8 to it.
    stuck = [n for n in still if after[n].grad.abs().max() > 1e-6]  # type: ignore[union-attr]
    demand(not stuck, f"{len(stuck)} parameters do not move: {', '.join(stuck[:3])}")
    student.project()
    student.eval()
    return {"trained": len(after), "moved": len(after) - len(still)}


def demand(condition: bool, otherwise: str) -> None:
    """Raise an AssertionError with this message if a condition does not hold."""
    if not condition:
        raise AssertionError(otherwise)


# -------------------------------------------------------------------------------- around it


def smallest() -> list[str]:
    """Return the smallest network of each timm module; stored, because it takes minutes."""
    stored = json.loads(SMALLEST.read_text()) if SMALLEST.is_file() else {}
    if stored.get("timm") != timm.__version__:
        modules = tqdm(timm.list_modules(), desc="Smallest network of timm's modules")
        found = [min(timm.list_models(module=module), key=parameters) for module in modules]
        stored = {"timm": timm.__version__, "networks": found}
        text = json.dumps(stored, indent=1) + "\n"
        write_atomic(SMALLEST, lambda path: path.write_text(text))
    return list(stored["networks"])


def parameters(name: str) -> float:
    """Return the number of parameters of a network without allocating them."""
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return sum(p.numel() for p in timm.create_model(name).parameters())
    except Exception:  # some cannot be made without values: not the smallest, then
        return float("inf")


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return a network's row from a process with limited memory and time."""
    command = [sys.executable, __file__, "--one", name, "--size", str(options.size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process,
        ThreadPoolExecutor(1) as reader,
    ):
        output = reader.submit(process.communicate)
        peak, reason = 0.0, ""
        while process.poll() is None and not reason:
            time.sleep(0.2)
            peak = max(peak, resident(process.pid))
            if peak > options.memory:
                reason = f"took more than {options.memory:g} GB of memory (--memory)"
            elif time.perf_counter() - started > options.limit:
                reason = f"took more than {options.limit} s (--limit)"
        process.kill()
        out, err = output.result()
    lines = out.strip().splitlines()
    if lines and not reason:
        row: dict[str, Any] = json.loads(lines[-1])
    else:
        said = reason or f"died: {(err.strip().splitlines() or ['no message'])[-1]}"
        row = {"network": name, "passed": [], "error": said, "error_kind": "stopped"}
        row["seconds"] = round(time.perf_counter() - started, 1)
    return {**row, "module": module_of(name), "peak_gb": round(peak, 2)}


def module_of(name: str) -> str:
    """Return the module under which timm lists a network; its class may be in another."""
    return next((m for m in timm.list_modules() if is_model_in_modules(name, {m})), "none")


def resident(pid: int) -> float:
    """Return the resident memory of a process in GB, 0 if unknown."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(s.split()[1]) * 1.024e-6 for s in lines if s.startswith("VmRSS:")), 0.0)


def read() -> dict[str, dict[str, Any]]:
    """Read the stored rows by network."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def keep(results: dict[str, dict[str, Any]]) -> None:
    """Write all rows, one per line."""
    lines = [f"{json.dumps(name)}: {json.dumps(results[name])}" for name in sorted(results)]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    RESULTS.parent.mkdir(exist_ok=True)
    write_atomic(RESULTS, lambda path: path.write_text(text))


def summary(row: dict[str, Any]) -> str:
    """Return a row as one line of text."""
    verdict = row["error"] or f"passed, {in_float(row)}"
    return f"{row['network']:32} {row['seconds']:6.0f} s {row['peak_gb']:5.2f} GB  {verdict[:300]}"


def in_float(row: dict[str, Any]) -> str:
    """List the float operators of the file, most frequent first."""
    kinds = Counter(
        {
            kind: count
            for kind, count in row.get("operators", {}).items()
            if kind not in MOVING and not kind.startswith(INTEGER)
        }
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "nothing"


def page(rows: list[dict[str, Any]], waiting: Sequence[str] = ()) -> str:
    """Return docs/coverage.md from the rows and the names of networks without one."""
    rows = sorted(rows, key=lambda row: (row["module"], row["network"]))
    passed = [row for row in rows if row["error"] is None]
    covered = len({row["module"] for row in passed})
    exact = [row for row in passed if not row["differing"]]
    used = sorted({f"timm {row['timm']}, torch {row['torch']}" for row in passed})
    versions = "; ".join(used)
    lines = [
        "# Supported networks",
        "",
        "```bash",
        "python benchmarks/coverage.py",
        "```",
        "",
        *(line for line in __doc__.split("\n\n", 2)[2].strip().splitlines()),  # type: ignore[union-attr]
        "",
        f"{len(passed)} of {len(rows)} networks pass all stages, from {covered} of timm's "
        f"{len(timm.list_modules())} modules ({versions}).",
        "",
        f"In {len(exact)} of the files, every integer of every operation equals the student's. In "
        "the others, a few results of float operators are rounded the other way; *differing* "
        "counts the affected operations.",
        "",
        "*Size* is the number of parameters. *Layers* are convolutions and linear layers, all of "
        "them integer kernels in the file. *Folded* batch norms were merged into one of them, "
        "*1×1* batch norms became a depthwise convolution. *In float* are the file's operators "
        "without an integer kernel in the runtime; their inputs and outputs are integers.",
        "",
        "| module | network | size | pixels | layers | folded | 1×1 | differing | in float | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(line_of(row) for row in passed),
    ]
    failed = [row for row in rows if row["error"] is not None]
    if failed:
        lines += [
            "",
            "## Failures",
            "",
            "| network | passed | error |",
            "|---|---|---|",
            *(
                f"| {row['network']} | {', '.join(row['passed']) or 'nothing'} | "
                f"{row['error'].replace('|', '/')[:400]} |"
                for row in failed
            ),
        ]
    if waiting:
        lines += ["", "## Not run", "", ", ".join(waiting)]
    return "\n".join(lines) + "\n"


def line_of(row: dict[str, Any]) -> str:
    """Return a network's line of the table."""
    cells = (
        row["module"],
        row["network"],
        f"{1e-6 * row['parameters']:.1f} M",
        "×".join(map(str, row["size"])),
        row["layers"],
        row["folded"],
        row["convolutions"],
        f"{row['differing']} of {row['compared']}",
        in_float(row),
        f"{row['seconds']:.0f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
