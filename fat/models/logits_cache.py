"""Cache of teacher logits, keyed by batch content.

Jobs of a sweep with the same network and images can share a cache file: validation and test images,
and training crops too, because these depend only on seed and epoch.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor, fx

__all__ = ["TeacherLogitsCache"]

logger = logging.getLogger(__name__)

TIMEOUT = 60.0
"""Time to wait for another process that writes to the same file, seconds."""


class TeacherLogitsCache:
    """Cache of a network's logits, keyed by a hash of the batch's pixels.

    Cached logits equal recomputed ones bit for bit: the key includes the network, the version of
    torch and the number of threads.

    Args:
        network: The float network.
        file: An SQLite file that several runs may share; ``None`` keeps the logits in memory.

    Attributes:
        misses: Number of images that the network processed.
        hits: Number of images whose logits were in the cache.
    """

    def __init__(self, network: fx.GraphModule, file: Path | None = None) -> None:
        self._key = _fingerprint(network)
        self._memory: dict[bytes, Tensor] = {}
        self._file = file
        self.misses = self.hits = 0
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)

    def is_worthwhile(self, images: Tensor) -> bool:
        """Return whether to use the cache for a batch.

        It does not pay off on a GPU, where hashing costs more than computing, nor in memory for
        training crops, since one run never repeats them.
        """
        if images.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        return self._file is not None or not torch.is_grad_enabled()

    def __call__(self, images: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Return cached logits [N, classes], or compute and store them.

        Args:
            images: Images [N, 3, H, W], float32, on the CPU.
            compute: Function that computes their logits.
        """
        key = self._hash(images)
        cached = self._load(key)
        if cached is not None:
            self.hits += len(images)
            return cached
        logits = compute(images)
        self.misses += len(images)
        self._save(key, logits)
        return logits

    def _hash(self, images: Tensor) -> bytes:
        digest = hashlib.sha256(self._key)
        digest.update(repr((tuple(images.shape), images.dtype)).encode())
        # One order for both memory formats.
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


@contextmanager
def _open(file: Path) -> Iterator[sqlite3.Connection]:
    """Open the file for one transaction: no connection may stay open over a fork."""
    with closing(sqlite3.connect(file, timeout=TIMEOUT)) as database:
        # If the machine crashes the file may be lost, but it can be recomputed.
        database.execute("PRAGMA synchronous = OFF")
        database.execute(
            "CREATE TABLE IF NOT EXISTS logits (key BLOB PRIMARY KEY, rows INTEGER, logits BLOB)"
        )
        with database:
            yield database


def _fingerprint(network: fx.GraphModule) -> bytes:
    """Return a hash of everything that the network's output depends on."""
    digest = hashlib.sha256()
    digest.update(f"{torch.__version__} {torch.get_num_threads()} {network.code}".encode())
    digest.update(repr(network).encode())  # strides, paddings, bounds
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
