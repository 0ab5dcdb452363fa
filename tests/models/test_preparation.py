"""Tests of prepare()."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import fat
from fat import EqualizeSpec, FatError, QuantSpec
from fat.evaluation.layer_analysis import disabled
from fat.quant.metrics import logits_sqnr_db
from tests.conftest import TinyNet, realistic


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("method", ["none", "depthwise", "cross_layer", "balanced", "exact"])
def test_the_argument_is_left_as_it_was(tiny: nn.Module, images: Tensor, method: str) -> None:
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    kinds = [type(module) for module in tiny.modules()]
    requires = [parameter.requires_grad for parameter in tiny.parameters()]
    hook = tiny.stem.register_forward_hook(lambda *_: None)
    expected = tiny(images)
    generator = torch.random.get_rng_state()

    student = fat.prepare(tiny, images, QuantSpec(equalize=EqualizeSpec(method)))
    with torch.no_grad():  # the student must not share storage with it
        for tensor in (*student.network.state_dict().values(), *student.teacher.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(7)

    assert [type(module) for module in tiny.modules()] == kinds
    assert not any(module.training for module in tiny.modules())
    assert [parameter.requires_grad for parameter in tiny.parameters()] == requires
    assert list(tiny.stem._forward_hooks) == [hook.id]
    assert not any(m._forward_hooks for m in tiny.modules() if m is not tiny.stem)
    assert all(torch.equal(value, before[key]) for key, value in tiny.state_dict().items())
    assert torch.equal(tiny(images), expected)
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_report_and_parts_without_equalization(tiny: nn.Module, images: Tensor) -> None:
    student = fat.prepare(tiny, [images[:8], (images[8:], torch.zeros(8))])
    report = student.report
    assert len(report.fold.pairs) == 7
    assert report.fold_sqnr_db > 100
    assert report.equalize is None
    assert report.equalize_sqnr_db is None
    assert report.insert.layers[0] == "stem"
    assert logits_sqnr_db(tiny(images), student.float_logits(images)) > 100
    with disabled(student), torch.no_grad():
        assert logits_sqnr_db(tiny(images), student.network(images)) > 100
    assert not bool(student.is_calibrated)


def test_equalization_changes_the_student_and_not_the_teacher() -> None:
    images = torch.randn(64, 3, 32, 32)
    network = realistic(TinyNet(), images)
    spec = QuantSpec(equalize=EqualizeSpec("depthwise"))
    plain, student = fat.prepare(network, images), fat.prepare(network, images, spec)
    assert [pair.first for pair in student.report.equalize.pairs] == [
        "blocks.0.conv_dw",
        "blocks.1.conv_dw",
    ]
    name = "blocks.0.conv_dw"
    assert torch.equal(
        student.teacher.get_submodule(name).weight, plain.teacher.get_submodule(name).weight
    )
    assert not torch.equal(
        student.network.get_submodule(name).weight, plain.network.get_submodule(name).weight
    )
    with disabled(student), torch.no_grad():
        moved = logits_sqnr_db(student.float_logits(images), student.network(images))
    assert moved > 100
    assert student.report.equalize_sqnr_db == pytest.approx(moved, abs=3)


@pytest.mark.parametrize(
    "name", ["mobilenetv2_050", "mobilenetv3_small_050", "tf_efficientnet_lite0", "resnet18"]
)
def test_float_side_of_timm_networks(name: str) -> None:
    images = torch.randn(2, 3, 64, 64)
    network = timm.create_model(name).eval()
    student = fat.prepare(network, images)
    with torch.no_grad():
        expected = network(images)
        assert logits_sqnr_db(expected, student.float_logits(images)) > 80
        with disabled(student):
            assert logits_sqnr_db(expected, student.network(images)) > 80


def test_weights_that_are_not_finite_are_named(tiny: nn.Module, images: Tensor) -> None:
    tiny.blocks[0].conv_dw.weight[3, 0, 0, 0] = float("nan")
    tiny.classifier.bias[0] = float("inf")
    with pytest.raises(FatError, match=r"2 tensor.*blocks\.0\.conv_dw\.weight, classifier\.bias"):
        fat.prepare(tiny, images)


@pytest.mark.parametrize("empty", [[], (), iter([])])
def test_no_images_are_refused(tiny: nn.Module, empty: object) -> None:
    with pytest.raises(FatError, match="no example images"):
        fat.prepare(tiny, empty)


def test_something_that_is_no_batch_is_refused(tiny: nn.Module, images: Tensor) -> None:
    with pytest.raises(FatError, match=r"\[3, 16, 16\]"):
        fat.prepare(tiny, images[0])


def test_a_graph_that_computes_something_else_is_refused(images: Tensor) -> None:
    class Aliased(nn.Module):
        """The sum overwrites y in place and its result is not used, which a graph loses."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            torch.add(y, 1.0, out=y)
            return self.head(y.mean((2, 3)))

    with pytest.raises(FatError, match="do not compute the same"):
        fat.prepare(Aliased().eval(), images)


def test_training_mode_is_refused(tiny: nn.Module, images: Tensor) -> None:
    before = tiny.bn.running_mean.clone()
    tiny.bn.train()
    with pytest.raises(FatError, match="training mode"):
        fat.prepare(tiny, images)
    assert torch.equal(tiny.bn.running_mean, before)
