"""Accumulators are exact on every device, and integers may be computed once for many batches."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fat
from fat import FatError, QuantSpec, Student
from fat.models import self_test as module
from fat.models.integer_inference import (
    EXACT,
    IntegerGrid,
    IntegerInterpreter,
    IntegerLayer,
    accumulator_bounds,
    exact_weights,
    is_matrix_product,
)
from fat.models.self_test import geometry, self_test
from fat.quant import kernels
from fat.quant.config import Grid
from fat.quant.layers import pad_same
from fat.quant.quantized_layers import QuantConv2d, QuantLayer, QuantLinear
from fat.quant.quantizers import ActivationQuantizer
from tests.gpu.pretended import PretendedGpu

# --- layers --------------------------------------------------------------------------------------

GEOMETRIES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "dense": ((6, 520, 3, 3), {"padding": (1, 1)}),
    "strided": ((6, 300, 3, 3), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "grouped": ((6, 200, 3, 3), {"groups": 2}),
    "depthwise": ((12, 1, 5, 5), {"groups": 12, "padding": (2, 2)}),
    "same": ((4, 700, 2, 2), {"padding": "same"}),
    "dynamic same": ((4, 700, 3, 3), {"padding": "dynamic_same", "stride": (2, 2)}),
    "pointwise": ((6, 1200, 1, 1), {}),
    "strided pointwise": ((6, 1200, 1, 1), {"stride": (2, 2)}),
    "padded pointwise": ((6, 1200, 1, 1), {"padding": (1, 1)}),
    "linear": ((6, 1300), {}),
}


def layer_of(name: str) -> QuantLayer:
    """Return a quantized layer whose input is unsigned."""
    shape, options = GEOMETRIES[name]
    spec = QuantSpec()
    weight, bias, grid = torch.rand(shape), torch.zeros(shape[0]), Grid(8, "symmetric")
    layer: QuantLayer
    if len(shape) == 2:
        layer = QuantLinear(name, weight, bias, spec, grid)
    else:
        layer = QuantConv2d(name, weight, bias, spec, grid, **options)
    layer.set_input_quantizer(ActivationQuantizer("input", spec, Grid(8, "symmetric_unsigned")))
    return layer


def grid_of(layer: QuantLayer) -> IntegerGrid:
    quantizer = layer.input_quantizer
    return IntegerGrid.of(quantizer, *quantizer.thresholds.lanes())


def integer_sums(layer: QuantLayer, x: Tensor, weight: Tensor) -> Tensor:
    """Return the accumulators, computed in int64 from patches of the input."""
    x, weight = x.long(), weight.long()
    if not isinstance(layer, QuantConv2d):
        return x @ weight.T
    kernel, groups = weight.shape[2:], layer.groups
    down, across = layer.stride
    if layer.padding == "dynamic_same":
        x = pad_same(x, (kernel[0], kernel[1]), layer.stride, layer.dilation)
    elif layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, kernel, strict=True)]
        x = nn.functional.pad(
            x,
            (
                totals[1] // 2,
                totals[1] - totals[1] // 2,
                totals[0] // 2,
                totals[0] - totals[0] // 2,
            ),
        )
    else:
        x = nn.functional.pad(x, (layer.padding[1],) * 2 + (layer.padding[0],) * 2)
    rows, columns = (
        (size - d * (k - 1) - 1) // s + 1
        for size, d, k, s in zip(x.shape[2:], layer.dilation, kernel, layer.stride, strict=True)
    )
    result = torch.zeros(len(x), len(weight), rows, columns, dtype=torch.int64)
    per_group = len(weight) // groups
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i * layer.dilation[0], j * layer.dilation[1]
            part = x[:, :, top : top + down * rows : down, left : left + across * columns : across]
            for group in range(groups):
                filters = slice(group * per_group, (group + 1) * per_group)
                channels = slice(group * weight.shape[1], (group + 1) * weight.shape[1])
                result[:, filters] += torch.einsum(
                    "nchw,oc->nohw", part[:, channels], weight[filters, :, i, j]
                )
    return result


def operands(layer: QuantLayer, *, large: bool) -> tuple[Tensor, Tensor]:
    """Return an input and a weight in integers; large ones have sums far above 2^24."""
    generator = torch.Generator().manual_seed(0)
    shape = layer.weight.shape
    lowest, highest = (97, 127) if large else (-9, 9)
    weight = torch.randint(lowest, highest + 1, shape, generator=generator).float()
    sizes = (3, shape[1]) if len(shape) == 2 else (2, shape[1] * getattr(layer, "groups", 1), 9, 8)
    low = 201 if large else 0
    return torch.randint(low, 256, sizes, generator=generator).float(), weight


def laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with PretendedGpu(tf32=True) as pretended:
        yield pretended


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_accumulators_equal_those_in_int64(
    name: str, large: bool, exact: bool, device: str, gpu: PretendedGpu
) -> None:
    """On both sides of 2^24, with bounds for these weights and for any."""
    layer = layer_of(name)
    x, weight = operands(layer, large=large)
    wanted = integer_sums(layer, x, weight)
    x, weight = laid_out(x), laid_out(weight)
    (bound,) = accumulator_bounds([weight], [127], [grid_of(layer)], exact=exact)
    assert int(wanted.abs().max()) <= bound
    if large and name != "depthwise":
        assert bound > 2 * EXACT
        assert int((wanted != wanted.float().long()).sum()) > 0  # float32 cannot hold them
    grid = grid_of(layer.to(device))
    weights = exact_weights(layer, weight.to(device), grid, bound)
    found = IntegerLayer(layer, weights, torch.ones((), device=device), None)
    for pixels in (x, x.contiguous()):
        sums = found.accumulate(pixels.to(device)).cpu()
        assert torch.equal(sums.double().round().long(), wanted)
        if device == "cpu":
            assert torch.equal(sums.long(), wanted)


def test_the_arithmetic_of_each_device() -> None:
    """In float32 where it is exact in any order of summation."""
    forms = {}
    with PretendedGpu():
        for device in ("cpu", "cuda"):
            for name in GEOMETRIES:
                for large in (False, True):
                    layer = layer_of(name)
                    _, weight = operands(layer, large=large)
                    (bound,) = accumulator_bounds([weight], [127], [grid_of(layer)], exact=True)
                    grid = grid_of(layer.to(device))
                    weights = exact_weights(layer, weight.to(device), grid, bound)
                    kind = "wide" if weights[0].dtype == torch.float64 else "parts"
                    if weights[0].dtype == torch.float32 and len(weights) == 1:
                        kind = "float32"
                    forms[device, name, large] = kind
    assert {forms["cpu", name, False] for name in GEOMETRIES} == {"float32"}
    cpu = {name: forms["cpu", name, True] for name in GEOMETRIES}
    assert cpu.pop("depthwise") == "float32"
    assert (cpu.pop("grouped"), cpu.pop("linear")) == ("wide", "wide")
    assert set(cpu.values()) == {"parts"}
    products = {"pointwise", "strided pointwise", "linear"}
    assert products == {name for name in GEOMETRIES if is_matrix_product(layer_of(name))}
    for name in GEOMETRIES:
        assert forms["cuda", name, False] == ("float32" if name in products else "wide")
        assert forms["cuda", name, True] == "wide"


def test_weights_that_are_not_finite_stay_so() -> None:
    layer = layer_of("dense")
    weight = torch.full(layer.weight.shape, torch.nan)
    (bound,) = accumulator_bounds([weight], [127], [grid_of(layer)], exact=True)
    (found,) = exact_weights(layer, weight, grid_of(layer), bound)
    assert bool(found.isnan().all())


# --- whole networks ------------------------------------------------------------------------------


class Heavy(nn.Module):
    """Layers whose accumulators and biases pass 2^24.

    Their weights have one sign, and their inputs vary little around 2, which the biases take back:
    a step of the output is a few hundred units of accumulators above 2^26.
    """

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Conv2d(3, 640, 1)
        self.dense = nn.Conv2d(640, 8, 3, groups=groups)
        self.point = nn.Conv2d(640, 8, 1, stride=2)
        self.head = nn.Linear(16, 10)
        with torch.no_grad():
            self.first.weight.mul_(0.05)
            self.first.bias.fill_(2.0)
            for layer in (self.dense, self.point):
                layer.weight.copy_(1.0 + 0.3 * torch.rand(layer.weight.shape, generator=generator))
                layer.bias.copy_(-2.0 * layer.weight.sum((1, 2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head(torch.cat([self.dense(x).mean((2, 3)), self.point(x).mean((2, 3))], 1))


@pytest.mark.parametrize("groups", [1, 2])
def test_accumulators_above_two_to_the_24_are_those_of_the_runtime(
    groups: int, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    from tests.export.students import check_equal, student_of

    student = student_of(Heavy(groups), QuantSpec(granularity="per_tensor"), size=16)
    layer = student.network.get_submodule("dense")
    assert isinstance(layer, QuantConv2d)
    weight, _, bias = layer.integers()
    assert bias is not None
    assert int(bias.long().abs().max()) > 2**26
    assert float(weight.double().flatten(1).abs().sum(1).max() * 255) > 2 * EXACT
    check_equal(student, tmp_path)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.first(x) + 9.0).relu().mean((2, 3)))


def test_means_over_many_pixels_are_exact() -> None:
    torch.manual_seed(0)
    images = torch.randn(1, 3, 300, 301)
    student = fat.prepare(Mean().eval(), images)
    fat.calibrate(student, images)
    with torch.no_grad():
        interpreter = IntegerInterpreter(student.network)
        found: list[Tensor] = []

        class Watched(IntegerInterpreter):
            def quantize(self, node: Any, quantizer: Any, x: Any) -> Any:
                if getattr(x, "count", 1) > 1:
                    found.extend((x.values, x.count, taken[-1].values))
                taken.append(super().quantize(node, quantizer, x))
                return taken[-1]

        taken: list[Any] = []
        logits = Watched(student.network).run(images)
    sums, count, values = found
    assert count == 300 * 301
    wanted = values.double().sum((2, 3)).long()
    assert int(wanted.max()) > EXACT
    assert torch.equal(sums.long().reshape(wanted.shape), wanted)
    assert torch.equal(logits, interpreter.run(images))


class Deep(nn.Module):
    """Accumulators so large that errors of a convolution change many of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).flatten(1)


@pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="needs NNPACK")
@torch.no_grad()
def test_without_onednn_accumulators_stay_exact() -> None:
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    student = fat.prepare(Deep().eval(), images)
    fat.calibrate(student, images)
    wanted = student(images)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(student(images), wanted)
        assert torch._C._get_nnpack_enabled()  # type: ignore[attr-defined]


# --- integers that are computed once -------------------------------------------------------------


@pytest.fixture
def student(tiny: nn.Module, images: Tensor) -> Student:
    student = fat.prepare(tiny, images, QuantSpec(weights="adaround"))
    fat.calibrate(student, images)
    return student


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[IntegerInterpreter]:
    """All interpreters that students make."""
    made: list[IntegerInterpreter] = []
    original = IntegerInterpreter.__init__

    def counted(self: IntegerInterpreter, *args: Any, **options: Any) -> None:
        made.append(self)
        original(self, *args, **options)

    monkeypatch.setattr(IntegerInterpreter, "__init__", counted)
    return made


@torch.no_grad()
def test_cached_integers_give_the_same_logits(
    student: Student, images: Tensor, built: list[IntegerInterpreter]
) -> None:
    wanted = student(images)
    assert len(built) == 1
    with student.cached_integers():
        found = [student(images), student(images)]
        with student.cached_integers():
            found.append(student(images))
        found.append(student(images))
    assert len(built) == 2
    assert all(torch.equal(logits, wanted) for logits in found)
    any_weights = IntegerInterpreter(student.network, exact_bounds=False)
    assert torch.equal(any_weights.run(images), wanted)


@torch.no_grad()
def test_cached_integers_end_with_the_context(
    student: Student, images: Tensor, built: list[IntegerInterpreter]
) -> None:
    before = student(images)
    with student.cached_integers():
        student(images)
        twin = copy.deepcopy(student)
        with pytest.raises(RuntimeError):
            student(images[:, :2])
    for one in (student, twin):
        for thresholds in one.thresholds():
            assert thresholds.alpha is not None
            thresholds.alpha.mul_(0.6)
        after = one(images)
        assert not torch.equal(after, before)
        with one.cached_integers():
            assert torch.equal(one(images), after)
    assert len(built) == 6


@torch.no_grad()
def test_threads_share_cached_integers(student: Student, images: Tensor) -> None:
    batches = list(torch.cat([images] * 4).split(2))
    wanted = [student(batch) for batch in batches]

    def logits(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return student(batch)

    with student.cached_integers(), ThreadPoolExecutor(4) as threads:
        found = list(threads.map(logits, batches))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@torch.no_grad()
def test_switched_off_quantizers_are_not_cached(student: Student, images: Tensor) -> None:
    wanted = student(images)
    quantizer = student.activation_quantizers()[2]
    with student.cached_integers():
        student(images)
        quantizer.enabled = False
        assert not torch.equal(student(images), wanted)
        quantizer.enabled = True
        assert torch.equal(student(images), wanted)


def test_gradients_flow_with_cached_integers(student: Student, images: Tensor) -> None:
    with student.cached_integers():
        student(images).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


@torch.no_grad()
def test_on_a_gpu_nothing_is_read_for_a_batch(student: Student, images: Tensor) -> None:
    """The logits are those of the CPU also where a GPU divides and multiplies otherwise."""
    wanted = student(images)
    with PretendedGpu(reciprocal=True, tf32=True) as gpu:
        student.to("cuda")
        pixels = images.to("cuda")
        assert torch.equal(student(pixels).cpu(), wanted)
        with gpu.counting() as alone:
            student(pixels)
        with student.cached_integers():
            student(pixels)
            with gpu.counting() as cached:
                found = student(pixels)
        assert torch.equal(found.cpu(), wanted)
    assert alone.reads.total() == cached.reads.total() == 0
    quantizers, layers = len(student.activation_quantizers()), len(student.layers())
    requantized = sum(
        count for (name, _), count in cached.kernels.items() if name.startswith("fat::")
    )
    assert requantized == quantizers
    assert cached.kernels.total() <= quantizers + 2 * layers + 5


# --- the self-test -------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_passed", set())


@pytest.mark.usefixtures("fresh")
def test_self_test_says_what_it_compared_once(
    student: Student, gpu: PretendedGpu, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fat")
    self_test(student)
    assert caplog.messages == []  # the CPU is what others are compared with
    student.to("cuda")
    quantizer = student.activation_quantizers()[1]
    quantizer.enabled = False
    self_test(student)  # nothing to test yet
    assert caplog.messages == []
    quantizer.enabled = True
    self_test(student)
    self_test(copy.deepcopy(student))
    count = len({geometry(layer) for layer in student.layers()})
    assert caplog.messages == [
        f"Self-test on {torch.cuda.get_device_name()}: {count} layer geometries, thresholds and "
        "input integers equal the CPU's bit for bit."
    ]
    assert student.device.type == "cuda"


@pytest.mark.usefixtures("fresh")
def test_self_test_finds_wrong_accumulators(
    student: Student, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    student.to("cuda")
    original = IntegerLayer.accumulate

    def wrong(self: IntegerLayer, x: Tensor) -> Tensor:
        sums = original(self, x)
        if x.device.type == "cuda" and "groups 32" in geometry(self.layer):
            sums[0, 0, 0, 0] += 1.0
        return sums

    monkeypatch.setattr(IntegerLayer, "accumulate", wrong)
    named = [geometry(layer) for layer in student.layers() if "groups 32" in geometry(layer)]
    assert len(named) >= 1
    with pytest.raises(FatError) as raised:
        self_test(student)
    text = str(raised.value)
    assert re.search(
        rf"\b1 of \d+ accumulators of a {re.escape(named[0])} differ, by up to 1\.", text
    )
    assert "trainer=cpu, or student.to('cpu')" in text
    monkeypatch.undo()
    self_test(student)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("operator", "named"),
    [
        ("requantize", "the integers after a linear layer"),
        ("requantize_real", "the integers of 'input' differ"),
        ("integer_weight", "the integers of the weights of 'classifier' differ"),
        ("integer_bias", "the integers of the weights of 'stem' differ"),
    ],
)
def test_self_test_finds_wrong_operators(
    operator: str, named: str, student: Student, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(kernels, operator)

    def wrong(x: Tensor, *arguments: Any) -> Tensor:
        result: Tensor = original(x, *arguments)
        return result + 1 if x.device.type == "cuda" and x.dim() <= 2 else result

    monkeypatch.setattr(kernels, operator, wrong)
    with pytest.raises(FatError, match=named):
        self_test(student.to("cuda"))


@pytest.mark.usefixtures("fresh")
def test_self_test_finds_wrong_thresholds(
    student: Student, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = IntegerGrid.of.__func__  # type: ignore[attr-defined]

    def wrong(cls: Any, quantizer: Any, scale: Tensor, zero_point: Tensor) -> IntegerGrid:
        grid: IntegerGrid = original(cls, quantizer, scale, zero_point)
        off = torch.nextafter(grid.scale, 2 * grid.scale)
        return replace(grid, scale=off) if scale.device.type == "cuda" else grid

    monkeypatch.setattr(IntegerGrid, "of", classmethod(wrong))
    with pytest.raises(FatError, match="the thresholds of 'input' differ"):
        self_test(student.to("cuda"))


@pytest.mark.usefixtures("fresh")
@torch.no_grad()
def test_self_test_takes_students_that_diverged(student: Student, gpu: PretendedGpu) -> None:
    """Their evaluation says so."""
    for thresholds in student.thresholds():
        assert thresholds.alpha is not None
        thresholds.alpha.fill_(torch.nan)
    self_test(student.to("cuda"))
