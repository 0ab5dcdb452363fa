"""A sample of benchmarks/robustness.py, so that the command cannot rot; and its page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "benchmarks" / "robustness.py"
PAGE = ROOT / "docs" / "robustness.md"


@pytest.mark.slow
@pytest.mark.parametrize("door", ["weights", "archives"])
def test_a_sample_of_a_door_holds(door: str) -> None:
    before = PAGE.read_bytes()
    result = subprocess.run(
        [sys.executable, COMMAND, "--only", door, "--share", "0.03", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(rf"^{door}: \d+ cases: \d+ refused, \d+ worked, ", result.stdout, re.MULTILINE)
    assert PAGE.read_bytes() == before


def test_what_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself: a traceback, code that ran, a process that died, a lost result."""
    monkeypatch.syspath_prepend(COMMAND.parent)
    from doors.trial import Case, run

    from fat.utils.errors import FatError

    canary = tmp_path / "executed"
    (tmp_path / "run").mkdir()
    metrics = tmp_path / "run" / "metrics.json"
    metrics.write_text("{}")

    def refuses() -> None:
        raise FatError("What came is no such thing. Type another.")

    def fails() -> None:
        raise ValueError("what nobody expected")

    cases = [
        Case("", "refused", refuses, "refused", metrics.parent),
        Case("", "worked", lambda: "all is well", "worked"),
        Case("", "traceback", fails),
        Case("", "executed", canary.touch),
        Case("", "died", lambda: __import__("os")._exit(3)),
        Case("", "lost", lambda: metrics.write_text("[]"), guard=metrics.parent),
        Case("", "wrongly accepted", lambda: "fine", "refused"),
    ]
    results = {result.case.what: result for result in run(cases, canary)}
    assert list(results) == [case.what for case in cases]
    assert [result.came for result in results.values()] == ["refused", "worked", *["FAIL"] * 5]
    assert "ValueError: what nobody expected" in results["traceback"].text
    assert "code of the input was executed" in results["executed"].text
    assert "the process died" in results["died"].text
    assert "results of the run were changed" in results["lost"].text


def test_the_page_is_one_without_failures_and_without_this_machine() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "**FAIL**" not in text
    assert "none failed" in text
    for place in ("/tmp/", "/root", "/home/", str(ROOT)):
        assert place not in text, place
