"""Options of a quantized network, and the integer grids of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fat.utils.errors import FatError, unknown_name
from fat.utils.options import Options, nested, option

__all__ = ["EqualizeSpec", "Grid", "InitSpec", "QuantSpec"]

Granularity = Literal["per_channel", "per_tensor"]
Scheme = Literal["symmetric", "asymmetric"]
Thresholds = Literal["fat", "lsq", "tqt", "frozen"]
Weights = Literal["frozen", "scale", "adaround"]
Bias = Literal["trained", "frozen"]
GridKind = Literal["symmetric", "symmetric_unsigned", "affine"]

BITS = range(2, 9)
_EARLIER_GRIDS = {"signed": "symmetric", "unsigned": "symmetric_unsigned", "asymmetric": "affine"}
EQUALIZATIONS = ("none", "depthwise", "cross_layer", "balanced", "exact")
MOST_PIXELS = 8192
"""Upper bound on the side of an image; larger values are rejected."""


def _check_bits(key: str, given: object) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or given not in BITS:
        raise FatError(f"{key} is {given!r}; allowed are whole numbers from 2 to 8, as in {key}=8.")


def _layer_bits(given: Any) -> tuple[tuple[str, int], ...]:
    try:
        pairs = [(name, bits) for name, bits in dict(given).items()]
        valid = len(pairs) == len(given) and all(isinstance(name, str) for name, _ in pairs)
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise FatError(
            f"layer_bits is {given!r}; allowed are names of layers with a bit-width each, every "
            "name once, as in layer_bits={'conv_stem': 8}."
        )
    for name, bits in pairs:
        _check_bits(f"layer_bits[{name!r}]", bits)
    return tuple(sorted(pairs))


def _strategies() -> Sequence[str]:
    # The registry needs torch, which help and completion do without.
    from fat.quant.range_estimators import STRATEGIES

    return tuple(STRATEGIES)


@dataclass(frozen=True)
class Grid:
    """The integers that one tensor may take.

    * ``symmetric``: −q…q with q = 2^(n−1)−1, zero point 0 (the narrow range, so that T maps to q).
    * ``symmetric_unsigned``: 0…2^n−1, zero point 0, for tensors that are never negative.
    * ``affine``: 0…2^n−1 with an integer zero point.

    Examples:
        >>> Grid(8, "symmetric").qmin, Grid(8, "symmetric").qmax, Grid(4, "symmetric_unsigned").qmax
        (-127, 127, 15)
    """

    bits: int
    kind: GridKind

    def __post_init__(self) -> None:
        _check_bits("bits", self.bits)
        object.__setattr__(self, "kind", _EARLIER_GRIDS.get(self.kind, self.kind))
        if self.kind not in get_args(GridKind):
            raise unknown_name("grid", self.kind, get_args(GridKind), earlier=_EARLIER_GRIDS)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Unpickle or copy; the state may be that of an earlier version."""
        self.__dict__.update(state)
        object.__setattr__(self, "kind", _EARLIER_GRIDS.get(self.kind, self.kind))

    @property
    def qmin(self) -> int:
        """The smallest integer of the grid."""
        return -self.qmax if self.kind == "symmetric" else 0

    @property
    def qmax(self) -> int:
        """The largest integer of the grid."""
        return (1 << (self.bits - 1)) - 1 if self.kind == "symmetric" else (1 << self.bits) - 1


@dataclass(frozen=True)
class InitSpec(Options, prefix="init.activation"):
    """Options of an init strategy: statistics of a tensor → its initial thresholds.

    Strategies are the functions of :mod:`fat.quant.range_estimators`.
    """

    name: str = option("minmax", "init strategy", allowed=_strategies)
    percentile: float = option(
        99.999,
        "percentage of the values inside the thresholds",
        above=50,
        at_most=100,
        only=("name", ("percentile",)),
    )
    exponent: float = option(
        2.4,
        "exponent p of the error Σ |x − Q(x)|^p that is minimized",
        at_least=1,
        at_most=10,
        only=("name", ("lp",)),
    )
    candidates: int = option(
        100,
        "number of evenly spaced thresholds that are tried before a finer search around the best",
        at_least=10,
        at_most=10_000,
        only=("name", ("mse", "lp", "entropy")),
    )


@dataclass(frozen=True)
class EqualizeSpec(Options, prefix="quant.equalize"):
    """Options of equalization, which balances the ranges of channels before quantization.

    Channel k of a layer is multiplied by s_k and the layers that read it are divided by s_k.

    Methods:
    * ``depthwise``: the paper's rescaling of depthwise → convolution pairs.
    * ``cross_layer``: equal ranges in both layers of every pair, over whole chains (Nagel et al.
      2019, arXiv 1906.04721).
    * ``balanced``: the scales with the smallest predicted noise of the logits, from rounding
      weights and activations and from moving the bound of ReLU6, over the whole network
      (:mod:`fat.graph.passes.balance`). Any runtime can run the result; the float function changes
      as far as that reduces the total noise.
    * ``exact``: the same with every ReLU6 replaced by a clip at 6·s_k per channel, so that the
      function stays the same for any s_k and any image. The runtime has to clip per channel: an
      integer Min with one constant per channel after the layer.

    ``depthwise`` and ``cross_layer`` keep ReLU6, and keep the function on the images seen by means
    of ``locked_from`` and ``cap``.
    """

    method: str = option(
        "none",
        "none, depthwise, cross_layer, balanced or exact; several, joined by +, run in that order",
    )
    locked_from: float = option(
        5.9,
        "depthwise, cross_layer: channels whose maximum before ReLU6 reaches this keep their scale",
        above=0,
        at_most=6,
    )
    cap: float = option(
        6.0,
        "depthwise, cross_layer: largest value of a rescaled channel before ReLU6; below 6 leaves "
        "a margin for images not seen",
        above=0,
        at_most=6,
    )
    iterations: int = option(40, "cross_layer: maximum number of passes over all pairs", at_least=1)
    shift_weight: float = option(
        4.0,
        "balanced: weight of the noise from changing the float function; above 1, since training "
        "removes rounding noise but not this",
        above=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.methods:
            if name not in EQUALIZATIONS:
                raise unknown_name("quant.equalize.method", name, EQUALIZATIONS)
        repeated = len(set(self.methods)) < len(self.methods)
        if repeated or "exact" in self.methods[:-1] or "none" in self.methods:
            raise FatError(
                f"quant.equalize.method is {self.method!r}; a method can be named once, exact only "
                "as the last, none only alone, as in quant.equalize.method=depthwise+cross_layer."
            )

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods in their order; empty for ``none``."""
        return () if self.method == "none" else tuple(self.method.split("+"))


@dataclass(frozen=True)
class QuantSpec(Options, prefix="quant"):
    """Options that decide which integers a network runs in.

    Besides the options of conf/quant there is ``layer_bits``: bit-widths of the weights of single
    layers by name, over any other rule. It takes a mapping or pairs and holds sorted pairs.

    Examples:
        >>> QuantSpec(bits=4, activation_bits=8).for_weights
        4
        >>> QuantSpec(bits=9)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        fat.utils.errors.FatError: quant.bits is 9; allowed are whole numbers from 2 to 8, as in ...
    """

    bits: int = option(8, "bit-width of weights and activations", at_least=2, at_most=8)
    weight_bits: int | None = option(
        None,
        "bit-width of weights; null takes quant.bits",
        key="weight.bits",
        at_least=2,
        at_most=8,
        example=8,
    )
    activation_bits: int | None = option(
        None,
        "bit-width of activations; null takes quant.bits",
        key="activation.bits",
        at_least=2,
        at_most=8,
        example=8,
    )
    first_bits: int | None = option(
        None,
        "bit-width of the first layer's weight and input; null treats it as any other",
        key="first.bits",
        at_least=2,
        at_most=8,
        example=8,
    )
    last_bits: int | None = option(
        None,
        "bit-width of the last layer's weight and input; null treats it as any other",
        key="last.bits",
        at_least=2,
        at_most=8,
        example=8,
    )
    layer_bits: Mapping[str, int] | Sequence[tuple[str, int]] = ()
    granularity: Granularity = option(
        "per_channel",
        "thresholds of weights: per_channel (one per output filter) or per_tensor",
        renamed={"vector": "per_channel", "scalar": "per_tensor"},
    )
    scheme: Scheme = option(
        "asymmetric", "activations: symmetric (zero point 0) or asymmetric; weights are symmetric"
    )
    thresholds: Thresholds = option(
        "fat",
        "training of thresholds: fat (a factor within a range), lsq (the step, arXiv 1902.08153), "
        "tqt (the logarithm, arXiv 1903.08066); frozen keeps those of calibration",
    )
    power_of_two: bool = option(
        False, "round every step up to a power of two, for hardware that rescales by shifting"
    )
    weights: Weights = option(
        "scale",
        "training of weights: scale (a factor per weight, the paper's last step), adaround "
        "(learned rounding) or frozen",
        renamed={"pointwise": "scale", "rounding": "adaround"},
    )
    bias: Bias = option(
        "trained", "train the biases on their int32 grid with the thresholds; frozen (the paper)"
    )
    alpha_range: tuple[float, float] = option(
        (0.5, 1.0),
        "range of the factor of a threshold, or of an asymmetric range",
        around=1,
        above=0,
        infinite=True,
    )
    shift_range: tuple[float, float] = option(
        (-0.2, 0.4),
        "range of the shift of an asymmetric lower threshold, in units of its range",
        around=0,
        infinite=True,
    )
    weight_scale_range: tuple[float, float] = option(
        (0.75, 1.25),
        "weights=scale: range of the factor of a weight",
        around=1,
        infinite=True,
        earlier=("pointwise_range",),
    )
    adaround_range: tuple[float, float] = option(
        (-1.0, 1.0),
        "weights=adaround: range that a weight may move by before rounding, in steps of its grid",
        around=0,
        infinite=True,
        earlier=("rounding_range",),
    )
    weight_init: InitSpec = nested(InitSpec, "initial thresholds of weights", key="/init.weight")
    activation_init: InitSpec = nested(
        InitSpec,
        "initial thresholds of activations",
        key="/init.activation",
        defaults={"name": "percentile"},
    )
    equalize: EqualizeSpec = nested(EqualizeSpec, "equalization before quantization")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layer_bits", _layer_bits(self.layer_bits))

    @property
    def for_weights(self) -> int:
        """Bit-width of weights that no other rule applies to."""
        return self.bits if self.weight_bits is None else self.weight_bits

    @property
    def for_activations(self) -> int:
        """Bit-width of activations that no other rule applies to."""
        return self.bits if self.activation_bits is None else self.activation_bits

    def for_layer(self, layer: str) -> int | None:
        """Return the bit-width that ``layer_bits`` gives a layer's weight, or ``None``."""
        return dict(self.layer_bits).get(layer)
