"""A float network for classes of one's own: a new classifier, trained with labels, then kept."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import AdamW, Optimizer

from fat.models.factory import head_parameters
from fat.models.float_model import FloatNetwork, with_classes
from fat.training.callbacks import PeriodicCheckpoint, ProgressBar
from fat.training.config import FinetuneSpec
from fat.utils.batches import AnyBatch, Images, counted, split
from fat.utils.errors import FatError, first_line
from fat.utils.io import cache_folder, check_writable, write_atomic
from fat.utils.random import random_states, set_random_states
from fat.utils.schedules import annealed

__all__ = ["FinetuneResult", "finetune", "finetune_cached"]

logger = logging.getLogger(__name__)

FORMAT = 2
"""Part of the cache's key: another recipe under the same options needs another number."""


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning did.

    Attributes:
        classes: How many there are.
        epochs: Passes that were made.
        best_epoch: The pass after which the network that was kept was seen, from 1.
        top1: Its accuracy on the validation images, %.
        loss: Its cross-entropy on them.
        cached: Whether all of this was done in an earlier run.
    """

    classes: int
    epochs: int
    best_epoch: int
    top1: float
    loss: float
    cached: bool = False


class FinetuneModule(pl.LightningModule):
    """Cross-entropy with labels; features and classifier at rates of their own.

    Batch norms keep the statistics that they came with, and train their factors and shifts.

    Args:
        network: Float network with its new classifier; trained in place.
        spec: The recipe.
        classes: Number of logits.
    """

    def __init__(self, network: nn.Module, spec: FinetuneSpec, classes: int) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.classes = classes
        self._head = head_parameters(network)
        self._sums = torch.zeros(3, dtype=torch.float64)  # images, right ones, loss
        self._random: dict[str, Any] | None = None

    def on_train_epoch_start(self) -> None:
        """Features stand still while the classifier starts; statistics of batch norms always do."""
        features = self.current_epoch >= self.spec.head_epochs
        self.network.train(features)
        for module in self.network.modules():
            # With few images those of a batch are noise, and their averages lag behind the weights.
            if isinstance(module, _BatchNorm):
                module.eval()
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(features or name in self._head)

    def training_step(self, batch: AnyBatch, batch_index: int) -> Tensor:
        """Loss of one batch."""
        images, labels = self._labelled(batch)
        loss = cross_entropy(
            self.network(images), labels, label_smoothing=self.spec.label_smoothing
        )
        self._check_finite(loss)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._sums.zero_()
        self.network.eval()

    def validation_step(self, batch: AnyBatch, batch_index: int) -> None:
        """Judge one batch."""
        images, labels = self._labelled(batch)
        logits = self.network(images)
        loss = cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(1) == labels).sum()
        self._sums += torch.tensor([len(labels), float(right), float(loss)], dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        """Log accuracy in percent, and the mean loss."""
        count, right, loss = self._sums.tolist()
        self._check_finite(self._sums[2])  # the last step of all has no loss after it
        self.log("val/top1", 100 * right / count, prog_bar=True)
        self.log("val/loss", loss / count)

    def configure_optimizers(self) -> Optimizer:
        """AdamW over four groups: features and classifier, with decay and without."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.network.named_parameters():
            groups.setdefault((name in self._head, parameter.ndim > 1), []).append(parameter)
        return AdamW(
            [
                {
                    "params": parameters,
                    "lr": self.spec.head_lr if head else self.spec.lr,
                    "weight_decay": self.spec.weight_decay if decays else 0.0,
                    "head": head,
                    "rate": self.spec.head_lr if head else self.spec.lr,
                }
                for (head, decays), parameters in groups.items()
            ]
        )

    def optimizer_step(
        self, epoch: int, batch_index: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """One step at the schedule's rates."""
        total = int(self.trainer.estimated_stepping_batches)
        per_epoch = max(total // self.spec.epochs, 1)
        since = self.global_step - self.spec.head_epochs * per_epoch  # the features' first step
        for group in optimizer.param_groups:
            warm = 1.0 if group["head"] else min(max(since + 1, 0) / per_epoch, 1.0)
            group["lr"] = group["rate"] * warm * annealed(self.global_step, total)
        optimizer.step(closure=optimizer_closure)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the random states, which dropout draws from."""
        checkpoint["random"] = random_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what :meth:`on_save_checkpoint` noted."""
        self._random = checkpoint["random"]

    def on_train_start(self) -> None:
        """Random states last: loading a checkpoint may have drawn from them."""
        if self._random is not None:
            set_random_states(self._random)
            self._random = None

    def _check_finite(self, loss: Tensor) -> None:
        if not bool(loss.isfinite()):
            raise FatError(
                f"The loss of fine-tuning became {loss.item()} in epoch {self.current_epoch + 1}. "
                f"Type a smaller rate: teacher.lr={self.spec.lr / 10:g} "
                f"teacher.head_lr={self.spec.head_lr / 10:g}."
            )

    def _labelled(self, batch: AnyBatch) -> tuple[Tensor, Tensor]:
        images, labels = split(batch)
        if labels.is_floating_point() or labels.shape != images.shape[:1]:
            raise FatError(
                f"The labels of a batch are {labels.dtype} {list(labels.shape)}; wanted one class "
                f"index an image, int64 [{len(images)}]."
            )
        bad = labels[(labels < 0) | (labels >= self.classes)]
        if len(bad):
            raise FatError(
                f"Fine-tuning met the label {int(bad[0])}; with {self.classes} classes allowed are "
                f"0 to {self.classes - 1} (-1 means: not labelled). Every image needs a class: "
                "type data=folder data.root=DIR with one subfolder for each class."
            )
        return images, labels.long()


class _Best(pl.Callback):
    """Keeps the weights of the best epoch, and ends the training when no better one comes."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.result: FinetuneResult | None = None
        self.state: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, FinetuneModule)
        figures = trainer.callback_metrics
        top1, loss = float(figures["val/top1"]), float(figures["val/loss"])
        epoch = trainer.current_epoch + 1
        logger.info(
            "Fine-tuning, epoch %d of at most %d: %.1f %% of validation images right.",
            epoch,
            trainer.max_epochs,
            top1,
        )
        # Small validation sets often give the same share of right ones: then the loss decides.
        if self.result is None or (top1, -loss) > (self.result.top1, -self.result.loss):
            self.result = FinetuneResult(pl_module.classes, epoch, epoch, top1, loss)
            self.state = copy.deepcopy(pl_module.network.state_dict())
            return
        self.result = replace(self.result, epochs=epoch)
        self._end(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer)  # a training that was cut off right after its last epoch

    def state_dict(self) -> dict[str, Any]:
        return {"result": None if self.result is None else asdict(self.result), "best": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        result = state_dict["result"]
        self.result = None if result is None else FinetuneResult(**result)
        self.state = state_dict["best"]

    def _end(self, trainer: pl.Trainer) -> None:
        if self.result is None:
            return
        epoch = self.result.epochs
        if epoch - self.result.best_epoch >= self.patience:
            logger.info(
                "Fine-tuning ends: epoch %d is still the best, %d epochs later "
                "(teacher.patience=%d).",
                self.result.best_epoch,
                self.patience,
                self.patience,
            )
            trainer.should_stop = True


def finetune(
    source: FloatNetwork,
    train: Images,
    validation: Images,
    spec: FinetuneSpec | None = None,
    *,
    classes: tuple[str, ...],
    seed: int = 0,
    progress: bool = True,
    trainer_options: dict[str, Any] | None = None,
    checkpoint: Path | None = None,
) -> tuple[FloatNetwork, FinetuneResult]:
    """Give a float network a new classifier and train it on labelled images.

    Args:
        source: The pretrained network, which is left as it is.
        train: Batches (images float32 [N, 3, H, W], labels int64 [N]).
        validation: The same, to choose the best epoch by.
        spec: The recipe.
        classes: Names of the classes in the order of the labels.
        seed: What the classifier's first weights follow.
        progress: Whether to show a bar.
        trainer_options: More arguments of :class:`pytorch_lightning.Trainer`.
        checkpoint: File to keep the state in after each epoch. If it is there, the training goes on
            from it: it must be of this very training.

    Returns:
        The network of the best epoch, in eval mode and without gradients, and what was done.

    Raises:
        FatError: If no image came, a label is missing or out of range, there are fewer than two
            classes, the network has no classifier, or the loss is not finite.
        KeyboardInterrupt: If the user stopped it.
    """
    spec = spec or FinetuneSpec()
    parts = _Batches("training", train), _Batches("validation", validation)
    result = with_classes(source, classes, seed=seed)
    module, best = FinetuneModule(result.network, spec, len(classes)), _Best(spec.patience)
    options: dict[str, Any] = {
        "max_epochs": spec.epochs,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,  # Lightning's own would lie in the current directory
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": progress,
        **(trainer_options or {}),
    }
    bar = [ProgressBar()] if options["enable_progress_bar"] else []
    # At the ends of epochs alone: a loader of anybody's cannot be made to start in the middle.
    keeping = [] if checkpoint is None else [PeriodicCheckpoint(checkpoint, math.inf)]
    begun = checkpoint if checkpoint is not None and checkpoint.is_file() else None
    trainer = pl.Trainer(callbacks=[best, *keeping, *bar], **options)
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        # Dropout draws from the global random states, which stay the caller's.
        devices = range(torch.cuda.device_count())
        with warnings.catch_warnings(), torch.random.fork_rng(devices=devices):
            for expected in (".*in eval mode at the start of training.*", ".*LeafSpec.*"):
                warnings.filterwarnings("ignore", expected)
            torch.manual_seed(seed)
            trainer.fit(module, *parts, ckpt_path=begun, weights_only=True)
    except SystemExit as stopped:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from stopped
    finally:
        # Lightning leaves Ctrl-C switched off. Only the main thread has a say in signals.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
    assert best.result is not None
    result.network.load_state_dict(best.state)
    result.network.cpu().eval().requires_grad_(False)
    return result, best.result


def finetune_cached(
    source: FloatNetwork,
    train: Images,
    validation: Images,
    spec: FinetuneSpec,
    *,
    data_key: str,
    classes: tuple[str, ...],
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = True,
    trainer_options: dict[str, Any] | None = None,
) -> tuple[FloatNetwork, FinetuneResult]:
    """:func:`finetune`, unless a network of the very same origin is there already.

    The key is the SHA-256 of the starting weights, the recipe, the classes, the seed and the data's
    own key; what is kept is safetensors, which loading cannot run.

    Args:
        source: The pretrained network, which is left as it is.
        train: Batches (images float32 [N, 3, H, W], labels int64 [N]).
        validation: The same, to choose the best epoch by.
        spec: The recipe.
        data_key: Tells these images, labels and crops from all others.
        classes: Names of the classes in the order of the labels.
        seed: What the classifier's first weights follow.
        folder: Where networks are kept; ``~/.cache/fat/teachers`` by default.
        progress: Whether to show a bar.
        trainer_options: More arguments of :class:`pytorch_lightning.Trainer`.

    Raises:
        FatError: As :func:`finetune` does, or if the folder cannot be written.
        KeyboardInterrupt: If the user stopped it; the next call goes on after the last epoch.
    """
    key = _key(source, spec, data_key, classes, seed)
    path = (folder or cache_folder("teachers")) / f"{source.name}-{key[:20]}.safetensors"
    empty = with_classes(source, classes, seed=seed)
    found = _read(path, key, empty.network)
    if found is None:
        check_writable(path.parent)  # now, rather than after the training
        with FileLock(path.with_suffix(".lock")):  # others who want the same wait for it
            found = _read(path, key, empty.network)
            if found is None:
                return _finetune_into(
                    path,
                    key,
                    source,
                    train,
                    validation,
                    spec,
                    classes=classes,
                    seed=seed,
                    progress=progress,
                    trainer_options=trainer_options,
                )
    logger.info(
        "Fine-tuned in an earlier run, %.1f %% of validation images right: %s.", found.top1, path
    )
    return empty, replace(found, cached=True)


def _finetune_into(
    path: Path,
    key: str,
    source: FloatNetwork,
    train: Images,
    validation: Images,
    spec: FinetuneSpec,
    *,
    classes: tuple[str, ...],
    seed: int,
    progress: bool,
    trainer_options: dict[str, Any] | None,
) -> tuple[FloatNetwork, FinetuneResult]:
    """Fine-tune and keep the result; what a run that was cut off left is gone on with."""
    checkpoint = path.with_suffix(".ckpt")
    result, done = finetune(
        source,
        train,
        validation,
        spec,
        classes=classes,
        seed=seed,
        progress=progress,
        trainer_options=trainer_options,
        checkpoint=checkpoint,
    )
    _write(path, key, result.network, done)
    checkpoint.unlink(missing_ok=True)
    logger.info(
        "Fine-tuned: %.1f %% of validation images right after epoch %d of %d. Kept in %s.",
        done.top1,
        done.best_epoch,
        done.epochs,
        path,
    )
    return result, done


class _Batches:
    """Any batches, for Lightning, which would take a list for a list of loaders."""

    def __init__(self, what: str, images: Images) -> None:
        self._batches, self._count = counted(what, images)
        self.sampler = getattr(self._batches, "sampler", None)  # told the epoch by Lightning
        self.batch_sampler = getattr(self._batches, "batch_sampler", None)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[AnyBatch]:
        return iter(self._batches)


def _key(
    source: FloatNetwork, spec: FinetuneSpec, data_key: str, classes: tuple[str, ...], seed: int
) -> str:
    digest = hashlib.sha256()
    about = {
        "format": FORMAT,
        "network": source.name,
        "spec": asdict(spec),
        "data": data_key,
        "classes": classes,
        "seed": seed,
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    digest.update(_content(source.network.state_dict()).encode())
    return digest.hexdigest()


def _content(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: Path, key: str, network: nn.Module, result: FinetuneResult) -> None:
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    about = {"key": key, "content": _content(state), "result": json.dumps(asdict(result))}
    write_atomic(path, lambda temporary: save_file(state, temporary, metadata=about))


def _read(path: Path, key: str, network: nn.Module) -> FinetuneResult | None:
    """Fill the network from the file, None if there is none that can be used."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                raise ValueError("it is of another origin")
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            # In the network's order: the file has one of its own.
            if about["content"] != _content(network.state_dict()):
                raise ValueError("its weights are damaged")
            return FinetuneResult(**json.loads(about["result"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        logger.warning(
            "The fine-tuned network %s cannot be used (%s) and is made anew.",
            path,
            first_line(error),
        )
        return None
