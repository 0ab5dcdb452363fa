"""Post-training quantization of pretrained networks by Fast Adjustable Thresholds."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fat.utils import renamed

if TYPE_CHECKING:
    from fat.evaluation.bit_allocation import choose_bits, size_mb
    from fat.evaluation.evaluator import evaluate
    from fat.evaluation.sensitivity_analysis import TensorSensitivity, sensitivity
    from fat.export.exporter import export_onnx
    from fat.models.calibration import calibrate
    from fat.models.preparation import prepare
    from fat.models.serialization import load, save
    from fat.models.student import Student
    from fat.quant.config import EqualizeSpec, InitSpec, QuantSpec
    from fat.report.hub.upload import push_to_hub, save_for_hub
    from fat.training.config import FinetuneSpec, ReconstructSpec, TrainSpec
    from fat.training.finetuning import FinetuneResult, finetune
    from fat.training.fitting import FitResult, fit
    from fat.utils.errors import FatError

_MODULES = {
    "EqualizeSpec": "fat.quant.config",
    "FatError": "fat.utils.errors",
    "FinetuneResult": "fat.training.finetuning",
    "FinetuneSpec": "fat.training.config",
    "FitResult": "fat.training.fitting",
    "InitSpec": "fat.quant.config",
    "QuantSpec": "fat.quant.config",
    "ReconstructSpec": "fat.training.config",
    "Student": "fat.models.student",
    "TensorSensitivity": "fat.evaluation.sensitivity_analysis",
    "TrainSpec": "fat.training.config",
    "calibrate": "fat.models.calibration",
    "choose_bits": "fat.evaluation.bit_allocation",
    "evaluate": "fat.evaluation.evaluator",
    "export_onnx": "fat.export.exporter",
    "finetune": "fat.training.finetuning",
    "fit": "fat.training.fitting",
    "load": "fat.models.serialization",
    "prepare": "fat.models.preparation",
    "push_to_hub": "fat.report.hub.upload",
    "save": "fat.models.serialization",
    "save_for_hub": "fat.report.hub.upload",
    "sensitivity": "fat.evaluation.sensitivity_analysis",
    "size_mb": "fat.evaluation.bit_allocation",
}

__version__ = "0.2.0.dev0"

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


def __getattr__(name: str) -> Any:
    # Imports of torch and timm take seconds, and the command line needs neither to explain itself
    # or to reject a mistyped option.
    if name not in _MODULES:
        raise AttributeError(f"module 'fat' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


renamed.install()
