"""Projection of mixing matrices to their range after every update (paper; SPEC 1.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from mhla_lightning.attention import MixingMatrix

PROJECTION = "projection"
"""The projection's name in Lightning's profilers."""


class HeldWeights(Protocol):
    """The weights as one rank holds them."""

    sharded: bool

    def change(self, changes: Sequence[tuple[nn.Parameter, Callable[[Tensor], object]]]) -> None:
        """Change parameters in place, in every tensor of this rank that holds values of them."""
        ...


@runtime_checkable
class HoldsWeights(Protocol):
    """What the projection asks of a strategy that splits weights or keeps float32 masters."""

    @property
    def local_weights(self) -> HeldWeights:
        """The weights as this rank holds them."""
        ...


def mixing_matrices(module: nn.Module) -> list[MixingMatrix]:
    """Return all mixing matrices in a module. The search takes about 1 ms."""
    return [part for part in module.modules() if isinstance(part, MixingMatrix)]


@torch.no_grad()
def project(matrices: Sequence[MixingMatrix], strategy: Strategy) -> None:
    """Bring mixing matrices back to their range.

    Every tensor of this rank that holds their values is projected: the next step would undo it from a float32
    master that was left out.

    Args:
        matrices: of the model.
        strategy: of the trainer.
    """
    local = strategy.local_weights if isinstance(strategy, HoldsWeights) else None
    if local is None or not local.sharded:
        for matrix in matrices:
            matrix.project_()
        return
    # The upper triangle of a causal matrix stays 0: it starts so and has no gradient.
    local.change(
        [(matrix.weight, partial(_clamp, *matrix.clamp)) for matrix in matrices if matrix.clamp is not None]
    )


def _clamp(low: float, high: float, values: Tensor) -> None:
    values.clamp_(low, high)
