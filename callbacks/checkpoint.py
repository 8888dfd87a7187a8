"""Checkpoints of a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint

from mhla_lightning.callbacks.checkpoint_files import files_of
from mhla_lightning.callbacks.ema import EMA
from mhla_lightning.callbacks.steps import was_skipped
from mhla_lightning.checkpoints.atomic import Keep, begin, commit, discard, prune, sync
from mhla_lightning.checkpoints.io import RunCheckpointIO
from mhla_lightning.checkpoints.rng import load_rng
from mhla_lightning.checkpoints.saving import Writer
from mhla_lightning.errors import UserError
from mhla_lightning.runs.disk_errors import complaint, disk_error, lack_of_room
from mhla_lightning.runs.folder import FORMAT, RunFolder, read_object
from mhla_lightning.runs.lock import check_held
from mhla_lightning.strategies.state import LOSS_SCALE, loss_scale, optimizer_groups
from mhla_lightning.weights.moments import GROUPS

_GRACE = 60.0  # seconds that a failed run waits for the checkpoint that it was writing


class Checkpoint(LightningCheckpoint):
    """Saves `checkpoints/step-.../` every `every_n_steps` optimizer steps and at the end.

    Lightning's ModelCheckpoint writes in place, so a kill leaves half a file under its final name. It saves
    neither random generators nor the average. Its DeepSpeed checkpoints are pickles that only the same number
    of ranks can load.

    Lightning writes a step's numbers to the loggers after the callbacks have seen its end. The checkpoint of
    the step becomes complete only then. A run killed in between would otherwise resume after the step and
    never write its numbers.

    Args:
        run: the run folder.
        facts: further content of state.json (data_hash, recipe_hash, versions, ...).
        position: returns the data's state: the consumed samples and the order they belong to.
        every_n_steps: optimizer steps between two saves.
        keep: which complete checkpoints stay.
        resume: the checkpoint folder that this attempt resumes from; None in a new run.
        averages: the EMA callbacks, whose files belong in the folder.
        asynchronous: write in a thread beside the training, from copies in the host's memory.
        recipe: the resolved recipe as YAML, kept in the folder.

    Attributes:
        save_seconds: the longest save so far, from the call to the complete checkpoint, earlier attempts
            included.

    Raises:
        DiskError: from the training, a disk that is full or cannot be written. Earlier checkpoints stay as
            they are.
    """

    def __init__(
        self,
        run: RunFolder,
        facts: dict[str, Any],
        position: Callable[[], Mapping[str, Any]],
        every_n_steps: int = 1000,
        keep: Keep = Keep(last=3),  # noqa: B008  frozen
        resume: Path | None = None,
        averages: Sequence[EMA] = (),
        asynchronous: bool = False,
        recipe: str = "",
    ) -> None:
        self.run, self.facts, self.position, self.recipe = run, facts, position, recipe
        self.every_n_steps, self.keep, self.resume, self.averages = every_n_steps, keep, resume, averages
        self.asynchronous = asynchronous
        self._step, self._saved, self._due, self._asked = 0, 0, False, False
        self.save_seconds = (
            float(read_object(resume / "state.json").get("save_seconds", 0.0)) if resume else 0.0
        )
        self._measured: tuple[int, dict[str, float]] = (-1, {})
        self._writer: Writer | None = None
        self._complete: Callable[[], None] | None = None
        self._logged, self._written = threading.Event(), -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a trainer that cannot write such folders, before training. Raises UserError."""
        if not isinstance(trainer.strategy.checkpoint_io, RunCheckpointIO):
            raise UserError(
                "trainer.callbacks",
                "Checkpoint writes the run folder of `lightning run`; under a Trainer of your own take "
                "Lightning's ModelCheckpoint, whose files hold the average and the data's position, too",
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = self._saved = trainer.global_step
        state = self.resume / "rng" / f"rank-{trainer.global_rank}.safetensors" if self.resume else None
        if state is not None and state.is_file():  # missing for ranks that the saved run did not have
            load_rng(state)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # still accumulating
            return
        self._step = trainer.global_step
        self._due, self._asked = self._due or self._asked or self._step % self.every_n_steps == 0, False
        if self._due and not _validates_now(trainer, batch_idx):
            self._save_if_due(trainer, logged=False)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._complete_logged(trainer)

    def save_after_this_step(self) -> None:
        """Make this step due, whether the other callback's or this one's hook comes first.

        Another callback calls it from on_train_batch_end, on every rank.
        """
        self._asked = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a validation that is due at the same step.

        A run killed between the two would otherwise never measure it.
        """
        self._measured = (
            trainer.global_step,
            {tag: float(value) for tag, value in trainer.callback_metrics.items() if tag.startswith("val")},
        )
        self._check_monitor()
        self._save_if_due(trainer)

    def _check_monitor(self) -> None:
        tag, tags = self.keep.monitor, self._measured[1]
        if tag is not None and tags and tag not in tags:
            raise UserError(
                "checkpoint.monitor",
                f"this run does not measure '{tag}'; its tags: {', '.join(sorted(tags))}",
            )

    def _save_if_due(self, trainer: pl.Trainer, *, logged: bool = True) -> None:
        """Save a due step, or the next one that is taken where it was left out.

        While all steps fail, good checkpoints must not be pushed out.
        """
        if self._due and not was_skipped(trainer):
            self._due = False
            self.save(trainer, logged=logged)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self._saved:
            self.save(trainer)
        self.finish_writing(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if not self._logged.is_set() and _steps_written(trainer) == self._written:
            # The step's numbers are not written: as after a kill, the run resumes from the checkpoint before.
            return
        self._logged.set()
        if self._writer is not None:  # no collective here: the other ranks may be gone
            self._writer.wait(_GRACE)
        if self._complete is not None and trainer.is_global_zero:  # all ranks have written
            self._attempt(self._complete)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[GROUPS] = optimizer_groups(trainer)
        if scale := loss_scale(trainer.optimizers[0]):
            checkpoint[LOSS_SCALE] = scale

    def save(self, trainer: pl.Trainer, *, logged: bool = True) -> None:
        """Write one checkpoint; every rank calls it.

        Args:
            trainer: of the run.
            logged: whether the numbers of the step are written; else the checkpoint becomes complete at the
                next step's start.

        Raises:
            DiskError: a disk that is full or cannot be written.
        """
        self.finish_writing(trainer)
        step, began = trainer.global_step, time.monotonic()
        self._saved = step
        parts = files_of(trainer, self._begin(trainer, step), self.averages, self.recipe, self.asynchronous)
        needed = int(
            trainer.strategy.reduce(
                torch.tensor(float(parts.bytes), device=trainer.strategy.root_device), reduce_op="sum"
            )
        )
        self._agree(trainer, lack_of_room(self.run.checkpoints, needed) if trainer.is_global_zero else None)
        state = self._state(trainer)
        self._logged, self._written = threading.Event(), _steps_written(trainer)
        numbers = self._logged

        def measure() -> None:
            self.save_seconds = max(self.save_seconds, round(time.monotonic() - began, 3))

        def complete() -> None:
            if self.run.metrics.exists():  # no power cut may take numbers of steps that are not run again
                sync(self.run.metrics)
            commit(parts.folder, step, {**state, "save_seconds": self.save_seconds})
            prune(self.run.path, self.keep)

        def complete_when_logged() -> None:
            measure()
            numbers.wait()
            complete()

        if self.asynchronous:
            self._writer = Writer(parts, trainer.world_size, complete_when_logged)
        else:
            self._agree(trainer, self._attempt(parts.write))
            measure()
            self._complete = complete
        if logged:
            self._complete_logged(trainer)

    def _complete_logged(self, trainer: pl.Trainer) -> None:
        """Complete the checkpoint that waits for its step's numbers; every rank calls it."""
        self._logged.set()
        complete, self._complete = self._complete, None
        if complete is not None:
            self._agree(trainer, self._attempt(complete) if trainer.is_global_zero else None)

    def _begin(self, trainer: pl.Trainer, step: int) -> Path:
        error, folder = None, Path()
        if trainer.is_global_zero:
            check_held(self.run.path)
            try:
                folder = begin(self.run.checkpoints, step)
            except OSError as problem:
                error = complaint(problem, self.run.checkpoints)
        self._agree(trainer, error)
        return trainer.strategy.broadcast(folder)

    def _attempt(self, write: Callable[[], None]) -> str | None:
        try:
            write()
        except (OSError, RuntimeError) as error:
            return complaint(error, self.run.checkpoints)
        return None

    def finish_writing(self, trainer: pl.Trainer) -> None:
        """Complete the last checkpoint, and wait for its writing thread; every rank calls it."""
        self._complete_logged(trainer)
        writer, self._writer = self._writer, None
        if self.asynchronous:
            self._agree(trainer, writer.wait() if writer is not None else None)

    def _agree(self, trainer: pl.Trainer, error: str | None) -> None:
        """Stop all ranks where one could not write. Raises DiskError."""
        if not trainer.strategy.reduce(
            torch.tensor(float(error is not None), device=trainer.strategy.root_device), reduce_op="sum"
        ):
            return
        errors: list[str | None] = [error]
        if trainer.world_size > 1:
            errors = [None] * trainer.world_size
            torch.distributed.all_gather_object(errors, error)
        if trainer.is_global_zero:
            discard(self.run.checkpoints)
        problem = next(text for text in errors if text is not None)
        raise disk_error(self.run.path, problem, self.run.checkpoints)

    def _state(self, trainer: pl.Trainer) -> dict[str, Any]:
        at, metrics = self._measured
        return {
            **self.position(),
            "format": FORMAT,
            "step": trainer.global_step,
            "world_size": trainer.world_size,
            "strategy": type(trainer.strategy).__name__,
            "metrics": metrics if at == trainer.global_step else {},
            **self.facts,
        }


def _steps_written(trainer: pl.Trainer) -> int:
    """Return the number of steps whose numbers Lightning has passed to the loggers.

    trainer.global_step is ahead by one until then. `_batches_that_stepped` (Lightning 2.6) is the only count
    that rises after the loggers have written; the public batch_progress rises before, and a logger may fail.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _validates_now(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether Lightning validates after this batch.

    It assumes val_check_interval in batches and check_val_every_n_epoch 1, as a run has them.
    """
    every = trainer.val_check_batch
    return trainer.enable_validation and every is not None and (batch_idx + 1) % every == 0
