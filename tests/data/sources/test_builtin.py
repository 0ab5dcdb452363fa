from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest

from fat.data.sources import builtin as ready
from fat.data.sources.builtin import ArraySource, cifar10, digits, imagenette
from fat.utils.errors import FatError


def test_arrays_are_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    source = pickle.loads(pickle.dumps(ArraySource(pixels, np.array([3, 0, 1, 2]), "some")))
    assert len(source) == 4
    assert np.array_equal(np.asarray(source.load(2)), pixels[2])
    assert [source.label(i) for i in range(4)] == [3, 0, 1, 2]
    assert source.name(3) == "some#3"
    assert len({source.content(i) for i in range(4)}) == 4
    grey = ArraySource(pixels[..., 0], np.zeros(4, dtype=np.int64), "grey")
    assert np.array_equal(np.asarray(grey.load(1))[..., 2], pixels[1, ..., 0])


def test_arrays_of_another_kind() -> None:
    labels = np.zeros(2, dtype=np.int64)
    with pytest.raises(FatError, match=r"float64 \[2, 4, 4, 3\]; expected uint8"):
        ArraySource(np.zeros((2, 4, 4, 3)), labels, "x")  # type: ignore[arg-type]
    with pytest.raises(FatError, match=r"uint8 \[2, 3, 4, 4\]; expected"):
        ArraySource(np.zeros((2, 3, 4, 4), dtype=np.uint8), labels, "x")
    with pytest.raises(FatError, match=r"Labels of x are \[2\]; expected .* 3 in total"):
        ArraySource(np.zeros((3, 4, 4), dtype=np.uint8), labels, "x")


def test_digits_are_split_by_class() -> None:
    sklearn = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    found = digits()
    target = sklearn.load_digits().target
    assert len(found.train) + len(found.test) == len(target) == 1797
    for digit in range(10):
        share = sum(found.test.label(i) == digit for i in range(len(found.test)))
        assert share == round(0.25 * int((target == digit).sum()))
    assert found.classes == tuple("0123456789")
    images = np.stack([np.asarray(found.train.load(i)) for i in range(20)])
    assert images.shape == (20, 8, 8, 3)
    assert (images.min(), images.max()) == (0, 255)
    # No image is in both splits, although scikit-learn might have duplicates.
    train = {found.train.content(i) for i in range(len(found.train))}  # type: ignore[attr-defined]
    test = {found.test.content(i) for i in range(len(found.test))}  # type: ignore[attr-defined]
    assert not train & test


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FatError, match="pip install scikit-learn"):
        digits()


def put_cifar(root: Path) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    pixels = rng.integers(0, 256, (6, 3, 3, 32, 32), dtype=np.uint8)  # red, green and blue planes
    labels = rng.integers(0, 10, (6, 3), dtype=np.uint8)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, images, classes in zip(names, pixels, labels, strict=True):
        rows = np.concatenate([classes[:, None], images.reshape(3, -1)], axis=1)
        (folder / name).write_bytes(rows.tobytes())
    return pixels, labels


def test_cifar10_as_it_lies_on_disk(tmp_path: Path) -> None:
    pixels, labels = put_cifar(tmp_path)
    found = cifar10(tmp_path)
    assert (len(found.train), len(found.test)) == (15, 3)
    assert np.array_equal(np.asarray(found.train.load(4)), pixels[1, 1].transpose(1, 2, 0))
    assert np.array_equal(np.asarray(found.test.load(2)), pixels[5, 2].transpose(1, 2, 0))
    assert [found.train.label(i) for i in range(15)] == labels[:5].ravel().tolist()
    assert found.classes[3] == "cat"


def test_cifar10_cut_short(tmp_path: Path) -> None:
    put_cifar(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FatError, match=r"data_batch_3.bin has 9218 bytes, not a whole number"):
        cifar10(tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(ready, "download_and_extract_archive", refuse)
    with pytest.raises(FatError, match=rf"data={name} .*no route to host.*data.root=DIR"):
        getattr(ready, name)(tmp_path)


def test_downloads_go_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def unpack(url: str, folder: str, md5: str | None = None) -> None:
        asked.append((url.rpartition("/")[2], folder, md5))
        for part in ("train", "val"):
            (Path(folder) / "imagenette2-320" / part).mkdir(parents=True)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ready, "download_and_extract_archive", unpack)
    folder = imagenette()
    assert folder == tmp_path / "fat/downloads/imagenette/imagenette2-320"
    ((file, place, md5),) = asked
    assert (file, place) == ("imagenette2-320.tgz", str(tmp_path / "fat/downloads/imagenette"))
    assert md5 is not None
    assert imagenette() == folder
    assert len(asked) == 1  # the second time it existed


def test_content_tells_images_apart_by_shape_too() -> None:
    labels = np.zeros(1, dtype=np.int64)
    wide = ArraySource(np.zeros((1, 2, 8), dtype=np.uint8), labels, "a")
    tall = ArraySource(np.zeros((1, 8, 2), dtype=np.uint8), labels, "a")
    assert wide.content(0) != tall.content(0)
    assert np.load(io.BytesIO(wide.content(0))).shape == (2, 8)
