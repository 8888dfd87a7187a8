"""The LightningDataModule of VAE latents, of images or of videos."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhla_lightning.data.check import Verify
from mhla_lightning.data.corpus import Source
from mhla_lightning.data.index import INDEX_NAME, SPLITS, VAE, ShardIndex
from mhla_lightning.data.kinds import Latents
from mhla_lightning.data.loader import Loading
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.data.order import LANES, WINDOW
from mhla_lightning.data.stores import Remote
from mhla_lightning.errors import DataError, UserError

if TYPE_CHECKING:
    from mhla_lightning.data.vaes import Autoencoder


class LatentDataModule(ShardDataModule):
    """Latents with labels or text features, from shards.

    Where the shards hold them (see `mhla data latents`), training draws for every sample of every epoch whether it is mirrored, and a latent from the
    VAE's posterior; validation takes the image as it is and the posterior's mean.

    Args:
        vae: what the recipe's latents are made by: name, scale, shift and shape, and what else it says; latents of another VAE are refused.
        path, batch_size, micro_batch_size, epochs, num_workers, mix: see :class:`ShardDataModule`.
        video: latents have a time axis.
        text: (tokens, channels) of the text features, for data without classes.
        lanes, window, seed, max_skipped_share, verify, loading, remote: see :class:`ShardDataModule`.
    """

    def __init__(
        self,
        vae: VAE,
        path: str | None = None,
        batch_size: int = 256,
        micro_batch_size: int | None = None,
        epochs: float | None = None,
        num_workers: int = 2,
        video: bool = False,
        text: tuple[int, int] | None = None,
        mix: list[Source] | None = None,
        lanes: int = LANES,
        window: int = WINDOW,
        seed: int | None = None,
        max_skipped_share: float = 0.01,
        verify: Verify = "auto",
        loading: Loading | None = None,
        remote: Remote | None = None,
    ) -> None:
        """Store and validate the arguments. Raises UserError."""
        super().__init__(
            path, batch_size, micro_batch_size, epochs, num_workers, mix, lanes, window, seed, max_skipped_share, verify, loading, remote
        )
        self.vae, self.video, self.text = vae, video, text
        self._autoencoder: Autoencoder | None = None

    def kind(self, index: ShardIndex) -> Latents:
        """Latents as their index says, to be compared with this module's VAE."""
        return Latents(index.vae or self.vae, len(index.classes), self.text, self.video, self.seed, self.vae)

    def check(self, world_size: int) -> None:
        """Also that all splits have the same classes, and latents of one VAE that are stored alike."""
        super().check(world_size)
        first = self.index()
        for name in SPLITS:
            for split in self.splits(name):
                address, vae = split.store.address(INDEX_NAME), split.index.vae
                if split.index.classes != first.classes:
                    raise DataError(f"{address} lists other classes than {self.sources[0].path}: data used together has one list of classes")
                if vae is not None and first.vae is not None and not _alike(vae, first.vae):
                    raise DataError(f"{address} was made by {vae}, and {self.sources[0].path} by {first.vae}: data used together has one VAE")

    def to_images(self, x: Tensor) -> Tensor:
        """Latents as in a batch, (batch, C, h, w), to uint8 (batch, H, W, 3), by the VAE that data.vae names, which is opened at the first call.

        Raises:
            UserError: the VAE cannot be opened, or is not the one that data.vae.sha256 says.
        """
        from mhla_lightning.data.vaes import decode_latents

        return decode_latents(self._decoder(x.device), x)

    def _decoder(self, device: torch.device) -> Autoencoder:
        from mhla_lightning.data.vaes import default_dtype, load_vae

        if self._autoencoder is None or self._autoencoder.device != device:
            found = load_vae(self.vae.name, device=device, dtype=default_dtype(device), scale=self.vae.scale, shift=self.vae.shift)
            if self.vae.sha256 not in (None, found.sha256):
                raise UserError(f"the VAE {self.vae.name} has sha256 {found.sha256[:12]}..., and data.vae.sha256 is {self.vae.sha256}: it is another")
            self._autoencoder = found
        return self._autoencoder

    def facts(self) -> dict[str, Any]:
        """Kind, VAE and classes."""
        return {"kind": "video_latents" if self.video else "latents", "vae": self.vae, "classes": len(self.index().classes), "text": self.text}


def _alike(one: VAE, other: VAE) -> bool:
    """Whether latents of both can stand in one batch: all but the statistics is equal."""
    return replace(one, mean=(), std=()) == replace(other, mean=(), std=())
