"""Choice of the stretches of a video that become clips; times are in seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mhla_lightning.data.index import Clip

# Seconds: Matroska rounds times to these, so a frame that comes this much later counts as in time.
SLACK = 1e-3
Stretch = tuple[float, float]  # from its first frame to the first frame after it


def shots(times: np.ndarray, end: float, cuts: Sequence[int]) -> list[Stretch]:
    """Return the stretches between cuts.

    Args:
        times: of every frame, (frames,).
        end: of the last frame.
        cuts: numbers of frames that begin a shot.
    """
    begins = [float(times[0]), *(float(times[cut]) for cut in cuts)]
    return list(zip(begins, [*begins[1:], end], strict=True))


def place(stretches: Sequence[Stretch], clip: Clip, stride: float) -> list[float]:
    """Return where clips begin: `stride` seconds apart, so that none leaves its stretch."""
    starts = []
    for begin, end in stretches:
        room = _room(begin, end, clip)
        if room > 0:
            starts += [begin + number * stride for number in range(math.floor(room / stride + 1e-9) + 1)]
    return starts


def fits(stretches: Sequence[Stretch], clip: Clip) -> bool:
    """Return whether a clip has room in one of the stretches."""
    return any(_room(begin, end, clip) > 0 for begin, end in stretches)


def nearest(aspect: float, stretches: Sequence[Stretch], clips: Sequence[Clip]) -> int | None:
    """Return the number of the clip size that suits a video best.

    It is the nearest in aspect ratio, and the longest of equally near ones. None means that no size fits
    into the stretches.
    """
    fitting = [number for number, clip in enumerate(clips) if fits(stretches, clip)]
    return min(
        fitting,
        key=lambda number: (_distance(clips[number], aspect), -clips[number].frames, number),
        default=None,
    )


def split_in_time(
    stretches: Sequence[Stretch], times: np.ndarray, clip: Clip, share: float
) -> tuple[list[Stretch], list[Stretch]]:
    """Divide the stretches at a moment into those before it and those after it.

    The last `share` of the video is held out, or more where less holds no clip. No frame belongs to both
    parts. Nothing is held out where no clip would be left before the moment.

    Args:
        stretches: of the video.
        times: of every frame, (frames,).
        clip: size and rate.
        share: of the video's time.
    """
    begin, end = stretches[0][0], stretches[-1][1]
    moment = _frame_after(times, end - share * (end - begin))
    if not fits(_after(stretches, moment), clip):
        roomy = [stretch for stretch in stretches if stretch[0] < moment and fits([stretch], clip)]
        if not roomy:
            return list(stretches), []
        latest = roomy[-1][1] - (clip.frames - 1) / clip.rate - SLACK
        moment = float(times[np.searchsorted(times, latest, side="left") - 1])
    before = [(start, min(stop, moment)) for start, stop in stretches if start < moment]
    if not fits(before, clip):
        return list(stretches), []
    return before, _after(stretches, moment)


def _room(begin: float, end: float, clip: Clip) -> float:
    """Return the seconds by which a clip could be moved, with its last frame before the end."""
    return end - SLACK - (clip.frames - 1) / clip.rate - begin


def _after(stretches: Sequence[Stretch], moment: float) -> list[Stretch]:
    return [(max(start, moment), stop) for start, stop in stretches if stop > moment]


def _frame_after(times: np.ndarray, moment: float) -> float:
    number = int(np.searchsorted(times, moment - SLACK))
    return float(times[number]) if number < len(times) else math.inf


def _distance(clip: Clip, aspect: float) -> float:
    """Return the distance of two aspect ratios: the same for twice as wide and twice as high."""
    return round(abs(math.log(clip.width / clip.height / aspect)), 6)
