"""Bits per layer from the sensitivity analysis of an earlier run (``quant.mixed``)."""

from __future__ import annotations

import logging
from dataclasses import replace

from fat.evaluation.bit_allocation import choose_bits
from fat.evaluation.sensitivity_file import SensitivityReport, format_bits, read_sensitivity
from fat.experiment.config import RunConfig
from fat.models.float_model import FloatNetwork
from fat.models.student import Student
from fat.quant.config import QuantSpec
from fat.utils.commands import command_line
from fat.utils.errors import FatError

__all__ = ["check_layers", "check_network", "mixed_spec"]

logger = logging.getLogger(__name__)


def mixed_spec(config: RunConfig) -> tuple[QuantSpec, SensitivityReport | None]:
    """Return the quantization of a run, with the bits of each layer if ``quant.mixed`` is given.

    Args:
        config: The options of the run.

    Returns:
        The spec, and the sensitivity that its bits were chosen by.

    Raises:
        FatError: If the sensitivity cannot be read, or no choice fits ``quant.budget_mb``.
    """
    spec = config.quant
    if config.mixed is None:
        return spec, None
    measured = read_sensitivity(config.mixed)
    assert config.budget_mb is not None  # checked with the config
    chosen = choose_bits(
        measured.rows, config.budget_mb, first_bits=spec.first_bits, last_bits=spec.last_bits
    )
    logger.info(
        "Bits of weights for %.3f of %g MB; predicted logits' SQNR from weight noise alone: "
        "%.1f dB, at most %.1f dB for any choice:\n%s",
        chosen.size_mb,
        config.budget_mb,
        chosen.predicted_db,
        chosen.bound_db,
        format_bits(chosen.bits),
    )
    for option in ("granularity", "weight_init", "equalize"):
        theirs, ours = getattr(measured.spec, option), getattr(spec, option)
        if theirs != ours:
            logger.warning(
                "The sensitivity was measured with %s %s, this run has %s: the prediction may be "
                "wrong. Measure a run with the same options.",
                option,
                theirs,
                ours,
            )
    return replace(spec, layer_bits=chosen.bits), measured


def check_network(measured: SensitivityReport | None, source: FloatNetwork) -> None:
    """Raise a FatError if the sensitivity was measured on another network."""
    if measured is None:
        return
    if measured.model != source.name:
        raise _of_another_network(f"on {measured.model}, and this run is of {source.name}")
    if measured.weights != source.weights:
        logger.warning(
            "The sensitivity was measured with weights from %s, this run has them from %s.",
            measured.weights,
            source.weights,
        )


def check_layers(measured: SensitivityReport | None, student: Student) -> None:
    """Raise a FatError if layers differ, as with another number of classes."""
    if measured is None:
        return
    theirs = {row.layer: row.parameters for row in measured.rows if row.kind == "weight"}
    ours = {layer.layer: layer.weight.numel() for layer in student.layers()}
    for name in theirs | ours:
        if theirs.get(name) != ours.get(name):
            raise _of_another_network(
                f"where '{name}' has {theirs.get(name, 0)} weights, and here it has "
                f"{ours.get(name, 0)}"
            )


def _of_another_network(difference: str) -> FatError:
    return FatError(
        f"The sensitivity of quant.mixed was measured {difference}. Measure a run of this network: "
        f"{command_line('evaluate', 'run=DIR', 'analysis=sensitivity')}."
    )
