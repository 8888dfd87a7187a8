"""Facts about a video that is played once: times, cuts, and whether it is complete."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mhla_lightning.data.encoders.videos import FilmDecoder, Shown, av_package, open_video, thumbnail
from mhla_lightning.data.index import Clip
from mhla_lightning.data.prepare.clips.endings import lacks_bytes
from mhla_lightning.data.prepare.clips.layout import Stretch, nearest, shots, split_in_time
from mhla_lightning.errors import DataError

if TYPE_CHECKING:
    from av import Packet

CUT = 0.12  # of 1: the mean difference between neighbouring frames above which a shot begins
_THUMBNAIL = 32  # pixels a side
# Seconds, and share of the length that the header promises: a file that ends so much earlier was cut.
_MISSING = (0.1, 0.01)
_ROUNDED = 0.01  # seconds; where bytes are missing as well, less is enough
_HIDDEN = 2  # packets that may follow the last frame that is shown


@dataclass(frozen=True)
class ProbeJob:
    """A video to look at.

    Args:
        number: of the video.
        path: of the video.
        clips: sizes to choose from.
        held_out: share of its end that is kept for val; None for nothing.
        cut: see watch; None takes the video as one shot.
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
        seekable: see Film.
        error: why the video cannot be used, in which case the other facts mean nothing; else None.
    """

    number: int
    bucket: int | None = None
    train: tuple[Stretch, ...] = ()
    val: tuple[Stretch, ...] = ()
    seconds: float = 0.0
    last: float = 0.0
    seekable: bool = True
    error: str | None = None


@dataclass(frozen=True)
class Film:
    """Facts about a film that was played once.

    Args:
        times: of its frames, in seconds, float64 (frames,), growing.
        end: of the last frame.
        aspect: width over height of the first picture.
        cuts: numbers of the frames that begin a shot, but for the first.
        seekable: the film can be read from any key frame on, since its times are those in its file.
    """

    times: np.ndarray
    end: float
    aspect: float
    cuts: list[int]
    seekable: bool


def probe(job: ProbeJob) -> Probe:
    """Look at a video. A damaged one is reported in `error`."""
    try:
        film = watch(job.path, job.cut)
    except DataError as error:
        return Probe(job.number, error=error.reason if error.key == str(job.path) else str(error))
    begin, last = float(film.times[0]), float(film.times[-1])
    stretches = shots(film.times, film.end, film.cuts)
    bucket = nearest(film.aspect, stretches, job.clips)
    train, val = stretches, list[Stretch]()
    if bucket is not None and job.held_out is not None:
        train, val = split_in_time(stretches, film.times, job.clips[bucket], job.held_out)
    return Probe(job.number, bucket, tuple(train), tuple(val), film.end - begin, last, film.seekable)


def watch(path: Path, cut: float | None = None) -> Film:
    """Play a video once, since only its decoder knows which packets show a frame, and when.

    The packets behind damage count as frames, so that the clips that are lost are counted.

    Args:
        path: of the video.
        cut: a frame begins a shot when it differs from the frame before by more than this share of the range
            of values. The difference is the mean absolute one over all colours of both frames, reduced to
            32x32 pixels. A flash is found, a slow fade is not. None finds no shots.

    Raises:
        DataError: a file that cannot be read, shows no frame, or ends before its header says.
    """
    reached = 0.0
    with open_video(path, str(path)) as (container, stream):
        viewing = _Viewing(str(path), FilmDecoder(stream, str(path)), stream.time_base or Fraction(0), cut)
        for packet in container.demux():
            reached = max(reached, _end(packet))
            if packet.stream is stream:
                viewing.take(packet)
        viewing.take(None)
        promised = float((stream.duration or 0) * viewing.base)
        whole, begin = (container.duration or 0) / 1e6, (container.start_time or 0) / 1e6
        kind, sound = container.format.name, bool(container.streams.audio)
    film = viewing.film(kind != "gif")  # a gif has no list of key frames
    if sound and len(film.times) == 1:
        raise DataError(str(path), "holds sound and one picture but no film; remove it from the videos")
    found = (film.end - float(film.times[0]), promised) if promised else (reached - begin, whole)
    _demand_whole(path, kind, *found)
    return film


@dataclass
class _Viewing:
    """What was seen of a film until now.

    Args:
        name: of the file, for messages.
        decoder: of the film.
        base: seconds of a tick.
        cut: see watch.
        times: of the frames; of two frames at one time the later one is seen.
        packets: duration of every packet by its time, in seconds.
        cuts: numbers of the frames that begin a shot.
        aspect: of the first picture.
        intact: no damage was met.
        before: the thumbnail of the last frame.
    """

    name: str
    decoder: FilmDecoder
    base: Fraction
    cut: float | None
    times: list[float] = field(default_factory=list)
    packets: dict[float, float] = field(default_factory=dict)
    cuts: set[int] = field(default_factory=set)
    aspect: float = 1.0
    intact: bool = True
    before: np.ndarray | None = None

    def take(self, packet: Packet[Any] | None) -> None:
        """Look at a packet; None looks at the frames that the decoder still holds."""
        if packet is not None and packet.size and not packet.is_discard and packet.pts is not None:
            self.packets[float(packet.pts * self.base)] = float((packet.duration or 0) * self.base)
        try:
            found = self.decoder.feed(packet) if self.intact else []
        except av_package("cutting clips").error.InvalidDataError:
            found, self.intact = [], False
        for one in found:
            if one.frame.is_corrupt:
                self.intact = False
                return
            self._see(one)

    def _see(self, shown: Shown) -> None:
        if not self.times:
            self.aspect = shown.aspect
        if not self.times or shown.time > self.times[-1]:
            self.times.append(shown.time)
        if self.cut is not None:
            small = thumbnail(shown.frame, _THUMBNAIL, self.name).astype(np.int16)
            if self.before is not None and np.abs(small - self.before).mean() > self.cut * 255:
                self.cuts.add(len(self.times) - 1)
            self.before = small

    def film(self, seekable: bool) -> Film:
        """Return the facts. Raises DataError where no frame was shown, or none at the end."""
        if not self.times:
            raise DataError(self.name, "holds no frame that can be decoded; copy it again or remove it")
        rest = sorted(time for time in self.packets if time > self.times[-1]) if self.decoder.steady else []
        if self.intact and len(rest) > max(_HIDDEN, _MISSING[1] * len(self.packets)):
            raise DataError(
                self.name,
                f"gives no frame after {self.times[-1]:.2f} of {rest[-1]:.2f} s; it was cut or damaged, so "
                "copy it again or remove it",
            )
        times = np.array(self.times if self.intact else self.times + rest)
        step = float(np.median(np.diff(times))) if len(times) > 1 else 1.0
        end = float(times[-1]) + (self.packets.get(float(times[-1]), 0.0) or step)
        cuts = sorted(cut for cut in self.cuts if cut > 0)
        return Film(times, end, self.aspect, cuts, seekable and self.decoder.steady)


def _end(packet: Packet[Any]) -> float:
    """Return when the content of a packet ends, in seconds."""
    return (
        0.0
        if packet.pts is None or packet.time_base is None
        else float((packet.pts + (packet.duration or 0)) * packet.time_base)
    )


def _demand_whole(path: Path, kind: str, seconds: float, promised: float) -> None:
    """Raise DataError for a video that ends early.

    A header may promise too much, and the boxes of a file too many bytes: together they are a proof.

    Args:
        path: of the video.
        kind: FFmpeg's name of the format.
        seconds: that were found.
        promised: seconds by the header; 0 where it gives none.
    """
    lacking = lacks_bytes(path, kind)
    allowed = _ROUNDED if lacking else _MISSING[0] + _MISSING[1] * promised
    short = seconds + allowed < promised
    if lacking if kind == "gif" or not promised else short and lacking is not False:
        more = f" of {promised:.2f} s" if promised > seconds else ""
        raise DataError(
            str(path), f"ends after {seconds:.2f} s{more}; it was cut, so copy it again or remove it"
        )
