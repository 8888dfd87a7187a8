"""Shards of clips.

The bytes of a shard depend on the shard alone, not on the process that writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from mhla_lightning.data.encoders.videos import encode_mp4
from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.prepare.clips.frames import read_clips
from mhla_lightning.data.prepare.clips.inputs import Video
from mhla_lightning.data.prepare.replacing import Building
from mhla_lightning.data.prepare.samples import Sample, npy_bytes
from mhla_lightning.data.prepare.tallies import Done, write_tallied
from mhla_lightning.errors import DataError

Store = Literal["npy", "mp4"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cut:
    """Clips of one video.

    Args:
        video: to cut.
        starts: of the clips, in seconds of the video's clock, growing.
        last: time of the video's last frame.
        seekable: see probing.Film.
    """

    video: Video
    starts: tuple[float, ...]
    last: float
    seekable: bool = True


class ClipJob(NamedTuple):
    """A shard to write.

    Args:
        building: of the target.
        header: an index that describes the clips.
        split: folder of the shard below the target.
        name: file name of the shard.
        first: index in the split of its first sample, if no clip before it is left out.
        cuts: the clips.
        store: npy or mp4.
    """

    building: Building
    header: ShardIndex
    split: str
    name: str
    first: int
    cuts: tuple[Cut, ...]
    store: Store


@dataclass
class ClipTally:
    """Facts about a shard of clips.

    Args:
        planned: number of clips to write.
        skipped: (name, reason) of those left out.
    """

    planned: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


def write_clips(job: ClipJob) -> Done[ClipTally]:
    """Write a shard and its tally."""
    tally = ClipTally(sum(len(cut.starts) for cut in job.cuts))
    return write_tallied(
        job.building, job.split, job.name, job.header.kind, _samples(job, tally), tally, job.first
    )


def clip_sample(
    header: ShardIndex, name: str, clip: np.ndarray, caption: str, store: Store = "npy"
) -> Sample:
    """Make a sample of a clip and its caption.

    Args:
        header: an index of clips, for their size.
        name: where the clip came from.
        clip: uint8 (frames, height, width, 3).
        caption: text.
        store: npy or mp4.

    Raises:
        DataError: a clip of another size or type.
    """
    wanted = header.clip and (header.clip.frames, header.clip.height, header.clip.width, 3)
    if header.clip is None or clip.shape != wanted or clip.dtype != np.uint8:
        raise DataError(name, f"the clip is {clip.dtype} {clip.shape}; uint8 {wanted} is needed")
    picture = {"mp4": encode_mp4(clip, header.clip.rate)} if store == "mp4" else {"clip.npy": npy_bytes(clip)}
    return Sample(name, {"txt": caption.encode()} | picture)


def _samples(job: ClipJob, tally: ClipTally) -> Iterator[Sample]:
    """Yield the samples to write; clips that are left out go into the tally."""
    assert job.header.clip is not None
    for cut in job.cuts:
        done = 0
        try:
            for clip in read_clips(cut.video.path, cut.starts, job.header.clip, cut.last, cut.seekable):
                yield clip_sample(job.header, _name(cut, done), clip, cut.video.caption, job.store)
                done += 1
        except DataError as error:
            names = [_name(cut, number) for number in range(done, len(cut.starts))]
            _log.warning("skipped %d clips of %s: %s", len(names), cut.video.path, error)
            tally.skipped += [(name, str(error)) for name in names]


def _name(cut: Cut, number: int) -> str:
    return f"{cut.video.path.stem[:40]}-{round(cut.starts[number] * 1000)}ms"
