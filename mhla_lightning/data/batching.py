"""Batch arithmetic and who reads what: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mhla_lightning.errors import UserError


def split_batch(batch_size: int, world_size: int, micro_batch_size: int | None = None) -> tuple[int, int]:
    """Return the samples that a rank takes at once, and the accumulation steps.

    Args:
        batch_size: samples of one optimizer step over all ranks.
        world_size: number of ranks.
        micro_batch_size: samples that a rank takes at once; None takes its whole part of the batch.

    Raises UserError, with the sizes that work, when a division leaves a remainder.
    """
    if batch_size < 1:
        raise UserError("batch_size", f"{batch_size} is too small; it must be at least 1")
    per_rank, rest = divmod(batch_size, world_size)
    if rest or per_rank == 0:
        near = sorted({max(per_rank, 1) * world_size, (per_rank + 1) * world_size})
        sizes = " or ".join(str(size) for size in near)
        raise UserError(
            "batch_size",
            f"{batch_size} cannot be divided over {world_size} ranks; the nearest sizes that work: {sizes}",
        )
    micro = per_rank if micro_batch_size is None else micro_batch_size
    if micro < 1 or per_rank % micro:
        sizes = ", ".join(str(size) for size in _divisors(per_rank))
        raise UserError(
            "micro_batch_size",
            f"{micro} must divide the {per_rank} samples that each of {world_size} ranks takes of "
            f"`data.batch_size` {batch_size}; sizes that work: {sizes}",
        )
    return micro, per_rank // micro


def steps_for_epochs(epochs: float, samples: int, batch_size: int) -> int:
    """Return the optimizer steps of so many epochs, rounded up; epochs may be a fraction.

    Raises UserError unless epochs > 0.
    """
    if not (math.isfinite(epochs) and epochs > 0):
        raise UserError("epochs", f"{epochs} is too small; it must be a number above 0")
    # Fractions are exact; in floats, 0.07 * 100 is 7.000000000000001.
    return math.ceil(Fraction(str(epochs)) * samples / batch_size)


@dataclass(frozen=True)
class RankPart:
    """The part of the endless sequence of samples that one rank reads.

    Args:
        rank: of the process.
        world_size: number of ranks.
        batch_size: samples of an optimizer step over all ranks. Step s takes the positions
            [first + s * batch_size, first + (s + 1) * batch_size).
        micro_batch_size: samples that a rank takes at once; divides batch_size / world_size.
        first: position at which the first step begins.
    """

    rank: int
    world_size: int
    batch_size: int
    micro_batch_size: int
    first: int = 0

    def positions(self, micro_step: int) -> np.ndarray:
        """Return the positions of one micro batch of this rank, int64 (micro_batch_size,).

        Ranks take turns in the sequence, so that each stays in its own lanes. Where a micro batch has an
        even size, two neighbours (an even position of the batch and the next one) stay together. So mixup
        can pair them on any number of ranks.
        """
        accumulation = self.batch_size // self.world_size // self.micro_batch_size
        step, part = divmod(micro_step, accumulation)
        together = 2 if self.micro_batch_size % 2 == 0 else 1
        turns, within = np.divmod(
            np.arange(part * self.micro_batch_size, (part + 1) * self.micro_batch_size, dtype=np.int64),
            together,
        )
        return self.first + step * self.batch_size + (turns * self.world_size + self.rank) * together + within


def eval_batches_per_rank(samples: int, batch_size: int, world_size: int) -> int:
    """Return the batches of every rank in one validation pass, padding batches included."""
    return math.ceil(math.ceil(samples / batch_size) / world_size)


def eval_ranges(
    samples: int, batch_size: int, rank: int, world_size: int, worker: int = 0, workers: int = 1
) -> list[tuple[int, int]]:
    """Return the batches of one worker in a validation pass, as ranges [start, stop).

    Batch number i of the split goes to rank i % world_size. A rank's batches go to its workers in turn, the
    order in which a DataLoader collects them. So a batch holds the same samples with any number of workers.
    The range (samples, samples) is a batch of padding only.
    """
    mine = range(worker, eval_batches_per_rank(samples, batch_size, world_size), workers)
    starts = (min((step * world_size + rank) * batch_size, samples) for step in mine)
    return [(start, min(start + batch_size, samples)) for start in starts]


def grouped_eval_ranges(
    groups: Sequence[int], batch_size: int, rank: int, world_size: int, worker: int = 0, workers: int = 1
) -> list[tuple[int, int, int]]:
    """Return ranges (group, start, stop), where no batch holds samples of two groups.

    Otherwise as eval_ranges.
    groups: samples of each group; groups follow one another. All ranks are in the same group at the same
    time, so that their batches, and their padding, have one shape.
    """
    ranges: list[tuple[int, int, int]] = []
    first = 0
    for group, samples in enumerate(groups):
        ranges += [
            (group, first + start, first + stop)
            for start, stop in eval_ranges(samples, batch_size, rank, world_size)
        ]
        first += samples
    return ranges[worker::workers]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
