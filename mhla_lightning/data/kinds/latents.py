"""Latents of a VAE, of images or of videos, with labels or text features.

A sample has KEY.latent.npy, and KEY.cls or KEY.text.npy (rows, channels), without padding. `mhla data
latents` can add KEY.logvar.npy of the posterior, whose mean KEY.latent.npy then is, and KEY.flipped.npy and
KEY.flipped_logvar.npy of the mirrored image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mhla_lightning.data.index import VAE, ShardIndex
from mhla_lightning.data.kinds.base import Kind, array_of, label_of
from mhla_lightning.data.members import RawSample
from mhla_lightning.data.skips import BadSample
from mhla_lightning.errors import DataError
from mhla_lightning.randomness import generator

LATENT, FLIPPED = "latent", "flipped"
LOGVAR = {LATENT: "logvar", FLIPPED: "flipped_logvar"}
LOGVAR_RANGE = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution


@dataclass
class Latents(Kind):
    """Latents as float32 (C, h, w) or (C, t, h, w), shifted and scaled, and their condition.

    The condition is a label, int64 (), where there are classes. Else it is text, float32 (L, D), with zeros
    after the rows of the text.

    Args:
        vae: that made the latents, from their index.
        classes: number of classes; 0 when samples have text.
        text: (L, D), the most rows of a text and their channels; None takes any, for tools.
        video: whether the latents have a time axis.
        seed: of the flips and of the posterior's random numbers.
        wanted: VAE of the recipe; None accepts any.
    """

    vae: VAE
    classes: int = 0
    text: tuple[int, int] | None = None
    video: bool = False
    seed: int = 0
    wanted: VAE | None = None

    def inspect(self, sample: RawSample) -> dict[str, np.ndarray]:
        """Return all arrays as stored, by their key in the batch or the name of their member."""
        names = [name for name in (LATENT, FLIPPED) if name == LATENT or self.vae.flipped]
        names += [LOGVAR[name] for name in names if self.vae.moments]
        return {name: self._array(sample, name) for name in names} | self._condition(sample)

    def train(self, sample: RawSample, epoch: int) -> dict[str, Tensor]:
        """Draw a latent from the posterior of the image or, half of the time, of its mirror image.

        Random numbers depend on (seed, epoch, index). SPEC D10.
        """
        rng = generator(self.seed, "latent", epoch, sample["__index__"])
        name = FLIPPED if rng.random() < 0.5 and self.vae.flipped else LATENT
        latent = self._array(sample, name).astype(np.float32)
        if self.vae.moments:
            latent = draw(latent, self._array(sample, LOGVAR[name]), rng)
        return self._tensors(latent, sample)

    def evaluate(self, sample: RawSample) -> dict[str, Tensor]:
        """Return the latent of the image itself, the mean of a posterior, and the condition."""
        return self._tensors(self._array(sample, LATENT).astype(np.float32), sample)

    def padding(self) -> dict[str, Tensor]:
        """Return zeros."""
        condition = {"label": torch.tensor(0)} if self.classes else {"text": torch.zeros(self.text or (1, 1))}
        return {"latent": torch.zeros(self.vae.shape)} | condition

    def check(self, index: ShardIndex, address: str) -> None:
        """Refuse latents of another VAE than the recipe's, and images where videos are needed."""
        wanted = "video_latents" if self.video else "latents"
        if index.kind != wanted or index.vae is None:
            raise DataError(address, f"it holds {index.kind}; {wanted} are needed")
        if self.wanted is not None and not self.wanted.fits(index.vae):
            raise DataError(
                address,
                f"{index.vae} made it, and the VAE of the recipe is {self.wanted}: make the latents again "
                f"with that VAE{_moved(self.wanted, index.vae)}",
            )

    def _array(self, sample: RawSample, name: str) -> np.ndarray:
        array = array_of(sample, f"{name}.npy")
        if array.shape != self.vae.shape or array.dtype.kind != "f":
            raise BadSample(
                f"{name}.npy is {array.dtype} {array.shape}; in the index it is floats {self.vae.shape}"
            )
        if not np.isfinite(array).all():
            raise BadSample(f"{name}.npy holds NaN or infinite values")
        return array

    def _condition(self, sample: RawSample) -> dict[str, np.ndarray]:
        if self.classes:
            return {"label": np.array(label_of(sample, self.classes))}
        text = array_of(sample, "text.npy")
        rows, channels = self.text or (None, None)
        fits = text.ndim == 2 and (rows is None or len(text) <= rows) and channels in (None, text.shape[1])
        if not fits or text.dtype.kind != "f" or not np.isfinite(text).all():
            wanted = f"({rows} or fewer, {channels})" if self.text else "(tokens, channels)"
            raise BadSample(f"text.npy is {text.dtype} {text.shape}; finite floats {wanted} are needed")
        return {"text": text}

    def _tensors(self, latent: np.ndarray, sample: RawSample) -> dict[str, Tensor]:
        """Return the tensors of a sample, from a float32 latent as the VAE made it."""
        condition = {
            key: torch.tensor(array) if key == "label" else self._padded(array)
            for key, array in self._condition(sample).items()
        }
        return {"latent": (torch.from_numpy(latent) - self.vae.shift) * self.vae.scale} | condition

    def _padded(self, text: np.ndarray) -> Tensor:
        """Pad text features with zeros, which cross-attention sees. SPEC 6.2."""
        padded = torch.zeros(self.text or text.shape)
        padded[: len(text)] = torch.from_numpy(text.astype(np.float32))
        return padded


def _moved(wanted: VAE, found: VAE) -> str:
    """Return the way out where the VAE may only have another place."""
    if wanted.name == found.name or wanted.sha256 is not None or found.sha256 is None:
        return ""
    return f", or set `data.vae.sha256` to {found.sha256} where it is the same VAE at another place"


def draw(mean: np.ndarray, logvar: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw from the Gaussian of these moments, float32 like `mean`."""
    std = np.exp(0.5 * np.clip(logvar.astype(np.float32), *LOGVAR_RANGE))
    return mean + std * rng.standard_normal(mean.shape, np.float32)
