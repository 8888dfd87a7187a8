"""Callbacks that act by optimizer steps, not by batches.

Several batches may add up to one step, and a step may be left out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
from torch import Tensor

from mhla_lightning.tasks.base import Task


def completed(pl_module: pl.LightningModule, batch: Any, number: int) -> Any:
    """Return a training batch as the task reads it: batches of other loaders have no keys.

    Args:
        pl_module: that trains.
        batch: of any loader.
        number: of the batch in its epoch.
    """
    return pl_module.completed(batch, number, "train") if isinstance(pl_module, Task) else batch


class StepGuard(pl.Callback):
    """Decides which optimizer steps are taken; the first callback of a trainer.

    Attributes:
        skipped: whether the last step was left out; then weights and optimizer are as before it.
        skipped_steps: number of steps left out in the whole run.
        gradient_norm: norm of the last step's gradients before clipping, over all ranks; None where the
            strategy measures it.
    """

    skipped: bool = False
    skipped_steps: int = 0
    gradient_norm: Tensor | None = None


def step_guard(trainer: pl.Trainer) -> StepGuard | None:
    """Return the trainer's guard; None where every step is taken."""
    callbacks = cast(Any, trainer).callbacks  # an attribute that Lightning's connector sets
    return next((callback for callback in callbacks if isinstance(callback, StepGuard)), None)


def was_skipped(trainer: pl.Trainer) -> bool:
    """Whether the last optimizer step was left out."""
    guard = step_guard(trainer)
    return guard is not None and guard.skipped


class _CountsSteps(pl.Callback):
    """Knows which batch has ended an optimizer step; Lightning has no hook for that."""

    def __init__(self) -> None:
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.step_ended(trainer, pl_module)

    @abstractmethod
    def step_ended(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act after a step, which trainer.global_step counts already."""


class FirstStep(_CountsSteps):
    """Calls a function once an optimizer step of this attempt is taken; every rank calls it.

    As the first callback of a trainer it acts before any other sees the end of the step.

    Args:
        begin: called after every step; only its first call acts.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        super().__init__()
        self.begin = begin

    def step_ended(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin()


class AfterStep(_CountsSteps):
    """A callback that acts after every optimizer step that was taken.

    Lightning's own hooks come before the step, or after every batch.
    """

    def step_ended(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not was_skipped(trainer):
            self.after_step(trainer, pl_module)

    @abstractmethod
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act on the weights after the step, which trainer.global_step counts already."""
