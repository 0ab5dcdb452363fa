"""The door of students and checkpoints: what evaluate.py run= and checkpoint= read."""

from __future__ import annotations

import functools
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from doors.damage import damaged, evils, json_damaged
from doors.lab import Lab
from doors.trial import MUST_REFUSE, MUST_WORK, Case, Result

import fat
from fat.experiment.run_directory import load_checkpoint
from fat.models.serialization import FORMAT, VERSION

__all__ = ["students"]


def students(lab: Lab) -> list[Result]:
    """Student files opened by fat.load and run on images; checkpoints put into their student."""
    files = lab.new("students")
    files.mkdir()
    cases: list[Case] = []

    def add(row: str, what: str, name: str, content: bytes, wanted: str = "either") -> None:
        path = files / f"{len(cases)}-{name}"
        path.write_bytes(content)
        call = _student if name.endswith(".safetensors") else _checkpoint
        cases.append(Case(row, what, functools.partial(call, lab, path), wanted))

    whole = (lab.finished / "student.safetensors").read_bytes()
    add("whole files", "student.safetensors", "student.safetensors", whole, MUST_WORK)
    for kind, where, content in damaged(whole, lab.random("student"), flips=48, head=2000):
        add(f"`student.safetensors`: {kind}", where, "student.safetensors", content)
    for what, metadata, wanted in _metadata(_description(whole), lab):
        content = _with_description(whole, metadata)
        add("`student.safetensors`: its description", what, "student.safetensors", content, wanted)

    best = next((lab.finished / "checkpoints").glob("step=*.ckpt")).read_bytes()
    add("whole files", "a Lightning checkpoint", "best.ckpt", best, MUST_WORK)
    for kind, where, content in damaged(best, lab.random("checkpoint")):
        add(f"Lightning checkpoints: {kind}", where, "best.ckpt", content)
    for what, content, wanted in _checkpoints(best, lab):
        add("Lightning checkpoints: other contents", what, "best.ckpt", content, wanted)
    return lab.run(cases)


@functools.cache
def _images() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _student(lab: Lab, path: Path) -> str:
    student = fat.load(path)
    figures = fat.evaluate(student, [_images()])
    assert figures["images"] == 4
    return f"{len(list(student.quantizers()))} quantizers"


def _checkpoint(lab: Lab, path: Path) -> str:
    student = fat.load(lab.finished / "student.safetensors")
    load_checkpoint(student, path)
    fat.evaluate(student, [_images()])
    return "its student"


def _description(whole: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    description: dict[str, Any] = json.loads(header["__metadata__"][FORMAT])
    return description


def _with_description(whole: bytes, description: object) -> bytes:
    """The same tensors with another description; a text is taken as it is."""
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    text = description if isinstance(description, str) else json.dumps(description)
    header["__metadata__"] = {FORMAT: text}
    stored = json.dumps(header).encode()
    return struct.pack("<Q", len(stored)) + stored + whole[8 + length :]


def _metadata(description: dict[str, Any], lab: Lab) -> Iterator[tuple[str, object, str]]:
    for version in (0, 1, VERSION + 1, 99, "2", None):
        yield f"version {version!r}", {**description, "version": version}, MUST_REFUSE
    yield "no JSON", "{", MUST_REFUSE
    yield "nested 100,000 deep", "[" * 100_000, MUST_REFUSE
    yield "a list", [], MUST_REFUSE
    for bits in (0, 1, 9, 99, -8, 8.5, "8", None, True):
        spec = {**description["spec"], "bits": bits}
        yield f"bits {bits!r}", {**description, "spec": spec}, MUST_REFUSE
    for what, node in (
        ("calls eval", {"op": "call_function", "target": "builtins.eval"}),
        (
            "asks getattr for __class__",
            {
                "op": "call_function",
                "target": "builtins.getattr",
                "args": {"tuple": [{"node": "X"}, "__class__"]},
            },
        ),
        ("calls a method that writes", {"op": "call_method", "target": "data_ptr"}),
        ("a name with code", {"name": "x); __import__('os').system('touch executed') #"}),
        ("an input with code", {"op": "placeholder", "target": "x=open('executed', 'w')"}),
    ):
        changed = json.loads(json.dumps(description))
        nodes = changed["student"]["nodes"]
        first = nodes[0]["name"]
        nodes[1] |= json.loads(json.dumps(node).replace('"X"', json.dumps(first)))
        yield f"an operation {what}", changed, MUST_REFUSE
    for what, changed in json_damaged(description, lab.random("description"), 150):
        yield what, changed, "either"
    for part in ("spec", "origin"):
        for what, changed in json_damaged(description[part], lab.random(part), 60):
            yield f"{part}: {what}", {**description, part: changed}, "either"


def _checkpoints(best: bytes, lab: Lab) -> Iterator[tuple[str, bytes, str]]:
    content = torch.load(io.BytesIO(best), weights_only=True)
    state = content["state_dict"]
    first = next(key for key in state if key.startswith("student."))

    def saved(changed: object) -> bytes:
        stream = io.BytesIO()
        torch.save(changed, stream)
        return stream.getvalue()

    def with_state(changed: object) -> bytes:
        return saved({**content, "state_dict": changed})

    yield "no tensors", with_state({}), MUST_REFUSE
    yield (
        "a tensor missing",
        with_state({k: v for k, v in state.items() if k != first}),
        MUST_REFUSE,
    )
    yield "a tensor too many", with_state({**state, "student.x": state[first]}), MUST_REFUSE
    yield "another shape", with_state({**state, first: torch.zeros(3, 3)}), MUST_REFUSE
    yield "no tensor but a number", with_state({**state, first: 3.0}), MUST_REFUSE
    nan = {
        k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in state.items()
    }
    yield "NaN", with_state(nan), MUST_REFUSE
    yield (
        "complex numbers",
        with_state({k: v.to(torch.complex64) for k, v in state.items()}),
        MUST_REFUSE,
    )
    yield "a list of tensors", with_state(list(state.values())), MUST_REFUSE
    yield "a list", saved([1, 2]), MUST_REFUSE
    yield "nothing of FAT", saved({k: v for k, v in content.items() if k != "fat"}), MUST_REFUSE
    notes = {key: content["fat"][key] for key in ("spec", "origin")}
    for what, changed in json_damaged(notes, lab.random("fat"), 60):
        merged = {**content["fat"], **changed} if isinstance(changed, dict) else changed
        yield f"its notes: {what}", saved({**content, "fat": merged}), "either"
    for name, evil in evils(lab.canary).items():
        yield f"code, {name}", saved({**content, "callbacks": evil}), MUST_REFUSE
