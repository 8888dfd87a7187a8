"""Keeps every mixing matrix inside its range (paper: clipped "on every update"; SPEC 1.3)."""

from __future__ import annotations

import lightning.pytorch as pl

from mhla_lightning.attention import MixingMatrix
from mhla_lightning.callbacks.steps import AfterStep


class ProjectMixing(AfterStep):
    """Projects all mixing matrices after every optimizer step.

    Without it a run with the block normalizer can go to NaN: a negative weight lets the denominator cross zero.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._matrices = [
            module for module in pl_module.modules() if isinstance(module, MixingMatrix)
        ]  # a search takes 1 ms, too long for every step

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for matrix in self._matrices:
            matrix.project_()
