"""The base of noise processes: adding noise to a sample, and learning from the result.

Imports torch and numpy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

MODEL_TIMES = 1000
"""The model time of pure noise."""


class Process(ABC):
    """A noise process.

    There are two clocks. A process counts time `t` in its own units, and time 0 is the data. :class:`DDPM`
    has steps 0 to 999, :class:`FlowMatching` the share of noise, 0 to 1. A backbone only ever sees the model
    time, :meth:`model_time`. It runs from 0 (data) to 1000 (noise) for every process, so that one time
    embedding serves both. Samplers pass model times to the network, and a guidance interval is a part of that
    axis.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """The names that :meth:`losses` gives beside "loss"."""

    @abstractmethod
    def out_channels(self, in_channels: int) -> int:
        """Return the channels that the network must predict for samples of `in_channels`."""

    @abstractmethod
    def draw_time(self, rng: np.random.Generator) -> float:
        """Return the time of one training sample."""

    @abstractmethod
    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the noisy sample x_t.

        Args:
            x0, noise: (B, C, ...).
            t: (B,).
        """

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """Return the times (B,) that the network gets for `t` (B,)."""

    @abstractmethod
    def losses(
        self, prediction: Tensor, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """Return losses (B,) by name, "loss" and its parts, in float32.

        Args:
            prediction: (B, out_channels, ...).
            x0, noise, x_t: (B, C, ...).
            t: (B,).
        """

    @abstractmethod
    def bins(self, t: Tensor, count: int) -> Tensor:
        """Return the part of the time axis that holds each time, int64 (B,).

        Args:
            t: (B,).
            count: number of equal parts; part 0 has the least noise.
        """


def precise(x: Tensor) -> Tensor:
    """Return `x` in float32, or in float64 where it is that already.

    Losses and steps are never computed in half precision.
    """
    return x if x.dtype == torch.float64 else x.float()


def over_sample(values: Tensor, x: Tensor) -> Tensor:
    """Return values (B,) in a shape that multiplies `x` (B, C, ...)."""
    return values.view(-1, *(1,) * (x.ndim - 1))


def mean_of_sample(x: Tensor) -> Tensor:
    """Return the mean of every sample: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def require_channels(prediction: Tensor, expected: int) -> None:
    """Refuse a prediction of another width.

    Raises:
        ValueError: the network does not predict `expected` channels.
    """
    if prediction.shape[1] != expected:
        raise ValueError(
            f"the network predicts {prediction.shape[1]} channels and the noise process needs "
            f"{expected} (Process.out_channels)"
        )
