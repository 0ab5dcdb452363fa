"""Which tensor gets which grid: the rules about first and last layers, signs and schemes."""

from __future__ import annotations

from fat.quant.config import Grid, QuantSpec

__all__ = ["activation_grid", "weight_grid"]


def weight_grid(spec: QuantSpec, layer: str, *, first: bool, last: bool) -> Grid:
    """Grid of a weight: always symmetric signed.

    Args:
        spec: What is asked of the network.
        layer: Name of the layer. A rule for this layer alone wins over all others.
        first: The layer reads the network's input.
        last: The layer gives the network's output. A rule for the last layer wins over the first's.
    """
    bits = spec.for_layer(layer) or _edge_bits(spec, first, last) or spec.for_weights
    return Grid(bits, "symmetric")


def activation_grid(
    spec: QuantSpec, *, non_negative: bool, feeds_first: bool, feeds_last: bool
) -> Grid:
    """Grid of an activation.

    Tensors that cannot be negative are unsigned in both schemes: with T_l = 0 the asymmetric grid
    is the unsigned one, and a lower threshold above 0 could not represent zero.

    Args:
        spec: What is asked of the network.
        non_negative: By the graph's structure no value is below 0 (after ReLU, say).
        feeds_first: It is the input of the network's first layer.
        feeds_last: It is the input of the network's last layer.
    """
    bits = _edge_bits(spec, feeds_first, feeds_last) or spec.for_activations
    if non_negative:
        return Grid(bits, "symmetric_unsigned")
    return Grid(bits, "affine" if spec.scheme == "asymmetric" else "symmetric")


def _edge_bits(spec: QuantSpec, first: bool, last: bool) -> int | None:
    if last and spec.last_bits is not None:
        return spec.last_bits
    return spec.first_bits if first else None
