"""The doors of images, archives, indexes and labels: what data= may meet in a folder."""

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
from doors.damage import damaged
from doors.lab import TINY, Lab
from doors.trial import MUST_REFUSE, MUST_WORK, Case, Result
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

__all__ = ["archives", "images", "indexes"]

FORMATS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp"}


# ----------------------------------------------------------------------------------- single images


def images(lab: Lab) -> list[Result]:
    """Image files opened alone, and folders with such files as a run meets them."""
    files = lab.new("files")
    files.mkdir()
    cases: list[Case] = []

    def add(
        row: str, what: str, name: str, content: bytes, call: Callable[[Path], str], wanted: str
    ) -> None:
        path = files / f"{len(cases)}-{name}"
        path.write_bytes(content)
        cases.append(Case(row, what, functools.partial(call, path), wanted))

    for kind, suffix in FORMATS.items():
        whole = _encoded(kind)
        add("whole images", kind, f"x.{suffix}", whole, _open, MUST_WORK)
        for how, where, content in damaged(whole, lab.random(kind), flips=40):
            add(f"{kind}: {how}", where, f"x.{suffix}", content, _open, "either")
    for what, content, size in _unusual():
        call = functools.partial(_sized, size)
        add("unusual images", what, "x.png", content, call, MUST_WORK)
    for what, content in _hostile():
        add("hostile images", what, "x.png", content, _open, MUST_REFUSE)
    for what, make in _no_images().items():
        for share, wanted in ((1, MUST_WORK), (20, "either")):
            call = functools.partial(_folder, lab, make, share)
            row = "folders of 40 images, `train.py data=folder`"
            cases.append(Case(row, f"and {share} × {what}", call, wanted))
    return lab.run(cases)


def _encoded(kind: str) -> bytes:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize((64, 48)).save(stream, kind)
    return stream.getvalue()


def _open(path: Path) -> str:
    image = open_image(path)
    assert image.mode == "RGB"
    assert min(image.size) >= 1
    return "opened"


def _sized(size: tuple[int, int], path: Path) -> str:
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", size), f"{image.mode} {image.size}, not {size}"
    return "opened"


def _unusual() -> Iterator[tuple[str, bytes, tuple[int, int]]]:
    """Valid images that few programs make, and their size."""

    def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        return stream.getvalue()

    grey = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)
    yield "one pixel", saved(Image.new("RGB", (1, 1))), (1, 1)
    yield "one row of 5,000", saved(Image.new("RGB", (5000, 1))), (5000, 1)
    yield "16-bit grey", saved(Image.fromarray(grey)), (4, 3)
    yield "16-bit grey TIFF", saved(Image.fromarray(grey), "TIFF"), (4, 3)
    yield "one bit a pixel", saved(Image.new("1", (9, 7))), (9, 7)
    yield "CMYK JPEG", saved(Image.new("CMYK", (9, 7)), "JPEG"), (9, 7)
    yield "palette", saved(Image.new("P", (9, 7))), (9, 7)
    yield "palette with a transparent entry", saved(Image.new("P", (9, 7)), transparency=0), (9, 7)
    yield "alpha", saved(Image.new("RGBA", (9, 7))), (9, 7)
    yield "grey with alpha", saved(Image.new("LA", (9, 7))), (9, 7)
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "WEBP", "PNG"):
        moving = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        yield f"animated {kind}", moving, (9, 7)
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "turned by EXIF", saved(frames[0], "JPEG", exif=exif.tobytes()), (7, 9)
    yield (
        "EXIF of random bytes",
        saved(frames[0], "JPEG", exif=b"Exif\0\0" + bytes(range(256))),
        (9, 7),
    )
    yield "a JPEG named .png", saved(frames[0], "JPEG"), (9, 7)
    yield "LAB TIFF", saved(Image.new("LAB", (9, 7)), "TIFF"), (9, 7)


def _png(width: int, height: int, data: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), *extra, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _hostile() -> Iterator[tuple[str, bytes]]:
    bomb = zlib.compress(bytes(50_000_000), 9)
    yield "60,000 × 60,000 pixels claimed in 100 bytes", _png(60_000, 60_000, zlib.compress(b"\0"))
    yield "60,000 × 60,000 pixels, 50 MB in 50 kB", _png(60_000, 60_000, bomb)
    yield "2^31 pixels wide", _png(2**31 - 1, 1, zlib.compress(b"\0"))
    yield "no pixel wide", _png(0, 10, zlib.compress(b"\0"))
    yield (
        "a text chunk of 50 MB in 50 kB",
        _png(9, 7, zlib.compress(bytes(7 * 28)), (b"zTXt", b"k\0\0" + bomb)),
    )
    yield "GIF of 65,535 × 65,535", b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20)
    yield (
        "BMP of 10^9 × 10^9",
        b"BM" + struct.pack("<IIIIII", 54, 0, 54, 40, 10**9, 10**9) + bytes(28),
    )
    stream = io.BytesIO()
    Image.new("F", (9, 7)).save(stream, "TIFF")
    yield "floating-point pixels", stream.getvalue()
    yield "a zip", _zip()
    yield "a script", b"#!/bin/sh\ntouch executed\n"
    yield (
        "PostScript, which Pillow would start Ghostscript for",
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 7\n%%EndComments\n"
            b"(touch executed) system\nshowpage\n%%EOF\n"
        ),
    )
    yield "SVG with an entity bomb", b'<!DOCTYPE x [<!ENTITY a "aaaa">]><svg>&a;</svg>'


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../x.jpg", bytes(10_000_000))
    return stream.getvalue()


def _no_images() -> dict[str, Callable[[Path], object]]:
    """What else may lie in a folder under the name of an image."""
    return {
        "empty file": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("no image\n"),
        "decompression bomb": lambda path: path.write_bytes(next(_hostile())[1]),
        "FIFO": os.mkfifo,
        "folder": Path.mkdir,
        "link in a circle": lambda path: path.symlink_to(path),
        "link to nothing": lambda path: path.symlink_to("nowhere"),
        "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "link to the folder itself": lambda path: path.symlink_to(path.parent),
        "name that is no UTF-8": lambda path: _odd_name(path),
    }


def _odd_name(path: Path) -> None:
    shutil.copy(next(path.parent.glob("[0-9]*.png")), os.fsencode(path) + b"\xff\xfe.png")


def _folder(lab: Lab, make: Callable[[Path], object], count: int) -> str:
    root = lab.new("folder")
    shutil.copytree(lab.images, root)
    for number in range(count):
        make(root / WNIDS[0] / f"odd-{number}.jpg")
    words = [word for word in TINY if not word.startswith(("data=", "model.num_classes"))]
    lab.command(
        "train.py",
        *words,
        "data=folder",
        f"data.root={root}",
        "optim.epochs=0",
        f"hydra.run.dir={lab.new('run')}",
    )
    return "ran to its end"


# ---------------------------------------------------------------------------------------- archives


def archives(lab: Lab) -> list[Result]:
    """ImageNet in its archives, damaged: chosen from and read to the last image."""
    cases: list[Case] = []
    forms = {
        "archive of class archives": "ILSVRC2012_img_train.tar",
        "class archives": f"train/{WNIDS[0]}.tar",
        "WebDataset shards": "imagenet1k-train-0000.tar",
        "parquet files": "data/train-00000-of-00002.parquet",
    }
    for form, name in forms.items():
        root = fake(lab.new("imagenet"), form)
        cases.append(Case("whole archives", form, functools.partial(_choose, root), MUST_WORK))
        content = (root / name).read_bytes()
        for how, where, broken in damaged(content, lab.random(form), cuts=6, flips=20, head=1024):
            call = functools.partial(_damaged_archive, lab, root, name, broken)
            cases.append(Case(f"{form}: {how}", where, call))
    root = fake(lab.new("imagenet"), "class archives")
    name = f"train/{WNIDS[0]}.tar"
    for what, content, wanted in _tars():
        call = functools.partial(_damaged_archive, lab, root, name, content)
        cases.append(Case("tar files with hostile members", what, call, wanted))
    for what, change in _labels(lab).items():
        cases.append(Case("files of labels", what, change))
    return lab.run(cases)


def _choose(root: Path) -> str:
    """The whole way of data=imagenet, and every image read."""
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
    read = skipped = 0
    for split in ("train", "calibration", "validation", "test"):
        source = index.source(split)
        for number in range(len(source)):
            try:
                assert source.load(number).mode == "RGB"
                assert 0 <= source.label(number) < len(WNIDS)
                read += 1
            except UnreadableImage:
                skipped += 1
    return f"{read} images read, {skipped} named as unreadable"


def _damaged_archive(lab: Lab, root: Path, name: str, content: bytes) -> str:
    place = lab.new("imagenet")
    shutil.copytree(root, place, copy_function=os.link)
    (place / name).unlink()
    (place / name).write_bytes(content)
    try:
        return _choose(place)
    finally:
        outside = (
            lab.folder / "evil.JPEG",
            lab.folder.parent / "evil.JPEG",
            Path("/tmp/evil.JPEG"),
        )
        written = [*place.rglob("evil*"), *(path for path in outside if path.exists())]
        assert not written, "a member was written"
        shutil.rmtree(place)


def _tars() -> Iterator[tuple[str, bytes, str]]:
    image = fake_imagenet.jpeg(1)
    good = [(f"{WNIDS[0]}_{n}.JPEG", fake_imagenet.jpeg(n)) for n in range(TRAIN)]

    def packed(*more: tuple[str, bytes], mode: str = "w") -> bytes:
        stream = io.BytesIO()
        pack(stream, [*good, *more], mode)
        return stream.getvalue()

    def with_member(**fields: object) -> bytes:
        stream = io.BytesIO(packed())
        with tarfile.open(fileobj=stream, mode="a") as tar:
            info = tarfile.TarInfo("evil.JPEG")
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info)
        return stream.getvalue()

    yield "a path that leads out, ../../evil.JPEG", packed(("../../evil.JPEG", image)), "either"
    yield "an absolute path, /tmp/evil.JPEG", packed(("/tmp/evil.JPEG", image)), "either"
    yield "one name twice", packed(good[0], good[0]), "either"
    yield "a name of 5,000 letters", packed(("e" * 5000 + ".JPEG", image)), "either"
    yield "a name with newlines", packed(("evil\n\0x.JPEG", image)), "either"
    yield "an empty image", packed(("evil.JPEG", b"")), "either"
    for what, kind in (("a symbolic link", tarfile.SYMTYPE), ("a hard link", tarfile.LNKTYPE)):
        yield f"{what} to /etc/passwd", with_member(type=kind, linkname="/etc/passwd"), MUST_WORK
    for what, kind in (("a FIFO", tarfile.FIFOTYPE), ("a device", tarfile.CHRTYPE)):
        yield what, with_member(type=kind), MUST_WORK
    for mode, what in (("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")):
        yield f"compressed by {what}", packed(mode=mode), MUST_REFUSE
    yield "a gzip bomb", zlib.compress(bytes(50_000_000), 9, 31), MUST_REFUSE
    raw = bytearray(packed())
    raw[124:136] = b"77777777777\0"  # 8 GB
    yield "a member of 8 GB that is not there", _checked(raw), MUST_REFUSE
    raw[124:136] = b"\x80" + b"\xff" * 11
    yield "a member of 2^88 bytes", _checked(raw), MUST_REFUSE
    raw[124:136] = b"\xff" * 12
    yield "a member of negative size", _checked(raw), "either"
    yield "a zip", _zip(), MUST_REFUSE
    yield "one tar in itself a hundred times", _nested(100), "either"


def _checked(raw: bytearray) -> bytes:
    """The first header with a right checksum."""
    raw[148:156] = b" " * 8
    raw[148:156] = f"{sum(raw[:512]):06o}\0 ".encode()
    return bytes(raw)


def _nested(depth: int) -> bytes:
    content = fake_imagenet.jpeg(0)
    for number in range(depth):
        stream = io.BytesIO()
        pack(stream, [(f"{number}.tar", content)])
        content = stream.getvalue()
    return content


def _labels(lab: Lab) -> dict[str, Callable[[], str]]:
    """Damaged files of labels beside flat validation images, meta.mat and devkits among them."""
    found: dict[str, Callable[[], str]] = {}
    for form, write in LABELS.items():
        root = lab.new("labels")
        TRAINING["class folders"](root)
        VALIDATION["flat folder"](root)
        write(root)
        labels = [
            path
            for path in sorted(root.rglob("*"))
            if path.is_file() and path.suffix in (".txt", ".csv", ".mat", ".gz")
        ]
        for path in labels:
            name = path.relative_to(root).as_posix()
            content = path.read_bytes()
            rng = lab.random(f"{form} {name}")
            changed = [*damaged(content, rng, cuts=2, flips=10)]
            changed += [
                ("too many lines", "", content * 2),
                ("other numbers", "", content.replace(b"1", b"999")),
            ]
            changed += [("no UTF-8", "", b"\xff\xfe" + content), ("no line", "", b"\n\n")]
            if path.suffix == ".gz":
                changed.append(("a bomb of 1 GB", "", _devkit_bomb()))
            for how, where, broken in changed:
                what = f"`{path.name}`, {how}, {where}"
                found[what] = functools.partial(_damaged_archive, lab, root, name, broken)
    return found


@functools.cache
def _devkit_bomb() -> bytes:
    """A devkit whose file of labels is a gigabyte of zeros, in one megabyte."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = 1_000_000_000
            tar.addfile(info, _Zeros())
    return stream.getvalue()


class _Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)


# ---------------------------------------------------------------------- indexes and what is cached


def indexes(lab: Lab) -> list[Result]:
    """images.csv, and the files that FAT keeps of images: listings, hashes, small copies."""
    cases: list[Case] = []
    content = (lab.indexed / "images.csv").read_bytes()
    files = lab.new("indexes")
    files.mkdir()
    fifo = files / "fifo.png"
    os.mkfifo(fifo)
    lines = content.decode().splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("train,"))
    cells = lines[first].split(",")

    def row(**changes: str) -> bytes:
        columns = lines[first - 1 - (first - _head(lines) - 1)].split(",")
        changed = [changes.get(column, cell) for column, cell in zip(columns, cells, strict=True)]
        return "\n".join([*lines[:first], ",".join(changed), *lines[first + 1 :]]).encode()

    changed = [
        (f"{how}, {where}", broken, "either")
        for how, where, broken in damaged(content, lab.random("index"), flips=80, head=900)
    ]
    for column, values in {
        "path": (
            "/dev/zero",
            "/dev/stdin",
            str(fifo),
            "/etc/passwd",
            "../../../etc/passwd",
            "",
            "nowhere.png",
            "a" * 5000,
            ".",
        ),
        "split": ("", "training", "test"),
        "label": ("-2", "99", "x", "9" * 400),
        "offset": ("-5", "7", "9" * 30, "1e3"),
        "size": ("9" * 18, "-9"),
        "row": ("0", "9" * 18),
        "sha256": ("", "0" * 64, "x" * 64),
        "name": ("", "a" * 5000, "<b>"),
    }.items():
        for value in values:
            changed.append((f"{column} is {value[:30]}", row(**{column: value}), "either"))
    for key, value in (
        ("images", "1"),
        ("format", "99"),
        ("root", '"/"'),
        ("root", "3"),
        ("seed", "null"),
        ("options", "[]"),
        ("options", '{"photo_tests": 10000000000}'),
        ("shared", "[[1]]"),
        ("shared", '[["train"]]'),
        ("options", "{" * 5000),
    ):
        other = [f"# {key}: {value}" if line.startswith(f"# {key}:") else line for line in lines]
        changed.append((f"head: {key} is {value[:30]}", "\n".join(other).encode(), "either"))
    for number, (what, broken, wanted) in enumerate(changed):
        path = files / f"{number}.csv"
        path.write_bytes(broken)
        cases.append(
            Case(
                "`images.csv`",
                what.replace(str(files), ""),
                functools.partial(_index, path),
                wanted,
            )
        )
    cases += [*_kept(lab)]
    return lab.run(cases)


def _head(lines: list[str]) -> int:
    return next(n for n, line in enumerate(lines) if line.startswith("split,"))


def _index(path: Path) -> str:
    index = ImageIndex.load(path)
    index.check_labels(1000)
    read = skipped = 0
    for split in ("train", "calibration", "validation", "test"):
        source = index.source(split)
        for number in range(len(source)):
            try:
                source.load(number)
                read += 1
            except UnreadableImage:
                skipped += 1
    return f"{read} images read, {skipped} named as unreadable"


def _kept(lab: Lab) -> Iterator[Case]:
    source = FolderSource(lab.images, progress=False)
    wanted = [source.name(n) for n in range(len(source))]
    for listing in sorted(cache_folder("listings").glob("*.sqlite")):
        for how, where, broken in damaged(
            listing.read_bytes(), lab.random(listing.name), cuts=4, flips=24
        ):
            call = functools.partial(_list, lab, listing, broken, wanted)
            yield Case("listings of folders, `~/.cache/fat/listings`", f"{how}, {where}", call)
        break
    folder = lab.new("cache")
    for mode in ("jpeg", "pixels"):
        built = build_cache(
            source, range(len(source)), mode=mode, short_side=32, folder=folder, progress=False
        )
        for how, where, broken in damaged(
            built.file.read_bytes(), lab.random(mode), cuts=4, flips=24
        ):
            call = functools.partial(_cached, lab, built.file, mode, broken)
            yield Case("caches of small images, `data.cache=`", f"{mode}, {how}, {where}", call)


def _list(lab: Lab, listing: Path, broken: bytes, wanted: list[str]) -> str:
    os.environ["XDG_CACHE_HOME"] = str(lab.new("cache"))
    place = cache_folder("listings") / listing.name
    place.parent.mkdir(parents=True)
    place.write_bytes(broken)
    found = list_folder(lab.images, progress=False)
    assert [found.entry(n).place.path for n in range(len(found))] == wanted, "other images"
    return "the same images"


def _cached(lab: Lab, file: Path, mode: str, broken: bytes) -> str:
    folder = lab.new("cache")
    folder.mkdir()
    (folder / file.name).write_bytes(broken)
    source = FolderSource(lab.images, progress=False)
    cached = build_cache(
        source, range(len(source)), mode=mode, short_side=32, folder=folder, progress=False
    )
    for number in range(len(source)):
        assert cached.load(number).mode == "RGB"
    return "all images read"
