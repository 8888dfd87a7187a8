"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from mhla_lightning.callbacks.steps import AfterStep
from mhla_lightning.checkpoints.average import open_average
from mhla_lightning.errors import UserError
from mhla_lightning.strategies.local import local_weights, run_forward
from mhla_lightning.weights.rank_files import WEIGHT, Stretch


class EMA(AfterStep):
    """Averages the weights in float32 after every optimizer step and validates them as `val_ema/...` beside
    the raw ones.

    Where weights are split over ranks, a rank averages the float32 masters that it owns; they are put
    together for forwards only.

    Lightning's WeightAveraging lacks both: it validates the average only, averages in the weights' own dtype
    (0.9999 is below bf16's resolution), and loses the average under DeepSpeed (Lightning 21414).

    Args:
        decay: weight of the old average in a step.
        warmup: use min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not held back by
            its random start.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA decay is {decay}; it lies in [0, 1)")
        super().__init__()
        self.decay, self.warmup = decay, warmup
        self.average: dict[str, Tensor] = {}
        self.updates = 0
        self._resume: Path | None = None

    def resume_from(self, folder: Path) -> None:
        """Names the checkpoint folder whose average goes on."""
        self._resume = folder

    def start_from(self, folder: Path | None) -> None:
        """Reads the average anew from a checkpoint folder at the next look at it."""
        self.average, self._resume = {}, folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start(trainer, pl_module)
        local = local_weights(trainer)
        lots = local.lots(
            local.fragments(_backbone(pl_module))
        )  # once: a step costs milliseconds in names alone
        self._lots = [(lot, [self.average[fragment.name].view(-1) for fragment in lot]) for lot in lots]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer, pl_module)

    on_test_start = on_validation_start

    @torch.no_grad()
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        for lot, averages in self._lots:
            with local_weights(trainer).loaded(lot) as fragments:
                torch._foreach_lerp_(averages, [fragment.values.float() for fragment in fragments], 1 - decay)

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
            run_forward(trainer, lambda: cast(Any, pl_module).evaluate(batch, prefix))  # a Task

    @contextmanager
    def averaged(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
        """Inside, forwards of the module use the average; after, its own weights again, bit for bit. Every
        rank calls it.
        """
        self._start(trainer, pl_module)
        with local_weights(trainer).swapped(_backbone(pl_module), self.average):
            yield

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]

    def stretches(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Stretch]:
        """What this rank saves of the average: all of it where it holds the weights whole."""
        fragments = local_weights(trainer).fragments(_backbone(pl_module))
        parts = [(f, self.average[f.name].view(-1)) for f in fragments if f.owned]
        return [
            Stretch(fragment.name, fragment.shape, fragment.start, {WEIGHT: values})
            for fragment, values in parts
        ]

    @torch.no_grad()
    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.average:
            return
        local, backbone = local_weights(trainer), _backbone(pl_module)
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
                f"{self._resume} does not hold this model's average; start a new run with --fresh or "
                "take EMA out of trainer.callbacks"
            )
        for fragment in fragments:
            self.average[fragment.name].view(-1).copy_(saved(fragment.name, fragment.start, fragment.size))


def _backbone(pl_module: pl.LightningModule) -> torch.nn.Module:
    """The averages go by the backbone's own names: their file loads into a bare backbone."""
    backbone = pl_module.backbone
    assert isinstance(backbone, torch.nn.Module), "configure_model has not run"
    return backbone
