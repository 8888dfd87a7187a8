"""Images to latent shards.

The same images and options give the same bytes on the same kind of device, however often the work was
interrupted.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mhla_lightning.data.encoders.vaes import Autoencoder, load_vae
from mhla_lightning.data.index import SPLITS, VAE, ShardIndex
from mhla_lightning.data.prepare.latents.devices import find_devices, find_dtype
from mhla_lightning.data.prepare.latents.encode import ImageEncoder
from mhla_lightning.data.prepare.latents.images import LabelledImages, open_images
from mhla_lightning.data.prepare.latents.shard import STORED, LatentTarget
from mhla_lightning.data.prepare.latents.work import (
    SETTINGS,
    LatentReport,
    LatentWork,
    demand_target,
    settings_of,
)
from mhla_lightning.data.prepare.pack import PackOptions, Progress, check_target, fingerprint_of
from mhla_lightning.data.prepare.replacing import Note, build
from mhla_lightning.errors import UserError

_BLOCK, _NPY_HEADER = 512, 128  # bytes, of a tar file and of an npy file


@dataclass(frozen=True)
class LatentOptions:
    """How images become latents.

    Args:
        vae: see vaes.load_vae, also for subfolder, scale and shift.
        subfolder: of the VAE.
        name: name of the VAE in the index and in recipes; None is `vae`.
        size: pixels a side after ADM's centre crop.
        batch_size: images at once.
        device: see devices.find_devices.
        dtype: see devices.find_dtype.
        moments: keep mean and log-variance of the posterior, to be drawn from anew in every epoch. False
            keeps one latent, drawn by (seed, index). None is True where the VAE has a posterior.
        flip: keep the mirrored image's latents too.
        scale: a latent z is used as (z - shift) * scale; None is the VAE's.
        shift: see scale.
        val: see pack.PackOptions, also for shards and seed.
        shards: number of training shards.
        seed: of the order and of the draws.
        workers: threads that read images, beside each device.
        max_skipped_share: of images that cannot be read or encoded; more of them end the work.
    """

    vae: str
    subfolder: str | None = None
    name: str | None = None
    size: int = 256
    batch_size: int = 32
    device: str = "auto"
    dtype: str | None = None
    moments: bool | None = None
    flip: bool = True
    scale: float | None = None
    shift: float | None = None
    val: int | float | None = None
    shards: int | None = None
    seed: int = 0
    workers: int = 1
    max_skipped_share: float = 0.01

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        for name in ("size", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise UserError(name, f"got {getattr(self, name)}; it must be at least 1")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise UserError("scale", f"got {self.scale}; it must be a finite number above 0")
        if self.shift is not None and not math.isfinite(self.shift):
            raise UserError("shift", f"got {self.shift}; it must be a finite number")
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError("max_skipped_share", f"got {self.max_skipped_share}; it must be from 0 to 1")
        PackOptions(shards=self.shards)


def make_latents(
    source: str | Path,
    to: str | Path,
    options: LatentOptions,
    *,
    overwrite: bool = False,
    wait: bool = True,
    on_progress: Progress | None = None,
    on_note: Note | None = None,
) -> LatentReport:
    """Write the latents of images as shards under `to`.

    Args:
        source: see images.open_images.
        to: the folder to make.
        options: how images become latents.
        overwrite: replace `to` if it holds splits, and work that another command has begun there.
        wait: see pack.pack, also for the arguments that follow.
        on_progress: called with a split, its samples done and its samples in all.
        on_note: called with remarks for the user.

    Raises:
        UserError: a bad argument, a VAE that cannot be opened or does not fit, or a target in use.
        DataError: a bad source.
        Interrupted: work that the same call can continue.
    """
    target = check_target(source, to)
    devices = find_devices(options.device)
    dtype = find_dtype(options.dtype, devices[0])
    vae = load_vae(options.vae, options.subfolder, scale=options.scale, shift=options.shift)
    described = _describe(vae, options)
    images = open_images(
        source,
        PackOptions(options.val, options.shards, options.seed),
        _sample_bytes(described, STORED[dtype].itemsize),
    )
    header = ShardIndex("latents", (), images.header.classes, vae=described)
    settings = _settings(options, header, images, dtype, devices[0])
    demand_target(target, dict.fromkeys(SPLITS, header), settings, overwrite)
    encoder = ImageEncoder(
        dtype,
        devices,
        options.workers,
        options.vae,
        options.subfolder,
        options.size,
        options.batch_size,
        options.seed,
    )
    targets = [LatentTarget(split.name, header, split, encoder) for split in images.splits]
    note = on_note or (lambda _: None)
    with build(
        target, fingerprint_of(settings), [split.name for split in targets], overwrite, wait, note
    ) as building:
        (building.folder / SETTINGS).write_text(json.dumps(settings))
        return LatentWork(
            building, targets, "images", options.max_skipped_share, on_progress or (lambda *_: None)
        ).run(note)


def _describe(vae: Autoencoder, options: LatentOptions) -> VAE:
    if options.moments and not vae.has_posterior:
        raise UserError(
            "moments",
            f"the VAE {options.vae} ({vae.kind}) has no posterior, so its latents are not drawn; "
            "leave it out",
        )
    moments = vae.has_posterior if options.moments is None else options.moments
    shape = vae.latent_shape(options.size)
    return VAE(
        options.name or options.vae, vae.scale, vae.shift, shape, vae.kind, vae.sha256, moments, options.flip
    )


def _sample_bytes(vae: VAE, itemsize: int) -> int:
    """Return the bytes of a sample in a tar file."""
    array = _BLOCK + -(-(_NPY_HEADER + math.prod(vae.shape) * itemsize) // _BLOCK) * _BLOCK
    return array * (1 + bool(vae.flipped)) * (1 + bool(vae.moments)) + 2 * _BLOCK


def _settings(
    options: LatentOptions, header: ShardIndex, images: LabelledImages, dtype: str, device: str
) -> dict[str, Any]:
    """Return the facts that decide which bytes are written, for the user to read."""
    assert header.vae is not None
    vae = {key: value for key, value in asdict(header.vae).items() if key not in ("mean", "std")}
    chosen = {name: getattr(options, name) for name in ("size", "batch_size", "val", "shards", "seed")}
    facts = {"vae": vae.pop("name"), **vae, **chosen, "classes": header.classes, "source": images.fingerprint}
    return settings_of(facts, dtype, device, ("torch", "diffusers"))
