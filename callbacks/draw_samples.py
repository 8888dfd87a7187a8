"""What the callbacks share that draw samples while a diffusion model trains."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from mhla_lightning.callbacks.ema import EMA
from mhla_lightning.callbacks.steps import AfterStep
from mhla_lightning.diffusion import Guidance, Process, check_sampler
from mhla_lightning.errors import UserError
from mhla_lightning.inference.diffusion.drawing import Key, draw_samples
from mhla_lightning.strategies.local import run_forward


@dataclass(frozen=True)
class How:
    """How samples are drawn."""

    sampler: str
    steps: int
    guidance: Guidance


class DrawSamples(AfterStep):
    """Draws the same noises again and again while a diffusion model trains.

    The averaged weights draw, where the run has callbacks.EMA. All ranks draw, since a sharded model needs
    them; no generator of the process is used, so that training goes on as if nothing had been drawn.

    Args:
        counts: numbers by argument, which must be at least 1; `first` and `steps` among them.
        times: how often, at steps that grow by the same factor from `first` to the end of the run.
        sampler: see diffusion.SAMPLERS; None is :meth:`usual_sampler`.
        guidance: scale of classifier-free guidance; 1 is none.
        seed: of the noises.

    Raises:
        UserError: counts below 1.
    """

    def __init__(
        self, counts: dict[str, int], times: int, sampler: str | None, guidance: float, seed: int
    ) -> None:
        super().__init__()
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"{type(self).__name__}.{name} is {value}; it must be at least 1")
        self.first, self.steps, self.times = counts["first"], counts["steps"], times
        self.sampler, self.guidance, self.seed = sampler, Guidance(guidance), seed

    @abstractmethod
    def usual_sampler(self, process: Process) -> str:
        """The sampler of a process where none is named."""

    @abstractmethod
    def draw(self, trainer: pl.Trainer, task: Any) -> Any:
        """What :meth:`show` takes; called on every rank, in eval mode, with the averaged weights."""

    @abstractmethod
    def show(self, logger: TensorBoardLogger, step: int, drawn: Any) -> None:
        """Puts what was drawn into TensorBoard; called on one rank."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        process = cast(Any, pl_module).process
        self._how = How(self.sampler or self.usual_sampler(process), self.steps, self.guidance)
        check_sampler(self._how.sampler, process, self.steps)
        self._due = due_steps(self.first, trainer.max_steps, self.times)

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step not in self._due:
            return
        averages = [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, EMA)]
        training = pl_module.training
        pl_module.eval()
        try:
            with averages[0].averaged(trainer, pl_module) if averages else nullcontext():
                drawn = run_forward(trainer, lambda: self.draw(trainer, pl_module))
        finally:
            pl_module.train(training)
        if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
            self.show(trainer.logger, trainer.global_step, drawn)

    def samples(
        self, task: Any, condition: Tensor, null: int | Tensor, shape: Sequence[int], keys: Sequence[Key]
    ) -> Tensor:
        """Samples (B, *shape), see generation.drawing.draw_samples."""
        return draw_samples(task, condition, null, shape, [(self.seed, *key) for key in keys], self._how)


def due_steps(first: int, last: int, count: int) -> set[int]:
    """About `count` steps, evenly spaced in their logarithm, the last one included."""
    steps = np.geomspace(min(first, last), last, count).tolist() if count > 1 else [last]
    return {round(step) for step in steps}
