"""Bad images, archives, label files and caches are refused with a sentence, or work.

See test_robustness.py. Nothing that lies in an archive is written anywhere.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from fat.data.cache import build_cache
from fat.data.imagenet.subset import choose
from fat.data.sources.decoding import UnreadableImage, open_image
from fat.data.sources.folder import FolderSource
from fat.data.sources.listing import list_folder
from fat.data.sources.manifest import ImageIndex
from fat.utils.io import cache_folder
from tests.data import fake_imagenet
from tests.data.fake_imagenet import LABELS, TRAIN, TRAINING, VALIDATION, WNIDS, fake, pack
from tests.integration.damage import attempt, attempt_all, damaged
from tests.integration.running import command
from tests.integration.test_robustness import TINY, answer, here, photographs  # noqa: F401

FORMATS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp"}
SPLITS = ("train", "calibration", "validation", "test")


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def opened(content: bytes, name: str = "x.png", size: tuple[int, int] | None = None) -> None:
    Path(name).write_bytes(content)
    image = open_image(Path(name))
    assert image.mode == "RGB"
    assert size in (None, image.size)


# ------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(("kind", "suffix"), FORMATS.items())
def test_damaged_images(kind: str, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(pixels).resize((64, 48)), kind)
    attempt(lambda: opened(whole, f"x.{suffix}", (64, 48)), "worked")

    attempt_all(damaged(whole), lambda content: opened(content, f"x.{suffix}"), 200)


def unusual() -> Iterator[tuple[str, bytes, tuple[int, int]]]:
    """Valid images that few programs write, with their sizes."""
    grey = Image.fromarray(np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4))
    frames = [Image.new("RGB", (9, 7), color) for color in ("red", "blue", "green")]
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "one pixel", encoded(Image.new("RGB", (1, 1))), (1, 1)
    yield "one row", encoded(Image.new("RGB", (5000, 1))), (5000, 1)
    yield "16-bit gray", encoded(grey), (4, 3)
    yield "16-bit gray TIFF", encoded(grey, "TIFF"), (4, 3)
    for mode in ("1", "P", "RGBA", "LA"):
        yield mode, encoded(Image.new(mode, (9, 7))), (9, 7)
    yield "transparent palette", encoded(Image.new("P", (9, 7)), transparency=0), (9, 7)
    yield "CMYK", encoded(Image.new("CMYK", (9, 7)), "JPEG"), (9, 7)
    yield "LAB", encoded(Image.new("LAB", (9, 7)), "TIFF"), (9, 7)
    for kind in ("GIF", "WEBP", "PNG"):
        moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        yield f"animated {kind}", moving, (9, 7)
    yield "rotated by EXIF", encoded(frames[0], "JPEG", exif=exif.tobytes()), (7, 9)
    noise = b"Exif\0\0" + bytes(range(256))
    yield "EXIF of random bytes", encoded(frames[0], "JPEG", exif=noise), (9, 7)
    yield "JPEG named .png", encoded(frames[0], "JPEG"), (9, 7)


def test_unusual_images_work() -> None:
    for what, content, size in unusual():
        outcome = attempt(lambda c=content, s=size: opened(c, size=s))
        assert outcome == "worked", what


def png(width: int, height: int, data: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), *extra, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../x.jpg", bytes(10_000_000))
    return stream.getvalue()


def hostile() -> dict[str, bytes]:
    bomb = zlib.compress(bytes(50_000_000), 9)
    one = zlib.compress(b"\0")
    return {
        "60,000 x 60,000 pixels claimed in 100 bytes": png(60_000, 60_000, one),
        "60,000 x 60,000 pixels, 50 MB in 50 kB": png(60_000, 60_000, bomb),
        "2^31 pixels wide": png(2**31 - 1, 1, one),
        "no pixel wide": png(0, 10, one),
        "a text of 50 MB in 50 kB": png(
            9, 7, zlib.compress(bytes(7 * 28)), (b"zTXt", b"k\0\0" + bomb)
        ),
        "GIF of 65,535 x 65,535": b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20),
        "BMP of 10^9 x 10^9": b"BM"
        + struct.pack("<IIIIII", 54, 0, 54, 40, 10**9, 10**9)
        + bytes(28),
        "floating-point pixels": encoded(Image.new("F", (9, 7)), "TIFF"),
        "a zip": zipped(),
        "a script": b"#!/bin/sh\ntouch executed\n",
        "PostScript, for which Pillow would start Ghostscript": b"%!PS-Adobe-3.0 EPSF-3.0\n"
        b"%%BoundingBox: 0 0 9 7\n%%EndComments\n(touch executed) system\nshowpage\n%%EOF\n",
        "SVG with entities": b'<!DOCTYPE x [<!ENTITY a "aaaa">]><svg>&a;</svg>',
    }


def test_hostile_images_are_refused() -> None:
    for what, content in hostile().items():
        assert attempt(lambda content=content: opened(content)) == "refused", what


NO_IMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no image\n"),
    "bomb": lambda path: path.write_bytes(next(iter(hostile().values()))),
    "FIFO": os.mkfifo,
    "folder": Path.mkdir,
    "circular link": lambda path: path.symlink_to(path),
    "dead link": lambda path: path.symlink_to("nowhere"),
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to the folder itself": lambda path: path.symlink_to(path.parent),
    "name that is no UTF-8": lambda path: shutil.copy(
        next(path.parent.glob("[0-9]*.png")), os.fsencode(path) + b"\xff\xfe.png"
    ),
}


def test_folders_with_what_is_no_image(photographs: Path) -> None:  # noqa: F811
    words = [word for word in TINY if not word.startswith(("data=", "model.num_classes"))]

    def run(name: str, count: int) -> str:
        root = Path(f"{name} {count}").absolute()
        shutil.copytree(photographs, root)
        for number in range(count):
            for make in NO_IMAGES.values() if name == "all" else [NO_IMAGES[name]]:
                number += 100 * len(list(root.rglob("odd*")))
                make(root / WNIDS[0] / f"odd-{number}.jpg")
        options = ("data=folder", f"data.root='{root}'", "optim.epochs=0")
        return answer(command("train.py", *words, *options, f"hydra.run.dir='{root}-run'"))

    for name in NO_IMAGES:
        assert run(name, 1) == "worked", name
    run("all", 3)


# ----------------------------------------------------------------------------- archives and labels


def chosen(root: Path) -> None:
    """Choose images as ``data=imagenet`` does, and read them all."""
    index = choose(
        root,
        classes=WNIDS,
        num_classes=len(WNIDS),
        fraction=0.5,
        train_images=20,
        calibration_images=5,
        validation_images=5,
        test_images=10,
        seed=0,
    )
    read_all(index)


def read_all(index: ImageIndex) -> None:
    for split in SPLITS:
        source = index.source(split)
        for number in range(len(source)):
            try:
                assert source.load(number).mode == "RGB"
                source.label(number)
            except UnreadableImage:
                pass


def with_file(root: Path, name: str, content: bytes) -> None:
    """Choose from a copy of a folder in which one file is another; nothing of it is unpacked."""
    place = Path("copy")
    shutil.copytree(root, place, copy_function=os.link)
    (place / name).unlink()
    (place / name).write_bytes(content)
    try:
        chosen(place)
    finally:
        assert not list(Path().rglob("evil*")), "a member was written"
        assert not Path("/tmp/evil.JPEG").exists(), "a member was written"
        shutil.rmtree(place)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("archive of class archives", "ILSVRC2012_img_train.tar"),
        ("class archives", f"train/{WNIDS[0]}.tar"),
        ("WebDataset shards", "imagenet1k-train-0000.tar"),
        ("parquet files", "data/train-00000-of-00002.parquet"),
    ],
)
def test_damaged_archives(form: str, name: str) -> None:
    root = fake(Path("imagenet"), form)
    attempt(lambda: chosen(root), "worked")

    attempt_all(
        damaged((root / name).read_bytes()), lambda content: with_file(root, name, content), 100
    )


def tars() -> Iterator[tuple[str, bytes, str]]:
    """Tar files with hostile members, and what has to come of them."""
    image = fake_imagenet.jpeg(1)
    good = [(f"{WNIDS[0]}_{n}.JPEG", fake_imagenet.jpeg(n)) for n in range(TRAIN)]

    def packed(*more: tuple[str, bytes], mode: str = "w") -> bytes:
        stream = io.BytesIO()
        pack(stream, [*good, *more], mode)
        return stream.getvalue()

    def with_member(kind: bytes, link: str = "") -> bytes:
        stream = io.BytesIO(packed())
        with tarfile.open(fileobj=stream, mode="a") as tar:
            info = tarfile.TarInfo("evil.JPEG")
            info.type, info.linkname = kind, link
            tar.addfile(info)
        return stream.getvalue()

    def of_size(field: bytes) -> bytes:
        raw = bytearray(packed())
        raw[124:136] = field
        raw[148:156] = b" " * 8
        raw[148:156] = f"{sum(raw[:512]):06o}\0 ".encode()
        return bytes(raw)

    nested = image
    for number in range(100):
        stream = io.BytesIO()
        pack(stream, [(f"{number}.tar", nested)])
        nested = stream.getvalue()
    yield "a path that leads out", packed(("../../evil.JPEG", image)), "either"
    yield "an absolute path", packed(("/tmp/evil.JPEG", image)), "either"
    yield "one name twice", packed(good[0], good[0]), "either"
    yield "a name of 5,000 letters", packed(("e" * 5000 + ".JPEG", image)), "either"
    yield "a name with newlines", packed(("evil\n\0x.JPEG", image)), "either"
    yield "an empty image", packed(("evil.JPEG", b"")), "either"
    yield "a symbolic link", with_member(tarfile.SYMTYPE, "/etc/passwd"), "worked"
    yield "a hard link", with_member(tarfile.LNKTYPE, "/etc/passwd"), "worked"
    yield "a FIFO", with_member(tarfile.FIFOTYPE), "worked"
    yield "a device", with_member(tarfile.CHRTYPE), "worked"
    for mode in ("w:gz", "w:bz2", "w:xz"):
        yield mode, packed(mode=mode), "refused"
    yield "a gzip bomb", zlib.compress(bytes(50_000_000), 9, 31), "refused"
    yield "a member of 8 GB", of_size(b"77777777777\0"), "refused"
    yield "a member of 2^88 bytes", of_size(b"\x80" + b"\xff" * 11), "refused"
    yield "a member of negative size", of_size(b"\xff" * 12), "either"
    yield "a zip", zipped(), "refused"
    yield "a hundred tars in each other", nested, "either"


def test_hostile_tars() -> None:
    root = fake(Path("imagenet"), "class archives")
    for what, content, expected in tars():
        outcome = attempt(lambda c=content: with_file(root, f"train/{WNIDS[0]}.tar", c))
        assert expected in ("either", outcome), what


class Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)


def devkit_bomb() -> bytes:
    """A devkit whose label files are a gigabyte of zeros each, in one megabyte."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = 1_000_000_000
            tar.addfile(info, Zeros())
    return stream.getvalue()


@pytest.mark.parametrize("form", LABELS)
def test_damaged_labels(form: str) -> None:
    root = Path("labels")
    TRAINING["class folders"](root)
    VALIDATION["flat folder"](root)
    LABELS[form](root)
    files = [p for p in sorted(root.rglob("*")) if p.suffix in (".txt", ".csv", ".mat", ".gz")]
    for path in files:
        content = path.read_bytes()
        read = functools.partial(with_file, root, path.relative_to(root).as_posix())
        odd = [content * 2, content.replace(b"1", b"999"), b"\xff\xfe" + content, b"\n\n"]
        if path.suffix == ".gz":
            attempt(functools.partial(read, devkit_bomb()))

        attempt_all(damaged(content) | st.sampled_from(odd), read, 40)


# --------------------------------------------------------------------- images.csv, listings, caches


def test_damaged_indexes(photographs: Path, tmp_path: Path) -> None:  # noqa: F811
    words = [word for word in TINY if not word.startswith(("data=", "model.num_classes"))]
    options = ("data=folder", f"data.root={photographs}", "optim.epochs=0")
    result = command("train.py", *words, *options, f"hydra.run.dir={tmp_path / 'run'}")
    assert answer(result) == "worked"
    content = (tmp_path / "run/images.csv").read_bytes()
    lines = content.decode().splitlines()
    head = next(n for n, line in enumerate(lines) if line.startswith("split,"))
    columns = lines[head].split(",")
    os.mkfifo("fifo.png")

    def read(broken: bytes) -> None:
        Path("images.csv").write_bytes(broken)
        index = ImageIndex.load("images.csv")
        index.check_labels(1000)
        read_all(index)

    attempt(lambda: read(content), "worked")
    cells = {
        "path": (
            *("/dev/zero", "/etc/passwd", "../../../etc/passwd", "", "nowhere.png", "a" * 5000),
            "a\0b",
        ),
        "split": ("", "training", "test"),
        "label": ("-2", "99", "x", "9" * 400),
        "offset": ("-5", "7", "9" * 30, "1e3"),
        "size": ("9" * 18, "-9"),
        "row": ("0", "9" * 18),
        "sha256": ("", "0" * 64, "x" * 64),
        "name": ("", "a" * 5000, "<b>"),
    }
    changed = [b""]
    for column, values in cells.items():
        for value in (*values, str(tmp_path / "fifo.png")):
            row = lines[head + 1].split(",")
            row[columns.index(column)] = value
            changed.append("\n".join([*lines[: head + 1], ",".join(row)]).encode())
    for key, value in {
        **{"images": "1", "format": "99", "root": "3", "seed": "null", "shared": "[[1]]"},
        "options": '{"photo_tests": 10000000000}',
    }.items():
        other = [f"# {key}: {value}" if line.startswith(f"# {key}:") else line for line in lines]
        changed.append("\n".join(other).encode())
    for broken in changed:
        attempt(lambda broken=broken: read(broken))

    attempt_all(damaged(content), lambda broken: read(broken), 200)


def test_damaged_listings(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").absolute()))
    source = FolderSource(photographs, progress=False)
    wanted = [source.name(n) for n in range(len(source))]
    (listing,) = cache_folder("listings").glob("*.sqlite")
    content = listing.read_bytes()

    def listed(broken: bytes) -> list[str]:
        shutil.rmtree(listing.parent)
        listing.parent.mkdir()
        listing.write_bytes(broken)
        found = list_folder(photographs, progress=False)
        return [found.entry(n).place.path for n in range(len(found))]

    for broken in (b"", content[: len(content) // 2], bytes(4096), b"Some text.\n", content[:-1]):
        assert listed(broken) == wanted
    attempt_all(damaged(content), listed, 100)


@pytest.mark.parametrize("mode", ["jpeg", "pixels"])
def test_damaged_caches(photographs: Path, mode: str) -> None:  # noqa: F811
    source = FolderSource(photographs, progress=False)

    def built(folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        cached = build_cache(
            source, range(len(source)), mode=mode, short_side=32, folder=folder, progress=False
        )
        assert all(cached.load(number).mode == "RGB" for number in range(len(source)))
        return cached.file

    file = built(Path("cache"))
    content = file.read_bytes()

    def read(broken: bytes) -> None:
        file.write_bytes(broken)
        built(file.parent)

    attempt_all(damaged(content), read, 100)
