"""Keeps every mixing matrix inside its range (paper: clipped "on every update"; SPEC 1.3)."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import torch
from torch import Tensor

from mhla_lightning.attention import MixingMatrix
from mhla_lightning.callbacks.steps import AfterStep
from mhla_lightning.strategies.local import local_weights


class ProjectMixing(AfterStep):
    """Projects all mixing matrices after every optimizer step.

    Without it a run with the block normalizer can go to NaN: a negative weight lets the denominator cross
    zero. Where a strategy keeps float32 masters or splits the weights, every tensor of this rank that holds
    values of the matrix is projected: a master left out would undo it at the next step.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._matrices = [
            module for module in pl_module.modules() if isinstance(module, MixingMatrix)
        ]  # once: the search takes 1 ms

    @torch.no_grad()
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        local = local_weights(trainer)
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
