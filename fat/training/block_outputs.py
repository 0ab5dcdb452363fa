"""Outputs of the blocks of a student and its teacher, for the feature loss."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, fx

from fat.evaluation.layer_analysis import disabled
from fat.graph.partition import block_outputs, counterpart, with_outputs
from fat.models.student import Student
from fat.training.losses import relative_error
from fat.utils import distributed
from fat.utils.errors import FatError
from fat.utils.precision import full_precision

__all__ = ["BlockOutputs"]

logger = logging.getLogger(__name__)

RESCALED = 0.1
"""Relative squared error above which a tensor of the float student counts as rescaled."""


class BlockOutputs:
    """Runs a student and its teacher, returning the outputs of their blocks with the logits.

    The blocks are those of :func:`fat.graph.partition.block_outputs`. Some equalization methods
    rescale the channels of a tensor and compensate for it in the next layer, so that a correct
    student has other values than the teacher there. Such blocks are found on the first images and
    excluded, with a warning.

    Args:
        student: Calibrated student; its tensors are shared.

    Raises:
        FatError: If the network has no blocks.
    """

    def __init__(self, student: Student) -> None:
        self._student = student
        self._theirs = block_outputs(student.teacher)
        if not self._theirs:
            raise FatError(
                "The network has no blocks for the feature loss: no residual addition, no "
                "concatenation, no projection. Type optim.feature_weight=0."
            )
        self._selected = False
        self._forward: Callable[..., tuple[Tensor, list[Tensor]]] = self._run
        self._networks: dict[torch.device, tuple[fx.GraphModule, fx.GraphModule]] = {}

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Run both networks, the student's with gradients.

        Args:
            images: [N, 3, H, W].

        Returns:
            Logits of the teacher and the student, then outputs of the teacher's and the student's
            blocks.
        """
        teacher, student = self.select(images)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), full_precision(images.device):
            exact, wanted = teacher(images)
        logits, given = self._forward(student, images)
        return exact, logits, wanted, given

    def compile(self, mode: str) -> None:
        """Compile the student's forward pass, see :meth:`fat.models.student.Student.compiled`."""
        self._student.quantizer_batch.values()
        self._forward = torch.compile(self._run, mode=mode)

    def _run(self, student: fx.GraphModule, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        with self._student.quantizer_batch.computed():
            logits, outputs = student(images)
        return logits, outputs

    @torch.no_grad()
    def select(self, images: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Exclude the blocks that equalization rescaled, on the first call.

        It should be called before training, which changes the student's float function, too. Of
        several processes, which all have to call it, the main process decides.

        Args:
            images: [N, 3, H, W]; N may be 0 except in the main process.

        Returns:
            Teacher and student with the outputs of the other blocks.

        Raises:
            FatError: If all blocks are rescaled.
        """
        if not self._selected:
            # Without equalization nothing is rescaled, even after training.
            if self._student.spec.equalize.methods:
                rescaled = self._rescaled(images) if distributed.rank() == 0 else []
                names = set(distributed.broadcast_object([node.name for node in rescaled]))
                self._exclude([node for node in self._theirs if node.name in names])
            self._selected = True
        # Their constants stay where the student was when they were built.
        if images.device not in self._networks:
            self._networks[images.device] = self._pair(self._theirs)
        return self._networks[images.device]

    def _rescaled(self, images: Tensor) -> list[fx.Node]:
        images = images.contiguous(memory_format=torch.channels_last)
        teacher, student = self._pair(self._theirs)
        with disabled(self._student), full_precision(images.device):
            wanted, given = teacher(images)[1], student(images)[1]
        return [
            node
            for node, exact, moved in zip(self._theirs, wanted, given, strict=True)
            if float(relative_error([exact], [moved])) >= RESCALED
        ]

    def _pair(self, theirs: list[fx.Node]) -> tuple[fx.GraphModule, fx.GraphModule]:
        teacher, student = self._student.teacher, self._student.network
        ours = [counterpart(student, node) for node in theirs]
        return with_outputs(teacher, theirs), with_outputs(student, ours)

    def _exclude(self, rescaled: list[fx.Node]) -> None:
        if len(rescaled) == len(self._theirs):
            raise FatError(
                "Equalization rescaled the outputs of all blocks, so the feature loss cannot be "
                "computed. Type optim.feature_weight=0, or quant.equalize.method=none."
            )
        if rescaled:
            logger.warning(
                "Excluding %d of %d blocks from the feature loss, as equalization rescaled their "
                "outputs: %s.",
                len(rescaled),
                len(self._theirs),
                ", ".join(node.name for node in rescaled),
            )
        self._theirs = [node for node in self._theirs if node not in rescaled]
