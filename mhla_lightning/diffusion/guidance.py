"""Classifier-free guidance, optionally on a part of the time axis only.

arXiv 2207.12598, 2404.07724; SPEC 4.3, D8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mhla_lightning.diffusion.process import MODEL_TIMES, over_sample
from mhla_lightning.errors import UserError

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, ...), model time (B,)) -> prediction (B, out_channels, ...)."""


@dataclass(frozen=True)
class Guidance:
    """The distance by which a prediction exceeds the conditional one: u + scale (c - u).

    Args:
        scale: 1 is the plain conditional model, 0 the unconditional one.
        channels: guide only this many first channels: 3 is the original DiT's (SPEC D8). None guides all of
            the sample's.
        interval: from least to most noise, as parts of the time axis (model time / 1000), ends included;
            outside it the conditional model runs alone.

    Raises:
        UserError: a scale that is no number or negative, channels below 1, an interval outside [0, 1] or out
            of
            order.
    """

    scale: float = 1.0
    channels: int | None = None
    interval: Sequence[float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not _is_number(self.scale) or self.scale < 0:
            raise UserError(
                "scale", f"{self.scale!r} does not fit; give a number of at least 0 (1 is no guidance)"
            )
        if self.channels is not None and (
            isinstance(self.channels, bool) or not isinstance(self.channels, int) or self.channels < 1
        ):
            raise UserError(
                "channels",
                f"{self.channels!r} does not fit; give a whole number of at least 1, or null for all",
            )
        ends = self.interval
        valid = (
            isinstance(ends, Sequence)
            and len(ends) == 2
            and all(map(_is_number, ends))
            and 0 <= ends[0] < ends[1] <= 1
        )
        if not valid:
            raise UserError(
                "interval",
                f"{ends!r} does not fit; give two numbers from 0 (data) to 1 (noise), the smaller first",
            )


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    condition: Tensor,
    null: int | Tensor,
    guidance: Guidance,
) -> Denoiser:
    """Return the denoiser under these conditions.

    It takes one forward of 2B samples a step, or of B where nothing is guided. Channels beyond the sample's
    (a learned variance) are the conditional prediction's, unchanged.

    Args:
        model: (x, model time, condition) -> prediction.
        condition: labels (B,) or text features (B, L, D).
        null: the empty condition of one sample.
        guidance: scale, channels and interval.

    Raises:
        UserError: guidance.channels exceeds the sample's channels (at the first call).
    """
    nulls = torch.as_tensor(null).to(condition).expand_as(condition)
    everywhere = tuple(guidance.interval) == (0, 1)

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        channels = x.shape[1] if guidance.channels is None else guidance.channels
        if channels > x.shape[1]:
            raise UserError(
                "guidance.channels", f"{channels} channels are more than the {x.shape[1]} of a sample"
            )
        if guidance.scale == 1:
            return model(x, time, condition)
        within = None if everywhere else _within(time, guidance.interval)
        if within is not None and not within.any():
            return model(x, time, condition)
        both = model(torch.cat([x, x]), torch.cat([time, time]), torch.cat([condition, nulls]))
        conditional, unconditional = both.chunk(2)
        c, u = conditional[:, :channels], unconditional[:, :channels]
        further = u + guidance.scale * (c - u)
        if within is not None:
            further = torch.where(over_sample(within, x), further, c)
        return torch.cat([further, conditional[:, channels:]], 1)

    return denoise


def _within(time: Tensor, interval: Sequence[float]) -> Tensor:
    share = time.float() / MODEL_TIMES
    return (share >= interval[0]) & (share <= interval[1])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
