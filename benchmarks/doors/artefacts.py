"""The door of exported files: what evaluate.py artefact=FILE may be given."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from doors.damage import damaged, json_damaged
from doors.lab import Lab
from doors.trial import MUST_REFUSE, MUST_WORK, ROOT, Case, Result
from hydra import compose, initialize_config_dir
from onnx import TensorProto, helper, numpy_helper

from fat.experiment.config import EvaluateConfig, parse
from fat.experiment.evaluate import judge_artefact

__all__ = ["artefacts"]


def artefacts(lab: Lab) -> list[Result]:
    """Files judged on images as evaluate.py does it, most without a new process each."""
    whole = (lab.finished / "student.onnx").read_bytes()
    config = _config(f"data.root={lab.images}")
    cases: list[Case] = []

    def add(row: str, what: str, name: str, content: bytes, wanted: str = "either") -> None:
        folder = lab.new("artefact")
        folder.mkdir()
        path = folder / name
        path.write_bytes(content)
        cases.append(Case(row, what, functools.partial(_judge, config, path), wanted))

    add("whole files", "student.onnx", "student.onnx", whole, MUST_WORK)
    for how, where, content in damaged(whole, lab.random("onnx"), cuts=8, flips=60, head=4000):
        add(f"`.onnx`: {how}", where, "student.onnx", content)
    for what, model, wanted in _metadata(whole, lab):
        add("`.onnx`: metadata", what, "student.onnx", model.SerializeToString(), wanted)
    for what, content, wanted in _models(whole, lab):
        add("`.onnx`: other networks", what, "other.onnx", content, wanted)
    for suffix in (".tflite", ".pte", ".xml", ".onnx.zip", "", ".pth", ".ONNX"):
        for what, content in (
            ("an ONNX file", whole),
            ("random bytes", lab.random(suffix).randbytes(2000)),
            ("empty", b""),
        ):
            add(
                "other suffixes, whose runtimes may be missing",
                f"{what} named {suffix or 'nothing'}",
                f"x{suffix}",
                content,
                MUST_REFUSE,
            )
    for place in (
        lab.folder,
        lab.folder / "nowhere.onnx",
        Path("/dev/zero"),
        Path("a" * 5000 + ".onnx"),
    ):
        cases.append(
            Case("no files", lab.said(place), functools.partial(_judge, config, place), MUST_REFUSE)
        )
    for words in (
        ("runtime=nothing",),
        ("runtime=litert",),
        ("run=nowhere",),
        ("model.name=nothing",),
        ("data=imagenet", "data.root=/nowhere"),
        ("export=onnx",),
        ("analysis=sensitivity",),
    ):
        call = functools.partial(
            lab.command,
            "evaluate.py",
            f"artefact={lab.finished / 'student.onnx'}",
            "data=folder",
            f"data.root={lab.images}",
            "trainer.progress=false",
            *words,
        )
        cases.append(Case("`evaluate.py artefact=`, its words", " ".join(words), call, MUST_REFUSE))
    return lab.run(cases)


def _config(root: str) -> EvaluateConfig:
    words = [
        "artefact=x",
        "data=folder",
        root,
        "data.workers=0",
        "data.batch_size=8",
        "data.test_images=8",
        "trainer.progress=false",
        "trainer.threads=1",
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(EvaluateConfig, compose("evaluate", overrides=words))


def _judge(config: EvaluateConfig, path: Path) -> str:
    config.artefact = str(path)
    figures = judge_artefact(config)
    assert figures["images"] == 8
    return f"judged on {figures['images']} images"


def _metadata(whole: bytes, lab: Lab) -> Iterator[tuple[str, onnx.ModelProto, str]]:
    """The file with other texts in it."""
    model = onnx.load_from_string(whole)
    texts = {entry.key: entry.value for entry in model.metadata_props}

    def with_texts(changed: dict[str, str]) -> onnx.ModelProto:
        other = onnx.ModelProto()
        other.CopyFrom(model)
        del other.metadata_props[:]
        helper.set_model_props(other, changed)
        return other

    yield "none at all", with_texts({}), MUST_REFUSE
    for key in texts:
        yield f"without {key}", with_texts({k: v for k, v in texts.items() if k != key}), "either"
        for junk in (
            "",
            "{",
            "null",
            "[]",
            "3",
            '"x"',
            "NaN",
            "[" * 100_000,
            "x" * 1_000_000,
            "\ud7ff",
        ):
            yield f"{key} is {junk[:10]!r}", with_texts({**texts, key: junk}), "either"
    stored = json.loads(texts["fat.preprocessing"])
    for what, changed in json_damaged(stored, lab.random("preprocessing"), 60):
        yield (
            f"preprocessing: {what}",
            with_texts({**texts, "fat.preprocessing": json.dumps(changed)}),
            "either",
        )
    for size in ([0, 0], [1, 1], [-1, 32], [10**6, 10**6], [32], [32, 32, 32], [31, 33]):
        changed = json.dumps({**stored, "size": size})
        yield f"images of {size}", with_texts({**texts, "fat.preprocessing": changed}), MUST_REFUSE
    for classes in ('["a"]', '["a", "a"]', "{}", "[1, 2]", json.dumps(["x"] * 100_000)):
        yield f"classes {classes[:12]}", with_texts({**texts, "fat.classes": classes}), "either"
    for count in ("-1", "0", "7", "1e400", "9" * 30):
        yield f"{count} classes", with_texts({**texts, "fat.num_classes": count}), "either"


def _models(whole: bytes, lab: Lab) -> Iterator[tuple[str, bytes, str]]:
    """Valid ONNX files that are no image classifiers, and some that reach for other files."""
    texts = {entry.key: entry.value for entry in onnx.load_from_string(whole).metadata_props}
    secret = lab.folder / "secret.bin"
    secret.write_bytes(bytes(4 * 30))

    def model(
        nodes: list[Any], inputs: list[Any], outputs: list[Any], tensors: tuple[Any, ...] = ()
    ) -> onnx.ModelProto:
        graph = helper.make_graph(nodes, "g", inputs, outputs, list(tensors))
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        helper.set_model_props(made, texts)
        return made

    def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    pool = helper.make_node("GlobalAveragePool", ["input"], ["p"])
    flat = helper.make_node("Flatten", ["p"], ["logits"], axis=1)
    image = value("input", ["n", 3, 32, 32])
    fine = model([pool, flat], [image], [value("logits", ["n", 3])])
    yield "three logits", fine.SerializeToString(), "either"
    for what, shape, kind in (
        ("bytes in place of numbers", ["n", 3, 32, 32], TensorProto.UINT8),
        ("one dimension", ["n"], TensorProto.FLOAT),
        ("images of 33 × 33", ["n", 3, 33, 33], TensorProto.FLOAT),
        ("one channel", ["n", 1, 32, 32], TensorProto.FLOAT),
        ("batches of 5", [5, 3, 32, 32], TensorProto.FLOAT),
        ("batches of 0", [0, 3, 32, 32], TensorProto.FLOAT),
        ("2^40 channels", ["n", 2**40, 32, 32], TensorProto.FLOAT),
    ):
        same = helper.make_node("Identity", ["input"], ["logits"])
        made = model([same], [value("input", shape, kind)], [value("logits", shape, kind)])
        yield f"an input of {what}", made.SerializeToString(), MUST_REFUSE
    same = helper.make_node("Identity", ["input"], ["logits"])
    yield (
        "images as its result",
        model([same], [image], [value("logits", ["n", 3, 32, 32])]).SerializeToString(),
        MUST_REFUSE,
    )
    yield (
        "two inputs",
        model(
            [pool, flat], [image, value("other", [1])], [value("logits", ["n", 3])]
        ).SerializeToString(),
        MUST_REFUSE,
    )
    yield "no result", model([pool, flat], [image], []).SerializeToString(), MUST_REFUSE
    shape = helper.make_node("Shape", ["input"], ["logits"])
    yield (
        "whole numbers as its result",
        model([shape], [image], [value("logits", [4], TensorProto.INT64)]).SerializeToString(),
        MUST_REFUSE,
    )
    one = numpy_helper.from_array(np.zeros((1, 3), np.float32), "logits_of_one")
    constant = helper.make_node("Identity", ["logits_of_one"], ["logits"])
    yield (
        "one row for any batch",
        model([constant, pool], [image], [value("logits", [1, 3])], (one,)).SerializeToString(),
        MUST_REFUSE,
    )
    none = helper.make_node("Slice", ["flat", "zero", "zero", "axis"], ["logits"])
    ends = tuple(
        numpy_helper.from_array(np.array([n]), name) for n, name in ((0, "zero"), (1, "axis"))
    )
    flat_too = helper.make_node("Flatten", ["p"], ["flat"], axis=1)
    yield (
        "no logits",
        model(
            [pool, flat_too, none], [image], [value("logits", ["n", 0])], ends
        ).SerializeToString(),
        MUST_REFUSE,
    )
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "z")
    divided = helper.make_node("Div", ["l", "z"], ["logits"])
    flat_l = helper.make_node("Flatten", ["p"], ["l"], axis=1)
    yield (
        "NaN and infinity as logits",
        model(
            [pool, flat_l, divided], [image], [value("logits", ["n", 3])], (zero,)
        ).SerializeToString(),
        "either",
    )
    for what, place in (
        ("outside of its folder", "../secret.bin"),
        ("at an absolute path", str(secret)),
        ("that is not there", "nowhere.bin"),
        ("in /dev/zero", "/dev/zero"),
        ("in /etc/passwd", "../../../../../../etc/passwd"),
    ):
        tensor = TensorProto(
            name="w", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL
        )
        tensor.external_data.add(key="location", value=place)
        added = helper.make_node("Add", ["l", "w"], ["logits"])
        yield (
            f"weights {what}",
            model(
                [pool, flat_l, added], [image], [value("logits", ["n", 3])], (tensor,)
            ).SerializeToString(),
            MUST_REFUSE,
        )
    custom = helper.make_node(
        "Execute", ["input"], ["logits"], domain="evil", command="touch executed"
    )
    yield (
        "an unknown operator",
        model([custom], [image], [value("logits", ["n", 3])]).SerializeToString(),
        MUST_REFUSE,
    )
    loop = helper.make_node("Relu", ["logits"], ["logits"])
    yield (
        "an operator that reads itself",
        model([loop], [image], [value("logits", ["n", 3])]).SerializeToString(),
        MUST_REFUSE,
    )
    big = helper.make_node("Expand", ["l", "s"], ["logits"])
    size = numpy_helper.from_array(np.array([10**6, 10**6]), "s")
    yield (
        "a result of 4 TB",
        model(
            [pool, flat_l, big], [image], [value("logits", ["a", "b"])], (size,)
        ).SerializeToString(),
        MUST_REFUSE,
    )
