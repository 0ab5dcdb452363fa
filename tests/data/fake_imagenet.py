"""A tiny fake ImageNet in every layout of the real one."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n02096294", "n03594734", "n07747607")
TRAIN, VAL = 12, 4  # images of each class
# ILSVRC's class numbers are not in the order of the wnids.
ILSVRC_IDS = {wnid: number for number, wnid in enumerate(reversed(WNIDS), start=1)}


def jpeg(key: int) -> bytes:
    """A JPEG of 40 × 30 pixels, different for each key."""
    pixels = np.random.default_rng(key).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((40, 30), Image.Resampling.NEAREST).save(stream, "JPEG")
    return stream.getvalue()


def train_images() -> Iterator[tuple[str, str, bytes]]:
    """Yield wnid, stem and content."""
    for k, wnid in enumerate(WNIDS):
        for i in range(TRAIN):
            yield wnid, f"{wnid}_{i * 37}", jpeg(1000 * k + i)


def val_images() -> Iterator[tuple[str, str, bytes]]:
    """Yield wnid, stem and content; classes take turns."""
    for i in range(VAL * len(WNIDS)):
        yield WNIDS[i * 3 % len(WNIDS)], f"ILSVRC2012_val_{i + 1:08d}", jpeg(100_000 + i)


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def pack(target: Path | io.BytesIO, members: Iterable[tuple[str, bytes]], mode: str = "w") -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if isinstance(target, Path):
        put(target, packed.getvalue())
    else:
        target.write(packed.getvalue())


def class_tar(wnid: str) -> bytes:
    stream = io.BytesIO()
    pack(stream, ((f"{s}.JPEG", c) for w, s, c in train_images() if w == wnid))
    return stream.getvalue()


# ------------------------------------------------------------------------------- training images


def train_folders(root: Path) -> None:
    for wnid, stem, content in train_images():
        put(root / "train" / wnid / f"{stem}.JPEG", content)


def train_tar(root: Path) -> None:
    pack(root / "ILSVRC2012_img_train.tar", ((f"{wnid}.tar", class_tar(wnid)) for wnid in WNIDS))


def class_tars(root: Path) -> None:
    for wnid in WNIDS:
        put(root / "train" / f"{wnid}.tar", class_tar(wnid))


def train_parquet(root: Path) -> None:
    rows = [
        (f"{stem}_{wnid}.JPEG", WNIDS.index(wnid), content)
        for wnid, stem, content in reversed(list(train_images()))
    ]
    write_parquet(root / "data/train-00000-of-00002.parquet", rows[:25])
    write_parquet(root / "data/train-00001-of-00002.parquet", rows[25:])


def train_shards(root: Path) -> None:
    images = sorted(train_images(), key=lambda image: image[2])  # shuffled, in effect
    for shard in range(3):
        pack(root / f"imagenet1k-train-{shard:04d}.tar", samples(images[shard::3]))


TRAINING: dict[str, Callable[[Path], None]] = {
    "class folders": train_folders,
    "archive of class archives": train_tar,
    "class archives": class_tars,
    "parquet files": train_parquet,
    "WebDataset shards": train_shards,
}

# ----------------------------------------------------------------------------- validation images


def val_folders(root: Path, name: str = "val") -> None:
    for wnid, stem, content in val_images():
        put(root / name / wnid / f"{stem}.JPEG", content)


def val_flat(root: Path) -> None:
    for _, stem, content in val_images():
        put(root / "val" / f"{stem}.JPEG", content)


def val_tar(root: Path) -> None:
    pack(root / "ILSVRC2012_img_val.tar", ((f"{s}.JPEG", c) for _, s, c in val_images()))


def val_parquet(root: Path) -> None:
    rows = [(f"{stem}_{w}.JPEG", WNIDS.index(w), content) for w, stem, content in val_images()]
    write_parquet(root / "data/validation-00000-of-00001.parquet", rows)


def val_shards(root: Path) -> None:
    pack(root / "imagenet1k-validation-00.tar", samples(val_images()))


VALIDATION: dict[str, Callable[[Path], None]] = {
    "class folders": val_folders,
    "flat folder": val_flat,
    "flat archive": val_tar,
    "parquet files": val_parquet,
    "WebDataset shards": val_shards,
}

# ----------------------------------------------------------------------------------- label files


def ground_truth() -> str:
    return "".join(f"{ILSVRC_IDS[wnid]}\n" for wnid, _, _ in val_images())


def meta() -> bytes:
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    synsets = np.array([(i, w, "a, b", 0) for w, i in ILSVRC_IDS.items()], dtype=kinds)
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"synsets": synsets.reshape(-1, 1)})
    return stream.getvalue()


def devkit(root: Path) -> None:
    put(root / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", ground_truth())
    put(root / "ILSVRC2012_devkit_t12/data/meta.mat", meta())


def loose_devkit(root: Path) -> None:
    put(root / "ILSVRC2012_validation_ground_truth.txt", ground_truth())
    put(root / "meta.mat", meta())


def packed_devkit(root: Path) -> None:
    data = "ILSVRC2012_devkit_t12/data"
    truth = (f"{data}/ILSVRC2012_validation_ground_truth.txt", ground_truth().encode())
    pack(root / "ILSVRC2012_devkit_t12.tar.gz", [truth, (f"{data}/meta.mat", meta())], "w:gz")


def caffe(root: Path) -> None:
    lines = (f"{stem}.JPEG {WNIDS.index(wnid)}\n" for wnid, stem, _ in val_images())
    put(root / "val.txt", "".join(lines))


def kaggle(root: Path) -> None:
    lines = [f"{stem},{wnid} 1 2 3 4 {wnid} 5 6 7 8 \n" for wnid, stem, _ in val_images()]
    put(root / "LOC_val_solution.csv", "ImageId,PredictionString\n" + "".join(reversed(lines)))


def synsets(root: Path) -> None:
    lines = (f"{wnid}\n" for wnid, _, _ in val_images())
    put(root / "imagenet_2012_validation_synset_labels.txt", "".join(lines))


LABELS: dict[str, Callable[[Path], None]] = {
    "devkit": devkit,
    "loose devkit": loose_devkit,
    "packed devkit": packed_devkit,
    "caffe": caffe,
    "kaggle": kaggle,
    "synsets": synsets,
}

# --------------------------------------------------------------------------------------- helpers


def samples(images: Iterable[tuple[str, str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Yield the members of a WebDataset shard."""
    for wnid, stem, content in images:
        yield f"{stem}.cls", str(WNIDS.index(wnid)).encode()
        yield f"{stem}.jpg", content
        yield f"{stem}.json", b"{}"


def write_parquet(path: Path, rows: list[tuple[str, int, bytes]], group: int = 7) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table(
        {
            "image": pyarrow.array([{"bytes": c, "path": n} for n, _, c in rows], image),
            "label": pyarrow.array([label for _, label, _ in rows], pyarrow.int64()),
        }
    )
    pyarrow.parquet.write_table(table, path, row_group_size=group)


def change_row(path: Path, row: int) -> None:
    """Replace the bytes of an image."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path).to_pylist()
    rows[row]["image"]["bytes"] = jpeg(7)
    write_parquet(path, [(r["image"]["path"], r["label"], r["image"]["bytes"]) for r in rows])


def fake(root: Path, training: str = "class folders", validation: str = "class folders") -> Path:
    """Write both parts; flat validation images get a label file."""
    TRAINING[training](root)
    VALIDATION[validation](root)
    if validation.startswith("flat"):
        caffe(root)
    return root


def need(form: str) -> None:
    """Skip the test if a layout needs a package that is not installed."""
    import pytest

    if "parquet" in form:
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
