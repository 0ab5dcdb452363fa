"""What can be asked of a finished run beyond its figures; the answers go into its directory."""

from __future__ import annotations

import logging
from typing import Any

from fat.batches import first_images
from fat.config import EvaluateConfig
from fat.errors import FatError, unknown_name
from fat.files import check_writable
from fat.report.sensitivity import (
    SensitivityReport,
    format_worst,
    write_plot,
    write_sensitivity,
)
from fat.runs import open_run
from fat.sensitivity import sensitivity

__all__ = ["analyse_run"]

logger = logging.getLogger(__name__)


def analyse_run(config: EvaluateConfig) -> dict[str, Any]:
    """Make the analysis that ``config.analysis`` names: ``sensitivity``.

    It is measured on calibration images, since bits are chosen by it and nothing may be chosen on
    test images, and leaves sensitivity.csv, sensitivity.json and sensitivity.png.

    Args:
        config: What conf/evaluate.yaml composed.

    Returns:
        ``images`` (how many) and ``worst``, the name and kind of the most harmful tensor.

    Raises:
        FatError: If the analysis is unknown, the directory is no run or cannot be written into, or
            ``analysis_images`` is below 1.
    """
    if config.analysis != "sensitivity":
        raise unknown_name("analysis", config.analysis, ("sensitivity",))
    if config.analysis_images < 1:
        raise FatError(f"analysis_images is {config.analysis_images}; it must be at least 1.")
    opened = open_run(config)
    check_writable(opened.directory)
    loader = opened.batches(opened.data.calibration_dataloader())
    images = list(first_images(loader, config.analysis_images))
    count = sum(map(len, images))
    bar = "Sensitivity" if config.trainer.progress else None
    rows = sensitivity(opened.student, images, progress=bar)
    report = SensitivityReport(
        rows=rows,
        model=opened.student.origin["name"],
        weights=opened.student.origin["weights"],
        images={
            "source": opened.data_config.source,
            "root": opened.data_config.root,
            "split": "calibration",
            "count": count,
        },
        spec=opened.student.spec,
    )
    write_sensitivity(opened.directory, report)
    drawn = write_plot(opened.directory, report)
    logger.info(
        "The most harmful of %d tensors on %d calibration images (logits' SQNR and agreement when "
        "it alone is quantized, and when all but it are):\n%s\nAll of them: %s",
        len(rows), count, format_worst(rows), opened.directory / "sensitivity.csv",
    )  # fmt: skip
    if not drawn:
        logger.warning(
            "No plot, since matplotlib is not installed: type pip install 'fat-quant[plot]'."
        )
    return {"images": count, "worst": (rows[0].layer, rows[0].kind)}
