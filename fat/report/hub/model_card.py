"""Model card for the Hugging Face hub: description, metrics and usage of a quantized network.

It contains nothing private if its inputs went through :mod:`fat.report.hub.redact`. The text is
``templates/model_card.md.j2``.
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
from fat.report.html import render
from fat.utils.errors import FatError

__all__ = ["CardFacts", "card_data", "model_card"]

PACKAGE = "fat-quant"
HUB_LICENSES = frozenset(
    {
        *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause"),
        *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc0-1.0"),
        *("gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "openrail", "unlicense"),
        *("other", "unknown"),
    }
)
"""The hub's license identifiers that weights are known to have; others need a name as well."""
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
    "distilled": "images synthesized from the network's batch-norm statistics",
}
MEASURES = {
    "top1": ("accuracy", "top-1", "%"),
    "top5": ("accuracy", "top-5", "%"),
    "agreement": ("agreement", "agreement", "%"),
    "sqnr_db": ("sqnr", "SQNR", "dB"),
}
"""Keys of metrics.json: the hub's metric type, a title, the unit."""
FILES = {
    "student.safetensors": "the quantized and the float network, read with `fat.load`",
    "student.onnx": "the quantized network for integer runtimes",
    "thresholds.csv": "every quantizer: layer, bits, thresholds, step, zero point",
    "metrics.json": "all metrics",
    "config.yaml": "all options of the run, without folders and accounts",
}


@dataclass(frozen=True)
class CardFacts:
    """Inputs of a card.

    Attributes:
        metrics: metrics.json of the run, redacted.
        preprocessing: Input requirements of the network.
        files: Names of the files beside the card.
        command: The command line of the run, redacted; ``None`` if it is unknown.
        repo_id: The hub's name of the repository, if it is known.
        license: License that the publisher states; ``None`` takes that of the float weights.
    """

    metrics: Mapping[str, Any]
    preprocessing: Preprocessing
    files: Sequence[str]
    command: str | None = None
    repo_id: str | None = None
    license: str | None = None

    @property
    def final(self) -> Mapping[str, float | None]:
        """Metrics of the network that is published."""
        found: Mapping[str, float | None] = self.metrics["trained"] or self.metrics["calibrated"]
        return found

    @property
    def title(self) -> str:
        """Name of the repository, or network and bits."""
        if self.repo_id is not None:
            return self.repo_id.rpartition("/")[2]
        bits = self.metrics["bits"]
        return f"{self.metrics['model']}-w{bits['weight']:.3g}a{bits['activation']}"


def model_card(facts: CardFacts) -> ModelCard:
    """Return the card: metadata for the hub, and a text for readers.

    Raises:
        FatError: If the license is not an identifier.
    """
    license, name = _license(facts)
    command = facts.command or ""
    rows = [facts.metrics[stage] or {} for stage in ("float", "calibrated", "trained")]
    text = render(
        "model_card.md.j2",
        facts=facts,
        titles=MEASURES,
        measures=[key for key in MEASURES if any(row.get(key) is not None for row in rows)],
        sources=SOURCES,
        exported=(facts.metrics.get("exported") or {}).get("onnx"),
        package=PACKAGE,
        files=FILES,
        resize=_resize(facts.preprocessing),
        # Longer than any run of backticks in the command.
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0)),
        license=name or license,
    )
    return ModelCard(f"---\n{card_data(facts).to_yaml()}\n---\n\n{text}")


def card_data(facts: CardFacts) -> ModelCardData:
    """Return the metadata alone. Metrics are in the units of their names, percent or dB.

    Raises:
        FatError: If the license is not an identifier.
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
        for key, (kind, title, unit) in MEASURES.items()
        if (value := facts.final.get(key)) is not None and math.isfinite(value)
    ]


def _license(facts: CardFacts) -> tuple[str | None, str | None]:
    """The hub's identifier, and a name if the license is not one of the hub's."""
    given = facts.license
    if given is None:
        _, given = published_as(facts.metrics["model"], facts.metrics["weights"])
    if given is None:
        return None, None
    if not LICENSE_NAME.fullmatch(given):
        raise FatError(
            f"The license is {given!r}; it must be an identifier in lower case, such as "
            "license='apache-2.0', 'mit' or 'cc-by-nc-4.0'."
        )
    return (given, None) if given in HUB_LICENSES else ("other", given)


def _resize(preprocessing: Preprocessing) -> str:
    """Code that resizes and crops a PIL image as the network requires."""
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
