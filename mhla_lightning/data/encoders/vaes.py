"""Autoencoders of diffusers: images or videos to latents and back, from safetensors only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mhla_lightning.data.encoders.diffusers_models import CONFIG, content_hash, open_model
from mhla_lightning.errors import UserError

MODELS = ("AutoencoderKL", "AutoencoderDC")  # classes of diffusers
VIDEO_MODELS = ("AutoencoderKLWan",)
DECODED_AT_ONCE = 16  # images; a decoder needs hundreds of megabytes for each
_CHUNK = 4  # frames that AutoencoderKLWan encodes at a time, after the first


class Posterior(NamedTuple):
    """The output of an encoder, float32 (B, C, h, w).

    For a deterministic encoder, mean is the latent itself and logvar is None.
    """

    mean: Tensor
    logvar: Tensor | None


@dataclass(frozen=True)
class Autoencoder:
    """A VAE of images, ready to use. A latent z of the model is used as (z - shift) * scale.

    Attributes:
        name: given to load_vae.
        model: of diffusers, frozen and in eval mode.
        sha256: of weights (as float32), class and configuration: the same for every copy, device and dtype.
        scale: of the configuration, unless given to load_vae.
        shift: of the configuration, unless given to load_vae.
    """

    name: str
    model: nn.Module
    sha256: str
    scale: float
    shift: float

    @property
    def kind(self) -> str:
        """diffusers' class."""
        return type(self.model).__name__

    @property
    def has_posterior(self) -> bool:
        """Whether it encodes to a distribution."""
        return self.kind == "AutoencoderKL"

    @property
    def factor(self) -> int:
        """Pixels a side for one position of a latent."""
        config: Any = self.model.config
        blocks = config.block_out_channels if self.has_posterior else config.encoder_block_out_channels
        return 2 ** (len(blocks) - 1)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of the latent of a square image of `size` pixels.

        Raises UserError unless the factor divides the size.
        """
        if size < 1 or size % self.factor:
            nearest = max(1, round(size / self.factor)) * self.factor
            raise UserError(
                "size",
                f"{size} does not fit the VAE {self.name}; it needs a multiple of {self.factor}, e.g. "
                f"{nearest}",
            )
        return int(self.model.config.latent_channels), size // self.factor, size // self.factor  # type: ignore[union-attr, arg-type]

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Posterior:
        """Encode images (B, 3, H, W) in [-1, 1] to latents, neither shifted nor scaled."""
        model: Any = self.model
        found = model.encode(images.to(self.device, model.dtype))
        if self.has_posterior:
            return Posterior(found.latent_dist.mean.float(), found.latent_dist.logvar.float())
        return Posterior(found.latent.float(), None)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w), shifted and scaled, to images, float32 (B, 3, H, W).

        Pixels are about in [-1, 1].
        """
        model: Any = self.model
        z = latents.to(self.device, torch.float32) / self.scale + self.shift
        return model.decode(z.to(model.dtype)).sample.float()


@dataclass(frozen=True)
class VideoAutoencoder:
    """A VAE of videos, ready to use; its configuration normalises each channel of latents.

    Attributes:
        name: given to load_video_vae.
        model: of diffusers, frozen and in eval mode.
        sha256: see Autoencoder.
    """

    name: str
    model: nn.Module
    sha256: str

    @property
    def kind(self) -> str:
        """diffusers' class."""
        return type(self.model).__name__

    @property
    def factors(self) -> tuple[int, int]:
        """Frames, and pixels a side, for one position of a latent.

        The first frame has its own position.
        """
        config: Any = self.model.config
        return 2 ** sum(config.temperal_downsample), 2 ** (len(config.dim_mult) - 1) * (
            config.patch_size or 1
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the shape (C, t, h, w) of the latent of a video.

        t = 1 + (frames - 1) / temporal factor.
        Raises UserError with the nearest size that works.
        """
        temporal, spatial = self.factors
        nearest = (
            1 + max(0, round((frames - 1) / _CHUNK)) * _CHUNK,
            *(max(1, round(side / spatial)) * spatial for side in (height, width)),
        )
        given = {"frames": frames, "height": height, "width": width}
        wrong = [key for key, near in zip(given, nearest, strict=True) if near != given[key]]
        if wrong:
            raise UserError(
                wrong[0],
                f"{frames} frames of {height}x{width} pixels do not fit the VAE {self.name}, which takes 1 "
                "+ a "
                f"multiple of {_CHUNK} frames and sides that {spatial} divides; the nearest: {nearest[0]} "
                "frames "
                f"of {nearest[1]}x{nearest[2]}",
            )
        config: Any = self.model.config
        return int(config.z_dim), 1 + (frames - 1) // temporal, height // spatial, width // spatial

    @torch.inference_mode()
    def encode(self, videos: Tensor) -> Tensor:
        """Encode videos (B, 3, T, H, W) in [-1, 1] to latents, float32 (B, C, t, h, w). SPEC 6.6.

        A latent is the normalised mean of the posterior. Videos are encoded one at a time.
        """
        self.latent_shape(*videos.shape[2:])  # diffusers silently drops frames that fill no position
        model: Any = self.model
        latents = [
            model.encode(video.to(self.device, model.dtype)).latent_dist.mean.float()
            for video in videos.split(1)
        ]
        mean, std = self._statistics()
        return (torch.cat(latents) - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, C, t, h, w) to videos in [-1, 1], float32 (B, 3, T, H, W).

        Videos are decoded one at a time.
        """
        model: Any = self.model
        mean, std = self._statistics()
        return torch.cat(
            [
                model.decode((z.to(self.device, torch.float32) * std + mean).to(model.dtype)).sample.float()
                for z in latents.split(1)
            ]
        )

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of every channel, float32 (C, 1, 1, 1)."""
        config: Any = self.model.config
        return tuple(
            torch.tensor(values, device=self.device)[:, None, None, None]
            for values in (config.latents_mean, config.latents_std)
        )  # type: ignore[return-value]


def load_vae(
    name: str,
    subfolder: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    scale: float | None = None,
    shift: float | None = None,
) -> Autoencoder:
    """Open an autoencoder.

    Args:
        name: a folder written by save_pretrained, or a name on the Hugging Face hub.
        subfolder: of the folder or name; None is the folder itself or, in a pipeline, `vae`.
        device: of the weights.
        dtype: of the weights.
        scale: replaces the configuration's scaling_factor; None keeps it.
        shift: replaces the configuration's shift_factor; None keeps it.

    Raises:
        UserError: diffusers is missing. The name exists neither here nor on the hub. The class is not in
            MODELS. The weights are no safetensors or do not fit the configuration. It takes no RGB images,
            or normalises each channel.
    """
    model, given = open_model(name, subfolder, MODELS)
    config: Any = model.config
    if config.in_channels != 3:
        raise UserError(
            "vae", f"{name} takes images of {config.in_channels} channels; only RGB images, 3, are supported"
        )
    if given.get("latents_mean") is not None and (scale is None or shift is None):
        raise UserError(
            "vae",
            f"{name} normalises each channel (latents_mean): give one `scale` and one `shift` for all",
        )
    own_shift = getattr(config, "shift_factor", None)
    found_scale = config.scaling_factor if scale is None else scale
    found_shift = (own_shift or 0.0) if shift is None else shift
    sha256 = content_hash(model)
    # The model's own `to` logs a line about modules that it does not have.
    moved = nn.Module.to(model, device=device, dtype=dtype)
    return Autoencoder(name, moved, sha256, float(found_scale), float(found_shift))


def load_video_vae(
    name: str,
    subfolder: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VideoAutoencoder:
    """Open an autoencoder of videos, one of VIDEO_MODELS. Arguments and errors: see load_vae."""
    model, _ = open_model(name, subfolder, VIDEO_MODELS)
    config: Any = model.config
    if config.in_channels != 3 * (config.patch_size or 1) ** 2:
        raise UserError(
            "vae", f"{name} takes videos of {config.in_channels} channels; only RGB videos, 3, are supported"
        )
    if not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
        found = (
            f"latents_mean for {len(config.latents_mean)} channels, latents_std for "
            f"{len(config.latents_std)}, and z_dim {config.z_dim}"
        )
        raise UserError("vae", f"the {CONFIG} of {name} has {found}: they must agree")
    if sum(config.temperal_downsample) > 2:
        raise UserError(
            "vae",
            f"{name} merges {2 ** sum(config.temperal_downsample)} frames into one; diffusers encodes "
            f"{_CHUNK} "
            "at a time",
        )
    sha256 = content_hash(model)
    return VideoAutoencoder(name, nn.Module.to(model, device=device, dtype=dtype), sha256)


def decode_latents(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Decode latents (B, C, h, w), shifted and scaled, to pixels uint8 (B, H, W, 3).

    Pixels are clamp(127.5 x + 128), on the VAE's device. SPEC 4.3.
    """
    parts = [
        (127.5 * vae.decode(part) + 128).clamp(0, 255).to(torch.uint8)
        for part in latents.split(DECODED_AT_ONCE)
    ]
    return torch.cat(parts).permute(0, 2, 3, 1)


def decode_videos(vae: VideoAutoencoder, latents: Tensor) -> Tensor:
    """Decode normalised latents (B, C, t, h, w) to pixels uint8 (B, T, H, W, 3).

    Pixels are clamp(127.5 x + 128), on the VAE's device.
    """
    parts = [(127.5 * vae.decode(part) + 128).clamp(0, 255).to(torch.uint8) for part in latents.split(1)]
    return torch.cat(parts).permute(0, 2, 3, 4, 1)


def default_dtype(device: torch.device | str) -> torch.dtype:
    """Return bfloat16 for a GPU, float32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
