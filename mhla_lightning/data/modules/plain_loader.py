"""Loaders outside of a Trainer, in the form that Lightning's Fabric takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset

from mhla_lightning.data.stream import Batch


class PlainLoader(DataLoader[Batch]):
    """Batches of one rank; each iteration goes on behind the batches that were taken.

    torch's own class, because Fabric refuses others. It never adds a sampler to a stream.

    Args:
        build: returns the loader from a position on, and ends the one before.
        batches: length of a pass, which begins anew each time; None has no end.
        start: training samples consumed before.
        step: samples of an optimizer step, over all ranks.
        accumulation: batches of an optimizer step.
    """

    def __init__(
        self,
        build: Callable[[int], wds.WebLoader],
        batches: int | None = None,
        start: int = 0,
        step: int = 0,
        accumulation: int = 1,
    ) -> None:
        super().__init__(_Taken(self, build, batches), batch_size=None, collate_fn=_unchanged)
        self.start, self.step, self.accumulation, self.taken = start, step, accumulation, 0

    @property
    def consumed(self) -> int:
        """Training samples of the steps whose batches are all taken."""
        return self.start + self.taken // self.accumulation * self.step


class _Taken(IterableDataset[Batch]):
    """The batches of a loader, counted."""

    def __init__(
        self, owner: PlainLoader, build: Callable[[int], wds.WebLoader], batches: int | None
    ) -> None:
        self._owner, self._build, self._batches = owner, build, batches

    def __iter__(self) -> Iterator[Batch]:
        owner = self._owner
        owner.taken -= owner.taken % owner.accumulation
        for batch in self._build(owner.consumed):
            owner.taken += 1
            yield batch

    def __len__(self) -> int:
        if self._batches is None:
            raise TypeError("the training sequence has no end, so its loader has no length")
        return self._batches


def rank_of_process() -> tuple[int, int]:
    """Return rank and world size of this process in its process group, or (0, 1)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _unchanged(batch: Any) -> Any:
    return batch
