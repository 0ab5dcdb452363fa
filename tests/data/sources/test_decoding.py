from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fat.data.sources.decoding import UnreadableImage, is_image, open_image


def opened(
    tmp_path: Path, image: Image.Image, name: str = "a.png", **options: object
) -> np.ndarray:
    path = tmp_path / name
    image.save(path, **options)
    result = open_image(path)
    assert result.mode == "RGB"
    return np.asarray(result)


def test_rgb_is_untouched(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(opened(tmp_path, Image.fromarray(pixels)), pixels)


def test_grey_and_bilevel(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(opened(tmp_path, Image.fromarray(grey)), np.stack([grey] * 3, axis=-1))
    black_white = Image.fromarray(np.eye(4, dtype=np.uint8) * 255).convert("1")
    assert np.array_equal(opened(tmp_path, black_white)[..., 0], np.eye(4) * 255)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 1, 128, 129, 257], [256, 32768, 65535, 65534, 65406]], dtype=np.uint16)
    result = opened(tmp_path, Image.fromarray(values), f"a.{suffix}")
    assert np.array_equal(result[..., 0], np.rint(values / 257))
    assert np.array_equal(result[..., 0], result[..., 2])


def test_sixteen_bit_grey_in_mode_i(tmp_path: Path) -> None:
    values = np.array([[0, 257 * 100, 65535]], dtype=np.int32)
    assert opened(tmp_path, Image.fromarray(values), "a.tif")[0, :, 0].tolist() == [0, 100, 255]


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    expected = [[200, 0, 0], [255, 255, 255], [204, 204, 204]]
    assert opened(tmp_path, Image.fromarray(rgba))[0].tolist() == expected
    la = Image.fromarray(rgba[..., [0, 3]])
    assert la.mode == "LA"
    assert opened(tmp_path, la)[0, :2].tolist() == [[200] * 3, [255] * 3]


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert opened(tmp_path, image)[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert opened(tmp_path, image, transparency=1)[0].tolist() == [[10, 20, 30], [255] * 3]


def test_cmyk(tmp_path: Path) -> None:
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    result = opened(tmp_path, image, "a.jpg", quality=100)
    assert np.abs(result.astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize(
    ("orientation", "method"),
    [
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_270),
        (8, Image.Transpose.ROTATE_90),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
    ],
)
def test_exif_rotation(tmp_path: Path, orientation: int, method: Image.Transpose) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(pixels)
    result = opened(tmp_path, image, exif=exif)
    assert np.array_equal(result, np.asarray(image.transpose(method)))


def test_file_object(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(buffer, "PNG")
    assert open_image(io.BytesIO(buffer.getvalue())).size == (3, 2)
    with pytest.raises(UnreadableImage, match=r"The image member\.jpg cannot be read"):
        open_image(io.BytesIO(b"nothing"), "member.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_truncated(tmp_path: Path, suffix: str, share: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UnreadableImage, match=f"a.{suffix} cannot be read: ") as raised:
        open_image(path)
    assert raised.value.name == str(path)


def test_missing_and_text(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="FileNotFoundError"):
        open_image(tmp_path / "no.jpg")
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(UnreadableImage, match="cannot identify"):
        open_image(tmp_path / "text.jpg")


@pytest.mark.parametrize("limit", [60, 30])  # Pillow warns above it and raises above twice
def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UnreadableImage, match="DecompressionBomb"):
        open_image(tmp_path / "a.png")


def test_numbers_without_a_range(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(UnreadableImage, match="floating-point pixels"):
        open_image(tmp_path / "f.tif")
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "i.tif")
    with pytest.raises(UnreadableImage, match="32-bit pixels"):
        open_image(tmp_path / "i.tif")


def test_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "truncated")))
    assert (error.name, error.reason) == ("a.jpg", "truncated")
    assert str(error) == "The image a.jpg cannot be read: truncated."


def test_jpegs_may_be_decoded_smaller(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 800).astype(np.uint8)
    image = Image.fromarray(np.stack([np.tile(ramp, (400, 1))] * 3, axis=-1))
    path = tmp_path / "a.jpg"
    image.save(path, quality=95)
    assert open_image(path).size == (800, 400)
    assert open_image(path, short_side=201).size == (800, 400)
    assert open_image(path, short_side=200).size == (400, 200)
    assert open_image(path, short_side=60).size == (200, 100)
    assert open_image(path, short_side=1).size == (100, 50)  # 1/8 is the smallest scale
    small = np.asarray(open_image(path, short_side=200), dtype=float)
    assert np.abs(small - np.asarray(image.reduce(2), dtype=float)).max() < 4


def test_smaller_decoding_keeps_rotation_and_other_formats(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 32), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "a.jpg", exif=exif)
    image.save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.jpg", short_side=16).size == (16, 32)
    assert open_image(tmp_path / "a.png", short_side=16).size == (64, 32)


def test_names_of_images() -> None:
    assert all(is_image(name) for name in ("a.jpg", "a.JPEG", "b/c.png", "x.y.webp"))
    assert not any(is_image(name) for name in ("a", "jpg", "a.txt", "a.jpg.part"))
