"""Images to latent shards, with their classes or with the features of their captions.

The same images and options give the same bytes on the same kind of device, however often the work was
interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mhla_lightning.data.encoders.vaes import Autoencoder, load_vae
from mhla_lightning.data.index import SPLITS, VAE, ShardIndex
from mhla_lightning.data.prepare.latents.captioned import CaptionOptions, CaptionSurvey, open_captioned
from mhla_lightning.data.prepare.latents.captions import (
    EncodedTexts,
    describe_text,
    text_bytes,
    text_packages,
)
from mhla_lightning.data.prepare.latents.devices import find_devices, find_dtype
from mhla_lightning.data.prepare.latents.encode import ImageEncoder
from mhla_lightning.data.prepare.latents.images import open_images, shards_for
from mhla_lightning.data.prepare.latents.shard import STORED, LatentTarget
from mhla_lightning.data.prepare.latents.work import (
    LatentPlan,
    LatentReport,
    make_planned,
    settings_of,
)
from mhla_lightning.data.prepare.pack import PackOptions, Progress, check_target
from mhla_lightning.data.prepare.replacing import Note
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
        flip: keep the mirrored image's latents too; None is True for images with classes, and False for
            images with captions, which may say left and right.
        scale: a latent z is used as (z - shift) * scale; None is the VAE's.
        shift: see scale.
        val: see pack.PackOptions, also for shards and seed.
        shards: number of training shards.
        seed: of the order and of the draws.
        workers: threads that read images, beside each device.
        max_skipped_share: of images that cannot be read or encoded; more of them end the work.
        text: the captions of the images, and what encodes them; None for images with classes.
    """

    vae: str
    subfolder: str | None = None
    name: str | None = None
    size: int = 256
    batch_size: int = 32
    device: str = "auto"
    dtype: str | None = None
    moments: bool | None = None
    flip: bool | None = None
    scale: float | None = None
    shift: float | None = None
    val: int | float | None = None
    shards: int | None = None
    seed: int = 0
    workers: int = 1
    max_skipped_share: float = 0.01
    text: CaptionOptions | None = None

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
        source: see images.open_images or, for captions, captioned.open_captioned.
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
    described = _describe(
        load_vae(options.vae, options.subfolder, scale=options.scale, shift=options.shift), options
    )
    packing = PackOptions(options.val, options.shards, options.seed)
    if options.text is None:
        plan = _plan_labelled(source, options, packing, described, dtype, devices)
        return make_planned(target, plan, overwrite, wait, on_progress, on_note)
    work = _CaptionedWork(source, options, packing, described, dtype, devices, on_note)
    report = make_planned(target, work.plan(), overwrite, wait, on_progress, on_note)
    report.uncaptioned = work.found.left_out
    return report


def _plan_labelled(
    source: str | Path,
    options: LatentOptions,
    packing: PackOptions,
    vae: VAE,
    dtype: str,
    devices: tuple[str, ...],
) -> LatentPlan:
    """Plan the latents of images with classes."""
    images = open_images(source, packing, _sample_bytes(vae, STORED[dtype].itemsize))
    header = ShardIndex("latents", (), images.header.classes, vae=vae)
    encoder = _encoder(options, dtype, devices)
    return LatentPlan(
        "images",
        dict.fromkeys(SPLITS, header),
        [split.name for split in images.splits],
        _settings(options, header, images.fingerprint, dtype, devices[0]),
        dtype,
        devices,
        options.max_skipped_share,
        None,
        lambda _: [LatentTarget(split.name, header, split, encoder) for split in images.splits],
    )


class _CaptionedWork:
    """The planning of the latents of images with captions.

    Args:
        source, options: see make_latents.
        packing: shards and the held-out part.
        vae: that makes the latents.
        dtype: of devices.DTYPES.
        devices: see devices.find_devices.
        on_note: called with remarks for the user.

    Attributes:
        found: what the pass over the captions finds; empty before.
    """

    def __init__(
        self,
        source: str | Path,
        options: LatentOptions,
        packing: PackOptions,
        vae: VAE,
        dtype: str,
        devices: tuple[str, ...],
        on_note: Note | None,
    ) -> None:
        assert options.text is not None
        self.options, self.packing, self.dtype, self.devices = options, packing, dtype, devices
        self.chosen = options.text
        self.images = open_captioned(source, packing, self.chosen)
        self.text = describe_text(
            self.chosen.text_encoder, self.chosen.tokens, dtype, self.chosen.instruction
        )
        self.header = ShardIndex("latents", (), vae=vae, text=self.text)
        self.note = on_note or (lambda _: None)
        self.found = CaptionSurvey()

    def plan(self) -> LatentPlan:
        return LatentPlan(
            "images",
            dict.fromkeys(SPLITS, self.header),
            self.images.names,
            _settings(self.options, self.header, self.images.fingerprint, self.dtype, self.devices[0]),
            self.dtype,
            self.devices,
            self.options.max_skipped_share,
            self._captions,
            self._targets,
            self.chosen.long_captions == "cut",
        )

    def _captions(self) -> Mapping[str, str]:
        self.note(f"captions: {self.images.origin}")
        self.found = self.images.survey(self.chosen)
        for line in self.found.remarks():
            self.note(line)
        return self.found.captions

    def _targets(self, texts: EncodedTexts | None) -> list[LatentTarget]:
        assert texts is not None
        assert self.header.vae is not None
        size = _sample_bytes(self.header.vae, STORED[self.dtype].itemsize) + text_bytes(self.text)
        encoder = replace(_encoder(self.options, self.dtype, self.devices), features=texts.features)
        header = texts.described(self.header)
        return [
            LatentTarget(
                split.name, header, replace(split, shards=shards_for(split, self.packing, size)), encoder
            )
            for split in self.found.splits
        ]


def _encoder(options: LatentOptions, dtype: str, devices: tuple[str, ...]) -> ImageEncoder:
    return ImageEncoder(
        dtype,
        devices,
        options.workers,
        options.vae,
        options.subfolder,
        options.size,
        options.batch_size,
        options.seed,
    )


def _describe(vae: Autoencoder, options: LatentOptions) -> VAE:
    if options.moments and not vae.has_posterior:
        raise UserError(
            "moments",
            f"the VAE {options.vae} ({vae.kind}) has no posterior, so its latents are not drawn; "
            "leave it out",
        )
    moments = vae.has_posterior if options.moments is None else options.moments
    shape = vae.latent_shape(options.size)
    flip = options.text is None if options.flip is None else options.flip
    return VAE(options.name or options.vae, vae.scale, vae.shift, shape, vae.kind, vae.sha256, moments, flip)


def _sample_bytes(vae: VAE, itemsize: int) -> int:
    """Return the bytes of a sample in a tar file."""
    array = _BLOCK + -(-(_NPY_HEADER + math.prod(vae.shape) * itemsize) // _BLOCK) * _BLOCK
    return array * (1 + bool(vae.flipped)) * (1 + bool(vae.moments)) + 2 * _BLOCK


def _settings(
    options: LatentOptions, header: ShardIndex, source: str, dtype: str, device: str
) -> dict[str, Any]:
    """Return the facts that decide which bytes are written, for the user to read.

    Args:
        options: how images become latents.
        header: of all splits.
        source: fingerprint of the images.
        dtype: of devices.DTYPES.
        device: of torch.
    """
    assert header.vae is not None
    vae = {key: value for key, value in asdict(header.vae).items() if key not in ("mean", "std")}
    chosen = {name: getattr(options, name) for name in ("size", "batch_size", "val", "shards", "seed")}
    facts = {"vae": vae.pop("name"), **vae, **chosen, "classes": header.classes, "source": source}
    packages = ["torch", "diffusers"]
    if header.text is not None and options.text is not None:
        facts |= {f"text {key}": value for key, value in header.text.facts().items()}
        names = ("key", "uncaptioned", "long_captions")
        facts |= {f"text {name}": getattr(options.text, name) for name in names}
        packages += text_packages(header.text)
    return settings_of(facts, dtype, device, packages)
