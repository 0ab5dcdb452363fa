"""Judge, analyse or export a finished run, or judge a file: python evaluate.py run=DIR."""

from __future__ import annotations

from typing import Any

import hydra
from omegaconf import DictConfig

from fat.experiment import cli
from fat.experiment.config import EvaluateConfig, parse
from fat.utils.errors import FatError


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
@cli.task
def main(composed: DictConfig) -> dict[str, Any]:
    """Print and return the figures."""
    config = parse(EvaluateConfig, composed)
    asked = {
        "artefact": config.artefact is not None,
        "export": config.export.target != "none",
        "analysis": config.analysis is not None,
    }
    if sum(asked.values()) > 1:
        named = " and ".join(f"{name}=" for name, is_asked in asked.items() if is_asked)
        raise FatError(f"{named} ask for different things: type one at a time.")
    # Slow imports wait until the config is known to be good.
    if config.artefact is not None:
        from fat.experiment.evaluate import judge_artefact

        return judge_artefact(config)
    if config.export.target != "none":
        from fat.experiment.evaluate import export_run

        return export_run(config)
    if config.analysis is not None:
        from fat.experiment.evaluate import analyse_run

        return analyse_run(config)
    from fat.experiment.evaluate import evaluate_run

    return evaluate_run(config)


if __name__ == "__main__":
    cli.guarded(main, EvaluateConfig)
