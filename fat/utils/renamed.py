"""Module paths of FAT 0.1, which keep working: ``from fat.spec import QuantSpec``.

Imports of an earlier path give a module that looks its names up where they are now, and a
``DeprecationWarning`` that says where that is.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__all__ = ["MODULES", "NAMES", "install"]

MODULES = {
    "analyses": "experiment.evaluate",
    "analysis": "evaluation.layer_analysis",
    "artefacts": "experiment.evaluate",
    "batches": "utils.batches",
    "blocks": "training.block_outputs",
    "calibrate": "models.calibration",
    "callbacks": "training.callbacks",
    "checkpoint": "models.serialization",
    "cli": "experiment.cli experiment.jobs experiment.arguments",
    "config": "experiment.config",
    "correct": "training.bias_correction",
    "dashboard": "report.wandb_dashboard",
    "data.archives": "data.sources.archives",
    "data.folders": "data.sources.folder",
    "data.hub": "data.sources.hub",
    "data.images": "data.sources.decoding",
    "data.index": "data.sources.manifest",
    "data.labels": "data.imagenet.labels",
    "data.layouts": "data.imagenet.layouts",
    "data.listing": "data.sources.listing",
    "data.ready": "data.sources.builtin",
    "data.sampling": "data.imagenet.sampling",
    "data.store": "data.distill.store",
    "data.subset": "data.imagenet.subset",
    "distributed": "utils.distributed",
    "errors": "utils.errors",
    "evaluate": "evaluation.evaluator",
    "export.artefact": "export.file_evaluation",
    "export.export": "export.exporter",
    "export.lower": "export.lowering",
    "export.target": "export.base",
    "export.targets": "export.registry",
    "exports": "experiment.build",
    "files": "utils.io",
    "finetune": "training.finetuning",
    "fit": "training.fitting",
    "graph.balance": "graph.passes.balance",
    "graph.constants": "graph.tracing.constant_folding",
    "graph.equalize": "graph.passes.equalization",
    "graph.features": "graph.partition",
    "graph.fold": "graph.passes.batch_norm_folding",
    "graph.groups": "graph.passes.scale_groups",
    "graph.inplace": "graph.tracing.functionalize",
    "graph.insert": "graph.passes.quantizer_insertion",
    "graph.integers": "models.integer_inference",
    "graph.plain": "graph.tracing.canonicalize",
    "graph.sensitivity": "graph.passes.channel_statistics",
    "graph.trace": "graph.tracing.capture",
    "graph.tracer": "graph.tracing.tracer",
    "hub": "report.hub.upload",
    "inputs": "experiment.build",
    "kept": "training.resume utils.random",
    "kernels": "quant.kernels quant.kernels.legacy",
    "layers": "quant.layers",
    "loggers": "training.loggers",
    "losses": "training.losses",
    "memo": "models.logits_cache",
    "memory": "utils.memory",
    "metrics": "evaluation.metrics quant.metrics",
    "mixed": "evaluation.bit_allocation",
    "module": "training.module",
    "parameters": "training.parameter_groups",
    "pipeline": "models.preparation",
    "quant.init": "quant.range_estimators",
    "quant.placement": "quant.policy",
    "reconstruct": "training.block_reconstruction",
    "report.card": "report.hub.model_card",
    "report.details": "evaluation.details",
    "report.export": "report.text",
    "report.figures": "report.plots",
    "report.grid": "report.sweep_grid",
    "report.page": "report.html",
    "report.public": "report.hub.redact",
    "report.reading": "report.records",
    "report.run": "experiment.run_files report.text",
    "report.run_details": "report.run_sections",
    "report.sensitivity": "evaluation.sensitivity_file",
    "report.table": "report.tables",
    "runs": "experiment.run_directory experiment.machine experiment.evaluate",
    "schedule": "training.schedule utils.schedules",
    "search": "experiment.recipe_search",
    "sensitivity": "evaluation.sensitivity_analysis",
    "spec": "quant.config training.config",
    "student": "models.student",
    "sweeps": "experiment.sweep",
}
"""Earlier module path -> modules that hold its names now; all without the leading ``fat.``."""

NAMES = {
    "analyses.analyse_run": "analyze_run",
    "artefacts.judge_artefact": "evaluate_artifact",
    "callbacks.History": "CSVHistory",
    "callbacks.KeepBest": "BestStudent",
    "callbacks.Progress": "ProgressBar",
    "callbacks.Snapshots": "PeriodicCheckpoint",
    "blocks.Blocks": "BlockOutputs",
    "config.TeacherConfig": "FinetuneSpec",
    "distributed.alone": "local_only",
    "distributed.first": "main_process_first",
    "distributed.writes": "is_main_process",
    "export.artefact.judge": "evaluate_file",
    "export.lower.Integers": "StoredGrid",
    "export.lower.Style": "LoweringStyle",
    "export.lower.in_order": "contiguous_copy",
    "export.target.Target": "ExportBackend",
    "export.targets.open_artefact": "open_artifact",
    "graph.inplace.read_what_was_written": "functionalize",
    "graph.insert.hold_constants": "constants_to_buffers",
    "graph.plain.forward_of": "conv2d_of_transposed",
    "graph.tracer.WritesIntoPart": "PartialWrite",
    "exports.asked_target": "export_backend",
    "inputs.Target": "InputSpec",
    "graph.integers.OnGrid": "IntegerTensor",
    "graph.integers.averages_pixels": "is_global_average_pool",
    "graph.integers.in_integers": "is_fully_quantized",
    "graph.integers.real_operations": "float_operations",
    "data.hub.asked_for": "is_hub_root",
    "data.ready.LabelledSet": "LabeledSet",
    "data.index.some": "abbreviated",
    "kept.Kept": "TrainingState",
    "memo.LogitsMemo": "TeacherLogitsCache",
    "report.page.figure_cell": "number_cell",
    "report.page.page": "render",
    "report.page.plain": "format_number",
    "report.run.format_figures": "format_metrics",
}
"""Earlier path of a public name -> the name it has now."""

COMMANDS = ("search", "dashboard")
"""Earlier modules that ``python -m`` runs."""


class _Renamed(ModuleType):
    """An earlier module. Some share the name of their function (``fat.fit``).

    Importing one of these binds it to the function's name in ``fat``, so it can be called, pickled
    and inspected like the function.
    """

    def __getattr__(self, name: str) -> Any:
        earlier = self.__name__.removeprefix("fat.")
        if name == "__all__":
            return self._names()
        if name == "__wrapped__":  # inspect.signature() looks here
            return getattr(self, earlier)
        current = NAMES.get(f"{earlier}.{name}", name)
        for home in MODULES[earlier].split():
            module = importlib.import_module(f"fat.{home}")
            if hasattr(module, current):
                return getattr(module, current)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._names()})

    def __reduce__(self) -> tuple[Any, ...]:
        function = getattr(self, self.__name__.rpartition(".")[2])
        return _function, (function.__module__, function.__name__)

    def _names(self) -> list[str]:
        """Return the public names of the modules that this one became, and its own."""
        earlier = self.__name__.removeprefix("fat.")
        homes = [importlib.import_module(f"fat.{home}") for home in MODULES[earlier].split()]
        own = [path.rpartition(".")[2] for path in NAMES if path.rpartition(".")[0] == earlier]
        return sorted({*own, *(name for home in homes for name in getattr(home, "__all__", ()))})


def _function(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds the modules of :data:`MODULES`, as source that ``python -m`` can run too."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        earlier = fullname.removeprefix("fat.")
        if not fullname.startswith("fat.") or earlier not in MODULES:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Renamed(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        earlier = module.__name__.removeprefix("fat.")
        homes = " and ".join(f"fat.{home}" for home in MODULES[earlier].split())
        warnings.warn(
            f"{module.__name__} was renamed: import from {homes}.", DeprecationWarning, stacklevel=2
        )

    def get_source(self, fullname: str) -> str:
        earlier = fullname.removeprefix("fat.")
        if earlier not in COMMANDS:
            return ""
        return f"from fat.{MODULES[earlier]} import main\n\nraise SystemExit(main())\n"


def install() -> None:
    """Let ``import`` find earlier module paths, after all that exist."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
