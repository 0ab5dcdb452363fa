"""Block-wise reconstruction: train each block to reproduce its float output, one after another.

It gives the end-to-end distillation a better start: gradients pass through a single block instead
of the whole network, and the output of a block holds more information than the logits.

Source: Li et al. 2021 (BRECQ, arXiv 2102.05426). The mixed inputs are those of Wei et al. 2022
(QDrop, arXiv 2203.05740), applied to the input of the block.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.optim import Adam
from tqdm.auto import tqdm

from fat.graph.partition import block_outputs, counterpart, logits_node, segment
from fat.graph.patterns import module_of
from fat.models.student import Student
from fat.quant.quantized_layers import QuantLayer
from fat.quant.quantizers import ActivationQuantizer
from fat.training.config import TrainSpec
from fat.training.parameter_groups import parameter_groups
from fat.utils.batches import Images, first_images, passes
from fat.utils.errors import FatError
from fat.utils.schedules import annealed

__all__ = ["BlockResult", "reconstruct"]

logger = logging.getLogger(__name__)

Part = ActivationQuantizer | QuantLayer

FORWARD_BATCH = 32
"""Batch size of forward passes without training."""


@dataclass(frozen=True)
class BlockResult:
    """Result of the reconstruction of one block.

    Attributes:
        block: Name of the block.
        before: Relative squared error of its output on the validation images before training.
        after: The same after training.
        kept: Whether the error fell; otherwise the block was reset.
    """

    block: str
    before: float
    after: float
    kept: bool


def reconstruct(
    student: Student,
    images: Images,
    validation: Images,
    spec: TrainSpec,
    *,
    seed: int = 0,
    progress: bool = True,
    done: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], object] = lambda state: None,
) -> list[BlockResult]:
    """Minimize ‖f − f_float‖² / ‖f_float‖² of the student's blocks one after another, in place.

    f_float is the output of the student with its quantizers disabled. The input of a block in
    training is quantized, with each element replaced by the float one with probability
    ``spec.reconstruction.float_fraction``.

    Args:
        student: Calibrated student.
        images: Training batches. If a loader has fewer images than ``spec.reconstruction.images``,
            further epochs with other crops are used (:func:`fat.utils.batches.passes`).
        validation: Batches to decide for each block whether to keep the result.
        spec: Learning rates, and ``spec.reconstruction``.
        seed: Seed of the selection of images and of mixed elements.
        progress: Show a progress bar.
        done: Last argument of ``keep`` in an interrupted call, to resume after that block.
        keep: Called after every block with a state of plain values and tensors.

    Returns:
        One result per block, in the order of the network.

    Raises:
        FatError: If the student is not calibrated, or there are no images.
    """
    student.check_calibrated()
    options = spec.reconstruction
    floating = copy.deepcopy(student.network)
    for module in floating.modules():
        if isinstance(module, ActivationQuantizer):
            module.enabled = False
        elif isinstance(module, QuantLayer):
            module.weight_quantizer.enabled = False
    device = student.device
    train = _collect(passes(images), options.images).to(device)
    held = _collect(validation, options.images).to(device)
    exact, given = [train, held], [train, held]  # float and quantized inputs of the current block
    ends = [counterpart(student.network, node) for node in block_outputs(student.teacher)]
    ends.append(logits_node(student.network))
    generator = torch.Generator(device).manual_seed(seed)
    bar = tqdm(
        total=len(ends) * options.steps, desc="Reconstruct", disable=not progress, leave=False
    )
    results: list[BlockResult] = []
    if (
        done is not None
    ):  # `floating` was copied before: it has the weights of the calibrated student
        student.load_trained_state(done["student"])
        generator.set_state(done["generator"])
        results = [BlockResult(**result) for result in done["results"]]
    finished = len(results)
    start: fx.Node | None = None
    for index, end in enumerate(ends):
        block = segment(student.network, start, end)
        twin = segment(floating, _same(floating, start), _same(floating, end))
        wanted = [_forward(twin, x) for x in exact]
        if index < finished:
            bar.update(options.steps)
            given, exact = [_forward(block, x) for x in given], wanted
            start = end
            continue
        modules = _parts(block)
        output = _forward(block, given[1])
        before = _error(output, wanted[1])
        saved = [copy.deepcopy(module.state_dict()) for module in modules]
        _train(block, modules, (given[0], exact[0], wanted[0]), spec, generator, bar)
        trained = _forward(block, given[1])
        after = _error(trained, wanted[1])
        kept = after < before
        if kept:
            output = trained
        else:
            for module, state in zip(modules, saved, strict=True):
                module.load_state_dict(state)
        name = getattr(module_of(student.network, end), "layer", end.name)
        results.append(BlockResult(str(name), before, after, kept))
        logger.debug("Block to %s: error %.4f -> %.4f, kept: %s", name, before, after, kept)
        given, exact = [_forward(block, given[0]), output], wanted
        start = end
        keep(
            {
                "student": student.trained_state(),
                "generator": generator.get_state(),
                "results": [asdict(result) for result in results],
            }
        )
    bar.close()
    return results


def _train(
    block: fx.GraphModule,
    modules: list[Part],
    data: tuple[Tensor, Tensor, Tensor],
    spec: TrainSpec,
    generator: torch.Generator,
    bar: Any,
) -> None:
    options = spec.reconstruction
    groups = parameter_groups(modules, spec)
    if not groups:
        bar.update(options.steps)
        return
    quantized, exact, wanted = data
    optimizer = Adam(groups, lr=spec.lr)
    power = wanted.square().mean()
    for step in range(options.steps):
        rate = options.rate * spec.lr * annealed(step, options.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        device = quantized.device
        chosen = torch.randint(
            len(quantized), (options.batch_size,), generator=generator, device=device
        )
        x = _dense(quantized[chosen])
        if options.float_fraction > 0.0:
            mask = torch.rand(x.shape, generator=generator, device=device) < options.float_fraction
            x = torch.where(mask, exact[chosen], x)
        optimizer.zero_grad()
        loss = (block(_dense(x)) - wanted[chosen]).square().mean() / power
        loss.backward()
        optimizer.step()
        for module in modules:
            module.project()
        bar.update()


def _parts(block: fx.GraphModule) -> list[Part]:
    """Return the quantized layers and activation quantizers of a block."""
    found = (module_of(block, node) for node in block.graph.nodes)
    return [module for module in found if isinstance(module, (QuantLayer, ActivationQuantizer))]


def _collect(images: Images, count: int) -> Tensor:
    batches = list(first_images(images, count))
    if not sum(map(len, batches)):
        raise FatError("There are no images for reconstruction; pass at least one batch.")
    return torch.cat(batches)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


@torch.no_grad()
def _forward(block: fx.GraphModule, x: Tensor) -> Tensor:
    return torch.cat([block(_dense(part)) for part in torch.split(x, FORWARD_BATCH)])


def _error(output: Tensor, wanted: Tensor) -> float:
    error = (output.double() - wanted.double()).square().sum()
    return float(error / wanted.double().square().sum().clamp_min(1e-300))


def _same(network: fx.GraphModule, node: fx.Node | None) -> fx.Node | None:
    """Return the same node of a copy of the network."""
    if node is None:
        return None
    nodes: Iterable[fx.Node] = network.graph.nodes
    return next(twin for twin in nodes if twin.name == node.name)
