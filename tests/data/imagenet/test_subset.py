from __future__ import annotations

import gzip
import hashlib
import logging
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fat.data.imagenet import subset
from fat.data.imagenet.labels import stem
from fat.data.imagenet.sampling import balanced_order, digest
from fat.data.imagenet.subset import choose
from fat.data.sources.archives import Reader
from fat.data.sources.manifest import SPLITS, ImageIndex
from fat.utils.errors import FatError
from tests.data import fake_imagenet as fakes
from tests.data.fake_imagenet import LABELS, TRAIN, TRAINING, VAL, VALIDATION, WNIDS, fake, need

Summary = list[tuple[str, str, int, str]]


def pick(root: Path, **options: Any) -> ImageIndex:
    given = {"calibration_images": 5, "validation_images": 10, "train_images": 15, **options}
    return choose(root, classes=WNIDS, num_classes=len(WNIDS), progress=False, **given)


def summary(index: ImageIndex) -> Summary:
    return [(r.split, stem(r.name), r.label, r.sha256) for r in index.records]


def per_class(index: ImageIndex, split: str) -> list[int]:
    counts = Counter(record.label for record in index.of_split(split))
    return [counts[k] for k in range(len(WNIDS))]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return summary(pick(fake(tmp_path_factory.mktemp("folders"))))


# ------------------------------------------------------------------------------------- the forms


@pytest.mark.parametrize("form", TRAINING)
def test_every_form_gives_the_same_subset(tmp_path: Path, form: str, expected: Summary) -> None:
    need(form)
    index = pick(fake(tmp_path, form))
    assert summary(index) == expected
    assert index.options["training_form"] == form
    truth = {
        s: (WNIDS.index(w), hashlib.sha256(c).hexdigest(), c) for w, s, c in fakes.train_images()
    }
    source = index.source("train")
    assert source.labelled
    for i, record in enumerate(index.of_split("train")):
        assert (record.label, record.sha256, source.content(i)) == truth[stem(record.name)]
        assert source.load(i).size == (40, 30)
        assert source.label(i) == record.label
    assert summary(pick(tmp_path, seed=1))[:30] != expected[:30]


@pytest.mark.parametrize("form", VALIDATION)
def test_every_form_of_validation_images(tmp_path: Path, form: str, expected: Summary) -> None:
    need(form)
    index = pick(fake(tmp_path, validation=form))
    assert sorted(summary(index)) == sorted(expected)
    assert index.options["validation_form"] == form
    truth = {s: (WNIDS.index(w), c) for w, s, c in fakes.val_images()}
    source = index.source("test")
    assert len(source) == VAL * len(WNIDS)
    for i in range(len(source)):
        assert (source.label(i), source.content(i)) == truth[stem(source.name(i))]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
def test_every_label_file(tmp_path: Path, labels: str, inside: bool, expected: Summary) -> None:
    fakes.train_folders(tmp_path)
    fakes.val_flat(tmp_path)
    LABELS[labels](tmp_path / "val" if inside else tmp_path)
    assert sorted(summary(pick(tmp_path))) == sorted(expected)


def test_kaggles_folders(tmp_path: Path, expected: Summary) -> None:
    deep = tmp_path / "ILSVRC/Data/CLS-LOC"
    fakes.train_folders(deep)
    fakes.val_flat(deep)
    fakes.put(deep / "test/ILSVRC2012_test_00000001.JPEG", fakes.jpeg(9))
    fakes.kaggle(tmp_path)
    index = pick(tmp_path)
    assert sorted(summary(index)) == sorted(expected)
    assert index.records[0].path.startswith("ILSVRC/Data/CLS-LOC/train/")


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_validation_images_elsewhere(tmp_path: Path, name: str, expected: Summary) -> None:
    fakes.train_folders(tmp_path / "a")
    fakes.val_folders(tmp_path / "b", name)
    for place in (tmp_path / "b", tmp_path / "b" / name):
        index = pick(tmp_path / "a", val_root=place)
        assert sorted(summary(index)) == sorted(expected)
        assert index.source("test").load(0).size == (40, 30)
        assert ImageIndex.load(index.save(tmp_path / "i.csv")) == index


def test_class_tars_and_folders_at_the_top(tmp_path: Path, expected: Summary) -> None:
    for make in (fakes.class_tars, fakes.train_folders):
        root = tmp_path / make.__name__
        make(root)
        for entry in (root / "train").iterdir():
            entry.rename(root / entry.name)
        (root / "train").rmdir()
        fakes.val_folders(root)
        assert summary(pick(root)) == expected


def test_the_first_form_is_taken_and_the_others_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fakes.train_tar(fake(tmp_path))
    assert pick(tmp_path).options["training_form"] == "class folders"
    assert "Ignoring a second copy: archive of class archives" in caplog.text


def test_unknown_forms_name_the_known_ones(tmp_path: Path) -> None:
    fakes.put(tmp_path / "cats/a.jpg", fakes.jpeg(0))
    fakes.put(tmp_path / "train.tar.gz", b"x")
    with pytest.raises(
        FatError,
        match=r"it holds: cats/, train.tar.gz \(unpack.*train/<wnid>/.*ILSVRC2012_img_train.tar.*"
        r"<wnid>.tar.*parquet.*WebDataset.*Type data.root=DIR",
    ):
        pick(tmp_path)
    fakes.train_folders(tmp_path)
    with pytest.raises(FatError, match=r"no ImageNet validation .* known layout.*val/.*test_root="):
        pick(tmp_path)
    with pytest.raises(FatError, match=r"does not exist.*data.root=DIR"):
        pick(tmp_path / "nowhere")


def test_flat_images_need_a_label_file(tmp_path: Path) -> None:
    fakes.train_folders(tmp_path)
    fakes.val_flat(tmp_path)
    with pytest.raises(FatError, match=r"no label file.*ground_truth.*val.txt.*LOC_val.*synset_l"):
        pick(tmp_path)
    fakes.put(tmp_path / "ILSVRC2012_validation_ground_truth.txt", fakes.ground_truth())
    with pytest.raises(FatError, match=r"meta.mat.* is not in the same folder"):
        pick(tmp_path)
    fakes.put(tmp_path / "meta.mat", "no matrix")
    with pytest.raises(FatError, match=r"ground_truth.txt cannot be read"):
        pick(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ILSVRC2012_val_00000001.JPEG 2\n", "no label for ILSVRC2012_val_"),
        ("ILSVRC2012_val_00000001.JPEG 5\n", r"class '5'; allowed.* 0 to 4"),
        ("ILSVRC2012_val_00000001.JPEG -1\n", "class '-1'"),
        ("ILSVRC2012_val_00000001.JPEG\n", "val.txt cannot be read"),
        ("", r"no label for .*its 0 labels"),
    ],
)
def test_damaged_label_files(tmp_path: Path, text: str, message: str) -> None:
    fakes.train_folders(tmp_path)
    fakes.val_flat(tmp_path)
    fakes.put(tmp_path / "val.txt", text)
    with pytest.raises(FatError, match=message):
        pick(tmp_path)


@pytest.mark.parametrize("form", [form for form in TRAINING if form != "class folders"])
def test_damaged_archives(tmp_path: Path, form: str, expected: Summary) -> None:
    need(form)
    fake(tmp_path, form)
    archives = [p for p in tmp_path.rglob("*") if p.suffix in (".tar", ".parquet")]
    last = max(archives)
    whole = last.read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>", gzip.compress(whole)):
        last.write_bytes(content)
        with pytest.raises(FatError, match=rf"{last.name}.* (damaged|compressed|cannot)"):
            pick(tmp_path)
    last.write_bytes(whole)
    assert summary(pick(tmp_path)) == expected


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"x"), ("b.cls", b"1")], r"The image a in .* has no class: it has .jpg"),
        ([("d/a.jpg", b"x"), ("d/a.cls", b"cat")], r"d/a.cls in .* holds 'cat', not a class index"),
        ([("a.cls", b"1"), ("a.json", b"{}")], "hold no image with a class"),
    ],
)
def test_other_shards(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    fakes.val_folders(tmp_path)
    fakes.pack(tmp_path / "shards/train-000.tar", members)
    with pytest.raises(FatError, match=message):
        pick(tmp_path)


def test_shards_in_a_folder_of_the_splits_name(tmp_path: Path, expected: Summary) -> None:
    fakes.train_shards(tmp_path / "train")
    for number, path in enumerate(sorted((tmp_path / "train").iterdir())):
        path.rename(path.with_name(f"{number:05d}.tar"))
    fakes.val_folders(tmp_path)
    assert summary(pick(tmp_path)) == expected


def test_missing_parquet_files_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    need("parquet")
    fake(tmp_path, "parquet files")
    (tmp_path / "data/train-00001-of-00002.parquet").unlink()
    pick(tmp_path, train_images=5)
    assert "has only 1 of 2 files" in caplog.text


def test_overlap_of_training_and_validation(tmp_path: Path) -> None:
    fakes.train_folders(tmp_path)
    with pytest.raises(FatError, match=r"overlap. Type data.test_root=DIR"):
        pick(tmp_path, val_root=tmp_path / "train")


# ------------------------------------------------------------------------------------ the sample


def test_balance_and_disjointness(tmp_path: Path) -> None:
    fake(tmp_path)
    for counts in ((5, 10, 15), (3, 4, 17), (1, 1, 1), (7, 8, 45)):
        index = pick(
            tmp_path,
            **dict(
                zip(
                    ("calibration_images", "validation_images", "train_images"), counts, strict=True
                )
            ),
        )
        assert index.counts() == dict(
            zip(SPLITS, (counts[0], counts[2], counts[1], 20), strict=True)
        )
        for split in SPLITS:
            assert max(per_class(index, split)) - min(per_class(index, split)) <= 1
        index.check_disjoint()
        index.check_labels(5)
        contents = [record.sha256 for record in index.records]
        assert len(set(contents)) == len(contents)


def test_fraction_and_smaller_samples_are_parts_of_larger_ones(tmp_path: Path) -> None:
    fake(tmp_path)
    half, tenth = (pick(tmp_path, train_images=None, fraction=f) for f in (0.5, 0.1))
    assert half.counts()["train"] == 30
    assert tenth.counts()["train"] == 6
    assert half.of_split("train")[:6] == tenth.of_split("train")
    for split in ("calibration", "validation", "test"):
        assert half.of_split(split) == tenth.of_split(split)
    few = pick(tmp_path, test_images=10)
    assert per_class(few, "test") == [2] * 5


def test_the_rest_when_more_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake(tmp_path)
    index = pick(tmp_path, train_images=None, fraction=1.0)
    assert index.counts()["train"] == TRAIN * len(WNIDS) - 15
    assert "Training on 45 of 60 requested images" in caplog.text
    with pytest.raises(FatError, match=r"hold 60 different images; .*_images=50 leave none"):
        pick(tmp_path, calibration_images=10, validation_images=50)


def test_classes_of_unequal_size(tmp_path: Path) -> None:
    fake(tmp_path)
    for path in sorted((tmp_path / "train" / WNIDS[2]).iterdir())[2:]:
        path.unlink()
    index = pick(tmp_path, calibration_images=1, validation_images=1, train_images=34)
    counts = [sum(per_class(index, s)[k] for s in SPLITS[:3]) for k in range(5)]
    assert counts[2] == 2
    assert sorted(counts)[1:] == [8, 8, 9, 9]


def test_order_against_a_plain_implementation() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 200)
    digests = rng.integers(0, 2**60, 200).astype(np.uint64)
    queues = {k: sorted(np.flatnonzero(labels == k), key=lambda i: digests[i]) for k in range(7)}
    turns = sorted(queues, key=lambda k: digest(3, f"class {k}"))
    plain = []
    while any(queues.values()):
        plain += [queues[k].pop(0) for k in turns if queues[k]]
    assert balanced_order(labels, digests, 3).tolist() == plain
    assert balanced_order(labels, digests, 4).tolist() != plain


def test_classes_take_turns_in_another_order_for_another_seed(tmp_path: Path) -> None:
    fake(tmp_path)
    first = {pick(tmp_path, seed=seed).records[0].label for seed in range(12)}
    assert len(first) > 2


def test_repeated_contents_are_taken_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fake(tmp_path)
    before = pick(tmp_path)
    # The first of class 0 is a copy of a test image, and the second copies the third.
    mine = [record for record in before.records[:-20] if record.label == 0]
    shutil.copy(tmp_path / before.of_split("test")[0].path, tmp_path / mine[0].path)
    shutil.copy(tmp_path / mine[1].path, tmp_path / mine[2].path)
    after = pick(tmp_path)
    assert "1 training images repeat others, byte for byte" not in caplog.text
    assert "Leaving out 2 training images, which are duplicates" in caplog.text
    assert after.counts() == before.counts()
    assert per_class(after, "train") == [3] * 5
    after.check_disjoint()
    names = {record.name for record in after.records}
    assert mine[1].name in names
    assert not {mine[0].name, mine[2].name} & names


def test_empty_and_unreadable_images_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake(tmp_path)
    before = pick(tmp_path)
    empty, locked = before.records[0], before.records[1]
    (tmp_path / empty.path).write_bytes(b"")
    os.utime(tmp_path / locked.path)  # otherwise its hash is still cached
    read = Reader.read

    def refuse(reader: Reader, place: Any) -> bytes:
        if locked.path.endswith(place.path):
            raise PermissionError(13, "Permission denied")
        return read(reader, place)

    monkeypatch.setattr(Reader, "read", refuse)
    after = pick(tmp_path)
    assert not {empty.name, locked.name} & {record.name for record in after.records}
    assert after.counts() == before.counts()
    assert "Leaving out 2 training images, which are empty or cannot be read" in caplog.text


def test_hashes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path)
    old = 1_600_000_000
    for path in tmp_path.rglob("*"):
        os.utime(path, (old, old))
    index = pick(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", lambda reader, place: pytest.fail("read again"))
        assert pick(tmp_path) == index
    changed = tmp_path / index.records[0].path
    changed.write_bytes(fakes.jpeg(5))
    assert pick(tmp_path).records[0].sha256 == hashlib.sha256(fakes.jpeg(5)).hexdigest()


def test_missing_classes_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake(tmp_path)
    shutil.rmtree(tmp_path / "val" / WNIDS[1])
    index = pick(tmp_path)
    assert "no images of 1 of the 5 classes, so that accuracies exclude these" in caplog.text
    assert f"exclude these: {WNIDS[1]}." in caplog.text
    assert per_class(index, "test") == [4, 0, 4, 4, 4]


def test_images_without_a_class_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, expected: Summary
) -> None:
    fake(tmp_path)
    fakes.put(tmp_path / "train/n99999999/a.JPEG", fakes.jpeg(1))
    assert summary(pick(tmp_path)) == expected
    assert "1 images of the class folders" in caplog.text
    assert "n99999999/a.JPEG" in caplog.text


@pytest.mark.parametrize("form", ["parquet files", "WebDataset shards"])
def test_labels_outside_the_network(tmp_path: Path, form: str) -> None:
    need(form)
    fake(tmp_path, form)
    fakes.val_folders(tmp_path)
    with pytest.raises(
        FatError, match=r"not classes of the network, which are 0 to 3: .*_\d.* \(4\)"
    ):
        choose(
            tmp_path,
            classes=WNIDS[:4],
            num_classes=4,
            calibration_images=1,
            validation_images=1,
            progress=False,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "data.fraction is 0.0; allowed"),
        ({"fraction": 1.5}, "data.fraction is 1.5"),
        ({"train_images": 0}, "data.train_images is 0"),
        ({"calibration_images": 0}, "data.calibration_images is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FatError, match=message):
        pick(tmp_path, **options)


def test_networks_of_other_classes(tmp_path: Path) -> None:
    for classes, count in ((None, 10), (WNIDS, 10)):
        with pytest.raises(FatError, match=r"10 classes that are not ImageNet's.*data=folder"):
            choose(tmp_path, classes=classes, num_classes=count)


def test_a_real_sample(imagenet_sample: Path) -> None:
    from fat.models.labels import class_names

    index = subset.choose(
        imagenet_sample,
        classes=class_names(1000),
        num_classes=1000,
        calibration_images=20,
        validation_images=30,
        train_images=40,
        test_images=10,
        progress=False,
    )
    index.check_disjoint()
    source = index.source("calibration")
    names = class_names(1000) or []
    assert all(names[source.label(i)] in source.name(i) for i in range(20))
