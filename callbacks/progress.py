"""progress.json: what `mhla status` shows of a run while it trains."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from mhla_lightning.callbacks.run_folder import run_folder_of
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.runs.disk_errors import disk_problem
from mhla_lightning.runs.folder import (
    FORMAT,
    RunFolder,
    newest_checkpoint,
    overwrite_json,
    read_object,
    write_json,
)
from mhla_lightning.runs.lock import check_held
from mhla_lightning.runs.stopping import Preempted
from mhla_lightning.tasks.trainers import run_length

log = logging.getLogger(__name__)
_FIRST_STEPS = 10  # a job that ends before counts as one that died at its start


class ProgressFile(pl.Callback):
    """Rewrites progress.json every `seconds`, and after the first and the tenth step.

    It also logs a line after each validation.

    Args:
        run: the run folder; None takes that of the trainer's logger, or `default_root_dir`.
        position: returns the data's state, of which `epoch` and `consumed` are written; None asks the
            trainer's data module.
        seconds: between two writes.

    Attributes:
        validated_at: optimizer step of the last validation; None before the first.
    """

    def __init__(
        self,
        run: RunFolder | None = None,
        position: Callable[[], Mapping[str, Any]] | None = None,
        seconds: float = 10.0,
    ) -> None:
        self._given, self.interval = (run, position), seconds
        self.run, self.position = run or RunFolder(Path()), position or dict
        self.validated_at: int | None = None
        self._training, self._first_step = False, 0
        # of earlier attempts of this run
        self._before = 0.0 if run is None else float(read_object(run.progress).get("seconds", 0.0))
        self._began = self._written = time.monotonic()

    @property
    def seconds(self) -> float:
        """Return the wall time of training so far, earlier attempts included."""
        return self._before + time.monotonic() - self._began

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take folder and position of the trainer where none were given."""
        run, position = self._given
        if run is None:
            self.run = run_folder_of(trainer)
        data = cast(Any, trainer).datamodule
        if position is None and isinstance(data, ShardDataModule):
            self.position = data.state_dict

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._given[0] is None:  # `lightning run` judges the end itself
            self.write(trainer, "finished")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began, self._first_step = time.monotonic(), trainer.global_step
        if not self.run.progress.exists():  # an earlier attempt's file stays until a step is taken
            self._training = True
            self.write(trainer, "running")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        first = not self._training and trainer.global_step > self._first_step
        self._training = self._training or first
        if self._training and (
            first
            or time.monotonic() - self._written >= self.interval
            or trainer.global_step == self._first_step + _FIRST_STEPS
        ):
            self.write(trainer, "running")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.validated_at = trainer.global_step
        values = {
            tag: float(value) for tag, value in trainer.callback_metrics.items() if tag.startswith("val")
        }
        line = "  ".join(f"{tag} {value:.4g}" for tag, value in sorted(values.items()))
        if trainer.is_global_zero:
            log.info(f"step {trainer.global_step}/{run_length(trainer)}  {line}")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if not self._training:  # validating a checkpoint changes nothing in its run
            return
        stopped = isinstance(exception, Preempted) or disk_problem(exception, self.run.path) is not None
        state = "preempted" if stopped else "failed"
        reason = exception.by if isinstance(exception, Preempted) else None
        try:
            self.write(trainer, state, reason)
        except OSError:  # its own error is on its way
            if trainer.is_global_zero:
                overwrite_json(self.run.progress, self._content(trainer, state, reason))

    def write(self, trainer: pl.Trainer, state: str, reason: str | None = None) -> None:
        """Write the file now, in the main process only.

        Args:
            trainer: of the run.
            state: running, finished, failed or preempted, which is every stop that the same command resumes.
            reason: why training ended before its last step, in words.
        """
        if not trainer.is_global_zero:
            return
        self._written = time.monotonic()
        check_held(self.run.path)
        write_json(self.run.progress, self._content(trainer, state, reason), durable=state != "running")

    def _content(self, trainer: pl.Trainer, state: str, reason: str | None) -> dict[str, Any]:
        step, metrics = trainer.global_step, trainer.callback_metrics
        newest, position = newest_checkpoint(self.run.path), self.position()
        return {
            "format": FORMAT,
            "state": state,
            "reason": reason,
            "step": step,
            "max_steps": run_length(trainer),
            **{key: position.get(key) for key in ("epoch", "consumed")},
            "loss": _number(metrics.get("train/loss")),
            "samples_per_second": _number(metrics.get("train/samples_per_second")),
            "last_checkpoint": newest.name if newest else None,
            "seconds": round(self.seconds, 3),
        }


class StepBar(RichProgressBar):
    """Lightning's progress bar with a title for a run that is one endless epoch.

    Lightning's title is "Epoch 0/-2". Its private method `_get_train_description` (Lightning 2.6) is the only
    place to change it.
    """

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training  "  # as wide as "Validation"


def _number(value: Any) -> float | None:
    """Return a finite number, else None.

    A step that was left out may have NaN, which JSON does not know.
    """
    return None if value is None or not math.isfinite(value) else float(value)
