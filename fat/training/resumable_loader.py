"""Loader that can resume in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fat.utils.batches import AnyBatch, Images, counted
from fat.utils.random import random_states, set_random_states

__all__ = ["ResumableLoader", "whole"]


class ResumableLoader:
    """Every n-th batch of an iterable, or all others, with a length.

    Lightning stores :meth:`state_dict` in checkpoints, so that training resumes with the next
    batch of an epoch. Skipped batches are drawn with the random states of the original pass, so
    that loaders that shuffle with them, as torch's do, keep their order.

    Args:
        batches: Iterable that starts anew for each epoch.
        count: Number of batches.
        every: n.
        chosen: Return every n-th batch if true, all others if false.
    """

    def __init__(
        self, batches: Iterable[AnyBatch], count: int, every: int, *, chosen: bool
    ) -> None:
        self._batches, self._every, self._chosen = batches, every, chosen
        self._drawn = 0  # batches drawn in this pass
        self._skip = 0
        self._begun: dict[str, Any] | None = None  # random states at the start of this pass
        # Lightning looks for samplers here to set their epoch.
        self.sampler = getattr(batches, "sampler", None)
        self.batch_sampler = getattr(batches, "batch_sampler", None)
        held = count // every
        self._length = held if chosen else count - held

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[AnyBatch]:
        skip, self._skip = self._skip, 0
        now = random_states()
        if not skip or self._begun is None:
            self._begun = now
        # FAT's loaders can start in the middle without loading what is skipped.
        start_at = getattr(self._batches, "start_at", None)
        if skip and start_at is not None:
            start_at(skip)
        elif skip:
            set_random_states(self._begun)
        numbered: Iterator[tuple[int, AnyBatch]] = enumerate(
            self._batches, skip if start_at is not None else 0
        )
        for index, batch in numbered:
            # The loader's count includes batches without a readable image.
            self._drawn = getattr(self._batches, "drawn", index + 1)
            if index < skip:
                if index == skip - 1:
                    set_random_states(now)
                continue
            if (index % self._every == self._every - 1) == self._chosen:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position in this pass and the random states at its start."""
        return {"drawn": self._drawn, "begun": self._begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next pass at the saved position, or at the first batch if that was the end."""
        drawn, self._begun = state["drawn"], state.get("begun")
        held = drawn // self._every
        given = held if self._chosen else drawn - held
        self._skip = 0 if given >= self._length else drawn


def whole(name: str, images: Images, *, elsewhere: bool = False) -> ResumableLoader:
    """Return a loader of all batches; Lightning would take a list for a list of loaders.

    Args:
        name: Name of the images in error messages.
        images: Batches.
        elsewhere: If this process has no batches but another has, return a loader of one batch of
            no images [0, 3, 1, 1]. Without any batch, Lightning would skip the hooks in which the
            processes add up their results.

    Raises:
        FatError: If there are none, or they can be iterated only once.
    """
    batches, count = counted(name, images, elsewhere=elsewhere)
    if not count:
        batches, count = [torch.zeros(0, 3, 1, 1)], 1
    return ResumableLoader(batches, count, count + 1, chosen=False)
