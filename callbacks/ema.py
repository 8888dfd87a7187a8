"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mhla_lightning.callbacks.steps import AfterStep
from mhla_lightning.errors import UserError

WEIGHTS = "ema/weights.safetensors"


class EMA(AfterStep):
    """Averages the weights in float32 after every optimizer step and validates them as `val_ema/...` beside the raw ones.

    Lightning's WeightAveraging lacks both: it validates the average only, averages in the weights' own dtype (0.9999 is below bf16's resolution),
    and loses the average under DeepSpeed.

    Args:
        decay: weight of the old average in a step.
        warmup: use min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not held back by its random start.
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
        self._resume = folder / WEIGHTS

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(pl_module)

    on_test_start = on_validation_start

    @torch.no_grad()
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        weights = _floating_state(pl_module)
        names = list(self.average)
        torch._foreach_lerp_([self.average[n] for n in names], [weights[n].float() for n in names], 1 - decay)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluate(trainer, pl_module, batch, "val_ema")

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluate(trainer, pl_module, batch, "test_ema")

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, prefix: str) -> None:
        with self.averaged(pl_module), trainer.precision_plugin.val_step_context():  # hooks run outside the step's autocast
            cast(Any, pl_module).evaluate(batch, prefix)  # a Task

    @contextmanager
    def averaged(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Inside, the module holds the average; after, its own weights again, bit for bit."""
        self._start(pl_module)
        tensors = _floating_state(pl_module)
        own = {name: tensor.data for name, tensor in tensors.items()}
        try:
            for name, tensor in tensors.items():
                tensor.data = self.average[name].to(tensor.dtype)
            yield
        finally:
            for name, tensor in tensors.items():
                tensor.data = own[name]

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]

    def save_files(self, folder: Path) -> None:
        """Writes the average into a checkpoint folder (the main process calls it)."""
        path = folder / WEIGHTS
        path.parent.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.average.items()}, path)

    @torch.no_grad()
    def _start(self, pl_module: pl.LightningModule) -> None:
        if self.average:
            return
        weights = _floating_state(pl_module)
        self.average = {name: tensor.detach().float().clone() for name, tensor in weights.items()}
        if self._resume is None:
            return
        saved = load_file(self._resume) if self._resume.is_file() else {}
        if saved.keys() != self.average.keys():
            raise UserError(f"{self._resume} does not hold this model's average; start a new run with --fresh or take EMA out of trainer.callbacks")
        for name, tensor in self.average.items():
            tensor.copy_(saved[name])


def _floating_state(pl_module: pl.LightningModule) -> dict[str, Tensor]:
    """Floating tensors of the backbone's state, by the backbone's own names (the averages' file loads into a bare backbone)."""
    backbone = pl_module.backbone
    assert isinstance(backbone, torch.nn.Module), "configure_model has not run"
    return {name: tensor for name, tensor in backbone.state_dict(keep_vars=True).items() if tensor.is_floating_point()}
