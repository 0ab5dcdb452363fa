"""Cut points by name, and that every path passes through them."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, fx, nn

import fat
from fat import FatError, QuantSpec, Student
from fat.evaluation.layer_analysis import disabled
from fat.graph.partition import block_outputs, counterpart, cut_points, with_outputs
from fat.graph.passes.batch_norm_folding import fold_batch_norms
from fat.graph.tracing.capture import layer_name, trace

ARCHITECTURES = [
    "mobilenetv1_100",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "mnasnet_small",
    "tf_efficientnet_lite0",
    "resnet18",
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def folded(network: nn.Module) -> fx.GraphModule:
    module = trace(network.eval())
    fold_batch_norms(module)
    return module


def names(nodes: list[fx.Node]) -> list[str]:
    return [layer_name(node) for node in nodes]


def reachable_without(module: fx.GraphModule, removed: fx.Node) -> bool:
    """Return True if the output is reachable from the input."""
    waiting = [node for node in module.graph.nodes if node.op == "placeholder"]
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node is removed or node in seen:
            continue
        seen.add(node)
        waiting += list(node.users)
    return any(node.op == "output" for node in seen)


class Mixed(nn.Module):
    """Branches, a gate, a constant with many readers, and an early size."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.stem, self.left, self.right = (nn.Conv2d(3 if i == 0 else 4, 4, 1) for i in range(3))
        self.gate, self.down, self.head = nn.Sigmoid(), nn.Conv2d(4, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        constant = self.scale * 2
        x = self.stem(x)
        x = self.left(x) + self.right(x)
        x = x * self.gate(x)
        count = x.shape[0]
        x = self.down(x) * constant
        return self.head(x.mean((2, 3)).view(count, -1))


def test_cut_points_of_a_mixed_network() -> None:
    module = trace(Mixed().eval())
    # Not at `down`: `view` reads an earlier size. The constant does not count.
    found = [node.name for node in cut_points(module)]
    assert found == ["stem", "add", "mul_1", "view", "head"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_removing_a_cut_point_disconnects_the_output(name: str) -> None:
    module = folded(timm.create_model(name))
    found = set(cut_points(module))
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "output"):
            assert (node in found) is not reachable_without(module, node), node.name


def test_the_rest_can_be_computed_from_a_cut_point() -> None:
    module = folded(timm.create_model("mobilenetv3_small_050"))
    images = torch.randn(2, 3, 64, 64)
    cuts = cut_points(module)
    logits, results = with_outputs(module, cuts)(images)
    nodes = list(module.graph.nodes)
    for cut, result in zip(cuts, results, strict=True):
        interpreter = fx.Interpreter(module)
        interpreter.env = {cut: result}
        for node in nodes[nodes.index(cut) + 1 : -1]:
            interpreter.env[node] = interpreter.run_node(node)
        assert torch.equal(interpreter.env[nodes[-2]], logits)


def test_a_returned_intermediate_prevents_later_cut_points() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x.relu()
            return y.exp(), y

    assert [node.name for node in cut_points(fx.symbolic_trace(Two()))] == ["relu"]


# --- blocks -------------------------------------------------------------------


def test_a_chain_of_plain_layers_has_no_blocks() -> None:
    chain = folded(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    assert names(cut_points(chain)) == ["0", "1", "2"]
    assert block_outputs(chain) == []  # the last layer gives the logits


BLOCKS = {
    "mobilenetv1_100": (["blocks.0.0.bn2_act", "blocks.1.0.bn2_act"], 13),
    "mobilenetv2_100": (["blocks.0.0.conv_pw", "blocks.1.0.conv_pwl", "blocks.1.1.add"], 17),
    "mobilenetv3_large_100": (["blocks.0.0.add", "blocks.1.0.conv_pwl"], 15),
    "mobilenetv4_conv_small": (["blocks.2.0.pw_proj.conv", "blocks.2.1.add"], 12),
    "tf_efficientnet_lite0": (["blocks.0.0.conv_pw", "blocks.1.0.conv_pwl"], 16),
    "resnet18": (["layer1.0.act2", "layer1.1.act2", "layer2.0.act2"], 8),
    "resnet50": (["layer1.0.act3"], 16),
    "inception_v3": (["Mixed_5b.cat", "Mixed_5c.cat"], 11),
    "vgg11_bn": ([], 0),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_outputs_by_name(name: str) -> None:
    """One node per block of the network's structure, and no others."""
    first, count = BLOCKS[name]
    module = folded(timm.create_model(name))
    found = names(block_outputs(module))
    assert found[: len(first)] == first
    assert len(found) == count
    cuts = names(cut_points(module))
    assert [cut for cut in cuts if cut in found] == found  # in graph order


# --- student and teacher ------------------------------------------------------


def small_student(name: str, **options: object) -> tuple[Student, Tensor]:
    images = torch.randn(2, 3, 64, 64)
    student = fat.prepare(timm.create_model(name).eval(), images, QuantSpec(**options))  # type: ignore[arg-type]
    fat.calibrate(student, images)
    return student, images


def has_counterpart(student: Student, node: fx.Node) -> bool:
    try:
        counterpart(student.network, node)
    except FatError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "reloaded"),
    [*((name, False) for name in ARCHITECTURES), ("mobilenetv1_100", True), ("resnet18", True)],
)
def test_counterparts_without_quantization_equal_the_teacher(
    tmp_path: Path, name: str, reloaded: bool
) -> None:
    student, images = small_student(name)
    if reloaded:  # a loaded graph has the names of nodes only
        fat.save(student, tmp_path / "student.safetensors")
        student = fat.load(tmp_path / "student.safetensors")
    cuts = [node for node in cut_points(student.teacher) if has_counterpart(student, node)]
    assert set(block_outputs(student.teacher)) <= set(cuts)
    twins = [counterpart(student.network, node) for node in cuts]
    assert set(twins) <= set(cut_points(student.network))
    with disabled(student), torch.no_grad():
        logits, ours = with_outputs(student.network, twins)(images)
    wanted, theirs = with_outputs(student.teacher, cuts)(images)
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    for node, a, b in zip(cuts, theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max()), msg=node.name)


def test_block_outputs_rejects_a_students_graph() -> None:
    student, _ = small_student("resnet18")
    with pytest.raises(FatError, match=r"holds quantizers.*student\.teacher"):
        block_outputs(student.network)


def test_a_counterpart_is_the_quantizer_of_that_name() -> None:
    student, _ = small_student("mobilenetv2_050")
    for node in block_outputs(student.teacher):
        twin = counterpart(student.network, node)
        assert student.network.get_submodule(str(twin.target)).layer == layer_name(node)


def test_input_of_a_fused_activation_has_no_counterpart() -> None:
    student, _ = small_student("mobilenetv2_050")
    stem = next(node for node in student.teacher.graph.nodes if node.target == "conv_stem")
    with pytest.raises(FatError, match=r"does not compute 'conv_stem'.*the activation's node"):
        counterpart(student.network, stem)
    (activation,) = stem.users
    assert counterpart(student.network, activation).op == "call_module"
    other = next(
        node for node in folded(timm.create_model("resnet18")).graph.nodes if "layer1" in node.name
    )
    with pytest.raises(FatError, match=f"does not compute '{other.name}'"):
        counterpart(student.network, other)


def test_with_outputs_shares_tensors_and_keeps_the_graph() -> None:
    student, images = small_student("mobilenetv2_050")
    code = student.network.code
    nodes = [counterpart(student.network, n) for n in block_outputs(student.teacher)]
    wider = with_outputs(student.network, nodes)
    assert student.network.code == code
    assert {id(p) for p in wider.parameters()} <= {id(p) for p in student.parameters()}
    assert not wider.training
    logits, features = wider(images)
    assert torch.equal(logits, student.network(images))
    sum(feature.square().mean() for feature in features).backward()
    names_of = {id(p): name for name, p in student.named_parameters()}
    # Features give gradients to everything before the last output, and to nothing after it.
    silent = {names_of[id(p)] for p in student.parameters() if p.grad is None}
    assert silent
    assert all(
        "conv_head" in n or "global_pool" in n or "classifier" in n or "bn2_act" in n
        for n in silent
    )
