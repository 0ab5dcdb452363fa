"""Fine-tune a float network with a new classifier on labeled images, and cache the result."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Mapping
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
from fat.training.resumable_loader import whole
from fat.training.trainer import (
    UNUSED_GPU,
    RestoresRandomStates,
    fused,
    ignore_warnings,
    keep_interrupt_handler,
    trainer_options_with_defaults,
)
from fat.utils.batches import AnyBatch, Images, split
from fat.utils.devices import module_device
from fat.utils.errors import FatError, first_line
from fat.utils.io import cache_folder, check_writable, write_atomic
from fat.utils.precision import full_precision
from fat.utils.random import random_states
from fat.utils.schedules import annealed

__all__ = ["FinetuneResult", "finetune", "finetune_cached"]

logger = logging.getLogger(__name__)

FORMAT = 2
"""Part of the cache key; to be increased when the same options give another network."""


@dataclass(frozen=True)
class FinetuneResult:
    """Result of a fine-tuning.

    Attributes:
        classes: Number of classes.
        epochs: Number of epochs.
        best_epoch: Epoch of the returned network, from 1.
        top1: Its accuracy on the validation images, percent.
        loss: Its cross-entropy on the validation images.
        cached: Whether the network was loaded from the cache.
    """

    classes: int
    epochs: int
    best_epoch: int
    top1: float
    loss: float
    cached: bool = False


class FinetuneModule(RestoresRandomStates):
    """Training with cross-entropy, with separate learning rates for features and classifier.

    Batch norms keep their running statistics, and train their weights and biases.

    Args:
        network: Float network with the new classifier, trained in place.
        spec: Fine-tuning options.
        classes: Number of classes.
    """

    def __init__(self, network: nn.Module, spec: FinetuneSpec, classes: int) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.classes = classes
        self._head = head_parameters(network)
        self._extremes: Tensor | None = None  # smallest and largest label that is not checked
        self._count = 0  # validation images
        self._sums: Tensor | None = None  # correct ones, and the sum of their losses

    def on_train_epoch_start(self) -> None:
        """Freeze the features in the first epochs, and the statistics of batch norms in all."""
        features = self.current_epoch >= self.spec.head_epochs
        self.network.train(features)
        for module in self.network.modules():
            # With few images, batch statistics are noisy and running ones lag behind the weights.
            if isinstance(module, _BatchNorm):
                module.eval()
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(features or name in self._head)

    def training_step(self, batch: AnyBatch, batch_index: int) -> Tensor:
        """Compute the loss of one batch."""
        images, labels = self._labeled(batch)
        loss = cross_entropy(
            self.network(images), labels, label_smoothing=self.spec.label_smoothing
        )
        if loss.device.type == "cpu":  # elsewhere at the end of the epoch: a read waits
            self._check_finite(loss)
        self.log("train/loss", loss.detach(), batch_size=len(images))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Check the labels so far, and reset the metrics."""
        self._check_labels()
        self._count, self._sums = 0, None
        self.network.eval()

    def validation_step(self, batch: AnyBatch, batch_index: int) -> None:
        """Evaluate one batch."""
        images, labels = self._labeled(batch)
        logits = self.network(images)
        loss = cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(1) == labels).sum()
        self._count += len(labels)
        sums = torch.stack([correct.double(), loss.double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def on_validation_epoch_end(self) -> None:
        """Log accuracy in percent, and the mean loss."""
        self._check_labels()
        count = self._count
        assert self._sums is not None
        correct, loss = self._sums.tolist()
        self._check_finite(self._sums[1])  # covers the last training step
        self.log("val/top1", 100 * correct / count, prog_bar=True)
        self.log("val/loss", loss / count)

    def configure_optimizers(self) -> Optimizer:
        """Create AdamW over features and classifier, each with and without weight decay."""
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
            ],
            fused=fused(self, module_device(self.network)),
        )

    def optimizer_step(
        self, epoch: int, batch_index: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Make one step at the scheduled learning rates."""
        total = int(self.trainer.estimated_stepping_batches)
        per_epoch = max(total // self.spec.epochs, 1)
        since = self.global_step - self.spec.head_epochs * per_epoch  # steps of the features
        for group in optimizer.param_groups:
            warm = 1.0 if group["head"] else min(max(since + 1, 0) / per_epoch, 1.0)
            group["lr"] = group["rate"] * warm * annealed(self.global_step, total)
        optimizer.step(closure=optimizer_closure)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the random states, which dropout draws from."""
        checkpoint["random"] = random_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the content of :meth:`on_save_checkpoint`."""
        self._random = checkpoint["random"]
        self.use_fused(checkpoint, module_device(self.network))

    def _check_finite(self, loss: Tensor) -> None:
        if not bool(loss.isfinite()):
            raise FatError(
                f"The loss of fine-tuning became {loss.item()} in epoch {self.current_epoch + 1}. "
                f"Type a smaller learning rate: teacher.lr={self.spec.lr / 10:g} "
                f"teacher.head_lr={self.spec.head_lr / 10:g}."
            )

    def _labeled(self, batch: AnyBatch) -> tuple[Tensor, Tensor]:
        images, labels = split(batch)
        if labels.is_floating_point() or labels.shape != images.shape[:1]:
            raise FatError(
                f"The labels of a batch are {labels.dtype} {list(labels.shape)}; required: one "
                f"class index per image, int64 [{len(images)}]."
            )
        labels = labels.long()
        if labels.device.type == "cpu":
            self._check_labels(labels)
        else:  # reading them waits for the device
            extremes = torch.stack(labels.aminmax())
            if self._extremes is not None:
                extremes = torch.stack(torch.cat([extremes, self._extremes]).aminmax())
            self._extremes = extremes
            labels = labels.clamp(0, self.classes - 1)
        return images, labels

    def _check_labels(self, labels: Tensor | None = None) -> None:
        """Raise a FatError if a label is no class; by default, of those not checked so far."""
        if labels is None:
            labels, self._extremes = self._extremes, None
        if labels is None:
            return
        bad = labels[(labels < 0) | (labels >= self.classes)]
        if len(bad):
            raise FatError(
                f"An image for fine-tuning has the label {int(bad[0])}; allowed are 0 to "
                f"{self.classes - 1} for {self.classes} classes (-1 means no label). Every image "
                "needs a class: type data=folder data.root=DIR with one subfolder per class."
            )


class _Best(pl.Callback):
    """Keeps the weights of the best epoch, and stops the training when it does not improve.

    Lightning's ModelCheckpoint and EarlyStopping compare a single metric and need a folder; here
    the loss decides between epochs of equal accuracy, which are common on few images.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.result: FinetuneResult | None = None
        self.state: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, FinetuneModule)
        metrics = trainer.callback_metrics
        top1, loss = float(metrics["val/top1"]), float(metrics["val/loss"])
        epoch = trainer.current_epoch + 1
        logger.info(
            "Fine-tuning, epoch %d of at most %d: validation accuracy %.1f %%.",
            epoch,
            trainer.max_epochs,
            top1,
        )
        if self.result is None or (top1, -loss) > (self.result.top1, -self.result.loss):
            self.result = FinetuneResult(pl_module.classes, epoch, epoch, top1, loss)
            self.state = copy.deepcopy(pl_module.network.state_dict())
            return
        self.result = replace(self.result, epochs=epoch)
        self._stop_early(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_early(trainer)  # a training that was interrupted right after its last epoch

    def state_dict(self) -> dict[str, Any]:
        return {"result": None if self.result is None else asdict(self.result), "best": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        result = state_dict["result"]
        self.result = None if result is None else FinetuneResult(**result)
        self.state = state_dict["best"]

    def _stop_early(self, trainer: pl.Trainer) -> None:
        if self.result is None:
            return
        epoch = self.result.epochs
        if epoch - self.result.best_epoch >= self.patience:
            logger.info(
                "Fine-tuning stops early: no improvement since epoch %d (teacher.patience=%d).",
                self.result.best_epoch,
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
    """Replace the classifier of a float network and train the network on labeled images.

    Args:
        source: The pretrained network, which is not modified. Training runs on its device, unless
            ``trainer_options`` name another.
        train: Batches (images float32 [N, 3, H, W], labels int64 [N]).
        validation: Batches to select the best epoch.
        spec: Fine-tuning options.
        classes: Names of the classes in the order of the labels.
        seed: Seed of the classifier's initial weights.
        progress: Show a progress bar.
        trainer_options: Additional arguments of :class:`pytorch_lightning.Trainer`.
        checkpoint: File to save the state to after each epoch. If it exists, training resumes from
            it; it has to belong to the same training.

    Returns:
        The network of the best epoch, on the device of ``source``, in eval mode and without
        gradients, and a summary.

    Raises:
        FatError: If there are no images, a label is missing or out of range, there are fewer than
            two classes, the network has no classifier, or the loss is not finite.
        KeyboardInterrupt: If the user interrupted it.
    """
    spec = spec or FinetuneSpec()
    loaders = whole("training", train), whole("validation", validation)
    result = with_classes(source, classes, seed=seed)
    module, best = FinetuneModule(result.network, spec, len(classes)), _Best(spec.patience)
    device = module_device(source.network)
    options = trainer_options_with_defaults(
        trainer_options,
        device,
        max_epochs=spec.epochs,
        enable_checkpointing=False,  # Lightning's would be in the working directory
        enable_progress_bar=progress,
    )
    callbacks: list[pl.Callback] = [best]
    if checkpoint is not None:  # after epochs only: some loaders cannot start in the middle
        callbacks.append(PeriodicCheckpoint(checkpoint, math.inf))
    if options["enable_progress_bar"]:
        callbacks.append(ProgressBar())
    last = checkpoint if checkpoint is not None and checkpoint.is_file() else None
    with ignore_warnings(UNUSED_GPU):
        trainer = pl.Trainer(callbacks=callbacks, **options)
    expected = (".*in eval mode at the start of training.*", ".*LeafSpec.*")
    try:
        # Dropout draws from the global random states; the caller's are restored.
        devices = range(torch.cuda.device_count())
        with (
            keep_interrupt_handler(),
            ignore_warnings(*expected),
            full_precision(trainer.strategy.root_device),
            torch.random.fork_rng(devices=devices),
        ):
            torch.manual_seed(seed)
            trainer.fit(module, *loaders, ckpt_path=last, weights_only=True)
    except SystemExit as stopped:  # raised by Lightning after Ctrl-C
        raise KeyboardInterrupt from stopped
    assert best.result is not None
    result.network.load_state_dict(best.state)
    result.network.to(device).eval().requires_grad_(False)  # Lightning leaves it on the CPU
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
    """Load a fine-tuned network from the cache, or run :func:`finetune` and cache the result.

    The cache key is the SHA-256 of the initial weights, the options, the classes, the seed and
    ``data_key``. Networks are stored as safetensors.

    Args:
        source: The pretrained network, which is not modified.
        train: Batches (images float32 [N, 3, H, W], labels int64 [N]).
        validation: Batches to select the best epoch.
        spec: Fine-tuning options.
        data_key: Key that identifies images, labels and crops.
        classes: Names of the classes in the order of the labels.
        seed: Seed of the classifier's initial weights.
        folder: Folder of the cache; ``None`` for ``~/.cache/fat/teachers``.
        progress: Show a progress bar.
        trainer_options: Additional arguments of :class:`pytorch_lightning.Trainer`.

    Returns:
        See :func:`finetune`.

    Raises:
        FatError: See :func:`finetune`; also if the folder cannot be written.
        KeyboardInterrupt: If the user interrupted it; the next call resumes after the last epoch.
    """
    key = _key(source, spec, data_key, classes, seed)
    path = (folder or cache_folder("teachers")) / f"{source.name}-{key[:20]}.safetensors"
    empty = with_classes(source, classes, seed=seed)
    found = _read(path, key, empty.network)
    if found is None:
        check_writable(path.parent)  # fails before the training rather than after it
        with FileLock(path.with_suffix(".lock")):  # other processes wait for the result
            found = _read(path, key, empty.network)
            if found is None:
                checkpoint = path.with_suffix(".ckpt")
                network, result = finetune(
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
                _write(path, key, network.network, result)
                checkpoint.unlink(missing_ok=True)
                logger.info(
                    "Fine-tuned: validation accuracy %.1f %% after epoch %d of %d. Saved to %s.",
                    result.top1,
                    result.best_epoch,
                    result.epochs,
                    path,
                )
                return network, result
    logger.info("Fine-tuned network from the cache, accuracy %.1f %%: %s.", found.top1, path)
    return empty, replace(found, cached=True)


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
    """Compute the SHA-256 of names, types, shapes and values."""
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
    """Load the network from the file; return ``None`` if there is no usable file."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                raise ValueError("it belongs to other options")
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            # In the order of the network, which the file does not keep.
            if about["content"] != _content(network.state_dict()):
                raise ValueError("its weights are damaged")
            return FinetuneResult(**json.loads(about["result"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        logger.warning(
            "Cannot use the fine-tuned network %s (%s); training it again.", path, first_line(error)
        )
        return None
