"""Bad input at every door of FAT, and what came back; writes docs/robustness.md.

    python benchmarks/robustness.py                 all doors
    python benchmarks/robustness.py --only weights  one of them; the page stays as it is

A case passes if it is refused with a sentence (a FatError, or exit status 2 with "Error: …" and no
traceback), or if it works and what comes of it is right; if no code of the input was executed; and
if the results in the run directory are what they were. Needs what the tests need; no network.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the tests make ImageNet's archives

for quiet in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(quiet, "1")  # children are forked, which threads do not outlive
os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}

from doors.artefacts import artefacts  # noqa: E402
from doors.images import archives, images, indexes  # noqa: E402
from doors.lab import Lab  # noqa: E402
from doors.options import options  # noqa: E402
from doors.runs import runs  # noqa: E402
from doors.students import students  # noqa: E402
from doors.trial import Result  # noqa: E402
from doors.weights import weights  # noqa: E402

PAGE = ROOT / "docs" / "robustness.md"
DOORS: dict[str, tuple[str, Callable[[Lab], list[Result]]]] = {
    "options": ("Options of the command line", options),
    "weights": ("Weights files, `model.weights=`", weights),
    "students": ("Student files and checkpoints", students),
    "runs": ("Directories of runs, sweeps and searches", runs),
    "images": ("Images and folders of images", images),
    "archives": ("Archives and files of labels, `data=imagenet`", archives),
    "indexes": ("`images.csv`, listings and caches", indexes),
    "artefacts": ("Exported files, `artefact=`", artefacts),
}
TOGETHER = {
    ": empty": ": no such file",
    ": random bytes alone": ": no such file",
    ": zeros alone": ": no such file",
    ": text": ": no such file",
    ": a page of HTML": ": no such file",
    ": bytes after the end": ": more after the end",
    ": twice in one file": ": more after the end",
}
"""How rows of the page end that stand as one."""
SHOWN = 170
"""Letters of a message that the page shows."""
TEXT = """\
# Robustness

Whatever comes in, one of two things comes back: a sentence that says what came, what is allowed and
what to type, or a right result. No traceback reaches the user, no code inside a file is executed,
and bad input never costs a finished result. Every door of FAT is tried with bad input by

```bash
python benchmarks/robustness.py
```

which wrote this page and ends with status 1 if any case fails. A case passes if it is *refused*
with such a sentence (status 2 of the command, no traceback), or *works* and its result is right;
if a file that hidden code would make is not there afterwards; if the results in the run directory
have the SHA-256 they had; and if it took less than two minutes and 2 GB of memory. Every case
runs in a process that it may bring down. Random bytes, places and texts follow `--seed` ({seed}
here). A sample of all this is part of the tests.

What *works* where a bit was flipped: safetensors, images and ONNX have no checksum over their
numbers, so a changed weight or pixel is a valid one. Checkpoints that FAT writes have checksums,
and they are compared.

{total}

"""


def main() -> int:
    """Do what is asked; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=tuple(DOORS), help="one door; leaves the page alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of the cases; leaves the page alone"
    )
    given = parser.parse_args()
    names = [given.only] if given.only else list(DOORS)
    results: dict[str, list[Result]] = {}
    with scratch() as folder:
        lab = Lab(folder, given.seed, given.share)
        for name in names:
            started = time.monotonic()
            results[name] = DOORS[name][1](lab)
            print(
                f"{name}: {summary(results[name])}, {time.monotonic() - started:.0f} s", flush=True
            )
            for result in failures(results[name])[:30]:
                print(f"  FAIL {result.case.row}: {result.case.what[:100]!r}: {result.text[:300]}")
        if given.only is None and given.share == 1.0:
            PAGE.write_text(page(results, given.seed, folder), encoding="utf-8")
            print(f"Wrote {PAGE.relative_to(ROOT)}.")
    return 1 if any(failures(found) for found in results.values()) else 0


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for everything, FAT's own cache included, but for the compiled kernels."""
    with tempfile.TemporaryDirectory(prefix="fat-robustness-") as name:
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        # All that takes long to import, before the first fork.
        import fat.experiment.evaluate
        import fat.experiment.sweep  # noqa: F401

        yield Path(name)
        shutil.rmtree(f"{name}/cache", ignore_errors=True)


def failures(results: Sequence[Result]) -> list[Result]:
    """The cases that did not pass."""
    return [result for result in results if result.came == "FAIL"]


def summary(results: Sequence[Result]) -> str:
    """How many were refused, worked and failed."""
    counts = Counter(result.came for result in results)
    text = f"{len(results):,} cases: {counts['refused']:,} refused, {counts['worked']:,} worked"
    return text + (f", {counts['FAIL']} FAILED" if counts["FAIL"] else "")


def page(results: dict[str, list[Result]], seed: int, folder: Path) -> str:
    """The page, one table a door, one line for each kind of input."""
    everything = [result for found in results.values() for result in found]
    verdict = "none failed" if not failures(everything) else f"{len(failures(everything))} failed"
    lines = [TEXT.format(seed=seed, total=f"In all {summary(everything)}; {verdict}.")]
    for name, found in results.items():
        head = "| tried | cases | refused | worked | what came back, for example | verdict |"
        lines += [f"## {DOORS[name][0]}\n", head, "|---|---|---|---|---|---|"]
        rows: dict[str, list[Result]] = {}
        for result in found:
            rows.setdefault(grouped(result.case.row), []).append(result)
        lines += [line(row, inside, folder) for row, inside in rows.items()]
        lines.append("")
    return "\n".join(lines)


def grouped(row: str) -> str:
    """The row of the page that a kind of input stands in."""
    end = next((end for end in TOGETHER if row.endswith(end)), None)
    return row if end is None else row.removesuffix(end) + TOGETHER[end]


def line(row: str, results: Sequence[Result], folder: Path) -> str:
    """One kind of input."""
    counts = Counter(result.came for result in results)
    order = ["FAIL", "refused", "worked"]
    shown = min(results, key=lambda result: (order.index(result.came), len(result.text)))
    # A short one is rarely the most typical; take the middle of those of its kind.
    alike = sorted((r for r in results if r.came == shown.came), key=lambda r: len(r.text))
    shown = alike[len(alike) // 2]
    verdict = "**FAIL**" if counts["FAIL"] else "pass"
    cells = (
        cell(row, folder),
        f"{len(results):,}",
        f"{counts['refused']:,}",
        f"{counts['worked']:,}",
        f"{code(shown.case.what, folder)}: {cell(shown.text, folder)}",
        verdict,
    )
    return f"| {' | '.join(cells)} |"


def cell(text: str, folder: Path) -> str:
    """A text in one cell of a table, shortened, without places of this machine."""
    text = re.sub(rf"{re.escape(str(folder))}/(?:[^\s':]*/)?([^\s':/]*)", r"\1", text)
    text = (
        text.replace(str(folder), "a folder").replace(str(ROOT), "").replace(str(Path.home()), "~")
    )
    text = re.sub(r"\b\d+-\d+-([a-z]+)\b", r"\1", re.sub(r"\s+", " ", text)).strip()
    text = re.sub(r"(\S)\1{30,}", r"\1…", text)
    text = text if len(text) <= SHOWN else f"{text[:SHOWN].rstrip()} …"
    text = text.encode(errors="backslashreplace").decode()
    return re.sub(r"([|<>*_])", r"\\\1", text) if "`" not in text else text.replace("|", "\\|")


def code(text: str, folder: Path) -> str:
    """What was tried, as code where it can be."""
    short = cell(text, folder)[:70].rstrip("\\")
    return f"“{short}”" if short else "as it was"


if __name__ == "__main__":
    sys.exit(main())
