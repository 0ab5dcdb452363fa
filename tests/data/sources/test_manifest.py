from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fat.data.dataset import ImageDataset, ImageLoader, collate
from fat.data.imagenet.subset import choose
from fat.data.sources.base import PhotoSource
from fat.data.sources.builtin import ArraySource
from fat.data.sources.decoding import UnreadableImage
from fat.data.sources.folder import FolderSource
from fat.data.sources.manifest import ImageIndex, IndexSource, Record
from fat.data.transforms import EvalTransform
from fat.models.float_model import Preprocessing
from fat.utils.errors import FatError
from tests.data import fake_imagenet as fakes
from tests.data.fake_imagenet import TRAINING, WNIDS, fake, need

PREPROCESSING = Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear", 0.875, "center")


def pick(root: Path) -> ImageIndex:
    return choose(
        root,
        classes=WNIDS,
        num_classes=5,
        calibration_images=5,
        validation_images=5,
        train_images=10,
        progress=False,
    )


@pytest.fixture
def index(tmp_path: Path) -> ImageIndex:
    return pick(fake(tmp_path / "images"))


def record(split: str, content: str, label: int = 0) -> Record:
    return Record(split, f"{split}.jpg", "", -1, -1, -1, f"{split}.jpg", label, content * 64)


# ---------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("form", TRAINING)
def test_what_is_saved_is_loaded(tmp_path: Path, form: str) -> None:
    need(form)
    root = fake(tmp_path / "images", form)
    index = pick(root)
    path = index.save(tmp_path / "run" / "images.csv")
    loaded = ImageIndex.load(path)
    assert loaded == index
    assert loaded.options["fraction"] == 0.1
    assert path.read_text().splitlines()[0].startswith("# ")
    moved = tmp_path / "elsewhere"
    root.rename(moved)
    again = ImageIndex.load(path, root=moved)
    for split in index.counts():
        source = again.source(split)
        assert [source.content(i) for i in range(len(source))]
    with pytest.raises(FatError, match=r"images does not exist.*data.root=DIR"):
        ImageIndex.load(path)


def test_strange_names(tmp_path: Path) -> None:
    names = ['a,"b"\n.jpg', "#c.jpg", "\udcff.jpg", "ü€.jpg", " d .jpg"]
    for number, name in enumerate(names):
        fakes.put(tmp_path / "images" / name, fakes.jpeg(number))
    source = FolderSource(tmp_path / "images")
    index = ImageIndex.of({"train": (source, range(5))}, root=tmp_path / "images")
    assert {r.path for r in index.records} == set(names)
    loaded = ImageIndex.load(index.save(tmp_path / "i.csv"))
    assert loaded == index
    assert [loaded.source("train").content(i) for i in range(5)] == [
        source.content(i) for i in range(5)
    ]


def test_damaged_files(tmp_path: Path, index: ImageIndex) -> None:
    path = index.save(tmp_path / "i.csv")
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    sha = index.records[3].sha256
    for broken, message in (
        ("", "is not an index of images"),
        ("a,b\n1,2\n", r"is not an index of images.*data.index=FILE"),
        (text[:-30], r"damaged after 39 images: .* is not a SHA-256.*data.index"),
        ("".join(lines[:-1]), "damaged after 39 images: its head says that there are 40"),
        ("".join(lines[:3]), "its head has no root"),
        (text.replace("# format: 1", "# format: 2"), "its format is 2; this version of FAT reads"),
        (text.replace("# seed: 0", "# seed: x"), "damaged after 0 images"),
        (text.replace("# seed: 0", '# seed: "0"'), "its seed is '0'"),
        (text.replace("# options: {", '# options: {"photo_tests": "9", '), "photo_tests is '9'"),
        (text.replace("split,path", "path,split"), "its columns are not split,path"),
        (text.replace("calibration,train", "calibrate,train", 1), "unknown split 'calibrate'"),
        (text.replace(sha, sha.upper()), "after 3 images: .* is not a SHA-256"),
        (text.replace(",-1,-1,-1,", ",-1,-1,", 1), "8 columns, expected 9"),
        (text.replace(",-1,-1,-1,", ",-1,x,-1,", 1), "after 0 images: invalid literal"),
        (text.replace(",-1,-1,-1,", f",{9**30},-1,-1,", 1), "are not a valid offset, size"),
        (
            text.replace('[["calibration", "train"]]', "[]").replace(
                "# shared: []", '# shared: [["train"]]'
            ),
            "its shared splits are",
        ),
    ):
        path.write_text(broken)
        with pytest.raises(FatError, match=message):
            ImageIndex.load(path)
    path.unlink()
    with pytest.raises(FatError, match=r"No such file.*data.index=FILE"):
        ImageIndex.load(path)


def test_test_images_elsewhere(tmp_path: Path) -> None:
    fakes.train_folders(tmp_path / "a")
    fakes.val_folders(tmp_path / "b")
    index = choose(
        tmp_path / "a",
        classes=WNIDS,
        num_classes=5,
        calibration_images=5,
        validation_images=5,
        val_root=tmp_path / "b",
        progress=False,
    )
    path = index.save(tmp_path / "i.csv")
    (tmp_path / "b").rename(tmp_path / "c")
    with pytest.raises(FatError, match=r"test images in .*/b, which is not a folder.*test_root="):
        ImageIndex.load(path)
    moved = ImageIndex.load(path, val_root=tmp_path / "c")
    assert moved.source("test").content(0)


# -------------------------------------------------------------------------------------- the checks


def test_splits_in_common(index: ImageIndex) -> None:
    index.check_disjoint()
    same = ImageIndex(Path(), (record("train", "a"), record("test", "a")))
    with pytest.raises(
        FatError, match=r"1 images are in both the train and the test split.*train.jpg = test.jpg"
    ):
        same.check_disjoint()
    for pair in (("train", "test"), ("test", "train")):
        replace(same, shared=frozenset({pair})).check_disjoint()
    three = replace(same, records=(record("calibration", "a"), *same.records))
    pairs = frozenset({("calibration", "train"), ("calibration", "test")})
    with pytest.raises(FatError, match="both the train and the test"):
        replace(three, shared=pairs).check_disjoint()
    with pytest.raises(FatError, match="both the train"):
        replace(same, shared=frozenset({("calibration", "train")})).check_disjoint()


def test_labels_out_of_range(index: ImageIndex) -> None:
    index.check_labels(5)
    with pytest.raises(FatError, match=r"have labels .* 0 to 3: train/n07747607/.* \(4\)"):
        index.check_labels(4)
    ImageIndex(Path(), (record("train", "a", -1),)).check_labels(2)  # unknown is allowed
    with pytest.raises(FatError, match=r"train.jpg \(-2\)"):
        ImageIndex(Path(), (record("train", "a", -2),)).check_labels(2)


def test_an_empty_split(index: ImageIndex) -> None:
    some = replace(index, records=index.of_split("train"))
    with pytest.raises(FatError, match=r"no test images; it has: 0 calibration, 10 train.*again"):
        some.source("test")


# ---------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("form", TRAINING)
def test_a_changed_image_is_noticed(tmp_path: Path, form: str) -> None:
    need(form)
    root = fake(tmp_path / "images", form)
    index = pick(root)
    place = index.of_split("train")[0].place
    path = root / place.path
    if form == "parquet files":
        fakes.change_row(path, place.row)
    else:
        content = bytearray(path.read_bytes())
        content[max(place.offset, 0) + 200] ^= 1
        path.write_bytes(content)
    with pytest.raises(FatError, match=r"_\d+.* has changed since the index was w.*data.index"):
        index.source("train").load(0)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises((FatError, UnreadableImage), match=r"has changed|cannot be read"):
        index.source("train").load(0)
    path.unlink()
    with pytest.raises(FatError, match=r"is not in .*Type data.root=DIR if the images have moved"):
        index.source("train").load(0)


def test_an_image_that_never_could_be_decoded_is_only_unreadable(tmp_path: Path) -> None:
    fake(tmp_path)
    for path in (tmp_path / "train" / WNIDS[0]).iterdir():
        path.write_bytes(b"no image " + path.name.encode())
    index = pick(tmp_path)
    source = index.source("train")
    wrong = next(i for i in range(len(source)) if source.label(i) == 0)
    with pytest.raises(UnreadableImage, match=WNIDS[0]):
        source.load(wrong)


def test_sources_survive_pickling_and_workers(tmp_path: Path) -> None:
    index = pick(fake(tmp_path, "archive of class archives"))
    source = index.source("train")
    expected = source.content(3)
    assert pickle.loads(pickle.dumps(source)).content(3) == expected

    def batches(workers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        data = ImageDataset(source, EvalTransform(PREPROCESSING), split="train")
        loader = ImageLoader(data, batch_size=4, collate_fn=collate, num_workers=workers)
        return list(loader)

    for (a, x), (b, y) in zip(batches(0), batches(2), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)


def test_reduced_decoding(tmp_path: Path) -> None:
    source = pick(fake(tmp_path)).source("train")
    assert source.load(0, short_side=15).size == (20, 15)


# ------------------------------------------------------------------------------------- other runs


def test_an_index_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = fake(tmp_path)
    pool, test = (FolderSource(root / part, WNIDS) for part in ("train", "val"))
    (root / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").unlink()
    index = ImageIndex.of(
        {
            "calibration": (pool, [3, 1]),
            "train": (pool, [0, 1, 3, 4]),
            "validation": (pool, [5]),
            "test": (test, [2]),
        },
        root=root,
        seed=7,
        options={"train_images": 4},
        shared=frozenset({("calibration", "train")}),
        progress=False,
    )
    assert index.counts() == {"calibration": 2, "train": 3, "validation": 1, "test": 1}
    assert "cannot be read: n01440764/n01440764_0.JPEG" in caplog.text
    index.check_disjoint()
    again = ImageIndex.load(index.save(tmp_path / "i.csv"))
    assert again == index
    source = again.source("calibration")
    assert [source.content(i) for i in range(2)] == [pool.content(3), pool.content(1)]
    assert [source.label(i) for i in range(2)] == [pool.label(3), pool.label(1)]
    assert again.source("test").content(0) == test.content(2)
    assert index.records[-1].path.startswith("val/")


def test_an_index_of_folders_apart(tmp_path: Path) -> None:
    fakes.train_folders(tmp_path / "a")
    fakes.val_folders(tmp_path / "b")
    pool, test = FolderSource(tmp_path / "a"), FolderSource(tmp_path / "b")
    splits = {"train": (pool, [0]), "test": (test, [0])}
    for val_root in (tmp_path / "b", None):
        index = ImageIndex.of(splits, root=tmp_path / "a", val_root=val_root)
        assert index.source("test").content(0) == test.content(0)
        assert Path(index.records[1].path).is_absolute() == (val_root is None)
    with pytest.raises(FatError, match=r"Unknown split 'tset'. Did you mean 'test'"):
        ImageIndex.of({"tset": (pool, [0])}, root=tmp_path)


def test_an_index_of_what_is_no_file(tmp_path: Path) -> None:
    import numpy as np

    pixels = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    arrays = ArraySource(pixels, np.array([2, 0, 1]), "grey")
    index = ImageIndex.of({"train": (arrays, [0, 2]), "test": (arrays, [1])}, root=tmp_path)
    index.check_disjoint()
    assert [(r.name, r.label) for r in index.records] == [
        ("grey#0", 2),
        ("grey#2", 1),
        ("grey#1", 0),
    ]
    with pytest.raises(FatError, match=r"image grey#0, which is not a file.*Omit data.index"):
        ImageIndex.load(index.save(tmp_path / "i.csv")).source("train")


def test_an_index_of_photographs(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    photos = PhotoSource(["chelsea.png", "coffee.png"], 3)
    index = ImageIndex.of({"train": (photos, range(3))}, root=tmp_path)
    first, second, third = (r.sha256 for r in index.records)
    assert first == third != second


def test_unlabelled(tmp_path: Path) -> None:
    shutil.copytree(fake(tmp_path / "a") / "val" / WNIDS[0], tmp_path / "b")
    index = ImageIndex.of({"test": (FolderSource(tmp_path / "b"), range(4))}, root=tmp_path / "b")
    source = index.source("test")
    assert isinstance(source, IndexSource)
    assert not source.labelled
    assert source.label(0) == -1


def test_copies_are_left_out_in_order_of_precedence() -> None:
    records = (
        record("calibration", "a"),
        record("train", "a"),
        record("train", "b"),
        record("validation", "b"),
        record("validation", "c"),
        record("test", "c"),
        record("calibration", "d"),
    )
    shared = frozenset({("calibration", "train")})
    named = tuple(replace(r, name=f"{i}") for i, r in enumerate(records))
    kept, gone = ImageIndex(Path(), named, shared=shared).without_copies(("test", "validation"))
    # Training loses b to validation and validation loses c to test; calibration may share a.
    assert [r.name for r in gone] == ["2", "4"]
    assert [r.name for r in kept.records] == ["0", "1", "3", "5", "6"]
    kept.check_disjoint()


@pytest.mark.parametrize("place", ["/dev/zero", "fifo"])
def test_what_has_no_end_is_not_read(tmp_path: Path, place: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    endless = replace(record("train", "a"), path=place)
    with pytest.raises(UnreadableImage, match="is not a regular file"):
        IndexSource([endless], tmp_path).load(0)
