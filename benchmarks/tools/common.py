"""Job, clock and memory measurement shared by the scripts in this folder.

A script gets the path of a job as its argument, a JSON file with

* ``recipe``, ``weight_bits``, ``activation_bits``, ``granularity`` (per_channel, per_tensor),
* ``inputs``: a folder with the float network and the images, see peers.py,
* ``out``: the output folder, ``threads``, ``seed``,

and writes ``result.json`` and the logits for ``val.npy`` there. It needs numpy and its tool, not
FAT.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULT, LOGITS, SHIPPED = "result.json", "logits.npy", "shipped.npy"


class Refused(Exception):
    """The tool cannot do this; the message is its own."""


class Job:
    """A job and its results."""

    def __init__(self, path: str | Path) -> None:
        fields = json.loads(Path(path).read_text())
        self.recipe: str = fields["recipe"]
        self.weight_bits: int = fields["weight_bits"]
        self.activation_bits: int = fields["activation_bits"]
        self.per_channel: bool = fields["granularity"] == "per_channel"
        self.inputs, self.out = Path(fields["inputs"]), Path(fields["out"])
        self.threads: int = fields["threads"]
        self.seed: int = fields["seed"]
        self.fields = fields
        self.result: dict[str, object] = {}
        # Before any library counts the cores.
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-self.threads :])

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of weights and of activations."""
        return self.weight_bits, self.activation_bits

    def array(self, name: str):
        """Load one of the input arrays."""
        import numpy as np

        return np.load(self.inputs / f"{name}.npy")

    def note(self, **fields: object) -> None:
        """Add fields to the result."""
        self.result.update(fields)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measure the quantization: from network and images in memory to the exported file.

        Several blocks add up, so that an evaluation of the simulation before the export counts
        neither as time nor as memory.
        """
        if "peak_mb" in self.result:
            Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
        self.result.setdefault("peak_before_mb", peak_mb())
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        for name, spent in (
            ("seconds", time.perf_counter() - wall),
            ("cpu_seconds", time.process_time() - cpu),
        ):
            self.result[name] = self.result.get(name, 0.0) + spent  # type: ignore[operator]
        self.note(peak_mb=max(peak_mb(), self.result.get("peak_mb", 0.0)))  # type: ignore[call-overload]

    @contextmanager
    def export(self, path: Path) -> Iterator[None]:
        """Measure the export to ONNX Runtime; a failure is noted and keeps the simulation.

        The simulation must be evaluated before: a failed export may change the network.
        """
        if not (self.out / LOGITS).is_file():
            raise RuntimeError("evaluate the simulation with job.logits() before the export")
        with self.timed():
            try:
                yield
                self.note(runtime="onnxruntime", file=path.name)
            except Exception as error:  # whatever the tool raises
                message = f"{type(error).__name__}: {error}"
                self.note(export_failed=message.splitlines()[0][:300])

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the CPU seconds of a part."""
        cpu = time.process_time()
        yield
        stages = self.result.setdefault("stages", {})
        stages[name] = time.process_time() - cpu  # type: ignore[index]

    def logits(self, values, name: str = LOGITS) -> None:
        """Store logits [N, classes]."""
        import numpy as np

        np.save(self.out / name, np.asarray(values, dtype=np.float32))

    def finish(self, *packages: str) -> None:
        """Write the result, with the versions of these packages."""
        found = {}
        for name in packages:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        self.note(versions=found)
        (self.out / RESULT).write_text(json.dumps(self.result, indent=1))


def peak_mb() -> float:
    """Return the peak memory of this process in MB (VmHWM, which exec resets)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def run(main) -> None:
    """Call ``main`` with the job of the command line; a refusal is a result."""
    job = Job(sys.argv[1])
    try:
        main(job)
    except Refused as error:
        job.note(refused=str(error))
        job.finish()
