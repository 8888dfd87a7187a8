"""What is in a video, without decoding it, and where its shots begin, for which it is decoded once."""

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
_MISSING = (
    0.1,
    0.01,
)  # seconds, and share of what the header promises: a file that ends so much earlier was cut


@dataclass(frozen=True)
class ProbeJob:
    """A video to look at. clips: sizes to choose from. held_out: share of its end that is kept for val, None
    for nothing. cut: see find_cuts; None takes the video as one shot."""

    number: int
    path: Path
    clips: tuple[Clip, ...]
    held_out: float | None
    cut: float | None


@dataclass(frozen=True)
class Probe:
    """bucket: number of the clip size, None where none fits. train, val: stretches, in seconds of the video's
    own clock. seconds: of the whole.

    last: when its last frame comes. error: why it cannot be used; the rest means nothing then.
    """

    number: int
    bucket: int | None = None
    train: tuple[Stretch, ...] = ()
    val: tuple[Stretch, ...] = ()
    seconds: float = 0.0
    last: float = 0.0
    error: str | None = None


def probe(job: ProbeJob) -> Probe:
    """Look at a video. What is wrong with it is told in `error`."""
    try:
        times, end, aspect = frame_times(job.path)
        cuts = find_cuts(job.path, times, job.cut) if job.cut is not None else []
    except DataError as error:
        return Probe(job.number, error=str(error))
    stretches = shots(times, end, cuts)
    bucket = nearest(aspect, stretches, job.clips)
    train, val = stretches, list[Stretch]()
    if bucket is not None and job.held_out is not None:
        train, val = split_in_time(stretches, times, job.clips[bucket], job.held_out)
    return Probe(job.number, bucket, tuple(train), tuple(val), end - float(times[0]), float(times[-1]))


def frame_times(path: Path) -> tuple[np.ndarray, float, float]:
    """When the frames of a video are shown, in seconds, float64 (frames,), growing; when the last one ends;
    and width over height.

    Raises DataError for a file that cannot be read, ends before its header says, or whose frames have no
    times or share them.
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
            f"{path} has no times of its frames ({len(ticks)} frames): write it anew, for instance as mp4"
        )
    shown = sorted((pts, duration) for pts, duration in ticks if pts is not None)
    times = np.array([float(pts * base) for pts, _ in shown])
    if (np.diff(times) <= 0).any():
        raise DataError(
            f"{path} has two frames at {times[1:][np.diff(times) <= 0][0]:g} s: write it anew, for "
            "instance as mp4"
        )
    last = float(shown[-1][1] * base) or (float(np.median(np.diff(times))) if len(times) > 1 else 1.0)
    end = float(times[-1]) + last
    _demand_whole(path, *((end - float(times[0]), promised) if promised else (reached, whole)))
    return times, end, aspect


def find_cuts(path: Path, times: np.ndarray, cut: float) -> list[int]:
    """The frames that begin a shot, but for the first: those that differ from the frame before by more than
    `cut` of the range of values.

    The difference is the mean absolute one of all colours of both frames, made small (32x32): slow fades are
    not found, a flash is. Raises DataError for damage.
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
            f"{path} gives {decoded} of {len(times)} frames: it was cut or damaged; copy it again or "
            "remove it"
        )
    return [place for place in cuts if 0 < place < len(times)]


def _rotation(path: Path) -> int:
    """Degrees by which the pictures are to be turned: a fact of the decoded frame."""
    with open_video(path, str(path)) as (container, stream):
        for frame in container.decode(stream):
            return frame.rotation
    raise DataError(f"{path} holds no frame that can be decoded: copy it again or remove it")


def _end(packet: Packet[Any]) -> float:
    """When what is in a packet ends, in seconds."""
    return (
        0.0
        if packet.pts is None or packet.time_base is None
        else float((packet.pts + (packet.duration or 0)) * packet.time_base)
    )


def _demand_whole(path: Path, seconds: float, promised: float) -> None:
    """promised: by the header, 0 where it is silent."""
    if path.suffix.lower() == ".gif":
        complete = path.read_bytes().rstrip(b"\0").endswith(b";")
    else:
        complete = seconds + _MISSING[0] + _MISSING[1] * promised >= promised
    if not complete:
        more = f" of {promised:.2f} s" if promised > seconds else ""
        raise DataError(f"{path} ends after {seconds:.2f} s{more}: it was cut; copy it again or remove it")
