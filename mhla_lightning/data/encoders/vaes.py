"""Autoencoders of diffusers: images, or videos, to latents and back. Weights come from safetensors alone;
nothing is unpickled.
"""

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

MODELS = ("AutoencoderKL", "AutoencoderDC")  # classes of diffusers
VIDEO_MODELS = ("AutoencoderKLWan",)
DECODED_AT_ONCE = 16  # images: a decoder takes hundreds of megabytes for each
_CONFIG = "config.json"
_CHUNK = 4  # frames that AutoencoderKLWan encodes at a time, after the first


class Posterior(NamedTuple):
    """What an encoder says of images, float32 (B, C, h, w). mean: the latent itself and logvar None where
    the encoder is deterministic.
    """

    mean: Tensor
    logvar: Tensor | None


@dataclass(frozen=True)
class Autoencoder:
    """A VAE that is ready to be used. A latent z of the model is used as (z - shift) * scale.

    Attributes:
        name: as load_vae was asked for it.
        model: of diffusers, frozen and in eval mode.
        sha256: of weights (as float32), class and configuration: the same for every copy, device and dtype.
        scale, shift: of the configuration, unless load_vae was told others.
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
        """Pixels a side of what becomes one place of a latent."""
        config: Any = self.model.config
        blocks = config.block_out_channels if self.has_posterior else config.encoder_block_out_channels
        return 2 ** (len(blocks) - 1)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(C, h, w) of square images of `size` pixels. Raises UserError unless the factor divides the
        size.
        """
        if size < 1 or size % self.factor:
            nearest = max(1, round(size / self.factor)) * self.factor
            raise UserError(
                f"--size is {size}; the VAE {self.name} needs a multiple of {self.factor}, e.g. {nearest}"
            )
        return int(self.model.config.latent_channels), size // self.factor, size // self.factor  # type: ignore[union-attr, arg-type]

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Posterior:
        """images: (B, 3, H, W) in [-1, 1]. Latents as the model gives them, neither shifted nor scaled."""
        model: Any = self.model
        found = model.encode(images.to(self.device, model.dtype))
        if self.has_posterior:
            return Posterior(found.latent_dist.mean.float(), found.latent_dist.logvar.float())
        return Posterior(found.latent.float(), None)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents: (B, C, h, w) as they are used, shifted and scaled. Images about in [-1, 1], float32 (B,
        3, H, W).
        """
        model: Any = self.model
        z = latents.to(self.device, torch.float32) / self.scale + self.shift
        return model.decode(z.to(model.dtype)).sample.float()


@dataclass(frozen=True)
class VideoAutoencoder:
    """A VAE of videos that is ready to be used. Latents are normalised channel by channel, as its
    configuration says.

    Attributes:
        name: as load_video_vae was asked for it.
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
        """Frames, and pixels a side, of what becomes one place of a latent; the first frame is a place of
        its own.
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
        """(C, t, h, w) of videos of this size: t = 1 + (frames - 1) / temporal factor. Raises UserError
        with the nearest size that works.
        """
        temporal, spatial = self.factors
        nearest = (
            1 + max(0, round((frames - 1) / _CHUNK)) * _CHUNK,
            *(max(1, round(side / spatial)) * spatial for side in (height, width)),
        )
        if nearest != (frames, height, width):
            raise UserError(
                f"videos of {frames} frames of {height}x{width} pixels do not fit the VAE "
                f"{self.name}, which takes 1 + a multiple of {_CHUNK} frames"
                f" and sides that {spatial} divides; the nearest: {nearest[0]} frames of "
                f"{nearest[1]}x{nearest[2]}"
            )
        config: Any = self.model.config
        return int(config.z_dim), 1 + (frames - 1) // temporal, height // spatial, width // spatial

    @torch.inference_mode()
    def encode(self, videos: Tensor) -> Tensor:
        """videos: (B, 3, T, H, W) in [-1, 1]. The mean of the posterior, normalised, float32 (B, C, t, h,
        w). SPEC 6.6. One video at a time.
        """
        self.latent_shape(*videos.shape[2:])  # diffusers leaves out frames that fill no place, without a word
        model: Any = self.model
        latents = [
            model.encode(video.to(self.device, model.dtype)).latent_dist.mean.float()
            for video in videos.split(1)
        ]
        mean, std = self._statistics()
        return (torch.cat(latents) - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents: (B, C, t, h, w), normalised. Videos in [-1, 1], float32 (B, 3, T, H, W). One video at a
        time.
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
        """Mean and standard deviation of every channel, float32 (C, 1, 1, 1)."""
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
        subfolder: of the folder or name; None: itself, or `vae` where that is where one is (as in a
            pipeline).
        device, dtype: of the weights.
        scale, shift: instead of the configuration's scaling_factor and shift_factor.

    Raises:
        UserError: diffusers is missing; nothing of this name here or on the hub; another class than MODELS;
            weights that are not safetensors or are not those of the configuration; one that needs other
            images than RGB, or normalises channels one by one.
    """
    model, given = _open(name, subfolder, MODELS)
    config: Any = model.config
    if config.in_channels != 3:
        raise UserError(
            f"the VAE {name} takes images of {config.in_channels} channels; RGB images, 3, are what there is"
        )
    if given.get("latents_mean") is not None and (scale is None or shift is None):
        raise UserError(
            f"the VAE {name} normalises every channel by itself (latents_mean): give one --scale and "
            "one --shift for all"
        )
    own_shift = getattr(config, "shift_factor", None)
    found_scale = config.scaling_factor if scale is None else scale
    found_shift = (own_shift or 0.0) if shift is None else shift
    sha256 = _sha256(model)
    moved = nn.Module.to(
        model, device=device, dtype=dtype
    )  # the model's own `to` logs a line about modules that it does not have
    return Autoencoder(name, moved, sha256, float(found_scale), float(found_shift))


def load_video_vae(
    name: str,
    subfolder: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VideoAutoencoder:
    """Open an autoencoder of videos. Arguments and errors: see load_vae; its class is one of VIDEO_MODELS."""
    model, _ = _open(name, subfolder, VIDEO_MODELS)
    config: Any = model.config
    if config.in_channels != 3 * (config.patch_size or 1) ** 2:
        raise UserError(
            f"the VAE {name} takes videos of {config.in_channels} channels; RGB videos, 3, are what there is"
        )
    if not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
        found = (
            f"latents_mean for {len(config.latents_mean)} channels, latents_std for "
            f"{len(config.latents_std)}, and z_dim {config.z_dim}"
        )
        raise UserError(f"the {_CONFIG} of the VAE {name} has {found}: they must agree")
    if sum(config.temperal_downsample) > 2:
        raise UserError(
            f"the VAE {name} makes one of {2 ** sum(config.temperal_downsample)} frames; diffusers "
            f"encodes {_CHUNK} at a time"
        )
    sha256 = _sha256(model)
    return VideoAutoencoder(name, nn.Module.to(model, device=device, dtype=dtype), sha256)


def decode_latents(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w), shifted and scaled, to pixels uint8 (B, H, W, 3), on the VAE's device:
    clamp(127.5 x + 128), SPEC 4.3.
    """
    parts = [
        (127.5 * vae.decode(part) + 128).clamp(0, 255).to(torch.uint8)
        for part in latents.split(DECODED_AT_ONCE)
    ]
    return torch.cat(parts).permute(0, 2, 3, 1)


def decode_videos(vae: VideoAutoencoder, latents: Tensor) -> Tensor:
    """Latents (B, C, t, h, w), normalised, to pixels uint8 (B, T, H, W, 3), on the VAE's device:
    clamp(127.5 x + 128).
    """
    parts = [(127.5 * vae.decode(part) + 128).clamp(0, 255).to(torch.uint8) for part in latents.split(1)]
    return torch.cat(parts).permute(0, 2, 3, 4, 1)


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 on GPU, float32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def _open(name: str, subfolder: str | None, classes: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    """A model of one of these classes of diffusers, and its configuration as written."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(missing_extra("diffusers", "diffusion", f"the VAE {name}")) from error
    kind, given, place = _config(name, subfolder, classes)
    return _load(getattr(diffusers, kind), name, place), given


def _config(
    name: str, subfolder: str | None, classes: Sequence[str]
) -> tuple[str, dict[str, Any], str | None]:
    """Class, configuration and subfolder of an autoencoder."""
    from diffusers import AutoencoderKL

    local = Path(name).expanduser().is_dir()
    if not local and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise UserError(
            f"there is no folder {name}: --vae takes a folder written by save_pretrained, or a name "
            "like stabilityai/sd-vae-ft-ema"
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
            raise UserError(unknown_name("class", found.get("_class_name"), classes, of=f"the VAE {name}"))
        return str(found["_class_name"]), found, place
    where = (
        f"the folder {name} holds no VAE's {_CONFIG}"
        if local
        else f"the VAE {name} is no folder here and could not be fetched from the hub"
    )
    raise UserError(
        f"{where} ({reasons[0]}): give a folder written by save_pretrained, or a name like "
        "stabilityai/sd-vae-ft-ema"
    )


def _load(kind: Any, name: str, subfolder: str | None) -> nn.Module:
    try:
        with (
            _quiet(),
            torch.random.fork_rng(devices=[]),
        ):  # the model is first made with weights drawn at random
            model, info = kind.from_pretrained(
                _address(name),
                subfolder=subfolder,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except Exception as error:  # noqa: BLE001
        # of diffusers, safetensors, the hub, and torch for sizes that do not fit
        raise UserError(
            f"the weights of the VAE {name} cannot be read from a safetensors file ({_reason(error)})"
        ) from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:
        raise UserError(
            f"the weights of the VAE {name} are not those of its {_CONFIG}: {len(wrong)} are missing "
            f"or misshaped, e.g. {wrong[0]}"
        )
    return model.eval().requires_grad_(False)


def _address(name: str) -> str:
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers 0.42 hands huggingface_hub 2 an argument that it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _sha256(model: nn.Module) -> str:
    """The class, what of the configuration is not its default (so that another version of diffusers gives
    the same), and the weights as float32.
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
