"""Every data source of conf/ gives the splits that it promises, or says what to type."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fat.data.datamodule import FatDataModule
from fat.data.sources import builtin as ready
from fat.data.sources import hub
from fat.data.sources.manifest import ImageIndex
from fat.data.transforms import DeviceCropTransform
from fat.experiment.build import InputSpec, finetuned, for_images, make_data, own_classes
from fat.experiment.config import DataConfig
from fat.models.float_model import Preprocessing, load_float_network
from fat.models.labels import class_names
from fat.training.config import FinetuneSpec
from fat.utils.errors import FatError
from tests.data.fake_imagenet import WNIDS, fake

PREPROCESSING = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", 0.875, "center")
IMAGENET = InputSpec(PREPROCESSING, 1000)


def config(source: str, **options: Any) -> DataConfig:
    return DataConfig(source, workers=0, batch_size=8, **options)


def own_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog", "fox")) -> Path:
    for k, name in enumerate(classes):
        for i in range(12):
            (root / name).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng((k, i)).integers(0, 80, (36, 40, 3), dtype=np.uint8)
            pixels[..., k] += 150  # each class has its colour
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def sizes(data: FatDataModule) -> list[int]:
    return [len(split) for split in (data.calibration, data.train, data.validation, data.test)]


def labels(data: FatDataModule) -> set[int]:
    return {int(label) for _, batch in data.test_dataloader() for label in batch}


def test_imagenet_is_sampled_and_written_down(tmp_path: Path) -> None:
    root = fake(tmp_path / "images")
    asked = config(
        "imagenet",
        root=str(root),
        train_images=10,
        calibration_images=5,
        validation_images=5,
        test_images=10,
    )
    data = make_data(asked, IMAGENET, seed=3)
    assert sizes(data) == [5, 10, 5, 10]
    names = class_names(1000)
    assert names is not None
    assert labels(data) == {names.index(wnid) for wnid in WNIDS}
    assert data.index is not None
    path = data.index.save(tmp_path / "images.csv")
    # The index alone is enough, and other options have no say.
    again = make_data(config("imagenet", index=str(path), fraction=0.9), IMAGENET, seed=9)
    assert again.index == data.index
    images, _ = next(iter(data.test_dataloader()))
    assert torch.equal(images, next(iter(again.test_dataloader()))[0])


def test_imagenet_is_not_for_other_networks(tmp_path: Path) -> None:
    asked = config("imagenet", root=str(fake(tmp_path)), validation_images=5)
    with pytest.raises(FatError, match=r"1000 classes, the network has 10.*data=folder"):
        make_data(asked, InputSpec(PREPROCESSING, 10), 0)
    with pytest.raises(FatError, match=r"type data.validation_images=1000"):
        make_data(replace(asked, validation_images=None), IMAGENET, 0)
    with pytest.raises(FatError, match=r"data=imagenet needs a folder: type data.root=DIR"):
        make_data(replace(asked, root=None), IMAGENET, 0)


def test_a_folder_is_written_down_too(tmp_path: Path) -> None:
    root = own_folder(tmp_path / "images")
    data = make_data(config("folder", root=str(root)), IMAGENET, 0)
    assert not data.labelled
    assert data.index is not None
    assert list(data.index.counts().values()) == sizes(data)
    path = data.index.save(tmp_path / "images.csv")
    again = make_data(config("folder", index=str(path)), IMAGENET, 0)
    assert sizes(again) == sizes(data)


def test_an_index_is_read_where_its_folder_is_now(tmp_path: Path) -> None:
    root = tmp_path / "images"
    own_folder(root / "train")
    own_folder(root / "val", ("owl",))
    data = make_data(config("folder", root=str(root)), IMAGENET, 0)
    assert data.index is not None
    path = str(data.index.save(tmp_path / "images.csv"))
    root.rename(tmp_path / "moved")
    with pytest.raises(FatError, match=r"does not exist.*data.root=DIR"):
        make_data(config("folder", index=path), IMAGENET, 0)
    moved = make_data(config("folder", index=path, root=str(tmp_path / "moved")), IMAGENET, 0)
    assert labels(moved) == {-1}
    assert sizes(moved) == sizes(data)


def test_duplicates_of_test_images_are_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "images"
    own_folder(root / "train")
    own_folder(root / "val", ("owl",))
    for i in range(4):  # four test images are in training too, under other names
        content = (root / "val" / "owl" / f"{i}.png").read_bytes()
        (root / "train" / "cat" / f"copy{i}.png").write_bytes(content)
    before = make_data(config("folder", root=str(root)), IMAGENET, 0)
    assert "are duplicates of test or validation images" in caplog.text
    assert isinstance(before.index, ImageIndex)
    before.index.check_disjoint()
    tests = {before.test.source.content(int(i)) for i in before.test.indices}
    assert len(tests) == 12  # the test keeps all of its images
    for split in (before.train, before.validation, before.calibration):
        assert not tests & {split.source.content(int(i)) for i in split.indices}
    assert sizes(before) == list(before.index.counts().values())


def test_own_classes_of_a_folder(tmp_path: Path) -> None:
    root = own_folder(tmp_path / "images" / "train")
    asked = config("folder", root=str(root.parent))
    assert own_classes(asked) == ("cat", "dog", "fox")
    data = make_data(asked, InputSpec(PREPROCESSING, 3, ("cat", "dog", "fox")), 0)
    assert data.labelled
    assert labels(data) == {0, 1, 2}
    (root / "stray.png").write_bytes((root / "cat" / "0.png").read_bytes())
    with pytest.raises(FatError, match=r"images outside of subfolders.*one for each class"):
        own_classes(asked)
    with pytest.raises(FatError, match=r"teacher=finetune needs images with classes"):
        own_classes(config("photos"))


def test_digits_need_a_network_of_ten_classes() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    with pytest.raises(FatError, match=r"10 classes of its own.*1000 logits.*teacher=finetune"):
        make_data(config("digits"), IMAGENET, 0)
    assert own_classes(config("digits")) == tuple("0123456789")
    data = make_data(config("digits", test_images=50), InputSpec(PREPROCESSING, 10), 0)
    assert data.labelled
    assert labels(data) == set(range(10))
    assert data.index is None


def test_imagenette_has_imagenets_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake(tmp_path / "imagenette2-320")
    monkeypatch.setattr(ready, "imagenette", lambda place: root)
    data = make_data(config("imagenette"), IMAGENET, 0)
    names = class_names(1000)
    assert names is not None
    assert labels(data) == {names.index(wnid) for wnid in WNIDS}
    assert own_classes(config("imagenette")) == WNIDS


def test_distilled_images_train_and_real_ones_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = load_float_network("test_efficientnet", weights="random", num_classes=3)
    asked = config("distilled", test_root=str(own_folder(tmp_path / "real")), test_images=20)
    distill = replace(asked.distill, images=12, batch_size=6, coarse_steps=1, steps=1)
    asked = replace(asked, distill=distill)
    network = for_images(source, replace(asked, image_size=32))
    target = replace(InputSpec.of(network), classes=("cat", "dog", "fox"))
    data = make_data(asked, target, 0)
    assert sizes(data) == [11, 11, 1, 20]
    assert data.labelled
    assert labels(data) == {0, 1, 2}
    photos = make_data(replace(asked, test_root=None), target, 0)
    assert not photos.labelled
    assert photos.test.source.name(0).startswith("chelsea")
    finished = replace(target, network=None)
    with pytest.raises(FatError, match=r"finished run no longer has.*data=folder"):
        make_data(asked, finished, 0)
    for made, judge in ((data, asked), (photos, replace(asked, test_root=None))):
        assert made.index is not None
        path = made.index.save(tmp_path / "images.csv")
        again = make_data(replace(judge, index=str(path)), finished, 0)
        assert sizes(again) == sizes(made)
        for one, other in zip(made.test_dataloader(), again.test_dataloader(), strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(FatError, match=r"does not exist.*made from the network.*data=photos"):
        make_data(replace(asked, index=str(path)), finished, 0)


def test_photos_may_be_judged_on_real_images(tmp_path: Path) -> None:
    asked = config("photos", test_root=str(own_folder(tmp_path)), train_images=8, test_images=30)
    data = make_data(asked, InputSpec(PREPROCESSING, 3, ("cat", "dog", "fox")), 0)
    assert len(data.test) == 30
    assert labels(data) == {0, 1, 2}


def test_the_cache_holds_the_training_images(tmp_path: Path) -> None:
    root = own_folder(tmp_path / "images")
    asked = config("folder", root=str(root), cache="pixels", cache_dir=str(tmp_path / "caches"))
    plain = make_data(replace(asked, cache="none"), IMAGENET, 0)
    cached = make_data(asked, IMAGENET, 0)
    assert len(list((tmp_path / "caches").glob("*.cache"))) == 1
    for one, other in zip(plain.train_dataloader(), cached.train_dataloader(), strict=True):
        assert torch.equal(one[0], other[0])  # smaller than the cache's side
    assert cached.fingerprint() == plain.fingerprint()
    with pytest.raises(FatError, match=r"squares is for crops on the device.*data.augment=device"):
        make_data(replace(asked, cache="squares"), IMAGENET, 0)
    squares = make_data(replace(asked, cache="squares", augment="device"), IMAGENET, 0)
    images, _ = next(iter(squares.train_dataloader()))
    assert images.shape == (8, 3, 32, 32)
    with pytest.raises(FatError, match=r"Unknown data.cache 'jpg'. Did you mean 'jpeg'"):
        make_data(replace(asked, cache="jpg"), IMAGENET, 0)


def test_the_fingerprint_follows_what_training_depends_on(tmp_path: Path) -> None:
    root = own_folder(tmp_path)
    asked = config("folder", root=str(root))
    first = make_data(asked, IMAGENET, 0).fingerprint()
    assert make_data(asked, IMAGENET, 0).fingerprint() == first
    for change in (
        {"flip": 0.0},
        {"crop_scale": [0.5, 1.0]},
        {"batch_size": 4},
        {"validation_fraction": 0.3},
        {"augment": "device"},
    ):
        assert make_data(replace(asked, **change), IMAGENET, 0).fingerprint() != first
    assert make_data(asked, IMAGENET, 1).fingerprint() != first
    named = InputSpec(PREPROCESSING, 3, ("cat", "dog", "fox"))
    assert make_data(asked, named, 0).fingerprint() != first


def test_crops_on_the_device_are_an_option(tmp_path: Path) -> None:
    asked = config("folder", root=str(own_folder(tmp_path)), augment="device")
    data = make_data(asked, IMAGENET, 0)
    assert isinstance(data.train.transform, DeviceCropTransform)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 32, 32)
    with pytest.raises(FatError, match=r"Unknown data.augment 'gpu'. Allowed: worker, device"):
        make_data(replace(asked, augment="gpu"), IMAGENET, 0)


def test_size_and_crop_of_the_input() -> None:
    source = load_float_network("test_efficientnet", weights="random", num_classes=3)
    changed = for_images(source, config("photos", image_size=96, crop_pct=1.0))
    assert changed.preprocessing.size == (96, 96)
    assert changed.preprocessing.crop_pct == 1.0
    assert for_images(source, config("photos")) == source
    with pytest.raises(FatError, match=r"data.image_size is 0"):
        for_images(source, config("photos", image_size=0))
    with pytest.raises(FatError, match=r"data.crop_pct is 1.5; allowed"):
        for_images(source, config("photos", crop_pct=1.5))


def test_fine_tuning_on_own_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = config("folder", root=str(own_folder(tmp_path / "images")), image_size=32)
    loaded = load_float_network("test_efficientnet", weights="random", num_classes=7)
    source, classes = for_images(loaded, asked), own_classes(asked)
    data = make_data(asked, replace(InputSpec.of(source), num_classes=3, classes=classes), 0)
    spec, device = FinetuneSpec(epochs=2, lr=3e-3, head_lr=3e-2), torch.device("cpu")
    tuned, result = finetuned(source, data, spec, classes, seed=0, device=device, progress=False)
    assert tuned.classes == ("cat", "dog", "fox")
    assert not result.cached
    _, again = finetuned(source, data, spec, classes, seed=0, device=device, progress=False)
    assert again == replace(result, cached=True)


def test_unknown_source() -> None:
    with pytest.raises(FatError, match=r"Unknown data.source 'foldr'. Did you mean 'folder'"):
        make_data(config("foldr"), IMAGENET, 0)


# ------------------------------------------------------------------------------------------ the hub


def test_a_dataset_of_the_hub_is_imagenet_in_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    root = fake(tmp_path, "parquet files", "parquet files")
    asked: list[str] = []

    def download(name: str, *, repo_type: str, **patterns: object) -> str:
        assert repo_type == "dataset"
        asked.append(name)
        return str(root)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    options = config(
        "imagenet",
        root="hub:ILSVRC/imagenet-1k",
        train_images=10,
        calibration_images=5,
        validation_images=5,
    )
    assert sizes(make_data(options, IMAGENET, 0)) == [5, 10, 5, 20]
    assert asked == ["ILSVRC/imagenet-1k"]


def test_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> str:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FatError, match=r"Cannot download .*imagenet-1k .*no route to host\. If it"):
        hub.fetch("hub:ILSVRC/imagenet-1k")
    for name in ("hub:", "hub:imagenet", "hub:a/b/c"):
        with pytest.raises(FatError, match="is written hub:OWNER/NAME"):
            hub.fetch(name)
