"""What every export target offers: writing a network, and running the file that was written."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor, fx

from fat.export.lowering import Integers, Style

__all__ = ["ExportBackend", "Kernels", "Program", "Runtime", "Tolerance"]


@dataclass(frozen=True)
class Program:
    """What is to be written.

    Attributes:
        network: Images [N, 3, H, W] → logits, or, where ``tensors`` are told, (logits, integers of
            every quantizer, …).
        example: Images [N, 3, H, W] of the size that the file shall take, N ≥ 2.
        tensors: What the results after the first are.
        weight_bits: Bits of each quantized weight, by the name of its tensor.
        metadata: Texts to keep in the file, by name.
    """

    network: fx.GraphModule
    example: Tensor
    tensors: tuple[Integers, ...] = ()
    weight_bits: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def logits_only(self) -> fx.GraphModule:
        """The network without the results after the first."""
        if not self.tensors:
            return self.network
        network = copy.deepcopy(self.network)
        output = network.graph.output_node()
        output.args = (output.args[0][0],)  # type: ignore[index]
        network.graph.eliminate_dead_code()
        network.recompile()
        return network


@dataclass(frozen=True)
class Kernels:
    """What a runtime really computes, after its own optimization.

    Attributes:
        operators: How many operators of each kind there are.
        integer_layers: How many convolutions and linear layers run as integer kernels.
        float_layers: Those that run in float, by name or kind; empty for a file worth shipping.
        integer_operators: How many operators of all kinds compute in integers, layers among them:
            dequantize → operation → quantize fused into one kernel.
    """

    operators: Mapping[str, int]
    integer_layers: int
    float_layers: tuple[str, ...]
    integer_operators: int


@dataclass(frozen=True)
class Tolerance:
    """How far a file may be from its student.

    Attributes:
        off_by_one: Largest share of a single operation's integers that may differ, by one step.
        ties: Real values this near to the middle between two integers, in steps, may go to either.
            Pixels often lie there: 127.5 is their zero where mean and deviation are 0.5.
        sqnr_db: Least SQNR of the file's logits against the student's, dB; ``None`` for runtimes
            that round otherwise than the student: a network makes much of single steps.
        agreement: Least share of images, percent, with the same largest logit; ``None`` likewise.
    """

    off_by_one: float
    ties: float = 0.0
    sqnr_db: float | None = None
    agreement: float | None = None


class Runtime(Protocol):
    """A file, opened in its runtime on the CPU."""

    @property
    def name(self) -> str:
        """The runtime and its version, such as ``onnxruntime 1.32.0``."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Texts kept in the file, by name."""

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """[N, 3, H, W] as the file says, ``None`` where any size will do."""

    def run(self, images: Tensor) -> Sequence[Tensor]:
        """All results for float32 images [N, 3, H, W]: logits [N, classes] float32, then others."""

    def kernels(self) -> Kernels:
        """What it computes in.

        Raises:
            FatError: If the runtime does not tell.
        """


class ExportBackend(Protocol):
    """A format of files with its runtime."""

    name: str
    suffix: str
    style: Style
    tolerance: Tolerance

    def check(self) -> None:
        """Raise a FatError that says what to install if something is missing."""

    def write(self, program: Program, path: Path) -> None:
        """Write a file that gives logits, atomically.

        Raises:
            FatError: If an operator has no form in the format (it is named), or the place cannot be
                written; nothing is left behind.
        """

    def write_tapped(self, program: Program, shipped: Path, path: Path) -> None:
        """Write a twin of a file that :meth:`write` gave, which tells all integers too."""

    def advice(self) -> str:
        """What to do if integers differ on this machine; empty where nothing is known."""

    def open(self, path: Path, *, threads: int | None = None) -> Runtime:
        """Open a file, one of ours or another's.

        Raises:
            FatError: If it is missing, damaged or of another kind.
        """
