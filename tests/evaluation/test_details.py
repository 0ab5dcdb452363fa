"""Statistics of layers against values computed by hand, and descriptions of images."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fat
from fat import EqualizeSpec, FatError, QuantSpec, Student
from fat.evaluation.details import (
    LayerRow,
    example,
    filter_changes,
    layer_rows,
    picture,
    write_details,
)
from fat.evaluation.evaluator import Disagreement, Disagreements
from fat.models.float_model import Preprocessing
from fat.quant.quantizers import ActivationQuantizer

DOCS = (Path(__file__).parents[2] / "docs/metrics.md").read_text(encoding="utf-8")
PREPROCESSING = Preprocessing(
    (16, 16), (0.5, 0.4, 0.3), (0.25, 0.2, 0.5), "bicubic", 0.875, "center"
)


class Pick(nn.Module):
    """Passes the first channel through ReLU6, so that the input of each quantizer is known."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1, bias=False)
        self.conv.weight.data = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
        self.act = nn.ReLU6()
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight.data = torch.tensor([[1.0, 0.5], [0.25, -2.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.act(self.conv(x)), 1))


def pick(values: list[float], **options: Any) -> tuple[Student, Tensor]:
    """Return a student of Pick with 2-bit activations after ReLU6, and images of two pixels."""
    images = torch.zeros(len(values) // 2, 3, 1, 2)
    images[:, 0, 0] = torch.tensor(values).view(-1, 2)
    spec = QuantSpec(activation_bits=2, first_bits=8, **options)
    student = fat.prepare(Pick().eval(), images, spec)
    fat.calibrate(student, images)
    for quantizer in student.activation_quantizers():  # the step size of the input is 0.2
        if quantizer.layer == "input":
            quantizer.thresholds.set_range(torch.tensor(0.0), torch.tensor(0.2 * 255))
    return student, images


def of_relu6(student: Student) -> ActivationQuantizer:
    (quantizer,) = [q for q in student.activation_quantizers() if q.activation is not None]
    assert quantizer.grid.bits == 2
    return quantizer


def row(student: Student, images: Tensor, layer: str, kind: str) -> LayerRow:
    rows, _ = layer_rows(student, images)
    (found,) = [entry for entry in rows if (entry.layer, entry.kind) == (layer, kind)]
    return found


def noisy(values: list[float], on_grid: list[float]) -> float:
    noise = sum((x - q) ** 2 for x, q in zip(values, on_grid, strict=True))
    return 10 * math.log10(sum(x * x for x in values) / noise)


# ------------------------------------------------------------------------------------ layers.csv


def test_an_activation_by_hand() -> None:
    student, images = pick([0.0, 1.0, 2.4, 3.4, 3.6, 7.0])
    quantizer = of_relu6(student)
    quantizer.thresholds.set_range(torch.tensor(0.0), torch.tensor(6.0))
    quantizer.thresholds.alpha.data.fill_(0.5)  # the grid is 0, 1, 2, 3
    found = row(student, images, quantizer.layer, "activation")
    # ReLU6 turns 7 into 6. Of the values, 3.6 and 6 are beyond 3.5, half a step past the grid.
    assert found.sqnr_db == pytest.approx(
        noisy([0.0, 1.0, 2.4, 3.4, 3.6, 6.0], [0, 1, 2, 3, 3, 3]), abs=1e-4
    )
    assert found.saturated == pytest.approx(2 / 6)
    assert (found.threshold_before, found.threshold_after) == (6.0, 3.0)
    assert found.alpha_mean == found.alpha_min == found.alpha_max == 0.5
    assert found.alpha_at_edge == 1.0
    assert (found.kind, found.bits, found.thresholds) == ("activation", 2, 1)


def test_what_relu6_clips_is_not_saturation() -> None:
    student, images = pick([0.0, 2.0, 4.0, 6.0, 50.0, 9.0])
    quantizer = of_relu6(student)
    quantizer.thresholds.set_range(torch.tensor(0.0), torch.tensor(6.0))
    found = row(student, images, quantizer.layer, "activation")
    assert found.saturated == 0.0
    assert found.sqnr_db > 100  # 0, 2, 4 and 6 are the grid


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_a_weight_by_hand(granularity: str) -> None:
    student, images = pick([0.0, 1.0], weights="frozen", granularity=granularity)
    head = student.layers()[-1]
    head.weight_quantizer.thresholds.alpha.data.fill_(0.75)
    found = row(student, images, "head", "weight")
    highs = [1.0, 2.0] if granularity == "per_channel" else [2.0, 2.0]
    values, on_grid, beyond = [], [], 0
    for weights, high in zip([[1.0, 0.5], [0.25, -2.0]], highs, strict=True):
        step = 0.75 * high / 127
        for weight in weights:
            integer = round(weight / step)
            beyond += abs(integer) > 127
            values.append(weight)
            on_grid.append(step * max(-127, min(127, integer)))
    assert beyond == (2 if granularity == "per_channel" else 1)
    assert found.saturated == beyond / 4
    assert found.sqnr_db == pytest.approx(noisy(values, on_grid), abs=1e-3)
    assert found.thresholds == (2 if granularity == "per_channel" else 1)
    assert found.threshold_before == pytest.approx(2.0)
    assert found.threshold_after == pytest.approx(1.5)
    assert found.alpha_at_edge == 0.0


def test_factors_of_weights_count_as_the_weight_and_those_of_rounding_do_not() -> None:
    student, images = pick([0.0, 1.0], weights="scale")
    head = student.layers()[-1]
    head.factor.data.fill_(1.25)  # every weight is a quarter step off its grid
    found = row(student, images, "head", "weight")
    adjusted = [1.25, 0.625, 0.3125, -2.5]
    grid = [1 / 127, 1 / 127, 2 / 127, 2 / 127]
    on_grid = [d * max(-127, min(127, round(w / d))) for w, d in zip(adjusted, grid, strict=True)]
    assert found.sqnr_db == pytest.approx(noisy(adjusted, on_grid), abs=1e-3)
    assert found.saturated == 0.5

    student, images = pick([0.0, 1.0], weights="adaround")
    student.layers()[-1].factor.data.fill_(-1.0)  # each weight is one integer lower
    found = row(student, images, "head", "weight")
    plain = [1.0, 0.5, 0.25, -2.0]
    on_grid = [d * max(-127, min(127, round(w / d - 1))) for w, d in zip(plain, grid, strict=True)]
    assert found.sqnr_db == pytest.approx(noisy(plain, on_grid), abs=1e-3)
    assert found.saturated == 0.0


KINDS = [
    {},
    {"scheme": "symmetric", "granularity": "per_tensor"},
    {"thresholds": "lsq"},
    {"thresholds": "tqt", "power_of_two": True},
    {"thresholds": "tqt", "scheme": "symmetric", "power_of_two": True, "granularity": "per_tensor"},
    {"thresholds": "frozen", "weights": "frozen"},
    {"weights": "adaround"},
    {"bits": 4, "equalize": EqualizeSpec("exact")},
]


@pytest.fixture(params=KINDS, ids=lambda options: "-".join(map(str, options.values())) or "default")
def trained(tiny: nn.Module, images: Tensor, request: pytest.FixtureRequest) -> Student:
    student = fat.prepare(tiny, images, QuantSpec(**{"bits": 6, **request.param}))
    fat.calibrate(student, images)
    with torch.no_grad():  # as after training
        generator = torch.Generator().manual_seed(2)
        for thresholds in student.thresholds():
            if thresholds.alpha is not None:
                low, high = (-0.7, 0.0) if thresholds.kind == "tqt" else (0.5, 1.0)
                thresholds.alpha.uniform_(low, high, generator=generator)
        for layer in student.layers():
            if layer.factor is not None:
                low, high = layer._bounds
                layer.factor.uniform_(low, high, generator=generator)
    return student


def test_every_row_equals_brute_force(trained: Student, images: Tensor) -> None:
    """Capture each tensor at its quantizer in a separate pass, and evaluate it in float64."""
    rows, histograms = layer_rows(trained, images)
    assert [(r.layer, r.kind) for r in rows] == [(n, k) for n, k, _ in trained.quantizers()]
    layers = {layer.layer: layer for layer in trained.layers()}
    for found, (name, kind, quantizer) in zip(rows, trained.quantizers(), strict=True):
        thresholds = quantizer.thresholds
        scale, zero = (t.detach().double() for t in thresholds())
        if kind == "weight":
            layer = layers[name]
            exact = layer.weight if trained.spec.weights == "adaround" else layer.adjusted_weight()
            on_grid = layer.quantized()[0]
            if scale.dim():
                scale, zero = (t.reshape(-1, *[1] * (exact.dim() - 1)) for t in (scale, zero))
        else:
            caught: list[tuple[Tensor, Tensor]] = []
            handle = quantizer.register_forward_hook(
                lambda _, given, out, caught=caught: caught.append((given[0].clone(), out.clone()))
            )
            with torch.no_grad():
                trained.network(images.contiguous(memory_format=torch.channels_last))
            handle.remove()
            ((given, on_grid),) = caught
            exact = given if quantizer.activation is None else quantizer.activation(given)
        exact, on_grid = exact.detach().double(), on_grid.detach().double()
        noise = float((exact - on_grid).square().sum())
        assert found.sqnr_db == pytest.approx(
            10 * math.log10(float(exact.square().sum()) / noise), abs=1e-3
        )
        low = scale * (quantizer.grid.qmin - zero)
        high = scale * (quantizer.grid.qmax - zero)
        beyond = (exact < low - scale / 2) | (exact > high + scale / 2)
        assert found.saturated == pytest.approx(float(beyond.double().mean()), abs=1e-4)
        assert found.threshold_after == pytest.approx(
            float(torch.maximum(low.abs(), high.abs()).max()), rel=1e-5
        )
        alpha = thresholds.factors().get("alpha")
        if trained.spec.thresholds == "frozen":
            assert alpha is None
            assert found.alpha_mean is None
            assert found.alpha_at_edge is None
            assert found.threshold_after == found.threshold_before
        else:
            assert found.alpha_mean == pytest.approx(float(alpha.mean()))
            assert found.alpha_min == float(alpha.min())
            assert found.alpha_max == float(alpha.max())
            assert 0.0 <= found.alpha_at_edge <= 1.0
    assert len(histograms) == 6


def test_before_is_what_calibration_left(tiny: nn.Module, images: Tensor) -> None:
    powers = {"thresholds": "tqt", "power_of_two": True, "scheme": "symmetric"}
    for options in ({}, powers):
        student = fat.prepare(tiny, images, QuantSpec(**options))
        fat.calibrate(student, images)
        calibrated = [r.threshold_after for r in layer_rows(student, images)[0]]
        with torch.no_grad():
            for thresholds in student.thresholds():
                thresholds.alpha.add_(-0.4 if not options else -1.0)
        rows, _ = layer_rows(student, images)
        assert [r.threshold_before for r in rows] == calibrated
        assert all(r.threshold_after < r.threshold_before for r in rows)
        if options:  # a step of half the size, a range of half the size
            assert [r.threshold_after for r in rows] == [0.5 * value for value in calibrated]


def test_factors_at_an_end_of_their_range(tiny: nn.Module, images: Tensor) -> None:
    student = fat.prepare(tiny, images)
    fat.calibrate(student, images)
    layer = student.layers()[0]
    layer.weight_quantizer.thresholds.alpha.data = torch.tensor(
        [0.5, 0.5 + 5e-7, 0.6, 0.7, 0.8, 1 - 5e-7, 1.0, 0.99]
    )
    assert row(student, images, layer.layer, "weight").alpha_at_edge == 0.5


# ------------------------------------------------------------------------------------ histograms


def test_histograms_are_of_the_worst_and_hold_every_value(trained: Student, images: Tensor) -> None:
    rows, histograms = layer_rows(trained, images)
    ordered = sorted(rows, key=lambda entry: entry.sqnr_db)
    assert [round(r.sqnr_db, 3) for r in ordered[:6]] == [h.sqnr_db for h in histograms]
    sizes = {("weight", layer.layer): layer.weight.numel() for layer in trained.layers()}
    for histogram in histograms:
        assert len(histogram.edges) == len(histogram.counts) + 1 == 101
        assert histogram.edges == sorted(histogram.edges)
        if histogram.kind == "weight":
            assert sum(histogram.counts) == sizes["weight", histogram.layer]
        else:
            assert sum(histogram.counts) % len(images) == 0
            assert histogram.unit == "value"
        for low, high in (histogram.before, histogram.after):
            assert histogram.edges[0] <= low <= 0 <= high <= histogram.edges[-1]
        vector = trained.spec.granularity == "per_channel" and histogram.kind == "weight"
        assert histogram.unit == ("threshold" if vector else "value")
        if vector:
            assert histogram.before == (-1.0, 1.0)


def test_a_histogram_by_hand() -> None:
    student, images = pick([0.0, 1.0], weights="frozen")
    head = student.layers()[-1].weight_quantizer.thresholds
    head.alpha.data = torch.tensor([0.5, 0.7])
    _, histograms = layer_rows(student, images, worst=9)
    (found,) = [h for h in histograms if (h.layer, h.kind) == ("head", "weight")]
    # Rows (1, 0.5) and (0.25, −2) in units of their thresholds 1 and 2: 1, 0.5, 0.125, −1.
    width = 2 / 100
    expected = [0] * 100
    for value in (1.0, 0.5, 0.125, -1.0):
        expected[min(99, int((value + 1) / width))] += 1
    assert found.counts == expected
    assert found.edges == pytest.approx([-1 + 0.02 * index for index in range(101)])
    assert found.after == pytest.approx((-0.6, 0.6))


def test_a_network_that_broke_down_is_still_described(
    tiny: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    student = fat.prepare(tiny, images)
    fat.calibrate(student, images)
    student.layers()[0].bias.data[0] = math.nan
    student.layers()[1].weight_quantizer.thresholds.alpha.data[0] = math.nan
    differing = Disagreements()
    differing.update(
        images[:1], torch.full((1, 10), math.nan), torch.arange(10.0)[None], torch.tensor([-1])
    )
    write_details(tmp_path, student, images, differing)
    content = json.loads((tmp_path / "details.json").read_text())
    assert content["histograms"]
    assert content["examples"][0]["quantized"] == []


# ---------------------------------------------------------------------------------- equalization


def test_filters_that_equalization_changed(tiny: nn.Module, images: Tensor) -> None:
    plain = fat.prepare(tiny, images)
    assert filter_changes(plain) == []
    student = fat.prepare(tiny, images, QuantSpec(equalize=EqualizeSpec("cross_layer")))
    assert student.report is not None
    assert student.report.equalize is not None
    pairs = student.report.equalize.pairs
    found = {entry.layer: entry for entry in filter_changes(student)}
    assert found.keys() == {name for pair in pairs for name in (pair.first, pair.following)}
    for layer in student.layers():
        if layer.layer not in found:
            continue
        entry = found[layer.layer]
        teacher = student.teacher.get_submodule(layer.layer).weight
        for values, weight in ((entry.before, teacher), (entry.after, layer.weight)):
            assert values == pytest.approx(
                [float(filter_.abs().max()) for filter_ in weight], rel=1e-3
            )
        assert entry.before != entry.after


def test_filters_of_a_student_that_was_loaded(
    tiny: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    student = fat.prepare(tiny, images, QuantSpec(equalize=EqualizeSpec("depthwise")))
    fat.calibrate(student, images)
    fat.save(student, tmp_path / "student.safetensors")
    loaded = fat.load(tmp_path / "student.safetensors")
    assert filter_changes(loaded) == filter_changes(student) != []


# -------------------------------------------------------------------------------------- examples


def test_the_surest_differing_images_are_kept() -> None:
    reference = torch.zeros(12, 3)
    logits = torch.zeros(12, 3)
    for index in range(12):
        reference[index, 0] = index  # increasingly confident of class 0
        logits[index, index % 2] = 1.0  # odd ones are classified as class 1
    images = torch.arange(12.0).view(12, 1, 1, 1).expand(12, 3, 2, 2)
    labels = torch.full((12,), -1)
    labels[7] = 2
    whole, parts = Disagreements(keep=3), Disagreements(keep=3)
    whole.update(images, logits, reference, labels)
    for rows in (slice(0, 5), slice(5, 10), slice(10, 12)):
        parts.update(images[rows], logits[rows], reference[rows], labels[rows])
    joined, second = Disagreements(keep=3), Disagreements(keep=3)
    joined.update(images[:7], logits[:7], reference[:7], labels[:7])
    second.update(images[7:], logits[7:], reference[7:], labels[7:])
    joined.add(second)
    for collected in (whole, parts, joined):
        assert (collected.images, collected.differing) == (12, 6)
        assert [entry.position for entry in collected.kept] == [11, 9, 7]
        assert [entry.label for entry in collected.kept] == [-1, -1, 2]
        assert [float(entry.image.mean()) for entry in collected.kept] == [11, 9, 7]
        for entry in collected.kept:
            p = math.exp(entry.position) / (math.exp(entry.position) + 2)
            assert entry.confidence == pytest.approx(p)
            assert entry.image.untyped_storage().nbytes() == 4 * entry.image.numel()


def test_equal_confidence_keeps_the_order_of_the_images() -> None:
    collected = Disagreements(keep=2)
    for _ in range(3):
        collected.update(
            torch.zeros(2, 3, 1, 1),
            torch.tensor([[0.0, 1.0]] * 2),
            torch.tensor([[1.0, 0.0]] * 2),
            torch.tensor([-1, -1]),
        )
    assert [entry.position for entry in collected.kept] == [0, 1]
    assert collected.differing == 6


def test_collecting_does_not_change_what_evaluate_gives(
    tiny: nn.Module, images: Tensor, batches: list[Tensor]
) -> None:
    student = fat.prepare(tiny, images, QuantSpec(weight_bits=2))
    fat.calibrate(student, images)
    plain = fat.evaluate(student, batches)
    differing = Disagreements()
    collected = fat.evaluate(student, batches, differing=differing)
    for figures in (plain, collected):
        del figures["seconds"]
    assert collected == plain
    assert differing.images == 16
    share = 100 * (1 - differing.differing / 16)
    assert share == pytest.approx(plain["quantized"]["agreement"])
    for entry in differing.kept:
        with torch.no_grad():
            image = images[entry.position][None]
            assert torch.allclose(student.float_logits(image)[0], entry.reference, atol=1e-5)
            assert int(student(image).argmax()) != int(entry.reference.argmax())
        assert torch.equal(entry.image, images[entry.position])


def entry(image: Tensor, label: int = -1) -> Disagreement:
    reference, logits = torch.tensor([2.0, 0.0, 1.0, -9.0]), torch.tensor([0.0, 3.0, 1.0, -9.0])
    return Disagreement(4, image, label, reference, logits, 0.665)


def decoded(url: str) -> Image.Image:
    kind, _, data = url.partition(",")
    assert kind == "data:image/jpeg;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert shown.format == "JPEG"
    return shown.convert("RGB")


def test_an_example_by_hand() -> None:
    colour = torch.tensor([0.9, 0.2, 0.6])
    mean, std = torch.tensor(PREPROCESSING.mean), torch.tensor(PREPROCESSING.std)
    image = ((colour - mean) / std).view(3, 1, 1).expand(3, 200, 320)
    classes = ["cat", "dog", "<b>", "fish"]
    names = ["a", "b", "c", "d", "photo.png"]
    shown = example(entry(image, label=3), classes, PREPROCESSING, names)
    assert shown["name"] == "photo.png"
    assert shown["label"] == "fish"
    total = math.exp(2) + 1 + math.exp(1) + math.exp(-9)
    assert shown["float"] == [
        {"class": "cat", "p": round(math.exp(2) / total, 4)},
        {"class": "<b>", "p": round(math.exp(1) / total, 4)},
        {"class": "dog", "p": round(1 / total, 4)},
    ]
    assert [guess["class"] for guess in shown["quantized"]] == ["dog", "<b>", "cat"]
    picture_shown = decoded(shown["image"])
    assert picture_shown.size == (160, 100)
    for red, green, blue in (picture_shown.getpixel((x, 50)) for x in (0, 80, 159)):
        assert (red, green, blue) == pytest.approx((0.9 * 255, 0.2 * 255, 0.6 * 255), abs=4)


def test_without_names_labels_or_preprocessing() -> None:
    image = torch.linspace(-3, 5, 3 * 8 * 8).view(3, 8, 8)
    shown = example(entry(image), ["0", "1", "2", "3"], None)
    assert shown["name"] == "image 4"
    assert shown["label"] is None
    assert decoded(shown["image"]).size == (8, 8)  # never enlarged
    values = torch.frombuffer(bytearray(picture(image, None).tobytes()), dtype=torch.uint8)
    assert (int(values.min()), int(values.max())) == (0, 255)
    assert picture(torch.zeros(3, 2, 2), None).getpixel((0, 0)) == (0, 0, 0)


# ------------------------------------------------------------------------------------- the files


@pytest.fixture
def origin() -> dict[str, Any]:
    return {
        "name": "tiny",
        "weights": "random",
        "num_classes": 10,
        "classes": [f"class {index}" for index in range(10)],
        "preprocessing": PREPROCESSING.to_dict(),
    }


def test_the_files_of_a_run(trained: Student, images: Tensor, tmp_path: Path, origin: Any) -> None:
    trained.origin = origin
    differing = Disagreements()
    labels = torch.arange(16) % 10
    fat.evaluate(trained, [(images, labels)], differing=differing)
    rows, _ = layer_rows(trained, images)
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    trained.train()
    quantizers = [quantizer for _, _, quantizer in trained.quantizers()]
    quantizers[3].enabled = False
    names = [f"{index}.png" for index in range(16)]
    write_details(tmp_path, trained, (images, labels), differing, names=names)

    after = trained.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert trained.training
    assert [quantizer.enabled for quantizer in quantizers].count(False) == 1
    assert not quantizers[3].enabled
    assert not any(q._forward_hooks for q in quantizers)
    assert all(parameter.grad is None for parameter in trained.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["details.json", "layers.csv"]

    written = list(csv.DictReader((tmp_path / "layers.csv").open()))
    assert list(written[0]) == list(LayerRow.__dataclass_fields__)
    assert len(written) == len(rows)
    for cells, expected in zip(written, rows, strict=True):
        for name, text in cells.items():
            value = getattr(expected, name)
            if value is None:
                assert text == ""
            elif isinstance(value, str):
                assert text == value
            else:
                assert float(text) == pytest.approx(value, rel=1e-4, abs=1e-9)

    content = json.loads((tmp_path / "details.json").read_text(encoding="utf-8"))
    assert list(content) == ["histograms", "filters", "examples", "images", "differing"]
    assert (content["images"], content["differing"]) == (16, differing.differing)
    assert len(content["examples"]) == min(8, differing.differing)
    for shown, kept in zip(content["examples"], differing.kept, strict=True):
        assert shown["name"] == names[kept.position]
        assert shown["label"] == f"class {kept.position % 10}"
        assert shown["float"][0]["class"] != shown["quantized"][0]["class"]
        pixels = decoded(shown["image"]).getpixel((8, 8))
        wanted = (images[kept.position][:, 8, 8] * torch.tensor(PREPROCESSING.std)) + torch.tensor(
            PREPROCESSING.mean
        )
        assert pixels == pytest.approx((255 * wanted).clamp(0, 255).tolist(), abs=60)


def test_the_same_twice(tiny: nn.Module, images: Tensor, tmp_path: Path) -> None:
    written = []
    for folder in ("one", "two"):
        student = fat.prepare(tiny, images, QuantSpec(weight_bits=3))
        fat.calibrate(student, images)
        differing = Disagreements()
        fat.evaluate(student, list(images.split(5)), differing=differing)
        write_details(tmp_path / folder, student, images, differing)
        written.append(
            [(tmp_path / folder / name).read_bytes() for name in ("layers.csv", "details.json")]
        )
    assert written[0] == written[1]


def test_without_evaluation_and_without_origin(
    tiny: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    student = fat.prepare(tiny, images)
    fat.calibrate(student, images)
    write_details(tmp_path, student, images)
    content = json.loads((tmp_path / "details.json").read_text(encoding="utf-8"))
    assert content["examples"] == []
    assert content["images"] is None
    assert content["differing"] is None


def test_what_is_refused(tiny: nn.Module, images: Tensor, tmp_path: Path) -> None:
    student = fat.prepare(tiny, images)
    with pytest.raises(FatError, match="not calibrated"):
        write_details(tmp_path, student, images)
    fat.calibrate(student, images)
    with pytest.raises(FatError, match="holds no image"):
        write_details(tmp_path, student, images[:0])
    with pytest.raises(FatError, match=r"\[3, 16, 16\]"):
        write_details(tmp_path, student, images[0])
    assert list(tmp_path.iterdir()) == []


def test_every_field_is_documented() -> None:
    missing = [name for name in LayerRow.__dataclass_fields__ if f"`{name}`" not in DOCS]
    assert missing == []
    for key in ("histograms", "filters", "examples", "images", "differing", "unit", "edges"):
        assert f"`{key}`" in DOCS
