"""A shard of images to a shard of latents. What is written depends on the shard alone, not on what was encoded before it or by which process."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mhla_lightning.data.index import VAE, ShardEntry, ShardIndex
from mhla_lightning.data.kinds.latents import FLIPPED, LATENT, LOGVAR, draw
from mhla_lightning.data.skips import JUDGED_AFTER, BadSample
from mhla_lightning.data.tools.latents.devices import DTYPES, own_device
from mhla_lightning.data.tools.latents.images import Picture, picture
from mhla_lightning.data.tools.pack import PlannedSplit
from mhla_lightning.data.tools.replacing import Building, sync
from mhla_lightning.data.tools.samples import Sample, latent_sample, npy_bytes
from mhla_lightning.data.vaes import Autoencoder, load_vae
from mhla_lightning.errors import DataError, UserError
from mhla_lightning.keyed import generator

# float16 holds every bfloat16 number from 6e-5 to 65,504 exactly (numpy knows no bfloat16), so what bf16 encoding gave is not rounded again; of fp32
# encoding float32 is kept.
STORED: dict[str, np.dtype] = {"bf16": np.dtype("<f2"), "fp32": np.dtype("<f4")}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoding:
    """How images become latents.

    vae, subfolder: see vaes.load_vae. size: pixels a side. dtype: of devices.DTYPES. seed: of the draws where moments are not kept.
    threads: that read and crop images, beside each device.
    """

    vae: str
    subfolder: str | None
    size: int
    batch_size: int
    dtype: str
    seed: int
    devices: tuple[str, ...]
    threads: int


@dataclass
class Tally:
    """What is known of a shard's latents. values: of every channel; sums, squares: of the latents as they are used and of their squares, (C,).

    skipped: [name, reason] of the images left out.
    """

    values: int = 0
    sums: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, latents: np.ndarray, logvar: np.ndarray | None, vae: VAE) -> None:
        """latents: (B, C, h, w) as stored; with their log-variance what is drawn from the posterior is counted."""
        used = (latents.astype(np.float64) - vae.shift) * vae.scale
        variance = 0.0 if logvar is None else np.exp(logvar.astype(np.float64)) * vae.scale**2
        added = used.sum(axis=(0, 2, 3)), (used**2 + variance).sum(axis=(0, 2, 3))
        self.values += used[:, 0].size
        self.sums, self.squares = (
            (np.array(old) + new).tolist() if old else new.tolist() for old, new in zip((self.sums, self.squares), added, strict=True)
        )


class Job(NamedTuple):
    """A shard to write. number: of the shard in its split."""

    building: Building
    header: ShardIndex
    split: str
    images: Iterable[Sample]
    first: int
    name: str
    encoding: Encoding


class Done(NamedTuple):
    """A shard that is written."""

    split: str
    entry: ShardEntry
    tally: Tally


def make_jobs(building: Building, header: ShardIndex, split: PlannedSplit, names: dict[int, str], encoding: Encoding) -> Iterator[Job]:
    """A job for each of the shards of `split` in `names`, by number."""
    for shard, name in names.items():
        first = split.start(shard)
        yield Job(building, header, split.name, split.part.take(split.order[first : split.start(shard + 1)]), first, name, encoding)


def encode_shard(job: Job, on_images: Callable[[str, int], None] | None = None) -> Done:
    """Write a shard and its tally. on_images: told of the split and of how many images more are done.

    Raises UserError when the device has too little memory for the batch, DataError when the VAE is not the header's or nothing can be encoded.
    """
    tally = Tally()
    vae = _opened(job.encoding, own_device(job.building.folder, job.encoding.devices), str(job.header.vae and job.header.vae.sha256))
    entry = job.building.write(job.split, job.name, job.header.kind, _latents(job, vae, tally, on_images or (lambda *_: None)), job.first)
    return Done(job.split, entry, tally)


def finished_shard(building: Building, split: str, name: str) -> Done | None:
    """A shard that an earlier call finished, else None."""
    entry = building.finished(split, name)
    if entry is None:
        return None
    try:
        return Done(split, entry, Tally(**json.loads(_tally_path(building, split, name).read_text())))
    except (OSError, ValueError, TypeError):
        return None


@lru_cache(maxsize=1)
def _opened(encoding: Encoding, device: str, sha256: str) -> Autoencoder:
    vae = load_vae(encoding.vae, encoding.subfolder, device, DTYPES[encoding.dtype])
    if vae.sha256 != sha256:
        raise DataError(f"the weights of the VAE {encoding.vae} changed while latents were made: begin again with --overwrite")
    return vae


def _latents(job: Job, vae: Autoencoder, tally: Tally, on_images: Callable[[str, int], None]) -> Iterator[Sample]:
    """Samples to write. At the end the tally stands beside the shard, before Building.write calls it finished."""
    seen = 0
    with ThreadPoolExecutor(job.encoding.threads) as pool:
        for batch in _pictures(job, pool):
            good = []
            for number, (name, found) in enumerate(batch, start=job.first + seen):
                if isinstance(found, Picture):
                    good.append((number, found))
                else:
                    _skip(job, tally, name, str(found))
            if good:
                yield from _encode(job, vae, good, tally)
            seen += len(batch)
            if len(tally.skipped) == seen >= JUDGED_AFTER:
                raise DataError(f"none of the first {seen} images of {job.split} gives a latent; {tally.skipped[-1][0]}: {tally.skipped[-1][1]}")
            on_images(job.split, len(batch))
    path = _tally_path(job.building, job.split, job.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(tally)))
    sync(path)


def _pictures(job: Job, pool: ThreadPoolExecutor) -> Iterator[list[tuple[str, Picture | BadSample]]]:
    """(name, picture) of all images in batches; one batch is read ahead of the device."""
    images = iter(job.images)
    classes = len(job.header.classes)

    def begin() -> list[tuple[str, Future[Picture | BadSample]]]:
        return [(image.name, pool.submit(picture, image, job.encoding.size, classes)) for image in islice(images, job.encoding.batch_size)]

    batch = begin()
    while batch:
        ahead = begin()
        yield [(name, future.result()) for name, future in batch]
        batch = ahead


def _encode(job: Job, vae: Autoencoder, pictures: list[tuple[int, Picture]], tally: Tally) -> Iterator[Sample]:
    """pictures: with their number in the split."""
    wanted = job.header.vae
    assert wanted is not None
    pixels = torch.from_numpy(np.stack([found.pixels for _, found in pictures])).permute(0, 3, 1, 2).contiguous()
    images = pixels.float() / 127.5 - 1
    arrays: dict[str, np.ndarray] = {}
    for name in (LATENT, FLIPPED) if wanted.flipped else (LATENT,):
        arrays |= _posterior(job, vae, name, images if name == LATENT else images.flip(-1), [number for number, _ in pictures])
    finite = np.logical_and.reduce([np.isfinite(array).all(axis=(1, 2, 3)) for array in arrays.values()])
    for row in np.flatnonzero(~finite):
        _skip(job, tally, pictures[row][1].name, f"its latent holds NaN or values that {STORED[job.encoding.dtype]} does not reach")
    for name in (LATENT, FLIPPED):
        if name in arrays and finite.any():
            logvar = arrays.get(LOGVAR[name])
            tally.add(arrays[name][finite], None if logvar is None else logvar[finite], wanted)
    for row in np.flatnonzero(finite):
        found = pictures[row][1]
        sample = latent_sample(job.header, found.name, arrays[LATENT][row], label=found.label)
        more = {f"{name}.npy": npy_bytes(array[row]) for name, array in arrays.items() if name != LATENT}
        yield replace(sample, members=sample.members | more | ({"json": found.json} if found.json is not None else {}))


def _posterior(job: Job, vae: Autoencoder, name: str, images: torch.Tensor, numbers: list[int]) -> dict[str, np.ndarray]:
    """The members of a batch, (B, C, h, w) each: mean and log-variance, or one latent, drawn where the encoder gives a distribution."""
    stored = STORED[job.encoding.dtype]
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            mean, logvar = (None if found is None else found.cpu().numpy() for found in vae.encode(images))
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device has too little memory for --batch-size {job.encoding.batch_size}: choose a smaller one") from error
    assert mean is not None
    if logvar is not None and not (job.header.vae and job.header.vae.moments):
        keys = [(job.encoding.seed, "posterior", job.split, number, name) for number in numbers]
        mean = np.stack([draw(one, its, generator(*key)) for one, its, key in zip(mean, logvar, keys, strict=True)])
        logvar = None
    arrays = {name: mean} | ({LOGVAR[name]: logvar} if logvar is not None else {})
    with np.errstate(over="ignore"):  # an infinite value is told by the image's name
        return {key: array.astype(stored) for key, array in arrays.items()}


def _skip(job: Job, tally: Tally, name: str, reason: str) -> None:
    tally.skipped.append((name, reason))
    _log.warning("skipped %s of %s: %s", name, job.split, reason)


def _tally_path(building: Building, split: str, name: str) -> Path:
    return building.folder / "tallies" / split / f"{name}.json"
