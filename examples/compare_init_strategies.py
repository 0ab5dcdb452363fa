"""Compare init strategies in a sweep and print a table of its results.

    python examples/compare_init_strategies.py
    python examples/compare_init_strategies.py quant.bits=4 data=folder data.root=DIR

Arguments are options of train.py. The sweep also writes a report page with all runs.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
STRATEGIES = "percentile,minmax,mse"


def sweep(options: list[str], directory: Path) -> Path:
    """Run one job per strategy and return the table that the sweep writes."""
    chosen = [] if any(option.startswith("init=") for option in options) else [f"init={STRATEGIES}"]
    command = [sys.executable, ROOT / "train.py", "-m", *chosen, *options]
    subprocess.run([*command, f"hydra.sweep.dir={directory}"], check=True)
    return directory / "sweep.csv"


def main() -> None:
    """Run the sweep and print what each strategy gives before and after training."""
    directory = Path(tempfile.mkdtemp(prefix="init_strategies_", dir=Path.cwd()))
    table = sweep(sys.argv[1:], directory)
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    print(f"{'init':12s} {'agreement, %':>20s} {'SQNR, dB':>20s}")
    for row in rows:
        cells = [f"{row['option.init']:12s}"]
        for metric in ("agreement", "sqnr_db"):
            before, after = (row[f"{stage}.{metric}"] for stage in ("calibrated", "trained"))
            cells.append(f"{float(before):8.2f} -> {float(after or before):8.2f}")
        print(" ".join(cells))


if __name__ == "__main__":
    main()
