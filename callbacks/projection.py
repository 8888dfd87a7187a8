"""Keeps every mixing matrix inside its range (paper: clipped "on every update"; SPEC 1.3)."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from mhla_lightning.attention import MixingMatrix


class ProjectMixing(pl.Callback):
    """Projects all mixing matrices after every optimizer step.

    Without it a run with the block normalizer can go to NaN: a negative weight lets the denominator cross zero.
    """

    def __init__(self) -> None:
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:  # still accumulating
            return
        self._step = trainer.global_step
        for module in pl_module.modules():
            if isinstance(module, MixingMatrix):
                module.project_()
