"""Student files: bit-exact round trips, and rejection of damaged and manipulated files."""

from __future__ import annotations

import json
import operator
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fat
from fat import EqualizeSpec, FatError, InitSpec, QuantSpec, Student
from fat.models.serialization import FORMAT, check_saveable
from tests.conftest import TinyNet, realistic


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def student(tiny: nn.Module, images: Tensor) -> Student:
    student = fat.prepare(tiny, images)
    fat.calibrate(student, images)
    return student


@pytest.fixture(scope="module")
def saved() -> list[bytes]:
    """The file of ``student``, once it is written."""
    return []


@pytest.fixture
def path(request: pytest.FixtureRequest, saved: list[bytes], tmp_path: Path) -> Path:
    file = tmp_path / "student.safetensors"
    if not saved:
        fat.save(request.getfixturevalue("student"), file)
        saved.append(file.read_bytes())
    file.write_bytes(saved[0])
    return file


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safetensors.safe_open(path, framework="pt") as stored:
        content = json.loads(stored.metadata()[FORMAT])
        return content, {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def write(path: Path, content: Any, tensors: dict[str, Tensor]) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    save_file(tensors, path, {FORMAT: text})


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    content, tensors = read(path)
    change(content, tensors)
    write(path, content, tensors)


def disturb(student: Student) -> None:
    """Change everything that training may change."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 - 0.2 * torch.rand(parameter.shape, generator=generator))


def same_outputs(one: Student, other: Student, images: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(one(images), other(images))
        assert torch.equal(one.float_logits(images), other.float_logits(images))


NETWORKS = [
    "mobilenetv2_050",
    "mnasnet_small",
    "mobilenetv3_small_050",
    "tf_efficientnet_lite0",
    "resnet18",
    "mobilenetv4_conv_small",
]


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_networks_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 65, 65)  # odd, so that "same" padding is asymmetric
    student = fat.prepare(timm.create_model(name, num_classes=12).eval(), images)
    fat.calibrate(student, images)
    disturb(student)
    fat.save(student, tmp_path / "s.safetensors")
    loaded = fat.load(tmp_path / "s.safetensors")
    same_outputs(student, loaded, images)
    same_outputs(student, loaded, torch.randn(1, 3, 48, 80))  # other sizes


SPECS = {
    "default": QuantSpec(),
    "scalar asymmetric": QuantSpec(granularity="per_tensor", scheme="asymmetric"),
    "symmetric": QuantSpec(scheme="symmetric"),
    "frozen": QuantSpec(thresholds="frozen", bias="frozen", weights="frozen"),
    "bits": QuantSpec(weight_bits=4, activation_bits=6, first_bits=8, last_bits=7),
    "ranges": QuantSpec(alpha_range=(0.3, 1.3), shift_range=(-0.1, 0.2)),
    "inits": QuantSpec(
        weight_init=InitSpec("percentile", 99.0), activation_init=InitSpec("percentile", 99.9)
    ),
    "equalized": QuantSpec(equalize=EqualizeSpec("depthwise+cross_layer", cap=5.0, iterations=3)),
    "balanced": QuantSpec(granularity="per_tensor", equalize=EqualizeSpec("balanced")),
    "exact": QuantSpec(granularity="per_tensor", equalize=EqualizeSpec("exact")),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_spec_comes_back(
    tiny: nn.Module, images: Tensor, tmp_path: Path, name: str
) -> None:
    student = fat.prepare(tiny, images, SPECS[name])
    fat.calibrate(student, images)
    disturb(student)
    student.origin = {"name": "tiny", "sizes": [1, 2.5, None, True], "more": {"ä": "ß"}}
    fat.save(student, tmp_path / "s")
    loaded = fat.load(tmp_path / "s")
    same_outputs(student, loaded, images)
    assert loaded.spec == SPECS[name]
    assert loaded.origin == student.origin
    assert loaded.report is None
    assert not loaded.training
    ours, theirs = student.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    wants = {name: p.requires_grad for name, p in student.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == wants
    for here, there in zip(
        student.activation_quantizers(), loaded.activation_quantizers(), strict=True
    ):
        assert repr(here.activation) == repr(there.activation)
        assert here.thresholds.limit == there.thresholds.limit
    for one, other in zip(student.layers(), loaded.layers(), strict=True):
        assert one.input_quantizer.layer == other.input_quantizer.layer
    # A loaded student gives the same file.
    fat.save(loaded, tmp_path / "again")
    same_outputs(student, fat.load(tmp_path / "again"), images)


class Zoo(nn.Module):
    """One of every stored operation that no timm network above uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding="same", dilation=2)
        self.b = nn.Conv2d(8, 8, 3, stride=(2, 1), padding=(1, 0), groups=4, bias=False)
        self.acts = nn.ModuleList(
            [
                nn.GELU("tanh"),
                nn.LeakyReLU(0.2),
                nn.ELU(0.7),
                nn.Softplus(2.0),
                nn.Tanh(),
                nn.Mish(),
            ]
        )
        self.pad, self.pool = nn.ConstantPad2d((1, 0, 2, 0), 0.0), nn.MaxPool2d(2, 1, 1)
        self.average, self.up = nn.AvgPool2d(3, 2, count_include_pad=False), nn.Upsample(8)
        self.shuffle, self.out = nn.PixelShuffle(2), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = self.b(self.a(x) / 2.0 - 0.25)
        for act in self.acts:
            x = act(x)
        left, right = torch.chunk(x, 2, dim=1)
        x = torch.cat([left[:, :, 1:], -right[:, :, 1:]], dim=1)
        x = self.up(self.average(self.pool(self.pad(F.pad(x, (1, 0))))))
        x = torch.cat([x, F.interpolate(x, scale_factor=1.0)], 1)[..., : h // 2, : w // 2]
        y = self.shuffle(x).flatten(2).mean(2)
        z = torch.softmax(x.mean((2, 3)), 1) if False else F.softmax(x.mean((2, 3)), dim=1)
        parts = [y, z.reshape(n, -1), x.sum((2, 3)), x.mean(dim=[2, 3]).squeeze(1)[:, :4]]
        return self.out(F.pad(torch.cat(parts, 1), (0, 0)))


def test_operations_of_all_kinds_come_back(images: Tensor, tmp_path: Path) -> None:
    student = fat.prepare(Zoo().eval(), images)
    fat.calibrate(student, images)
    fat.save(student, tmp_path / "s")
    loaded = fat.load(tmp_path / "s")
    same_outputs(student, loaded, images)
    a, b = (loaded.network.get_submodule(name) for name in "ab")
    assert (a.padding, a.dilation) == ("same", (2, 2))
    assert (b.stride, b.padding, b.groups, b.bias) == ((2, 1), (1, 0), 4, None)


def test_an_uncalibrated_student_stays_uncalibrated(
    tiny: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    student = fat.prepare(tiny, images)
    fat.save(student, tmp_path / "s")
    loaded = fat.load(tmp_path / "s")
    with pytest.raises(FatError, match="not calibrated"):
        loaded(images)
    fat.calibrate(student, images)
    fat.calibrate(loaded, images)
    same_outputs(student, loaded, images)


def test_a_loaded_student_trains_as_the_first_would(
    path: Path, student: Student, images: Tensor
) -> None:
    batches, before = list(images.split(4)), student(images)
    loaded = fat.load(path)
    results = [
        fat.fit(s, batches, validation=batches, epochs=2, progress=False) for s in (student, loaded)
    ]
    assert results[0] == results[1]
    assert results[0].best_loss < results[0].calibrated_loss
    assert not torch.equal(student(images), before)
    same_outputs(student, loaded, images)


def test_loading_needs_neither_timm_nor_the_networks_code(
    path: Path, student: Student, images: Tensor
) -> None:
    # After fat is imported, timm is removed and blocked. The network is a class of this test that
    # the other process does not have.
    torch.save((images, student(images).detach()), path.with_suffix(".pt"))
    code = f"""
import sys, torch, fat
from fat import load, prepare

class Barred:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("timm", "conftest"):
            raise ImportError(name + " is barred")

for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
    del sys.modules[name]
sys.meta_path.insert(0, Barred())
student = fat.load({str(path)!r})
images, expected = torch.load({str(path.with_suffix(".pt"))!r})
assert torch.equal(student(images), expected)
assert not [name for name in sys.modules if name.split(".")[0] == "timm"]
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout == "same\n", done.stderr


def test_tensors_of_the_teacher_are_stored_once(path: Path, student: Student) -> None:
    content, tensors = read(path)
    teacher = {name for name, _ in student.teacher.named_buffers()}
    aliases = content["aliases"]
    assert set(aliases) == {f"teacher.{name}" for name in teacher}
    assert not [name for name in tensors if name.startswith("teacher.")]
    state = sum(value.nbytes for value in student.state_dict().values())
    header = path.stat().st_size - sum(value.nbytes for value in tensors.values())
    assert path.stat().st_size - header == state
    # Once a bias is trained, the teacher's is stored too.
    expected = student.teacher.get_submodule("stem").bias.clone()
    with torch.no_grad():
        student.layers()[0].bias += 1
    fat.save(student, path)
    _, tensors = read(path)
    assert [name for name in tensors if name.startswith("teacher.")] == ["teacher.stem.bias"]
    loaded = fat.load(path)
    assert torch.equal(loaded.teacher.get_submodule("stem").bias, expected)
    assert torch.equal(loaded.layers()[0].bias, expected + 1)


def test_saving_is_atomic(
    path: Path, student: Student, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()
    expected = fat.load(path)
    disturb(student)

    def breaks(tensors: Any, target: Path, metadata: Any) -> None:
        Path(target).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fat.models.serialization.save_file", breaks)
        with pytest.raises(FatError, match="No space left"):
            fat.save(student, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    same_outputs(fat.load(path), expected, images)
    fat.save(student, path)
    same_outputs(fat.load(path), student, images)


def test_a_place_that_cannot_be_written(student: Student, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FatError, match="Cannot write"):
        fat.save(student, tmp_path / "file" / "s.safetensors")


# --- what cannot be saved -----------------------------------------------------


class Unsaveable(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.norm = nn.LocalResponseNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.kind == "function":
            x = torch.erf(x)
        elif self.kind == "method":
            x = x.cumsum(1)
        elif self.kind == "module":
            x = self.norm(x)
        elif self.kind == "attribute":
            x = x.real
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("function", "'erf' is the function erf"),
        ("method", "'cumsum' is the tensor method cumsum"),
        ("module", "'norm' is a LocalResponseNorm"),
        ("attribute", "is the function getattr"),
    ],
)
def test_an_operation_that_cannot_be_stored_is_named(
    images: Tensor, tmp_path: Path, kind: str, names: str
) -> None:
    student = fat.prepare(Unsaveable(kind).eval(), images)
    with pytest.raises(FatError, match=names):
        check_saveable(student)
    with pytest.raises(FatError, match=names):
        fat.save(student, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


class Mixed(nn.Module):
    """Operations on real values, constants and attributes, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.group, self.layer = nn.GroupNorm(2, 4), nn.LayerNorm(4)
        self.gamma = nn.Parameter(torch.randn(4, 1, 1))
        self.slope = nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.group(self.conv(x)) * self.gamma)
        rows = self.layer(x.flatten(2).mT)
        weights = torch.softmax(rows @ rows.transpose(1, 2), -1)
        return self.head((weights @ rows).mean(1))


def test_layers_that_compute_in_real_values_are_saved(images: Tensor, tmp_path: Path) -> None:
    student = fat.prepare(Mixed().eval(), images)
    fat.calibrate(student, images)
    assert {name for name, _ in student.named_buffers()} >= {
        "network.gamma",
        "network.group.weight",
        "network.layer.bias",
        "network.slope.weight",
    }
    fat.save(student, tmp_path / "s.safetensors")
    loaded = fat.load(tmp_path / "s.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))
        assert torch.equal(loaded.float_logits(images), student.float_logits(images))


def test_what_can_be_saved_passes_the_check(student: Student) -> None:
    check_saveable(student)


# --- files that are not students ----------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FatError, match="no student file"):
        fat.load(tmp_path / "none")
    with pytest.raises(FatError, match="no student file"):
        fat.load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.3, 0.9, 0.999])
def test_a_truncated_file(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(FatError, match="truncated, damaged"):
        fat.load(path)


def test_another_kind_of_file(tmp_path: Path, tiny: nn.Module) -> None:
    torch.save(tiny.state_dict(), tmp_path / "float.pt")
    (tmp_path / "text").write_text("not a student at all")
    for name in ("float.pt", "text"):
        with pytest.raises(FatError, match="cannot be read as safetensors"):
            fat.load(tmp_path / name)


def test_weights_of_a_float_network(tmp_path: Path, tiny: nn.Module) -> None:
    save_file(tiny.state_dict(), tmp_path / "float.safetensors", {"format": "pt"})
    with pytest.raises(FatError, match="not a student"):
        fat.load(tmp_path / "float.safetensors")
    save_file(tiny.state_dict(), tmp_path / "float.safetensors")
    with pytest.raises(FatError, match="not a student"):
        fat.load(tmp_path / "float.safetensors")


def test_another_version(path: Path) -> None:
    rewrite(path, lambda content, _: content.update(version=999))
    with pytest.raises(FatError, match="version 999 of the format"):
        fat.load(path)


BROKEN: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "a tensor is missing": lambda _, t: t.pop("student.network.stem.weight"),
    "a threshold is missing": lambda _, t: t.pop(next(n for n in t if n.endswith("alpha"))),
    "a tensor too many": lambda _, t: t.update({"student.more": torch.zeros(1)}),
    "a teacher's tensor too many": lambda _, t: t.update({"teacher.more": torch.zeros(1)}),
    "a wrong shape": lambda _, t: t.update(
        {"student.network.stem.weight": torch.zeros(8, 3, 5, 5)}
    ),
    "no spec": lambda c, _: c.pop("spec"),
    "no graph": lambda c, _: c.pop("student"),
    "no version": lambda c, _: c.pop("version"),
    "a spec that is a list": lambda c, _: c.update(spec=[1]),
    "a graph that is a list": lambda c, _: c.update(student=[]),
    "a graph that is empty": lambda c, _: c.update(student={}),
    "no aliases": lambda c, _: c.update(aliases={}),
    "an alias to nowhere": lambda c, _: c.update(aliases={"teacher.stem.weight": "nowhere"}),
    "an unknown option": lambda c, _: c.update(spec={"bits": 8, "flavour": "plum"}),
    "bits out of range": lambda c, _: c.update(spec={"bits": 99}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_does_not_fit_together(path: Path, case: str) -> None:
    rewrite(path, BROKEN[case])
    with pytest.raises(FatError):
        fat.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "[" * 100000 + "]" * 100000])
def test_a_description_that_is_none(path: Path, text: str) -> None:
    write(path, text, read(path)[1])
    with pytest.raises(FatError, match="is inconsistent"):
        fat.load(path)


# --- files that were tampered with --------------------------------------------


def first(graph: dict[str, Any], op: str) -> dict[str, Any]:
    return next(node for node in graph["nodes"] if node["op"] == op)


def set_target(op: str, target: Any, args: Any = None) -> Callable[[dict[str, Any]], None]:
    def change(graph: dict[str, Any]) -> None:
        node = first(graph, op)
        node["target"] = target
        if args is not None:
            node["args"] = args

    return change


def set_module(stored: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda graph: graph["modules"].update(stem=stored)


def _reads(*more: Any) -> dict[str, Any]:
    return {"tuple": [{"node": "x"}, *more]}


SHELL = {"tuple": ["touch PWNED"]}
TAMPERED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "os.system": set_target("call_function", "os.system", SHELL),
    "posix.system": set_target("call_function", "posix.system", SHELL),
    "eval": set_target("call_function", "builtins.eval", {"tuple": ["open('PWNED', 'w')"]}),
    "torch.load": set_target("call_function", "torch.load", SHELL),
    "function without a name": set_target("call_function", None),
    "function that is a list": set_target("call_function", ["operator.add"]),
    "__class__": set_target("call_function", "builtins.getattr", _reads("__class__")),
    "getattr of too little": set_target("call_function", "builtins.getattr", _reads()),
    "getattr of a node": set_target("call_function", "builtins.getattr", _reads({"node": "x"})),
    "unknown method": lambda g: first(g, "call_function").update(op="call_method", target="apply_"),
    "private method": lambda g: first(g, "call_function").update(
        op="call_method", target="__reduce__"
    ),
    "unknown kind of node": lambda g: first(g, "call_function").update(op="call_shell"),
    "get_attr": lambda g: first(g, "call_function").update(op="get_attr", target="__class__"),
    "unknown module": set_module({"type": "Popen", "options": {"map": {"args": "touch PWNED"}}}),
    "module without a type": set_module({}),
    "module of another kind": set_module({"type": "ReLU", "options": {"map": {}}}),
    "module with unknown options": set_module({"type": "ReLU", "options": {"map": {"a": 1}}}),
    "missing module": lambda g: g["modules"].pop("stem"),
    "module over a method": lambda g: g["modules"].update(forward=g["modules"]["classifier"]),
    "node that nobody made": lambda g: first(g, "call_module").update(
        args={"tuple": [{"node": "?"}]}
    ),
    "unknown kind of value": lambda g: first(g, "call_module").update(
        args={"tuple": [{"code": "1"}]}
    ),
    "value of two kinds": lambda g: first(g, "call_module").update(
        args={"tuple": [{"node": "x", "tuple": []}]}
    ),
    "nodes out of order": lambda g: g["nodes"].reverse(),
    "no nodes": lambda g: g.update(nodes=[]),
    "huge tensor": lambda g: g["modules"]["stem"].update(weight=[10**9, 10**9, 3, 3]),
}


@pytest.mark.parametrize("part", ["student", "teacher"])
@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_graph_is_refused(
    path: Path, case: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    rewrite(path, lambda content, _: TAMPERED[case](content[part]))
    with pytest.raises(FatError, match="is inconsistent"):
        fat.load(path)
    assert not (path.parent / "PWNED").exists()


def injections(flag: Path) -> dict[str, str]:
    """Return texts without dots and slashes that run code if source code uses them as names."""
    hidden = "".join(f"\\x{ord(letter):02x}" for letter in f"open({str(flag)!r}, 'w')")
    run = f"eval('{hidden}')"
    return {
        "default value": f"x={run}",
        "keyword": f"a=1)\n    return 1\n{run}\ndef g(x):\n    g(x",
        "keyword, in the line": f"a={run}, b",
        "attribute": f'a")\n    return 1\n{run}\n#',
        "attribute, in the line": f'a", {run}) or getattr(self, "a',
        "call": f"x({run})",
        "string": f"' + {run} + '",
    }


def replaced(content: Any, old: str, new: str) -> Any:
    """Replace every string ``old`` (also keys) of a JSON value by ``new``."""
    if isinstance(content, dict):
        return {new if k == old else k: replaced(v, old, new) for k, v in content.items()}
    if isinstance(content, list):
        return [replaced(part, old, new) for part in content]
    return new if content == old else content


def strings(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from strings(value)
    elif isinstance(content, list):
        for part in content:
            yield from strings(part)
    elif isinstance(content, str):
        yield content


def small_student(images: Tensor) -> Student:
    """Return a student with one of each kind of node."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(x)
            y = torch.cat([y.mean(dim=(2, 3)), y.sum((2, 3)) * 0.1], dim=1)
            return self.head(y.reshape(x.shape[0], -1))

    student = fat.prepare(Small().eval(), images)
    fat.calibrate(student, images)
    return student


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_no_string_of_a_file_becomes_code(images: Tensor, tmp_path: Path, part: str) -> None:
    student, path, flag = small_student(images), tmp_path / "s.safetensors", tmp_path / "PWNED"
    fat.save(student, path)
    content, tensors = read(path)
    for text in sorted(set(strings(content[part]))):
        for injection in injections(flag).values():
            changed = {**content, part: replaced(content[part], text, injection)}
            # Tensors are renamed with their modules, as an attacker would do.
            renamed = {
                ".".join(injection if p == text else p for p in n.split(".")): t
                for n, t in tensors.items()
            }
            write(path, changed, renamed)
            try:
                loaded = fat.load(path)
                loaded(images)
                loaded.float_logits(images)
            except (FatError, RuntimeError, TypeError):
                pass
            assert not flag.exists(), (text, injection)


def test_the_injections_would_run(tmp_path: Path) -> None:
    """The texts above do run code where names are not checked."""
    flag = tmp_path / "PWNED"
    texts = injections(flag)
    exec(f"def f({texts['default value']}): pass", {})
    assert flag.exists()
    flag.unlink()
    source = f"def forward(self, x):\n    y = self.f(x, {texts['keyword']} = 1)\n    return y\n"
    exec(source, {})
    assert flag.exists()
    flag.unlink()
    graph = torch.fx.Graph()
    x = graph.placeholder(texts["default value"])
    graph.output(graph.call_function(operator.add, (x, 1)))
    torch.fx.GraphModule(nn.Module(), graph)
    assert flag.exists()


def test_realistic_networks_can_be_saved(tmp_path: Path) -> None:
    images = torch.randn(8, 3, 32, 32)
    for act in (nn.ReLU, nn.Hardswish, nn.SiLU):
        student = fat.prepare(realistic(TinyNet(act=act), images), images)
        fat.calibrate(student, images)
        fat.save(student, tmp_path / act.__name__)
        same_outputs(student, fat.load(tmp_path / act.__name__), images)


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        (lambda c: c["student"]["modules"]["stem"]["options"]["map"].update(stride="x"), ""),
        (lambda c: c["teacher"]["modules"]["stem"]["options"]["map"].update(groups=True), ""),
        (lambda c: c["origin"].update(num_classes=7), "10 logits for 7 classes"),
        (lambda c: c["origin"].update(preprocessing={"size": [10**6, 10**6]}), "its images are"),
        (lambda c: c["origin"].update(preprocessing=3), ""),
    ],
)
def test_a_student_that_cannot_run_is_refused_when_it_is_loaded(
    path: Path, case: Callable[[dict[str, Any]], Any], wanted: str
) -> None:
    def with_size(content: dict[str, Any], _: Any) -> None:
        content["origin"] = {"preprocessing": {"size": [16, 16]}}

    rewrite(path, with_size)
    assert fat.load(path)
    rewrite(path, lambda content, _: case(content))
    with pytest.raises(FatError, match=f"is inconsistent: .*{wanted}"):
        fat.load(path)


def test_numbers_that_are_not_finite_are_named(path: Path) -> None:
    def with_nan(_: Any, tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("weight"))
        tensors[name] = torch.full_like(tensors[name], torch.nan)

    rewrite(path, with_nan)
    with pytest.raises(FatError, match="weight holds values that are not finite real numbers"):
        fat.load(path)
