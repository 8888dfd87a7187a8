"""The base of the callbacks that draw samples while a diffusion model trains."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import Logger
from torch import Tensor

from mhla_lightning.callbacks.ema import EMA
from mhla_lightning.callbacks.steps import AfterStep
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.diffusion import Guidance, Process, check_sampler
from mhla_lightning.diffusion.drawing import Key, draw_samples
from mhla_lightning.errors import UserError
from mhla_lightning.runs.pictures import showing
from mhla_lightning.strategies.sharding import sharding_of
from mhla_lightning.tasks.trainers import run_length


@dataclass(frozen=True)
class DrawingSettings:
    """Settings of a sampler.

    Attributes:
        sampler: see diffusion.SAMPLERS.
        steps: evaluations of the sampler.
        guidance: of the condition.
    """

    sampler: str
    steps: int
    guidance: Guidance


class DrawSamples(AfterStep):
    """Draws samples from the same noise several times while a diffusion model trains.

    The averaged weights are used where the run has callbacks.EMA. All ranks draw, because a sharded model
    needs them. No random generator of the process is used, so training is not changed by it.

    Args:
        counts: numbers by argument, each at least 1; `first` and `steps` among them.
        times: number of drawings, at steps that grow by the same factor from `first` to the end of the run.
        sampler: see diffusion.SAMPLERS; None takes :meth:`usual_sampler`.
        guidance: scale of classifier-free guidance; 1 is without.
        seed: of the noise.

    Raises:
        UserError: counts below 1.
    """

    def __init__(
        self, counts: dict[str, int], times: int, sampler: str | None, guidance: float, seed: int
    ) -> None:
        super().__init__()
        for name, value in counts.items():
            if value < 1:
                raise UserError(name, f"{value} is below 1, the least that {type(self).__name__} takes")
        self.first, self.steps, self.times = counts["first"], counts["steps"], times
        self.sampler, self.guidance, self.seed = sampler, Guidance(guidance), seed

    @abstractmethod
    def usual_sampler(self, process: Process) -> str:
        """Return the sampler of a process where none is named."""

    @abstractmethod
    def draw(self, trainer: pl.Trainer, task: Any) -> Any:
        """Return the drawing for :meth:`show`.

        Called on every rank, in eval mode, with the averaged weights.
        """

    @abstractmethod
    def show(self, loggers: Sequence[Logger], step: int, drawn: Any) -> None:
        """Show a drawing in loggers, see runs.pictures; called on one rank."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        last, data = run_length(trainer), cast(Any, trainer).datamodule
        if not last:
            raise UserError("trainer.max_steps", f"{type(self).__name__} draws up to the end: set max_steps")
        if not isinstance(data, ShardDataModule):
            raise UserError(
                "trainer.callbacks",
                f"{type(self).__name__} draws through a data module of ours; give `fit` a `datamodule`",
            )
        process = cast(Any, pl_module).process
        self._settings = DrawingSettings(
            self.sampler or self.usual_sampler(process), self.steps, self.guidance
        )
        check_sampler(self._settings.sampler, process, self.steps)
        self._due = due_steps(self.first, last, self.times)

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step not in self._due:
            return
        averages = [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, EMA)]
        training = pl_module.training
        pl_module.eval()
        try:
            with averages[0].averaged(trainer, pl_module) if averages else nullcontext():
                drawn = sharding_of(trainer.strategy).run_forward(lambda: self.draw(trainer, pl_module))
        finally:
            pl_module.train(training)
        if trainer.is_global_zero and (loggers := showing(trainer.loggers)):
            self.show(loggers, trainer.global_step, drawn)

    def samples(
        self, task: Any, condition: Tensor, null: int | Tensor, shape: Sequence[int], keys: Sequence[Key]
    ) -> Tensor:
        """Return samples (B, *shape); see diffusion.drawing.draw_samples."""
        return draw_samples(task, condition, null, shape, [(self.seed, *key) for key in keys], self._settings)


def due_steps(first: int, last: int, count: int) -> set[int]:
    """Return about `count` steps, evenly spaced in their logarithm, the last one included."""
    steps = np.geomspace(min(first, last), last, count).tolist() if count > 1 else [last]
    return {round(step) for step in steps}
