"""Samples of a diffusion task, each from noise of its own: for images and videos, after training and
during it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mhla_lightning.diffusion import Guidance, guided, sample
from mhla_lightning.randomness import generator

Key = tuple[int | str, ...]


class How(Protocol):
    """How samples are drawn: see diffusion.SAMPLERS and diffusion.Guidance."""

    @property
    def sampler(self) -> str: ...

    @property
    def steps(self) -> int: ...

    @property
    def guidance(self) -> Guidance: ...


@torch.no_grad()
def draw_samples(
    task: Any, condition: Tensor, null: int | Tensor, shape: Sequence[int], keys: Sequence[Key], how: How
) -> Tensor:
    """Samples float32 (B, *shape) on the task's device; no generator of the process is used.

    Args:
        task: tasks.diffusion.DiffusionTask with its weights.
        condition: what the task is told of every sample, (B, ...).
        null: the condition that says nothing, of one sample.
        shape: of a sample.
        keys: what the noise of every sample depends on; not on what else is drawn.
    """

    def normal(*more: int | str) -> Tensor:
        rows = [generator(*key, *more).standard_normal(tuple(shape), np.float32) for key in keys]
        return torch.from_numpy(np.stack(rows)).to(task.device)

    denoise = guided(
        task,
        condition.to(task.device),
        null.to(task.device) if isinstance(null, Tensor) else null,
        how.guidance,
    )
    return sample(
        denoise,
        task.process,
        sampler=how.sampler,
        steps=how.steps,
        noise=normal(),
        step_noise=lambda step: normal("step", step),
    )
