"""Callbacks that a recipe of a test names."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


class StopAt(pl.Callback):
    """Sets `trainer.should_stop` at one optimizer step, as a callback of a user may."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step
