"""Arguments of Lightning's Trainer that do not fit training data which is one endless epoch."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
)

from mhla_lightning.errors import UserError

_BY_EPOCHS = (BaseFinetuning, GradientAccumulationScheduler, ModelPruning, StochasticWeightAveraging)


def check_callbacks(trainer: pl.Trainer) -> None:
    """Refuse callbacks that act by epochs or change the batch.

    It is called before BatchSizeFinder begins its trials.

    Args:
        trainer: that trains.

    Raises:
        UserError: the first such callback.
    """
    for callback in cast(Any, trainer).callbacks:  # an attribute that Lightning's connector sets
        if isinstance(callback, BatchSizeFinder):
            raise UserError(
                "trainer.callbacks", "BatchSizeFinder would change `data.batch_size`, the batch of a step"
            )
        if isinstance(callback, _BY_EPOCHS):
            raise UserError(
                "trainer.callbacks",
                f"{type(callback).__name__} acts by epochs, and the training data is one endless epoch",
            )


def check_trainer(trainer: pl.Trainer, batches: int | None, samples: int, batch_size: int) -> None:
    """Refuse a trainer that would train on other samples than its steps say, or never end.

    Lightning begins the loader anew with each of its epochs. The same samples would come again, while the
    position in the data goes on.

    Args:
        trainer: that trains.
        batches: micro batches of the loader; None where it has no end.
        samples: of the training data.
        batch_size: samples of one optimizer step.

    Raises:
        UserError: the first argument that does not fit.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a few batches, and nothing after them
        return
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise UserError(
            "trainer.overfit_batches",
            "it needs a sampler, which a stream of shards does not have; make a data set of the few samples",
        )
    limit = trainer.limit_train_batches
    whole = limit == 1.0 if isinstance(limit, float) else batches is not None and limit >= batches
    if not whole:
        raise UserError(
            "trainer.limit_train_batches",
            f"{limit} would begin the same samples anew after them; give the length by `trainer.max_steps`",
        )
    if trainer.check_val_every_n_epoch not in (None, 1) and trainer.limit_val_batches:
        raise UserError(
            "trainer.check_val_every_n_epoch",
            f"{trainer.check_val_every_n_epoch} would never validate, because the training data is one "
            "endless epoch; take `trainer.val_check_interval`",
        )
    if trainer.min_epochs:
        raise UserError(
            "trainer.min_epochs",
            f"it is {trainer.min_epochs} (with min_steps Lightning sets 1), and the training data is one "
            "endless epoch, which no callback could end early; set it to 0",
        )
    _check_length(trainer, samples / batch_size)


def _check_length(trainer: pl.Trainer, steps_an_epoch: float) -> None:
    """Refuse a limit in epochs that would end training: they never end."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if epochs is None or epochs < 0 or -1 < steps <= epochs * steps_an_epoch:
        return
    raise UserError(
        "trainer.max_epochs",
        f"{epochs} epochs would not end the run, because the training data is one endless epoch; set "
        f"max_steps: {epochs} epochs are {epochs * steps_an_epoch:g} steps",
    )
