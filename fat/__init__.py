"""FAT: a pretrained network in integers, without labels, in minutes."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_WHERE = {
    "EqualizeSpec": "fat.spec",
    "FatError": "fat.errors",
    "FinetuneResult": "fat.finetune",
    "FinetuneSpec": "fat.spec",
    "FitResult": "fat.fit",
    "InitSpec": "fat.spec",
    "QuantSpec": "fat.spec",
    "ReconstructSpec": "fat.spec",
    "Student": "fat.student",
    "TensorSensitivity": "fat.sensitivity",
    "TrainSpec": "fat.spec",
    "calibrate": "fat.calibrate",
    "choose_bits": "fat.mixed",
    "evaluate": "fat.evaluate",
    "export_onnx": "fat.export.export",
    "finetune": "fat.finetune",
    "fit": "fat.fit",
    "load": "fat.checkpoint",
    "prepare": "fat.pipeline",
    "push_to_hub": "fat.hub",
    "save": "fat.checkpoint",
    "save_for_hub": "fat.hub",
    "sensitivity": "fat.sensitivity",
    "size_mb": "fat.mixed",
}


class _Library(ModuleType):
    """Imports what is asked for when it is asked for: torch and timm alone take seconds.

    The command line does not need them to explain itself, or to refuse a mistyped option.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module 'fat' has no attribute {name!r}")
        value = getattr(importlib.import_module(_WHERE[name]), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds every submodule here that is imported. Some have the name of their function,
        # which is what users mean.
        if isinstance(value, ModuleType) and name in _WHERE:
            value = getattr(value, name, value)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Library
