"""Tests of the image cache: content, interruptions, damage and errors."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event as EventType
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from fat.data import cache
from fat.data.cache import MODES, CachedSource, build_cache
from fat.data.dataset import ImageDataset, ImageLoader, collate
from fat.data.sources.decoding import UnreadableImage
from fat.data.sources.folder import FolderSource
from fat.data.transforms import SHAPE, DeviceCropTransform, RandomCropTransform, apply
from fat.models.float_model import Preprocessing
from fat.utils.errors import FatError
from fat.utils.random import generator

SIDE = 32
CROP = RandomCropTransform(
    Preprocessing(
        size=(24, 24),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_mode="center",
    )
)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Return smooth colors, as in photographs."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Forty images of several formats and sizes; number 7 is damaged."""
    folder = tmp_path / "images"
    for number in range(40):
        width, height = (60 + number, 50) if number % 2 else (40, 41 + number)
        name = f"{number % 4}/{number:02d}.{'png' if number % 3 else 'jpg'}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number, width, height).save(folder / name)
    damaged = folder / "3" / "07.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    picture(99, 20, 30).save(folder / "0" / "small.png")
    return folder


@pytest.fixture
def source(root: Path) -> Counting:
    return Counting(root)


class Counting(FolderSource):
    """Counts decoded images, and can fail or exit after a number of them."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.loaded: list[int] = []
        self.after = -1
        self.then: Callable[[], None] = lambda: None

    def load(self, index: int, short_side: int | None = None) -> Image.Image:
        if len(self.loaded) == self.after:
            self.then()
        self.loaded.append(index)
        return super().load(index, short_side)


def build(
    source: FolderSource,
    folder: Path,
    mode: str = "pixels",
    indices: object = None,
    **options: object,
) -> CachedSource:
    chosen = range(len(source)) if indices is None else indices
    return build_cache(
        source, chosen, mode=mode, folder=folder, progress=False, **{"short_side": SIDE, **options}
    )


def readable(source: FolderSource) -> list[int]:
    return [index for index in range(len(source)) if not source.name(index).endswith("07.png")]


def expected(source: FolderSource, index: int) -> Image.Image:
    """Resize with Pillow's function that fits an image into a box."""
    image = Image.open(source.root / source.name(index)).convert("RGB")
    if min(image.size) <= SIDE:
        return image
    ratio = SIDE / min(image.size)
    return image.resize([round(side * ratio) for side in image.size], Image.Resampling.BICUBIC)


def psnr(one: Image.Image, other: Image.Image) -> float:
    error = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    return float(10 * np.log10(255**2 / np.mean(error**2)))


# What it holds


def test_pixels_are_those_of_decoding_and_resizing(source: Counting, tmp_path: Path) -> None:
    cached = build(source, tmp_path / "cache")
    for index in readable(source):
        loaded = cached.load(index)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(expected(source, index)))


def test_jpegs_are_close_to_that_and_smaller(source: Counting, tmp_path: Path) -> None:
    pixels = build(source, tmp_path / "cache")
    jpegs = build(source, tmp_path / "cache", "jpeg")
    ratios = [psnr(jpegs.load(index), pixels.load(index)) for index in readable(source)]
    assert min(ratios) > 38
    assert jpegs.file != pixels.file
    assert jpegs.file.stat().st_size < pixels.file.stat().st_size / 2


@pytest.mark.parametrize("mode", MODES)
def test_an_image_is_turned_once_and_sheds_its_comment(tmp_path: Path, mode: str) -> None:
    image = picture(0, 80, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in/turned.jpg", exif=exif, quality=95, comment=b"long" * 1000)
    cached = build(FolderSource(tmp_path / "in"), tmp_path / "cache", mode)
    size = (SIDE, SIDE if mode == "squares" else round(80 * SIDE / 60))
    right = image.rotate(-90, expand=True).resize(size)
    loaded = cached.load(0)
    assert loaded.size == right.size
    assert psnr(loaded, right) > 30
    assert b"longlong" not in cached.file.read_bytes()


def test_squares_give_the_crops_of_whole_images(tmp_path: Path) -> None:
    """The crop depends on the original shape of an image, not on that of the square."""
    (tmp_path / "in").mkdir()
    for number, size in enumerate([(90, 60), (50, 80), (20, 24)]):
        picture(number, *size).save(tmp_path / f"in/{number}.png")
    source = FolderSource(tmp_path / "in")
    squares = build(source, tmp_path / "cache", "squares")
    assert {squares.load(i).size for i in range(3)} == {(SIDE, SIDE)}
    assert squares.load(1).info[SHAPE] == (50, 80)
    transform = DeviceCropTransform(CROP.preprocessing, side=SIDE)
    for index in range(3):
        for seed in range(4):
            whole = apply(transform, source.load(index), generator(seed))
            cached = apply(transform, squares.load(index), generator(seed))
            assert float((whole - cached).abs().max()) < 0.06  # about 4.5 of 255 levels


def test_large_jpegs_are_decoded_at_a_fraction(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    picture(0, 800, 600).save(tmp_path / "in/large.jpg", quality=95)
    source = Counting(tmp_path / "in")
    sizes = []

    class Watching(FolderSource):
        def load(self, index: int, short_side: int | None = None) -> Image.Image:
            image = super().load(index, short_side)
            sizes.append(image.size)
            return image

    cached = build(Watching(tmp_path / "in"), tmp_path / "cache")
    assert set(sizes) == {(100, 75)}
    assert psnr(cached.load(0), expected(source, 0)) > 35


def test_names_labels_and_numbers_are_the_sources(root: Path, tmp_path: Path) -> None:
    source = FolderSource(root, num_classes=10)
    cached = build(source, tmp_path / "cache", indices=[30, 2, 11, 2])
    assert cached.labelled
    assert len(cached) == len(source)
    assert list(cached.indices) == [2, 11, 30]
    for index in (2, 11, 30):
        assert (cached.name(index), cached.label(index)) == (
            source.name(index),
            source.label(index),
        )
        np.testing.assert_array_equal(
            np.asarray(cached.load(index)), np.asarray(expected(source, index))
        )
    for other in (0, 3, 31, 1000, -1):
        with pytest.raises(IndexError, match=f"image {other} is not among the 3"):
            cached.load(other)


@pytest.mark.parametrize("mode", MODES)
def test_unreadable_images_are_the_same_ones(source: Counting, tmp_path: Path, mode: str) -> None:
    cached = build(source, tmp_path / "cache", mode)
    (bad,) = set(range(len(source))) - set(readable(source))
    with pytest.raises(UnreadableImage) as plain:
        source.load(bad)
    for copy in (cached, build(source, tmp_path / "cache", mode)):
        with pytest.raises(UnreadableImage) as small:
            copy.load(bad)
        assert (small.value.name, small.value.reason) == (plain.value.name, plain.value.reason)


def test_training_batches_do_not_depend_on_workers(source: Counting, tmp_path: Path) -> None:
    cached = build(source, tmp_path / "cache")

    def batches(images: FolderSource | CachedSource, workers: int) -> tuple[torch.Tensor, int]:
        data = ImageDataset(images, CROP, split="training")
        loader = ImageLoader(data, batch_size=8, collate_fn=collate, num_workers=workers)
        return torch.cat([images for images, _ in loader]), len(data.skipped)

    alone, skipped = batches(cached, 0)
    shared, skipped_too = batches(cached, 2)
    assert torch.equal(alone, shared)
    assert skipped == skipped_too == 1 == batches(source, 0)[1]


# Interruptions


def test_a_second_build_only_opens(
    source: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = torch.random.get_rng_state()
    with caplog.at_level(logging.INFO):
        first = build(source, tmp_path / "cache")
    assert torch.equal(state, torch.random.get_rng_state())
    size = first.file.stat().st_size
    (told,) = re.findall(r"41 images at 32 pixels as pixels: about (\S+) GB", caplog.text)
    assert float(told) * 1e9 == pytest.approx(size, rel=0.1)
    source.loaded.clear()
    again = build(source, tmp_path / "cache", indices=[*range(len(source))][::-1])
    assert again.file == first.file
    assert not source.loaded
    assert [file.suffix for file in sorted(first.file.parent.iterdir())] == [".cache", ".lock"]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("mode", MODES)
def test_the_file_does_not_depend_on_workers(source: Counting, tmp_path: Path, mode: str) -> None:
    files = [build(source, tmp_path / str(n), mode, workers=n).file for n in (0, 1, 3)]
    assert len({file.name for file in files}) == 1
    assert len({hashlib.sha256(file.read_bytes()).digest() for file in files}) == 1


def stop_after(source: Counting, count: int, then: Callable[[], None]) -> None:
    """Make a build stop after decoding the sample and ``count`` images."""
    source.loaded.clear()
    source.after, source.then = 32 + count, then


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupted_build_goes_on_where_it_stopped(source: Counting, tmp_path: Path) -> None:
    whole = build(source, tmp_path / "whole").file
    for count in (19, 10):  # two chunks of eight, then one; the next is incomplete
        stop_after(source, count, interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(source, tmp_path / "cache")
        assert [file.suffix for file in sorted((tmp_path / "cache").iterdir())] == [
            ".lock",
            ".part",
        ]
    source.loaded.clear()
    source.after = -1
    resumed = build(source, tmp_path / "cache").file
    assert source.loaded[32:] == list(range(24, 41))
    assert resumed.read_bytes() == whole.read_bytes()


def _die(root: Path, folder: Path) -> None:
    source = Counting(root)
    stop_after(source, 19, lambda: os.kill(os.getpid(), signal.SIGKILL))
    build(source, folder)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_build_goes_on_too(source: Counting, root: Path, tmp_path: Path) -> None:
    whole = build(source, tmp_path / "whole").file
    process = multiprocessing.get_context("fork").Process(
        target=_die, args=(root, tmp_path / "cache")
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (part,) = (tmp_path / "cache").glob("*.part")
    assert part.stat().st_size > 1000
    source.loaded.clear()
    assert build(source, tmp_path / "cache").file.read_bytes() == whole.read_bytes()
    assert len(source.loaded) == 32 + 41 - 16


def cut_short(content: bytearray) -> bytes:
    return bytes(content[:-100])


def zero_the_end(content: bytearray) -> bytes:
    return bytes(content[:-100]) + bytes(100)  # as after a power failure


def flip_in_the_middle(content: bytearray) -> bytes:
    content[len(content) // 2] ^= 1
    return bytes(content)


def spoil_the_head(content: bytearray) -> bytes:
    content[3] ^= 1
    return bytes(content)


def keep_few(content: bytearray) -> bytes:
    return bytes(content[:5])


@pytest.mark.parametrize(
    "damage", [cut_short, zero_the_end, flip_in_the_middle, spoil_the_head, keep_few]
)
def test_only_whole_records_are_taken_over(
    source: Counting, tmp_path: Path, damage: Callable[[bytearray], bytes]
) -> None:
    whole = build(source, tmp_path / "cache").file
    content = whole.read_bytes()
    whole.unlink()
    # As if killed before the final rename: offsets and foot are written.
    whole.with_suffix(".part").write_bytes(damage(bytearray(content)))
    again = build(source, tmp_path / "cache").file
    assert again.read_bytes() == content


def _hold(lock: Path, file: Path, content: bytes, held: EventType) -> None:
    """Build a cache slowly, in another process."""
    with FileLock(lock):
        held.set()
        time.sleep(0.5)
        file.write_bytes(content)


def test_a_second_process_waits_and_finds_it_done(
    source: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = build(source, tmp_path / "cache").file
    content = file.read_bytes()
    file.unlink()
    source.loaded.clear()
    fork = multiprocessing.get_context("fork")
    held = fork.Event()
    other = fork.Process(target=_hold, args=(file.with_suffix(".lock"), file, content, held))
    other.start()
    assert held.wait(30)
    with caplog.at_level(logging.INFO):
        cached = build(source, tmp_path / "cache")
    other.join()
    assert "Another process is building" in caplog.text
    assert len(source.loaded) == 32  # only the sample from which the size is estimated
    assert cached.load(0).size


# Keys


def test_a_changed_data_set_has_another_cache(root: Path, tmp_path: Path) -> None:
    def file(**options: object) -> Path:
        return build(FolderSource(root), tmp_path / "cache", **options).file

    first = file()
    assert file() == first
    changed = root / "0" / "04.png"
    stamp = changed.stat()
    picture(1234, 40, 45).save(changed)
    os.utime(changed, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    second = file()
    assert second != first
    index = next(i for i in range(41) if FolderSource(root).name(i).endswith("04.png"))
    np.testing.assert_array_equal(
        np.asarray(build(FolderSource(root), tmp_path / "cache").load(index)),
        np.asarray(expected(FolderSource(root), index)),
    )
    changed.rename(changed.with_name("05.png"))
    third = file()
    others = [
        file(mode="jpeg"),
        file(short_side=SIDE + 1),
        file(indices=range(5)),
        file(key="a digest"),
        file(key="another digest"),
    ]
    assert len({first, second, third, *others}) == 8


def test_a_folder_that_moved_has_the_same_cache(root: Path, tmp_path: Path) -> None:
    first = build(FolderSource(root), tmp_path / "cache").file
    moved = root.rename(tmp_path / "moved")
    assert build(FolderSource(moved), tmp_path / "cache").file == first


# Damage


@pytest.mark.parametrize("mode", MODES)
def test_a_changed_byte_is_found_where_it_is_read(
    source: Counting, tmp_path: Path, mode: str
) -> None:
    cached = build(source, tmp_path / "cache", mode, indices=range(3))
    content = bytearray(cached.file.read_bytes())
    content[len(content) // 2] ^= 16  # in the second of three records
    cached.file.write_bytes(content)
    opened = build(source, tmp_path / "cache", mode, indices=range(3))
    opened.load(0)
    opened.load(2)
    for _ in range(2):
        with pytest.raises(FatError, match=r"(?s)damaged: .*checksum.*0/04.*Delete it") as error:
            opened.load(1)
        assert str(cached.file) in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content + b"x",
        lambda content: content[:20] + b"x" + content[21:],  # the key
        lambda content: content[:-60] + b"x" + content[-59:],  # the index
        lambda content: content[:-12] + b"x" + content[-11:],  # its digest
    ],
)
def test_a_file_that_is_not_whole_is_refused(
    source: Counting, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    file = build(source, tmp_path / "cache").file
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(FatError, match=f"{re.escape(str(file))} is damaged: .*Delete it to have"):
        build(source, tmp_path / "cache")


def test_it_survives_pickling(source: Counting, tmp_path: Path) -> None:
    cached = build(FolderSource(source.root), tmp_path / "cache")
    cached.load(0)
    content = pickle.dumps(cached)
    assert len(content) < 10_000  # neither the memory map nor pixels
    copy = pickle.loads(content)
    np.testing.assert_array_equal(np.asarray(copy.load(5)), np.asarray(cached.load(5)))
    cached.file.unlink()
    with pytest.raises(FatError, match=r"is damaged: .*No such file"):
        pickle.loads(content).load(5)


# Errors before anything is written


def test_a_disk_without_room_is_refused_first(
    source: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "not" / "there"
    asked = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=30_000)

    monkeypatch.setattr(cache.shutil, "disk_usage", usage)
    with pytest.raises(FatError, match=r"about 0\.000\d+ GB, but .* has 3e-05 GB free") as error:
        build(source, folder)
    for way_out in ("data.cache=none", "data.cache=jpeg", "data.cache_dir=DIR", "data.cache_side"):
        assert way_out in str(error.value)
    assert asked == [tmp_path]
    assert not folder.parent.exists()
    build(source, folder, "jpeg", indices=range(3))


def test_what_is_there_already_counts_as_room(
    source: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = build(source, tmp_path / "whole").file.stat().st_size
    stop_after(source, 36, interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "cache")
    source.after = -1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size // 2))
    with pytest.raises(FatError, match="too little disk space"):
        build(source, tmp_path / "another")
    build(source, tmp_path / "cache")


def test_a_disk_that_fills_up_keeps_what_was_written(
    source: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    stop_after(source, 20, full)
    with pytest.raises(FatError, match=r"Cannot write .*: No space left.*data\.cache_dir=DIR"):
        build(source, tmp_path / "cache")
    source.after = -1
    source.loaded.clear()
    build(source, tmp_path / "cache")
    assert len(source.loaded) == 32 + 41 - 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "pixel"}, "Unknown data.cache 'pixel'. Did you mean 'pixels'?"),
        ({"mode": "off"}, "Allowed: none, jpeg, pixels, squares."),
        ({"short_side": 0}, "data.cache_side is 0; it must be at least 1 pixel."),
        ({"indices": []}, "There are no images to cache. Type data.cache=none."),
    ],
)
def test_wrong_options_are_answered(
    source: Counting, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(FatError, match=re.escape(message)):
        build(source, tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_made_is_said(source: Counting, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FatError, match=r"Cannot write the image cache .*data\.cache_dir=DIR"):
        build(source, tmp_path / "file" / "cache")
