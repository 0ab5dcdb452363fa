"""Base classes of export targets: one converts a network into a file, one runs such a file."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, fx

from fat.export.lowering import LoweringStyle, StoredGrid
from fat.utils.errors import FatError, missing_extra
from fat.utils.io import write_atomic

__all__ = ["ExportBackend", "Kernels", "Program", "Runtime", "Tolerance", "quiet"]


@dataclass(frozen=True)
class Program:
    """A network to convert.

    Attributes:
        network: Images [N, 3, H, W] → logits, or, with ``tensors``, (logits, integers of every
            quantizer, …).
        example: Images [N, 3, H, W] of the size that the file will take, N ≥ 2.
        tensors: Grids of the results after the first.
        weight_bits: Bits of each quantized weight, by the name of its tensor.
        metadata: Strings to store in the file, by name.
    """

    network: fx.GraphModule
    example: Tensor
    tensors: tuple[StoredGrid, ...] = ()
    weight_bits: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def logits_only(self) -> fx.GraphModule:
        """Return the network without the results after the first."""
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
    """Kernels that a runtime executes, after its own graph optimization.

    Attributes:
        operators: Number of operators of each kind.
        integer_layers: Number of convolutions and linear layers that run as integer kernels.
        float_layers: Names or kinds of those that run in float; empty for a valid quantized file.
        integer_operators: Number of all operators that compute in integers, layers included:
            dequantize → operation → quantize fused into one kernel.
    """

    operators: Mapping[str, int]
    integer_layers: int
    float_layers: tuple[str, ...]
    integer_operators: int


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted difference between a file and its student.

    Attributes:
        off_by_one: Largest fraction of a single operation's integers that may differ, by one step.
        ties: Real values this close to the middle between two integers, in steps, may be rounded
            to either. Pixels often lie there: 127.5 is their zero where mean and std are 0.5.
        sqnr_db: Least SQNR of the file's logits against the student's, dB. ``None`` for runtimes
            that round differently from the student, as networks amplify single steps.
        agreement: Least percentage of images with the same predicted class; ``None`` likewise.
    """

    off_by_one: float
    ties: float = 0.0
    sqnr_db: float | None = None
    agreement: float | None = None


class Runtime(ABC):
    """A file opened in its runtime on the CPU.

    Args:
        path: The file, written by FAT or by another tool.
        threads: Number of threads; ``None`` for torch's number.

    Attributes:
        input_shape: [N, 3, H, W] as stored in the file, ``None`` for dynamic sizes.
        metadata: Strings stored in the file, by name.

    Raises:
        FatError: If the file is missing, damaged, or does not take a batch of images.
    """

    title: ClassVar[str]
    input_shape: tuple[int | None, ...]
    metadata: Mapping[str, str]

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        if not path.is_file():
            raise FatError(f"There is no file {path}.")
        self.path = path
        self.threads = threads or torch.get_num_threads()

    @property
    @abstractmethod
    def name(self) -> str:
        """The runtime and its version, such as ``onnxruntime 1.32.0``."""

    @abstractmethod
    def forward(self, images: Tensor) -> Sequence[Tensor]:
        """Run one batch of a size that the file accepts; see :meth:`run`."""

    @abstractmethod
    def kernels(self) -> Kernels:
        """Return the kernels that the runtime executes.

        Raises:
            FatError: If the runtime does not expose them.
        """

    def run(self, images: Tensor) -> list[Tensor]:
        """Run the file, in parts where its batch size is fixed.

        Args:
            images: float32 [N, 3, H, W].

        Returns:
            All outputs: logits float32 [N, classes], then the others.

        Raises:
            FatError: If N is not a multiple of the file's batch size.
        """
        batch_size = self.input_shape[0] or len(images)
        if len(images) % batch_size:
            raise FatError(
                f"{self.path} takes batches of {batch_size} images; "
                f"type data.batch_size={batch_size}."
            )
        parts = [self.forward(part) for part in torch.split(images, batch_size)]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def cannot_open(self, reason: str) -> FatError:
        """Build the error for a file that the runtime rejects."""
        return FatError(
            f"{self.title} cannot open {self.path}: {reason.rstrip('.')}. The file is damaged or "
            "of another format."
        )

    def unsupported_input(self, found: object, accepted: str = "float32 tensor") -> FatError:
        """Build the error for a file whose inputs are not one batch of images."""
        return FatError(
            f"{self.path} takes {found}; FAT feeds one {accepted} of normalized images "
            "[N, 3, H, W]."
        )


class ExportBackend(ABC):
    """A file format and the runtime that verifies it.

    To add a target, subclass this in a module of its own and list the class in
    :data:`fat.export.registry.BACKENDS`. Arguments of ``__init__`` are options of ``conf/export``.

    Attributes:
        name: Name of the target, as in ``export=NAME``, and of its extra in pyproject.toml.
        title: Name of the runtime in messages.
        suffix: Suffix of the files it writes.
        opens: Suffixes of the files that its runtime opens.
        modules: Modules that have to be installed.
        runtime: Class that opens the files.
        style: Form of the integer graph that the converter expects.
        tolerance: Largest accepted difference between a file and its student.
        alternative: Alternative to installing the extra, for messages, as in "or export=onnx".
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffix: ClassVar[str]
    opens: ClassVar[tuple[str, ...]]
    modules: ClassVar[tuple[str, ...]] = ()
    runtime: ClassVar[type[Runtime]]
    style: ClassVar[LoweringStyle]
    tolerance: ClassVar[Tolerance]
    alternative: ClassVar[str] = ""

    def check(self) -> None:
        """Raise a FatError that says what to install if a module is missing."""
        if any(importlib.util.find_spec(module) is None for module in self.modules):
            raise missing_extra(self.name, self.title, self.alternative)

    @abstractmethod
    def convert(self, program: Program) -> bytes:
        """Convert a network that returns logits alone.

        Raises:
            FatError: If the format lacks an operator; the operator is named.
        """

    @abstractmethod
    def convert_with_integers(self, program: Program, shipped: Path) -> bytes:
        """Convert it to a file that also returns the integers of every quantizer.

        Args:
            program: The network.
            shipped: File with the result of :meth:`convert`.
        """

    def write(self, program: Program, path: Path) -> None:
        """Write the result of :meth:`convert` atomically.

        Raises:
            FatError: Also if the file cannot be written; nothing is left behind.
        """
        self.check()
        content = self.convert(program)
        write_atomic(path, lambda temporary: temporary.write_bytes(content))

    def write_with_integers(self, program: Program, shipped: Path, path: Path) -> None:
        """Write the result of :meth:`convert_with_integers` atomically."""
        content = self.convert_with_integers(program, shipped)
        write_atomic(path, lambda temporary: temporary.write_bytes(content))

    def open(self, path: Path, *, threads: int | None = None) -> Runtime:
        """Open a file, written by FAT or by another tool; see :class:`Runtime`."""
        self.check()
        return self.runtime(path, threads=threads)

    def mismatch_hint(self) -> str:
        """Return advice for integers that differ on this machine; empty if there is none."""
        return ""

    def cannot_write(self, operator: str | None, reason: str) -> FatError:
        """Build the error for a network that cannot be converted.

        Args:
            operator: Operator that the format lacks, if that is the reason.
            reason: Message of the converter.
        """
        detail = (
            f"the operator {operator} is not supported" if operator else f"the converter: {reason}"
        )
        return FatError(
            f"The network cannot be exported with export={self.name}: {detail}. Please report it "
            "with the name of the network."
        )


@contextlib.contextmanager
def quiet(*, native: bool = False) -> Iterator[None]:
    """Silence converters: warnings, output, log messages, and log handlers that they install.

    Args:
        native: Also silence what C++ code writes to stdout and stderr.
    """
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = root.handlers[:], root.level
    logging.disable(max(disabled, logging.WARNING))
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if native:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            null = os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, null)
            for stream in (1, 2):
                saved = os.dup(stream)
                stack.callback(os.close, saved)
                stack.callback(os.dup2, saved, stream)
                os.dup2(null, stream)
        try:
            yield
        finally:
            logging.disable(disabled)
            root.handlers[:] = handlers
            root.setLevel(level)
