"""Callbacks for recipes of tests: faults at a given step of a given rank, and digests of its state."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from mhla_lightning.callbacks import EMA
from mhla_lightning.callbacks.steps import AfterStep
from mhla_lightning.strategies.sharding import sharding_of
from mhla_lightning.strategies.state import saved_lots, stretches

LAYER = "backbone.blocks.1.mlp.fc1"


class Fault(pl.Callback):
    """Causes a fault in the last micro batch of some steps.

    Args:
        kind: `layer`: LAYER gives NaN. `gradient`: the gradient of its output is infinite. `leap`: the loss
            is 50 times as large. `exception`, `memory`: training_step raises. `kill`: SIGKILL to the process.
            `hang`: exception, then a teardown that never ends.
        steps: numbers from 1, as in metrics.jsonl.
        rank: of the process that has the fault.
    """

    def __init__(self, kind: str, steps: list[int], rank: int) -> None:
        self.kind, self.steps, self.rank = kind, steps, rank
        self._micro, self._on = 0, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.kind in ("layer", "gradient"):
            pl_module.get_submodule(LAYER).register_forward_hook(self._spoil)
        elif trainer.global_rank == self.rank:
            task: Any = pl_module
            step = task.training_step
            task.training_step = lambda batch, batch_idx: self._instead(step(batch, batch_idx))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._micro += 1
        last = self._micro % trainer.accumulate_grad_batches == 0
        self._on = last and trainer.global_rank == self.rank and trainer.global_step + 1 in self.steps
        if self._on:
            Path(trainer.default_root_dir, "fault").touch()

    def _spoil(self, module: torch.nn.Module, given: Any, output: Tensor) -> Tensor:
        if not self._on:
            return output
        if self.kind == "layer":
            return output * math.nan
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)
        return output

    def _instead(self, loss: Tensor) -> Tensor:
        if not self._on:
            return loss
        if self.kind == "leap":
            return loss * 50
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "memory":
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you "
                "tried to allocate 9 bytes"
            )
        raise ZeroDivisionError("a mistake in somebody's layer")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self.kind == "hang" and trainer.global_rank == self.rank:
            time.sleep(3600)


class Digests(AfterStep):
    """Writes a hash of all that this rank holds to `digest-rank-R.jsonl` after every step, taken or not."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        average = next(callback for callback in trainer.callbacks if isinstance(callback, EMA))  # type: ignore[attr-defined]
        held = {
            "state": _digest(_tensors(trainer, pl_module)),
            "average": _digest(average.average.values()),
            "updates": average.updates,
        }
        with Path(trainer.default_root_dir, f"digest-rank-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": self._step, **held}) + "\n")

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do nothing: on_train_batch_end acts after steps that were left out, too."""


def _tensors(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterable[Tensor]:
    local = sharding_of(trainer.strategy).local_weights
    if not local.sharded:
        states = trainer.optimizers[0].state.values()
        return [*pl_module.state_dict().values(), *(value for state in states for value in state.values())]
    parts = [part for lot in saved_lots(local, pl_module) for part in stretches(lot, trainer.optimizers[0])]
    scalars = [torch.tensor(value) for part in parts for value in part.scalars.values()]
    weights = [getattr(parameter, "ds_tensor", parameter).data for parameter in pl_module.parameters()]
    return [*(value for part in parts for value in part.tensors.values()), *scalars, *weights]


def _digest(tensors: Iterable[Tensor]) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
