"""Every bad input is refused with a sentence, or works; nothing in it is executed.

Networks, runs and options here, images in test_robustness_data.py. ``FAT_EXAMPLES=20`` tries
twenty times as many inputs.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

import fat
from fat.evaluation import read_sensitivity
from fat.experiment import evaluate_artifact
from fat.experiment.cli import explain
from fat.experiment.config import EvaluateConfig, RunConfig, parse
from fat.experiment.recipe_search import main as search_main
from fat.experiment.run_directory import load_checkpoint
from fat.models import load_float_network
from fat.models.serialization import FORMAT, VERSION
from fat.report.__main__ import main as report_main
from fat.report.__main__ import report
from fat.report.wandb_dashboard import main as dashboard_main
from fat.utils.errors import FatError
from tests.integration.damage import (
    attempt,
    attempt_all,
    changed_json,
    code_in_pickles,
    damaged,
    saved,
)
from tests.integration.running import ROOT, command
from tests.integration.warm import Trainings

NETWORK = "test_efficientnet"
TINY = (
    *(f"model.name={NETWORK}", "model.weights=random", "model.num_classes=10", "data=digits"),
    *("data.image_size=32", "data.batch_size=8", "data.workers=0", "data.train_images=32"),
    *("data.calibration_images=8", "data.validation_images=8", "data.test_images=16"),
    *("trainer.threads=1", "trainer.progress=false", "logger=none"),
)
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, where executed code would leave its file."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an exported file and a measured sensitivity."""
    place = tmp_path_factory.mktemp("runs") / "finished"
    words = (*TINY, "optim.epochs=1", "export=onnx", f"hydra.run.dir={place}")
    assert answer(command("train.py", *words)) == "worked"
    words = (f"run={place}", "analysis=sensitivity", "analysis_images=4", *TINY[-3:-1])
    assert answer(command("evaluate.py", *words, "data.workers=0")) == "worked"
    return place


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return load_float_network(NETWORK, weights="random").network.state_dict()


def answer(result: subprocess.CompletedProcess[str]) -> str:
    """``worked`` or ``refused``: a command that ends in any other way fails the test."""
    text = result.stdout + result.stderr
    assert "Traceback (most recent call last)" not in text, text
    if result.returncode == 0:
        return "worked"
    assert result.returncode in (1, 2), text
    assert "Error: " in text or ": error: " in text or "ailed: " in text, text
    return "refused"


def results_of(run: Path) -> dict[str, bytes]:
    """The files of a run that nothing may lose."""
    names = ("student.safetensors", "metrics.json", "config.yaml", "history.csv", "student.onnx")
    kept = [run / name for name in names] + sorted(run.glob("checkpoints/*"))
    return {path.name: path.read_bytes() for path in kept if path.is_file()}


def test_what_fails() -> None:
    """The check itself: a traceback, code that ran, a wrong outcome, an empty message."""

    def refuses() -> None:
        raise FatError("This is no such file. Type another.")

    def says_nothing() -> None:
        raise FatError("no")

    def fails() -> None:
        raise ValueError("what nobody expected")

    assert (attempt(refuses), attempt(lambda: 3)) == ("refused", "worked")
    with pytest.raises(ValueError, match="what nobody expected"):
        attempt(fails)
    for call, expected in ((refuses, "worked"), (lambda: 3, "refused"), (says_nothing, "either")):
        with pytest.raises(AssertionError):
            attempt(call, expected)
    with pytest.raises(AssertionError, match="was executed"):
        attempt(Path("executed").touch)
    for status, text in ((1, "Traceback (most recent call last)"), (-9, "Error: x"), (2, "no")):
        with pytest.raises(AssertionError):
            answer(subprocess.CompletedProcess([], status, "", text))


# --------------------------------------------------------------------------------------- weights


def weights_from(content: bytes, name: str) -> None:
    """Read a file as ``model.weights=FILE`` does, and use the network."""
    Path(name).write_bytes(content)
    loaded = load_float_network(NETWORK, weights=name)
    assert loaded.network(IMAGES).shape == (4, loaded.num_classes)


def weights_files(state: dict[str, Tensor]) -> dict[str, bytes]:
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    return {
        "a.safetensors": safetensors.torch.save(state),
        "a.pth": saved(state),
        "a.ckpt": saved(wrapped),
        "old.pth": saved(state, _use_new_zipfile_serialization=False),
    }


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.ckpt", "old.pth"])
def test_damaged_weights(state: dict[str, Tensor], name: str) -> None:
    whole = weights_files(state)[name]
    assert attempt(lambda: weights_from(whole, name)) == "worked"

    attempt_all(damaged(whole), lambda content: weights_from(content, name), 25)


def other_states(state: dict[str, Tensor]) -> Iterator[tuple[str, object]]:
    """State dicts that do not fit the network."""
    first, last = next(iter(state)), list(state)[-1]
    for dtype in (torch.int64, torch.complex64, torch.bool):
        yield str(dtype), {key: value.to(dtype) for key, value in state.items()}
    for what, tensor in {
        "sparse": state[first].to_sparse(),
        "without dimensions": torch.zeros(()),
        "without elements": torch.zeros(0, 3, 3, 3),
        "of another shape": torch.zeros(3),
        "of 10^12 elements in four bytes": torch.zeros(1).expand(10**12),
    }.items():
        yield what, {**state, first: tensor}
    yield "on the meta device", {key: value.to("meta") for key, value in state.items()}
    yield "NaN", {**state, last: torch.full_like(state[last], torch.nan)}
    yield "infinity", {**state, last: torch.full_like(state[last], torch.inf)}
    yield "a key missing", {k: v for k, v in state.items() if k != first}
    yield "a key too many", {**state, "extra": torch.zeros(3)}
    yield "no tensors", dict.fromkeys(state, 1.0)
    yield "numbers as keys", dict(enumerate(state.values()))
    yield "a list", list(state.values())
    yield "a tensor", state[first]
    yield "nothing", None
    yield "an empty dict", {}
    for what, classifier in (("no class", slice(0, 0)), ("a scalar", 0)):
        yield (
            f"classifier of {what}",
            {
                k: (v[classifier] if what == "no class" else torch.zeros(()))
                if k.startswith("classifier")
                else v
                for k, v in state.items()
            },
        )
    nested: object = state
    for _ in range(10):
        nested = {"state_dict": nested}
    yield "nested ten times", nested


def test_weights_of_something_else(state: dict[str, Tensor]) -> None:
    for what, content in other_states(state):
        outcome = attempt(lambda content=content: weights_from(saved(content), "x.pth"))
        assert outcome == "refused", what
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        attempt(lambda cast=cast: weights_from(saved(cast), "x.pth"), "worked")
    fewer = {k: v[:7] if k.startswith("classifier") else v for k, v in state.items()}
    attempt(lambda: weights_from(saved(fewer), "x.pth"), "worked")


def test_safetensors_headers_that_lie(state: dict[str, Tensor]) -> None:
    whole = safetensors.torch.save(state)
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    first, second = [name for name in header if name != "__metadata__"][:2]

    def file(content: Any, stated: int | None = None) -> bytes:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        return struct.pack("<Q", len(text) if stated is None else stated) + text + data

    attempt(lambda: weights_from(file(header), "x.safetensors"), "worked")
    lies = [file(header, stated) for stated in (0, 1, 2**31, 2**40, 2**63, 2**64 - 1)]
    lies += [file(text) for text in (b"{" * 500, b'{"a":' * 100_000, b'{"\xff": 1}', b"[1, 2]")]
    for field in (
        {"dtype": "F99"},
        {"shape": ["x"]},
        {"shape": [2**40, 2**40]},
        {"shape": [-1]},
        {"data_offsets": [0, 2**40]},
        {"data_offsets": [8, 0]},
        {"data_offsets": header[second]["data_offsets"]},
    ):
        lies.append(file({**header, first: {**header[first], **field}}))
    for content in lies:
        attempt(lambda content=content: weights_from(content, "x.safetensors"), "refused")


@pytest.mark.parametrize("function", code_in_pickles())
def test_no_pickle_is_executed(state: dict[str, Tensor], finished: Path, function: str) -> None:
    evil = code_in_pickles()[function]
    contents = [pickle.dumps(evil, protocol) for protocol in (0, 2, 5)]
    contents += [saved(evil), saved({"state_dict": state, "x": evil})]
    contents += [saved({"state_dict": state, "x": evil}, _use_new_zipfile_serialization=False)]
    tar, array = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):  # torch's first format
            info = tarfile.TarInfo(name)
            info.size = len(contents[1])
            archive.addfile(info, io.BytesIO(contents[1]))
    np.save(array, np.array([evil], dtype=object), allow_pickle=True)
    for content in (*contents, tar.getvalue(), array.getvalue()):
        for suffix in (".pth", ".ckpt", ".safetensors"):
            attempt(lambda c=content, s=suffix: weights_from(c, f"x{s}"), "refused")
    best = torch.load(checkpoint_of(finished), weights_only=True)
    attempt(lambda: checkpoint_from(finished, saved({**best, "callbacks": evil})), "refused")


def test_paths_without_a_readable_file() -> None:
    Path("folder.pth").mkdir()
    os.mkfifo("fifo.pth")
    Path("a.pth").symlink_to("b.pth")
    Path("b.pth").symlink_to("a.pth")
    Path("file").write_text("")
    for name in (
        *("nowhere.pth", "folder.pth", "fifo.pth", "a.pth", "/dev/zero", "file/x.pth", "a\0b.pth"),
        *("a" * 5000 + ".pth", ""),
    ):
        attempt(lambda name=name: load_float_network(NETWORK, weights=name), "refused")


# ------------------------------------------------------------------------ students and checkpoints


def student_from(content: bytes) -> None:
    Path("student.safetensors").write_bytes(content)
    assert fat.evaluate(fat.load("student.safetensors"), [IMAGES])["images"] == 4


def checkpoint_of(run: Path) -> Path:
    return next(run.glob("checkpoints/step=*.ckpt"))


def checkpoint_from(run: Path, content: bytes) -> None:
    Path("best.ckpt").write_bytes(content)
    student = fat.load(run / "student.safetensors")
    load_checkpoint(student, Path("best.ckpt"))
    fat.evaluate(student, [IMAGES])


def test_damaged_students_and_checkpoints(finished: Path) -> None:
    student = (finished / "student.safetensors").read_bytes()
    best = checkpoint_of(finished).read_bytes()
    attempt(lambda: student_from(student), "worked")
    attempt(lambda: checkpoint_from(finished, best), "worked")

    attempt_all(damaged(student, head=2000), student_from, 60)
    attempt_all(damaged(best), lambda content: checkpoint_from(finished, content), 40)


def test_descriptions_of_students(finished: Path) -> None:
    whole = (finished / "student.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    description = json.loads(header["__metadata__"][FORMAT])

    def described(value: object) -> bytes:
        text = value if isinstance(value, str) else json.dumps(value)
        stored = json.dumps({**header, "__metadata__": {FORMAT: text}}).encode()
        return struct.pack("<Q", len(stored)) + stored + whole[8 + length :]

    refused: list[object] = ["{", "[" * 100_000, []]
    refused += [{**description, "version": v} for v in (0, 1, VERSION + 1, 99, "2", None)]
    refused += [
        {**description, "spec": {**description["spec"], "bits": bits}}
        for bits in (0, 1, 9, 99, -8, 8.5, "8", None, True)
    ]
    first = description["student"]["nodes"][0]["name"]
    for node in (
        {"op": "call_function", "target": "builtins.eval"},
        {
            "op": "call_function",
            "target": "builtins.getattr",
            "args": {"tuple": [{"node": first}, "__class__"]},
        },
        {"op": "call_method", "target": "data_ptr"},
        {"name": "x); __import__('os').system('touch executed') #"},
        {"op": "placeholder", "target": "x=open('executed', 'w')"},
    ):
        changed = json.loads(json.dumps(description))
        changed["student"]["nodes"][1] |= node
        refused.append(changed)
    for value in refused:
        attempt(lambda value=value: student_from(described(value)), "refused")

    attempt_all(changed_json(description), lambda value: student_from(described(value)), 80)


def test_contents_of_checkpoints(finished: Path) -> None:
    content = torch.load(checkpoint_of(finished), weights_only=True)
    state = content["state_dict"]
    first = next(key for key in state if key.startswith("student."))
    for changed in (
        {},
        {k: v for k, v in state.items() if k != first},
        {**state, "student.x": state[first]},
        {**state, first: torch.zeros(3, 3)},
        {**state, first: 3.0},
        {k: v * torch.nan if v.is_floating_point() else v for k, v in state.items()},
        {k: v.to(torch.complex64) for k, v in state.items()},
        list(state.values()),
    ):
        damaged_content = saved({**content, "state_dict": changed})
        attempt(lambda c=damaged_content: checkpoint_from(finished, c), "refused")
    for whole in ([1, 2], {k: v for k, v in content.items() if k != "fat"}):
        attempt(lambda whole=whole: checkpoint_from(finished, saved(whole)), "refused")
    notes = {key: content["fat"][key] for key in ("spec", "origin")}

    def with_notes(value: Any) -> None:
        merged = {**content["fat"], **value} if isinstance(value, dict) else value
        checkpoint_from(finished, saved({**content, "fat": merged}))

    attempt_all(changed_json(notes), with_notes, 20)


# --------------------------------------------------------------------------------- exported files


def evaluated(content: bytes, images: Path, name: str = "student.onnx") -> None:
    """Evaluate an exported file as ``evaluate.py artifact=FILE`` does."""
    Path(name).write_bytes(content)
    words = (f"artifact={name}", "data=folder", f"data.root={images}", "data.workers=0")
    words += ("data.batch_size=8", "data.test_images=8", "trainer.progress=false")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(EvaluateConfig, compose("evaluate", overrides=list(words)))
    assert evaluate_artifact(config)["images"] == 8


def test_damaged_exported_files(finished: Path, photographs: Path) -> None:
    whole = (finished / "student.onnx").read_bytes()
    attempt(lambda: evaluated(whole, photographs), "worked")

    attempt_all(damaged(whole, head=4000), lambda content: evaluated(content, photographs), 40)
    for suffix in (".onnx.zip", "", ".pth"):
        for content in (whole, b"", bytes(2000)):
            attempt(lambda c=content, s=suffix: evaluated(c, photographs, f"x{s}"), "refused")


def other_models(whole: bytes) -> Iterator[tuple[str, onnx.ModelProto]]:
    """ONNX files that are valid and no image classifiers, or that read other files."""
    texts = {entry.key: entry.value for entry in onnx.load_from_string(whole).metadata_props}

    def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    def model(nodes: list[Any], inputs: list[Any], output: Any, *tensors: Any) -> onnx.ModelProto:
        graph = helper.make_graph(nodes, "g", inputs, [output], list(tensors))
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        helper.set_model_props(made, texts)
        return made

    image, logits = value("input", ["n", 3, 32, 32]), value("logits", ["n", 3])
    pool = helper.make_node("GlobalAveragePool", ["input"], ["p"])
    flat = helper.make_node("Flatten", ["p"], ["logits"], axis=1)
    same = helper.make_node("Identity", ["input"], ["logits"])
    for shape, kind in (
        (["n", 3, 32, 32], TensorProto.UINT8),
        (["n"], TensorProto.FLOAT),
        (["n", 3, 33, 33], TensorProto.FLOAT),
        ([5, 3, 32, 32], TensorProto.FLOAT),
        ([0, 3, 32, 32], TensorProto.FLOAT),
        (["n", 2**40, 32, 32], TensorProto.FLOAT),
    ):
        made = model([same], [value("input", shape, kind)], value("logits", shape, kind))
        yield f"input {shape} {kind}", made
    yield "images as its result", model([same], [image], value("logits", ["n", 3, 32, 32]))
    yield "two inputs", model([pool, flat], [image, value("other", [1])], logits)
    shape = helper.make_node("Shape", ["input"], ["logits"])
    yield "integers as its result", model([shape], [image], value("logits", [4], TensorProto.INT64))
    one = numpy_helper.from_array(np.zeros((1, 3), np.float32), "one")
    constant = helper.make_node("Identity", ["one"], ["logits"])
    yield "one row for any batch", model([constant, pool], [image], value("logits", [1, 3]), one)
    added = helper.make_node("Add", ["l", "w"], ["logits"])
    flat_l = helper.make_node("Flatten", ["p"], ["l"], axis=1)
    for place in ("../secret.bin", "/etc/passwd", "nowhere.bin", "/dev/zero"):
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], data_location=1)
        tensor.external_data.add(key="location", value=place)
        yield f"weights in {place}", model([pool, flat_l, added], [image], logits, tensor)
    evil = helper.make_node("Execute", ["input"], ["logits"], domain="evil", command="touch x")
    yield "an unknown operator", model([evil], [image], logits)
    loop = helper.make_node("Relu", ["logits"], ["logits"])
    yield "an operator that reads itself", model([loop], [image], logits)
    big = helper.make_node("Expand", ["l", "s"], ["logits"])
    size = numpy_helper.from_array(np.array([10**6, 10**6]), "s")
    yield "a result of 4 TB", model([pool, flat_l, big], [image], value("logits", ["a", "b"]), size)


def test_other_exported_files(finished: Path, photographs: Path) -> None:
    whole = (finished / "student.onnx").read_bytes()
    Path("files").mkdir()
    Path("secret.bin").write_bytes(bytes(12))
    name = "files/other.onnx"
    for what, made in other_models(whole):
        content = made.SerializeToString()
        assert attempt(lambda c=content: evaluated(c, photographs, name)) == "refused", what
    model = onnx.load_from_string(whole)
    texts = {entry.key: entry.value for entry in model.metadata_props}
    stored = json.loads(texts["fat.preprocessing"])

    def with_texts(changed: dict[str, str]) -> bytes:
        del model.metadata_props[:]
        helper.set_model_props(model, changed)
        return model.SerializeToString()

    for size in ([0, 0], [-1, 32], [10**6, 10**6], [32], [31, 33]):
        content = with_texts({**texts, "fat.preprocessing": json.dumps({**stored, "size": size})})
        attempt(lambda c=content: evaluated(c, photographs), "refused")
    attempt(lambda: evaluated(with_texts({}), photographs), "refused")
    junk = st.sampled_from(("", "{", "null", "[]", "3", '"x"', "NaN", "[" * 100_000, "\ud7ff"))
    kept = changed_json(stored).map(json.dumps)

    changed = st.fixed_dictionaries({"fat.preprocessing": kept}) | st.dictionaries(
        st.sampled_from(sorted(texts)), junk, min_size=1, max_size=1
    )
    attempt_all(changed, lambda new: evaluated(with_texts({**texts, **new}), photographs), 40)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in two classes."""
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(40):
        path = root / ("n01440764", "n01443537")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return root


# ------------------------------------------------------------------- runs, sweeps, searches, resume

YAML_CODE = (
    '!!python/object/apply:os.system ["touch executed"]',
    "a: !!python/object/new:subprocess.Popen [[touch, executed]]",
    "a: !!python/name:os.system",
    "model: {_target_: os.system, command: touch executed}",
    "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n"  # a billion laughs
    + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)),
    "&a {a: *a}",
)


@st.composite
def text_files(draw: st.DrawFn, content: bytes, name: str) -> bytes:
    """A damaged JSON, YAML or CSV file: its bytes, or a value in it."""
    kind = Path(name).suffix
    if kind == ".csv" or not draw(st.integers(0, 2)):
        cells = [content.replace(b"0", b"x"), content.replace(b"1", b"nan"), b"\0" + content]
        cells += [content.replace(b"1", b"9" * 400), content + b"x" * 1_000_000]
        cells += [b"".join(content.splitlines(keepends=True)[1:]), b'{"a":' * 100_000]
        return draw(st.one_of(damaged(content, head=200), st.sampled_from(cells)))
    if kind == ".yaml" and not draw(st.integers(0, 3)):
        return draw(st.sampled_from(YAML_CODE)).encode()
    value = json.loads(content) if kind == ".json" else yaml.safe_load(content)
    changed = draw(changed_json(value))
    return (json.dumps(changed) if kind == ".json" else yaml.safe_dump(changed)).encode()


def reported(run: Path) -> None:
    pages = report([run])
    assert pages
    assert pages[-1].suffix == ".csv" or "</html>" in pages[-1].read_text(errors="replace")


FILES = (
    *("metrics.json", "config.yaml", "images.csv", "history.csv", "thresholds.csv", "layers.csv"),
    *("details.json", "failure.json", "sensitivity.json", ".hydra/overrides.yaml"),
)


@pytest.mark.parametrize("name", FILES)
def test_reports_of_damaged_runs(finished: Path, name: str) -> None:
    whole = Path("whole")
    shutil.copytree(finished, whole)
    path = whole / name
    content = path.read_bytes() if path.is_file() else b'{"error": "x", "message": "y"}'
    attempt(lambda: reported(whole), "worked")
    path.parent.mkdir(exist_ok=True)
    before = {k: v for k, v in results_of(whole).items() if k != name}

    def report_of(broken: bytes) -> None:
        path.write_bytes(broken)
        try:
            reported(whole)
        finally:
            assert {k: v for k, v in results_of(whole).items() if k != name} == before

    attempt_all(text_files(content, name), report_of, 15)


@pytest.mark.parametrize("name", ["sweep.json", "multirun.yaml", "0-a/metrics.json"])
def test_reports_of_damaged_sweeps(finished: Path, name: str) -> None:
    sweep, names = Path("sweep"), ("0-a", "1-b")
    for job in names:
        shutil.copytree(finished, sweep / job)
    jobs = [{"directory": job, "overrides": ["seed=0"], "status": "finished"} for job in names]
    notes = {"id": "s", "command": "python train.py -m", "total": 2, "started": 0, "jobs": jobs}
    (sweep / "sweep.json").write_text(json.dumps(notes))
    hydra = {"overrides": {"task": ["seed=0,1"], "hydra": ["hydra.mode=MULTIRUN"]}}
    (sweep / "multirun.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    attempt(lambda: reported(sweep), "worked")
    content = (sweep / name).read_bytes()

    def report_of(broken: bytes) -> None:
        (sweep / name).write_bytes(broken)
        reported(sweep)

    attempt_all(text_files(content, name), report_of, 15)


def test_damaged_sensitivities(finished: Path) -> None:
    content = (finished / "sensitivity.json").read_bytes()

    def bits_from(broken: bytes) -> None:
        Path("sensitivity.json").write_bytes(broken)
        fat.choose_bits(read_sensitivity("sensitivity.json").rows, 0.06)

    attempt_all(text_files(content, "sensitivity.json"), bits_from, 100)
    for place in ("a" * 5000, "/dev/null", "/dev/zero"):
        attempt(lambda place=place: read_sensitivity(place), "refused")


def test_what_is_no_run(finished: Path) -> None:
    Path("empty").mkdir()
    for place in (finished / "metrics.json", Path("nowhere"), Path("/dev/null"), Path("empty")):
        attempt(lambda place=place: report([place]), "refused")
    here = Path.cwd()
    for place in (str(finished / "metrics.json"), f"{here}/nowhere", "a" * 5000, "/dev/null", "''"):
        assert answer(command("evaluate.py", f"run={place}")) == "refused", place
        assert answer(command("train.py", f"resume={place}")) == "refused", place
        assert answer(command("train.py", "-m", "seed=0,1", f"sweep.resume={place}")) == "refused"


SEARCHES = (
    *(b"", b"[]", b"{}", b'{"words": 3, "seed": 0, "trials": 1}'),
    b'{"words": ["seed=0"], "seed": "x", "trials": 1}',
    b'{"words": ["x=choice(1,2)"], "seed": 0, "trials": -1}',
    b'{"words": ["x=choice(1,2)"], "seed": 0, "trials": 1e400}',
)
MISTYPED: dict[Callable[[list[str]], int], tuple[str, ...]] = {
    report_main: ("", "--nonsense", "a" * 5000, "--out x.html RUN", "--out x.txt RUN RUN"),
    search_main: (
        *("optim.lr=3", "optim.lr=interval(1,0)", "nothing=choice(1,2)", "(("),
        *("optim.lr=interval(0,inf)", "--trials 0 optim.lr=interval(1e-4,1e-3)"),
        *("optim.lr=choice(text,'')", "hydra.run.dir=choice(a,b)", "optim.lr=range(0,1,0)"),
        *(f"--resume {number}" for number in range(len(SEARCHES))),
    ),
    dashboard_main: ("", "x", "a/b/c", "a/b --sweep x'or1", "a/b --nonsense", "../..", "a" * 5000),
}


@pytest.mark.parametrize("main", MISTYPED)
def test_mistyped_commands(
    finished: Path, capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int]
) -> None:
    for number, content in enumerate(SEARCHES):
        (Path.cwd() / str(number)).mkdir()
        (Path.cwd() / str(number) / "search.json").write_bytes(content)
    for typed in MISTYPED[main]:
        words = [str(finished) if word == "RUN" else word for word in typed.split()]
        try:
            status: object = main(words)
        except SystemExit as end:
            status = end.code
        assert status == 2, typed
        assert len(capsys.readouterr().err) > 20, typed


@pytest.mark.parametrize("number", range(4))
def test_evaluations_of_damaged_runs(finished: Path, number: int) -> None:
    content = (finished / "config.yaml").read_bytes()
    broken = YAML_CODE[number].encode() if number < 3 else content[: len(content) // 2]
    run = Path("run").absolute()
    shutil.copytree(finished, run)
    (run / "config.yaml").write_bytes(broken)
    before = results_of(run)
    words = (f"run={run}", "data.batch_size=8", "data.workers=0", "trainer.progress=false")
    answer(command("evaluate.py", *words))
    assert results_of(run) == before
    assert not (ROOT / "executed").exists()


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A run that was killed while it trained, and the student that it gives when resumed."""
    folder = tmp_path_factory.mktemp("cut")
    place, trainings = folder / "run", Trainings(folder / "output.txt")
    words = (*TINY, "optim.epochs=8", "trainer.checkpoint_every=0", f"hydra.run.dir={place}")
    pid, deadline = trainings.start(*words), time.monotonic() + 120
    while not (place / "checkpoints/last.ckpt").is_file():
        assert time.monotonic() < deadline, trainings.log.read_text()
        time.sleep(0.01)
    trainings.kill(pid, signal.SIGKILL)
    shutil.copytree(place, folder / "resumed")
    assert answer(command("train.py", f"resume={folder / 'resumed'}")) == "worked"
    return place, (folder / "resumed/student.safetensors").read_bytes()


def damage_of_training(run: Path) -> dict[str, tuple[str, Callable[[bytes], bytes | None]]]:
    """Name of a case → file of the run, and what happens to its content."""

    def tampered(content: bytes, how: Callable[[dict[str, Any]], object]) -> bytes:
        return saved(how(torch.load(io.BytesIO(content), weights_only=True)))

    evil = code_in_pickles()["os.system"]
    return {
        "last.ckpt cut short": ("checkpoints/last.ckpt", lambda c: c[: len(c) // 2]),
        "last.ckpt empty": ("checkpoints/last.ckpt", lambda _: b""),
        "last.ckpt flipped": (
            "checkpoints/last.ckpt",
            lambda c: c[:5000] + bytes([c[5000] ^ 4]) + c[5001:],
        ),
        "last.ckpt with code": (
            "checkpoints/last.ckpt",
            lambda c: tampered(c, lambda state: {**state, "callbacks": evil}),
        ),
        "last.ckpt without loops": (
            "checkpoints/last.ckpt",
            lambda c: tampered(c, lambda s: {k: v for k, v in s.items() if k != "loops"}),
        ),
        "start.pt a list": ("checkpoints/start.pt", lambda _: saved([1, 2])),
        "start.pt cut short": ("checkpoints/start.pt", lambda c: c[:-100]),
        "metrics.json junk": ("metrics.json", lambda _: b"[]"),
        "history.csv cut": ("history.csv", lambda c: c[:1]),
        "student gone": ("student.safetensors", lambda _: None),
        "config.yaml with code": ("config.yaml", lambda _: YAML_CODE[0].encode()),
    }


@pytest.mark.parametrize("case", damage_of_training(Path()))
def test_resuming_a_damaged_run(cut_off: tuple[Path, bytes], case: str) -> None:
    whole, wanted = cut_off
    run = Path("run").absolute()
    shutil.copytree(whole, run)
    name, change = damage_of_training(run)[case]
    broken = change((run / name).read_bytes())
    (run / name).unlink()
    if broken is not None:
        (run / name).write_bytes(broken)
    before = results_of(run)
    if answer(command("train.py", f"resume={run}", "trainer.progress=false")) == "refused":
        assert results_of(run) == before
    elif "without" not in case:  # the student of a training that was never damaged
        assert (run / "student.safetensors").read_bytes() == wanted
    assert not (ROOT / "executed").exists()


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("sweep.json", b""),
        ("sweep.json", b'{"command": 3, "total": "x"}'),
        (f"0-{NETWORK}/metrics.json", b"[]"),
        (f"0-{NETWORK}/config.yaml", b"!!python/object/apply:os.system [touch executed]"),
        (f"0-{NETWORK}/student.safetensors", b""),
    ],
)
def test_resuming_a_damaged_sweep(swept: Path, name: str, broken: bytes) -> None:
    sweep = Path("sweep").absolute()
    shutil.copytree(swept, sweep)
    (sweep / name).write_bytes(broken)
    jobs = [results_of(sweep / f"{number}-{NETWORK}") for number in (0, 1)]
    words = (*TINY, "optim.epochs=0", "seed=0,1", f"sweep.resume={sweep}")
    if answer(command("train.py", "-m", *words)) == "refused":
        assert results_of(sweep / f"0-{NETWORK}") == jobs[0]
    assert results_of(sweep / f"1-{NETWORK}") == jobs[1]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sweeps") / "sweep"
    words = (*TINY, "optim.epochs=0", "seed=0,1", f"hydra.sweep.dir={place}")
    assert answer(command("train.py", "-m", *words)) == "worked"
    return place


# ------------------------------------------------------------------------------------------ options

WORDS = (
    *("text", "true", "3", "3.7", "-1", "0", "nan", "inf", "-inf", "1e308", "1e-308", "1e400"),
    *("1000000000", "99999999999999999999", "null", "''", "[]", "[1,2]", "[2,1]", "[1,x]"),
    *("[nan,inf]", "{}", "{a:1}", "???", "'ünïcödé 日本 😀'", "'a\nb'", "'; touch x'"),
    *("'<script>%s{}$1'", "'" + "a" * 5000 + "'", "'../../../../etc/passwd'", "/dev/null/x"),
    *("${oc.env:HOME}", "${nothing}", "${oc.env:NO_SUCH_VARIABLE}", "${model.name}"),
    *("${oc.decode:'[1'}", "{_target_:os.system,command:'touch executed'}"),
)
CHOICES = {
    "train": ("data=folder", "data=imagenet", "data=distilled", "teacher=finetune", "export=onnx"),
    "evaluate": ("data=folder", "export=onnx"),
}


def keys_of(node: Any, prefix: str = "") -> Iterator[str]:
    for key in node:
        below = node._get_node(key)
        if OmegaConf.is_dict(below):
            yield from keys_of(below, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("program", CHOICES)
def test_any_value_of_any_option(program: str) -> None:
    schema = RunConfig if program == "train" else EvaluateConfig
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        trees = {choice: compose(program, overrides=[choice]) for choice in CHOICES[program]}
    options = {key: tree for tree in trees.values() for key in keys_of(tree)}
    parser = OverridesParser.create()
    texts = st.sampled_from(WORDS) | st.text(st.characters(codec="ascii"), max_size=12)

    def parsed(key_and_word: tuple[str, str]) -> None:
        key, word = key_and_word
        try:
            changed = options[key].copy()
            OmegaConf.update(changed, key, parser.parse_override(f"{key}={word}").value())
            parse(schema, changed)
        except (HydraException, OmegaConfBaseException) as error:
            raise FatError(explain(error, schema)) from error

    attempt_all(st.tuples(st.sampled_from(sorted(options)), texts), parsed, 200)
