"""A training loop without Lightning that does the same to the model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from mhla_lightning.bench import source_clock as sources
from mhla_lightning.bench.source_clock import SourceClock
from mhla_lightning.callbacks import EMA
from mhla_lightning.data.stream import Batch
from mhla_lightning.strategies.norm import total_norm
from mhla_lightning.tasks import Task
from mhla_lightning.tasks.optimization import clip_by_norm
from mhla_lightning.tasks.projection import PROJECTION, mixing_matrices


class BareLoop:
    """Forward, backward, clipping, AdamW, schedule, projection and average, each timed.

    Nothing is logged, watched or saved.

    It clips by the norm that training clips by, which is not torch's own to the last bit: both must come to
    the same losses.

    Args:
        task: a copy of the model; it is trained.
        trainer: whose length, precision, clipping and data module count.
        device: of the model.

    Attributes:
        losses: of every micro batch.
        averages: one for each EMA of the recipe.
    """

    def __init__(self, task: Task, trainer: pl.Trainer, device: torch.device) -> None:
        self.task, self.clock, self.losses = task, SourceClock(), list[Tensor]()
        self.clock.device = device
        self._data = cast(Any, trainer).datamodule
        self._device, self._mixed = device, trainer.precision == "bf16-mixed"
        self._clip, self._by_value = (
            trainer.gradient_clip_val or 0.0,
            trainer.gradient_clip_algorithm == "value",
        )
        task.trainer = trainer
        built = cast(Any, task.configure_optimizers())
        task.trainer = None
        task.log = lambda *_, **__: None  # type: ignore[method-assign]  # nobody logs here
        self.optimizer, self._schedule = built["optimizer"], built["lr_scheduler"]["scheduler"]
        self._parameters = [
            parameter for group in self.optimizer.param_groups for parameter in group["params"]
        ]
        self._mixing = mixing_matrices(task)
        self.averages = [
            Average(task, callback) for callback in cast(Any, trainer).callbacks if isinstance(callback, EMA)
        ]
        self._rng = _rng_state(device)

    def step(self, batches: Sequence[Batch]) -> None:
        """Take one optimizer step over its micro batches.

        The random generators of the process keep their state.
        """
        others = _rng_state(self._device)
        _set_rng_state(self._device, self._rng)
        self.clock.resume()
        self._step(batches)
        self.clock.pause()
        self._rng = _rng_state(self._device)
        _set_rng_state(self._device, others)

    def _step(self, batches: Sequence[Batch]) -> None:
        timed = self.clock.profile
        for number, batch in enumerate(batches):
            with timed(sources.DATA):
                batch = self._data.transfer_batch_to_device(batch, self._device, 0)
            with timed(sources.FORWARD), self._autocast():
                loss = cast(Tensor, self.task.training_step(batch, number))
            if number == 0:
                with timed(sources.ZERO):
                    self.optimizer.zero_grad()
            with timed(sources.BACKWARD):
                (loss / len(batches)).backward()
            self.losses.append(loss.detach())
        with timed(sources.CLIP):
            self._clip_gradients()
        with timed(sources.ADAMW):
            self.optimizer.step()
        with timed(sources.SCHEDULE):
            self._schedule.step()
        with timed(PROJECTION):
            for matrix in self._mixing:
                matrix.project_()
        with timed(sources.AVERAGE):
            for average in self.averages:
                average.update()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16) if self._mixed else nullcontext()

    def _clip_gradients(self) -> None:
        if self._clip > 0 and self._by_value:
            torch.nn.utils.clip_grad_value_(self._parameters, self._clip)
        elif self._clip > 0:
            norm = total_norm([p.grad for p in self._parameters if p.grad is not None])
            clip_by_norm(self._parameters, self._clip, norm)


class Average:
    """The arithmetic of callbacks.EMA and nothing else.

    Args:
        task: whose backbone is averaged.
        like: whose decay counts.
    """

    def __init__(self, task: Task, like: EMA) -> None:
        state = cast(torch.nn.Module, task.backbone).state_dict(keep_vars=True)
        self.weights = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        self.average = {name: tensor.detach().float().clone() for name, tensor in self.weights.items()}
        self._ema = EMA(like.decay, like.warmup)

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        self._ema.updates += 1
        self._ema.update(list(self.average.values()), list(self.weights.values()))


def _rng_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_rng_state(device: torch.device, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
