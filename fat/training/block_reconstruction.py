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
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Adam
from tqdm.auto import tqdm

from fat.graph.partition import block_outputs, counterpart, logits_node, segment
from fat.graph.patterns import module_of
from fat.models.student import Student
from fat.quant.batched import QuantizerBatch
from fat.quant.quantized_layers import QuantLayer
from fat.quant.quantizers import ActivationQuantizer
from fat.training.config import TrainSpec
from fat.training.parameter_groups import parameter_groups
from fat.utils import distributed
from fat.utils.batches import AnyBatch, Images, as_batches, passes, to_device
from fat.utils.errors import FatError
from fat.utils.precision import full_precision
from fat.utils.random import generator as seeded
from fat.utils.schedules import annealed

__all__ = ["BlockResult", "reconstruct"]

logger = logging.getLogger(__name__)

Part = ActivationQuantizer | QuantLayer

FORWARD_BATCH = 32
"""Batch size of forward passes without training on a CPU, where larger ones leave the cache."""
DEVICE_FORWARD_BATCH = 256
"""The same on other devices."""


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

    It computes in float32 on the student's device, also where the training uses bf16: the error of
    an 8-bit block is about as small as the rounding of bf16. Activations of one block on all images
    stay on the device, about five times the size of its largest input or output.

    With several processes, each holds the activations of its own images and computes its part of
    every batch, and gradients are summed. All processes draw the same batches, so that the result
    is that of one process up to the order of float sums, and identical in all of them.

    Args:
        student: Calibrated student.
        images: Training batches. If a loader has fewer images than ``spec.reconstruction.images``,
            further epochs with other crops are used (:func:`fat.utils.batches.passes`). With
            several processes, each passes its part of every batch.
        validation: Batches to decide for each block whether to keep the result. With several
            processes, each passes some of the batches.
        spec: Learning rates, and ``spec.reconstruction``.
        seed: Seed of the selection of images and of mixed elements.
        progress: Show a progress bar.
        done: Last argument of ``keep`` in an interrupted call, to resume after that block, on any
            device and with any number of processes.
        keep: Called after every block, in every process, with a state of plain values and tensors.

    Returns:
        One result per block, in the order of the network.

    Raises:
        FatError: If the student is not calibrated, or there are no images.
    """
    student.check_calibrated()
    with full_precision(student.device):
        return _reconstruct(student, images, validation, spec, seed, progress, done, keep)


def _reconstruct(
    student: Student,
    images: Images,
    validation: Images,
    spec: TrainSpec,
    seed: int,
    progress: bool,
    done: Mapping[str, Any] | None,
    keep: Callable[[dict[str, Any]], object],
) -> list[BlockResult]:
    options = spec.reconstruction
    floating = copy.deepcopy(student.network)
    for module in floating.modules():
        if isinstance(module, ActivationQuantizer):
            module.enabled = False
        elif isinstance(module, QuantLayer):
            module.weight_quantizer.enabled = False
    train = _collect(passes(images), options.images, student.device, divided=True)
    held = _collect(validation, options.images, student.device, divided=False)
    exact = [train.images, held.images]  # float inputs of the current block
    given = [train.images, held.images]  # quantized inputs
    ends = [counterpart(student.network, node) for node in block_outputs(student.teacher)]
    ends.append(logits_node(student.network))
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(
        total=len(ends) * options.steps, desc="Reconstruct", disable=not progress, leave=False
    )
    results: list[BlockResult] = []
    if done is not None:  # `floating` was copied before and has the calibrated student's weights
        student.load_trained_state(done["student"])
        generator.set_state(done["generator"])
        results = [BlockResult(**result) for result in done["results"]]
    finished = len(results)
    start: fx.Node | None = None
    for index, end in enumerate(ends):
        block = segment(student.network, start, end)
        twin = segment(floating, _same(floating, start), _same(floating, end))
        wanted = [_forward(twin, x) for x in exact]
        modules = _parts(block)
        quantizers = QuantizerBatch(
            [module for module in modules if isinstance(module, ActivationQuantizer)],
            [module for module in modules if isinstance(module, QuantLayer)],
        )
        if index < finished:
            bar.update(options.steps)
            given, exact = [_forward(block, x, quantizers) for x in given], wanted
            start = end
            continue
        output = _forward(block, given[1], quantizers)
        before = _error(output[: held.count], wanted[1][: held.count])
        saved = [copy.deepcopy(module.state_dict()) for module in modules]
        draws = _Draws(generator, train, options.batch_size, (seed, index))
        groups = parameter_groups(modules, spec)
        if groups:
            data = (given[0], exact[0], wanted[0])
            _train(block, quantizers, groups, data, spec, draws, bar)
        else:
            bar.update(options.steps)
        trained = _forward(block, given[1], quantizers)
        after = _error(trained[: held.count], wanted[1][: held.count])
        kept = after < before
        if kept:
            output = trained
        else:
            for module, state in zip(modules, saved, strict=True):
                module.load_state_dict(state)
        name = getattr(module_of(student.network, end), "layer", end.name)
        results.append(BlockResult(str(name), before, after, kept))
        logger.debug("Block to %s: error %.4f -> %.4f, kept: %s", name, before, after, kept)
        given, exact = [_forward(block, given[0], quantizers), output], wanted
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


@dataclass(frozen=True)
class _OwnImages:
    """The images of this process, among those of all processes.

    Attributes:
        images: [n, 3, H, W] on the student's device; one image of zeros if this process has none.
        count: Number of images of this process.
        rows: int64 [N] on the CPU: for each image of all processes its row in ``images``, −1 for
            the images of other processes.
    """

    images: Tensor
    count: int
    rows: Tensor


class _Draws:
    """Random draws of the training steps of one block, the same in every process.

    On a CPU, images and masks come from one generator in turn. On another device, masks are drawn
    by a generator of that device, which is seeded for each block, so that no state of a device has
    to be saved and a reconstruction can resume on any device.

    Args:
        generator: Generator on the CPU.
        images: The images of this process.
        batch_size: Images per step over all processes.
        key: Numbers that identify the block.
    """

    def __init__(
        self, generator: torch.Generator, images: _OwnImages, batch_size: int, key: tuple[int, ...]
    ) -> None:
        self.images, self.batch_size = images, batch_size
        self.device = images.images.device
        self._indices = self._masks = generator
        if self.device.type != "cpu":
            self._masks = torch.Generator(self.device)
            self._masks.manual_seed(int(seeded(*key).integers(2**63)))

    def batch(self) -> tuple[Tensor, Tensor]:
        """Draw a batch from the images of all processes.

        Returns:
            The rows of this process's images, int64 [n], and their places in the batch, int64 [n];
            both on the device.
        """
        total = len(self.images.rows)
        chosen = torch.randint(total, (self.batch_size,), generator=self._indices)
        rows = self.images.rows[chosen]
        places = torch.nonzero(rows >= 0).flatten()  # on the CPU, where it waits for nothing
        mine = torch.stack([rows[places], places])
        on_cuda = self.device.type == "cuda"
        if on_cuda and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            mine = mine.pin_memory()  # else the copy would wait for the device
        mine = mine.to(self.device, non_blocking=True)
        return mine[0], mine[1]

    def mask(self, x: Tensor, places: Tensor, fraction: float) -> Tensor:
        """Draw a mask for a batch of all processes.

        Args:
            x: Tensor [n, ...] of this process's images.
            places: Their places in the batch.
            fraction: Probability of each element.

        Returns:
            bool tensor of the shape of ``x``.
        """
        shape = (self.batch_size, *x.shape[1:])
        drawn = torch.rand(shape, generator=self._masks, device=self.device)
        return (drawn if len(x) == len(drawn) else drawn[places]) < fraction


def _train(
    block: fx.GraphModule,
    quantizers: QuantizerBatch,
    groups: list[dict[str, Any]],
    data: tuple[Tensor, Tensor, Tensor],
    spec: TrainSpec,
    draws: _Draws,
    bar: Any,
) -> None:
    options = spec.reconstruction
    quantized, exact, wanted = data
    fused = True if quantized.device.type == "cuda" else None  # one kernel for all parameters
    optimizer = Adam(groups, lr=spec.lr, fused=fused)
    gradients = _SummedGradients(parameter for group in groups for parameter in group["params"])
    own = draws.images.count / len(draws.images.rows)  # fraction of the images of all processes
    power = distributed.all_sum(wanted.square().mean() * own)
    for step in range(options.steps):
        rate = options.rate * spec.lr * annealed(step, options.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        rows, places = draws.batch()
        x = _dense(quantized[rows])
        if options.float_fraction > 0.0:
            mask = draws.mask(x, places, options.float_fraction)
            x = torch.where(mask, exact[rows], x)
        gradients.zero()
        if len(rows):
            # This process's part of the mean over the batch.
            weight = options.batch_size / len(rows)
            with quantizers.computed():
                output = block(_dense(x))
            loss = (output - wanted[rows]).square().mean() / (power * weight)
            loss.backward()
        gradients.all_sum()
        optimizer.step()
        quantizers.project()
        bar.update()
    optimizer.zero_grad()  # the gradients of finished blocks take no memory


class _SummedGradients:
    """Gradients of parameters that are summed over all processes in one collective.

    With several processes they are views of one vector; with one, they are autograd's own.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._vector: Tensor | None = None
        if distributed.size() > 1:
            sizes = [parameter.numel() for parameter in self._parameters]
            self._vector = self._parameters[0].new_zeros(sum(sizes))
            for parameter, part in zip(
                self._parameters, torch.split(self._vector, sizes), strict=True
            ):
                # In the parameter's memory format, as autograd and the optimizer expect.
                parameter.grad = part.as_strided(
                    parameter.shape, parameter.stride(), part.storage_offset()
                )

    def zero(self) -> None:
        """Reset the gradients before a backward pass, which adds to them."""
        if self._vector is not None:
            self._vector.zero_()
            return
        for parameter in self._parameters:
            parameter.grad = None

    def all_sum(self) -> None:
        """Sum the gradients over all processes; without a backward pass a process adds 0."""
        if self._vector is not None:
            distributed.all_sum_(self._vector)


def _parts(block: fx.GraphModule) -> list[Part]:
    """Return the quantized layers and activation quantizers of a block."""
    found = (module_of(block, node) for node in block.graph.nodes)
    return [module for module in found if isinstance(module, (QuantLayer, ActivationQuantizer))]


def _collect(
    images: Iterable[AnyBatch] | Tensor, count: int, device: torch.device, *, divided: bool
) -> _OwnImages:
    """Collect the first images of all processes.

    Args:
        images: Batches of this process.
        count: Maximum number of images of all processes; no further batch is drawn.
        device: Device to hold this process's images.
        divided: ``True`` if every process has its part of each batch, image by image in turn;
            ``False`` if whole batches are assigned to the processes in turn.
    """
    rank = distributed.rank()
    batches = iter(as_batches(images))
    parts: list[Tensor] = []
    rows: list[int] = []
    mine = 0
    while len(rows) < count:
        batch = next(batches, None)
        pixels = None if batch is None else to_device(batch, device)[0]
        number = -1 if pixels is None else len(pixels)
        numbers = distributed.gather_rows(torch.tensor(number)).tolist()
        if max(numbers) < 0:  # no process has a further batch
            break
        order = [(place, owner) for owner, many in enumerate(numbers) for place in range(many)]
        if divided:
            order.sort()
        taken = 0
        for _, owner in order[: count - len(rows)]:
            rows.append(mine + taken if owner == rank else -1)
            taken += owner == rank
        if pixels is not None and taken:
            parts.append(pixels[:taken])
            mine += taken
    shapes = distributed.gather_objects([list(pixels.shape[1:]) for pixels in parts[:1]])
    shape = next((shape for found in shapes for shape in found), None)
    if shape is None:
        raise FatError("There are no images for reconstruction; pass at least one batch.")
    collected = torch.cat(parts) if parts else torch.zeros(1, *shape, device=device)
    return _OwnImages(collected, mine, torch.tensor(rows))


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


@torch.no_grad()
def _forward(block: fx.GraphModule, x: Tensor, quantizers: QuantizerBatch | None = None) -> Tensor:
    size = FORWARD_BATCH if x.device.type == "cpu" else DEVICE_FORWARD_BATCH
    with nullcontext() if quantizers is None else quantizers.computed():
        return torch.cat([block(_dense(part)) for part in torch.split(x, size)])


def _error(output: Tensor, wanted: Tensor) -> float:
    """Return ‖output − wanted‖² / ‖wanted‖² over the images of all processes."""
    error = (output.double() - wanted.double()).square().sum()
    sums = distributed.all_sum(torch.stack([error, wanted.double().square().sum()]))
    return float(sums[0] / sums[1].clamp_min(1e-300))


def _same(network: fx.GraphModule, node: fx.Node | None) -> fx.Node | None:
    """Return the same node of a copy of the network."""
    if node is None:
        return None
    nodes: Iterable[fx.Node] = network.graph.nodes
    return next(twin for twin in nodes if twin.name == node.name)
