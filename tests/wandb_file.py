"""Reader of the .wandb file of an offline run, which holds what the server would receive.

A header of seven bytes, then LevelDB's log format: blocks of 32 KiB with records of a checksum
(4 bytes), a length (2) and a type (1: whole, 2: first, 3: middle, 4: last part), little-endian.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32 * 1024, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """Content of an offline run.

    Attributes:
        config: Options by name.
        summary: Last values by dotted name.
        history: One mapping per logged row.
        artifacts: Names of files by (type, name) of the artifact.
        group: The run's group.
        name: The run's display name.
        tags: The run's tags.
    """

    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    group: str = ""
    name: str = ""
    tags: list[str] = field(default_factory=list)

    def logged(self, key: str) -> list[Any]:
        """All values of one key, in the order they were logged."""
        return [row[key] for row in self.history if key in row]


def payloads(content: bytes) -> Iterator[bytes]:
    """The records of a file, put together from their parts."""
    assert struct.unpack("<4sHB", content[:HEADER]) == (b":W&B", 0xBEE1, 0)
    place, parts = HEADER, bytearray()
    while place + HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER:  # too little for a record: zeros up to the next block
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + HEADER])
        data = content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (WHOLE, FIRST):
            assert not parts
        parts += data
        if kind in (WHOLE, LAST):
            yield bytes(parts)
            parts.clear()
        else:
            assert kind in (FIRST, MIDDLE), kind


def records(path: Path, seconds: float = 30.0) -> list[Record]:
    """All records, the last of which says that the run ended; W&B writes them in the background."""
    deadline = time.monotonic() + seconds
    while True:
        found = [Record.FromString(payload) for payload in payloads(path.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < deadline, "the run never ended"
        time.sleep(0.1)


def read(path: Path) -> OfflineRun:
    """All that a .wandb file tells."""
    run = OfflineRun()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.group, run.name = record.run.run_group, record.run.display_name
            run.tags = list(record.run.tags)
            _update(run.config, record.run.config.update)
        elif kind == "config":
            _update(run.config, record.config.update)
        elif kind == "summary":
            _update(run.summary, record.summary.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            _update(row, record.history.item)
            run.history.append(row)
        elif kind == "artifact":
            entries = record.artifact.manifest.contents
            key = (record.artifact.type, record.artifact.name)
            run.artifacts[key] = [entry.path for entry in entries]
    return run


def _update(into: dict[str, Any], items: Any) -> None:
    for item in items:
        *outer, key = list(item.nested_key) or [item.key]
        place = into
        for name in outer:
            place = place.setdefault(name, {})
        place[key] = json.loads(item.value_json)


def find(folder: Path) -> Path:
    """The file of the only offline run of a run directory."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return path
