"""Arguments of Lightning's Trainer that do not fit one endless sequence of samples."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler

from mhla_lightning.errors import UserError


def check_callbacks(trainer: pl.Trainer) -> None:
    """Refuse callbacks that change the batch.

    It is called before BatchSizeFinder begins its trials.

    Args:
        trainer: that trains.

    Raises:
        UserError: the first such callback.
    """
    for callback in cast(Any, trainer).callbacks:  # an attribute that Lightning's connector sets
        if isinstance(callback, BatchSizeFinder):
            raise UserError(
                "trainer.callbacks",
                "BatchSizeFinder would change `data.batch_size`, the batch of a step; set "
                "`data.micro_batch_size`, the samples that a device takes at once",
            )
        if isinstance(callback, GradientAccumulationScheduler):
            raise UserError(
                "trainer.callbacks",
                "GradientAccumulationScheduler would change `data.batch_size`, the batch of a step",
            )


def check_accumulation(trainer: pl.Trainer, accumulation: int) -> None:
    """Refuse another accumulation than the batch sizes give. Raises UserError."""
    if trainer.accumulate_grad_batches != accumulation:
        raise UserError(
            "trainer.accumulate_grad_batches",
            f"{trainer.accumulate_grad_batches} does not fit the {accumulation} that follow from "
            f"`data.batch_size` and `data.micro_batch_size`: set it to {accumulation}",
        )


def check_trainer(trainer: pl.Trainer, batches: int, accumulation: int, epochs: float | None) -> None:
    """Refuse a trainer that would train on other samples than its steps say.

    Args:
        trainer: that trains in epochs.
        batches: micro batches of an epoch.
        accumulation: micro batches of an optimizer step.
        epochs: the data module's `epochs`.

    Raises:
        UserError: the first argument that does not fit.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a few batches, and nothing after them
        return
    if epochs is not None and trainer.max_epochs != epochs:
        raise UserError(
            "data.epochs",
            f"it is {epochs:g} and the trainer's max_epochs is {trainer.max_epochs}: only a recipe takes its "
            "length from here; leave it out, or set both to the same number",
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise UserError(
            "trainer.overfit_batches",
            "it needs a sampler, which a stream of shards does not have; make a data set of the few samples",
        )
    limit = trainer.limit_train_batches
    taken = int(batches * limit) if isinstance(limit, float) else min(limit or 0, batches)
    if taken % accumulation:
        raise UserError(
            "trainer.limit_train_batches",
            f"{limit} makes epochs of {taken} micro batches, and a step takes {accumulation}: the last step "
            f"of an epoch would have fewer samples; take a multiple of {accumulation}",
        )
