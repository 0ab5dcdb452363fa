"""Measure how many training images per second one core prepares, relative to its JPEG decoder.

    python benchmarks/feeding.py [data.root=DIR] [--images 200] [--rounds 7] [--workers 2]

The default images are crops of scikit-image's photographs, 500 x 375 pixels (ImageNet's average),
saved as JPEG.

* ``decoder``: Pillow decodes the bytes from memory to RGB. ``all pixels`` is the ceiling;
  ``reduced`` decodes only what the training crop needs, with the decoder's reduction by 2, 4 or 8.
* ``folder``, ``cache=...``: the full pipeline of a training image, from its file to a normalized
  float32 batch, through the loader of a run, with ``--workers`` processes and without.
* ``augment=device``: the work of the loader if a GPU cuts the crops, without that of the GPU.
* ``evaluation``: the pipeline from the folder with the evaluation crop.
* ``alone``: parts of the pipeline. ``training crop``: cut and resize a decoded image. ``batch``:
  stack and normalize; on a GPU, most of this is done by the GPU.

A rate is images per CPU second of all participating processes, including their start, so it does
not depend on their number or on other load. Rates are medians over ``--rounds`` rounds in which the
rows take turns, after one warm-up round; ratios are medians of each round's ratio, so a temporarily
slow machine cancels out. Files are in the page cache, image caches are built before, and each round
cuts other crops. torch uses one thread.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, features
from step import machine_name
from torch.utils.data import DataLoader

from fat.data.cache import MODES, build_cache
from fat.data.datamodule import TRAIN_PHOTOS
from fat.data.dataset import ImageDataset, ImageLoader, collate
from fat.data.sources.base import ImageSource, PhotoSource
from fat.data.sources.decoding import UnreadableImage
from fat.data.sources.folder import FolderSource
from fat.data.transforms import DeviceCropTransform, EvalTransform, RandomCropTransform, Transform
from fat.models.float_model import Preprocessing
from fat.utils.errors import FatError
from fat.utils.random import generator

ROOT = "data.root="
HEADINGS = ("way", "images/s per core", "min", "max", "of the decoder", "of the folder")
FORM = "{:34}{:>18}{:>8}{:>8}{:>16}{:>15}"
DECODER, FOLDER = "decoder, all pixels", "folder"
ALONE = 64  # decoded images for the rows of parts
PASSES = 4  # with workers, so that their start weighs less


@dataclass
class Way:
    """A row of the table: a function, its number of images, and the CPU seconds of each round."""

    run: Callable[[int], object]  # given the round's number
    images: int
    seconds: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Return the images per second of each round."""
        return [self.images / seconds for seconds in self.seconds]


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fat-feeding-") as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch  # the listing of the folder goes there too
        try:
            folder = options.root or photographs(Path(scratch, "images"), options.images)
            source, indices = readable(FolderSource(folder), options.images)
            print(machine(source, indices, options), flush=True)
            measured = ways(source, indices, Path(scratch, "cache"), options)
        except FatError as error:
            raise SystemExit(f"Error: {error}") from None
        for repeat in range(options.rounds + 1):
            for way in measured.values():
                seconds = timed(way, repeat)
                if repeat:  # the first round warms up
                    way.seconds.append(seconds)
    print(FORM.format(*HEADINGS))
    for name in measured:
        print(line(name, measured))


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", metavar=f"{ROOT}DIR", help="a folder of JPEG images")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="side of the network's input")
    parser.add_argument("--cache-side", type=int, default=256)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if options.root is not None:
        if not options.root.startswith(ROOT):
            parser.error(f"{options.root} is not {ROOT}DIR")
        options.root = Path(options.root.removeprefix(ROOT)).expanduser()
    for name, least in (("images", 1), ("rounds", 1), ("batch", 1), ("workers", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return options


def photographs(folder: Path, count: int) -> Path:
    """Save crops of photographs as JPEG files of ImageNet's average size."""
    folder.mkdir()
    source = PhotoSource(TRAIN_PHOTOS, count)
    # Large crops: enlarged images are smooth, and smooth images decode faster.
    cut = RandomCropTransform(preprocessing(375, 500), scale=(0.6, 1.0), ratio=(4 / 3, 4 / 3))
    for index in range(count):
        (pixels,) = cut(source.load(index), generator(index))
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        image.save(folder / f"{index:05d}.jpg", quality=92)
    return folder


def preprocessing(height: int, width: int) -> Preprocessing:
    """Return the usual preprocessing of ImageNet."""
    return Preprocessing(
        size=(height, width),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bicubic",
        crop_pct=0.875,
        crop_mode="center",
    )


def readable(source: FolderSource, count: int) -> tuple[FolderSource, list[int]]:
    """Choose a sample of the JPEG files that can be decoded.

    Raises:
        FatError: If there is none.
    """
    chosen: list[int] = []
    for index in generator(0).permutation(len(source)).tolist():
        if len(chosen) < count and is_jpeg(source.content(index)):
            try:
                source.load(index)
            except UnreadableImage:
                continue
            chosen.append(index)
    if not chosen:
        raise FatError(f"{source.root} holds no JPEG that can be decoded. Type {ROOT}DIR.")
    return source, sorted(chosen)


def is_jpeg(content: bytes) -> bool:
    """Return whether a file starts like a JPEG file."""
    return content[:3] == b"\xff\xd8\xff"


def machine(source: FolderSource, indices: list[int], options: argparse.Namespace) -> str:
    """Return a description of the machine, the libraries and the images."""
    sizes = [Image.open(source.path(index)).size for index in indices]
    wide, high = np.mean(sizes, axis=0)
    kilobytes = np.mean([len(source.content(index)) for index in indices]) / 1e3
    turbo = features.version("libjpeg_turbo") or "none"
    return (
        f"{machine_name()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, "
        f"Pillow {PIL.__version__}, libjpeg-turbo {turbo}\n{len(indices)} images of {wide:.0f} x "
        f"{high:.0f} pixels and {kilobytes:.0f} kB on average, input {options.size} px, batch "
        f"{options.batch}, caches at {options.cache_side} px"
    )


def ways(
    source: FolderSource, indices: list[int], folder: Path, options: argparse.Namespace
) -> dict[str, Way]:
    """Return all rows by name."""
    config = preprocessing(options.size, options.size)
    crop = RandomCropTransform(config)
    encoded = [source.content(index) for index in indices]
    count = len(indices)
    caches: dict[str, ImageSource] = {
        mode: build_cache(
            source, indices, mode=mode, short_side=options.cache_side, folder=folder, progress=False
        )
        for mode in MODES
    }
    squares = caches.pop("squares")  # for crops on the device alone
    sources = {FOLDER: source} | {f"cache={mode}": images for mode, images in caches.items()}
    rows = {
        DECODER: Way(lambda _: [decode(content, None) for content in encoded], count),
        "decoder, reduced": Way(
            lambda _: [decode(content, crop.short_side) for content in encoded], count
        ),
    }
    for name, images in sources.items():
        rows[name] = Way(through(images, indices, crop, 0, options.batch), count)
    if options.workers:
        many = indices * PASSES
        for name, images in sources.items():
            run = through(images, many, crop, options.workers, options.batch)
            rows[f"{name}, {options.workers} workers"] = Way(run, len(many))
    device = DeviceCropTransform(config, side=options.cache_side)
    for name, images in ((FOLDER, source), ("cache=squares", squares)):
        run = unfinished(images, indices, device, options.batch)
        rows[f"{name}, augment=device"] = Way(run, count)
    middle = EvalTransform(config)
    rows["folder, evaluation"] = Way(through(source, indices, middle, 0, options.batch), count)
    return rows | parts(source, indices[:ALONE], crop, options.batch)


def parts(
    source: FolderSource, indices: list[int], crop: RandomCropTransform, batch: int
) -> dict[str, Way]:
    """Return the rows of single parts of the pipeline."""
    decoded = [source.load(index) for index in indices]
    cut = [(crop(image, generator(0)), 0) for image in decoded]

    def finish(_: int) -> None:
        for start in range(0, len(cut), batch):
            stacked, *_ = collate(cut[start : start + batch])
            crop.finish(*stacked)

    def crops(repeat: int) -> None:
        for number, image in enumerate(decoded):
            crop(image, generator(repeat, number))

    return {"training crop alone": Way(crops, len(decoded)), "batch alone": Way(finish, len(cut))}


def decode(content: bytes, short_side: int | None) -> None:
    """Decode an image to RGB."""
    image = Image.open(io.BytesIO(content))
    image.draft("RGB", None if short_side is None else (short_side, short_side))
    image.load()
    if image.mode != "RGB":  # gray or CMYK
        image.convert("RGB")


def through(
    source: ImageSource, indices: list[int], transform: Transform, workers: int, batch: int
) -> Callable[[int], None]:
    """Return a function that loads all images once, as a run does."""
    data = ImageDataset(source, transform, indices=indices)

    def run(repeat: int) -> None:
        data.set_epoch(repeat)
        loader = ImageLoader(data, batch_size=batch, collate_fn=collate, num_workers=workers)
        images = sum(len(labels) for _, labels in loader)
        assert images == len(indices)

    return run


def unfinished(
    source: ImageSource, indices: list[int], transform: Transform, batch: int
) -> Callable[[int], None]:
    """Return a function that loads batches of 8-bit pixels, for crops on a GPU."""
    data = ImageDataset(source, transform, indices=indices)

    def run(repeat: int) -> None:
        data.set_epoch(repeat)
        loader: DataLoader[object] = DataLoader(data, batch_size=batch, collate_fn=collate)
        images = sum(len(labels) for _, labels, _, _ in loader)
        assert images == len(indices)

    return run


def timed(way: Way, repeat: int) -> float:
    """Return the CPU seconds of one round, including processes that ended in it."""
    before = cpu_seconds()
    way.run(repeat)
    return cpu_seconds() - before


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its ended child processes."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def line(name: str, measured: dict[str, Way]) -> str:
    """Format one line of the table."""
    rates = measured[name].rates
    cells = [f"{value:.0f}" for value in (statistics.median(rates), min(rates), max(rates))]
    for base, form in ((DECODER, "{:.0%}"), (FOLDER, "{:.2f}x")):
        ratios = [a / b for a, b in zip(rates, measured[base].rates, strict=True)]
        cells.append(form.format(statistics.median(ratios)))
    return FORM.format(name, *cells)


if __name__ == "__main__":
    main()
