"""The chain of a discrete diffusion process and the steps back along it.

arXiv 2006.11239, 2102.09672; SPEC 4.3. `t` is the index of a step on the chain, int64 (B,): 0 is the first,
least noisy one. On a shortened chain the network gets `timestep_map[t]`, the same step's index on the chain
of 1000 that it was trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from mhla_lightning.diffusion.process import over_sample, precise
from mhla_lightning.errors import UserError

STEPS = 1000


def linear_betas() -> np.ndarray:
    """Return the noise variances of the 1000 training steps: 1e-4 to 0.02, float64."""
    return np.linspace(1e-4, 0.02, STEPS, dtype=np.float64)


def respaced(respacing: str | int) -> tuple[np.ndarray, np.ndarray]:
    """Return a short chain through some of the 1000 steps.

    Args:
        respacing: "N" or N: N steps evenly spread from the first to the last, at round(i * 999 / (N - 1)).
            The published FIDs use 250. One step is the last, because sampling begins in pure noise.
            "ddimN": every k-th step from the first on, as in the DDIM paper (arXiv 2010.02502); its last step
            is k before the end.

    Returns:
        timestep_map: int64 (N,), the steps' indices on the chain of 1000, ascending.
        betas: float64 (N,), 1 - abar_i / abar_{i-1} over the kept steps.

    Raises:
        UserError: no such form, N outside 1 to 1000, or an N that no stride of "ddimN" gives.
    """
    kept = np.asarray(
        _strided(str(respacing)) if str(respacing).startswith("ddim") else _even(respacing), dtype=np.int64
    )
    levels = np.cumprod(1 - linear_betas())[kept]
    return kept, 1 - levels / np.append(1.0, levels[:-1])


def _count(text: str, given: str | int) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= STEPS:
        raise UserError(
            "respacing",
            f"'{given}' is neither a number of steps from 1 to {STEPS} nor 'ddim' followed by one",
        )
    return int(text)


def _even(given: str | int) -> list[int]:
    count = _count(str(given), given)
    if count == 1:
        return [STEPS - 1]
    stride = (STEPS - 1) / (count - 1)
    # Summed up as in the official code: there a sum may fall just short of 499.5 and round down.
    return [round(position) for position in accumulate([stride] * (count - 1), initial=0.0)]


def _strided(given: str) -> range:
    count = _count(given.removeprefix("ddim"), given)
    steps = range(0, STEPS, -(-STEPS // count))
    if len(steps) != count:
        raise UserError(
            "respacing",
            f"'{given}': no stride over {STEPS} steps keeps {count} of them; the nearest below is "
            f"'ddim{len(steps)}'",
        )
    return steps


@dataclass(frozen=True)
class Reverse:
    """The network's p(x_{t-1} | x_t); all tensors are (B, C, ...).

    Attributes:
        mean, log_variance: of the distribution.
        x0: the estimate of the clean sample behind the mean.
    """

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


class Chain:
    """Tables of a noise chain in float64, and its formulas.

    Tables enter a formula in float32, as in the official code.

    `prediction` is the noise epsilon (B, C, ...), or epsilon and variance channels v side by side
    (B, 2C, ...). Without v the variance is the posterior variance. With v, and f = (v + 1) / 2:

        log variance = f log(beta) + (1 - f) log(posterior variance)

    Args:
        betas: float64 (steps,).
    """

    def __init__(self, betas: np.ndarray) -> None:
        self.betas = np.asarray(betas, dtype=np.float64)
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        before = np.append(1.0, self.alphas_cumprod[:-1])
        variance = self.betas * (1 - before) / (1 - self.alphas_cumprod)
        # The variance of the first step is 0 and takes the second's value. A chain of one step has no second,
        # and never uses the value.
        self.posterior_log_variance_clipped = np.log(
            np.append(variance[1], variance[1:]) if len(variance) > 1 else self.betas
        )
        self._tables = {
            "signal": np.sqrt(self.alphas_cumprod),
            "noise": np.sqrt(1 - self.alphas_cumprod),
            "signal_before": np.sqrt(before),
            "noise_before": np.sqrt(1 - before),
            "inverse_signal": np.sqrt(1 / self.alphas_cumprod),
            "noise_to_signal": np.sqrt(1 / self.alphas_cumprod - 1),
            "posterior_x0": self.betas * np.sqrt(before) / (1 - self.alphas_cumprod),
            "posterior_x_t": (1 - before) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod),
            "log_smallest": self.posterior_log_variance_clipped,
            "log_largest": np.log(self.betas),
        }
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.betas)

    def _at(self, table: str, t: Tensor, x: Tensor) -> Tensor:
        key = table, x.device
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(self._tables[table]).float().to(x.device)
        return over_sample(self._on_device[key][t], x)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return sqrt(abar) x0 + sqrt(1 - abar) noise."""
        return self._at("signal", t, x0) * x0 + self._at("noise", t, x0) * noise

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (B, C, ...) and log variance (B, 1, ...) of q(x_{t-1} | x_t, x0)."""
        mean = self._at("posterior_x0", t, x_t) * x0 + self._at("posterior_x_t", t, x_t) * x_t
        return mean, self._at("log_smallest", t, x_t)

    def p_mean_variance(
        self, prediction: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool = False
    ) -> Reverse:
        """Return the network's step back.

        Args:
            prediction: see the class.
            x_t: (B, C, ...).
            t: (B,).
            clip_denoised: clamp x0 to [-1, 1], which is wrong for latents.

        Raises:
            ValueError: the prediction has neither C nor 2C channels.
        """
        epsilon, variance = split(prediction, x_t)
        x0 = self._at("inverse_signal", t, x_t) * x_t - self._at("noise_to_signal", t, x_t) * epsilon
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        mean, smallest = self.posterior(x0, x_t, t)
        if variance is None:
            return Reverse(mean, smallest.expand_as(mean), x0)
        share = (variance + 1) / 2
        return Reverse(mean, share * self._at("log_largest", t, x_t) + (1 - share) * smallest, x0)

    def ancestral_step(self, prediction: Tensor, x_t: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
        """Return a sample of p(x_{t-1} | x_t).

        Args:
            prediction: see the class.
            x_t: (B, C, ...).
            t: (B,); 0 gives the mean.
            noise: standard normal (B, C, ...); None gives the mean.
        """
        step = self.p_mean_variance(prediction, x_t, t)
        if noise is None:
            return step.mean
        return (
            step.mean + over_sample((t != 0).to(x_t.dtype), x_t) * torch.exp(0.5 * step.log_variance) * noise
        )

    def ddim_step(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return x_{t-1} by the deterministic step of DDIM (eta 0).

        It follows from the x0 and the noise that the network sees in x_t.
        """
        epsilon, _ = split(prediction, x_t)
        x0 = self._at("inverse_signal", t, x_t) * x_t - self._at("noise_to_signal", t, x_t) * epsilon
        return self._at("signal_before", t, x_t) * x0 + self._at("noise_before", t, x_t) * epsilon

    def vlb_term(self, prediction: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return this step's term of the variational bound, in bits per value (B,).

        It is KL(q || p), and at t = 0 the negative log likelihood of x0.
        """
        step = self.p_mean_variance(prediction, x_t, t)
        mean, log_variance = self.posterior(x0, x_t, t)
        ratio = log_variance - step.log_variance
        divergence = 0.5 * (ratio.exp() - ratio - 1 + (mean - step.mean) ** 2 * torch.exp(-step.log_variance))
        likelihood = discretized_log_likelihood(x0, step.mean, 0.5 * step.log_variance)
        first = over_sample(t == 0, x0)
        return torch.where(first, -likelihood, divergence).flatten(1).mean(1) / math.log(2)


def split(prediction: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return noise and variance channels of a prediction; None for no variance channels.

    Args:
        prediction: (B, C or 2C, ...).
        x: the sample, (B, C, ...).

    Raises:
        ValueError: the prediction has neither C nor 2C channels.
    """
    channels = x.shape[1]
    if prediction.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"the network predicts {prediction.shape[1]} channels for a sample of {channels}; "
            f"{channels} or {2 * channels} are possible"
        )
    prediction = precise(prediction)
    return prediction[:, :channels], prediction[:, channels:] if prediction.shape[1] > channels else None


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log probability (nats) of the bin of width 2/255 around `x` under a Gaussian.

    The outer bins of [-1, 1] reach to infinity. The normal distribution function is the tanh approximation of
    the official code.
    """
    centred, sharpness = x - mean, torch.exp(-log_scale)
    upper = _normal_cdf(sharpness * (centred + 1 / 255))
    lower = _normal_cdf(sharpness * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return torch.log(probability.clamp(min=1e-12))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
