"""Draw the agreement and SQNR of finished runs side by side.

    python benchmarks/figure.py OUT.png "W8A8=outputs/a" "W4A4=outputs/b"

Needs matplotlib: pip install -e '.[plot]'.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

PANELS = (("agreement", "Agreement with float, %"), ("sqnr_db", "SQNR of the logits, dB"))
STAGES = (("calibrated", "plain calibration", "#b9c3cf"), ("trained", "FAT", "#2a6f97"))


def main() -> None:
    """Read each run's metrics.json and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN", help="label and run directory")
    options = parser.parse_args()
    runs = {
        label: json.loads((Path(folder) / "metrics.json").read_text())
        for label, _, folder in (pair.partition("=") for pair in options.runs)
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for axis, (key, title) in zip(axes, PANELS, strict=True):
        for offset, (stage, name, color) in enumerate(STAGES):
            heights = [metrics[stage][key] for metrics in runs.values()]
            places = [index + (offset - 0.5) * 0.38 for index in range(len(runs))]
            bars = axis.bar(places, heights, 0.36, label=name, color=color)
            axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        axis.set_xticks(range(len(runs)), [label.replace(" ", "\n") for label in runs], fontsize=9)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(length=0)
    axes[0].set_ylim(0, 112)
    axes[1].legend(frameon=False, fontsize=8, loc="upper right")
    axes[1].margins(y=0.25)
    figure.tight_layout()
    figure.savefig(options.out, dpi=150)


if __name__ == "__main__":
    main()
