"""Checkpoints of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint

from mhla_lightning.callbacks.ema import EMA
from mhla_lightning.checkpoints.atomic import begin, commit, prune
from mhla_lightning.checkpoints.rng import load_rng, save_rng
from mhla_lightning.runs.folder import FORMAT, RunFolder, complete_checkpoints, read_json
from mhla_lightning.runs.lock import check_held


class Checkpoint(LightningCheckpoint):
    """Saves `checkpoints/step-.../` every `every_n_steps` optimizer steps and at the end.

    Lightning's ModelCheckpoint writes in place (a kill leaves half a file under its final name) and keeps neither random generators nor the average.

    Args:
        run: the run folder.
        facts: what state.json says besides the step (data_hash, recipe_hash, versions, ...).
        position: the data's state: consumed samples and what gives their number a meaning.
        every_n_steps: between two saves.
        keep_last: complete checkpoints kept.
        resume: the checkpoint folder that this attempt goes on from.
        averages: the EMA callbacks, whose files belong into the folder.

    Attributes:
        save_seconds: the longest save so far, those of earlier attempts included.
    """

    def __init__(
        self,
        run: RunFolder,
        facts: dict[str, Any],
        position: Callable[[], Mapping[str, Any]],
        every_n_steps: int = 1000,
        keep_last: int = 3,
        resume: Path | None = None,
        averages: Sequence[EMA] = (),
    ) -> None:
        self.run, self.facts, self.position = run, facts, position
        self.every_n_steps, self.keep_last, self.resume, self.averages = every_n_steps, keep_last, resume, averages
        self._step, self._due, self._asked = 0, False, False
        self.save_seconds = float((read_json(resume / "state.json") or {}).get("save_seconds", 0.0)) if resume else 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        state = self.resume / "rng" / f"rank-{trainer.global_rank}.safetensors" if self.resume else None
        if state is not None and state.is_file():  # missing for ranks that the saved run did not have
            load_rng(state)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:  # still accumulating
            return
        self._step = trainer.global_step
        self._due, self._asked = self._asked or self._step % self.every_n_steps == 0, False
        if self._due and not _validates_now(trainer, batch_idx):
            self._save_if_due(trainer)

    def save_after_this_step(self) -> None:
        """Called from another callback's on_train_batch_end, on every rank: this step is due, wherever it stands."""
        self._asked = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation due at the same step comes first: a run killed between the two would never make it up."""
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        if self._due:
            self._due = False
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = complete_checkpoints(self.run.path)
        if trainer.global_step and not (done and done[-1].name.endswith(f"{trainer.global_step:08d}")):
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Writes one checkpoint; every rank calls it."""
        step, began = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            check_held(self.run.path)
        folder: Path = trainer.strategy.broadcast(begin(self.run.checkpoints, step) if trainer.is_global_zero else Path())
        trainer.save_checkpoint(folder / "trainer.ckpt")
        save_rng(folder / "rng" / f"rank-{trainer.global_rank}.safetensors")
        if trainer.is_global_zero:
            for average in self.averages:
                average.save_files(folder)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self.save_seconds = max(self.save_seconds, round(time.monotonic() - began, 3))
            commit(folder, step, self._state(trainer))
            prune(self.run.path, self.keep_last)
        trainer.strategy.barrier()
        self.save_seconds = max(self.save_seconds, time.monotonic() - began)

    def _state(self, trainer: pl.Trainer) -> dict[str, Any]:
        return {
            **self.position(),
            "format": FORMAT,
            "step": trainer.global_step,
            "world_size": trainer.world_size,
            "strategy": type(trainer.strategy).__name__,
            "save_seconds": self.save_seconds,
            **self.facts,
        }


def _validates_now(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether Lightning validates after this batch (val_check_interval in batches, check_val_every_n_epoch 1)."""
    every = trainer.val_check_batch
    return trainer.enable_validation and every is not None and (batch_idx + 1) % every == 0
