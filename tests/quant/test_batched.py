"""Values of many quantizers computed together equal those computed one by one, bit for bit."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fat
from fat import QuantSpec, Student
from fat.quant.batched import QuantizerBatch
from fat.utils.errors import FatError


class Mixed(nn.Module):
    """A layer without a bias, both kinds of clips, a signed tensor and grids of several widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 40, 3)
        self.clip = nn.ReLU6()
        self.depthwise = nn.Conv2d(40, 40, 3, groups=40)
        self.act = nn.ReLU()
        self.project = nn.Conv2d(40, 24, 1, bias=False)
        self.swish = nn.Hardswish()
        self.classifier = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.depthwise(self.clip(self.stem(x))))
        return self.classifier(self.swish(self.project(x)).mean((2, 3)))


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def mixed_student(pixels: Tensor, seed: int = 0, **options: Any) -> Student:
    """Return a calibrated student whose parameters are at, inside and outside their ranges."""
    torch.manual_seed(seed)
    spec = QuantSpec(layer_bits={"stem": 4, "project": 6}, first_bits=5, **options)
    student = fat.prepare(Mixed().eval(), pixels, spec)
    fat.calibrate(student, pixels)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape).mul_(0.2).clamp_(-0.2))
    return student


def gradients(student: Student, pixels: Tensor, *, together: bool) -> dict[str, Tensor | None]:
    """Return the logits of a forward pass, and the gradient of each parameter."""
    student.zero_grad()
    images = pixels.contiguous(memory_format=torch.channels_last)
    logits = student(images) if together else student.network(images)
    logits.square().mean().backward()
    return {"": logits.detach(), **{name: p.grad for name, p in student.named_parameters()}}


def assert_same(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        other = found[name]
        assert (tensor is None) == (other is None), name
        assert tensor is None or other is None or torch.equal(tensor, other), name


SPECS = [
    {
        "thresholds": thresholds,
        "scheme": scheme,
        "granularity": granularity,
        "power_of_two": power_of_two,
        "weights": ("scale", "adaround", "frozen")[index % 3],
        "bias": ("trained", "frozen")[index % 2],
    }
    for index, (thresholds, scheme, granularity, power_of_two) in enumerate(
        product(
            ("fat", "lsq", "tqt", "frozen"),
            ("symmetric", "asymmetric"),
            ("per_tensor", "per_channel"),
            (False, True),
        )
    )
]


@pytest.mark.parametrize("options", SPECS, ids=lambda options: "-".join(map(str, options.values())))
def test_values_gradients_and_projection_equal_those_of_single_modules(
    pixels: Tensor, options: dict[str, Any]
) -> None:
    student = mixed_student(pixels, **options)
    if list(student.parameters()):
        alone = gradients(student, pixels, together=False)
        assert_same(gradients(student, pixels, together=True), alone)
        trained = [p for p in student.parameters() if p.grad is not None]
        assert any(bool(p.grad.count_nonzero()) for p in trained if p.grad is not None)
    values = student.quantizer_batch.values()
    assert values.keys() == set(student.thresholds())
    for thresholds, found in values.items():
        assert all(torch.equal(*pair) for pair in zip(found, thresholds.lanes(), strict=True))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    other = copy.deepcopy(student)
    for quantizer in student.activation_quantizers():
        quantizer.project()
    for layer in student.layers():
        layer.project()
    other.project()
    assert_same(dict(other.named_parameters()), dict(student.named_parameters()))
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert bool(changed) == (options["thresholds"] == "fat" or options["weights"] == "scale")


def test_several_lanes_have_the_gradient_of_one(
    pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a scalar is expanded to as many elements as programs write a partial sum to."""
    for granularity in ("per_tensor", "per_channel"):
        student = mixed_student(pixels, granularity=granularity)
        one = gradients(student, pixels, together=True)
        with monkeypatch.context() as patch:
            patch.setattr("fat.quant.kernels.lanes", lambda device: 8)
            assert_same(gradients(student, pixels, together=True), one)
            lanes = student.layers()[0].input_quantizer.thresholds.lanes()
            assert [list(x.shape) for x in lanes] == [[8], [8]]
            assert [x.stride() for x in lanes] == [(0,), (0,)]


def test_hooks_see_the_same_thresholds_inside_and_outside(pixels: Tensor) -> None:
    student = mixed_student(pixels)
    outside = [one() for one in student.thresholds()]
    with student.quantizer_batch.computed():
        for one, wanted in zip(student.thresholds(), outside, strict=True):
            for found, exact in zip(one(), wanted, strict=True):
                assert found.shape == exact.shape == one.high.shape
                assert torch.equal(found, exact)
    assert all(one._computed is None for one in student.thresholds())
    assert all(layer._computed is None for layer in student.layers())


def test_overlapping_threads_leave_nothing_behind(pixels: Tensor) -> None:
    student = mixed_student(pixels)
    first, second = student.quantizer_batch.computed(), student.quantizer_batch.computed()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert all(one._computed is None for one in student.thresholds())
    assert all(layer._computed is None for layer in student.layers())


def test_a_failed_forward_pass_leaves_nothing_behind(pixels: Tensor) -> None:
    student = mixed_student(pixels)
    with pytest.raises(RuntimeError):
        student(pixels[:, :2])
    assert all(one._computed is None for one in student.thresholds())
    assert all(layer._computed is None for layer in student.layers())


@pytest.mark.parametrize("off", ["input", "activation", "weight", "weight without bias"])
def test_quantizers_that_are_switched_off_are_left_out(pixels: Tensor, off: str) -> None:
    student = mixed_student(pixels)
    gradients(student, pixels, together=True)  # a batch for all quantizers exists
    by_name = {layer.layer: layer for layer in student.layers()}
    quantizers: dict[str, Any] = {
        "input": student.activation_quantizers()[0],
        "activation": by_name["classifier"].input_quantizer,
        "weight": by_name["depthwise"].weight_quantizer,
        "weight without bias": by_name["project"].weight_quantizer,
    }
    quantizers[off].enabled = False
    alone = gradients(student, pixels, together=False)
    assert_same(gradients(student, pixels, together=True), alone)
    assert quantizers[off].thresholds not in student.quantizer_batch.values()
    quantizers[off].enabled = True
    assert_same(
        gradients(student, pixels, together=True), gradients(student, pixels, together=False)
    )
    assert quantizers[off].thresholds in student.quantizer_batch.values()


def test_the_batch_follows_loaded_and_copied_students(pixels: Tensor) -> None:
    student, other = mixed_student(pixels), mixed_student(pixels, seed=1)
    gradients(student, pixels, together=True)
    twin = copy.deepcopy(student)
    twin.load_state_dict(other.state_dict())
    for one in (student, twin, other):
        alone = gradients(one, pixels, together=False)
        assert_same(gradients(one, pixels, together=True), alone)
    assert twin.quantizer_batch is not student.quantizer_batch
    assert not torch.equal(twin(pixels), student(pixels))


def test_a_batch_first_used_in_inference_mode_trains(pixels: Tensor) -> None:
    """Lightning validates in inference mode, before training."""
    student = mixed_student(pixels)
    with torch.inference_mode():
        student(pixels)
        student.quantizer_batch.values()
        student.project()
    alone = gradients(student, pixels, together=False)
    assert_same(gradients(student, pixels, together=True), alone)
    student.project()


def test_another_network_gets_another_batch(pixels: Tensor) -> None:
    student, other = mixed_student(pixels), mixed_student(pixels, seed=1)
    wanted = gradients(other, pixels, together=True)[""]
    student.project()
    student.network = other.network
    assert_same({"": gradients(student, pixels, together=True)[""]}, {"": wanted})
    before = student.quantizer_batch
    assert before is student.quantizer_batch


def test_a_part_of_a_network_takes_the_grid_of_its_input(pixels: Tensor) -> None:
    """The bias of its first layer needs the step of a quantizer that belongs to another part."""
    student = mixed_student(pixels)
    whole = gradients(student, pixels, together=True)
    student.zero_grad()
    layer = {one.layer: one for one in student.layers()}["classifier"]
    batch = QuantizerBatch([], [layer])
    with batch.computed():
        found = layer.quantized()
        assert layer.input_quantizer.thresholds in batch.values()
    for mine, wanted in zip(found, layer.quantized(), strict=True):
        assert mine is not None
        assert wanted is not None
        assert torch.equal(mine, wanted)
        mine.sum().backward(retain_graph=True)
    outside = layer.input_quantizer.thresholds
    assert all(parameter.grad is None for parameter in outside.parameters())
    assert layer.weight_quantizer.thresholds.get_parameter("alpha").grad is not None
    own = layer.weight_quantizer.thresholds.get_parameter("alpha")
    with torch.no_grad():
        own.fill_(9.0)
        outside.get_parameter("alpha").fill_(9.0)
    batch.project()
    assert torch.equal(own, torch.ones_like(own))
    assert outside.get_parameter("alpha").item() == 9.0  # not a quantizer of this part
    assert whole


def test_biases_under_autocast_are_cast_once(pixels: Tensor) -> None:
    student = mixed_student(pixels)
    layers = [layer for layer in student.layers() if layer.bias is not None]
    exact = [layer.quantized()[1] for layer in layers]
    with torch.autocast("cpu", torch.bfloat16), student.quantizer_batch.computed():
        for layer, wanted in zip(layers, exact, strict=True):
            weight, bias = layer.quantized()
            assert weight.dtype == torch.bfloat16
            assert bias is not None
            assert wanted is not None
            assert torch.equal(bias, wanted.bfloat16())


def test_an_uncalibrated_student_is_refused_before_anything_is_computed(pixels: Tensor) -> None:
    student = fat.prepare(Mixed().eval(), pixels)
    with pytest.raises(FatError, match="not calibrated"):
        student(pixels)
    assert student._batch is None


class Operations(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", SPECS, ids=lambda options: "-".join(map(str, options.values())))
def test_more_layers_take_no_more_operations(pixels: Tensor, options: dict[str, Any]) -> None:
    counts = []
    for layers in (3, 12):
        parts = [part for _ in range(layers) for part in (nn.Conv2d(3, 3, 1), nn.ReLU())]
        network = nn.Sequential(*parts, nn.Flatten(), nn.Linear(300, 4))
        student = fat.prepare(network.eval(), pixels, QuantSpec(**options))
        fat.calibrate(student, pixels)
        batch = student.quantizer_batch
        for _ in range(2):  # the first time builds the constants
            with Operations() as computing, batch.computed():
                pass
        counts.append(computing.count)
    assert counts[0] == counts[1] <= 80
