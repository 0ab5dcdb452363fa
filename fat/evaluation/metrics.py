"""Metrics that compare two sets of logits, accumulated over batches and processes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from fat.quant.metrics import sqnr_db
from fat.utils import distributed

__all__ = ["BEFORE_UPDATE", "Comparison"]


BEFORE_UPDATE = ".*method of metric Comparison was called before the ``update`` method.*"
"""torchmetrics' warning about a process that computes the metrics and has no batch of its own."""


def _root(mean_square: float) -> float | None:
    """Return the root, or ``None`` if it is not finite, because JSON has no NaN."""
    return math.sqrt(mean_square) if math.isfinite(mean_square) else None


class Comparison(Metric):
    """Agreement, SQNR and RMSE of logits against the float network, and accuracy if labeled.

    All states are sums, so that several processes give the same results as one.
    """

    full_state_update = False
    images: Tensor
    labelled: Tensor
    top1: Tensor
    top5: Tensor
    same: Tensor
    signal: Tensor
    noise: Tensor
    elements: Tensor

    def __init__(self) -> None:
        # Not torchmetrics' default, which would wait for the other processes in local_only blocks.
        super().__init__(distributed_available_fn=lambda: distributed.size() > 1)
        for name in ("images", "labelled", "top1", "top5", "same", "elements"):
            self.add_state(name, torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("signal", "noise"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, reference: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: [N, classes] of the evaluated network.
            reference: [N, classes] of the float network.
            labels: int64 [N], −1 if unknown.
        """
        self.images += len(logits)
        self.same += (logits.argmax(1) == reference.argmax(1)).sum()
        self.signal += reference.double().square().sum()
        self.noise += (reference.double() - logits.double()).square().sum()
        self.elements += logits.numel()
        # Not torchmetrics' multiclass_accuracy, whose checks wait for the device in every batch.
        known = labels >= 0
        self.labelled += known.sum()
        self.top1 += (known & (logits.argmax(1) == labels)).sum()
        best = logits.topk(min(5, logits.shape[1])).indices
        self.top5 += (known & (best == labels[:, None]).any(1)).sum()

    def compute(self) -> Mapping[str, float | None]:
        """Return ``top1``, ``top5`` and ``agreement`` in percent, ``sqnr_db`` in dB, and ``rmse``.

        ``top1`` and ``top5`` are ``None`` without labels; all are ``None`` without images.
        """
        if not int(self.images):
            return dict.fromkeys(("top1", "top5", "agreement", "sqnr_db", "rmse"))
        labelled = int(self.labelled)
        return {
            "top1": 100.0 * int(self.top1) / labelled if labelled else None,
            "top5": 100.0 * int(self.top5) / labelled if labelled else None,
            "agreement": 100.0 * int(self.same) / int(self.images),
            "sqnr_db": sqnr_db(float(self.signal), float(self.noise)),
            "rmse": _root(float(self.noise) / int(self.elements)),
        }
