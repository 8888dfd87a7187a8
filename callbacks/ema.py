"""Exponential moving average of the weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
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

    The average is part of every checkpoint: Lightning's ModelCheckpoint keeps it in its file, and ours in a
    file beside it. Another model starts a new average.

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
        self._loaded: Mapping[str, Tensor] | None = None  # of a checkpoint; empty where it is not in the file
        self._owner: weakref.ref[torch.nn.Module] | None = None
        self._beside = self._split = False

    def resume_from(self, folder: Path) -> None:
        """Name the checkpoint folder whose average is continued."""
        self._resume = folder

    def start_from(self, folder: Path | None) -> None:
        """Read the average anew from a checkpoint folder at its next use; None takes the weights."""
        self.average, self._resume = {}, folder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module that is no task of ours. Raises UserError."""
        if not isinstance(pl_module, Task):
            raise UserError(
                "trainer.callbacks",
                f"EMA averages a task of mhla_lightning, and {type(pl_module).__name__} is none; "
                "take Lightning's EMAWeightAveraging",
            )

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
        self._evaluate(trainer, pl_module, batch, batch_idx, "val_ema")

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate(trainer, pl_module, batch, batch_idx, "test_ema")

    def _evaluate(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int, prefix: str
    ) -> None:
        task = cast(Task, pl_module)
        batch = task.completed(batch, number, "evaluate")
        with self.averaged(trainer, pl_module):
            sharding_of(trainer.strategy).run_forward(lambda: task.evaluate(batch, prefix))

    @contextmanager
    def averaged(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
        """Make forwards of the module use the average in the block.

        After it the module has its own weights again, bit for bit. Every rank calls it.
        """
        self._start(trainer, pl_module)
        with sharding_of(trainer.strategy).local_weights.swapped(_backbone(pl_module), self.average):
            yield

    @contextmanager
    def kept_beside(self) -> Iterator[None]:
        """Leave the average out of checkpoints in the block, which keep it in a file of its own."""
        self._beside = True
        try:
            yield
        finally:
            self._beside = False

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"updates": self.updates}
        inside = self.average and not self._beside and not self._split
        return state | {"average": self.average} if inside else state

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the parts of a split average together; every rank calls it."""
        if self._split and self.average and not self._beside:
            own = self.stretches(trainer, pl_module)
            whole = gathered(own, trainer.world_size)
            checkpoint["callbacks"][self.state_key]["average"] = whole if trainer.is_global_zero else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]
        self._loaded = state_dict.get("average", {} if self.updates else None)

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
        """Begin an average of this model, from the checkpoint where one was loaded."""
        backbone = _backbone(pl_module)
        same = self._owner is not None and self._owner() is backbone
        if self.average and same and self._loaded is None:
            return
        if self.average and not same and self._loaded is None:  # of another model
            self.updates = 0
        self.average, self._owner = {}, weakref.ref(backbone)
        local = sharding_of(trainer.strategy).local_weights
        self._split = local.sharded
        fragments = local.fragments(backbone)
        for lot in local.lots(fragments):
            with local.loaded(lot) as loaded:
                self.average |= {
                    f.name: f.values.float().clone().view(f.values.shape if local.sharded else f.shape)
                    for f in loaded
                }
        saved = self._saved(trainer, backbone)
        if saved is not None:
            for fragment in fragments:
                self.average[fragment.name].view(-1).copy_(
                    saved(fragment.name, fragment.start, fragment.size)
                )

    def _saved(
        self, trainer: pl.Trainer, backbone: torch.nn.Module
    ) -> Callable[[str, int, int], Tensor] | None:
        """Return a reader of the checkpoint's average: (name, start, numel) -> flat tensor.

        None without a checkpoint.
        """
        folder, loaded = self._resume, self._loaded
        self._resume = self._loaded = None
        if folder is None and loaded is None:
            return None
        state = backbone.state_dict(keep_vars=True)
        if folder is None and loaded:
            wanted = {name for name, tensor in state.items() if tensor.is_floating_point()}
            if loaded.keys() == wanted:
                return lambda name, start, numel: loaded[name].reshape(-1)[start : start + numel]
        folder = folder or Path(str(trainer.ckpt_path)).parent
        saved = open_average(folder, state)
        if saved is None:
            raise UserError(
                str(folder),
                "the checkpoint does not hold this model's average; start a new run with `fresh` or take EMA "
                "out of `trainer.callbacks`",
            )
        return saved


def gathered(own: list[Stretch], world_size: int) -> dict[str, Tensor]:
    """Return the tensors whose stretches the ranks hold, on the host; every rank calls it."""
    mine = [(one.name, one.shape, one.start, one.tensors[WEIGHT].cpu()) for one in own]
    parts = [mine] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(parts, mine)
    whole: dict[str, Tensor] = {}
    for name, shape, start, values in (part for rank in parts for part in rank):
        tensor = whole.setdefault(name, torch.empty(shape, dtype=values.dtype))
        tensor.view(-1)[start : start + values.numel()] = values.view(-1)
    return whole


def _backbone(pl_module: pl.LightningModule) -> torch.nn.Module:
    """Return the backbone, whose names averages have.

    So their file loads into a bare backbone.
    """
    backbone = pl_module.backbone
    assert isinstance(backbone, torch.nn.Module), "configure_model has not run"
    return backbone
