"""Judge, analyse or export a finished run, or judge a file: python evaluate.py run=DIR."""

from __future__ import annotations

import sys
from typing import Any

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(composed: DictConfig) -> Any:
    """Print and return the figures."""
    from fat import cli

    return cli.task(judge)(composed)


def judge(composed: DictConfig) -> dict[str, Any]:
    """Do what is asked of a finished run, or of a file."""
    from fat.config import EvaluateConfig, parse
    from fat.errors import FatError

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
        from fat.artefacts import judge_artefact

        return judge_artefact(config)
    if config.export.target != "none":
        from fat.artefacts import export_run

        return export_run(config)
    if config.analysis is not None:
        from fat.analyses import analyse_run

        return analyse_run(config)
    from fat.runs import evaluate_run

    return evaluate_run(config)


if __name__ == "__main__":
    if {"-sc", "--shell-completion"} & set(sys.argv):
        main()  # somebody waits for TAB: torch takes seconds to load, and conf/ says all
    else:
        from fat import cli
        from fat.config import EvaluateConfig

        cli.guarded(main, EvaluateConfig)
