"""Lowering of a student to integers: values, types, and rejected networks."""

from __future__ import annotations

import pytest
import timm.layers
import torch
from torch import fx, nn

import fat
from fat import FatError, QuantSpec, Student
from fat.export.lowering import INT32, Lowered, LoweringStyle, lower, stored_grid
from fat.models.integer_inference import IntegerInterpreter, IntegerTensor, run_integers
from tests.export.students import (
    NAMES,
    SCHEMES,
    Everything,
    clipped_student,
    structured,
    student_of,
    tiny_student,
)

STYLES = {
    "onnx": LoweringStyle(torch.uint8, channel_clip="sums"),
    "int8": LoweringStyle(torch.int8, padding="quantized"),
    "float": LoweringStyle(torch.int8, bias="float", clip="float"),
}


@pytest.fixture(scope="module")
def everything() -> Student:
    return student_of(Everything(), QuantSpec(scheme="symmetric"))


@pytest.fixture
def tiny() -> Student:
    return tiny_student()


def calls(lowered: Lowered) -> list[str]:
    return [str(node.target) for node in lowered.network.graph.nodes]


def held(lowered: Lowered, name: str) -> torch.Tensor:
    return dict(lowered.network.named_buffers())[name]


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("spec", SCHEMES, ids=NAMES)
def test_the_lowered_network_computes_the_student(spec: QuantSpec, style: LoweringStyle) -> None:
    student, images = student_of(Everything(), spec), structured(4, 32, 1)
    lowered = lower(student, images, style)
    with torch.no_grad():
        logits, *integers = lowered.network(images)
        expected = student(images)
    # torch computes it in real values, which round otherwise where they lie in the middle.
    step = student.activation_quantizers()[-1].thresholds()[0]
    assert (logits - expected).abs().max() <= 4 * step
    assert ((logits - expected).abs() < 0.5 * step).float().mean() > 0.7
    assert len(integers) == len(lowered.tensors) == len(student.activation_quantizers())
    for grid, stored in zip(lowered.tensors, integers, strict=True):
        assert stored.dtype == style.dtype, grid.layer
        assert grid.type_low <= grid.low <= int(stored.min()), grid.layer
        assert int(stored.max()) <= grid.high <= grid.type_high, grid.layer


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [8, 4])
def test_channels_are_clipped_at_their_own_bounds(
    bits: int, scheme: str, style: LoweringStyle
) -> None:
    student = clipped_student(activation_bits=bits, scheme=scheme)
    lowered = lower(student, structured(4, 16, 1), style)
    with torch.no_grad():
        _, *integers = lowered.network(structured(4, 16, 1))
    reached = 0
    for grid, stored in zip(lowered.tensors, integers, strict=True):
        (quantizer,) = (q for q in student.activation_quantizers() if q.layer == grid.layer)
        bounds = quantizer.channel_bounds()
        if bounds is None:
            continue
        largest = stored.int().amax((0, 2, 3)) - grid.offset
        assert (largest <= bounds).all(), grid.layer
        assert grid.low <= int(stored.min()), grid.layer
        below = bounds < grid.high - grid.offset  # what the type or the grid does not do by itself
        reached += int((below & (largest == bounds)).sum())
    assert reached > 0
    if style.channel_clip == "sums":
        assert "minimum" not in str(calls(lowered))


def test_every_grid_has_its_layer(everything: Student) -> None:
    lowered = lower(everything, structured(2, 32), STYLES["onnx"])
    assert [grid.layer for grid in lowered.tensors] == [
        quantizer.layer for quantizer in everything.activation_quantizers()
    ]
    assert len({grid.key for grid in lowered.tensors}) == len(lowered.tensors)


def test_signed_integers_keep_clear_of_the_types_lowest(everything: Student) -> None:
    for quantizer in everything.activation_quantizers():
        unsigned = stored_grid("x", quantizer, torch.uint8)
        signed = stored_grid("x", quantizer, torch.int8)
        assert unsigned.low - signed.low == unsigned.zero_point - signed.zero_point == 128
        if quantizer.grid.kind == "symmetric":
            assert (unsigned.zero_point, unsigned.low) == (128, 1)
            assert (signed.zero_point, signed.low) == (0, -127)


def test_zero_is_an_integer_of_every_grid(everything: Student) -> None:
    for grid in lower(everything, structured(2, 32), STYLES["onnx"]).tensors:
        assert grid.type_low <= grid.zero_point <= grid.type_high


def test_a_clip_that_the_type_does_by_itself_is_no_operation(tiny: Student) -> None:
    # Asymmetric grids of 8 bits fill uint8, and ReLU6 is the upper bound of its grid.
    assert not [
        name for name in calls(lower(tiny, structured(2, 16), STYLES["onnx"])) if "clamp" in name
    ]


def test_narrow_grids_are_clipped_in_integers_or_in_values() -> None:
    student, images = tiny_student(QuantSpec(bits=4)), structured(2, 16)
    whole, real = (lower(student, images, STYLES[name]) for name in ("onnx", "float"))
    for lowered in (whole, real):
        assert sum("clamp" in name for name in calls(lowered)) == len(lowered.tensors)
        for integers in lowered.network(images)[1:]:
            assert int(integers.max()) - int(integers.min()) <= 15
    quantized = [sum("quantize_per_tensor" in name for name in calls(x)) for x in (whole, real)]
    assert quantized[1] > quantized[0]  # between two roundings onto the same grid


def test_weights_and_biases_are_the_students_integers(tiny: Student) -> None:
    lowered = lower(tiny, structured(2, 16), STYLES["onnx"])
    assert set(lowered.weight_bits) == {f"{layer.layer}.weight" for layer in tiny.layers()}
    for layer in tiny.layers():
        weight, _, bias = layer.integers()
        assert torch.equal(held(lowered, f"{layer.layer}.weight"), weight)
        assert weight.dtype == torch.int8
        assert int(weight.abs().max()) == 127
        stored = held(lowered, f"{layer.layer}.bias")
        assert torch.equal(stored, bias)
        assert stored.dtype == torch.int32
        assert INT32[0] < int(stored.min()) <= int(stored.max()) < INT32[1]


def test_lowering_changes_nothing_of_the_student(tiny: Student) -> None:
    images = structured(4, 16)
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    graph = str(tiny.network.graph)
    with torch.no_grad():
        logits = tiny(images)
        lower(tiny, images, STYLES["onnx"])
        assert torch.equal(tiny(images), logits)
    assert str(tiny.network.graph) == graph
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


def test_an_uncalibrated_student_is_refused(images: torch.Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 2)).eval()
    student = fat.prepare(network, images)
    with pytest.raises(FatError, match=r"not calibrated\. Call fat\.calibrate"):
        lower(student, images, STYLES["onnx"])


def test_a_student_in_training_is_refused(tiny: Student) -> None:
    tiny.train()
    with pytest.raises(FatError, match=r"half trained.*student\.eval\(\)"):
        lower(tiny, structured(2, 16), STYLES["onnx"])


class Routed(nn.Module):
    """A convolution whose filters are mixed for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 10)
        self.routing, self.mixed = nn.Linear(8, 4), timm.layers.CondConv2d(8, 8, 3, num_experts=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = self.mixed(x, torch.sigmoid(self.routing(x.mean((2, 3)))))
        pooled: torch.Tensor = self.head(x.mean((2, 3)))
        return pooled


def test_filters_for_each_image_are_rejected() -> None:
    with pytest.raises(FatError, match=r"'mixed\.conv2d' is a convolution with separate filters"):
        lower(student_of(Routed()), structured(4, 32, 1), LoweringStyle(torch.uint8))


def test_a_broken_threshold_is_named(tiny: Student) -> None:
    quantizer = tiny.activation_quantizers()[3]
    quantizer.thresholds.high.fill_(float("nan"))
    with pytest.raises(FatError, match=rf"'{quantizer.layer}' has step nan.*optim\.lr"):
        lower(tiny, structured(2, 16), STYLES["onnx"])


def test_broken_steps_of_a_weight_are_named(tiny: Student) -> None:
    layer = tiny.layers()[2]
    layer.weight_quantizer.thresholds.high.fill_(float("nan"))
    with pytest.raises(FatError, match=rf"weights of '{layer.layer}' are not finite"):
        lower(tiny, structured(2, 16), STYLES["onnx"])


def test_a_quantizer_that_is_switched_off_is_named(tiny: Student) -> None:
    tiny.activation_quantizers()[1].enabled = False
    with pytest.raises(FatError, match=rf"quantizer of '{tiny.activation_quantizers()[1].layer}'"):
        lower(tiny, structured(2, 16), STYLES["onnx"])


def test_inference_is_the_arithmetic_in_integers(tiny: Student) -> None:
    images = structured(4, 16)
    step, _ = tiny.activation_quantizers()[-1].thresholds()
    with torch.no_grad():
        logits = tiny(images)
        assert torch.equal(logits, run_integers(tiny.network, images))
    integers = logits / step
    assert torch.equal(logits, integers.round() * step)
    # With gradients it is the real values on the same grids, and both agree but for few steps.
    real = tiny(images)
    assert real.requires_grad
    assert ((real - logits).abs() > 0.5 * step).float().mean() < 0.1


class Mixed(nn.Module):
    """Channels that go to convolutions of several sizes, as MixNet's do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 10)
        self.small, self.large = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(5, 5, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.stem(x).split([3, 5], 1)
        mixed = torch.cat([self.small(first), self.large(second)], 1)
        logits: torch.Tensor = self.head(mixed.mean((2, 3)))
        return logits


def test_what_is_split_stays_in_integers() -> None:
    read: list[object] = []

    class Watching(IntegerInterpreter):
        def run_node(self, n: fx.Node) -> object:
            if str(n.target) in ("small", "large"):
                read.append(self.env[n.args[0]])  # type: ignore[index]
            return super().run_node(n)

    student, images = student_of(Mixed()), structured(4, 32, 1)
    with torch.no_grad():
        assert torch.equal(Watching(student.network).run(images), student(images))
    assert [type(value) for value in read] == [IntegerTensor, IntegerTensor]
