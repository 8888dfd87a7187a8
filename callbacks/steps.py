"""Batches are not optimizer steps: several of them may add up to one."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning.pytorch as pl


class AfterStep(pl.Callback):
    """A callback that acts after every optimizer step. Lightning's own hook comes before the step, or after every batch."""

    def __init__(self) -> None:
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:  # still accumulating
            return
        self._step = trainer.global_step
        self.after_step(trainer, pl_module)

    @abstractmethod
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called with the weights that the step has left; trainer.global_step counts it."""
