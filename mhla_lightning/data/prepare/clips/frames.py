"""The frames of clips: decoded once, at a constant rate by their times, resized and cropped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mhla_lightning.data.encoders.videos import open_video, pixels, shown_aspect
from mhla_lightning.data.index import Clip
from mhla_lightning.data.prepare.clips.layout import SLACK
from mhla_lightning.errors import DataError

if TYPE_CHECKING:
    from av import VideoFrame

# Seconds: a clip that starts later is decoded from the key frame before it, not from the video's beginning.
_WORTH_SEEKING = 10.0
_SEEKABLE = (".mp4", ".m4v", ".mov", ".webm", ".mkv")


def read_clips(path: Path, starts: Sequence[float], clip: Clip, last: float) -> Iterator[np.ndarray]:
    """Read clips of a video, uint8 (frames, height, width, 3) each.

    A clip that starts at s takes, for its frame i, the picture that is shown s + i / rate seconds into the
    video. Only the frames of unfinished clips are in memory.

    Args:
        path: of the video.
        starts: of the clips, in seconds, growing.
        clip: size and rate.
        last: time of the video's last frame, in seconds.

    Raises:
        DataError: the video is damaged.
    """
    open_clips: dict[int, list[np.ndarray]] = {}
    done = 0
    for frame, aspect, until in shown_frames(path, starts[0], last):
        picture = None
        for number in range(done, len(starts)):
            if starts[number] + SLACK >= until:
                break
            found = open_clips.setdefault(number, [])
            while len(found) < clip.frames and starts[number] + len(found) / clip.rate + SLACK < until:
                picture = fit(pixels(frame), aspect, clip.height, clip.width) if picture is None else picture
                found.append(picture)
        while done < len(starts) and len(open_clips.get(done, ())) == clip.frames:
            yield np.stack(open_clips.pop(done))
            done += 1
        if done == len(starts):
            return


def shown_frames(path: Path, begin: float, last: float) -> Iterator[tuple[VideoFrame, float, float]]:
    """Yield the frames of a video from the one that is shown at `begin` on.

    Args:
        path: of the video.
        begin: in seconds.
        last: time of the last frame, in seconds.

    Yields:
        The frame, the picture's width over height, and the end of its time (infinity for the last frame).

    Raises:
        DataError: the video is damaged, or ends before `last`.
    """
    seek = begin > _WORTH_SEEKING and path.suffix.lower() in _SEEKABLE
    frames = _decoded(path, begin if seek else None)
    first = next(frames, None)
    if seek and (first is None or first[2] > begin + SLACK):  # the container's list of key frames is wrong
        frames = _decoded(path, None)
        first = next(frames, None)
    if first is None:
        raise DataError(str(path), "holds no frame that can be decoded; copy it again or remove it")
    frame, aspect, time = first
    for later in frames:
        if later[2] > begin + SLACK:
            yield frame, aspect, later[2]
        frame, aspect, time = later
    if time + SLACK < last:
        raise DataError(
            str(path),
            f"gives no frame after {time:.2f} of {last:.2f} s; it was cut or damaged, so copy it "
            "again or remove it",
        )
    yield frame, aspect, math.inf


def fit(picture: np.ndarray, aspect: float, height: int, width: int) -> np.ndarray:
    """Cut the middle of a picture in the wanted ratio and resize it (bicubic, with smoothing).

    Args:
        picture: uint8 (h, w, 3).
        aspect: width over height as the picture is to be shown.
        height: in pixels.
        width: in pixels.

    Returns:
        uint8 (height, width, 3).
    """
    high, wide = picture.shape[:2]
    kept_high = min(1.0, aspect * height / width)  # shares of the picture
    kept_wide = min(1.0, width / height / aspect)
    top, left = high * (1 - kept_high) / 2, wide * (1 - kept_wide) / 2
    box = left, top, left + wide * kept_wide, top + high * kept_high
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, box=box))


def _decoded(path: Path, begin: float | None) -> Iterator[tuple[VideoFrame, float, float]]:
    """Yield frames, width over height, and times, from the key frame before `begin` on."""
    with open_video(path, str(path)) as (container, stream):
        if begin is not None and stream.time_base is not None:
            container.seek(int(begin / stream.time_base), stream=stream)
        aspect = None
        for frame in container.decode(stream):
            if frame.pts is None or frame.time_base is None:
                raise DataError(str(path), "has a frame without a time; write it anew, for instance as mp4")
            if frame.is_corrupt:
                raise DataError(
                    str(path),
                    f"is damaged at {float(frame.pts * frame.time_base):.2f} s; copy it again or remove it",
                )
            aspect = shown_aspect(stream, frame.rotation) if aspect is None else aspect
            yield frame, aspect, float(frame.pts * frame.time_base)
