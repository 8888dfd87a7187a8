"""Flow matching on the straight line from data to noise.

arXiv 2210.02747, 2403.03206; SPEC 6.6. Time `t` is the share of noise, sigma: 0 is the data and 1 the noise;
the model time is 1000 t. The shift changes a time as soon as it is drawn; all other methods take the shifted
`t`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from mhla_lightning.diffusion.process import (
    MODEL_TIMES,
    Process,
    mean_of_sample,
    over_sample,
    precise,
    require_channels,
)
from mhla_lightning.errors import UserError, unknown_name

DRAWS = ("logit_normal", "uniform")
Number = TypeVar("Number", float, np.ndarray, Tensor)


@dataclass(frozen=True)
class FlowMatching(Process):
    """x_t = (1 - t) x0 + t noise; the network predicts the velocity, noise - x0.

    Args:
        times: distribution of training times: `logit_normal`, the sigmoid of a normal variable, or `uniform`.
        mean, std: of that normal variable.
        shift: moves times towards the noise, t -> shift t / (1 + (shift - 1) t); large samples need more
            (Wan: 3). 1 is none.
        integer_times: training times on the release's grid of 1000, where the model sees whole numbers. The
            release trained its video model so, yet sampled at fractional times (SPEC V12). Samplers ignore
            it.

    Raises:
        UserError: an unknown distribution, a shift or std that is not a positive number, a mean that is no
            number.
    """

    name = "flow"
    times: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    integer_times: bool = False

    def __post_init__(self) -> None:
        if self.times not in DRAWS:
            raise UserError("times", unknown_name("way to draw times", self.times, DRAWS))
        for option, value in (("mean", self.mean), ("std", self.std), ("shift", self.shift)):
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
                or (option != "mean" and value <= 0)
            ):
                kind = "number" if option == "mean" else "positive number"
                raise UserError(option, f"{value!r} does not fit; it must be a {kind}")
        if not isinstance(self.integer_times, bool):
            raise UserError("integer_times", f"{self.integer_times!r} does not fit; give true or false")

    @property
    def parts(self) -> tuple[str, ...]:
        return ()

    def out_channels(self, in_channels: int) -> int:
        return in_channels

    def shifted(self, t: Number) -> Number:
        """Return shift t / (1 + (shift - 1) t), of one time or of many."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def grid_time(self, index: int) -> float:
        """Return the shifted time of a point, 0 to 999, on the release's grid."""
        # The rounding of linspace decides floor(1000 t) at two points.
        return self.shifted(float((1 - np.linspace(1, 1 / MODEL_TIMES, MODEL_TIMES))[index]))

    def draw_time(self, rng: np.random.Generator) -> float:
        drawn = (
            rng.random() if self.times == "uniform" else 1 / (1 + math.exp(-rng.normal(self.mean, self.std)))
        )
        return (
            self.grid_time(min(int(MODEL_TIMES * drawn), MODEL_TIMES - 1))
            if self.integer_times
            else self.shifted(drawn)
        )

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        share = over_sample(t.to(x0.dtype), x0)
        return (1 - share) * x0 + share * noise

    def model_time(self, t: Tensor) -> Tensor:
        time = MODEL_TIMES * precise(t)
        return time.floor() if self.integer_times else time

    def bins(self, t: Tensor, count: int) -> Tensor:
        return (t * count).long().clamp(0, count - 1)

    def losses(
        self, prediction: Tensor, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """Return "loss", the MSE of the velocity."""
        require_channels(prediction, self.out_channels(x0.shape[1]))
        return {"loss": mean_of_sample((precise(prediction) - (precise(noise) - precise(x0))) ** 2)}
