"""Values of device tensors that are read later, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Deferred"]


class Deferred:
    """Copy of a tensor on the host that is on its way.

    A plain read (``bool(tensor)``, ``tensor.tolist()``) waits until the device has done all work
    that was queued before, so that its queue runs empty. This copy waits in the queue instead, and
    :meth:`tensor` finds it finished if some steps have passed.

    Args:
        value: Tensor of any shape on any device; later changes to it have no effect.

    Examples:
        >>> bool(Deferred(torch.tensor(True)).tensor())
        True
    """

    def __init__(self, value: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._copy.copy_(value.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(value.device))
        else:
            self._copy = value.detach().clone()

    def tensor(self) -> Tensor:
        """Return the value on the CPU; wait for it if it has not arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.cpu()
