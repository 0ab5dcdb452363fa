"""A model card for the Hugging Face hub: what a quantized network is, how good, and how to run it.

Nothing in it is private if what it is given went through :mod:`fat.report.hub.redact`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fat.models.float_model import Preprocessing
from fat.models.hub import published_as
from fat.utils.errors import FatError

__all__ = ["CardFacts", "card_data", "model_card"]

PAPER = "https://arxiv.org/abs/1812.07872"
PACKAGE = "fat-quant"
HUB_LICENSES = frozenset(
    {
        "apache-2.0",
        "mit",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "cc0-1.0",
        "gpl-3.0",
        "agpl-3.0",
        "lgpl-3.0",
        "mpl-2.0",
        "openrail",
        "unlicense",
        "other",
        "unknown",
    }
)
"""Those of the hub's identifiers that weights are known to have; others need a name beside them."""
LICENSE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
DATASETS = {
    "imagenet": "ILSVRC/imagenet-1k",
    "imagenette": "frgfm/imagenette",
    "cifar10": "uoft-cs/cifar10",
}
"""The hub's names of the data sets that FAT knows by name."""
SOURCES = {
    "photos": "crops of photographs that ship with scikit-image",
    "folder": "a folder of images",
    "imagenet": "ImageNet",
    "imagenette": "Imagenette",
    "cifar10": "CIFAR-10",
    "digits": "the digits that ship with scikit-learn",
    "distilled": "images made from the network's batch norms",
}
FIGURES = {
    "top1": ("accuracy", "top-1", "%"),
    "top5": ("accuracy", "top-5", "%"),
    "agreement": ("agreement", "agreement", "%"),
    "sqnr_db": ("sqnr", "SQNR", "dB"),
}
"""Keys of metrics.json: the hub's metric type, a title, the unit."""
FILES = {
    "student.safetensors": "the quantized and the float network, as data; `fat.load` reads it",
    "student.onnx": "the quantized network for integer runtimes",
    "thresholds.csv": "every quantizer: layer, bits, thresholds, step, zero point",
    "metrics.json": "all figures",
    "config.yaml": "all options of the run; folders and accounts are taken out",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    Attributes:
        metrics: metrics.json of the run, made public.
        preprocessing: How the network wants its images.
        files: Names of the files beside the card.
        command: What was typed, made public; ``None`` where it is not known.
        repo_id: The hub's name of the repository, where it is known.
        license: What the publisher says; ``None`` takes what the weights' source states.
    """

    metrics: Mapping[str, Any]
    preprocessing: Preprocessing
    files: Sequence[str]
    command: str | None = None
    repo_id: str | None = None
    license: str | None = None

    @property
    def final(self) -> Mapping[str, float | None]:
        """Figures of the network that is published."""
        found: Mapping[str, float | None] = self.metrics["trained"] or self.metrics["calibrated"]
        return found

    @property
    def title(self) -> str:
        """A name for people: the repository's, or network and bits."""
        if self.repo_id is not None:
            return self.repo_id.rpartition("/")[2]
        bits = self.metrics["bits"]
        return f"{self.metrics['model']}-w{bits['weight']:.3g}a{bits['activation']}"


def model_card(facts: CardFacts) -> ModelCard:
    """The card: metadata that the hub reads, and a text for people.

    Raises:
        FatError: If the licence is no identifier.
    """
    sections = (
        _introduction(facts),
        _table(facts),
        _use(facts),
        _making(facts),
        _listing(facts),
        _licence(facts),
    )
    text = "\n\n".join(sections)
    return ModelCard(f"---\n{card_data(facts).to_yaml()}\n---\n\n{text}\n")


def card_data(facts: CardFacts) -> ModelCardData:
    """The metadata alone. Figures are percent and dB, as their names say.

    Raises:
        FatError: If the licence is no identifier.
    """
    metrics = facts.metrics
    bits = metrics["bits"]
    tags = [
        "fat",
        "quantized",
        "timm",
        "image-classification",
        f"w{bits['weight']:.3g}a{bits['activation']}",
    ]
    if bits["weight"] == bits["activation"] == 8:
        tags.append("int8")
    if "student.onnx" in facts.files:
        tags.append("onnx")
    base, _ = published_as(metrics["model"], metrics["weights"])
    more: dict[str, Any] = {} if base is None else {"base_model_relation": "quantized"}
    license, name = _license(facts)
    source = metrics["data"]["source"]
    return ModelCardData(
        license=license,
        license_name=name,
        library_name=PACKAGE,
        pipeline_tag="image-classification",
        tags=tags,
        base_model=base,
        datasets=[DATASETS[source]] if source in DATASETS else None,
        metrics=["accuracy"] if facts.final.get("top1") is not None else None,
        model_name=facts.title,
        eval_results=_results(facts) or None,
        **more,
    )


def _results(facts: CardFacts) -> list[EvalResult]:
    source = facts.metrics["data"]["source"]
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=DATASETS.get(source, source),
            dataset_name=SOURCES.get(source, source),
            dataset_split="test",
            metric_type=kind,
            metric_name=f"{title}, {unit}",
            metric_value=round(value, 3),
        )
        for key, (kind, title, unit) in FIGURES.items()
        if (value := facts.final.get(key)) is not None and math.isfinite(value)
    ]


def _license(facts: CardFacts) -> tuple[str | None, str | None]:
    """The hub's identifier, and a name beside it where it is none of the hub's."""
    given = facts.license
    if given is None:
        _, given = published_as(facts.metrics["model"], facts.metrics["weights"])
    if given is None:
        return None, None
    if not LICENSE_NAME.fullmatch(given):
        raise FatError(
            f"The licence is {given!r}; give an identifier in small letters, such as "
            "license='apache-2.0', 'mit' or 'cc-by-nc-4.0'."
        )
    return (given, None) if given in HUB_LICENSES else ("other", given)


# ---------------------------------------------------------------------------------------- the text


def _introduction(facts: CardFacts) -> str:
    metrics = facts.metrics
    bits = metrics["bits"]
    per = {"per_channel": "one per filter", "per_tensor": "one per tensor"}[metrics["granularity"]]
    lines = [
        f"# {facts.title}",
        "",
        f"{_code(metrics['model'])} that computes in integers: weights of {bits['weight']:.3g} "
        f"bits, {metrics['scheme']} activations of {bits['activation']} bits, thresholds "
        f"{per}. {_how(facts)}",
    ]
    if metrics["weights"].startswith("random"):
        lines += ["", "**The weights are random: this network has learned nothing.**"]
    return "\n".join(lines)


def _how(facts: CardFacts) -> str:
    if facts.metrics["trained"] is None:
        return (
            "FAT, which trains thresholds "
            f"([arXiv 1812.07872]({PAPER})), was used to calibrate them alone: nothing was trained."
        )
    return (
        "FAT trained the thresholds so that the quantized logits match the float network's; it "
        f"needs no labels for that ([arXiv 1812.07872]({PAPER}))."
    )


def _table(facts: CardFacts) -> str:
    metrics = facts.metrics
    size = metrics["size_mb"]
    rows = {"float": {**metrics["float"]}, "calibrated": metrics["calibrated"]}
    if metrics["trained"] is not None:
        rows["trained"] = metrics["trained"]
    keys = [key for key in FIGURES if any(row.get(key) is not None for row in rows.values())]
    lines = [
        "## Figures",
        "",
        "| network | " + " | ".join(FIGURES[key][1] for key in keys) + " | size |",
        "|---" * (len(keys) + 2) + "|",
    ]
    for name, row in rows.items():
        cells = [_figure(row.get(key), FIGURES[key][2]) for key in keys]
        megabytes = size["float" if name == "float" else "quantized"]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {megabytes:.2f} MB |")
    source = metrics["data"]["source"]
    images = metrics["data"]["splits"]["test"]["images"]
    labels = (
        ""
        if facts.final.get("top1") is not None
        else " They have no labels, so there are no accuracies."
    )
    lines += [
        "",
        f"Measured on {images} test images ({SOURCES.get(source, _code(source))}) that nothing was "
        f"trained or chosen on.{labels} *Calibrated* is plain calibration, *trained* is FAT. "
        "Agreement: share of images on which the quantized and the float network have the same "
        "largest logit. SQNR: 10·log10(Σ z² / Σ (z − q)²) over all logits z of the float and q of "
        "the quantized network. Size: all weights and biases. The quantized networks were judged "
        "in integer arithmetic.",
    ]
    exported = (metrics.get("exported") or {}).get("onnx")
    if exported and "student.onnx" in facts.files:
        quantized = exported["quantized"]
        said = ", ".join(
            f"{title} {_figure(quantized.get(key), unit)}"
            for key, (_, title, unit) in FIGURES.items()
            if quantized.get(key) is not None
        )
        lines += [
            "",
            f"The ONNX file in {exported['runtime']}, {exported['images']} test images: {said}. "
            f"Of {exported['layers']['compared']} operations {exported['layers']['differing']} "
            "give other integers than the trained network.",
        ]
    return "\n".join(lines)


def _figure(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.2f} {unit}"


def _use(facts: CardFacts) -> str:
    parts = ["## Use"]
    if "student.onnx" in facts.files:
        parts.append(_onnx(facts))
    parts.append(_library(facts))
    return "\n\n".join(parts)


def _folder(facts: CardFacts) -> tuple[str, str]:
    """The import, and the line that says where the files are."""
    if facts.repo_id is None:
        return "", 'folder = "."  # where this card is'
    return (
        "from huggingface_hub import snapshot_download\n",
        f'folder = snapshot_download("{facts.repo_id}")',
    )


def _onnx(facts: CardFacts) -> str:
    imported, folder = _folder(facts)
    preprocessing = facts.preprocessing
    mean, std = list(preprocessing.mean), list(preprocessing.std)
    needs = "onnxruntime pillow" + (" huggingface_hub" if facts.repo_id else "")
    return f"""\
In ONNX Runtime, without FAT (`pip install {needs}`):

```python
import json

import numpy as np
import onnxruntime
{imported}from PIL import Image

{folder}
options = onnxruntime.SessionOptions()
# Sums saturate on processors with AVX2 but without VNNI, if this is left out. On others it changes
# no result, but with VNNI it doubles the time: leave it out there.
options.add_session_config_entry("session.x64quantprecision", "1")
session = onnxruntime.InferenceSession(f"{{folder}}/student.onnx", options)
image = Image.open("image.jpg").convert("RGB")
{_resize(preprocessing)}
mean, std = np.float32({mean}), np.float32({std})
pixels = (np.asarray(image, np.float32) / 255 - mean) / std
batch = pixels.transpose(2, 0, 1)[None]
(logits,) = session.run(None, {{"input": batch}})
classes = json.loads(session.get_modelmeta().custom_metadata_map.get("fat.classes", "null"))
for index in logits[0].argsort()[::-1][:3]:
    print(classes[index] if classes else index, logits[0, index])
```"""


def _resize(preprocessing: Preprocessing) -> str:
    """Lines that resize and crop a PIL image as the network wants it."""
    height, width = preprocessing.size
    tall, wide = (math.floor(side / preprocessing.crop_pct) for side in (height, width))
    kind = f"Image.Resampling.{preprocessing.interpolation.upper()}"
    if preprocessing.crop_mode == "squash":
        lines = [f"image = image.resize(({wide}, {tall}), {kind})"]
    elif preprocessing.crop_mode == "center" and tall == wide:
        lines = [
            "short = min(image.size)",
            f"image = image.resize([int({tall} * side / short) for side in image.size], {kind})",
        ]
    else:
        choose = "max" if preprocessing.crop_mode == "border" else "min"
        lines = [
            f"ratio = {choose}(image.height / {tall}, image.width / {wide})",
            f"image = image.resize([round(side / ratio) for side in image.size], {kind})",
        ]
    if preprocessing.crop_mode == "border":
        fill = tuple(round(255 * value) for value in preprocessing.mean)
        lines += [
            f'padded = Image.new("RGB", (max({width}, image.width), max({height}, image.height)), '
            f"{fill})",
            "padded.paste(image, ((padded.width - image.width) // 2, "
            "(padded.height - image.height) // 2))",
            "image = padded",
        ]
    lines += [
        f"left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)",
        f"image = image.crop((left, top, left + {width}, top + {height}))",
    ]
    return "\n".join(lines)


def _library(facts: CardFacts) -> str:
    imported, folder = _folder(facts)
    version = facts.metrics["versions"].get(PACKAGE, "unknown")
    return f"""\
With FAT (version {version}; it is installed from its source folder, `pip install -e .`):

```python
import fat
import torch
from fat.data.transforms import EvalTransform, apply
from fat.models import Preprocessing, readable_classes
{imported}from PIL import Image

{folder}
student = fat.load(f"{{folder}}/student.safetensors")
transform = EvalTransform(Preprocessing.from_dict(student.origin["preprocessing"]))
image = apply(transform, Image.open("image.jpg").convert("RGB"))
with torch.no_grad():  # integer arithmetic, as in a runtime
    probabilities = student(image[None])[0].softmax(0)
classes = readable_classes(len(probabilities), student.origin["classes"])
for p, index in zip(*probabilities.topk(3)):
    print(f"{{classes[index]}}: {{p:.1%}}")
```"""


def _making(facts: CardFacts) -> str:
    metrics = facts.metrics
    lines = ["## How it was made", ""]
    if facts.command is not None:
        # A fence longer than any run of backticks in the command.
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", facts.command)), default=0))
        lines += [f"{fence}bash", facts.command, fence, ""]
    lines.append(
        f"Float weights: {_code(metrics['weights'])}. First thresholds: "
        f"{_code(metrics['init']['weight'])} (weights), {_code(metrics['init']['activation'])} "
        f"(activations). Seed: {metrics['seed']}. `config.yaml` holds every option."
    )
    versions = ", ".join(
        f"{name} {version}" for name, version in metrics["versions"].items() if name != "kernels"
    )
    lines += ["", f"Versions: {versions}."]
    return "\n".join(lines)


def _listing(facts: CardFacts) -> str:
    rows = [f"| `{name}` | {text} |" for name, text in FILES.items() if name in facts.files]
    return "\n".join(["## Files", "", "| file | what it holds |", "|---|---|", *rows])


def _licence(facts: CardFacts) -> str:
    license, name = _license(facts)
    if license is None:
        text = (
            "None is stated: whoever published this did not say, and the source of the float "
            "weights states none that FAT could read. Ask before you use it."
        )
    else:
        where = (
            "what timm's table or the wheel states for the float weights, which this network is "
            "made from"
            if facts.license is None
            else "what the publisher stated"
        )
        text = f"{_code(name or license)}: {where}."
    return f"## Licence\n\n{text}"


def _code(text: str) -> str:
    """Text between backticks that cannot leave them, or a table's cell."""
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", "/") + "`"
