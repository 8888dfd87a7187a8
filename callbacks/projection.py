"""Clipping of mixing matrices to their range after every update (paper; SPEC 1.3)."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import torch
from torch import Tensor

from mhla_lightning.attention import MixingMatrix
from mhla_lightning.callbacks.steps import AfterStep
from mhla_lightning.strategies.sharding import sharding_of


class ProjectMixing(AfterStep):
    """Projects all mixing matrices after every optimizer step.

    Without it a run with the block normalizer can go to NaN: a negative weight lets the denominator cross
    zero. A strategy may keep float32 masters or split the weights. Then every tensor of this rank that holds
    values of the matrix is projected; the next step would undo it from a master left out.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Once: the search takes 1 ms.
        self._matrices = [module for module in pl_module.modules() if isinstance(module, MixingMatrix)]

    @torch.no_grad()
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        local = sharding_of(trainer.strategy).local_weights
        if local.sharded:  # the upper triangle of a causal matrix stays 0: it starts so and has no gradient
            local.change(
                [
                    (matrix.weight, partial(_clamp, *matrix.clamp))
                    for matrix in self._matrices
                    if matrix.clamp is not None
                ]
            )
            return
        for matrix in self._matrices:
            matrix.project_()


def _clamp(low: float, high: float, values: Tensor) -> None:
    values.clamp_(low, high)
