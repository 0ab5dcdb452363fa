"""The benchmarks' tables, and that other tools get the same network. No times."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fat.export.base import Program
from fat.export.onnx import Onnx, OnnxRuntime
from fat.graph.passes.batch_norm_folding import fold_batch_norms
from fat.graph.tracing.capture import trace
from fat.models.float_model import load_float_network
from fat.quant.layers import SameConv2d
from tests.export.students import structured, tiny_student

FOLDER = Path(__file__).parents[1]


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A file of benchmarks/ as a module, for as long as a test takes."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module(name)
    sys.modules.pop(name)


def test_a_missing_gpu_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (step,) = imported("step", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["step.py", "--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        step.main()
    assert end.value.code == 2
    assert "--device cuda: torch finds no GPU here" in capsys.readouterr().err


@pytest.fixture
def qat_peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from imported("qat_peers", monkeypatch)


@pytest.fixture
def same_padded() -> tuple[fx.GraphModule, Tensor]:
    """A folded network with "same" convolutions, and images of an odd and an even side."""
    torch.manual_seed(0)
    network = trace(load_float_network("tf_efficientnet_lite0", weights="random").network)
    fold_batch_norms(network)
    return network.requires_grad_(True), torch.randn(2, 3, 33, 64)


def layers(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if isinstance(child, (nn.Conv2d, nn.Linear))]


def test_peers_get_the_same_network(
    qat_peers: ModuleType, same_padded: tuple[fx.GraphModule, Tensor]
) -> None:
    network, images = same_padded
    plain = qat_peers._plain(network, images)
    assert any(isinstance(layer, SameConv2d) for layer in layers(network))
    assert not any(isinstance(layer, SameConv2d) for layer in layers(plain))
    assert torch.equal(plain(images), network(images))


@pytest.mark.parametrize(("name", "library"), [("Brevitas", "brevitas"), ("torchao", "torchao")])
def test_a_peer_quantizes_every_layer(
    qat_peers: ModuleType, same_padded: tuple[fx.GraphModule, Tensor], name: str, library: str
) -> None:
    pytest.importorskip(library)
    network, images = same_padded
    model = qat_peers.PEERS[name](network, images)
    result, expected = model(images), network(images)
    assert 0.0 < (result - expected).norm() / expected.norm() < 0.5
    result.square().mean().backward()
    trained = list(model.parameters())
    assert len(trained) >= len(list(network.parameters()))
    assert all(parameter.grad is not None for parameter in trained)
    # One quantizer that sees each layer's weight, whatever it is called.
    kind = "FusedMovingAvgObsFakeQuantize" if name == "torchao" else "WeightQuantProxyFromInjector"
    weights = [child for child in model.modules() if type(child).__name__ == kind]
    per_filter = [child for child in weights if name == "Brevitas" or child.ch_axis == 0]
    assert len(per_filter) >= len(layers(network))


@pytest.fixture
def presets(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from imported("presets", monkeypatch)


def test_a_cell_trains_as_its_preset_does_but_shorter(presets: ModuleType) -> None:
    options = argparse.Namespace(steps=7, epochs=2, overrides=["seed=3"])

    def given(preset: str) -> list[str]:
        found: list[str] = presets.command(preset, "mse", options)
        return found[1:]

    assert given("best_w4a4") == ["init=mse", "seed=3", "optim.reconstruction.steps=7"]
    assert given("paper_vector") == ["init=mse", "seed=3", "optim.epochs=2"]
    assert given("calibration_only") == ["init=mse", "seed=3"]


def test_a_finished_cell_is_not_run_again(
    presets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"agreement": 75.04, "sqnr_db": 5.25}
    (tmp_path / "p-s").mkdir()
    (tmp_path / "p-s" / "metrics.json").write_text(
        json.dumps({"trained": None, "calibrated": figures})
    )
    (tmp_path / "p-s" / "command.txt").write_text("python train.py seed=1")
    calls = []

    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        calls.append(1)
        return subprocess.CompletedProcess([], 1)

    monkeypatch.setattr(presets.subprocess, "run", run)
    presets.run_cell(["seed=1"], tmp_path / "p-s", 1)
    assert not calls
    assert presets.table(["p"], ["s"], tmp_path).splitlines()[2] == "| p | 75.0 % 5.2 dB |"
    presets.run_cell(["seed=2"], tmp_path / "p-s", 1)  # another command
    assert calls
    assert presets.result(tmp_path / "p-s") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "mice"], "no init=mice; allowed: aciq, entropy"),
        (["--presets", "best"], "no experiment=best; allowed:"),
        (["--jobz", "2"], "--jobz is neither an option nor an override"),
    ],
)
def test_a_mistyped_argument_of_the_table_is_said(
    presets: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["presets.py", *arguments])
    with pytest.raises(SystemExit):
        presets.main()
    assert message in capsys.readouterr().err


@pytest.fixture
def feeding(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from imported("feeding", monkeypatch)


def feed(feeding: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["feeding.py", *arguments])
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # set again by the benchmark, and restored after it
    threads = torch.get_num_threads()
    try:
        feeding.main()
    finally:
        torch.set_num_threads(threads)


def test_every_way_of_feeding_has_a_row(
    feeding: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(
        feeding,
        monkeypatch,
        *("--images", "4", "--rounds", "1", "--batch", "2", "--size", "32", "--workers", "1"),
    )
    machine, images, heading, *rows = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}, Pillow" in machine
    assert images.startswith("4 images of 500 x 375 pixels and ")
    assert heading.split()[0] == "way"
    table = {" ".join(row.split()[:-5]): row.split()[-5:] for row in rows}
    assert list(table) == [
        "decoder, all pixels",
        "decoder, reduced",
        "folder",
        "cache=jpeg",
        "cache=pixels",
        "folder, 1 workers",
        "cache=jpeg, 1 workers",
        "cache=pixels, 1 workers",
        "folder, augment=device",
        "cache=squares, augment=device",
        "folder, evaluation",
        "training crop alone",
        "batch alone",
    ]
    assert table["decoder, all pixels"][3] == "100%"
    assert table["folder"][4] == "1.00x"
    for rate, least, most, *_ in table.values():
        assert 0 < int(least) == int(rate) == int(most)  # of one round


def test_feeding_takes_a_folder_and_only_what_it_can_decode(
    feeding: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = feeding.photographs(tmp_path / "images", 3)
    (folder / "00001.jpg").write_bytes((folder / "00001.jpg").read_bytes()[:3000])
    (folder / "00003.png").write_bytes(b"no JPEG")
    feed(
        feeding,
        monkeypatch,
        f"data.root={folder}",
        *("--rounds", "1", "--size", "32", "--workers", "0"),
    )
    assert capsys.readouterr().out.splitlines()[1].startswith("2 images of 500 x 375 pixels")
    for name in ("00000.jpg", "00002.jpg"):
        (folder / name).unlink()
    with pytest.raises(SystemExit, match="holds no JPEG that can be decoded"):
        feed(feeding, monkeypatch, f"data.root={folder}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DIR"], "DIR is not data.root=DIR"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--round", "x"], "invalid int value"),
    ],
)
def test_a_mistyped_argument_of_feeding_is_said(
    feeding: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        feed(feeding, monkeypatch, *arguments)
    assert message in capsys.readouterr().err


def test_a_targets_row_holds_what_its_headings_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (targets,) = imported("targets", monkeypatch)
    images = structured(8, 16, seed=1)
    cells = list(targets.row(tiny_student(), tmp_path / "tiny.onnx", Onnx(), [images]))
    assert len(cells) == len(targets.HEADINGS)
    named = dict(zip(targets.HEADINGS, cells, strict=True))
    assert (named["sim dB"], named["sim %"], named["worst %"]) == ("200.0", "100.0", "0")
    assert named["differing"].startswith("0 of ")
    assert named["file dB"] == named["student dB"]
    assert int(named["layers"]) == len(tiny_student().layers())
    assert float(named["ratio"]) > 0.0
    assert float(named["size"]) > 0.0


def test_onnxruntimes_own_tool_quantizes_the_same_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (export,) = imported("export", monkeypatch)
    student, images = tiny_student(), structured(8, 16)
    paths = {kind: tmp_path / f"{kind}.onnx" for kind in ("float", "theirs")}
    Onnx().write(Program(student.teacher, images), paths["float"])
    options = argparse.Namespace(granularity="per_channel", scheme="asymmetric")
    export.quantize(paths["float"], paths["theirs"], [images], options)
    files = {kind: OnnxRuntime(path) for kind, path in paths.items()}
    assert files["float"].kernels().integer_layers == 0
    assert files["theirs"].kernels().integer_layers > 0
    times = export.medians(files, images[:1], repeats=1)
    assert set(times) == set(files)
    assert all(value > 0.0 for value in times.values())


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for name in ("peers_report", "tools", "tools.common"):
        sys.modules.pop(name, None)
    yield from imported("peers", monkeypatch)


def asked(peers: ModuleType, folder: Path, *arguments: str) -> argparse.Namespace:
    options: argparse.Namespace = peers.parse(
        [
            "--data",
            str(folder),
            "--out",
            str(folder / "out"),
            "--results",
            str(folder / "r.json"),
            "--page",
            str(folder / "page.md"),
            *arguments,
        ]
    )
    return options


def a_cell(tool: str, **figures: float) -> dict[str, object]:
    """A finished one."""
    judged = {"top1": 88.0, "top1_drop": 2.0, "agreement": 97.0, "sqnr_db": 19.0, "images": 200}
    return {
        "tool": tool,
        "model": "efficientnet_lite0",
        "setting": "w8a8-per-channel",
        "command": "again",
        "machine": "a machine",
        "seconds": 9.0,
        "cpu_seconds": 8.0,
        "peak_mb": 700.0,
        "simulation": {**judged, **figures},
        "shipped": None,
    }


def test_every_peer_is_pinned(peers: ModuleType) -> None:
    used = {tool.venv for tool in peers.TOOLS.values()} - {None}
    assert used == set(peers.PINS)
    assert all("==" in pin for pins in peers.PINS.values() for pin in pins)
    assert all((FOLDER / "tools" / f"{t.script}.py").is_file() for t in peers.TOOLS.values())


def test_our_recipes_compose(peers: ModuleType) -> None:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(FOLDER.parent / "conf"), version_base="1.3"):
        for setting, (weights, activations, granularity) in peers.SETTINGS.items():
            for recipe in ("calibration", "paper", "swift", "quick", "best"):
                quant = compose("train", overrides=peers.ours(recipe, setting)).quant
                assert (quant.weight.bits or quant.bits) == weights, (recipe, setting)
                assert (quant.activation.bits or quant.bits) == activations, (recipe, setting)
                assert quant.granularity == granularity, (recipe, setting)


def test_the_scorer_counts_images_and_noise(peers: ModuleType) -> None:
    reference = torch.eye(4).numpy() * 10
    logits = reference.copy()
    logits[3] = [1, 0, 0, 0]
    found = peers.metrics_of(logits, reference, torch.tensor([0, 1, 2, 3]).numpy())
    assert (found["top1"], found["top1_drop"], found["agreement"]) == (75.0, 25.0, 75.0)
    assert found["sqnr_db"] == pytest.approx(10 * math.log10(400 / 101))


def test_finished_cells_are_not_run_again(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def run_cell(tool: str, *_: object) -> dict[str, object]:
        runs.append(tool)
        return {"tool": tool, "failed": "broken"} if tool == "nncf-fast" else a_cell(tool)

    monkeypatch.setattr(peers, "run_cell", run_cell)
    monkeypatch.setattr(peers, "prepare", lambda *_: tmp_path)
    cells = [(t, "efficientnet_lite0", "w8a8-per-channel") for t in ("nncf-fast", "ours-quick")]
    peers.run_all(cells, asked(peers, tmp_path))
    peers.run_all(cells, asked(peers, tmp_path))
    assert runs == ["nncf-fast", "ours-quick"]
    peers.run_all(cells, asked(peers, tmp_path, "--retry"))
    assert runs == ["nncf-fast", "ours-quick", "nncf-fast"]


@pytest.mark.parametrize(
    ("script", "key", "wanted"),
    [
        ("raise ValueError('no such bits\\nat all')", "failed", "ValueError: no such bits"),
        ("import os; os.kill(os.getpid(), 9)", "failed", "no output (exit status -9)"),
        ("import time; time.sleep(60)", "failed", "not finished after 1 s"),
        (
            "import json, pathlib, sys\njob = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
            "pathlib.Path(job['out'], 'result.json').write_text(json.dumps({'refused': 'no W3'}))",
            "refused",
            "no W3",
        ),
    ],
)
def test_a_failure_is_a_cell_with_its_message(
    peers: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    key: str,
    wanted: str,
) -> None:
    (tmp_path / "ours.py").write_text(script)
    monkeypatch.setattr(peers, "TOOLS_FOLDER", tmp_path)
    options = asked(peers, tmp_path, "--limit", "1" if "sleep" in script else "60")
    cell = peers.run_cell("ours-quick", "efficientnet_lite0", "w8a8-per-channel", tmp_path, options)
    assert str(cell[key]).startswith(wanted)
    assert "--tools ours-quick --models efficientnet_lite0" in cell["command"]
    assert str(cell["machine"]).endswith(", 1 core")


def in_a_job(script: str, folder: Path) -> dict[str, Any]:
    """What a script of tools/ prints, in a process of its own."""
    fields = {
        "recipe": "",
        "weight_bits": 8,
        "activation_bits": 8,
        "granularity": "per_channel",
        "inputs": "",
        "out": str(folder),
        "threads": 1,
        "seed": 0,
    }
    (folder / "job.json").write_text(json.dumps(fields))
    result = subprocess.run(
        [sys.executable, "-c", script, folder / "job.json"],
        env={**os.environ, "PYTHONPATH": str(FOLDER / "tools")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_judging_between_quantizing_and_writing_does_not_count(tmp_path: Path) -> None:
    script = """
import json, sys, time
from common import Job, peak_mb
job, start = Job(sys.argv[1]), time.perf_counter()
with job.timed():
    kept = bytearray(100 << 20)
    time.sleep(0.1)
judged = bytearray(400 << 20)
time.sleep(0.5)
del judged
before = peak_mb()
with job.timed():
    time.sleep(0.1)
print(json.dumps({**job.result, "before": before, "whole": time.perf_counter() - start}))
"""
    found = in_a_job(script, tmp_path)
    assert 0.2 <= found["seconds"] <= found["whole"] - 0.5
    assert found["before"] > 500
    assert 100 < found["peak_mb"] < 400
    assert found["peak_before_mb"] < 100


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("fails", [False, True], ids=["written", "failed"])
def test_an_export_comes_after_judging_and_may_fail(tmp_path: Path, fails: bool) -> None:
    script = f"""
import json, pathlib, sys
from common import Job
job, path = Job(sys.argv[1]), pathlib.Path("quantized.onnx")
with job.timed():
    pass
try:
    with job.export(path):
        raise AssertionError("exported before it was judged")
except RuntimeError as error:
    early = str(error)
job.logits([[1.0]])
with job.export(path):
    if {fails}:
        raise ValueError("no operator\\nmore")
print(json.dumps({{**job.result, "early": early}}))
"""
    found = in_a_job(script, tmp_path)
    assert "evaluate the simulation" in found["early"]
    assert found["seconds"] > 0
    if fails:
        assert found["export_failed"] == "ValueError: no operator"
        assert "file" not in found
    else:
        assert (found["runtime"], found["file"]) == ("onnxruntime", "quantized.onnx")
        assert "export_failed" not in found


def test_a_message_is_one_line_without_folders(peers: ModuleType) -> None:
    text = "Traceback\n  File x\ntorch.SomeError: cannot open /home/me/x/y.onnx: bad\nwarning: late"
    assert peers.last_line(text) == "torch.SomeError: cannot open y.onnx: bad"


def test_the_report_tells_ties_failures_and_who_is_first(peers: ModuleType, tmp_path: Path) -> None:
    cells = [
        a_cell("nncf-fast", agreement=98.0, sqnr_db=18.0),
        a_cell("ours-quick", agreement=98.5, sqnr_db=24.0) | {"cpu_seconds": 8.0},
        a_cell("ours-best", agreement=99.0, sqnr_db=26.0) | {"cpu_seconds": 600.0},
        {**a_cell("aimet-minmax"), "simulation": None, "failed": "a | b"},
    ]
    results = {"cells": {str(c["tool"]): c for c in cells}}
    peers.save_results(tmp_path / "r.json", results)
    options = asked(peers, tmp_path, "--report-only")
    peers.write_report(options)
    page = options.page.read_text()
    rows = {line.split(" | ")[0]: line for line in page.splitlines() if line.startswith("| ")}
    assert "failed: a \\| b" in rows["| aimet minmax"]
    assert "| **98.5 ± 0.9** | 24.0 |" in rows["| **FAT quick**"]  # within an image of the best
    assert "| **99.0 ± 0.7** | **26.0** |" in rows["| **FAT best**"]
    assert rows["| efficientnet_lite0, w8a8-per-channel"].endswith(
        "| 98.0 %, 18.0 dB (nncf-fast) | 99.0 %, 26.0 dB (ours-best) | 98.5 %, 24.0 dB (ours-quick,"
        " 8 s of 8 s) |"
    )
    assert (
        "FAT has the highest SQNR in 1 of 1 settings and the highest agreement (within one image) "
        "in 1; within the run time of the slowest other tool, in 1 and 1."
    ) in page
    assert "nncf==" in page
    assert (tmp_path / "figures" / "benchmarks.png").stat().st_size > 1000


def test_who_is_first_is_counted_with_ties_of_one_image(peers: ModuleType) -> None:
    from peers_report import firsts

    other = a_cell("nncf-fast", agreement=98.0, sqnr_db=20.0) | {"cpu_seconds": 100.0}

    def own(agreement: float, sqnr_db: float, seconds: float) -> dict[str, object]:
        return a_cell("ours-quick", agreement=agreement, sqnr_db=sqnr_db) | {"cpu_seconds": seconds}

    assert list(firsts([other, own(97.5, 19.9, 90)])) == ["agreement", "agreement in time"]
    assert list(firsts([other, own(97.0, 20.0, 101)])) == ["SQNR"]
    two = [own(98.5, 19.0, 101), own(97.0, 24.0, 90)]  # each first in one of them
    assert list(firsts([other, *two])) == ["SQNR", "SQNR in time", "agreement"]
    assert list(firsts([other])) == []


def test_times_of_different_machines_are_not_compared(peers: ModuleType, tmp_path: Path) -> None:
    from peers_report import firsts

    there = {"machine": "a faster one"}
    cells = [
        a_cell("nncf-fast") | {"cpu_seconds": 100.0},
        a_cell("aimet-minmax"),
        a_cell("ours-quick", sqnr_db=24.0, agreement=99.0) | {"cpu_seconds": 50.0} | there,
    ]
    assert list(firsts(cells)) == ["SQNR", "agreement"]
    peers.save_results(tmp_path / "r.json", {"cells": {str(c["tool"]): c for c in cells}})
    options = asked(peers, tmp_path, "--report-only")
    peers.write_report(options)
    page = options.page.read_text()
    assert "| 99.0 %, 24.0 dB (ours-quick) | none |" in page
    assert "* **Machine**: a machine; a faster one, marked †." in page
    assert "| 50 † |" in page
    cells.append(a_cell("brevitas-ptq") | {"cpu_seconds": 60.0} | there)
    assert list(firsts(cells)) == ["SQNR", "SQNR in time", "agreement", "agreement in time"]


def test_a_report_of_failures_alone_has_no_picture(peers: ModuleType, tmp_path: Path) -> None:
    failed = {**a_cell("aimet-minmax"), "simulation": None, "failed": "no memory"}
    peers.save_results(tmp_path / "r.json", {"cells": {"one": failed}})
    options = asked(peers, tmp_path, "--report-only")
    peers.write_report(options)
    page = options.page.read_text()
    assert "failed: no memory" in page
    assert "PICTURE" not in page
    assert "![" not in page
    assert not (tmp_path / "figures").exists() or not list((tmp_path / "figures").iterdir())
