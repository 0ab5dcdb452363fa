"""Quantize a network and train its thresholds: python train.py model=mobilenet_v2 quant.bits=8."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from fat import cli
from fat.config import RunConfig, parse


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(composed: DictConfig) -> float:
    """Run one experiment; the result is what sweepers make small."""
    config = parse(RunConfig, composed)
    # Slow imports wait until the config is known to be good.
    from fat.experiment import run

    return run(config, cli.run_directory(), cli.sweep_group())


if __name__ == "__main__":
    cli.guarded(main, RunConfig)
