"""LabelledImages to latent shards: the same images and options give the same bytes on the same kind of device,
however often it was interrupted.
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
    find_target,
    settings_of,
)
from mhla_lightning.data.prepare.pack import PackOptions, Progress, fingerprint_of
from mhla_lightning.data.prepare.replacing import Note, build
from mhla_lightning.errors import UserError

_BLOCK, _NPY_HEADER = 512, 128  # bytes, of a tar file and of an npy file


@dataclass(frozen=True)
class LatentOptions:
    """How images become latents.

    vae, subfolder, scale, shift: see vaes.load_vae. name: what the index and recipes call the VAE; None is
        `vae`. size: pixels a side after ADM's
    centre crop. batch_size: images at once. device, dtype: see devices.find_devices and find_dtype. moments:
        keep mean and log-variance of the
    posterior, to be drawn from anew in every epoch; False draws one latent by (seed, index); None is True
    where the VAE has a posterior.
    flip: keep the mirrored image's latents too. val, shards, seed: see pack.PackOptions. threads: that read
        images beside each device.
    max_skipped_share: of images that cannot be read or encoded; more ends the work.
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
    threads: int = 1
    max_skipped_share: float = 0.01

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        for name in ("size", "batch_size", "threads"):
            if getattr(self, name) < 1:
                option = "--workers" if name == "threads" else f"--{name.replace('_', '-')}"
                raise UserError(f"{option} is {getattr(self, name)}; it must be at least 1")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise UserError(f"--scale is {self.scale}; it must be a finite number above 0")
        if self.shift is not None and not math.isfinite(self.shift):
            raise UserError(f"--shift is {self.shift}; it must be a finite number")
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError(f"--max-skipped-share is {self.max_skipped_share}; it must be from 0 to 1")
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
    """Write the latents of the images of `source` (see images.open_images) as shards under `to`.

    overwrite: replace `to` if it holds splits, and what another command has begun there. wait, on_progress,
        on_note: see pack.
    Raises UserError for a bad argument, a VAE that cannot be opened or does not fit, and a target in use;
    DataError for a bad source; Interrupted for what the same call can continue.
    """
    target = find_target(source, to)
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
        options.threads,
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
            f"--moments: the VAE {options.vae} ({vae.kind}) has no posterior, its latents are not "
            "drawn; leave --moments out"
        )
    moments = vae.has_posterior if options.moments is None else options.moments
    shape = vae.latent_shape(options.size)
    return VAE(
        options.name or options.vae, vae.scale, vae.shift, shape, vae.kind, vae.sha256, moments, options.flip
    )


def _sample_bytes(vae: VAE, itemsize: int) -> int:
    """What a sample takes in a tar file."""
    array = _BLOCK + -(-(_NPY_HEADER + math.prod(vae.shape) * itemsize) // _BLOCK) * _BLOCK
    return array * (1 + bool(vae.flipped)) * (1 + bool(vae.moments)) + 2 * _BLOCK


def _settings(
    options: LatentOptions, header: ShardIndex, images: LabelledImages, dtype: str, device: str
) -> dict[str, Any]:
    """What decides which bytes are written, in words."""
    assert header.vae is not None
    vae = {key: value for key, value in asdict(header.vae).items() if key not in ("mean", "std")}
    chosen = {name: getattr(options, name) for name in ("size", "batch_size", "val", "shards", "seed")}
    facts = {"vae": vae.pop("name"), **vae, **chosen, "classes": header.classes, "source": images.fingerprint}
    return settings_of(facts, dtype, device, ("torch", "diffusers"))
