"""The texts of ``fat train --help`` and ``fat evaluate --help``."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fat.experiment.config import EvaluateConfig, RunConfig, option_table
from fat.utils.commands import command_line
from fat.utils.options import Options

__all__ = ["help_text"]

_SCHEMAS: dict[str, type[Options]] = {"train": RunConfig, "evaluate": EvaluateConfig}
_EVIDENT = ("", "text", "text, or null", "true and false")

_ABOUT = {
    "train": """\
Quantize a pretrained timm network, train its thresholds, and report what that cost.

Examples
  {train}
      8 bits, on photographs that come with the installation
  {train} data=folder data.root=DIR
      on your own images, with or without labels
  {train} model=mobilenet_v2 quant.bits=6
      another network, fewer bits
  {train} experiment=best_w8a8 export=onnx
      a complete recipe, and an ONNX file that is verified against the student
  {train} -m quant.bits=8,6,4 init=minmax,mse
      a sweep over all combinations, with one report
  {train} -m sweep=quick
      a sweep from conf/sweep
  {train} resume=DIR
      resume an interrupted run
  {train} data=imagenet trainer=ddp trainer.devices=8 data.batch_size=256
      several GPUs

What to change first
  data=, data.root=       the images; a few hundred like those that the network will see are enough
  model=, model.weights=  the network; model.name=NAME is any of timm's, model.weights=FILE your own
  experiment=             a measured recipe (docs/results.md); best_w8a8 for the best quality
  quant.bits=             8 to 2; quant.weight.bits= and quant.activation.bits= set them separately
  export=                 none, or the runtime of the exported file
""",
    "evaluate": """\
Evaluate a finished run from its directory, analyze or export it, or evaluate any model file.

Examples
  {evaluate} run=DIR
      the metrics of a run again, on its own test images
  {evaluate} run=DIR data=folder data.root=DIR
      the metrics on other images
  {evaluate} run=DIR checkpoint=DIR/checkpoints/last.ckpt
      a checkpoint of the run in place of its best student
  {evaluate} run=DIR export=onnx
      write an exported file into the run directory, verified against the student
  {evaluate} run=DIR analysis=sensitivity
      rank tensors by the damage of their quantization, for mixed bit widths (docs/mixed.md)
  {evaluate} artifact=FILE run=DIR
      an .onnx, .tflite, .pte or .xml file, compared with the float network of a run
  {evaluate} artifact=FILE model=mobilenet_v2 data=folder data.root=DIR
      anyone's file, compared with a float network, on your images
""",
}
_FLAGS = """\
Flags
{multirun}  --cfg job               print the composed config instead of running
  --config-dir DIR        also look for files in DIR, as in DIR/experiment/mine.yaml
  --hydra-help            help on Hydra, which composes the config
  -sc install=bash        completion for bash: eval "$({complete} -sc install=bash)"
"""


_MULTIRUN = """\
  -m, --multirun          run all combinations of comma-separated values
"""


def help_text(name: str, folders: Sequence[Path]) -> str:
    """Return the help of a command that Hydra configures.

    Args:
        name: ``"train"`` or ``"evaluate"``.
        folders: Folders of the YAML files, whose groups and choices are listed.
    """
    commands = {command: command_line(command) for command in ("train", "evaluate")}
    complete = "fat" if commands[name].startswith("fat") else commands[name]
    groups: dict[str, set[str]] = {}
    for path in (path for folder in folders for path in folder.glob("*/*.yaml")):
        groups.setdefault(path.parent.name, set()).add(path.stem)
    primary = (folders[-1] / f"{name}.yaml").read_text(encoding="utf-8")
    chosen = dict(re.findall(r"^  - (?!hydra)(\w+): (\w+)", primary, re.MULTILINE))
    choices = ["Groups and their choices: GROUP=CHOICE selects a file of conf/GROUP"]
    for group, default in chosen.items():
        names = sorted(groups[group] - ({"of_run"} if name == "train" else set()))
        note = "" if default == "null" else f" (default: {default})"
        choices.append(_wrapped(f"  {group:12}", ", ".join(names) + note))
    options = [
        "Options: OPTION=VALUE; in [], the choices with which an option has an effect. Files of",
        f"the groups may hold other defaults: {commands[name]} --cfg job prints the values in use",
    ]
    for entry in option_table(_SCHEMAS[name]):
        effect = f" [{entry.effect_text}]" if entry.effect_text else ""
        head = f"  {entry.key}={entry.default_text}"
        allowed = f" ({entry.hint})" if entry.hint not in _EVIDENT else ""
        options.append(_wrapped(f"{head:34}", f"{entry.meaning}{allowed}{effect}"))
    sections = [
        f"usage: {commands[name]} [GROUP=CHOICE | OPTION=VALUE ...] [FLAG ...]",
        _ABOUT[name].format(**commands).rstrip(),
        "\n".join(choices),
        "\n".join(options),
    ]
    multirun = _MULTIRUN if name == "train" else ""
    flags = _FLAGS.format(complete=complete, multirun=multirun).rstrip()
    return "\n\n".join([*sections, flags])


def _wrapped(head: str, text: str) -> str:
    """Two columns; a head that is wider than its column gets a line of its own."""
    width = 14 if len(head) <= 14 else 34
    filled = textwrap.wrap(text, 100 - width, break_on_hyphens=False)
    if len(head) > width or not head.endswith(" "):
        return "\n".join([head, *(" " * width + line for line in filled)])
    return head + ("\n" + " " * width).join(filled)
