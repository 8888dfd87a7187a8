"""Stops a run whose loss is no number any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import FORMAT, write_json

FOLDER = "not_finite"


class FiniteLoss(pl.Callback):
    """Looks at the losses of all ranks every `log_every_n_steps` steps, before every validation and before every checkpoint.

    Where one is NaN or infinite the run stops: no checkpoint is written after it, and the samples of the batches in question stand in the run
    folder, in not_finite/step-N-rank-R.json. Looking at every step would make a GPU wait for its host.

    Args:
        every_n_steps: of the checkpoints.

    Raises:
        UserError: from the training, a loss that is not finite.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._step = 0
        self._batches: list[tuple[int, list[str], torch.Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batches.append((self._step, batch["key"], outputs["loss"].detach()))
        if trainer.global_step == self._step:  # still accumulating
            return
        self._step = step = trainer.global_step
        every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set by its logger connector
        if step % every == 0 or step % self.every_n_steps == 0 or step == trainer.max_steps:
            self.look(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(trainer)

    def look(self, trainer: pl.Trainer) -> None:
        """Looks at the losses since the last look; every rank calls it.

        Raises:
            UserError: one is not finite.
        """
        if not self._batches:
            return
        batches, self._batches = self._batches, []
        finite = torch.stack([loss for _, _, loss in batches]).isfinite()
        bad = trainer.strategy.reduce((~finite).any().float(), reduce_op="sum")
        if not bad:
            return
        found = [(step, keys) for (step, keys, _), good in zip(batches, finite.tolist(), strict=True) if not good]
        folder = Path(trainer.default_root_dir, FOLDER)
        folder.mkdir(exist_ok=True)
        first = (found or batches)[0][0]
        named = [{"step": step, "keys": keys} for step, keys in found]
        write_json(folder / f"step-{first:08d}-rank-{trainer.global_rank}.json", {"format": FORMAT, "batches": named})
        raise UserError(
            f"the loss of step {first} is not finite; the last checkpoint is from before it, and {folder} names the samples:"
            " look at them (mhla data preview), or lower model.optimizer.lr or set trainer.gradient_clip_val, and resume"
        )
