"""Latents of a VAE, of images or of videos: KEY.latent.npy, and KEY.cls or KEY.text.npy."""

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


@dataclass
class Latents(Kind):
    """Latents as float32 (C, h, w) or (C, t, h, w), shifted and scaled; labels as int64 () where there are classes, else text as float32 (L, D).

    Args:
        vae: what the latents were made by.
        classes: number of classes; 0 when samples come with text.
        text: (tokens, channels) of the text features; None takes any, which only tools can use.
        video: whether the latents have a time axis.
    """

    vae: VAE
    classes: int = 0
    text: tuple[int, int] | None = None
    video: bool = False

    def inspect(self, sample: RawSample) -> dict[str, np.ndarray]:
        """Arrays by their key in the batch, as stored."""
        latent = array_of(sample, "latent.npy")
        if latent.shape != self.vae.shape or latent.dtype.kind != "f":
            raise BadSample(f"latent.npy is {latent.dtype} {latent.shape}; the index says floats {self.vae.shape}")
        if not np.isfinite(latent).all():
            raise BadSample("latent.npy holds NaN or infinite values")
        if self.classes:
            return {"latent": latent, "label": np.array(label_of(sample, self.classes))}
        text = array_of(sample, "text.npy")
        if text.ndim != 2 or text.dtype.kind != "f" or text.shape != (self.text or text.shape) or not np.isfinite(text).all():
            raise BadSample(f"text.npy is {text.dtype} {text.shape}; finite floats {self.text or '(tokens, channels)'} are needed")
        return {"latent": latent, "text": text}

    def train(self, sample: RawSample, epoch: int) -> dict[str, Tensor]:
        """Without augmentation."""
        return self.evaluate(sample)

    def evaluate(self, sample: RawSample) -> dict[str, Tensor]:
        """(z - shift) * scale, and the condition."""
        tensors = {key: torch.tensor(array if key == "label" else array.astype(np.float32)) for key, array in self.inspect(sample).items()}
        return tensors | {"latent": (tensors["latent"] - self.vae.shift) * self.vae.scale}

    def padding(self) -> dict[str, Tensor]:
        """Zeros."""
        condition = {"label": torch.tensor(0)} if self.classes else {"text": torch.zeros(self.text or (1, 1))}
        return {"latent": torch.zeros(self.vae.shape)} | condition

    def check(self, index: ShardIndex, address: str) -> None:
        """Refuse latents of another VAE, and images where videos are needed."""
        wanted = "video_latents" if self.video else "latents"
        if index.kind != wanted:
            raise DataError(f"{address} holds {index.kind}; {wanted} are needed")
        if index.vae != self.vae:
            raise DataError(f"{address} was made by {index.vae}, and the recipe says {self.vae}: make the latents again with that VAE")
