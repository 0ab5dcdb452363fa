"""Run train.py and evaluate.py many times without waiting for their imports.

A server process imports everything once and forks for each run: each run is its own process, which
executes the script from its first line and can be killed, but saves the seconds of the imports.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Warm:
    """Client of a server."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.warm"],
            cwd=ROOT,
            env=environment({"PYTHONPATH": str(ROOT)}),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def _ask(self, **question: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(question), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def start(self, *words: str, output: Path, errors: Path, **variables: str) -> int:
        """Start a script, or ``-m`` and a module, with output in files; return its process ID."""
        for path in {output, errors}:
            path.write_text("")
        files = [str(output), str(errors)]
        pid: int = self._ask(start=words, files=files, environment=environment(variables))
        return pid

    def wait(self, pid: int, seconds: float) -> int | None:
        """Return the exit status, negative for a signal, or ``None`` after a time limit."""
        status: int | None = self._ask(wait=pid, seconds=seconds)
        return status

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)


@functools.cache
def server() -> Warm:
    """Return the server of this test process."""
    started = Warm()
    atexit.register(started.close)
    return started


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without a W&B login, with more variables."""
    return {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | dict(variables)


class Trainings:
    """Runs of train.py with their output in one file."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def start(self, *arguments: str) -> int:
        """Start ``train.py`` with arguments and return its process ID."""
        return server().start("train.py", *arguments, output=self.log, errors=self.log)

    def wait(self, pid: int, seconds: float = 200.0) -> int | None:
        """Return the exit status, negative for a signal, or ``None`` after a time limit."""
        return server().wait(pid, seconds)

    def run(self, *arguments: str) -> tuple[int | None, str]:
        """Run ``train.py`` to its end; return exit status and output."""
        status = self.wait(self.start(*arguments))
        return status, self.log.read_text()

    def kill(self, pid: int, how: signal.Signals = signal.SIGKILL) -> int | None:
        """Send a signal to the process, SIGKILL to its children too, and wait for its end."""
        if how == signal.SIGKILL:
            os.killpg(pid, how)
        else:
            os.kill(pid, how)
        return self.wait(pid)


# ------------------------------------------------------------------------------------------ server


def serve() -> None:
    import fat.experiment.evaluate
    import fat.experiment.sweep  # noqa: F401 - all that takes long

    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            pid = os.fork()
            if pid == 0:
                _become(question["start"], question["files"], question["environment"])
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


def _become(words: list[str], files: list[str], variables: dict[str, str]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in enumerate(files, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    atexit._clear()  # registered by the server
    sys.argv = list(words)
    status = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    # As Python does when it exits.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
