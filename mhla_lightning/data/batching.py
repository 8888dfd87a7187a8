"""Batch arithmetic and who reads what: pure functions of numbers, standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from mhla_lightning.errors import UserError


def split_batch(batch_size: int, world_size: int, micro_batch_size: int | None = None) -> tuple[int, int]:
    """Split the global batch of one optimizer step into (samples a rank takes at once, accumulation steps).

    batch_size: samples of one optimizer step over all ranks. micro_batch_size: samples a rank takes at once; None takes its whole part.
    Raises UserError with the sizes that work when a division leaves a remainder.
    """
    if batch_size < 1:
        raise UserError(f"data.batch_size is {batch_size}; it must be at least 1")
    per_rank, rest = divmod(batch_size, world_size)
    if rest or per_rank == 0:
        near = sorted({max(per_rank, 1) * world_size, (per_rank + 1) * world_size})
        sizes = " or ".join(str(size) for size in near)
        raise UserError(f"data.batch_size {batch_size} cannot be divided over {world_size} ranks; the nearest sizes that work: {sizes}")
    micro = per_rank if micro_batch_size is None else micro_batch_size
    if micro < 1 or per_rank % micro:
        sizes = ", ".join(str(size) for size in _divisors(per_rank))
        raise UserError(
            f"data.micro_batch_size {micro} must divide the {per_rank} samples that each of {world_size} ranks takes of data.batch_size {batch_size};"
            f" sizes that work: {sizes}"
        )
    return micro, per_rank // micro


def steps_for_epochs(epochs: float, samples: int, batch_size: int) -> int:
    """Optimizer steps that see all `samples` samples `epochs` times, rounded up; epochs may be a fraction. Raises UserError unless epochs > 0."""
    if not (math.isfinite(epochs) and epochs > 0):
        raise UserError(f"data.epochs is {epochs}; it must be a number above 0")
    return math.ceil(Fraction(str(epochs)) * samples / batch_size)  # exact: 0.07 * 100 is 7.000000000000001 in floats


def deal_shards(order: Sequence[int], rank: int, world_size: int, worker: int, workers: int) -> list[int]:
    """The shards of `order` that one worker of one rank reads. All (rank, worker) together read each shard once.

    Neighbours in `order` go to different ranks first, so ranks differ by at most one shard whatever the number of workers.
    """
    return list(order[worker * world_size + rank :: world_size * workers])


def eval_batches_per_rank(samples: int, batch_size: int, world_size: int) -> int:
    """Batches that every rank yields in one validation pass: the same number for all, padding batches included."""
    return math.ceil(math.ceil(samples / batch_size) / world_size)


def eval_ranges(samples: int, batch_size: int, rank: int, world_size: int, worker: int = 0, workers: int = 1) -> list[tuple[int, int]]:
    """The batches of one worker in a validation pass as ranges [start, stop) of global sample indices; (samples, samples) is a batch of padding only.

    Batch number i of the split goes to rank i % world_size; a rank's batches go round its workers, which is the order in which a DataLoader
    collects them. So a batch holds the same samples whatever the number of workers.
    """
    mine = range(worker, eval_batches_per_rank(samples, batch_size, world_size), workers)
    starts = (min((step * world_size + rank) * batch_size, samples) for step in mine)
    return [(start, min(start + batch_size, samples)) for start in starts]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
