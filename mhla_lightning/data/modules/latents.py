"""The LightningDataModule of VAE latents, of images or of videos."""

from __future__ import annotations

from typing import Any

from mhla_lightning.data.check import Verify
from mhla_lightning.data.corpus import Source
from mhla_lightning.data.index import VAE, ShardIndex
from mhla_lightning.data.kinds import Latents
from mhla_lightning.data.loader import Loading
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.data.order import LANES, WINDOW
from mhla_lightning.data.stores import Remote


class LatentDataModule(ShardDataModule):
    """Latents with labels or text features, from shards.

    Args:
        vae: what the recipe's latents are made by; latents of another VAE are refused.
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

    def kind(self, index: ShardIndex) -> Latents:
        """Latents of this module's VAE."""
        return Latents(self.vae, len(index.classes), self.text, self.video)

    def facts(self) -> dict[str, Any]:
        """Kind, VAE and classes."""
        return {"kind": "video_latents" if self.video else "latents", "vae": self.vae, "classes": len(self.index().classes), "text": self.text}
