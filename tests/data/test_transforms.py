from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import timm.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fat.data.transforms import (
    DeviceCropTransform,
    EvalTransform,
    Normalize,
    RandomCropTransform,
    apply,
    crop_box,
)
from fat.models.float_model import Preprocessing
from fat.utils.errors import FatError
from fat.utils.random import generator

PREPROCESSING = Preprocessing(
    size=(64, 64),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bicubic",
    crop_pct=0.875,
    crop_mode="center",
)


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("shape", [(200, 90), (75, 150), (64, 64), (30, 40), (301, 299)])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"size": (64, 48)},
        {"interpolation": "bilinear", "crop_pct": 0.904},
        {"crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3},
    ],
)
def test_eval_is_bit_equal_to_timm(
    shape: tuple[int, int], mode: str, change: dict[str, object]
) -> None:
    p = replace(PREPROCESSING, crop_mode=mode, **change)  # type: ignore[arg-type]
    theirs = timm.data.create_transform(
        input_size=(3, *p.size),
        interpolation=p.interpolation,
        mean=p.mean,
        std=p.std,
        crop_pct=p.crop_pct,
        crop_mode=p.crop_mode,
    )
    image = picture(*shape)
    ours = apply(EvalTransform(p), image)
    assert ours.shape == (3, *p.size)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs(image))


def test_unknown_options() -> None:
    with pytest.raises(FatError, match=r"Unknown interpolation 'bicubik'. Did you mean 'bicubic'"):
        EvalTransform(replace(PREPROCESSING, interpolation="bicubik"))
    with pytest.raises(FatError, match=r"Unknown crop mode 'centre'. Did you mean 'center'"):
        EvalTransform(replace(PREPROCESSING, crop_mode="centre"))
    for scale in ((0.0, 1.0), (0.9, 0.3), (0.5, 1.5)):
        with pytest.raises(FatError, match=r"crop's scale is .*allowed"):
            RandomCropTransform(PREPROCESSING, scale)
    with pytest.raises(FatError, match=r"crop's ratio is .*allowed"):
        RandomCropTransform(PREPROCESSING, ratio=(2.0, 1.0))
    with pytest.raises(FatError, match=r"probability of a flip is 2"):
        RandomCropTransform(PREPROCESSING, flip=2)


@pytest.mark.parametrize("kind", [RandomCropTransform, DeviceCropTransform])
def test_random_crop_depends_on_the_key_alone(kind: type[RandomCropTransform]) -> None:
    transform, image = kind(PREPROCESSING), picture(100, 80)
    one = apply(transform, image, generator(0, 3, 5))
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(one, apply(transform, image, generator(0, 3, 5)))
    for key in ((1, 3, 5), (0, 4, 5), (0, 3, 6)):
        assert not torch.equal(one, apply(transform, image, generator(*key)))


WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


def test_mirroring() -> None:
    image = picture(64, 64)
    plain = apply(RandomCropTransform(PREPROCESSING, flip=0, **WHOLE), image)  # type: ignore[arg-type]
    mirrored = apply(RandomCropTransform(PREPROCESSING, flip=1, **WHOLE), image)  # type: ignore[arg-type]
    assert torch.equal(plain, apply(EvalTransform(replace(PREPROCESSING, crop_pct=1.0)), image))
    assert torch.equal(mirrored, plain.flip(-1))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_crops_are_resized_as_pillow_does(interpolation: str) -> None:
    """Pixels may differ by two levels of 255, as torch rounds its filter weights differently."""
    p = replace(PREPROCESSING, interpolation=interpolation, mean=(0.0,) * 3, std=(1.0,) * 3)
    image, rng = picture(200, 150), generator(4)
    left, top, w, h = crop_box(200, 150, generator(4), (0.35, 1.0), (3 / 4, 4 / 3))
    filters = {"bilinear": 2, "bicubic": 3, "lanczos": 1}
    expected = np.asarray(
        image.crop((left, top, left + w, top + h)).resize((64, 64), filters[interpolation])
    ).transpose(2, 0, 1)
    ours = apply(RandomCropTransform(p, flip=0), image, rng) * 255
    difference = np.abs(ours.numpy() - expected)
    assert difference.max() < 2.5
    assert difference.mean() < 0.5


def smooth(width: int, height: int) -> Image.Image:
    """Return an image without fine detail, for which all interpolations agree."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = np.stack([np.sin(7 * x + 3 * y), np.cos(5 * y - 2 * x), np.sin(4 * x * y)], axis=-1)
    return Image.fromarray((127.5 * (1 + waves)).astype(np.uint8))


def test_crops_on_the_device_show_the_same_part() -> None:
    image = smooth(200, 150)
    for seed in range(8):  # flipped and not flipped
        host = apply(RandomCropTransform(PREPROCESSING), image, generator(seed))
        device = apply(DeviceCropTransform(PREPROCESSING), image, generator(seed))
        assert host.shape == device.shape
        assert float((host - device).abs().max()) < 0.1  # about four standard deviations


def test_crops_of_a_batch_are_cut_one_by_one() -> None:
    transform, images = DeviceCropTransform(PREPROCESSING), [smooth(90, 70), smooth(70, 120)]
    drawn = [transform(image, generator(i)) for i, image in enumerate(images)]
    together = transform.finish(*(torch.stack(part) for part in zip(*drawn, strict=True)))
    for i, image in enumerate(images):
        alone = apply(transform, image, generator(i))
        assert torch.allclose(together[i], alone, atol=1e-5)


def test_the_decoder_may_leave_out_what_no_crop_needs() -> None:
    assert EvalTransform(PREPROCESSING).short_side is None
    side = RandomCropTransform(PREPROCESSING, (0.25, 1.0), (1.0, 1.0)).short_side
    assert side == 128  # the smallest crop of 128 x 128 has 64 x 64 pixels
    assert DeviceCropTransform(PREPROCESSING).short_side == 74  # ceil(64 * 8 / 7)
    with pytest.raises(FatError, match="side is 0"):
        DeviceCropTransform(PREPROCESSING, side=0)


def test_normalising_leaves_its_argument_alone() -> None:
    pixels = torch.full((1, 3, 2, 2), 255.0)
    result = Normalize(PREPROCESSING)(pixels)
    assert pixels.unique().tolist() == [255.0]
    expected = (1 - torch.tensor(PREPROCESSING.mean)) / torch.tensor(PREPROCESSING.std)
    assert torch.allclose(result[0, :, 0, 0], expected)


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    seed=st.integers(0, 1000),
    least=st.floats(0.05, 1.0),
)
def test_crop_box_lies_inside(width: int, height: int, seed: int, least: float) -> None:
    left, top, w, h = crop_box(width, height, generator(seed), (least, 1.0), (3 / 4, 4 / 3))
    assert 0 <= left <= left + w <= width
    assert 0 <= top <= top + h <= height
    assert w > 0
    assert h > 0


def test_crop_box_statistics() -> None:
    """The area is uniform (mean 0.3), the log ratio symmetric, and the position uniform."""
    boxes = np.array(
        [crop_box(1000, 1000, generator(i), (0.1, 0.5), (3 / 4, 4 / 3)) for i in range(3000)]
    )
    left, top, w, h = boxes.T
    area = w * h / 1e6
    assert 0.0995 <= area.min() <= area.max() <= 0.5005
    assert abs(area.mean() - 0.3) < 0.01
    assert abs(np.log(w / h).mean()) < 0.01
    assert np.abs(np.log(w / h)).max() <= np.log(4 / 3) + 0.01
    assert abs((left / (1000 - w)).mean() - 0.5) < 0.02
    assert abs((top / (1000 - h)).mean() - 0.5) < 0.02


def test_crop_box_of_a_strip_falls_back_to_the_middle() -> None:
    assert crop_box(1000, 30, generator(0), (0.9, 1.0), (3 / 4, 4 / 3)) == (480, 0, 40, 30)
    assert crop_box(30, 1000, generator(0), (0.9, 1.0), (3 / 4, 4 / 3)) == (0, 480, 30, 40)


def test_generator_refuses_negative_keys() -> None:
    with pytest.raises(FatError, match=r"must not be negative"):
        generator(-1, 0)


def test_normalization_after_the_first_batch_in_inference_mode() -> None:
    normalize = Normalize(PREPROCESSING)
    pixels = torch.full((1, 3, 2, 2), 51.0)
    with torch.inference_mode():
        wanted = normalize(pixels)
    pixels.requires_grad_()
    result = normalize(pixels)
    result.sum().backward()
    assert torch.equal(result.detach(), wanted)
    std = torch.tensor(PREPROCESSING.std).view(1, 3, 1, 1)
    torch.testing.assert_close(pixels.grad, (1 / (255 * std)).expand(1, 3, 2, 2))
    assert torch.equal(pixels.detach(), torch.full((1, 3, 2, 2), 51.0))


def test_workers_are_sent_no_tensors_of_the_device() -> None:
    normalize = Normalize(PREPROCESSING)
    pixels = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    wanted = normalize(pixels)
    sent = pickle.dumps(normalize)
    assert b"torch" not in sent
    assert torch.equal(pickle.loads(sent)(pixels), wanted)
