"""The float network's logits of batches that come more than once, so that they are computed once.

Jobs of a sweep that share network and images share all of them: validation, test, and training
crops too, which depend on seed and epoch alone.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, fx

__all__ = ["TeacherLogitsCache"]

logger = logging.getLogger(__name__)

WAIT = 60.0
"""Seconds to wait for another process that writes into the same file."""


class TeacherLogitsCache:
    """Logits by the content of the batch.

    A batch is known by a hash of its pixels, whatever made it. What is found is what the network
    would give again on this machine, bit for bit: the key holds the network, the version of torch
    and the number of threads.

    Args:
        network: The float network.
        file: An SQLite file that several runs may share; ``None`` keeps logits in memory, for this
            run alone.

    Attributes:
        computed: How many images went through the network.
        found: How many images' logits were known.
    """

    def __init__(self, network: fx.GraphModule, file: Path | None = None) -> None:
        self._key = _fingerprint(network)
        self._memory: dict[bytes, Tensor] = {}
        self._file = file
        self.computed = self.found = 0
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)

    def wants(self, images: Tensor) -> bool:
        """Whether it is worth looking: on a GPU logits are quicker computed than copied and hashed.

        Crops of one training do not come twice, so that a run by itself asks for the others only.
        """
        if images.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        return self._file is not None or not torch.is_grad_enabled()

    def __call__(self, images: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits [N, classes] of images [N, 3, H, W].

        Args:
            images: float32, on the CPU.
            compute: The network.
        """
        key = self._hash(images)
        known = self._load(key)
        if known is not None:
            self.found += len(images)
            return known
        logits = compute(images)
        self.computed += len(images)
        self._save(key, logits)
        return logits

    def _hash(self, images: Tensor) -> bytes:
        digest = hashlib.sha256(self._key)
        digest.update(repr((tuple(images.shape), images.dtype)).encode())
        # The same pixels, whether they lie in memory channel by channel or pixel by pixel.
        pixels = images.detach().permute(0, 2, 3, 1).contiguous()
        digest.update(pixels.numpy().data)
        return digest.digest()

    def _load(self, key: bytes) -> Tensor | None:
        if self._file is None:
            return self._memory.get(key)
        with _open(self._file) as database:
            row = database.execute(
                "SELECT rows, logits FROM logits WHERE key = ?", (key,)
            ).fetchone()
        if row is None:
            return None
        return torch.frombuffer(bytearray(row[1]), dtype=torch.float32).view(row[0], -1)

    def _save(self, key: bytes, logits: Tensor) -> None:
        if self._file is None:
            self._memory[key] = logits.detach().clone()
            return
        content = logits.detach().float().contiguous().numpy().tobytes()
        with _open(self._file) as database:
            database.execute(
                "INSERT OR REPLACE INTO logits VALUES (?, ?, ?)", (key, len(logits), content)
            )


class _open:  # noqa: N801 - used as a function
    """A connection for one transaction: nothing stays open between batches, or over a fork."""

    def __init__(self, file: Path) -> None:
        self._connection = sqlite3.connect(file, timeout=WAIT)
        # A crash of the machine may cost the file, which can be made again.
        self._connection.execute("PRAGMA synchronous = OFF")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS logits (key BLOB PRIMARY KEY, rows INTEGER, logits BLOB)"
        )

    def __enter__(self) -> sqlite3.Connection:
        return self._connection

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._connection.commit()
        self._connection.close()


def _fingerprint(network: fx.GraphModule) -> bytes:
    """A hash of all that decides what the network gives."""
    digest = hashlib.sha256()
    digest.update(f"{torch.__version__} {torch.get_num_threads()} {network.code}".encode())
    digest.update(repr(network).encode())  # strides, paddings, bounds
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
