"""Denoising diffusion with a learned variance, the process of DiT.

arXiv 2212.09748; SPEC 4.3. Time `t` is the index of one of 1000 steps, 0 (least noise) to 999; it is at once
the model time. Times may come as whole floats.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mhla_lightning.diffusion.chain import STEPS, Chain, respaced, split
from mhla_lightning.diffusion.process import Process, mean_of_sample, precise, require_channels
from mhla_lightning.errors import UserError


@dataclass(frozen=True)
class DDPM(Process):
    """1000 steps with linear betas; the network predicts the noise.

    Args:
        learn_variance: the network also predicts the variance of each step back: twice the channels, and the
            variational bound in the loss. Without it the variance is the posterior's and the loss is the MSE.

    Raises:
        UserError: learn_variance is not true or false.
    """

    name = "ddpm"
    learn_variance: bool = True
    chain: Chain = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.learn_variance, bool):
            raise UserError("learn_variance", f"{self.learn_variance!r} does not fit; give true or false")
        # Respacing to all steps gives the betas of the official code, to the last bit.
        object.__setattr__(self, "chain", Chain(respaced(STEPS)[1]))

    @property
    def parts(self) -> tuple[str, ...]:
        return ("mse", "vb") if self.learn_variance else ("mse",)

    def out_channels(self, in_channels: int) -> int:
        return 2 * in_channels if self.learn_variance else in_channels

    def draw_time(self, rng: np.random.Generator) -> float:
        return float(rng.integers(STEPS))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.chain.add_noise(x0, noise, t.long())

    def model_time(self, t: Tensor) -> Tensor:
        return t.long()

    def bins(self, t: Tensor, count: int) -> Tensor:
        return t.long() * count // STEPS

    def losses(
        self, prediction: Tensor, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """Return "mse" of the noise, "vb" in bits per value, and "loss", their sum.

        The bound trains the variance alone: the noise is detached in it.
        """
        require_channels(prediction, self.out_channels(x0.shape[1]))
        x0, noise, x_t, t = precise(x0), precise(noise), precise(x_t), t.long()
        epsilon, variance = split(prediction, x0)
        mse = mean_of_sample((noise - epsilon) ** 2)
        if variance is None:
            return {"loss": mse, "mse": mse}
        vb = self.chain.vlb_term(torch.cat([epsilon.detach(), variance], 1), x0, x_t, t)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def shortened(self, respacing: str | int) -> tuple[np.ndarray, Chain]:
        """Return timestep_map, int64 (N,), and the chain of :func:`respaced`."""
        timestep_map, betas = respaced(respacing)
        return timestep_map, Chain(betas)
