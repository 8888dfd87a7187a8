"""The LightningDataModule of VAE latents, of images or of videos."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhla_lightning.data.check import Verify
from mhla_lightning.data.corpus import Source
from mhla_lightning.data.index import EMPTY_TEXT, INDEX_NAME, SPLITS, VAE, ShardIndex, TextEncoding
from mhla_lightning.data.kinds import Latents
from mhla_lightning.data.loader import Loading
from mhla_lightning.data.modules.base import MixBy, ShardDataModule
from mhla_lightning.data.modules.text import TextConditioned
from mhla_lightning.data.npy import load_npy
from mhla_lightning.data.order import LANES, WINDOW
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import Remote, open_store
from mhla_lightning.errors import DataError, UserError

if TYPE_CHECKING:
    from mhla_lightning.data.encoders.vaes import Autoencoder, VideoAutoencoder

WAN_RATE = 16.0  # frames a second, where the index does not say
_EMPTY_BYTES = 2**28
_REMEDY = "data used together has one VAE, and latents of one shape unless data.mix_by is batch"


class LatentDataModule(TextConditioned, ShardDataModule):
    """Latents with labels or text features, from shards.

    Where the shards hold them (see `mhla data latents`), training draws for every sample of every epoch
    whether it is mirrored, and a latent from the VAE's posterior; validation takes the image as it is and the
    posterior's mean.

    Args:
        vae: what the recipe's latents are made by: name, scale, shift and shape, and what else it says;
            latents of another VAE are refused. With mix_by batch the sources' shapes may differ from the
            recipe's, but for the channels.
        path, batch_size, micro_batch_size, epochs, num_workers, mix: see :class:`ShardDataModule`.
        video: latents have a time axis.
        text_encoder: what made the text features, for data without classes; other features are refused.
            Opened only for prompts.
        lanes, window, seed, max_skipped_share, verify, loading, remote, mix_by: see :class:`ShardDataModule`.
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
        text_encoder: TextEncoding | None = None,
        mix: list[Source] | None = None,
        lanes: int = LANES,
        window: int = WINDOW,
        seed: int | None = None,
        max_skipped_share: float = 0.01,
        verify: Verify = "auto",
        loading: Loading | None = None,
        remote: Remote | None = None,
        mix_by: MixBy = "sample",
    ) -> None:
        """Store and validate the arguments. Raises UserError."""
        super().__init__(
            path,
            batch_size,
            micro_batch_size,
            epochs,
            num_workers,
            mix,
            lanes,
            window,
            seed,
            max_skipped_share,
            verify,
            loading,
            remote,
            mix_by,
        )
        self.vae, self.video, self.text_encoder = vae, video, text_encoder
        self._autoencoder: Autoencoder | VideoAutoencoder | None = None

    def kind(self, index: ShardIndex) -> Latents:
        """Latents as their index says, to be compared with this module's VAE."""
        return Latents(
            index.vae or self.vae,
            len(index.classes),
            self._text_shape,
            self.video,
            self.seed,
            self._wanted(index),
        )

    @property
    def _text_shape(self) -> tuple[int, int] | None:
        return (self.text_encoder.tokens, self.text_encoder.channels) if self.text_encoder else None

    def _wanted(self, index: ShardIndex) -> VAE:
        """The recipe's VAE; with the shape of this source where only the channels have to agree."""
        found = index.vae
        if (
            self.mix_by == "batch"
            and found is not None
            and (len(found.shape), found.shape[0]) == (len(self.vae.shape), self.vae.shape[0])
        ):
            return replace(self.vae, shape=found.shape)
        return self.vae

    def check(self, world_size: int) -> None:
        """Also that all splits have the same classes, features of one text encoder, and latents of one VAE
        that are stored alike.
        """
        super().check(world_size)
        first = self.index()
        for name in SPLITS:
            for split in self.splits(name):
                address, vae = split.store.address(INDEX_NAME), split.index.vae
                if split.index.classes != first.classes:
                    raise DataError(
                        f"{address} lists other classes than {self.sources[0].path}: data used "
                        "together has one list of classes"
                    )
                if vae is not None and first.vae is not None and not self._alike(vae, first.vae):
                    raise DataError(
                        f"{address} was made by {vae}, and {self.sources[0].path} by {first.vae}: {_REMEDY}"
                    )
                self._check_text(split, address)

    def _check_text(self, split: Split, address: str) -> None:
        if not split.index.classes and self.text_encoder is None:
            raise UserError(
                f"{address} has captions and no classes: data.text_encoder (name, tokens, channels) "
                "has to say what encoded them"
            )
        found = split.index.text
        if self.text_encoder is not None and found is not None and not self.text_encoder.fits(found):
            raise DataError(
                f"the captions of {address} were encoded by {found}, and data.text_encoder is "
                f"{self.text_encoder}: make them agree"
            )

    def _alike(self, one: VAE, other: VAE) -> bool:
        """Whether latents of both can be used together: all but the statistics is equal, and the shape
        where they stand in one batch.
        """
        shape = one.shape if self.mix_by == "batch" else other.shape
        return replace(one, mean=(), std=()) == replace(other, mean=(), std=(), shape=shape)

    def to_images(self, x: Tensor) -> Tensor:
        """Latents as in a batch, (batch, C, h, w), to uint8 (batch, H, W, 3), by the VAE that data.vae names,
        which is opened at the first call.

        Raises:
            UserError: the VAE cannot be opened, or is not the one that data.vae.sha256 says.
        """
        from mhla_lightning.data.encoders.vaes import Autoencoder, decode_latents, default_dtype, load_vae

        if not isinstance(self._autoencoder, Autoencoder) or self._autoencoder.device != x.device:
            dtype = default_dtype(x.device)
            found = load_vae(
                self.vae.name, device=x.device, dtype=dtype, scale=self.vae.scale, shift=self.vae.shift
            )
            self._demand_same(found.sha256)
            self._autoencoder = found
        return decode_latents(self._autoencoder, x)

    def to_videos(self, x: Tensor) -> Tensor:
        """Latents as in a batch, (batch, C, t, h, w), to uint8 (batch, F, H, W, 3), by the VAE that
        data.vae names. Errors: see to_images.
        """
        from mhla_lightning.data.encoders.vaes import decode_videos

        return decode_videos(self.open_video_vae(x.device), x)

    def sample_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of videos of this size. Raises UserError, with the nearest size that works, for one
        that the VAE cannot take.
        """
        return self.open_video_vae(None).latent_shape(frames, height, width)

    @property
    def frame_rate(self) -> float:
        """Frames a second of the clips that the latents were made of (of the longest, where sources
        differ).
        """
        clips = [split.index.clip for split in self.splits("train") if split.index.clip is not None]
        return max(clips, key=lambda clip: clip.frames).rate if clips else WAN_RATE

    def open_video_vae(self, device: torch.device | None = None) -> VideoAutoencoder:
        """The VAE that data.vae names, opened at the first call. device: None takes any. Raises UserError
        when it cannot be opened.
        """
        from mhla_lightning.data.encoders.vaes import VideoAutoencoder, default_dtype, load_video_vae

        known = self._autoencoder
        if not isinstance(known, VideoAutoencoder) or device not in (None, known.device):
            device = device or torch.device("cpu")
            known = load_video_vae(self.vae.name, device=device, dtype=default_dtype(device))
            self._demand_same(known.sha256)
            self._autoencoder = known
        return known

    def _demand_same(self, sha256: str) -> None:
        if self.vae.sha256 not in (None, sha256):
            raise UserError(
                f"the VAE {self.vae.name} has sha256 {sha256[:12]}..., and data.vae.sha256 is "
                f"{self.vae.sha256}: it is another"
            )

    def _known_features(self) -> dict[str, Tensor]:
        """Also the empty text's, which lie beside the splits: training needs no text encoder."""
        if self._features is None:
            empty = self._stored_empty()
            self._features = {} if empty is None else {"": empty}
        return self._features

    def _stored_empty(self) -> Tensor | None:
        """Features of the empty text, (rows, channels), as `mhla data latents` left them. Raises DataError
        when they are not what the index says.
        """
        source, text = self.sources[0], self.index().text
        if text is None or text.empty is None:
            return None
        store = open_store(source.path, self.remote)
        size, address = store.size(EMPTY_TEXT), store.address(EMPTY_TEXT)
        if size is None:
            raise DataError(f"{address} is missing, and the index beside it needs it: copy it again")
        if size > _EMPTY_BYTES:
            raise DataError(f"{address} has {size} bytes, too many for a text's features: copy it again")
        data = store.read(EMPTY_TEXT, 0, size)
        array = load_npy(data, address)
        if hashlib.sha256(data).hexdigest() != text.empty or array.ndim != 2 or array.dtype.kind != "f":
            raise DataError(f"{address} is not what the index says of it: copy it again")
        return torch.from_numpy(array).float()

    def facts(self) -> dict[str, Any]:
        """Kind, VAE, classes, (tokens, channels) of the text, and the shapes of latents, one for each size
        there is.
        """
        splits = [split for name in SPLITS for split in self.splits(name)]
        shapes = list(dict.fromkeys(split.index.vae.shape for split in splits if split.index.vae is not None))
        kind = "video_latents" if self.video else "latents"
        return {
            "kind": kind,
            "vae": self.vae,
            "classes": len(self.index().classes),
            "text": self._text_shape,
            "shapes": shapes,
        }
