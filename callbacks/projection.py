"""Keeps every mixing matrix inside its range (paper: clipped "on every update"; SPEC 1.3)."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from mhla_lightning.attention import MixingMatrix
from mhla_lightning.callbacks.steps import AfterStep
from mhla_lightning.strategies.local import local_weights


class ProjectMixing(AfterStep):
    """Projects all mixing matrices after every optimizer step.

    Without it a run with the block normalizer can go to NaN: a negative weight lets the denominator cross zero. Where a strategy keeps float32
    masters or splits the weights, every tensor of this rank that holds values of the matrix is projected: a master left out would undo it at the
    next step.
    """

    @torch.no_grad()
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        local = local_weights(trainer)
        for module in pl_module.modules():
            if not isinstance(module, MixingMatrix):
                continue
            if not local.sharded:
                module.project_()
            elif module.clamp is not None:  # the upper triangle of a causal matrix stays 0: it starts so and has no gradient
                for values in local.copies(module.weight):
                    values.clamp_(*module.clamp)
