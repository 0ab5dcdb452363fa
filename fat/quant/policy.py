"""Assignment of integer grids: rules for first and last layers, signs and schemes."""

from __future__ import annotations

from fat.quant.config import Grid, QuantSpec

__all__ = ["activation_grid", "weight_grid"]


def weight_grid(spec: QuantSpec, layer: str, *, first: bool, last: bool) -> Grid:
    """Return the grid of a weight, which is always symmetric.

    ``layer_bits`` takes precedence over ``last_bits``, and that over ``first_bits``.

    Args:
        spec: Quantization options.
        layer: Name of the layer.
        first: The layer reads the network's input.
        last: The layer computes the network's output.
    """
    bits = spec.for_layer(layer) or _edge_bits(spec, first, last) or spec.for_weights
    return Grid(bits, "symmetric")


def activation_grid(
    spec: QuantSpec, *, non_negative: bool, feeds_first: bool, feeds_last: bool
) -> Grid:
    """Return the grid of an activation.

    Non-negative tensors are unsigned in both schemes: an affine grid with T_l = 0 is the unsigned
    grid, and one with T_l > 0 could not represent zero.

    Args:
        spec: Quantization options.
        non_negative: The graph guarantees that no value is below 0, such as after ReLU.
        feeds_first: The tensor is the input of the network's first layer.
        feeds_last: The tensor is the input of the network's last layer.
    """
    bits = _edge_bits(spec, feeds_first, feeds_last) or spec.for_activations
    if non_negative:
        return Grid(bits, "symmetric_unsigned")
    return Grid(bits, "affine" if spec.scheme == "asymmetric" else "symmetric")


def _edge_bits(spec: QuantSpec, first: bool, last: bool) -> int | None:
    if last and spec.last_bits is not None:
        return spec.last_bits
    return spec.first_bits if first else None
