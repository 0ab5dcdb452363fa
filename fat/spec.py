"""What is asked of a quantized network, as frozen values that are checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from fat.errors import FatError, unknown_name

__all__ = ["EqualizeSpec", "Grid", "InitSpec", "QuantSpec", "ReconstructSpec", "TrainSpec"]

Granularity = Literal["scalar", "vector"]
Scheme = Literal["symmetric", "asymmetric"]
Thresholds = Literal["fat", "lsq", "tqt", "frozen"]
Weights = Literal["frozen", "pointwise", "rounding"]
Bias = Literal["trained", "frozen"]
GridKind = Literal["signed", "unsigned", "asymmetric"]
InitName = Literal["minmax", "percentile", "mse", "lp", "entropy", "aciq", "lsq"]
LossName = Literal["rmse", "authors_code", "mse", "kl", "cosine"]
ScheduleName = Literal["cosine", "authors_code", "constant"]

BITS = range(2, 9)
EQUALIZATIONS = ("none", "depthwise", "cross_layer", "balanced", "exact")
MOST_PIXELS = 8192
"""Images of more pixels a side are a slip of the finger, or a file that was tampered with."""


def _one_of(what: str, given: object, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise unknown_name(what, given, allowed)


def _bits(what: str, given: object) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or given not in BITS:
        raise FatError(
            f"{what} is {given!r}; allowed are whole numbers from 2 to 8, as in {what}=8."
        )


def _whole(what: str, given: object, least: int) -> None:
    if not isinstance(given, int) or given < least:
        raise FatError(f"{what} is {given}; it must be a whole number, at least {least}.")


def _range(what: str, given: tuple[float, float], *, inside: float) -> None:
    if len(given) != 2 or not given[0] <= inside <= given[1]:
        raise FatError(
            f"{what} is {list(given)}; it must be two numbers, the lower first, with {inside:g} "
            f"(where training starts) between them, as in {what}=[0.5,1.0]."
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

    * ``signed``: −q…q with q = 2^(n−1)−1, zero point 0 (the narrow range, so that T maps to q).
    * ``unsigned``: 0…2^n−1, zero point 0, for tensors that are never negative.
    * ``asymmetric``: 0…2^n−1 with an integer zero point.

    Examples:
        >>> Grid(8, "signed").qmin, Grid(8, "signed").qmax, Grid(4, "unsigned").qmax
        (-127, 127, 15)
    """

    bits: int
    kind: GridKind

    def __post_init__(self) -> None:
        _bits("bits", self.bits)
        _one_of("grid", self.kind, get_args(GridKind))

    @property
    def qmin(self) -> int:
        """The smallest integer of the grid."""
        return -self.qmax if self.kind == "signed" else 0

    @property
    def qmax(self) -> int:
        """The largest integer of the grid."""
        return (1 << (self.bits - 1)) - 1 if self.kind == "signed" else (1 << self.bits) - 1


@dataclass(frozen=True)
class InitSpec:
    """How the statistics of a tensor become its first thresholds.

    Attributes:
        name: The strategy: a function of :mod:`fat.quant.init`.
        percentile: For ``percentile``: the share of values, in percent, inside the thresholds.
        exponent: For ``lp``: the power of the error that is summed.
        candidates: For ``mse``, ``lp`` and ``entropy``: how many thresholds are tried first, evenly
            spaced; those around the best are then tried ten times as densely.

    Raises:
        FatError: If a value is outside what is allowed.
    """

    name: InitName = "minmax"
    percentile: float = 99.999
    exponent: float = 2.4
    candidates: int = 100

    def __post_init__(self) -> None:
        _one_of("init strategy", self.name, get_args(InitName))
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
      (:mod:`fat.graph.balance`). Any runtime can run it; the float function moves as far as that
      makes the whole noise smaller.
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
        granularity: ``vector``, one threshold per output filter of a weight, or ``scalar``, one per
            tensor. Activations have one per tensor in both.
        scheme: ``symmetric`` or ``asymmetric`` activations. Weights are symmetric in both.
        thresholds: ``fat`` trains a factor per threshold within a range, ``lsq`` the step (arXiv
            1902.08153), ``tqt`` the logarithm of the threshold (arXiv 1903.08066); ``frozen`` keeps
            what calibration gave. See :mod:`fat.quant.thresholds`.
        power_of_two: Whether every step is a power of two, the next above, so that hardware
            rescales by shifting.
        weights: ``frozen`` leaves weights as they are; ``pointwise`` trains a factor per weight,
            the paper's last step; ``rounding`` trains to which integer near it each weight goes.
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
    granularity: Granularity = "vector"
    scheme: Scheme = "asymmetric"
    thresholds: Thresholds = "fat"
    power_of_two: bool = False
    weights: Weights = "pointwise"
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


@dataclass(frozen=True)
class ReconstructSpec:
    """Block-wise reconstruction before the distillation, see :mod:`fat.reconstruct`.

    Attributes:
        steps: Optimizer steps for each block; 0 leaves reconstruction out.
        images: So many training images, or crops of them from several passes where there are
            fewer, are held in memory, as their activations at one block.
        batch_size: Images per step.
        rate: The rates of :class:`TrainSpec` are multiplied by this.
        float_share: Share of a block's input elements that are replaced by the float ones.
    """

    steps: int = 0
    images: int = 256
    batch_size: int = 16
    rate: float = 1.0
    float_share: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("images", 1), ("batch_size", 1)):
            _whole(f"optim.reconstruction.{name}", getattr(self, name), least)
        if not 0.0 < self.rate < math.inf:
            raise FatError(
                f"optim.reconstruction.rate is {self.rate}; it must be above 0 and finite."
            )
        if not 0.0 <= self.float_share <= 1.0:
            raise FatError(
                f"optim.reconstruction.float_share is {self.float_share}; it must lie in 0…1."
            )


@dataclass(frozen=True)
class FinetuneSpec:
    """How a float network is fine-tuned.

    Attributes:
        epochs: At most so many passes over the training images.
        head_epochs: The first of them train the new classifier alone, with the features as they
            are, so that its first, random gradients do no damage there.
        lr: AdamW's largest learning rate for the features; warmed up over their first epoch, then
            annealed to 0 along half a cosine.
        head_lr: The same for the classifier, without a warm-up.
        weight_decay: AdamW's decay of weights; norms and biases are left out.
        label_smoothing: Share of the target that is spread over all classes, 0…1.
        patience: Epochs without a better validation accuracy that end the training.

    Raises:
        FatError: If a value is outside what is allowed.
    """

    epochs: int = 10
    head_epochs: int = 1
    lr: float = 1e-3
    head_lr: float = 1e-2
    weight_decay: float = 0.02
    label_smoothing: float = 0.1
    patience: int = 5

    def __post_init__(self) -> None:
        for key, least in (("epochs", 1), ("head_epochs", 0), ("patience", 1)):
            value = getattr(self, key)
            if not isinstance(value, int) or value < least:
                raise FatError(f"teacher.{key} is {value}; allowed are whole numbers from {least}.")
        for key in ("lr", "head_lr"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise FatError(f"teacher.{key} is {value}; it must be above 0, such as 0.001.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise FatError(f"teacher.weight_decay is {self.weight_decay}; it must not be negative.")
        if not 0 <= self.label_smoothing < 1:
            raise FatError(
                f"teacher.label_smoothing is {self.label_smoothing}; allowed: 0 to below 1."
            )


@dataclass(frozen=True)
class TrainSpec:
    """How the thresholds are trained.

    Attributes:
        epochs: Passes over the training images.
        lr: Adam's learning rate for the thresholds' factors at the start of every cycle.
        pointwise_lr: The same for the factors of weights, where they are trained.
        rounding_lr: The same for learned rounding, in steps of a weight's grid.
        bias_lr: The same for biases, in units of the layer's output, where they are trained.
        bias_correction: Whether to start from biases corrected in closed form
            (:func:`fat.correct.correct_biases`), if that is better on the validation images.
        reconstruction: Block-wise reconstruction before everything else.
        loss: ``rmse`` (the paper's), ``authors_code``, ``mse``, ``kl`` or ``cosine``, see
            :mod:`fat.losses`.
        temperature: What ``kl`` divides the logits by; the other losses have none.
        feature_weight: Weight of the mean relative squared error of the blocks' outputs
            (:func:`fat.losses.relative_error`), added to the loss; 0 leaves it out.
        label_weight: Weight of the cross-entropy with the labels of the training images
            (:func:`fat.losses.label_loss`), added to the loss; 0 uses no labels.
        schedule: ``cosine`` (the paper's annealing), ``authors_code`` or ``constant``, see
            :mod:`fat.schedule`.
        period: Steps per cycle of the schedule; ``None`` makes the whole training one cycle.
        reset_optimizer: Whether Adam forgets its moments at the start of every cycle.
        gradient_clip: Largest norm of the gradient over all parameters; ``None`` does not clip.
        validations: How often in an epoch the network is judged on the validation images.
        nan_patience: After so many steps in a row that gave NaN or infinity, training stops.

    Raises:
        FatError: If a value is outside what is allowed.
    """

    epochs: int = 3
    lr: float = 2e-3
    pointwise_lr: float = 1e-4
    rounding_lr: float = 1e-2
    bias_lr: float = 1e-4
    bias_correction: bool = True
    reconstruction: ReconstructSpec = field(default_factory=ReconstructSpec)
    loss: LossName = "rmse"
    temperature: float = 1.0
    feature_weight: float = 0.0
    label_weight: float = 0.0
    schedule: ScheduleName = "cosine"
    period: int | None = None
    reset_optimizer: bool = True
    gradient_clip: float | None = None
    validations: int = 1
    nan_patience: int = 10

    @property
    def trains(self) -> bool:
        """Whether anything is trained at all, or the network only calibrated."""
        return self.epochs > 0 or self.reconstruction.steps > 0

    def __post_init__(self) -> None:
        _one_of("loss", self.loss, get_args(LossName))
        _one_of("schedule", self.schedule, get_args(ScheduleName))
        for name, least in (("epochs", 0), ("period", 1), ("validations", 1), ("nan_patience", 1)):
            if getattr(self, name) is not None:
                _whole(f"optim.{name}", getattr(self, name), least)
        rates = ("lr", "pointwise_lr", "rounding_lr", "bias_lr")
        for name in (*rates, "gradient_clip", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise FatError(f"optim.{name} is {value}; it must be above 0 and finite.")
        for name in ("feature_weight", "label_weight"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise FatError(
                    f"optim.{name} is {value}; it must be a number from 0 (off), as in "
                    f"optim.{name}=1.0."
                )
