"""Images to latent shards: the same images and options give the same bytes on the same kind of device, however often it was interrupted."""

from __future__ import annotations

import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhla_lightning.data.index import SPLITS, VAE, ShardIndex, read_index
from mhla_lightning.data.skips import JUDGED_AFTER
from mhla_lightning.data.tools.latents.devices import find_devices, find_dtype
from mhla_lightning.data.tools.latents.encode import STORED, Done, Encoding, Job, Tally, encode_shard, finished_shard, make_jobs
from mhla_lightning.data.tools.latents.images import Images, open_images
from mhla_lightning.data.tools.pack import Options, Progress, check_target, fingerprint_of
from mhla_lightning.data.tools.parallel import Interrupted, run_jobs
from mhla_lightning.data.tools.replacing import Building, Note, build, demand_free
from mhla_lightning.data.tools.shards import shard_name
from mhla_lightning.data.vaes import Autoencoder, load_vae
from mhla_lightning.errors import DataError, UserError

_BLOCK, _NPY_HEADER = 512, 128  # bytes, of a tar file and of an npy file
_SETTINGS = "latents.json"


@dataclass(frozen=True)
class LatentOptions:
    """How images become latents.

    vae, subfolder, scale, shift: see vaes.load_vae. name: what the index and recipes call the VAE; None is `vae`. size: pixels a side after ADM's
    centre crop. batch_size: images at once. device, dtype: see devices.find_devices and find_dtype. moments: keep mean and log-variance of the
    posterior, to be drawn from anew in every epoch; False draws one latent by (seed, index); None is True where the VAE has a posterior.
    flip: keep the mirrored image's latents too. val, shards, seed: see pack.Options. threads: that read images beside each device.
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
        Options(shards=self.shards)


@dataclass
class Report:
    """indices: by split, the statistics in their `vae`. skipped: (split, name, reason). images: encoded by this call in `seconds`."""

    indices: dict[str, ShardIndex] = field(default_factory=dict)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    images: int = 0
    seconds: float = 0.0


def make_latents(
    source: str | Path,
    to: str | Path,
    options: LatentOptions,
    *,
    overwrite: bool = False,
    wait: bool = True,
    on_progress: Progress | None = None,
    on_note: Note | None = None,
) -> Report:
    """Write the latents of the images of `source` (see images.open_images) as shards under `to`.

    overwrite: replace `to` if it holds splits, and what another command has begun there. wait, on_progress, on_note: see pack.
    Raises UserError for a bad argument, a VAE that cannot be opened or does not fit, and a target in use; DataError for a bad source; Interrupted for
    what the same call can continue.
    """
    target = _target(source, to)
    devices = find_devices(options.device)
    dtype = find_dtype(options.dtype, devices[0])
    vae = load_vae(options.vae, options.subfolder, scale=options.scale, shift=options.shift)
    described = _describe(vae, options)
    images = open_images(source, Options(options.val, options.shards, options.seed), _sample_bytes(described, STORED[dtype].itemsize))
    header = ShardIndex("latents", (), images.header.classes, vae=described)
    settings = _settings(options, header, images, dtype, devices[0])
    _demand_free(target, header, settings, overwrite)
    encoding = Encoding(options.vae, options.subfolder, options.size, options.batch_size, dtype, options.seed, devices, options.threads)
    note = on_note or (lambda _: None)
    with build(target, fingerprint_of(settings), [split.name for split in images.splits], overwrite, wait, note) as building:
        (building.folder / _SETTINGS).write_text(json.dumps(settings))
        work = _Work(building, header, images, encoding, options.max_skipped_share, on_progress or (lambda *_: None))
        return work.run(note)


class _Work:
    """All shards of a target in the making."""

    def __init__(self, building: Building, header: ShardIndex, images: Images, encoding: Encoding, limit: float, on_progress: Progress) -> None:
        self.building, self.header, self.images, self.encoding, self.limit = building, header, images, encoding, limit
        self.names = {split.name: [shard_name(split.name, shard) for shard in range(split.shards)] for split in images.splits}
        self.planned = {
            (split.name, name): split.start(shard + 1) - split.start(shard)
            for split in images.splits
            for shard, name in enumerate(self.names[split.name])
        }
        self.done: dict[tuple[str, str], Done] = {}
        self._seen = dict.fromkeys(self.names, 0)
        self._on_progress = on_progress

    def run(self, note: Note) -> Report:
        """Encode what is not finished, and write the indices."""
        for split, names in self.names.items():
            found = {name: finished_shard(self.building, split, name) for name in names}
            self.done |= {(split, name): shard for name, shard in found.items() if shard is not None}
            self._advance(split, sum(self.planned[split, name] for name, shard in found.items() if shard is not None))
        kept = len(self.done)
        if kept:
            note(f"{kept} of {len(self.planned)} shards were finished before and are kept")
        report, start = Report(), time.perf_counter()
        report.images = self._encode()
        report.seconds = time.perf_counter() - start
        for split, names in self.names.items():
            shards = [self.done[split, name] for name in names]
            report.indices[split] = _index(self.header, shards)
            self.building.write_index(split, report.indices[split])
            report.skipped += [(split, *skipped) for shard in shards for skipped in shard.tally.skipped]
        return report

    def _encode(self) -> int:
        """Images that were read."""
        alone = len(self.encoding.devices) == 1
        work: Callable[[Job], Done] = partial(encode_shard, on_images=self._advance) if alone else encode_shard
        before = sum(self._seen.values())
        try:
            with closing(run_jobs(work, self._jobs(), len(self.encoding.devices))) as results:
                for shard in results:
                    self.done[shard.split, shard.entry.name] = shard
                    self._judge()
                    if not alone:
                        self._advance(shard.split, self.planned[shard.split, shard.entry.name])
        except Interrupted:
            raise
        except UserError as error:
            if self.done:  # hours of work may be finished: it is kept for when the mistake is mended
                raise Interrupted(str(error)) from error
            raise
        return sum(self._seen.values()) - before

    def _jobs(self) -> Iterator[Job]:
        return chain.from_iterable(
            make_jobs(
                self.building,
                self.header,
                split,
                {shard: name for shard, name in enumerate(self.names[split.name]) if (split.name, name) not in self.done},
                self.encoding,
            )
            for split in self.images.splits
        )

    def _advance(self, split: str, images: int) -> None:
        self._seen[split] += images
        self._on_progress(split, self._seen[split], sum(count for (name, _), count in self.planned.items() if name == split))

    def _judge(self) -> None:
        """Raise DataError when more images were skipped than may be."""
        read = sum(self.planned[key] for key in self.done)
        skipped = [(split, *one) for (split, _), shard in self.done.items() for one in shard.tally.skipped]
        if skipped and (read >= JUDGED_AFTER or len(self.done) == len(self.planned)) and len(skipped) > self.limit * read:
            split, name, reason = skipped[-1]
            found = f"{len(skipped)} of {read} images ({len(skipped) / read:.1%}) give no latent"
            raise DataError(f"{found}, more than --max-skipped-share {self.limit:g} allows; the last is {name} of {split} ({reason})")


def _target(source: str | Path, to: str | Path) -> Path:
    try:
        return check_target(source, to)
    except UserError as error:
        raise UserError(str(error).removeprefix("--to ")) from error  # here it is no option


def _describe(vae: Autoencoder, options: LatentOptions) -> VAE:
    if options.moments and not vae.has_posterior:
        raise UserError(f"--moments: the VAE {options.vae} ({vae.kind}) has no posterior, its latents are not drawn; leave --moments out")
    moments = vae.has_posterior if options.moments is None else options.moments
    shape = vae.latent_shape(options.size)
    return VAE(options.name or options.vae, vae.scale, vae.shift, shape, vae.kind, vae.sha256, moments, options.flip)


def _sample_bytes(vae: VAE, itemsize: int) -> int:
    """What a sample takes in a tar file."""
    array = _BLOCK + -(-(_NPY_HEADER + math.prod(vae.shape) * itemsize) // _BLOCK) * _BLOCK
    return array * (1 + bool(vae.flipped)) * (1 + bool(vae.moments)) + 2 * _BLOCK


def _settings(options: LatentOptions, header: ShardIndex, images: Images, dtype: str, device: str) -> dict[str, Any]:
    """What decides which bytes are written, in words."""
    assert header.vae is not None
    vae = {key: value for key, value in asdict(header.vae).items() if key not in ("mean", "std")}
    chosen = {name: getattr(options, name) for name in ("size", "batch_size", "val", "shards", "seed")}
    where = {"dtype": dtype, "device": torch.device(device).type}
    versions = {package: importlib.metadata.version(package) for package in ("torch", "diffusers")}
    facts = {"vae": vae.pop("name"), **vae, **chosen, **where, **versions, "classes": header.classes, "source": images.fingerprint}
    return json.loads(json.dumps(facts))


def _demand_free(target: Path, header: ShardIndex, settings: dict[str, Any], overwrite: bool) -> None:
    """Raise UserError when the target holds, or is being made of, other latents; or anything at all."""
    if overwrite:
        return
    with suppress(DataError, StopIteration):
        found = read_index(next(target / name for name in SPLITS if (target / name).is_dir()))
        assert header.vae is not None
        if found.vae is None or not header.vae.fits(found.vae):
            what = f"latents of {found.vae}" if found.vae else found.kind
            raise UserError(f"{target} holds {what}, and these would be of {header.vae}: choose another folder, or pass --overwrite")
    demand_free(target, overwrite)
    with suppress(OSError, ValueError):
        begun = json.loads((target.parent / f".{target.name}.packing" / _SETTINGS).read_text())
        other = [f"{name} {begun.get(name)} instead of {value}" for name, value in settings.items() if begun.get(name) != value]
        if other:
            raise UserError(
                f"{target} was begun with {', '.join(other)[:500]}: run that command again to finish it, choose another folder, or pass --overwrite"
            )


def _index(header: ShardIndex, shards: Sequence[Done]) -> ShardIndex:
    """The index of a split, with the statistics of its latents."""
    assert header.vae is not None
    tallies: list[Tally] = [shard.tally for shard in shards if shard.tally.values]
    values = sum(tally.values for tally in tallies)
    if not values:
        raise DataError(f"no image of {shards[0].split} gives a latent; {': '.join(shards[0].tally.skipped[0])}")
    mean, square = (np.sum([getattr(tally, name) for tally in tallies], axis=0) / values for name in ("sums", "squares"))
    std = np.sqrt(np.maximum(square - mean**2, 0))
    vae = replace(header.vae, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    return replace(header, shards=tuple(shard.entry for shard in shards), vae=vae)
