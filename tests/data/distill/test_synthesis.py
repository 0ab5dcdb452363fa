from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fat.data.distill import synthesis as distill_file
from fat.data.distill.synthesis import DistilledBatch, DistillSpec, distill, distilled_folder
from fat.data.sources.decoding import open_image
from fat.data.sources.folder import FolderSource
from fat.data.transforms import EvalTransform, apply
from fat.models.float_model import Preprocessing
from fat.utils.errors import FatError
from fat.utils.random import generator

# Mean and std of photographs, so that the batch norms' statistics can be matched.
HOW = Preprocessing((16, 16), (0.485, 0.456, 0.406), (0.275, 0.269, 0.27), "bicubic", 0.8, "center")
SPEC = DistillSpec(images=8, batch_size=4, coarse_steps=3, steps=2)
LONG = DistillSpec(images=24, coarse_steps=20, steps=40, lr=0.02, smoothness=0.01)


def run(network: nn.Module, spec: DistillSpec = SPEC, **options: Any) -> list[DistilledBatch]:
    how = options.pop("preprocessing", HOW)
    return list(distill(network, how, spec, progress=False, **options))


def pixels(network: nn.Module, spec: DistillSpec = SPEC, **options: Any) -> Tensor:
    return torch.cat([batch.images for batch in run(network, spec, **options)])


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def seen(images: Tensor, how: Preprocessing = HOW) -> Tensor:
    """Return the images as the evaluation transform crops them."""
    transform = EvalTransform(how)
    return torch.stack([apply(transform, picture) for picture in pictures(images)])


def errors_by_hand(network: nn.Module, x: Tensor) -> list[float]:
    """Compute the error of each batch norm in float64 from its definition."""
    found: list[float] = []

    def hook(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].double().transpose(0, 1).flatten(1)
        mean, std = values.mean(1), (values.var(1, correction=0) + norm.eps).sqrt()
        assert norm.running_var is not None
        wanted = (norm.running_var.double() + norm.eps).sqrt()
        errors = ((mean - norm.running_mean) / wanted) ** 2 + (std / wanted - 1) ** 2
        found.append(float(errors.mean()))

    probe = copy.deepcopy(network)
    for module in probe.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        probe(x)
    return found


@pytest.fixture
def trained(tiny: nn.Module, images: Tensor) -> nn.Module:
    """A network whose batch norms hold the exact statistics of images."""
    for module in tiny.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    tiny.train()(1.5 * images.tanh())
    return tiny.eval()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_real_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def test_statistics_come_near_those_of_the_batch_norms(trained: nn.Module) -> None:
    (batch,) = run(trained, LONG)
    found = errors_by_hand(trained, seen(batch.images))
    noise = torch.randint(0, 256, batch.images.shape, generator=torch.Generator().manual_seed(0))
    white = errors_by_hand(trained, seen(noise.to(torch.uint8)))
    assert len(found) == 7
    assert np.mean(found) < 0.1 * np.mean(white)
    assert max(found) < 0.2 * max(white)
    assert batch.error < 0.25 * batch.error_before
    # The pixels count as an eighth layer.
    x = seen(batch.images).double().transpose(0, 1).flatten(1)
    of_pixels = (x.mean(1) ** 2 + (x.std(1, correction=0) - 1) ** 2).mean()
    assert batch.error == pytest.approx((sum(found) + float(of_pixels)) / 8, rel=1e-3)


def test_evaluation_sees_the_pixels_as_they_are(tiny: nn.Module) -> None:
    images = pixels(tiny)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (HOW.mean, HOW.std))
    middle = (images[..., 2:18, 2:18] / 255 - mean) / std
    torch.testing.assert_close(seen(images), middle)


@pytest.mark.parametrize(
    ("size", "crop_pct", "canvas"),
    [((16, 16), 0.8, (20, 20)), ((16, 24), 1.0, (16, 24)), ((17, 15), 0.9, (18, 16))],
)
def test_shape_and_range(
    tiny: nn.Module, size: tuple[int, int], crop_pct: float, canvas: tuple[int, int]
) -> None:
    how = replace(HOW, size=size, crop_pct=crop_pct)
    images = pixels(tiny, replace(SPEC, images=5), preprocessing=how)
    assert images.dtype == torch.uint8
    assert images.shape == (5, 3, *canvas)
    assert images.min() < 40
    assert images.max() > 215
    assert seen(images, how).shape == (5, 3, *size)


def test_same_seed_same_pixels(tiny: nn.Module) -> None:
    first, again, other = pixels(tiny), pixels(tiny), pixels(tiny, seed=1)
    assert torch.equal(first, again)
    assert (first != other).float().mean() > 0.9
    assert len({image.numpy().tobytes() for image in first}) == len(first)


def test_a_batch_depends_on_its_number_alone(tiny: nn.Module) -> None:
    assert torch.equal(pixels(tiny), pixels(tiny, replace(SPEC, images=12))[:8])


def test_batches_are_even() -> None:
    sizes = [len(batch) for batch in DistillSpec(images=100, batch_size=32).batches]
    assert sizes == [25, 25, 25, 25]
    assert [len(batch) for batch in DistillSpec(images=1).batches] == [1]


def state_of(network: nn.Module) -> tuple[object, ...]:
    return (
        {name: value.clone() for name, value in network.state_dict().items()},
        [value.requires_grad for value in network.parameters()],
        [value.grad for value in network.parameters()],
        [module.training for module in network.modules()],
        [len(module._forward_pre_hooks) for module in network.modules()],
    )


def check_same(state: tuple[object, ...], other: tuple[object, ...]) -> None:
    torch.testing.assert_close(state[0], other[0], rtol=0, atol=0, equal_nan=True)
    assert state[1:] == other[1:]


def test_the_network_and_global_random_states_stay(tiny: nn.Module) -> None:
    tiny.classifier.requires_grad_(True)
    tiny.blocks[0].train()
    before, random = state_of(tiny), (torch.get_rng_state(), np.random.get_state()[1].copy())
    batches = distill(tiny, HOW, SPEC, progress=False)
    next(batches)
    check_same(state_of(tiny), before)  # between two batches
    list(batches)
    check_same(state_of(tiny), before)
    assert torch.equal(torch.get_rng_state(), random[0])
    assert np.array_equal(np.random.get_state()[1], random[1])


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            raise ZeroDivisionError
        return x


def test_the_network_stays_after_an_error(tiny: nn.Module) -> None:
    tiny.pool = nn.Sequential(tiny.pool, Breaks())
    tiny.requires_grad_(True).train()
    before = state_of(tiny)
    with pytest.raises(ZeroDivisionError):
        run(tiny)
    check_same(state_of(tiny), before)


def test_training_mode_and_no_grad_change_nothing(tiny: nn.Module) -> None:
    wanted = pixels(tiny)
    with torch.no_grad():
        assert torch.equal(pixels(tiny.train()), wanted)


def test_smoothness_and_classes_do_what_they_say(trained: nn.Module) -> None:
    with torch.no_grad():
        trained.classifier.weight.mul_(4)

    def roughness(images: Tensor) -> float:
        return float(distill_file.total_variation(images / 255))

    def confidence(images: Tensor) -> float:
        return float(trained(seen(images)).softmax(1).amax(1).mean())

    spec = DistillSpec(16, coarse_steps=0, steps=30, lr=0.05, class_weight=0.0, smoothness=0.0)
    plain = pixels(trained, spec)
    assert roughness(pixels(trained, replace(spec, smoothness=5.0))) < 0.6 * roughness(plain)
    assert confidence(pixels(trained, replace(spec, class_weight=1.0))) > confidence(plain) + 0.1


# ---------------------------------------------------------------- the pieces


def test_total_variation() -> None:
    image = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).expand(1, 3, 2, 2)
    assert float(distill_file.total_variation(image)) == 1.0
    assert float(distill_file.total_variation(image * 0)) == 0.0


def test_moments_and_their_gradients() -> None:
    x = torch.from_numpy(generator(0).standard_normal((3, 4, 5, 6))) + 2
    same, mean, mean_square = distill_file._moments(x)
    assert torch.equal(same, x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(mean_square - mean**2, x.var((0, 2, 3), correction=0))
    assert torch.autograd.gradcheck(distill_file._moments, x.requires_grad_())


def test_noise_has_the_spectrum_of_photographs() -> None:
    noise = distill_file.pyramid_noise(32, 32, 32, generator(0))
    assert noise.std((1, 2, 3)).numpy() == pytest.approx(np.ones(32), abs=1e-4)
    power = torch.fft.rfft2(noise)[..., 0, :].abs().square().mean((0, 1))
    # As in photographs, power falls with the square of the frequency.
    assert float(power[2] / power[8]) == pytest.approx(16, rel=0.6)
    channels = noise.transpose(0, 1).flatten(1)
    assert float(torch.corrcoef(channels)[0, 1]) > 0.8


def test_views_lie_inside_and_are_of_the_networks_size() -> None:
    ramp = torch.linspace(0, 1, 20).expand(2, 3, 20, 20)
    views = [distill_file.random_view(ramp, (16, 16), generator(0, i)) for i in range(40)]
    assert {tuple(view.shape) for view in views} == {(2, 3, 16, 16)}
    rises = [bool(view[0, 0, 0, -1] > view[0, 0, 0, 0]) for view in views]
    assert 8 < sum(rises) < 32  # flipped about half of the time
    assert len({float(view.sum()) for view in views}) > 15


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, r"data\.distill\.images is 0; .*from 1 to .*data\.distill\.images=192"),
        ({"images": 2.5}, r"data\.distill\.images is 2\.5; allowed are whole numbers from 1"),
        ({"images": True}, r"data\.distill\.images is True"),
        ({"batch_size": 0}, r"data\.distill\.batch_size is 0"),
        (
            {"coarse_steps": -1},
            r"data\.distill\.coarse_steps is -1; .*from 0, as in data\.distill\.coarse_steps=60",
        ),
        ({"steps": 0}, r"data\.distill\.steps is 0"),
        ({"lr": 0.0}, r"data\.distill\.lr is 0\.0; allowed are numbers above 0 and up to 1"),
        ({"lr": float("nan")}, r"data\.distill\.lr is nan"),
        (
            {"smoothness": -0.1},
            r"data\.distill\.smoothness is -0\.1; allowed are numbers from 0, as in",
        ),
        ({"class_weight": float("inf")}, r"data\.distill\.class_weight is inf"),
    ],
)
def test_spec_is_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FatError, match=message):
        DistillSpec(**options)


@pytest.mark.parametrize(
    "norm", [nn.Identity(), nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4)]
)
def test_without_statistics(norm: nn.Module, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(FatError, match=r"has none .*data=photos or data=folder data\.root=DIR"):
        distill(network, HOW, SPEC)
    with pytest.raises(FatError, match="has none "):
        distilled_folder(network, HOW, SPEC, folder=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_damaged_weights(tiny: nn.Module) -> None:
    tiny.stem.weight.data[0] = float("nan")
    with pytest.raises(FatError, match=r"not finite.*model\.weights=FILE"):
        run(tiny)


def test_a_network_of_one_size() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 4, stride=4, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5)
    )
    with pytest.raises(FatError, match=r"does not accept images \[1, 3, 8, 8\].*coarse_steps=0"):
        distill(network, HOW, SPEC)
    assert len(pixels(network, replace(SPEC, coarse_steps=0))) == 8
    with pytest.raises(FatError, match=r"returns \[1, 4, 4, 4\] for one image, not logits"):
        distill(network[:2], HOW, SPEC)


# ---------------------------------------------------------------- the folder


def files(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def keep(network: nn.Module, folder: Path | None, **options: Any) -> Path:
    spec = options.pop("spec", SPEC)
    return distilled_folder(network, HOW, spec, folder=folder, progress=False, **options)


class Counted:
    """Counts the computed batches, and is interrupted before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
        self.made: list[int] = []
        self.stop_at = stop_at
        make = distill_file._Distiller.batch

        def batch(distiller: Any, number: int, bar: Any) -> DistilledBatch:
            if number == self.stop_at:
                raise KeyboardInterrupt
            self.made.append(number)
            return make(distiller, number, bar)

        monkeypatch.setattr(distill_file._Distiller, "batch", batch)


def test_the_folder_holds_the_images(tiny: nn.Module, tmp_path: Path) -> None:
    folder = keep(tiny, tmp_path / "set")
    assert folder == tmp_path / "set" / "images"
    source = FolderSource(folder)
    assert [source.name(i) for i in range(len(source))] == [f"{i:05d}.png" for i in range(8)]
    assert not source.labelled
    loaded = torch.stack([torch.from_numpy(np.array(source.load(i))) for i in range(8)])
    assert torch.equal(loaded.permute(0, 3, 1, 2), pixels(tiny))
    with open_image(tmp_path / "set" / "contact_sheet.png") as sheet:
        assert sheet.size == (8 * 96, 96)
        assert len(sheet.getcolors(100_000) or []) > 500
    report = json.loads((tmp_path / "set" / "distilled.json").read_text())
    assert report["seed"] == 0
    assert DistillSpec(**report["spec"]) == SPEC
    batches = run(tiny)
    assert report["error"] == pytest.approx(np.mean([batch.error for batch in batches]))


def test_the_second_call_makes_nothing(
    tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = keep(tiny, tmp_path / "set")
    before = files(tmp_path)
    counted = Counted(monkeypatch)
    assert keep(tiny, tmp_path / "set") == first
    assert counted.made == []
    assert files(tmp_path) == before


def test_an_interrupted_run_goes_on(
    tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(SPEC, images=12)
    keep(tiny, tmp_path / "whole", spec=spec)
    counted = Counted(monkeypatch, stop_at=1)
    with pytest.raises(KeyboardInterrupt):
        keep(tiny, tmp_path / "part", spec=spec)
    part = tmp_path / "part"
    assert not (part / "distilled.json").exists()
    assert len(list((part / "images").iterdir())) == 4
    # As if interrupted while writing the second batch.
    (part / "images" / "00004.png").write_bytes(b"half of an image")
    (part / "images" / ".00005.png.tmp").write_bytes(b"")
    counted.stop_at = None
    keep(tiny, part, spec=spec)
    assert counted.made == [0, 1, 2]
    (part / "images" / ".00005.png.tmp").unlink()
    assert files(part) == files(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["missing", "cut", "one bit", "record"])
def test_damaged_images_are_made_again(
    damage: str,
    tiny: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = keep(tiny, tmp_path / "set")
    before = files(tmp_path)
    file = folder / "00005.png"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-40])
    elif damage == "one bit":
        file.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    else:
        (tmp_path / "set" / "batches" / "0001.json").write_text("{")
    counted = Counted(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="fat"):
        keep(tiny, tmp_path / "set")
    assert counted.made == [1]
    assert files(tmp_path) == before
    assert "Recomputing batches [1] of" in caplog.text
    assert "their images are damaged" in caplog.text


def test_a_missing_sheet_is_drawn_again(
    tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tiny, tmp_path / "set")
    before = files(tmp_path)
    (tmp_path / "set" / "contact_sheet.png").unlink()
    counted = Counted(monkeypatch)
    keep(tiny, tmp_path / "set")
    assert counted.made == []
    assert files(tmp_path) == before


def test_another_process_may_be_faster(
    tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = distill_file._Distiller.batch

    def batch(distiller: Any, number: int, bar: Any) -> DistilledBatch:
        with monkeypatch.context() as inner:
            inner.setattr(distill_file._Distiller, "batch", make)
            keep(tiny, tmp_path / "set")  # the other process computes all batches meanwhile
        made = make(distiller, number, bar)
        return replace(made, images=255 - made.images)  # as if its rounding differed

    monkeypatch.setattr(distill_file._Distiller, "batch", batch)
    folder = keep(tiny, tmp_path / "set")
    loaded = np.stack([np.array(open_image(path)) for path in sorted(folder.iterdir())])
    monkeypatch.undo()
    assert np.array_equal(loaded.transpose(0, 3, 1, 2), pixels(tiny).numpy())


def test_the_cache_has_a_folder_for_each_request(tiny: nn.Module, cache: Path) -> None:
    spec = replace(SPEC, images=2, coarse_steps=0, steps=1)

    def place(network: nn.Module, how: Preprocessing = HOW, seed: int = 0, **changes: Any) -> Path:
        return distilled_folder(network, how, replace(spec, **changes), seed=seed, progress=False)

    folder = place(tiny)
    assert folder.parent.parent == cache / "fat" / "distilled"
    assert place(copy.deepcopy(tiny)) == folder
    changed = copy.deepcopy(tiny)
    changed.bn.running_mean[0] += 1e-3
    relu = copy.deepcopy(tiny)
    relu.act = nn.ReLU()
    others = [
        place(changed),
        place(relu),
        place(tiny, seed=1),
        place(tiny, lr=0.02),
        place(tiny, replace(HOW, crop_pct=1.0)),
    ]
    assert len({folder, *others}) == 6


def test_folders_of_others_are_refused(tiny: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(FatError, match="holds other files"):
        keep(tiny, tmp_path / "mine")
    with pytest.raises(FatError, match="is a file"):
        keep(tiny, tmp_path / "mine" / "holiday.jpg")
    folder = keep(tiny, tmp_path / "set")
    with pytest.raises(FatError, match="another network or with other settings"):
        keep(tiny, tmp_path / "set", seed=1)
    (folder / "stranger.png").write_bytes(b"x")
    with pytest.raises(FatError, match=r"did not write: stranger\.png.*Move them elsewhere"):
        keep(tiny, tmp_path / "set")
