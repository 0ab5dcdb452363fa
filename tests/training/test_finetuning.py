"""Fine-tuning a float network on new classes, and its cache."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import Tensor

from fat.models.factory import head_parameters
from fat.models.float_model import FloatNetwork, load_float_network, with_classes
from fat.training.config import FinetuneSpec
from fat.training.finetuning import FinetuneModule, FinetuneResult, finetune, finetune_cached
from fat.utils.errors import FatError

CLASSES = ("blue", "green", "red")
SPEC = FinetuneSpec(epochs=4, lr=3e-3, head_lr=3e-2, patience=10)
Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def source() -> FloatNetwork:
    loaded = load_float_network("test_efficientnet", weights="random", num_classes=7)
    return replace(loaded, preprocessing=replace(loaded.preprocessing, size=(32, 32)))


def coloured(count: int, seed: int) -> Batches:
    """Noise whose brightest channel is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randn(count, 3, 32, 32, generator=generator)
    images[torch.arange(count), 2 - labels] += 1.5
    return list(zip(images.split(16), labels.split(16), strict=True))


def accuracy(network: torch.nn.Module, batches: Batches) -> float:
    with torch.no_grad():
        right = [(network(images).argmax(1) == labels).float() for images, labels in batches]
    return float(100 * torch.cat(right).mean())


def state(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_learns_classes_of_its_own(source: FloatNetwork) -> None:
    before, random = state(source.network), torch.get_rng_state()
    result, done = finetune(
        source, coloured(160, 0), coloured(48, 1), SPEC, classes=CLASSES, progress=False
    )
    assert accuracy(result.network, coloured(96, 2)) > 95
    assert done.top1 == pytest.approx(accuracy(result.network, coloured(48, 1)))
    assert (result.num_classes, result.classes) == (3, CLASSES)
    assert result.weights == "random, fine-tuned on 3 classes"
    assert not result.network.training
    assert not any(p.requires_grad for p in result.network.parameters())
    # What came is left alone, and so is the global random state.
    assert equal(before, state(source.network))
    assert torch.equal(random, torch.get_rng_state())
    again, _ = finetune(
        source, coloured(160, 0), coloured(48, 1), SPEC, classes=CLASSES, progress=False
    )
    assert equal(state(result.network), state(again.network))


def test_the_classifier_starts_alone(source: FloatNetwork) -> None:
    spec = replace(SPEC, epochs=1, head_epochs=1)
    result, _ = finetune(
        source, coloured(32, 0), coloured(16, 1), spec, classes=CLASSES, progress=False
    )
    start = with_classes(source, CLASSES)
    head = head_parameters(result.network)
    moved = {
        name
        for name, value in result.network.state_dict().items()
        if not torch.equal(value, start.network.state_dict()[name])
    }
    assert moved == head  # neither features nor the statistics of their norms


def test_batch_norms_keep_their_statistics_and_train_the_rest(source: FloatNetwork) -> None:
    spec = replace(SPEC, epochs=2, head_epochs=0)
    result, _ = finetune(
        source, coloured(32, 0), coloured(16, 1), spec, classes=CLASSES, progress=False
    )
    before, after = state(source.network), state(result.network)
    statistics = {name for name in before if "running_" in name or "num_batches" in name}
    assert statistics
    assert {name for name in before if torch.equal(before[name], after[name])} == statistics


def test_the_best_epoch_is_kept_and_training_stops_early(
    source: FloatNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracies are dictated: the second epoch is the best, by its loss alone."""
    figures = iter([(50.0, 1.0), (60.0, 0.5), (60.0, 0.75), (55.0, 0.25), (60.0, 0.5)])
    seen: list[dict[str, Tensor]] = []

    def dictate(self: FinetuneModule) -> None:
        top1, loss = next(figures)
        self.log("val/top1", top1)
        self.log("val/loss", loss)
        seen.append(state(self.network))

    monkeypatch.setattr(FinetuneModule, "on_validation_epoch_end", dictate)
    spec = replace(SPEC, epochs=9, patience=3)
    result, done = finetune(
        source, coloured(32, 0), coloured(16, 1), spec, classes=CLASSES, progress=False
    )
    assert done == FinetuneResult(classes=3, epochs=5, best_epoch=2, top1=60.0, loss=0.5)
    assert equal(state(result.network), seen[1])
    assert not equal(state(result.network), seen[4])


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_that_are_no_class(source: FloatNetwork, label: int) -> None:
    batches = coloured(32, 0)
    batches[1][1][5] = label
    with pytest.raises(FatError, match=rf"label {label}; allowed are 0 to 2 for 3 classes"):
        finetune(source, batches, coloured(16, 1), SPEC, classes=CLASSES, progress=False)


def test_too_high_a_rate_is_named(source: FloatNetwork) -> None:
    batches = [(images * float("nan"), labels) for images, labels in coloured(32, 0)]
    with pytest.raises(FatError, match=r"became nan in epoch 1\. Type .*teacher.lr=0.0003 "):
        finetune(source, batches, coloured(16, 1), SPEC, classes=CLASSES, progress=False)


def test_too_high_a_rate_is_named_also_after_the_last_step(source: FloatNetwork) -> None:
    spec = replace(SPEC, epochs=1, head_epochs=0, lr=1e30, head_lr=1e30)
    with pytest.raises(FatError, match=r"became (nan|inf) in epoch 1\. Type .*teacher.lr=1e\+29 "):
        finetune(source, coloured(16, 0), coloured(16, 1), spec, classes=CLASSES, progress=False)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (torch.zeros(16), r"torch.float32 \[16\]; required: .* int64 \[16\]"),
        (torch.zeros(16, 3, dtype=torch.int64), r"torch.int64 \[16, 3\]; required"),
    ],
)
def test_labels_of_another_kind(source: FloatNetwork, labels: Tensor, says: str) -> None:
    batches = [(images, labels) for images, _ in coloured(16, 0)]
    with pytest.raises(FatError, match=says):
        finetune(source, batches, coloured(16, 1), SPEC, classes=CLASSES, progress=False)


def test_missing_images_and_iterators_are_rejected(source: FloatNetwork) -> None:
    good = coloured(16, 0)
    for train, validation, says in (
        ([], good, "There are no training images"),
        (good, [], "There are no validation images"),
        (iter(good), good, "training images come from an iterator"),
    ):
        with pytest.raises(FatError, match=says):
            finetune(source, train, validation, SPEC, classes=CLASSES, progress=False)


def test_a_last_batch_of_one(source: FloatNetwork) -> None:
    """Its features are 1 x 1 pixel at the end, so they have no variance of their own."""
    spec = replace(SPEC, epochs=1, head_epochs=0)
    result, _ = finetune(
        source, coloured(17, 0), coloured(17, 1), spec, classes=CLASSES, progress=False
    )
    assert all(bool(value.isfinite().all()) for value in result.network.state_dict().values())


class Epochs:
    """Batches with a sampler that records its epochs."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.sampler, self.told = batches, self, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def test_every_epoch_has_its_own_draws(source: FloatNetwork) -> None:
    train = Epochs(coloured(16, 0))
    finetune(
        source, train, coloured(16, 1), replace(SPEC, epochs=3), classes=CLASSES, progress=False
    )
    assert train.told == [0, 1, 2]


def test_a_network_without_a_classifier(source: FloatNetwork) -> None:
    bare = copy.deepcopy(source.network)
    bare.pretrained_cfg = {}
    with pytest.raises(FatError, match=r"test_efficientnet has no classifier .*model.name=NAME"):
        with_classes(replace(source, network=bare), CLASSES)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 0}, r"teacher.epochs is 0; allowed are whole numbers from 1"),
        ({"head_epochs": -1}, r"teacher.head_epochs is -1"),
        ({"patience": 0}, r"teacher.patience is 0"),
        ({"lr": 0.0}, r"teacher.lr is 0.0; allowed are numbers above 0"),
        ({"head_lr": float("nan")}, r"teacher.head_lr is nan"),
        ({"weight_decay": -1.0}, r"teacher.weight_decay is -1.0"),
        (
            {"label_smoothing": 1.0},
            r"teacher.label_smoothing is 1.0; allowed are numbers from 0 and below 1",
        ),
    ],
)
def test_options_out_of_range(options: dict[str, float], says: str) -> None:
    with pytest.raises(FatError, match=says):
        FinetuneSpec(**options)  # type: ignore[arg-type]


def test_classes_need_different_names(source: FloatNetwork) -> None:
    for classes in ((), ("one",), ("cat", "cat")):
        with pytest.raises(FatError, match="at least two, with different names"):
            with_classes(source, classes)


# ------------------------------------------------------------------------------------- what is kept


def cached(
    source: FloatNetwork, folder: Path, epochs: int = 1, **change: object
) -> tuple[FloatNetwork, bool]:
    options = {"data_key": "these", "classes": CLASSES, "seed": 0, "spec": SPEC, **change}
    spec = replace(options.pop("spec"), epochs=epochs)  # type: ignore[type-var]
    result, done = finetune_cached(
        source, coloured(32, 0), coloured(16, 1), spec, folder=folder, progress=False, **options
    )  # type: ignore[arg-type]
    return result, done.cached


def test_the_second_time_it_is_there(
    source: FloatNetwork,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    first, hit = cached(source, tmp_path)
    assert not hit
    caplog.set_level(logging.INFO)
    second, hit = cached(source, tmp_path)
    assert hit
    assert "Fine-tuned network from the cache" in caplog.text
    assert equal(state(first.network), state(second.network))
    assert second.weights == first.weights
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert not list(tmp_path.glob("*.ckpt"))  # it is finished: nothing to go on with
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"data_key": "others"},
        {"seed": 1},
        {"classes": ("a", "b", "c")},
        {"spec": replace(SPEC, lr=1e-3)},
    ],
)
def test_anything_else_is_another_network(
    source: FloatNetwork, tmp_path: Path, change: dict[str, object]
) -> None:
    cached(source, tmp_path)
    _, hit = cached(source, tmp_path, **change)
    assert not hit
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_other_weights_are_another_network(source: FloatNetwork, tmp_path: Path) -> None:
    cached(source, tmp_path)
    other = load_float_network("test_efficientnet", weights="random", num_classes=7, seed=5)
    assert not cached(other, tmp_path)[1]


def test_a_damaged_file_is_replaced(
    source: FloatNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = cached(source, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again, hit = cached(source, tmp_path)
    assert not hit
    assert "Cannot use" in caplog.text
    assert equal(state(first.network), state(again.network))
    assert cached(source, tmp_path)[1]


def test_one_changed_bit_is_noticed(
    source: FloatNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = cached(source, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the tensors are at the end
    path.write_bytes(content)
    again, hit = cached(source, tmp_path)
    assert not hit
    assert "its weights are damaged" in caplog.text
    assert equal(state(first.network), state(again.network))


def test_a_folder_that_cannot_be_is_known_before_training(
    source: FloatNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(FinetuneModule, "training_step", never)
    (tmp_path / "file").touch()
    with pytest.raises(FatError, match="Cannot write"):
        cached(source, tmp_path / "file" / "folder")


def test_a_training_that_was_cut_off_goes_on_after_its_last_epoch(
    source: FloatNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    original = FinetuneModule.on_train_epoch_start

    def cut(module: FinetuneModule) -> None:
        begun.append(module.current_epoch)
        if begun == [0, 1]:
            raise RuntimeError("cut off")
        original(module)

    monkeypatch.setattr(FinetuneModule, "on_train_epoch_start", cut)
    with pytest.raises(RuntimeError, match="cut off"):
        cached(source, tmp_path / "cut", epochs=2)
    resumed, hit = cached(source, tmp_path / "cut", epochs=2)
    assert not hit
    assert begun == [0, 1, 1]  # the first epoch is not done again
    monkeypatch.undo()
    straight, _ = cached(source, tmp_path / "straight", epochs=2)
    assert equal(state(resumed.network), state(straight.network))


def test_ctrl_c_keeps_nothing(
    source: FloatNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FinetuneModule, "validation_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cached(source, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


MODELS = sorted(Path(__file__).parents[2].glob("conf/model/*.yaml"))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_model_of_conf_takes_a_new_classifier(path: Path) -> None:
    with torch.device("meta"):  # shapes alone
        network = timm.create_model(yaml.safe_load(path.read_text())["name"])
        head = head_parameters(network)
        assert head
        before = {name: value.shape for name, value in network.named_parameters()}
        network.reset_classifier(3)
    after = {name: value.shape for name, value in network.named_parameters()}
    assert {name for name in after if after[name] != before[name]} == head
    assert all(after[name][0] == 3 for name in head)
