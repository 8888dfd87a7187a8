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
from mhla_lightning.diffusion.drawing import Key
from mhla_lightning.errors import UserError
from mhla_lightning.runs.pictures import show_image
from mhla_lightning.tasks import ImageDiffusionTask, TextToImageTask

__all__ = ["TAG", "SampleGrids", "grid_steps"]

TAG = "samples"


class SampleGrids(DrawSamples):
    """Draws images from the same noise several times while an image diffusion model trains.

    They are the image `samples` in every logger that can show it: a column per class or prompt, with
    different noise in every row. The averaged weights are used where the run has callbacks.EMA. Training is
    not changed by it.

    Args:
        grids: number of drawings, at steps that grow by the same factor from `first` to the end of the run.
        first: optimizer step of the first drawing.
        classes: labels, one per column, of a model of classes; None takes the first eight.
        per_class: rows.
        sampler: see diffusion.SAMPLERS; None takes ddpm, for flow matching euler.
        steps: evaluations of the sampler.
        guidance: scale of classifier-free guidance; 1 is without.
        seed: of the noise.
        prompts: texts, one per column, of a text-to-image model; None is the empty prompt.

    Raises:
        UserError: counts below 1, or no prompt. At the start of training: a sampler that does not fit the
            model's process, an unknown class, or a prompt that is too long. Also classes of a text-to-image
            model, and the other way round.
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
        prompts: list[str] | None = None,
    ) -> None:
        super().__init__(
            {"grids": grids, "first": first, "per_class": per_class, "steps": steps},
            grids,
            sampler,
            guidance,
            seed,
        )
        if prompts is not None and not prompts:
            raise UserError("prompts", "the list is empty; name at least one, or leave it out")
        self.classes, self.per_class, self.prompts = classes, per_class, prompts

    def usual_sampler(self, process: Process) -> str:
        return default_sampler(process)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._null: int | Tensor
        if isinstance(pl_module, TextToImageTask):
            columns, self._null = self._texts(cast(Any, trainer).datamodule)
        elif isinstance(pl_module, ImageDiffusionTask):
            columns, self._null = self._labels(pl_module.num_classes), pl_module.null_label
        else:
            raise UserError(
                "trainer.callbacks",
                f"SampleGrids draws images, and {type(pl_module).__name__} learns none; leave it out",
            )
        self._columns = len(columns)
        self._conditions = torch.cat([columns] * self.per_class)

    def _labels(self, classes: int) -> Tensor:
        """Return the labels of the columns, int64 (columns,)."""
        if self.prompts is not None:
            raise UserError(
                "SampleGrids.prompts", "the model draws classes and reads no text; name `classes` instead"
            )
        labels = self.classes if self.classes is not None else list(range(min(8, classes)))
        unknown = [label for label in labels if not 0 <= label < classes]
        if unknown:
            raise UserError(
                "SampleGrids.classes", f"{unknown[0]} is no class of the model; it has 0 to {classes - 1}"
            )
        return torch.tensor(labels)

    def _texts(self, data: Any) -> tuple[Tensor, Tensor]:
        """Return features of the columns (columns, tokens, channels), and of the empty prompt."""
        if self.classes is not None:
            raise UserError(
                "SampleGrids.classes", "the model reads a text and knows no classes; name `prompts` instead"
            )
        try:
            encoded: Tensor = data.encode_text([*(self.prompts or [""]), ""])
        except UserError as error:
            raise UserError("SampleGrids.prompts", error.reason) from error
        return encoded[:-1], encoded[-1]

    def draw(self, trainer: pl.Trainer, task: Any) -> Tensor:
        """Return images uint8 (rows * columns, H, W, 3), row by row."""
        keys: list[Key] = [("grid", number) for number in range(len(self._conditions))]
        drawn = self.samples(task, self._conditions, self._null, task.sample_shape, keys)
        return cast(Any, trainer).datamodule.to_images(drawn)

    def show(self, loggers: Sequence[Logger], step: int, drawn: Tensor) -> None:
        grid = make_grid(drawn.permute(0, 3, 1, 2), nrow=self._columns, padding=1)
        show_image(loggers, TAG, grid.permute(1, 2, 0).cpu().numpy(), step)
