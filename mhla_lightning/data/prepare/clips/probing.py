"""Facts about a video: times without decoding it, and cuts, for which it is decoded once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mhla_lightning.data.encoders.videos import open_video, shown_aspect
from mhla_lightning.data.index import Clip
from mhla_lightning.data.prepare.clips.layout import Stretch, nearest, shots, split_in_time
from mhla_lightning.errors import DataError

if TYPE_CHECKING:
    from av import Packet

CUT = 0.12  # of 1: the mean difference between neighbouring frames above which a shot begins
_THUMBNAIL = 32  # pixels a side
# Seconds, and share of the length that the header promises: a file that ends so much earlier was cut.
_MISSING = (0.1, 0.01)


@dataclass(frozen=True)
class ProbeJob:
    """A video to look at.

    Args:
        number: of the video.
        path: of the video.
        clips: sizes to choose from.
        held_out: share of its end that is kept for val; None for nothing.
        cut: see find_cuts; None takes the video as one shot.
    """

    number: int
    path: Path
    clips: tuple[Clip, ...]
    held_out: float | None
    cut: float | None


@dataclass(frozen=True)
class Probe:
    """Facts about a video.

    Args:
        number: of the video.
        bucket: number of the clip size; None where none fits.
        train: stretches for training, in seconds of the video's own clock.
        val: stretches that are held out.
        seconds: length of the video.
        last: time of the last frame.
        error: why the video cannot be used, in which case the other facts mean nothing; else None.
    """

    number: int
    bucket: int | None = None
    train: tuple[Stretch, ...] = ()
    val: tuple[Stretch, ...] = ()
    seconds: float = 0.0
    last: float = 0.0
    error: str | None = None


def probe(job: ProbeJob) -> Probe:
    """Look at a video. A damaged one is reported in `error`."""
    try:
        times, end, aspect = frame_times(job.path)
        cuts = find_cuts(job.path, times, job.cut) if job.cut is not None else []
    except DataError as error:
        return Probe(job.number, error=error.reason if error.key == str(job.path) else str(error))
    stretches = shots(times, end, cuts)
    bucket = nearest(aspect, stretches, job.clips)
    train, val = stretches, list[Stretch]()
    if bucket is not None and job.held_out is not None:
        train, val = split_in_time(stretches, times, job.clips[bucket], job.held_out)
    return Probe(job.number, bucket, tuple(train), tuple(val), end - float(times[0]), float(times[-1]))


def frame_times(path: Path) -> tuple[np.ndarray, float, float]:
    """Read when the frames of a video are shown.

    Returns:
        Times in seconds, float64 (frames,), growing; the end of the last frame; width over height.

    Raises:
        DataError: a file that cannot be read, ends before its header says, or whose frames have no times or
            share them.
    """
    with open_video(path, str(path)) as (container, stream):
        base, ticks, reached = stream.time_base, list[tuple[int | None, int]](), 0.0
        promised = float(stream.duration * base) if stream.duration and base else 0.0
        whole = (container.duration or 0) / 1e6
        for packet in container.demux():
            reached = max(reached, _end(packet))
            if packet.stream is stream and packet.size and not packet.is_discard:
                ticks.append((packet.pts, packet.duration or 0))
        reached -= (container.start_time or 0) / 1e6
        aspect = shown_aspect(stream, _rotation(path))
    if not ticks or base is None or any(pts is None for pts, _ in ticks):
        raise DataError(
            str(path), f"has no times of its frames ({len(ticks)} frames); write it anew, for instance as mp4"
        )
    shown = sorted((pts, duration) for pts, duration in ticks if pts is not None)
    times = np.array([float(pts * base) for pts, _ in shown])
    if (np.diff(times) <= 0).any():
        raise DataError(
            str(path),
            f"has two frames at {times[1:][np.diff(times) <= 0][0]:g} s; write it anew, for instance as mp4",
        )
    last = float(shown[-1][1] * base) or (float(np.median(np.diff(times))) if len(times) > 1 else 1.0)
    end = float(times[-1]) + last
    _demand_whole(path, *((end - float(times[0]), promised) if promised else (reached, whole)))
    return times, end, aspect


def find_cuts(path: Path, times: np.ndarray, cut: float) -> list[int]:
    """Return the frames that begin a shot, but for the first.

    A frame begins a shot when it differs from the frame before by more than `cut` of the range of values. The
    difference is the mean absolute one over all colours of both frames, reduced to 32x32 pixels. A flash is
    found, a slow fade is not.

    Args:
        path: of the video.
        times: of every frame, in seconds, (frames,).
        cut: of 1.

    Raises:
        DataError: the video is damaged.
    """
    cuts, before, decoded = [], None, 0
    with open_video(path, str(path)) as (container, stream):
        for frame in container.decode(stream):
            decoded += 1
            small = (
                frame.reformat(_THUMBNAIL, _THUMBNAIL, "rgb24", interpolation="AREA")
                .to_ndarray()
                .astype(np.int16)
            )
            if before is not None and np.abs(small - before).mean() > cut * 255 and frame.time is not None:
                cuts.append(int(np.searchsorted(times, frame.time - 1e-6)))
            before = small
    if decoded < len(times) * (1 - _MISSING[1]):
        raise DataError(
            str(path),
            f"gives {decoded} of {len(times)} frames; it was cut or damaged, so copy it again or remove it",
        )
    return [place for place in cuts if 0 < place < len(times)]


def _rotation(path: Path) -> int:
    """Return the degrees by which pictures are to be turned: only a decoded frame holds them."""
    with open_video(path, str(path)) as (container, stream):
        for frame in container.decode(stream):
            return frame.rotation
    raise DataError(str(path), "holds no frame that can be decoded; copy it again or remove it")


def _end(packet: Packet[Any]) -> float:
    """Return when the content of a packet ends, in seconds."""
    return (
        0.0
        if packet.pts is None or packet.time_base is None
        else float((packet.pts + (packet.duration or 0)) * packet.time_base)
    )


def _demand_whole(path: Path, seconds: float, promised: float) -> None:
    """Raise DataError for a video that ends early.

    Args:
        path: of the video.
        seconds: that were found.
        promised: seconds by the header; 0 where it gives none.
    """
    if path.suffix.lower() == ".gif":
        complete = path.read_bytes().rstrip(b"\0").endswith(b";")
    else:
        complete = seconds + _MISSING[0] + _MISSING[1] * promised >= promised
    if not complete:
        more = f" of {promised:.2f} s" if promised > seconds else ""
        raise DataError(
            str(path), f"ends after {seconds:.2f} s{more}; it was cut, so copy it again or remove it"
        )
