"""The random numbers of training samples: noise, time, and whether the condition is dropped.

Imports torch and numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mhla_lightning.diffusion.process import Process
from mhla_lightning.randomness import generator

NOISE, TIMES, DROPPED = "noise", "times", "dropped"
"""Keys of a batch whose random numbers are drawn already."""


class Drawn(NamedTuple):
    """Random numbers of B samples.

    noise: float32 (B, C, ...). times: float32 (B,), in the process's units. dropped: bool (B,).
    """

    noise: Tensor
    times: Tensor
    dropped: Tensor


@dataclass(frozen=True)
class Draws:
    """Draws the random numbers of samples, each from its own key (seed, purpose, epoch, index).

    Args:
        process: draws the times.
        seed: the run's.
        purpose: name of the use, so that two uses differ.
        dropout: share of samples that lose their condition.
    """

    process: Process
    seed: int
    purpose: str
    dropout: float

    def __call__(self, shape: Sequence[int], epochs: Sequence[int], indices: Sequence[int]) -> Drawn:
        """Return the numbers of B samples of a shape (C, ...), by their epochs and indices."""
        count = len(indices)
        noise, times, dropped = (
            np.empty((count, *shape), np.float32),
            np.empty(count, np.float32),
            np.empty(count, bool),
        )
        for row, key in enumerate(zip(epochs, indices, strict=True)):
            rng = generator(self.seed, self.purpose, *key)
            times[row], dropped[row] = self.process.draw_time(rng), rng.random() < self.dropout
            noise[row] = rng.standard_normal(shape, np.float32)
        return Drawn(torch.from_numpy(noise), torch.from_numpy(times), torch.from_numpy(dropped))


@dataclass(frozen=True)
class BatchDraws:
    """Draws ahead of the step, in a loader's worker or before a batch is moved to the device.

    Args:
        draws: of the samples.
        names: keys of a batch that may hold the samples without noise; the first that it has counts.
        by_epoch: whether a sample meets other numbers in every epoch.
    """

    draws: Draws
    names: tuple[str, ...]
    by_epoch: bool = True

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors to add to a batch on the host."""
        clean = next(batch[name] for name in self.names if name in batch)
        indices = batch["index"].tolist()
        epochs = batch["epoch"].tolist() if self.by_epoch else [0] * len(indices)
        noise, times, dropped = self.draws(clean.shape[1:], epochs, indices)
        # As bits: a precision of bf16-true rounds every float of a batch.
        return {NOISE: noise, TIMES: times.view(torch.int32), DROPPED: dropped}


def drawn(batch: Mapping[str, Any]) -> Drawn | None:
    """Return the random numbers that a batch holds; None where nobody has drawn them."""
    if NOISE not in batch:
        return None
    return Drawn(batch[NOISE], batch[TIMES].view(torch.float32), batch[DROPPED])
