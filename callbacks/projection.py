"""Clipping of mixing matrices to their range for LightningModules that are no tasks of ours."""

from __future__ import annotations

import lightning.pytorch as pl

from mhla_lightning.callbacks.steps import AfterStep
from mhla_lightning.strategies.sharding import sharding_of
from mhla_lightning.tasks import Task
from mhla_lightning.tasks.projection import mixing_matrices, project


class ProjectMixing(AfterStep):
    """Projects all mixing matrices of a LightningModule after every optimizer step.

    A LightningModule of your own that holds SelfAttention needs it: `Trainer(callbacks=[ProjectMixing(),
    ...])`, before callbacks that read the weights. Without it mixing weights leave [0, 1]. With the block
    normalizer a run can then go to NaN: a negative weight lets the denominator cross zero.

    Our tasks project by themselves; for them the callback does nothing.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        sharding_of(trainer.strategy)  # refuses a strategy whose weights cannot be projected
        own = isinstance(pl_module, Task) and pl_module.projects_itself
        self._matrices = [] if own else mixing_matrices(pl_module)

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._matrices:
            project(self._matrices, trainer.strategy)
