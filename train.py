"""Quantize a network and train its thresholds: python train.py model=mobilenet_v2 quant.bits=8."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from fat.experiment import cli
from fat.experiment.config import RunConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@cli.task
def main(composed: DictConfig) -> float:
    """Run one experiment; the result is what sweepers make small."""
    return cli.job(composed)


if __name__ == "__main__":
    cli.guarded(main, RunConfig)
