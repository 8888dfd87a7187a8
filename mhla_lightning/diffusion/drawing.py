"""Samples of a diffusion model, each from its own noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mhla_lightning.diffusion.guidance import Guidance, guided
from mhla_lightning.diffusion.samplers import sample
from mhla_lightning.randomness import generator

Key = tuple[int | str, ...]


class SamplerSettings(Protocol):
    """How samples are drawn: see diffusion.SAMPLERS and diffusion.Guidance."""

    @property
    def sampler(self) -> str: ...

    @property
    def steps(self) -> int: ...

    @property
    def guidance(self) -> Guidance: ...


@torch.no_grad()
def draw_samples(
    task: Any,
    condition: Tensor,
    null: int | Tensor,
    shape: Sequence[int],
    keys: Sequence[Key],
    settings: SamplerSettings,
) -> Tensor:
    """Draw one sample for each key, float32 (B, *shape) on the task's device.

    No random generator of the process is used.

    Args:
        task: tasks.diffusion.DiffusionTask with its weights.
        condition: condition of every sample, (B, ...).
        null: the empty condition of one sample, for guidance.
        shape: of one sample.
        keys: random key of each sample; its noise depends on nothing else.
        settings: sampler, steps and guidance.
    """

    def normal(*more: int | str) -> Tensor:
        rows = [generator(*key, *more).standard_normal(tuple(shape), np.float32) for key in keys]
        return torch.from_numpy(np.stack(rows)).to(task.device)

    denoise = guided(
        task,
        condition.to(task.device),
        null.to(task.device) if isinstance(null, Tensor) else null,
        settings.guidance,
    )
    return sample(
        denoise,
        task.process,
        sampler=settings.sampler,
        steps=settings.steps,
        noise=normal(),
        step_noise=lambda step: normal("step", step),
    )
