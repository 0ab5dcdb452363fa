"""Evaluate, analyze or export a finished run, or evaluate a file: python evaluate.py run=DIR."""

from fat.experiment.cli import evaluate

if __name__ == "__main__":
    evaluate()  # an @hydra.main: Hydra's completion in bash looks for these words
