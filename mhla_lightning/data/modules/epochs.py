"""Epochs under a plain Lightning Trainer: parts of one endless sequence, each with a length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import webdataset as wds

from mhla_lightning.data.stream import Batch


class EpochLoader:
    """Training batches in epochs of one length, without a sample dropped or repeated.

    Each epoch goes on where the training stands in the sequence: after a resume, in the middle of an epoch
    too. Batches that were loaded ahead stay for the next epoch.

    Args:
        batches: micro batches of an epoch.
        accumulation: micro batches of an optimizer step.
        batch_size: samples of an optimizer step, over all ranks.
        consumed: returns the training samples that are consumed.
        build: returns the endless loader from a position on, and ends the one before.
        restated: is called with the accumulation of a checkpoint that is resumed.
    """

    def __init__(
        self,
        batches: int,
        accumulation: int,
        batch_size: int,
        consumed: Callable[[], int],
        build: Callable[[int], wds.WebLoader],
        restated: Callable[[int], None],
    ) -> None:
        self.batches, self.accumulation, self.batch_size = batches, accumulation, batch_size
        self._consumed, self._build, self._restated = consumed, build, restated
        self._running: Iterator[Batch] | None = None
        self._first = self._taken = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        consumed = self._consumed()
        steps, rest = divmod(self._taken, self.accumulation)
        if self._running is None or rest or self._first + steps * self.batch_size != consumed:
            self._running, self._first, self._taken = iter(self._build(consumed)), consumed, 0
        for _ in range(self.batches):
            batch = next(self._running)
            self._taken += 1
            yield batch

    def close(self) -> None:
        """Forget the loader whose workers have ended."""
        self._running = None

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning keeps of the loader; the position is the data module's."""
        return {"accumulation": self.accumulation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what Lightning kept."""
        self._restated(state_dict["accumulation"])


def restate_progress(trainer: pl.Trainer, restated: Callable[[int], int]) -> None:
    """Change Lightning's counts of micro batches, which a checkpoint has restored.

    A checkpoint of another number of ranks has counted other micro batches, and the loop would end early.

    Args:
        trainer: whose counts.
        restated: from a count of the checkpoint to one of this run.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    state = progress.state_dict()
    for counts in (state["total"], state["current"]):
        # Lightning learns from this difference at which hook the checkpoint was written.
        behind = counts["processed"] - counts["completed"]
        batches = restated(counts["ready"])
        counts |= {"ready": batches, "started": batches, "processed": batches}
        counts["completed"] = batches - behind
    progress.load_state_dict(state)
