"""Quantize a network and train its thresholds: python train.py model=mobilenet_v2 quant.bits=8."""

from fat.experiment.cli import train

if __name__ == "__main__":
    train()  # an @hydra.main: Hydra's completion in bash looks for these words
