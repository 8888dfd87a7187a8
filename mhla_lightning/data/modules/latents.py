"""The LightningDataModule of VAE latents, of images or of videos."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhla_lightning.data.corpus import DataSource
from mhla_lightning.data.index import EMPTY_TEXT, INDEX_NAME, SPLITS, VAE, ShardIndex, TextEncoding
from mhla_lightning.data.kinds import Latents
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.data.modules.options import ORDER, READING, OrderConfig, ReadingConfig
from mhla_lightning.data.modules.text import TextConditioned
from mhla_lightning.data.npy import load_npy
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import open_store
from mhla_lightning.errors import DataError, UserError

if TYPE_CHECKING:
    from mhla_lightning.data.encoders.vaes import Autoencoder, VideoAutoencoder

WAN_RATE = 16.0  # frames a second, where the index has none
_EMPTY_BYTES = 2**28
_REMEDY = (
    "data sets that are used together need one VAE, and one shape of latents unless "
    "`data.order.mix_by` is batch"
)


class LatentDataModule(TextConditioned, ShardDataModule):
    """Latents with labels or text features, from shards.

    `mhla data latents` may store a latent's log-variance and the latents of the mirrored image. Where the
    shards hold them, training draws the latent from the VAE's posterior and mirrors at random, for every
    sample of every epoch. Validation takes the posterior's mean of the image as it is.

    Args:
        vae: the VAE that made the latents: name, scale, shift, shape, and optional details; latents of
            another VAE are refused. With mix_by batch, the shapes of the sources may differ from this one,
            except in the channels.
        path, mix, batch_size, micro_batch_size, epochs, order, reading: see :class:`ShardDataModule`.
        video: whether latents have a time axis.
        text_encoder: the encoder that made the text features, for data without classes; other features are
            refused. It is opened only for prompts. None for data with classes.
    """

    def __init__(
        self,
        vae: VAE,
        path: str | None = None,
        batch_size: int = 256,
        micro_batch_size: int | None = None,
        epochs: float | None = None,
        video: bool = False,
        text_encoder: TextEncoding | None = None,
        mix: list[DataSource] | None = None,
        order: OrderConfig = ORDER,
        reading: ReadingConfig = READING,
    ) -> None:
        """Store and validate the arguments. Raises UserError."""
        super().__init__(path, mix, batch_size, micro_batch_size, epochs, order, reading)
        self.vae, self.video, self.text_encoder = vae, video, text_encoder
        self._autoencoder: Autoencoder | VideoAutoencoder | None = None

    def kind(self, index: ShardIndex) -> Latents:
        """Return latents as their index describes them, to be compared with this module's VAE."""
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
        """Return the recipe's VAE, with the shape of this source where only the channels must agree."""
        found = index.vae
        if (
            self.order.mix_by == "batch"
            and found is not None
            and (len(found.shape), found.shape[0]) == (len(self.vae.shape), self.vae.shape[0])
        ):
            return replace(self.vae, shape=found.shape)
        return self.vae

    def check(self, world_size: int) -> None:
        """Check also that all splits share classes, text encoder and VAE, and are stored alike."""
        super().check(world_size)
        first = self.index()
        for name in SPLITS:
            for split in self.splits(name):
                address, vae = split.store.address(INDEX_NAME), split.index.vae
                if split.index.classes != first.classes:
                    raise DataError(
                        address,
                        f"its classes differ from those of {self.sources[0].path}; data sets that are used "
                        "together need one list of classes",
                    )
                if vae is not None and first.vae is not None and not self._alike(vae, first.vae):
                    raise DataError(
                        address, f"{vae} made it, and {first.vae} made {self.sources[0].path}; {_REMEDY}"
                    )
                self._check_text(split, address)

    def _check_text(self, split: Split, address: str) -> None:
        if not split.index.classes and self.text_encoder is None:
            raise UserError(
                "text_encoder",
                f"it is not set, and {address} has captions and no classes; give the name, tokens and "
                "channels of the encoder of the captions",
            )
        found = split.index.text
        if self.text_encoder is not None and found is not None and not self.text_encoder.fits(found):
            raise DataError(
                address,
                f"{found} encoded its captions, and `data.text_encoder` is {self.text_encoder}; they must "
                "agree",
            )

    def _alike(self, one: VAE, other: VAE) -> bool:
        """Return whether latents of both can be used together.

        All but the statistics must be equal, and the shape where both may be in one batch.
        """
        shape = one.shape if self.order.mix_by == "batch" else other.shape
        return replace(one, mean=(), std=()) == replace(other, mean=(), std=(), shape=shape)

    def to_images(self, x: Tensor) -> Tensor:
        """Decode latents of a batch, (batch, C, h, w), to pixels, uint8 (batch, H, W, 3).

        The VAE of the recipe is opened at the first call.

        Raises:
            UserError: the VAE cannot be opened, or differs from `vae.sha256`.
        """
        from mhla_lightning.data.encoders.vaes import decode_latents

        return decode_latents(self._open_vae(x.device), x)

    def sample_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the latent of an image of this size in pixels.

        Raises:
            UserError: the VAE cannot be opened, or its factor does not divide a side.
        """
        vae = self._open_vae(torch.device("cpu") if self._autoencoder is None else self._autoencoder.device)
        return vae.latent_shape(height)[1], vae.latent_shape(width)[1]

    def _open_vae(self, device: torch.device) -> Autoencoder:
        """Return the image VAE of the recipe, opened at the first call on a device."""
        from mhla_lightning.data.encoders.vaes import Autoencoder, default_dtype, load_vae

        if not isinstance(self._autoencoder, Autoencoder) or self._autoencoder.device != device:
            found = load_vae(
                self.vae.name,
                device=device,
                dtype=default_dtype(device),
                scale=self.vae.scale,
                shift=self.vae.shift,
            )
            self._demand_same(found.sha256)
            self._autoencoder = found
        return self._autoencoder

    def to_videos(self, x: Tensor) -> Tensor:
        """Decode latents of a batch, (batch, C, t, h, w), to pixels, uint8 (batch, frames, H, W, 3).

        VAE and errors: see to_images.
        """
        from mhla_lightning.data.encoders.vaes import decode_videos

        return decode_videos(self.open_video_vae(x.device), x)

    def sample_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the shape (C, t, h, w) of the latent of a video.

        Raises UserError, with the nearest size that works, for a size that does not fit the VAE.
        """
        return self.open_video_vae(None).latent_shape(frames, height, width)

    @property
    def frame_rate(self) -> float:
        """Frames a second of the clips behind the latents; of the longest where sources differ."""
        clips = [split.index.clip for split in self.splits("train") if split.index.clip is not None]
        return max(clips, key=lambda clip: clip.frames).rate if clips else WAN_RATE

    def open_video_vae(self, device: torch.device | None = None) -> VideoAutoencoder:
        """Return the video VAE of the recipe, opened at the first call.

        Args:
            device: of the weights; None takes any.

        Raises UserError when it cannot be opened.
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
                "vae.sha256",
                f"{self.vae.sha256} is not the sha256 of the VAE {self.vae.name}, which is {sha256[:12]}...",
            )

    def _known_features(self) -> dict[str, Tensor]:
        """Return also the features of the empty text: with these, training needs no text encoder."""
        if self._features is None:
            empty = self._stored_empty()
            self._features = {} if empty is None else {"": empty}
        return self._features

    def _stored_empty(self) -> Tensor | None:
        """Return the features of the empty text, (rows, channels), from the file beside the splits.

        Raises DataError when the file differs from the index.
        """
        source, text = self.sources[0], self.index().text
        if text is None or text.empty is None:
            return None
        store = open_store(source.path, self.remote)
        size, address = store.size(EMPTY_TEXT), store.address(EMPTY_TEXT)
        if size is None:
            raise DataError(address, "the file is missing, and the index beside it needs it: copy it again")
        if size > _EMPTY_BYTES:
            raise DataError(address, f"{size} bytes are too many for the features of a text: copy it again")
        data = store.read(EMPTY_TEXT, 0, size)
        array = load_npy(data, address)
        if hashlib.sha256(data).hexdigest() != text.empty or array.ndim != 2 or array.dtype.kind != "f":
            raise DataError(address, "its content is not the one that the index describes: copy it again")
        return torch.from_numpy(array).float()

    def facts(self) -> dict[str, Any]:
        """Return the kind, VAE, classes, (tokens, channels) of the text, and all shapes of latents.

        Where latents of images have several sizes, also `sizes`: the share of the training samples of each.
        """
        splits = [split for name in SPLITS for split in self.splits(name)]
        shapes = list(dict.fromkeys(split.index.vae.shape for split in splits if split.index.vae is not None))
        kind = "video_latents" if self.video else "latents"
        facts = {
            "kind": kind,
            "vae": self.vae,
            "classes": len(self.index().classes),
            "text": self._text_shape,
            "shapes": shapes,
        }
        return facts if self.video or len(shapes) < 2 else {**facts, "sizes": self._shares()}

    def _shares(self) -> dict[tuple[int, ...], float]:
        """Return the share of the training samples of every size."""
        total, shares = sum(source.weight for source in self.sources), dict[tuple[int, ...], float]()
        for source, split in zip(self.sources, self.splits("train"), strict=True):
            size = split.index.vae.shape[1:] if split.index.vae is not None else self.vae.shape[1:]
            shares[size] = shares.get(size, 0.0) + source.weight / total
        return shares
