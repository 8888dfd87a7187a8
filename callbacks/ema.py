"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mhla_lightning.callbacks.steps import AfterStep
from mhla_lightning.checkpoints.average import open_average
from mhla_lightning.errors import UserError
from mhla_lightning.strategies.sharding import sharding_of
from mhla_lightning.tasks.base import Task
from mhla_lightning.weights.rank_files import WEIGHT, Stretch


class EMA(AfterStep):
    """Averages the weights in float32 after every optimizer step.

    Validation measures the averaged weights as `val_ema/...`, beside the raw ones. Where weights are split
    over ranks, a rank averages the float32 masters that it owns. They are put together for forwards only.

    Lightning's WeightAveraging validates the average only. It averages in the weights' own type, and 0.9999
    is below the resolution of bf16. It loses the average under DeepSpeed (Lightning issue 21414).

    Args:
        decay: weight of the old average in a step, at least 0 and below 1.
        warmup: use min(decay, (1 + n) / (10 + n)) after n updates. A short run then forgets its random start.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise UserError("decay", f"{decay} is not at least 0 and below 1")
        super().__init__()
        self.decay, self.warmup = decay, warmup
        self.average: dict[str, Tensor] = {}
        self.updates = 0
        self._resume: Path | None = None

    def resume_from(self, folder: Path) -> None:
        """Name the checkpoint folder whose average is continued."""
        self._resume = folder

    def start_from(self, folder: Path | None) -> None:
        """Read the average anew from a checkpoint folder at its next use; None takes the weights."""
        self.average, self._resume = {}, folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start(trainer, pl_module)
        local = sharding_of(trainer.strategy).local_weights
        # Once: collecting the names takes milliseconds.
        lots = local.lots(local.fragments(_backbone(pl_module)))
        self._lots = [(lot, [self.average[fragment.name].view(-1) for fragment in lot]) for lot in lots]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer, pl_module)

    on_test_start = on_validation_start

    @torch.no_grad()
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.updates += 1
        local = sharding_of(trainer.strategy).local_weights
        for lot, averages in self._lots:
            with local.loaded(lot) as fragments:
                self.update(averages, [fragment.values for fragment in fragments])

    @torch.no_grad()
    def update(self, averages: list[Tensor], values: list[Tensor]) -> None:
        """Move averages towards values by the share of update number `updates`, in place.

        Args:
            averages: float32.
            values: of the same shapes, any floating type.
        """
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        get_ema_multi_avg_fn(decay)(averages, [value.float() for value in values], n)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate(trainer, pl_module, batch, "val_ema")

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate(trainer, pl_module, batch, "test_ema")

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, prefix: str) -> None:
        with self.averaged(trainer, pl_module):
            sharding_of(trainer.strategy).run_forward(lambda: cast(Task, pl_module).evaluate(batch, prefix))

    @contextmanager
    def averaged(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
        """Make forwards of the module use the average in the block.

        After it the module has its own weights again, bit for bit. Every rank calls it.
        """
        self._start(trainer, pl_module)
        with sharding_of(trainer.strategy).local_weights.swapped(_backbone(pl_module), self.average):
            yield

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]

    def stretches(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Stretch]:
        """Return this rank's part of the average: all of it where the weights are whole."""
        fragments = sharding_of(trainer.strategy).local_weights.fragments(_backbone(pl_module))
        parts = [(f, self.average[f.name].view(-1)) for f in fragments if f.owned]
        return [
            Stretch(fragment.name, fragment.shape, fragment.start, {WEIGHT: values})
            for fragment, values in parts
        ]

    @torch.no_grad()
    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.average:
            return
        local, backbone = sharding_of(trainer.strategy).local_weights, _backbone(pl_module)
        fragments = local.fragments(backbone)
        for lot in local.lots(fragments):
            with local.loaded(lot) as loaded:
                self.average |= {
                    f.name: f.values.float().clone().view(f.values.shape if local.sharded else f.shape)
                    for f in loaded
                }
        if self._resume is None:
            return
        saved = open_average(self._resume, backbone.state_dict(keep_vars=True))
        if saved is None:
            raise UserError(
                str(self._resume),
                "the checkpoint does not hold this model's average; start a new run with `fresh` or take EMA "
                "out of `trainer.callbacks`",
            )
        for fragment in fragments:
            self.average[fragment.name].view(-1).copy_(saved(fragment.name, fragment.start, fragment.size))


def _backbone(pl_module: pl.LightningModule) -> torch.nn.Module:
    """Return the backbone, whose names averages have.

    So their file loads into a bare backbone.
    """
    backbone = pl_module.backbone
    assert isinstance(backbone, torch.nn.Module), "configure_model has not run"
    return backbone
