"""The shape of conf/: what Hydra composes, checked and turned into plain dataclasses."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fat.quant.config import MOST_PIXELS, EqualizeSpec, InitSpec, QuantSpec
from fat.training.config import FinetuneSpec, ReconstructSpec, TrainSpec
from fat.utils.errors import FatError, nearest, unknown_name

__all__ = [
    "DataConfig",
    "EvaluateConfig",
    "ExportConfig",
    "LoggerConfig",
    "ModelConfig",
    "RunConfig",
    "TeacherConfig",
    "parse",
    "parse_run",
    "suggest_key",
]

T = TypeVar("T")

TEACHERS = ("pretrained", "finetune")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""Lightning's names of those that training works in."""
# Above these a value is a slip of the finger, and would take the machine before anything failed.
MOST_IMAGES, MOST_CLASSES = 100_000_000, 1_000_000
MOST_PROCESSES, MOST_SEED = 1024, 2**32 - 1


@dataclass
class ModelConfig:
    """conf/model: the float network, see :func:`fat.models.float_model.load_float_network`."""

    name: str
    weights: str | None = None
    wheel: str | None = None
    num_classes: int | None = None


@dataclass
class DistillConfig:
    """conf/data: distill, see :class:`fat.data.distill.synthesis.DistillSpec`."""

    images: int = 192
    batch_size: int = 32
    coarse_steps: int = 60
    steps: int = 12
    lr: float = 0.01
    smoothness: float = 0.2
    class_weight: float = 0.003


@dataclass
class DataConfig:
    """conf/data: the images, see :class:`fat.data.datamodule.FatDataModule`."""

    source: str
    root: str | None = None
    test_root: str | None = None
    index: str | None = None
    fraction: float = 0.1
    cache: str = "none"
    cache_dir: str | None = None
    cache_side: int = 256
    distill: DistillConfig = field(default_factory=DistillConfig)
    image_size: int | None = None
    crop_pct: float | None = None
    flip: float = 0.5
    augment: str = "worker"
    batch_size: int = 16
    workers: int | None = None
    train_images: int | None = None
    calibration_images: int = 100
    validation_images: int | None = None
    test_images: int | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    crop_scale: list[float] = field(default_factory=lambda: [0.35, 1.0])


@dataclass
class TeacherConfig:
    """conf/teacher: what is done to the float network first, see :class:`fat.FinetuneSpec`."""

    source: str = "pretrained"
    epochs: int = 10
    head_epochs: int = 1
    lr: float = 1e-3
    head_lr: float = 1e-2
    weight_decay: float = 0.02
    label_smoothing: float = 0.1
    patience: int = 5


@dataclass
class BitsConfig:
    """Bit-width of one kind of tensor; null takes ``quant.bits``."""

    bits: int | None = None


@dataclass
class EqualizeConfig:
    """conf/quant: equalize, see :class:`fat.EqualizeSpec`."""

    method: str = "none"
    locked_from: float = 5.9
    cap: float = 6.0
    iterations: int = 40
    shift_weight: float = 4.0


@dataclass
class QuantConfig:
    """conf/quant, see :class:`fat.QuantSpec`."""

    bits: int = 8
    weight: BitsConfig = field(default_factory=BitsConfig)
    activation: BitsConfig = field(default_factory=BitsConfig)
    first: BitsConfig = field(default_factory=BitsConfig)
    last: BitsConfig = field(default_factory=BitsConfig)
    mixed: str | None = None
    budget_mb: float | None = None
    granularity: str = "per_channel"
    scheme: str = "asymmetric"
    thresholds: str = "fat"
    power_of_two: bool = False
    weights: str = "scale"
    bias: str = "trained"
    alpha_range: list[float] = field(default_factory=lambda: [0.5, 1.0])
    shift_range: list[float] = field(default_factory=lambda: [-0.2, 0.4])
    pointwise_range: list[float] = field(default_factory=lambda: [0.75, 1.25])
    rounding_range: list[float] = field(default_factory=lambda: [-1.0, 1.0])
    equalize: EqualizeConfig = field(default_factory=EqualizeConfig)


@dataclass
class StrategyConfig:
    """One init strategy and its options, see :class:`fat.InitSpec`."""

    name: str = "minmax"
    percentile: float = 99.999
    exponent: float = 2.4
    candidates: int = 100


@dataclass
class InitConfig:
    """conf/init: strategies for weights and activations."""

    weight: StrategyConfig = field(default_factory=StrategyConfig)
    activation: StrategyConfig = field(default_factory=lambda: StrategyConfig("percentile"))


@dataclass
class ReconstructConfig:
    """conf/optim: reconstruction, see :class:`fat.ReconstructSpec`."""

    steps: int = 0
    images: int = 256
    batch_size: int = 16
    rate: float = 1.0
    float_share: float = 0.5


@dataclass
class OptimConfig:
    """conf/optim, see :class:`fat.TrainSpec`."""

    epochs: int = 3
    lr: float = 2e-3
    pointwise_lr: float = 1e-4
    rounding_lr: float = 1e-2
    bias_lr: float = 1e-4
    bias_correction: bool = True
    reconstruction: ReconstructConfig = field(default_factory=ReconstructConfig)
    loss: str = "rmse"
    temperature: float = 1.0
    feature_weight: float = 0.0
    label_weight: float = 0.0
    schedule: str = "cosine"
    period: int | None = None
    reset_optimizer: bool = True
    gradient_clip: float | None = None
    validations: int = 1
    nan_patience: int = 10


@dataclass
class TrainerConfig:
    """conf/trainer: where training runs, and how often its state is kept."""

    accelerator: str = "cpu"
    devices: int = 1
    precision: str = "32-true"
    threads: int | None = None
    progress: bool = True
    checkpoint_every: float = 60.0


@dataclass
class LoggerConfig:
    """conf/logger: where figures go while training."""

    name: str = "none"
    project: str = "fat"
    group: str | None = None
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class ExportConfig:
    """conf/export: what file is written of a student, see :func:`fat.export.exporter.export`."""

    target: str = "none"
    opset: int = 21
    integer_io: bool = False
    images: int = 200
    unfinished: bool = False


@dataclass
class ReferenceConfig:
    """conf/evaluate.yaml: the float network of an artefact; as :class:`ModelConfig`."""

    name: str | None = None
    weights: str | None = None
    wheel: str | None = None
    num_classes: int | None = None


@dataclass
class SweepConfig:
    """What a sweep does; ``resume``: false, true (the last sweep of this command) or its folder."""

    resume: Any = False


@dataclass
class RunConfig:
    """conf/train.yaml as a whole."""

    model: ModelConfig
    data: DataConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    init: InitConfig = field(default_factory=InitConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    seed: int = 0
    name: str | None = None
    hub: str | None = None
    resume: str | None = None

    def check(self) -> None:
        """Raise a FatError if a value is out of its range, before anything slow begins."""
        _check_common(self.data, self.trainer, self.seed)
        _within("model.num_classes", self.model.num_classes, 1, MOST_CLASSES, 1000)

    def quant_spec(self) -> QuantSpec:
        """The frozen, checked form of ``quant`` and ``init``.

        What ``quant.mixed`` makes of single layers is added by whoever reads that file.
        """
        quant = self.quant
        _check_mixed(quant)
        return QuantSpec(
            bits=quant.bits,
            weight_bits=quant.weight.bits,
            activation_bits=quant.activation.bits,
            first_bits=quant.first.bits,
            last_bits=quant.last.bits,
            granularity=cast(Any, quant.granularity),
            scheme=cast(Any, quant.scheme),
            thresholds=cast(Any, quant.thresholds),
            power_of_two=quant.power_of_two,
            weights=cast(Any, quant.weights),
            bias=cast(Any, quant.bias),
            alpha_range=cast(Any, tuple(quant.alpha_range)),
            shift_range=cast(Any, tuple(quant.shift_range)),
            pointwise_range=cast(Any, tuple(quant.pointwise_range)),
            rounding_range=cast(Any, tuple(quant.rounding_range)),
            weight_init=InitSpec(**vars(self.init.weight)),
            activation_init=InitSpec(**vars(self.init.activation)),
            equalize=EqualizeSpec(**vars(quant.equalize)),
        )

    def finetune_spec(self) -> FinetuneSpec | None:
        """The frozen, checked form of ``teacher``; None for a network that stays as it is."""
        options = dict(vars(self.teacher))
        source = options.pop("source")
        if source not in TEACHERS:
            raise unknown_name("teacher", source, TEACHERS)
        return FinetuneSpec(**options) if source == "finetune" else None

    def train_spec(self) -> TrainSpec:
        """The frozen, checked form of ``optim``."""
        values = vars(self.optim)
        return TrainSpec(
            **{**values, "reconstruction": ReconstructSpec(**vars(self.optim.reconstruction))}
        )


@dataclass
class EvaluateConfig:
    """conf/evaluate.yaml as a whole."""

    data: DataConfig
    run: str | None = None
    checkpoint: str | None = None
    artefact: str | None = None
    runtime: str | None = None
    model: ReferenceConfig = field(default_factory=ReferenceConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int | None = None
    analysis: str | None = None
    analysis_images: int = 64

    def check(self) -> None:
        """Raise a FatError if a value is out of its range, before anything slow begins."""
        _check_common(self.data, self.trainer, self.seed)
        _within("model.num_classes", self.model.num_classes, 1, MOST_CLASSES, 1000)
        _within("analysis_images", self.analysis_images, 1, MOST_IMAGES, 64)
        alone = {"runtime": self.runtime, **{f"model.{k}": v for k, v in vars(self.model).items()}}
        for key, value in alone.items():
            if value is not None and self.artefact is None:
                raise FatError(f"{key}={value} has no meaning without artefact=FILE: leave it out.")


def _check_common(data: DataConfig, trainer: TrainerConfig, seed: int | None) -> None:
    _within("seed", seed, 0, MOST_SEED, 0)
    _within("data.batch_size", data.batch_size, 1, MOST_IMAGES, 16)
    _within("data.workers", data.workers, 0, MOST_PROCESSES, 4)
    for split in ("train", "calibration", "validation", "test"):
        key = f"{split}_images"
        _within(f"data.{key}", getattr(data, key), 1, MOST_IMAGES, 100)
    _within("data.image_size", data.image_size, 1, MOST_PIXELS, 224)
    _within("data.cache_side", data.cache_side, 1, MOST_PIXELS, 256)
    _within("data.distill.images", data.distill.images, 1, MOST_IMAGES, 192)
    _within("data.crop_pct", data.crop_pct, 0.01, 1, 0.9)
    _within("data.flip", data.flip, 0, 1, 0.5)
    low, high = data.crop_scale if len(data.crop_scale) == 2 else (0.0, 0.0)
    if not 0 < low <= high <= 1:
        raise FatError(
            f"data.crop_scale is {data.crop_scale}; it must be two numbers above 0 and at most 1, "
            "the lower first, as in data.crop_scale=[0.35,1.0]."
        )
    _within("trainer.devices", trainer.devices, 1, MOST_PROCESSES, 1)
    _within("trainer.threads", trainer.threads, 1, MOST_PROCESSES, 4)
    if not trainer.checkpoint_every >= 0:
        raise FatError(
            f"trainer.checkpoint_every is {trainer.checkpoint_every}; it must be a number of "
            "seconds from 0, or inf for none, as in trainer.checkpoint_every=60."
        )
    if trainer.precision not in PRECISIONS:
        raise unknown_name(
            "precision", trainer.precision, PRECISIONS, "Type trainer.precision=32-true."
        )


def _within(key: str, value: float | None, least: float, most: int, example: float) -> None:
    """Raise a FatError unless a number lies in a range, both ends included, or is left open."""
    if value is not None and not least <= value <= most:
        raise FatError(f"{key} is {value}; allowed: {least} to {most}, as in {key}={example}.")


def _check_mixed(quant: QuantConfig) -> None:
    if (quant.mixed is None) != (quant.budget_mb is None):
        raise FatError(
            f"quant.mixed is {quant.mixed} and quant.budget_mb is {quant.budget_mb}; bits per "
            "layer need both: type quant.mixed=DIR, the directory of a run that was measured with "
            "python evaluate.py run=DIR analysis=sensitivity, and quant.budget_mb=MB."
        )
    if quant.mixed is not None and quant.weight.bits is not None:
        raise FatError(
            f"quant.weight.bits={quant.weight.bits} has no effect beside quant.mixed, which gives "
            "every layer its bits: leave it out."
        )


def parse(schema: type[T], composed: DictConfig) -> T:
    """Check a composed config against its schema and return plain dataclasses.

    Args:
        schema: :class:`RunConfig` or :class:`EvaluateConfig`.
        composed: What Hydra gave.

    Raises:
        FatError: For an unknown key (with the nearest ones), a value of another type, or one out of
            its range.
    """
    try:
        # Resolved first: what an interpolation stands for has to be of the right type too.
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        merged = OmegaConf.merge(OmegaConf.structured(schema), cast(Any, plain))
        config = cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or getattr(error, "key", "") or "")
        reason = str(getattr(error, "msg", error) or error).splitlines()[0]
        if "not in" in reason:
            raise FatError(suggest_key(key, schema)) from error
        raise FatError(f"{key}: {reason}. Type it as in conf/, for example {key}=VALUE.") from error
    if isinstance(config, RunConfig | EvaluateConfig):
        config.check()
    return config


def parse_run(stored: dict[str, Any]) -> RunConfig:
    """The options of a run, as its config.yaml holds them.

    Raises:
        FatError: If one of them is unknown here, or of another type.
    """
    return parse(RunConfig, OmegaConf.create(stored))


def suggest_key(given: str, schema: type) -> str:
    """What to say about a key that the schema does not have.

    A key that exists, but not in the chosen file of its group, is named as such.

    Examples:
        >>> suggest_key("quant.granularty", RunConfig)[:68]
        "Unknown key 'quant.granularty'. Did you mean 'quant.granularity' or "
    """
    known = [*_keys(schema)]
    if given in known:
        group = given.partition(".")[0]
        return (
            f"'{given}' has no meaning with this choice of {group}: conf/{group}/ says which file "
            "has it."
        )
    leaf = given.rpartition(".")[2]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    close = same_leaf[:3] or nearest(given, known)
    hint = " Did you mean " + " or ".join(repr(key) for key in close) + "?" if close else ""
    return f"Unknown key '{given}'.{hint} See python train.py --cfg job for all."


def _keys(schema: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for entry in fields(schema):
        keys.append(prefix + entry.name)
        kind = globals().get(re.sub(r"\W.*", "", str(entry.type)))
        if is_dataclass(kind) and isinstance(kind, type):
            keys += _keys(kind, f"{prefix}{entry.name}.")
    return keys
