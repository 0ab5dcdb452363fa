"""Calibration, transforms and passes on a pretended GPU: to the CPU's bits, without host reads."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fat.data.config import DistillSpec
from fat.data.distill.synthesis import distill
from fat.data.transforms import EvalTransform, Normalize
from fat.graph.passes import balance
from fat.graph.passes.batch_norm_folding import fold_batch_norms
from fat.graph.passes.equalization import EqualizeReport, equalize
from fat.graph.passes.quantizer_insertion import insert_quantizers
from fat.graph.tracing.capture import trace
from fat.models.float_model import Preprocessing
from fat.quant.config import EqualizeSpec, Grid, InitSpec, QuantSpec
from fat.quant.observers import HistogramStatistics, RangeStatistics, SampleStatistics
from fat.quant.range_estimators import HISTOGRAM_STRATEGIES, STRATEGIES, initial_thresholds
from tests.gpu.pretended import CUDA, PretendedGpu, PretendedTensor, on_cpu

PREPROCESSING = Preprocessing(
    size=(16, 16),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bicubic",
    crop_pct=0.875,
    crop_mode="center",
)


def stream() -> list[Tensor]:
    """Return batches whose range grows, of several shapes, layouts and dtypes."""
    generator = torch.Generator().manual_seed(0)
    normal = [torch.randn(4, 6, 12, 12, generator=generator) * 10.0**k for k in (-2, 0, 1)]
    return [
        torch.zeros(4, 3),
        *normal,
        normal[0].relu(),
        normal[1].contiguous(memory_format=torch.channels_last)[:, ::2],
        normal[2].bfloat16(),
        torch.tensor(-70.0),
    ]


@pytest.mark.parametrize(("kind", "kernels"), [(RangeStatistics, 3), (HistogramStatistics, 45)])
def test_statistics_are_gathered_without_host_reads(
    gpu: PretendedGpu, kind: type[RangeStatistics], kernels: int
) -> None:
    there, here = kind(), kind()
    first, *others = stream()
    there.update(first.cuda())
    here.update(first)
    for batch in others:
        moved = batch.cuda()
        with gpu.counting() as counts:
            there.update(moved)
        assert counts.host_reads == 0
        assert not counts.copies
        assert counts.launched <= kernels
        here.update(batch)
    with gpu.counting() as counts:
        there.merge()
    assert counts.host_reads <= 2
    here.merge()
    assert not isinstance(there.minimum(), PretendedTensor)
    assert there.minimum().item() == here.minimum().item() == -70.0
    assert there.maximum().item() == here.maximum().item()
    assert there.seen


@pytest.mark.parametrize("grid", [Grid(8, "affine"), Grid(4, "symmetric")])
@pytest.mark.parametrize("name", STRATEGIES)
def test_thresholds_equal_the_cpus(name: str, grid: Grid) -> None:
    kind = HistogramStatistics if name in HISTOGRAM_STRATEGIES else RangeStatistics
    activation, weight = (kind(), kind()), stream()[1].flatten(1)
    with PretendedGpu(reciprocal=True):
        for batch in stream():
            activation[0].update(batch.cuda())
            activation[1].update(batch)
        for statistics in activation:
            statistics.merge()
        weights = SampleStatistics(weight.cuda()), SampleStatistics(weight)
    # After the block, because a tensor of the device raises an error there.
    for there, here in (activation, weights):
        found, wanted = (initial_thresholds(x, grid, InitSpec(name)) for x in (there, here))
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [RangeStatistics, HistogramStatistics])
def test_values_that_are_not_finite_are_reported(
    gpu: PretendedGpu, kind: type[RangeStatistics], bad: float
) -> None:
    statistics = kind()
    values = [[1.0, -2.0], [0.5, bad], [3.0]]
    for batch in values:
        statistics.update(torch.tensor(batch, device=CUDA))
    statistics.merge()
    found = [statistics.minimum().item(), statistics.maximum().item()]
    together = np.concatenate(values)
    np.testing.assert_array_equal(found, [together.min(), together.max()])


def test_normalization_has_the_same_bits_on_every_device() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    wanted = EvalTransform(PREPROCESSING).finish(pixels)
    normalize = Normalize(PREPROCESSING)
    with PretendedGpu(reciprocal=True) as gpu:
        moved = pixels.cuda()
        # The device does divide differently by a number.
        assert not torch.equal(on_cpu(moved.float() / 255), pixels.float() / 255)
        assert torch.equal(on_cpu(normalize(moved)), wanted)
        with gpu.counting() as counts:
            normalize(moved)
        assert not counts.copies
        assert counts.host_reads == 0


METHODS = ("none", "depthwise", "cross_layer", "balanced", "exact")


def passed(
    network: nn.Module, images: Tensor, method: str
) -> tuple[dict[str, Tensor], EqualizeReport]:
    """Return the tensors of a network after all passes, and the report of equalization."""
    spec = QuantSpec(equalize=EqualizeSpec(method))
    graph = trace(network, images)
    fold_batch_norms(graph)
    report = equalize(graph, images.split(4), spec)
    tensors = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    assert {x.device for x in tensors.values()} == {images.device}
    insert_quantizers(graph, spec, images[:1])
    return on_cpu(graph.state_dict()), report


@pytest.mark.parametrize("method", METHODS)
def test_passes_give_the_cpus_network(
    tiny: nn.Module, images: Tensor, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "STEPS", 5)
    images = images[:8]
    wanted, report = passed(tiny, images, method)
    with PretendedGpu(reciprocal=True) as gpu:
        network = copy.deepcopy(tiny).to(CUDA)
        with gpu.counting() as counts:
            found, same_report = passed(network, images.to(CUDA), method)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert same_report == report
    layers = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in tiny.modules())
    assert counts.host_reads <= 40 * layers


def test_distilled_images_equal_the_cpus(gpu: PretendedGpu, tiny: nn.Module) -> None:
    spec = DistillSpec(images=4, batch_size=2, coarse_steps=2, steps=2)
    wanted = list(distill(tiny, PREPROCESSING, spec, progress=False))
    network = copy.deepcopy(tiny).to(CUDA)
    batches = distill(network, PREPROCESSING, spec, progress=False)
    with gpu.counting() as counts:
        found = list(batches)
    # Two errors and the pixels of each batch.
    assert counts.host_reads == 3 * len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert not isinstance(one.images, PretendedTensor)
        assert torch.equal(one.images, other.images)
        assert (one.error_before, one.error) == (other.error_before, other.error)
