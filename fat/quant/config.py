"""What is asked of a quantized network, as frozen values that are checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from fat.utils.errors import FatError, unknown_name
from fat.utils.validation import _one_of, _range, _whole

__all__ = ["EqualizeSpec", "Grid", "InitSpec", "QuantSpec"]

Granularity = Literal["per_tensor", "per_channel"]
Scheme = Literal["symmetric", "asymmetric"]
Thresholds = Literal["fat", "lsq", "tqt", "frozen"]
Weights = Literal["frozen", "scale", "adaround"]
Bias = Literal["trained", "frozen"]
GridKind = Literal["symmetric", "symmetric_unsigned", "affine"]

BITS = range(2, 9)
RENAMED = {
    "granularity": {"vector": "per_channel", "scalar": "per_tensor"},
    "weights": {"pointwise": "scale", "rounding": "adaround"},
    "grid": {"signed": "symmetric", "unsigned": "symmetric_unsigned", "asymmetric": "affine"},
}
"""Values of FAT 0.1, in configs and files, and what they are called now."""
EQUALIZATIONS = ("none", "depthwise", "cross_layer", "balanced", "exact")
MOST_PIXELS = 8192
"""Images of more pixels a side are a slip of the finger, or a file that was tampered with."""


def _bits(what: str, given: object) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or given not in BITS:
        raise FatError(
            f"{what} is {given!r}; allowed are whole numbers from 2 to 8, as in {what}=8."
        )


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
        _bits(f"layer_bits[{name!r}]", bits)
    return tuple(sorted(pairs))


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
        _bits("bits", self.bits)
        object.__setattr__(self, "kind", RENAMED["grid"].get(self.kind, self.kind))
        _one_of("grid", self.kind, get_args(GridKind))

    @property
    def qmin(self) -> int:
        """The smallest integer of the grid."""
        return -self.qmax if self.kind == "symmetric" else 0

    @property
    def qmax(self) -> int:
        """The largest integer of the grid."""
        return (1 << (self.bits - 1)) - 1 if self.kind == "symmetric" else (1 << self.bits) - 1


@dataclass(frozen=True)
class InitSpec:
    """How the statistics of a tensor become its first thresholds.

    Attributes:
        name: The strategy: a name registered in :mod:`fat.quant.range_estimators`.
        percentile: For ``percentile``: the share of values, in percent, inside the thresholds.
        exponent: For ``lp``: the power of the error that is summed.
        candidates: For ``mse``, ``lp`` and ``entropy``: how many thresholds are tried first, evenly
            spaced; those around the best are then tried ten times as densely.

    Raises:
        FatError: If a value is outside what is allowed.
    """

    name: str = "minmax"
    percentile: float = 99.999
    exponent: float = 2.4
    candidates: int = 100

    def __post_init__(self) -> None:
        if self.name not in ("minmax", "percentile"):
            # The registry needs torch, which help and completion, with the defaults, do without.
            from fat.quant.range_estimators import STRATEGIES

            _one_of("init strategy", self.name, tuple(STRATEGIES))
        if not 50.0 < self.percentile <= 100.0:
            raise FatError(
                f"init percentile is {self.percentile!r}; allowed is more than 50 and at most 100, "
                "in percent, as in init.activation.percentile=99.99."
            )
        if not 1.0 <= self.exponent <= 10.0:
            raise FatError(
                f"init exponent is {self.exponent!r}; allowed is 1 to 10, as in "
                "init.activation.exponent=2.4."
            )
        whole = isinstance(self.candidates, int) and not isinstance(self.candidates, bool)
        if not whole or not 10 <= self.candidates <= 10_000:
            raise FatError(
                f"init candidates is {self.candidates!r}; allowed are whole numbers from 10 to "
                "10000, as in init.activation.candidates=100."
            )


@dataclass(frozen=True)
class EqualizeSpec:
    """How the ranges of channels are balanced before quantization.

    Channel k of a layer is multiplied by s_k and what reads it divided by s_k. Methods:

    * ``depthwise``: the paper's rescaling of depthwise → convolution pairs.
    * ``cross_layer``: the ranges of both layers of every pair made equal, over whole chains (Nagel
      et al. 2019, arXiv 1906.04721).
    * ``balanced``: the scales with the smallest predicted noise of the logits, from rounding
      weights and activations and from moving the bound of ReLU6, over the whole network
      (:mod:`fat.graph.passes.balance`). Any runtime can run it; the float function moves as far as
      that makes the whole noise smaller.
    * ``exact``: the same with every ReLU6 replaced by a clip at 6·s_k per channel. The function
      stays for any s_k, on all images. The runtime must be able to clip per channel: an integer
      Min with one constant per channel after the layer.

    ``depthwise`` and ``cross_layer`` keep ReLU6, and the function on the images seen, by
    ``locked_from`` and ``cap``.

    Attributes:
        method: ``none``, a method, or several joined by ``+`` that are applied in that order, such
            as ``depthwise+cross_layer``; ``exact`` can only be the last.
        locked_from: A channel whose maximum before ReLU6 reaches this value keeps its scale.
        cap: The largest value that a rescaled channel may take before ReLU6 on the images seen;
            below 6 it leaves a margin for images not seen.
        iterations: ``cross_layer`` goes over all pairs at most so often.
        shift_weight: What ``balanced`` multiplies the noise from moving the function with. Above 1,
            since correcting biases and training take out noise from rounding, but not this.
    """

    method: str = "none"
    locked_from: float = 5.9
    cap: float = 6.0
    iterations: int = 40
    shift_weight: float = 4.0

    def __post_init__(self) -> None:
        if self.method != "none":
            for name in self.methods:
                _one_of("equalization", name, EQUALIZATIONS)
            repeated = len(set(self.methods)) < len(self.methods)
            if repeated or "exact" in self.methods[:-1] or "none" in self.methods:
                raise FatError(
                    f"equalize.method={self.method!r}: a method can be named once, exact only as "
                    "the last, none only alone, as in equalize.method=depthwise+cross_layer."
                )
        _whole("equalize.iterations", self.iterations, 1)
        if not (0.0 < self.shift_weight < math.inf):
            raise FatError(
                f"equalize.shift_weight is {self.shift_weight!r}; it must be above 0 and finite."
            )
        if not 0.0 < self.locked_from <= 6.0 or not 0.0 < self.cap <= 6.0:
            raise FatError(
                f"equalize.locked_from={self.locked_from!r} and equalize.cap={self.cap!r} must lie "
                "above 0 and not above 6, the value at which ReLU6 clips."
            )

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods in their order; none for ``none``."""
        return () if self.method == "none" else tuple(self.method.split("+"))


@dataclass(frozen=True)
class QuantSpec:
    """Everything that decides which integers a network runs in.

    Attributes:
        bits: Bit-width of weights and activations, 2 to 8, where the next two say nothing else.
        weight_bits: Bit-width of weights; ``None`` takes ``bits``.
        activation_bits: Bit-width of activations; ``None`` takes ``bits``.
        first_bits: Bit-width of the first layer's weight and input; ``None`` is as any other.
        last_bits: Bit-width of the last layer's weight and input; ``None`` is as any other.
        layer_bits: Bit-width of single layers' weights by the layer's name, over any other rule. A
            mapping or pairs; kept as pairs sorted by name.
        granularity: ``per_channel``, one threshold per output filter of a weight, or
        ``per_tensor``, one per
            tensor. Activations have one per tensor in both.
        scheme: ``symmetric`` or ``asymmetric`` activations. Weights are symmetric in both.
        thresholds: ``fat`` trains a factor per threshold within a range, ``lsq`` the step (arXiv
            1902.08153), ``tqt`` the logarithm of the threshold (arXiv 1903.08066); ``frozen`` keeps
            what calibration gave. See :mod:`fat.quant.thresholds`.
        power_of_two: Whether every step is a power of two, the next above, so that hardware
            rescales by shifting.
        weights: ``frozen`` leaves weights as they are; ``scale`` trains a factor per weight,
            the paper's last step; ``adaround`` trains to which integer near it each weight goes.
        bias: ``trained`` trains the biases, which live on the int32 grid, with the thresholds;
            ``frozen`` leaves them as they are (the paper).
        alpha_range: Where α of symmetric thresholds and α_R of asymmetric ranges may move.
        shift_range: Where α_T, the shift of an asymmetric lower threshold in units of its range R,
            may move.
        pointwise_range: Where the factor of a weight may move.
        rounding_range: How far a weight may move before rounding, in steps of its grid.
        weight_init: Statistics → threshold for weights.
        activation_init: Statistics → threshold for activations.
        equalize: How filter ranges are balanced beforehand.

    Raises:
        FatError: If any value is outside what is allowed; the text says what is.

    Examples:
        >>> QuantSpec(bits=4, activation_bits=8).for_weights
        4
        >>> QuantSpec(bits=9)
        Traceback (most recent call last):
        fat.errors.FatError: bits is 9; allowed are whole numbers from 2 to 8, as in bits=8.
    """

    bits: int = 8
    weight_bits: int | None = None
    activation_bits: int | None = None
    first_bits: int | None = None
    last_bits: int | None = None
    layer_bits: Mapping[str, int] | Sequence[tuple[str, int]] = ()
    granularity: Granularity = "per_channel"
    scheme: Scheme = "asymmetric"
    thresholds: Thresholds = "fat"
    power_of_two: bool = False
    weights: Weights = "scale"
    bias: Bias = "trained"
    alpha_range: tuple[float, float] = (0.5, 1.0)
    shift_range: tuple[float, float] = (-0.2, 0.4)
    pointwise_range: tuple[float, float] = (0.75, 1.25)
    rounding_range: tuple[float, float] = (-1.0, 1.0)
    weight_init: InitSpec = field(default_factory=InitSpec)
    activation_init: InitSpec = field(default_factory=lambda: InitSpec("percentile"))
    equalize: EqualizeSpec = field(default_factory=EqualizeSpec)

    def __post_init__(self) -> None:
        _bits("bits", self.bits)
        for name in ("weight_bits", "activation_bits", "first_bits", "last_bits"):
            if getattr(self, name) is not None:
                _bits(name, getattr(self, name))
        object.__setattr__(self, "layer_bits", _layer_bits(self.layer_bits))
        for name in ("granularity", "weights"):
            given = getattr(self, name)
            object.__setattr__(self, name, RENAMED[name].get(given, given))
        _one_of("granularity", self.granularity, get_args(Granularity))
        _one_of("scheme", self.scheme, get_args(Scheme))
        _one_of("thresholds", self.thresholds, get_args(Thresholds))
        _one_of("weights", self.weights, get_args(Weights))
        _one_of("bias", self.bias, get_args(Bias))
        _range("alpha_range", self.alpha_range, inside=1.0)
        _range("shift_range", self.shift_range, inside=0.0)
        _range("pointwise_range", self.pointwise_range, inside=1.0)
        _range("rounding_range", self.rounding_range, inside=0.0)
        if self.alpha_range[0] <= 0.0:
            raise FatError(
                f"alpha_range is {list(self.alpha_range)}; its lower end must be above 0, since a "
                "threshold of 0 has no grid."
            )

    @property
    def for_weights(self) -> int:
        """Bit-width of weights that no other rule touches."""
        return self.bits if self.weight_bits is None else self.weight_bits

    @property
    def for_activations(self) -> int:
        """Bit-width of activations that no other rule touches."""
        return self.bits if self.activation_bits is None else self.activation_bits

    def for_layer(self, layer: str) -> int | None:
        """Bit-width that ``layer_bits`` gives a layer's weight, or ``None``."""
        return dict(self.layer_bits).get(layer)

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers that JSON can hold; :meth:`from_dict` takes them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantSpec:
        """Build a spec from what :meth:`to_dict` gave, checking it again."""
        fields = dict(values)
        for name, kind in (
            ("weight_init", InitSpec),
            ("activation_init", InitSpec),
            ("equalize", EqualizeSpec),
        ):
            if name in fields:
                fields[name] = kind(**fields[name])
        for name in ("alpha_range", "shift_range", "pointwise_range", "rounding_range"):
            if name in fields:
                fields[name] = tuple(fields[name])
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown:
            raise unknown_name("quantization option", unknown[0], cls.__dataclass_fields__)
        return cls(**fields)
