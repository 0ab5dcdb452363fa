"""One bad input after another, in processes of their own, and what came back.

A child does cases in a row and tells the parent after each. A child that dies, hangs or is killed
costs the case that it was at; another child does the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import resource
import runpy
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fat.utils.errors import FatError

__all__ = ["ROOT", "Case", "Refused", "Result", "command", "results_of", "run"]

ROOT = Path(__file__).parents[2]
LIMIT = 120.0
"""Seconds that one case may take."""
MEMORY = 2_000_000
"""Kilobytes that one case may take beyond what the process had."""
RESULTS = (
    "student.safetensors",
    "metrics.json",
    "thresholds.csv",
    "config.yaml",
    "images.csv",
    "history.csv",
    "layers.csv",
    "details.json",
    "student.onnx",
    "checkpoints/*.ckpt",
)
"""What a run directory must not lose."""
EITHER, MUST_REFUSE, MUST_WORK = "either", "refused", "worked"


class Refused(Exception):
    """A command ended with exit status 2 and said why."""


@dataclass(frozen=True)
class Case:
    """An input and what is done with it.

    Attributes:
        row: The row of the page that it counts in.
        what: This very input, for people.
        call: Does it, and returns what it gave; it raises AssertionError for a wrong result.
        wanted: ``either``, ``refused`` or ``worked``.
        guard: A run directory whose results must stay as they are.
    """

    row: str
    what: str
    call: Callable[[], object]
    wanted: str = EITHER
    guard: Path | None = None


@dataclass(frozen=True)
class Result:
    """What came of a case: ``refused``, ``worked`` or ``FAIL``, and the text that came back."""

    case: Case
    came: str
    text: str
    seconds: float


def run(
    cases: Sequence[Case], canary: Path, *, jobs: int = 2, limit: float = LIMIT
) -> list[Result]:
    """Do all cases, each in a process that it may bring down.

    Args:
        cases: In their order.
        canary: A file that code hidden in an input would make.
        jobs: How many processes do them side by side.
        limit: Seconds that one case may take.
    """
    rows = [_Row(cases[start::jobs], canary) for start in range(jobs)]
    while open_rows := [row for row in rows if row.begin()]:
        left = min(row.started + limit for row in open_rows) - time.monotonic()
        ready, _, _ = select.select([row.reading for row in open_rows], [], [], max(left, 0.0))
        for row in open_rows:
            if row.reading in ready:
                row.receive()
            elif time.monotonic() > row.started + limit:
                row.end(f"no answer within {limit:g} s")
    found: list[Result | None] = [None] * len(cases)
    for start, row in enumerate(rows):
        found[start::jobs] = row.results
    return [result for result in found if result is not None]


class _Row:
    """Cases that one child after another does; the next takes over where one died."""

    def __init__(self, cases: Sequence[Case], canary: Path) -> None:
        self.cases, self.canary = cases, canary
        self.results: list[Result] = []
        self.pid = self.reading = 0
        self.started, self._buffer = 0.0, b""

    def begin(self) -> bool:
        """See that a child is at work; whether there is anything left to do."""
        if len(self.results) == len(self.cases):
            if self.pid:
                self.end("")
            return False
        if not self.pid:
            self.reading, writing = os.pipe()
            sys.stdout.flush()
            sys.stderr.flush()
            self.pid = os.fork()
            if self.pid == 0:
                os.close(self.reading)
                _child(self.cases[len(self.results) :], self.canary, writing)
            os.close(writing)
            self.started, self._buffer = time.monotonic(), b""
        return True

    def receive(self) -> None:
        """Take what the child tells."""
        received = os.read(self.reading, 1 << 16)
        if not received:
            self.end("the process died")
            return
        *lines, self._buffer = (self._buffer + received).split(b"\n")
        for line in lines:
            now, told = time.monotonic(), json.loads(line)
            case = self.cases[len(self.results)]
            self.results.append(Result(case, told["came"], told["text"], now - self.started))
            self.started = now

    def end(self, why: str) -> None:
        """Be done with the child; the case that it was at has failed, if any is left."""
        os.close(self.reading)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        if len(self.results) < len(self.cases):
            case, passed = self.cases[len(self.results)], time.monotonic() - self.started
            text = f"{why} (status {os.waitstatus_to_exitcode(status)})"
            self.results.append(Result(case, "FAIL", text, passed))


def _child(cases: Sequence[Case], canary: Path, writing: int) -> None:
    os.setsid()
    os.chdir(canary.parent)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # No core files, and no more than a machine's worth of memory.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + 8_000_000_000, resource.RLIM_INFINITY))
    with tempfile.TemporaryFile() as output:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
        for case in cases:
            came, text = _judged(case, canary)
            line = json.dumps({"came": came, "text": text})
            os.write(writing, line.encode() + b"\n")
    os._exit(0)


def _judged(case: Case, canary: Path) -> tuple[str, str]:
    """Do a case, and see that nothing was executed, lost or swallowed."""
    before = None if case.guard is None else results_of(case.guard)
    memory = _peak()
    came, text = _done(case)
    if canary.exists():
        canary.unlink()
        return "FAIL", f"code of the input was executed; {text}"
    if case.guard is not None and results_of(case.guard) != before:
        return "FAIL", f"results of the run were changed; {text}"
    if _peak() - memory > MEMORY:
        return "FAIL", f"took {(_peak() - memory) / 1e6:.1f} GB; {text}"
    if came != "FAIL" and case.wanted not in (EITHER, came):
        return "FAIL", f"wanted: {case.wanted}, came: {came}; {text}"
    return came, text


def _done(case: Case) -> tuple[str, str]:
    try:
        return "worked", str(case.call())
    except (FatError, Refused) as error:
        text = str(error)
        # A sentence, and not only what another library said.
        return ("refused", text) if len(text) > 20 else ("FAIL", f"says too little: {text!r}")
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "/fat/" in f.filename]
        last = ours[-1] if ours else place
        where = f"{Path(last.filename).name}:{last.lineno}"
        return "FAIL", f"{type(error).__name__}: {error} ({where})"


def _peak() -> int:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(one).ru_maxrss for one in who)


def results_of(directory: Path) -> dict[str, str]:
    """SHA-256 of the results in a run directory, by name."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in RESULTS
        for path in sorted(directory.glob(pattern))
        if path.is_file()
    }


def command(program: str, *words: str, folder: Path) -> str:
    """Run train.py, evaluate.py or a module from its first line, with words of a command line.

    Args:
        program: ``train.py``, or a module such as ``fat.report``.
        *words: As they reach the process.
        folder: The working directory.

    Returns:
        What was printed.

    Raises:
        Refused: If it ended with status 2 (or 1, for a sweep of which a job failed) and a sentence.
        AssertionError: If a traceback was printed, or it ended in any other way.
    """
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _program(program, words, folder, output.fileno())
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        text = output.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    if (folder / "executed").exists():
        raise AssertionError("code of the input was executed")
    if "Traceback (most recent call last)" in text:
        raise AssertionError(f"a traceback: {text.strip().splitlines()[-1]}")
    said = re.search(r"^(?:Error|[\w. -]+: error): (.*)", text, re.MULTILINE | re.DOTALL)
    if code == 2 and said:
        raise Refused(said[1].strip())
    failed = re.search(r"^(?:Failed: \S+: |\S* ?failed: |Job \d+ failed: )(.*)", text, re.MULTILINE)
    if code == 1 and failed:
        raise Refused(failed[1].strip())
    if code != 0:
        raise AssertionError(f"exit status {code}: {text.strip()[-300:]}")
    return text


def _program(program: str, words: Sequence[str], folder: Path, output: int) -> None:
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), write_through=True)
    os.chdir(folder)
    status: Any = 0
    try:
        if program.endswith(".py"):
            sys.argv = [str(ROOT / program), *words]
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            sys.argv = [program, *words]
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        status = leaving.code
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 0 if status is None else 1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what loggers print."""
    import logging

    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
