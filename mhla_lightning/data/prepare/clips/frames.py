"""The frames of clips: decoded once, at a constant rate by their times, resized and cropped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mhla_lightning.data.encoders.videos import Shown, av_package, open_video, shown, upright
from mhla_lightning.data.index import Clip
from mhla_lightning.data.prepare.clips.layout import SLACK
from mhla_lightning.errors import DataError

# Seconds: a clip that starts later is decoded from the key frame before it, not from the video's beginning.
_WORTH_SEEKING = 10.0


def read_clips(
    path: Path, starts: Sequence[float], clip: Clip, last: float, seekable: bool = True
) -> Iterator[np.ndarray]:
    """Read clips of a video, uint8 (frames, height, width, 3) each.

    A clip that starts at s takes, for its frame i, the picture that is shown s + i / rate seconds into the
    video. Only the frames of unfinished clips are in memory.

    Args:
        path: of the video.
        starts: of the clips, in seconds, growing.
        clip: size and rate.
        last: time of the video's last frame, in seconds.
        seekable: see probing.Film.

    Raises:
        DataError: the video is damaged.
    """
    open_clips: dict[int, list[np.ndarray]] = {}
    done = 0
    for (frame, _, aspect), until in shown_frames(path, starts[0], last, seekable):
        picture = None
        for number in range(done, len(starts)):
            if starts[number] + SLACK >= until:
                break
            found = open_clips.setdefault(number, [])
            while len(found) < clip.frames and starts[number] + len(found) / clip.rate + SLACK < until:
                if picture is None:
                    picture = fit(upright(frame, str(path)), aspect, clip.height, clip.width)
                found.append(picture)
        while done < len(starts) and len(open_clips.get(done, ())) == clip.frames:
            yield np.stack(open_clips.pop(done))
            done += 1
        if done == len(starts):
            return


def shown_frames(
    path: Path, begin: float, last: float, seekable: bool = True
) -> Iterator[tuple[Shown, float]]:
    """Yield the frames of a video from the one that is shown at `begin` on.

    Args:
        path: of the video.
        begin: in seconds.
        last: time of the last frame, in seconds.
        seekable: see probing.Film.

    Yields:
        The frame, and the end of its time (infinity for the last frame).

    Raises:
        DataError: the video is damaged, or ends before `last`.
    """
    found, frames = _sought(path, begin) if seekable and begin > _WORTH_SEEKING else (None, iter(()))
    if found is None:
        frames = _decoded(path, None)
        found = next(frames, None)
    if found is None:
        raise DataError(str(path), "holds no frame that can be decoded; copy it again or remove it")
    for later in frames:
        if later.time > begin + SLACK:
            yield found, later.time
        found = later
    if found.time + SLACK < last:
        raise DataError(
            str(path),
            f"gives no frame after {found.time:.2f} of {last:.2f} s; it was cut or damaged, so copy it "
            "again or remove it",
        )
    yield found, math.inf


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


def _sought(path: Path, begin: float) -> tuple[Shown | None, Iterator[Shown]]:
    """Return the key frame before `begin`, and the frames after it.

    It is None where the container's list of key frames is wrong or missing. It is so, too, where that list
    names a frame that refers to earlier ones, as in films that are refreshed bit by bit.
    """
    frames = _decoded(path, begin)
    try:
        for found in frames:
            if found.time > begin + SLACK:
                break
            if found.frame.key_frame:
                return found, frames
    except DataError:
        pass  # whether it is damage is seen when the film is read from its begin
    return None, frames


def _decoded(path: Path, begin: float | None) -> Iterator[Shown]:
    """Yield frames from the key frame before `begin` on; none where the container cannot seek."""
    with open_video(path, str(path)) as (container, stream):
        if begin is not None and stream.time_base is not None:
            try:
                container.seek(int(begin / stream.time_base), stream=stream)
            except av_package("cutting clips").error.FFmpegError:
                return
        for found in shown(container, stream, str(path)):
            if found.frame.is_corrupt:
                raise DataError(str(path), f"is damaged at {found.time:.2f} s; copy it again or remove it")
            yield found
