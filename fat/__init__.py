"""FAT: a pretrained network in integers, without labels, in minutes."""

from fat.calibrate import calibrate
from fat.checkpoint import load, save
from fat.errors import FatError
from fat.evaluate import evaluate
from fat.export.export import export_onnx
from fat.finetune import FinetuneResult, finetune
from fat.fit import FitResult, fit
from fat.hub import push_to_hub, save_for_hub
from fat.mixed import choose_bits, size_mb
from fat.pipeline import prepare
from fat.sensitivity import TensorSensitivity, sensitivity
from fat.spec import EqualizeSpec, FinetuneSpec, InitSpec, QuantSpec, ReconstructSpec, TrainSpec
from fat.student import Student

__all__ = [
    "EqualizeSpec",
    "FatError",
    "FinetuneResult",
    "FinetuneSpec",
    "FitResult",
    "InitSpec",
    "QuantSpec",
    "ReconstructSpec",
    "Student",
    "TensorSensitivity",
    "TrainSpec",
    "calibrate",
    "choose_bits",
    "evaluate",
    "export_onnx",
    "finetune",
    "fit",
    "load",
    "prepare",
    "push_to_hub",
    "save",
    "save_for_hub",
    "sensitivity",
    "size_mb",
]
