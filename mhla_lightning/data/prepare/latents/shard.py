"""A shard of latents in the making, of images or of videos.

Its bytes depend on the shard alone, not on the shards that were encoded before it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mhla_lightning.data.index import VAE, ShardIndex
from mhla_lightning.data.prepare.latents.devices import own_device
from mhla_lightning.data.prepare.pack import PlannedSplit
from mhla_lightning.data.prepare.replacing import Building
from mhla_lightning.data.prepare.samples import Sample
from mhla_lightning.data.prepare.shards import shard_name
from mhla_lightning.data.prepare.tallies import Done, write_tallied

# numpy has no bfloat16. float16 holds every bfloat16 number from 6e-5 to 65,504 exactly, so bf16 latents are
# not rounded again.
STORED: dict[str, np.dtype] = {"bf16": np.dtype("<f2"), "fp32": np.dtype("<f4")}
OnSamples = Callable[[str, int], None]  # called with the split and the number of newly done samples
_log = logging.getLogger(__name__)


@dataclass
class LatentTally:
    """Facts about a shard of latents.

    Args:
        values: number of values of each channel.
        sums: sums of the latents as they are used, (C,).
        squares: sums of their squares, (C,).
        skipped: (name, reason) of samples that were left out.
    """

    values: int = 0
    sums: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, latents: np.ndarray, logvar: np.ndarray | None, vae: VAE) -> None:
        """Count a batch of latents.

        Args:
            latents: (B, C, ...) as stored.
            logvar: log-variances of the same shape, to count draws from the posterior; or None.
            vae: its shift and scale turn stored latents into used ones.
        """
        used = (latents.astype(np.float64) - vae.shift) * vae.scale
        variance = 0.0 if logvar is None else np.exp(logvar.astype(np.float64)) * vae.scale**2
        axes = (0, *range(2, latents.ndim))
        added = used.sum(axis=axes), (used**2 + variance).sum(axis=axes)
        self.values += used[:, 0].size
        self.sums, self.squares = (
            (np.array(old) + new).tolist() if old else new.tolist()
            for old, new in zip((self.sums, self.squares), added, strict=True)
        )

    def skip(self, split: str, name: str, reason: str) -> None:
        """Leave a sample out."""
        self.skipped.append((name, reason))
        _log.warning("skipped %s of %s: %s", name, split, reason)


@dataclass(frozen=True)
class ShardEncoder(ABC):
    """A way to turn samples into latents. Can be pickled.

    Args:
        dtype: of devices.DTYPES.
        devices: see devices.find_devices.
        threads: that read and decode, beside each device.
    """

    dtype: str
    devices: tuple[str, ...]
    threads: int

    @abstractmethod
    def latents(
        self, job: LatentJob, device: str, tally: LatentTally, on_samples: OnSamples
    ) -> Iterator[Sample]:
        """Yield the samples to write, encoded on `device`. The models are opened at once.

        Raises UserError, DataError.
        """


class LatentTarget(NamedTuple):
    """A split to make.

    Args:
        name: SPLIT, or BUCKET/SPLIT.
        header: an index that describes its latents.
        source: the samples to encode.
        encoder: that makes the latents.
    """

    name: str
    header: ShardIndex
    source: PlannedSplit
    encoder: ShardEncoder

    @property
    def shards(self) -> list[str]:
        """The names of its shards."""
        return [shard_name(self.source.name, number) for number in range(self.source.shards)]

    def samples(self, shard: int) -> int:
        """Return the number of samples of shard number `shard`, if all of them can be encoded."""
        return self.source.start(shard + 1) - self.source.start(shard)


class LatentJob(NamedTuple):
    """A shard to write.

    Args:
        building: of the target.
        header: an index that describes the latents.
        split: folder of the shard below the target.
        samples: to encode.
        first: index in the split of the first sample.
        name: file name of the shard.
        encoder: that makes the latents.
    """

    building: Building
    header: ShardIndex
    split: str
    samples: Iterable[Sample]
    first: int
    name: str
    encoder: ShardEncoder


def make_jobs(building: Building, target: LatentTarget, wanted: Iterable[int]) -> Iterator[LatentJob]:
    """Yield a job for each of the wanted shards of a split, given by number."""
    split = target.source
    for shard in wanted:
        first = split.start(shard)
        samples = split.part.take(split.order[first : split.start(shard + 1)])
        yield LatentJob(
            building, target.header, target.name, samples, first, target.shards[shard], target.encoder
        )


def encode_shard(job: LatentJob, on_samples: OnSamples | None = None) -> Done[LatentTally]:
    """Write a shard and its tally.

    Raises:
        UserError: the device has too little memory.
        DataError: the VAE is not the header's.
    """
    tally = LatentTally()
    device = own_device(job.building.folder, job.encoder.devices)
    latents = job.encoder.latents(job, device, tally, on_samples or (lambda *_: None))
    return write_tallied(job.building, job.split, job.name, job.header.kind, latents, tally, job.first)
