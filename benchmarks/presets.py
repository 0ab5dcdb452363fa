"""Run every preset with every init strategy, for the table in docs/results.md.

    python benchmarks/presets.py data=folder data.root=DIR [--out DIR] [--jobs 2]

A cell is one run of ``train.py experiment=PRESET init=STRATEGY``, evaluated on test images. To
finish within a day, blocks are reconstructed with ``--steps`` steps each, and presets that train in
epochs get ``--epochs``. All other arguments go to train.py.

Each cell has a run directory in ``--out`` with ``command.txt`` beside ``metrics.json``. The table
can be interrupted at any time: cells that the same command finished do not run again. A failed cell
shows the last line of its log and is repeated the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hydra import compose, initialize_config_dir
from tqdm.auto import tqdm

from fat.utils.io import write_text

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
LOG, COMMAND, METRICS = "output.txt", "command.txt", "metrics.json"


def choices(group: str) -> list[str]:
    """Return the choices of a config group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def command(preset: str, strategy: str, options: argparse.Namespace) -> list[str]:
    """Return the arguments of train.py for one cell, with the shortened training."""
    given = [f"experiment={preset}", f"init={strategy}", *options.overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        optim = compose("train", overrides=given).optim
    if optim.reconstruction.steps:
        given.append(f"optim.reconstruction.steps={options.steps}")
    elif optim.epochs:
        given.append(f"optim.epochs={options.epochs}")
    return given


def run_cell(arguments: Sequence[str], directory: Path, threads: int) -> None:
    """Run train.py in a directory, unless the same command finished there before."""
    text = shlex.join(("python", "train.py", *arguments))
    remembered = directory / COMMAND
    if remembered.is_file() and remembered.read_text() == text and result(directory):
        return
    directory.mkdir(parents=True, exist_ok=True)
    for name in (METRICS, COMMAND):
        (directory / name).unlink(missing_ok=True)
    with (directory / LOG).open("w") as log:
        outcome = subprocess.run(
            [
                sys.executable,
                "train.py",
                *arguments,
                "trainer=cpu",
                "logger=none",
                "trainer.progress=false",
                f"hydra.run.dir={directory}",
            ],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    if outcome.returncode == 0:
        write_text(remembered, text)


def result(directory: Path) -> dict[str, float] | None:
    """Return the metrics of the final network of a finished cell."""
    try:
        metrics = json.loads((directory / METRICS).read_text())
    except (OSError, ValueError):
        return None
    final: dict[str, float] = metrics["trained"] or metrics["calibrated"]
    return final


def cell(directory: Path) -> str:
    """Format agreement and SQNR, or the error."""
    metrics = result(directory)
    if metrics and (directory / COMMAND).is_file():
        return f"{metrics['agreement']:.1f} % {metrics['sqnr_db']:.1f} dB"
    lines = (directory / LOG).read_text().strip().splitlines()
    return f"failed: {lines[-1] if lines else 'no output'}"


def table(presets: Sequence[str], strategies: Sequence[str], out: Path) -> str:
    """Return a Markdown table: a row per preset, a column per strategy."""
    rows = [["preset", *strategies], ["---"] * (1 + len(strategies))]
    rows += [[p, *(cell(out / f"{p}-{s}") for s in strategies)] for p in presets]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Run the missing cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--presets", nargs="+", default=choices("experiment"))
    parser.add_argument("--init", nargs="+", default=choices("init"))
    parser.add_argument("--steps", type=int, default=30, help="reconstruction steps per block")
    parser.add_argument("--epochs", type=int, default=1, help="for presets that train in epochs")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--out", type=Path, default=Path("outputs/presets"))
    options, options.overrides = parser.parse_known_args()
    mistyped = [text for text in options.overrides if "=" not in text]
    if mistyped:
        parser.error(f"{mistyped[0]} is neither an option nor an override such as seed=1")
    for given, group in ((options.presets, "experiment"), (options.init, "init")):
        unknown = sorted(set(given) - set(choices(group)))
        if unknown:
            parser.error(f"no {group}={unknown[0]}; allowed: {', '.join(choices(group))}")
    out = options.out.resolve()
    cells = [
        (command(preset, strategy, options), out / f"{preset}-{strategy}")
        for preset in options.presets
        for strategy in options.init
    ]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(cells), desc="Cells") as bar:
        for _ in pool.map(lambda each: (run_cell(*each, threads), bar.update()), cells):
            pass
    print(table(options.presets, options.init, out))


if __name__ == "__main__":
    main()
