"""Starts train.py over and over in new processes that need not import everything first.

A server forks itself for each: what is killed in the tests is a process of its own that runs
train.py from its first line, but for the seconds that ``import torch`` takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Warm:
    """The tests' end of the server."""

    def __init__(self, log: Path) -> None:
        self.log = log
        clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.warm"],
            cwd=ROOT, env=clean | {"PYTHONPATH": str(ROOT)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def _ask(self, **question: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(question), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def start(self, *arguments: str) -> int:
        """Begin ``train.py`` with arguments; its output goes into the log, which starts anew."""
        self.log.write_text("")
        pid: int = self._ask(start=arguments, log=str(self.log))
        return pid

    def wait(self, pid: int, seconds: float = 200.0) -> int | None:
        """Exit status, negative for a signal, or ``None`` after so many seconds."""
        status: int | None = self._ask(wait=pid, seconds=seconds)
        return status

    def run(self, *arguments: str) -> tuple[int | None, str]:
        """``train.py`` from begin to end: exit status and output."""
        status = self.wait(self.start(*arguments))
        return status, self.log.read_text()

    def kill(self, pid: int, how: signal.Signals = signal.SIGKILL) -> int | None:
        """Send a signal to the process, SIGKILL to its children too, and wait for its end."""
        if how == signal.SIGKILL:
            os.killpg(pid, how)
        else:
            os.kill(pid, how)
        return self.wait(pid)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)


@contextlib.contextmanager
def warm(log: Path) -> Iterator[Warm]:
    """A server for as long as the tests of one file take."""
    server = Warm(log)
    try:
        yield server
    finally:
        server.close()


def serve() -> None:
    import fat.sweeps  # noqa: F401 - all that takes long

    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            pid = os.fork()
            if pid == 0:
                _train(question["start"], question["log"])
            print(pid, flush=True)
        else:
            print(json.dumps(_ended(question["wait"], question["seconds"])), flush=True)


def _ended(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)


def _train(arguments: list[str], log: str) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["train.py", *arguments]
    status = 0
    try:
        runpy.run_path("train.py", run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
