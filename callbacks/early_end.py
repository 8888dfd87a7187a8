"""Why training ends before its last step."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from mhla_lightning.errors import UserError

STOPPED = "trainer.should_stop, which a callback or the task has set"


class EarlyEnd(pl.Callback):
    """Report whether Lightning's EarlyStopping has ended training, and why.

    It acts before that callback.

    Lightning's EarlyStopping alone answers a metric that nothing measures with a traceback. A checkpoint
    brings back its old patience and the reason of an earlier end. Here the recipe's patience counts, and a
    run that was killed between this end and its summary ends there again.
    """

    def __init__(self) -> None:
        self._patience: list[int] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._patience = [callback.patience for callback in _early_stopping(trainer)]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for callback, patience in zip(_early_stopping(trainer), self._patience, strict=True):
            callback.patience = patience
            over = callback.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
            if over and callback.wait_count >= patience:
                trainer.should_stop = True
            else:
                callback.stopping_reason = EarlyStoppingReason.NOT_STOPPED

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a metric that this run does not measure."""
        tags = trainer.callback_metrics
        for callback in _early_stopping(trainer):
            if callback.strict and callback.monitor not in tags and not trainer.sanity_checking:
                raise UserError(
                    "trainer.callbacks",
                    f"EarlyStopping looks at '{callback.monitor}', which this run does not measure; its "
                    f"tags: {', '.join(sorted(tags))}",
                )


def early_end(trainer: pl.Trainer) -> str | None:
    """Return the reason for which EarlyStopping has ended training; None where it has not.

    Raises:
        UserError: its metric is not finite. The same command would end in the same way.
    """
    for callback in _early_stopping(trainer):
        # Lightning adds its own next step to the message.
        message = (callback.stopping_reason_message or "").removesuffix(" Signaling Trainer to stop.")
        if callback.stopping_reason is EarlyStoppingReason.NON_FINITE_METRIC:
            raise UserError(
                None,
                f"EarlyStopping has ended the run at step {trainer.global_step}: {message} Lower "
                "`model.optimizer.lr` or set `trainer.gradient_clip_val`, and start anew with `fresh`",
            )
        if callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            return f"EarlyStopping: {message}"
    return None


def _early_stopping(trainer: pl.Trainer) -> list[EarlyStopping]:
    callbacks = cast(Any, trainer).callbacks  # an attribute that Lightning's connector sets
    return [callback for callback in callbacks if isinstance(callback, EarlyStopping)]
