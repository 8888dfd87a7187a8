"""What decides, with the videos, which clips are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from mhla_lightning.data.index import Clip
from mhla_lightning.data.prepare.clips.probing import CUT
from mhla_lightning.data.prepare.clips.shards import Store
from mhla_lightning.data.prepare.pack import PackOptions
from mhla_lightning.data.split import MAX_SAMPLE_BYTES
from mhla_lightning.errors import UserError, unknown_name

_SMALL = 8 * 2**20  # bytes of a clip up to which it is stored as it is


@dataclass(frozen=True)
class ClipOptions:
    """How videos become clips.

    clips: the sizes; of several, every video takes the one nearest in aspect ratio of which one fits into it.
        stride: frames from the begin of a clip
    to that of the next, also parts of a frame; None is the clip's length. shots: no clip crosses a cut; cut:
    see probing.find_cuts.
    val: videos (int) or share of them (float below 1) held out; with val_by "time" the share of every video,
        its end. store: npy (as it is) or mp4
    (H.264, with loss); None is npy up to 8 MiB a clip. shards: number of training shards, of each size. seed:
    of the order of videos and of those
    held out. max_skipped_share: of videos, and of clips, that cannot be read; more ends the work.
    """

    clips: tuple[Clip, ...]
    stride: float | None = None
    shots: bool = False
    cut: float = CUT
    val: int | float = 0.1
    val_by: Literal["video", "time"] = "video"
    store: Store | None = None
    shards: int | None = None
    seed: int = 0
    max_skipped_share: float = 0.01

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range, sizes that are there twice or at two rates, and a
        store that cannot take them.
        """
        sizes = [(clip.frames, clip.height, clip.width) for clip in self.clips]
        if not sizes or len(set(sizes)) < len(sizes) or len({clip.rate for clip in self.clips}) > 1:
            raise UserError(
                f"--bucket: {', '.join(map(bucket_name, self.clips)) or 'no size'}; different sizes "
                "at one rate are needed"
            )
        if self.stride is not None and not (math.isfinite(self.stride) and self.stride > 0):
            raise UserError(f"--stride is {self.stride}; it must be a number of frames above 0")
        if not 0 < self.cut < 1:
            raise UserError(f"--cut is {self.cut}; it must be above 0 and below 1")
        if self.val_by not in ("video", "time"):
            raise UserError(unknown_name("--val-by", self.val_by, ("video", "time")))
        if not self.val > 0 or (self.val_by == "time" and not self.val < 1):
            wanted = (
                "a share above 0 and below 1"
                if self.val_by == "time"
                else "a number of videos, or a share above 0 and below 1"
            )
            raise UserError(f"--val is {self.val}; it must be {wanted}")
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError(f"--max-skipped-share is {self.max_skipped_share}; it must be from 0 to 1")
        if self.store is not None and self.store not in get_args(Store):
            raise UserError(unknown_name("--store", self.store, get_args(Store)))
        PackOptions(shards=self.shards)
        for clip in self.clips:
            self._check_store(clip)

    def _check_store(self, clip: Clip) -> None:
        store, size = self.store_of(clip), clip_bytes(clip)
        if store == "mp4" and (clip.height % 2 or clip.width % 2):
            near = f"{clip.height + clip.height % 2}x{clip.width + clip.width % 2}"
            raise UserError(
                f"--size is {clip.height}x{clip.width}; mp4 needs even sides, e.g. {near}, or pass "
                "--store npy"
            )
        if size > (MAX_SAMPLE_BYTES if store == "npy" else 16 * MAX_SAMPLE_BYTES) - 2**16:
            raise UserError(
                f"a clip of {clip} has {size:,} bytes, too many for --store {store}: choose a smaller size"
            )

    def store_of(self, clip: Clip) -> Store:
        """How clips of a size are stored."""
        return self.store or ("npy" if clip_bytes(clip) <= _SMALL else "mp4")

    def stride_of(self, clip: Clip) -> float:
        """Seconds from the begin of a clip to that of the next."""
        return (self.stride or clip.frames) / clip.rate


def clip_bytes(clip: Clip) -> int:
    """Bytes of the pixels of a clip."""
    return clip.frames * clip.height * clip.width * 3


def bucket_name(clip: Clip) -> str:
    """The folder of a size among several."""
    return f"{clip.frames}x{clip.height}x{clip.width}"


def make_clip(frames: int, height: int, width: int, rate: float) -> Clip:
    """A size that a user gives. Raises UserError for one that cannot be."""
    for name, value in (("--frames", frames), ("--size", min(height, width))):
        if value < 1:
            raise UserError(
                f"{name} is {frames if name == '--frames' else f'{height}x{width}'}; it must be at least 1"
            )
    if not (math.isfinite(rate) and 0 < rate <= 1000):
        raise UserError(f"--rate is {rate}; it must be a number of frames a second above 0 and at most 1000")
    return Clip(frames, height, width, float(rate))
