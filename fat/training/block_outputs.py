"""What the blocks of a student give, beside what its teacher's give."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, fx

from fat.evaluation.layer_analysis import disabled
from fat.graph.partition import block_outputs, counterpart, with_outputs
from fat.models.student import Student
from fat.training.losses import relative_error
from fat.utils.errors import FatError

__all__ = ["BlockOutputs"]

logger = logging.getLogger(__name__)

OTHER = 0.1
"""Relative squared error from which on a float student's tensor is not the teacher's any more."""


class BlockOutputs:
    """A student and its teacher as networks that return their blocks' outputs beside the logits.

    The blocks' outputs are those of :func:`fat.graph.partition.block_outputs`. Some forms of
    equalization rescale the channels of a tensor and take that back in the next layer: the student
    is right there without giving what the teacher gives. Such places are found on the first images
    and left out, with a warning.

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
                "The network has no blocks whose outputs could be compared: no residual addition, "
                "no concatenation, no projection. Type optim.feature_weight=0."
            )
        self._networks: tuple[fx.GraphModule, fx.GraphModule] | None = None

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Run both networks, the student's with gradients.

        Args:
            images: [N, 3, H, W].

        Returns:
            The teacher's logits, the student's, the outputs of the teacher's blocks and those of
            the student's.
        """
        teacher, student = self._networks or self.select(images)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            exact, wanted = teacher(images)
        logits, given = student(images)
        return exact, logits, wanted, given

    @torch.no_grad()
    def select(self, images: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Find on a batch where the student in float gives what the teacher gives; once.

        Best called before anything is trained: training moves the student's float function too.

        Returns:
            The two networks.

        Raises:
            FatError: If there is no such place.
        """
        if self._networks is None:
            # Without equalization all tensors are the teacher's, also where training moved them.
            if self._student.spec.equalize.methods:
                self._leave_out(self._rescaled(images))
            self._networks = self._pair(self._theirs)
        return self._networks

    def _rescaled(self, images: Tensor) -> list[fx.Node]:
        images = images.contiguous(memory_format=torch.channels_last)
        teacher, student = self._pair(self._theirs)
        wanted = teacher(images)[1]
        with disabled(self._student):
            given = student(images)[1]
        return [
            node
            for node, exact, moved in zip(self._theirs, wanted, given, strict=True)
            if float(relative_error([exact], [moved])) >= OTHER
        ]

    def _pair(self, theirs: list[fx.Node]) -> tuple[fx.GraphModule, fx.GraphModule]:
        teacher, student = self._student.teacher, self._student.network
        ours = [counterpart(student, node) for node in theirs]
        return with_outputs(teacher, theirs), with_outputs(student, ours)

    def _leave_out(self, other: list[fx.Node]) -> None:
        if len(other) == len(self._theirs):
            raise FatError(
                "No block of the student gives in float what the teacher's gives, so their outputs "
                "cannot be compared. Type optim.feature_weight=0, or quant.equalize.method=none."
            )
        if other:
            logger.warning(
                "%d of %d blocks do not give in float what the teacher's give, as equalization "
                "may rescale it; they are left out of the comparison of outputs: %s.",
                len(other),
                len(self._theirs),
                ", ".join(node.name for node in other),
            )
        self._theirs = [node for node in self._theirs if node not in other]
