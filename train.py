"""Quantize a network and train its thresholds: python train.py model=mobilenet_v2 quant.bits=8."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(composed: DictConfig) -> float:
    """Run one experiment; the result is what sweepers make small."""
    from fat import cli

    result: float = cli.task(cli.job)(composed)
    return result


if __name__ == "__main__":
    if {"-sc", "--shell-completion"} & set(sys.argv):
        main()  # somebody waits for TAB: torch takes seconds to load, and conf/ says all
    else:
        from fat import cli
        from fat.config import RunConfig

        cli.guarded(main, RunConfig)
