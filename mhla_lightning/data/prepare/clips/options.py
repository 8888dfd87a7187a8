"""The choices that decide, with the videos, which clips are written."""

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

    Args:
        clips: the sizes; of several, a video takes the nearest in aspect ratio that fits into it.
        stride: frames from the begin of a clip to that of the next, also parts of a frame; None is the
            length of the clip.
        shots: no clip crosses a cut.
        cut: see probing.watch.
        val: videos (int) or share of them (float below 1) held out; with `val_by` time, the share of every
            video.
        val_by: hold out whole videos (video), or the end of each (time).
        store: npy (as it is) or mp4 (H.264, with loss); None is npy up to 8 MiB a clip.
        shards: number of training shards of each size; None takes enough for 512 MB each, at least 16.
        seed: of the order of videos and of those held out.
        max_skipped_share: of videos, and of clips, that cannot be read; more of them end the work.
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
        """Raise UserError for a value outside its range.

        So are sizes that occur twice or at two rates, and a store that cannot take them.
        """
        sizes = [(clip.frames, clip.height, clip.width) for clip in self.clips]
        if not sizes or len(set(sizes)) < len(sizes) or len({clip.rate for clip in self.clips}) > 1:
            raise UserError(
                "clips",
                f"got {', '.join(map(bucket_name, self.clips)) or 'no size'}; different sizes at one "
                "rate are needed",
            )
        if self.stride is not None and not (math.isfinite(self.stride) and self.stride > 0):
            raise UserError("stride", f"got {self.stride}; it must be a number of frames above 0")
        if not 0 < self.cut < 1:
            raise UserError("cut", f"got {self.cut}; it must be above 0 and below 1")
        if self.val_by not in ("video", "time"):
            raise UserError("val_by", unknown_name("way", self.val_by, ("video", "time")))
        if not self.val > 0 or (self.val_by == "time" and not self.val < 1):
            wanted = (
                "a share above 0 and below 1"
                if self.val_by == "time"
                else "a number of videos, or a share above 0 and below 1"
            )
            raise UserError("val", f"got {self.val}; it must be {wanted}")
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError("max_skipped_share", f"got {self.max_skipped_share}; it must be from 0 to 1")
        if self.store is not None and self.store not in get_args(Store):
            raise UserError("store", unknown_name("format", self.store, get_args(Store)))
        PackOptions(shards=self.shards)
        for clip in self.clips:
            self._check_store(clip)

    def _check_store(self, clip: Clip) -> None:
        store, size = self.store_of(clip), clip_bytes(clip)
        if store == "mp4" and (clip.height % 2 or clip.width % 2):
            near = f"{clip.height + clip.height % 2}x{clip.width + clip.width % 2}"
            raise UserError(
                "clips",
                f"got {clip.height}x{clip.width} pixels; mp4 needs even sides, e.g. {near}, or `store` npy",
            )
        if size > (MAX_SAMPLE_BYTES if store == "npy" else 16 * MAX_SAMPLE_BYTES) - 2**16:
            raise UserError(
                "clips",
                f"a clip of {clip} has {size:,} bytes, too many for `store` {store}; choose a smaller size",
            )

    def store_of(self, clip: Clip) -> Store:
        """Return how clips of a size are stored."""
        return self.store or ("npy" if clip_bytes(clip) <= _SMALL else "mp4")

    def stride_of(self, clip: Clip) -> float:
        """Return the seconds from the begin of a clip to that of the next."""
        return (self.stride or clip.frames) / clip.rate


def clip_bytes(clip: Clip) -> int:
    """Return the bytes of the pixels of a clip."""
    return clip.frames * clip.height * clip.width * 3


def bucket_name(clip: Clip) -> str:
    """Return the folder of one size among several."""
    return f"{clip.frames}x{clip.height}x{clip.width}"


def make_clip(frames: int, size: tuple[int, int], rate: float) -> Clip:
    """Make a clip size of a user's values.

    Args:
        frames: of a clip.
        size: height and width in pixels.
        rate: frames a second.

    Raises:
        UserError: an impossible value.
    """
    if frames < 1:
        raise UserError("frames", f"got {frames}; it must be at least 1")
    if min(size) < 1:
        raise UserError("size", f"got {size[0]}x{size[1]}; both sides must be at least 1")
    if not (math.isfinite(rate) and 0 < rate <= 1000):
        raise UserError(
            "rate", f"got {rate}; it must be a number of frames a second above 0 and at most 1000"
        )
    return Clip(frames, *size, float(rate))
