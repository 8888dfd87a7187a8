"""Clips that a video diffusion model draws while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import Logger
from torch import Tensor

from mhla_lightning.callbacks.draw_samples import DrawSamples
from mhla_lightning.diffusion import Process
from mhla_lightning.errors import UserError
from mhla_lightning.inference.diffusion.video_files import (
    animated_gif,
    at_a_glance,
    thumbnails,
    video_sheet,
)
from mhla_lightning.inference.diffusion.videos import video_sampler
from mhla_lightning.runs.pictures import show_gif, show_image

SHEET, MOVING = "samples/sheet", "samples/clips"


class SampleClips(DrawSamples):
    """Draws clips from the same noise several times while a video diffusion model trains.

    They are two images in every logger that can show them. `samples/sheet` is a contact sheet: a row per
    clip, with its frames over time. `samples/clips` is an animated GIF of all clips side by side, in the
    order of the rows. The add_video of torch writes such an image too, but needs moviepy. The frames are
    about 160 pixels wide.

    The averaged weights are used where the run has callbacks.EMA. One clip is drawn at a time. Training is
    not changed by it.

    Args:
        sheets: number of drawings, at steps that grow by the same factor from `first` to the end of the run.
        first: optimizer step of the first drawing.
        prompts: texts, one row each; None is the empty prompt.
        per_prompt: clips of every prompt, from different noise.
        sampler: see diffusion.SAMPLERS; None takes dpm++ for flow matching.
        steps: evaluations of the sampler.
        guidance: scale of classifier-free guidance; 1 is without.
        seed: of the noise.

    Raises:
        UserError: counts below 1, or no prompt. At the start of training: a sampler that does not fit the
            model's process, or a prompt that is too long.
    """

    def __init__(
        self,
        sheets: int = 8,
        first: int = 100,
        prompts: list[str] | None = None,
        per_prompt: int = 1,
        sampler: str | None = None,
        steps: int = 25,
        guidance: float = 3.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            {"sheets": sheets, "first": first, "per_prompt": per_prompt, "steps": steps},
            sheets,
            sampler,
            guidance,
            seed,
        )
        if prompts is not None and not prompts:
            raise UserError(
                "prompts", "the list is empty; name at least one, or leave it out for the empty prompt"
            )
        self.prompts, self.per_prompt = prompts or [""], per_prompt

    def usual_sampler(self, process: Process) -> str:
        return video_sampler(process)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        data = cast(Any, trainer).datamodule
        self._rows = [prompt for prompt in self.prompts for _ in range(self.per_prompt)]
        try:
            encoded: Tensor = data.encode_text([*self._rows, ""])
        except UserError as error:
            raise UserError("prompts", error.reason) from error
        self._texts, self._null = encoded[:-1], encoded[-1]
        self._rate = float(data.frame_rate)

    def draw(self, trainer: pl.Trainer, task: Any) -> list[np.ndarray]:
        """Return clips, each uint8 (F, H, W, 3)."""
        data, clips = cast(Any, trainer).datamodule, []
        for row, text in enumerate(self._texts):
            drawn = self.samples(task, text[None], self._null, task.sample_shape, [("clip", row)])
            clips.append(data.to_videos(drawn)[0].cpu().numpy())
        return clips

    def show(self, loggers: Sequence[Logger], step: int, drawn: list[np.ndarray]) -> None:
        sheet = np.asarray(video_sheet([thumbnails(clip) for clip in drawn], self._rows))
        show_image(loggers, SHEET, sheet, step)
        moving = np.concatenate([at_a_glance(clip) for clip in drawn], axis=2)
        show_gif(loggers, MOVING, animated_gif(moving, self._rate), moving.shape[1:3], step)
