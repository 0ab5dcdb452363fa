"""The door of weights: what model.weights=FILE may be given."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from doors.damage import damaged, evils
from doors.lab import TINY, Lab
from doors.trial import MUST_REFUSE, MUST_WORK, Case, Result
from torch import Tensor

from fat.models.float_model import load_float_network

__all__ = ["weights"]

NETWORK = "test_efficientnet"


def weights(lab: Lab) -> list[Result]:
    """Files for model.weights, opened by the function that the command calls, some by itself."""
    state = load_float_network(NETWORK, weights="random").network.state_dict()
    files = lab.new("weights")
    files.mkdir()
    cases: list[Case] = []
    made = 0

    def add(row: str, what: str, name: str, content: bytes, wanted: str = "either") -> None:
        nonlocal made
        made += 1
        path = files / f"{made}-{name}"
        path.write_bytes(content)
        cases.append(Case(row, what, functools.partial(_load, path), wanted))

    whole = {".safetensors": safetensors.torch.save(state), ".pth": _saved(state)}
    whole[".ckpt"] = _saved({"state_dict": {f"module.{k}": v for k, v in state.items()}})
    old = _saved(state, _use_new_zipfile_serialization=False)
    for suffix, content in (*whole.items(), ("-old.pth", old)):
        add("whole files", suffix, f"whole{suffix}", content, MUST_WORK)
        for kind, where, broken in damaged(content, lab.random(suffix)):
            add(f"`{suffix}`: {kind}", where, f"x{suffix}", broken)
    for what, changed, wanted in _states(state):
        add("tensors that do not fit", what, "state.pth", _saved(changed), wanted)
    for what, content, wanted in _headers(whole[".safetensors"]):
        add("`.safetensors` headers", what, "head.safetensors", content, wanted)
    for what, content in _pickles(state, lab.canary):
        for suffix in (".pth", ".ckpt", ".safetensors"):
            add("pickles with code", f"{what}{suffix}", f"code{suffix}", content, MUST_REFUSE)
    for what, path in _no_files(files):
        cases.append(Case("no files", what, functools.partial(_load, path), MUST_REFUSE))
    rng = lab.random("weights commands")
    broken = [path for path in sorted(files.iterdir()) if path.suffix and path.is_file()]
    for path in rng.sample(broken, 8):
        call = functools.partial(_train, lab, path)
        cases.append(Case("`train.py model.weights=`, a sample", path.name, call))
    return lab.run(cases)


def _load(path: Path) -> str:
    loaded = load_float_network(NETWORK, weights=str(path))
    logits = loaded.network(torch.zeros(1, 3, 32, 32))
    assert logits.shape == (1, loaded.num_classes), "the logits have another shape"
    return f"{loaded.num_classes} classes"


def _train(lab: Lab, path: Path) -> str:
    words = [word for word in TINY if not word.startswith("model.num_classes")]
    words = ["data=photos" if word == "data=digits" else word for word in words]
    place = lab.new("run")
    lab.command(
        "train.py", *words, f"model.weights='{path}'", "optim.epochs=0", f"hydra.run.dir={place}"
    )
    return "ran to its end"


def _saved(content: object, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def _states(state: dict[str, Tensor]) -> Iterator[tuple[str, object, str]]:
    """State dicts that are others than the network's."""
    first, *_ = state
    last = list(state)[-1]

    def each(change: Any) -> dict[str, Tensor]:
        return {key: change(value) for key, value in state.items()}

    yield "float16", each(lambda t: t.half() if t.is_floating_point() else t), MUST_WORK
    yield "bfloat16", each(lambda t: t.bfloat16() if t.is_floating_point() else t), MUST_WORK
    yield "float64", each(lambda t: t.double() if t.is_floating_point() else t), MUST_WORK
    for kind in ("int64", "complex64", "bool"):
        dtype = getattr(torch, kind)
        yield kind, each(lambda t, d=dtype: t.to(d)), MUST_REFUSE
    yield "sparse", {**state, first: state[first].to_sparse()}, MUST_REFUSE
    yield "on the meta device", each(lambda t: t.to("meta")), MUST_REFUSE
    yield (
        "quantized",
        {**state, first: torch.quantize_per_tensor(state[first], 0.1, 0, torch.qint8)},
        "either",
    )
    yield "NaN", {**state, last: torch.full_like(state[last], torch.nan)}, MUST_REFUSE
    yield "infinity", {**state, last: torch.full_like(state[last], torch.inf)}, MUST_REFUSE
    yield "a key missing", {k: v for k, v in state.items() if k != first}, MUST_REFUSE
    yield "a key too many", {**state, "extra": torch.zeros(3)}, MUST_REFUSE
    yield "another shape", {**state, first: torch.zeros(3)}, MUST_REFUSE
    yield "no dimension", {**state, first: torch.zeros(())}, MUST_REFUSE
    yield "no elements", {**state, first: torch.zeros(0, 3, 3, 3)}, MUST_REFUSE
    yield (
        "10^12 elements in four bytes",
        {**state, first: torch.zeros(1).expand(10**12)},
        MUST_REFUSE,
    )
    yield "values that are no tensors", dict.fromkeys(state, 1.0), MUST_REFUSE
    yield "keys that are numbers", dict(enumerate(state.values())), MUST_REFUSE
    yield "a list", list(state.values()), MUST_REFUSE
    yield "a tensor", state[first], MUST_REFUSE
    yield "nothing", None, MUST_REFUSE
    yield "an empty dict", {}, MUST_REFUSE
    yield "a dict in itself ten times", _nested(state, 10), MUST_REFUSE
    yield (
        "classifier of 7 classes",
        {k: v[:7] if k.startswith("classifier") else v for k, v in state.items()},
        MUST_WORK,
    )
    yield (
        "classifier of no class",
        {k: v[:0] if k.startswith("classifier") else v for k, v in state.items()},
        MUST_REFUSE,
    )
    yield (
        "classifier without dimensions",
        {k: torch.zeros(()) if k.startswith("classifier") else v for k, v in state.items()},
        MUST_REFUSE,
    )


def _nested(content: object, depth: int) -> object:
    for _ in range(depth):
        content = {"state_dict": content}
    return content


def _headers(whole: bytes) -> Iterator[tuple[str, bytes, str]]:
    """Safetensors files whose header lies."""
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    names = [name for name in header if name != "__metadata__"]

    def file(content: Any, stated: int | None = None) -> bytes:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        return struct.pack("<Q", len(text) if stated is None else stated) + text + data

    def changed(**fields: Any) -> bytes:
        return file({**header, names[0]: {**header[names[0]], **fields}})

    yield "as it was", file(header), MUST_WORK
    for stated in (0, 1, 2**31, 2**40, 2**63, 2**64 - 1):
        yield f"length {stated}", file(header, stated), MUST_REFUSE
    yield "no JSON", file(b"{" * 500), MUST_REFUSE
    yield "nested 100,000 deep", file(b'{"a":' * 100_000), MUST_REFUSE
    yield "no UTF-8", file(b'{"\xff": 1}'), MUST_REFUSE
    yield "a list", file([1, 2]), MUST_REFUSE
    yield "unknown dtype", changed(dtype="F99"), MUST_REFUSE
    yield "shape of strings", changed(shape=["x"]), MUST_REFUSE
    yield "shape beyond the data", changed(shape=[2**40, 2**40]), MUST_REFUSE
    yield "negative shape", changed(shape=[-1]), MUST_REFUSE
    yield "offsets beyond the end", changed(data_offsets=[0, 2**40]), MUST_REFUSE
    yield "offsets backwards", changed(data_offsets=[8, 0]), MUST_REFUSE
    other = header[names[1]]["data_offsets"]
    yield "tensors that overlap", changed(data_offsets=other), MUST_REFUSE
    yield "spaces, 20 MB of them", file(json.dumps(header).encode() + b" " * 20_000_000), "either"


def _pickles(state: dict[str, Tensor], canary: Path) -> Iterator[tuple[str, bytes]]:
    """Files in every format that torch and numpy ever pickled, with code inside."""
    for name, evil in evils(canary).items():
        for protocol in (0, 2, 5):
            yield f"{name}, pickle protocol {protocol}", pickle.dumps(evil, protocol)
        yield f"{name}, torch zip", _saved(evil)
        yield f"{name}, torch zip beside tensors", _saved({"state_dict": state, "x": evil})
        yield (
            f"{name}, torch before 1.6",
            _saved({"state_dict": state, "x": evil}, _use_new_zipfile_serialization=False),
        )
        yield f"{name}, torch's first tar", _tar(pickle.dumps(evil, 2))
        stream = io.BytesIO()
        np.save(stream, np.array([evil], dtype=object), allow_pickle=True)
        yield f"{name}, numpy object array", stream.getvalue()
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), stream)
    yield "a TorchScript archive", stream.getvalue()
    yield "a whole module", _saved(torch.nn.Linear(2, 2))


def _tar(pickled: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("storages", pickled), ("tensors", pickled), ("pickle", pickled)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def _no_files(files: Path) -> Iterator[tuple[str, Path]]:
    """Paths at which no readable file is."""
    yield "nothing there", files / "nowhere.pth"
    (files / "folder.pth").mkdir()
    yield "a directory", files / "folder.pth"
    for one, other in (("a", "b"), ("b", "a")):
        (files / f"{one}.pth").symlink_to(files / f"{other}.pth")
    yield "links in a circle", files / "a.pth"
    os.mkfifo(files / "fifo.pth")
    yield "a FIFO", files / "fifo.pth"
    yield "an endless device", Path("/dev/zero")
    yield "a name of 5,000 letters", files / ("a" * 5000 + ".pth")
    yield "below a file", files / "1-whole.safetensors" / "x.pth"
    yield "a name with a NUL", files / "a\0b.pth"
    yield "an empty name", Path("")
