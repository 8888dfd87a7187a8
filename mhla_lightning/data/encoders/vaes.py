"""Autoencoders of diffusers: images or videos to latents and back, from safetensors only."""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mhla_lightning.errors import UserError, missing_extra, unknown_name
from mhla_lightning.finite import check_finite

MODELS = ("AutoencoderKL", "AutoencoderDC")  # classes of diffusers
VIDEO_MODELS = ("AutoencoderKLWan",)
DECODED_AT_ONCE = 16  # images; a decoder needs hundreds of megabytes for each
_CONFIG = "config.json"
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
    model, given = _open(name, subfolder, MODELS)
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
    sha256 = _sha256(model)
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
    model, _ = _open(name, subfolder, VIDEO_MODELS)
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
        raise UserError("vae", f"the {_CONFIG} of {name} has {found}: they must agree")
    if sum(config.temperal_downsample) > 2:
        raise UserError(
            "vae",
            f"{name} merges {2 ** sum(config.temperal_downsample)} frames into one; diffusers encodes "
            f"{_CHUNK} "
            "at a time",
        )
    sha256 = _sha256(model)
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


def _open(name: str, subfolder: str | None, classes: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Open a model of one of these classes of diffusers; return it and its configuration."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(None, missing_extra("diffusers", "diffusion", f"the VAE {name}")) from error
    kind, given, place = _config(name, subfolder, classes)
    return _load(getattr(diffusers, kind), name, place), given


def _config(
    name: str, subfolder: str | None, classes: Sequence[str]
) -> tuple[str, dict[str, Any], str | None]:
    """Return the class, configuration and subfolder of an autoencoder."""
    from diffusers import AutoencoderKL

    local = Path(name).expanduser().is_dir()
    if not local and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise UserError(
            "vae",
            f"the folder {name} does not exist; give a folder written by save_pretrained, or a name like "
            "stabilityai/sd-vae-ft-ema",
        )
    places = [subfolder] if subfolder is not None else [None, "vae"]
    reasons = []
    for place in places:
        try:
            with _quiet():
                found = AutoencoderKL.load_config(_address(name), subfolder=place)
        except (OSError, ValueError, RuntimeError) as error:  # of diffusers and of the hub
            reasons.append(_reason(error))
            if "connect" in str(error).lower() or "offline" in str(error).lower():
                break
            continue
        if str(found.get("_class_name")) not in classes:
            raise UserError("vae", unknown_name("class", found.get("_class_name"), classes, of=name))
        return str(found["_class_name"]), found, place
    where = (
        f"the folder {name} holds no {_CONFIG} of a VAE"
        if local
        else f"{name} is no folder here and could not be fetched from the hub"
    )
    raise UserError(
        "vae",
        f"{where} ({reasons[0]}): give a folder written by save_pretrained, or a name like "
        "stabilityai/sd-vae-ft-ema",
    )


def _load(kind: Any, name: str, subfolder: str | None) -> nn.Module:
    try:
        # The model is first made with random weights; the caller's random numbers must not change.
        with _quiet(), torch.random.fork_rng(devices=[]):
            model, info = kind.from_pretrained(
                _address(name),
                subfolder=subfolder,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except Exception as error:  # noqa: BLE001  of four packages: diffusers, safetensors, the hub, torch
        raise UserError(
            "vae", f"the weights of {name} cannot be read from a safetensors file ({_reason(error)})"
        ) from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:
        raise UserError(
            "vae",
            f"the weights of {name} do not fit its {_CONFIG}: {len(wrong)} are missing or misshaped, e.g. "
            f"{wrong[0]}",
        )
    check_finite(model.state_dict(), "vae", f"{name}: ")
    return model.eval().requires_grad_(False)


def _address(name: str) -> str:
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings: diffusers 0.42 passes a deprecated argument to huggingface_hub 2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _sha256(model: nn.Module) -> str:
    """Return the sha256 of the class, the configuration and the weights as float32.

    Defaults are left out of the configuration, so that another version of diffusers gives the same.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(model).__init__).parameters.items()
    }
    config: Any = model.config
    said = {
        key: json.dumps(value, default=str)
        for key, value in sorted(config.items())
        if not key.startswith("_")
    }
    own = {key: text for key, text in said.items() if text != json.dumps(defaults.get(key), default=str)}
    digest = hashlib.sha256(json.dumps([type(model).__name__, own]).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().contiguous().numpy())
    return digest.hexdigest()
