"""Images that a diffusion model draws while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torchvision.utils import make_grid

from mhla_lightning.callbacks.draw_samples import DrawSamples
from mhla_lightning.callbacks.draw_samples import due_steps as grid_steps
from mhla_lightning.diffusion import Process, default_sampler
from mhla_lightning.errors import UserError
from mhla_lightning.runs.pictures import show_image

__all__ = ["TAG", "SampleGrids", "grid_steps"]

TAG = "samples"


class SampleGrids(DrawSamples):
    """Draws images from the same noise several times while an image diffusion model trains.

    They are the image `samples` in every logger that can show it: a column per class, with different noise in
    every row. The averaged weights are used where the run has callbacks.EMA. Training is not changed by it.

    Args:
        grids: number of drawings, at steps that grow by the same factor from `first` to the end of the run.
        first: optimizer step of the first drawing.
        classes: labels, one per column; None takes the first eight.
        per_class: rows.
        sampler: see diffusion.SAMPLERS; None takes ddpm, for flow matching euler.
        steps: evaluations of the sampler.
        guidance: scale of classifier-free guidance; 1 is without.
        seed: of the noise.

    Raises:
        UserError: counts below 1. At the start of training: a sampler that does not fit the model's process,
            or an unknown class.
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
        super().__init__(
            {"grids": grids, "first": first, "per_class": per_class, "steps": steps},
            grids,
            sampler,
            guidance,
            seed,
        )
        self.classes, self.per_class = classes, per_class

    def usual_sampler(self, process: Process) -> str:
        return default_sampler(process)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        classes = cast(Any, pl_module).num_classes
        self._labels = self.classes if self.classes is not None else list(range(min(8, classes)))
        unknown = [label for label in self._labels if not 0 <= label < classes]
        if unknown:
            raise UserError(
                "SampleGrids.classes", f"{unknown[0]} is no class of the model; it has 0 to {classes - 1}"
            )

    def draw(self, trainer: pl.Trainer, task: Any) -> Tensor:
        """Return images uint8 (rows * columns, H, W, 3), row by row."""
        labels = torch.tensor(self._labels * self.per_class)
        drawn = self.samples(
            task, labels, task.null_label, task.sample_shape, [("grid", row) for row in range(len(labels))]
        )
        return cast(Any, trainer).datamodule.to_images(drawn)

    def show(self, loggers: Sequence[Logger], step: int, drawn: Tensor) -> None:
        grid = make_grid(drawn.permute(0, 3, 1, 2), nrow=len(self._labels), padding=1)
        show_image(loggers, TAG, grid.permute(1, 2, 0).cpu().numpy(), step)
