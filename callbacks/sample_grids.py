"""Pictures of what a diffusion model draws while it trains."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torchvision.utils import make_grid

from mhla_lightning.callbacks.ema import EMA
from mhla_lightning.callbacks.steps import AfterStep
from mhla_lightning.diffusion import Guidance, check_sampler, default_sampler, guided, sample
from mhla_lightning.errors import UserError
from mhla_lightning.keyed import generator

TAG = "samples"


class SampleGrids(AfterStep):
    """Draws the same noises again and again while an image diffusion model trains, as the image `samples` in TensorBoard.

    The averaged weights draw, where the run has callbacks.EMA. A column is a class, and rows are other noises. All ranks draw, since a sharded
    model needs them; no generator of the process is used, so that training goes on as if nothing had been drawn.

    Args:
        grids: how many, at steps that grow by the same factor from `first` to the end of the run.
        first: optimizer step of the first.
        classes: labels, one a column; None takes the first eight.
        per_class: rows.
        sampler, steps: see diffusion.SAMPLERS; None is ddpm, for flow matching euler.
        guidance: scale of classifier-free guidance; 1 is none.
        seed: of the noises.

    Raises:
        UserError: counts below 1; from the start of training, a sampler that does not serve the model's process, or an unknown class.
    """

    def __init__(
        self,
        grids: int = 8,
        first: int = 100,
        classes: list[int] | None = None,
        per_class: int = 4,
        sampler: str | None = None,
        steps: int = 50,
        guidance: float = 3.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("grids", grids), ("first", first), ("per_class", per_class), ("steps", steps)):
            if value < 1:
                raise UserError(f"SampleGrids.{name} is {value}; it must be at least 1")
        self.grids, self.first, self.classes, self.per_class = grids, first, classes, per_class
        self.sampler, self.steps, self.guidance, self.seed = sampler, steps, guidance, seed

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        task = cast(Any, pl_module)
        self._sampler = self.sampler or default_sampler(task.process)
        check_sampler(self._sampler, task.process, self.steps)
        self._labels = self.classes if self.classes is not None else list(range(min(8, task.num_classes)))
        unknown = [label for label in self._labels if not 0 <= label < task.num_classes]
        if unknown:
            raise UserError(f"SampleGrids.classes holds {unknown[0]}; the model's classes are 0 to {task.num_classes - 1}")
        self._due = grid_steps(self.first, trainer.max_steps, self.grids)

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step in self._due:
            self._draw(trainer, pl_module)

    @torch.no_grad()
    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        task = cast(Any, pl_module)
        averages = [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, EMA)]
        noise, labels = self._noises(task.sample_shape)
        labels = labels.to(task.device)
        denoise = guided(task, labels, task.null_label, Guidance(self.guidance))

        def step_noise(step: int) -> torch.Tensor:
            rows = [generator(self.seed, "grid-step", row, step).standard_normal(task.sample_shape, np.float32) for row in range(len(noise))]
            return torch.from_numpy(np.stack(rows)).to(task.device)

        training = task.training
        task.eval()
        try:
            with averages[0].averaged(task) if averages else nullcontext(), trainer.precision_plugin.val_step_context():
                drawn = sample(denoise, task.process, sampler=self._sampler, steps=self.steps, noise=noise.to(task.device), step_noise=step_noise)
        finally:
            task.train(training)
        if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
            pixels = cast(Any, trainer).datamodule.to_images(drawn).permute(0, 3, 1, 2)
            trainer.logger.experiment.add_image(TAG, make_grid(pixels, nrow=len(self._labels), padding=1), trainer.global_step)

    def _noises(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows * columns, C, H, W) and labels; row by row."""
        labels = torch.tensor(self._labels * self.per_class)
        drawn = [generator(self.seed, "grid", row).standard_normal(shape, np.float32) for row in range(len(labels))]
        return torch.from_numpy(np.stack(drawn)), labels


def grid_steps(first: int, last: int, count: int) -> set[int]:
    """About `count` steps, evenly spaced in their logarithm, the last one included."""
    steps = np.geomspace(min(first, last), last, count).tolist() if count > 1 else [last]
    return {round(step) for step in steps}
