"""Curves of rank, entropy and locality of attention while a model trains."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl

from mhla_lightning.analysis.held_out import single_samples
from mhla_lightning.analysis.study import ModelStudy, StudyOptions, check_tokens, study
from mhla_lightning.callbacks.steps import AfterStep
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.errors import UserError
from mhla_lightning.runs.tags import ATTENTION
from mhla_lightning.strategies.sharding import sharding_of
from mhla_lightning.tasks.base import Task

MEASURES = ("effective_rank", "rank", "entropy", "relative_entropy", "locality", "own_block")


class AttentionCurves(AfterStep):
    """Logs what attention does on a fixed batch of held-out samples.

    The tags are `val_attention/MEASURE/layer_N`. The measures are those of `mhla analyze`: means over heads
    and samples, of the weights as trained. Layers without an attention matrix have no curve. Every rank computes,
    because a sharded model needs them, and rank 0 logs. Training is not changed by it.

    Args:
        every_n_steps: optimizer steps from one point to the next.
        samples: first ones of the validation split.
        max_tokens: most tokens of a sample; a matrix of their square is made for each head.

    Raises:
        UserError: numbers below 1. At the start of training: samples that are too large, a compiled model,
            another task or data module than ours.
    """

    def __init__(self, every_n_steps: int = 500, samples: int = 2, max_tokens: int = 1024) -> None:
        super().__init__()
        numbers = {"every_n_steps": every_n_steps, "samples": samples, "max_tokens": max_tokens}
        for name, value in numbers.items():
            if value < 1:
                raise UserError(name, f"{value} is below 1, the least that AttentionCurves takes")
        self.every_n_steps, self.samples = every_n_steps, samples
        self.options = StudyOptions(max_tokens=max_tokens)
        self._batches: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, Task) or not isinstance(_data(trainer), ShardDataModule):
            raise UserError(
                "trainer.callbacks",
                "AttentionCurves needs a task and a data module of ours, for its batch of held-out samples",
            )
        if pl_module.compilation is not None:
            raise UserError(
                "model.compile",
                "AttentionCurves looks into single layers, and a compiled model shows none; take null, or "
                "leave the callback out",
            )
        tokens = 1
        for count in pl_module.grid:
            tokens *= count
        check_tokens(tokens, self.options)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._batches:
            return
        task, data = cast(Task, pl_module), cast(ShardDataModule, _data(trainer))
        for batch in data.val_dataloader():
            whole = task.completed(batch, 0, "evaluate")
            self._batches += single_samples(whole, pl_module.device)
            if len(self._batches) >= self.samples:
                break
        del self._batches[self.samples :]

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step % self.every_n_steps:
            return
        task = cast(Task, pl_module)
        backbone = task.built_backbone()
        modes = {module: module.training for module in backbone.modules()}
        backbone.eval()
        try:
            found = sharding_of(trainer.strategy).run_forward(
                lambda: study(task, self._batches, self.options)
            )
        finally:
            for module, training in modes.items():
                module.training = training
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(curves(found), trainer.global_step)


def curves(found: ModelStudy) -> dict[str, float]:
    """Return the mean over heads by tag."""
    return {
        f"{ATTENTION}{measure}/layer_{number}": float(layer.heads[measure].mean())
        for number, layer in enumerate(found.layers)
        for measure in MEASURES
        if layer.heads
    }


def _data(trainer: pl.Trainer) -> object:
    return cast(Any, trainer).datamodule
