"""Untrusted video files by PyAV: frames as a player shows them, clips as mp4. No torch."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mhla_lightning.data.index import Clip
from mhla_lightning.errors import DataError, UserError, missing_extra

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.stream import Stream
    from av.video.stream import VideoStream

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".gif")
# FFmpeg also knows play lists and image patterns, which open other files and addresses.
_OPEN = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif", "protocol_whitelist": "file"}
_X264 = {"crf": "14", "preset": "medium", "threads": "1"}  # other numbers of threads give other bytes
_MOST_PIXELS = 2**26  # of a frame; more is damage or an attack
_JUMP = 1.0  # seconds by which times must go back to begin anew, as in two recordings behind each other


def av_package(purpose: str) -> Any:
    """Return the package PyAV. Raises UserError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError(None, missing_extra("av", "video", purpose)) from error
    return av


class Shown(NamedTuple):
    """A frame as FFmpeg plays it.

    Args:
        frame: as it was decoded; :func:`upright` returns its picture.
        time: in seconds.
        aspect: width over height of the shown picture.
    """

    frame: VideoFrame
    time: float
    aspect: float


@contextmanager
def open_video(source: Path | bytes, name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video and the stream that FFmpeg would choose.

    Args:
        source: a file, or the bytes of an mp4 file.
        name: of the file, for messages.

    Raises DataError for a file that cannot be opened, has no film, or fails while the block reads it.
    """
    av = av_package(f"reading {name}")
    try:
        with _opened(source) as container:
            stream = _film(container, source, name)
            if stream.codec_context is None or not 0 < stream.width * stream.height <= _MOST_PIXELS:
                raise DataError(
                    name,
                    f"its video has {stream.width}x{stream.height} pixels or an unknown codec, and cannot be "
                    "decoded",
                )
            # processes already use all cores
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.error.FFmpegError, av.error.PyAVCallbackError, UnicodeDecodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            name,
            f"it cannot be decoded ({reason}): it is no video, or was cut or damaged; copy it again or "
            "remove it",
        ) from error


class FilmDecoder:
    """Decodes the packets of a film; its frames have the times at which FFmpeg plays them.

    Packets that show no frame are taken as they come. Times that jump back are continued where they were.
    Frames without a time follow at the film's rate.

    Args:
        stream: of the film, at its begin or after a seek.
        name: of the file, for messages.
    """

    def __init__(self, stream: VideoStream, name: str) -> None:
        """Start at the next packet."""
        self._stream, self._name = stream, name
        self._invalid: type[Exception] = av_package(f"reading {name}").error.InvalidDataError
        self._guess = _TimeGuess()
        self._time: float | None = None  # of the frame before
        self._shift = 0.0
        self.steady = True  # all times were those of the file

    def feed(self, packet: Packet[Any] | None) -> list[Shown]:
        """Return the frames that a packet completes.

        None returns those that the decoder still holds.

        Raises FFmpeg's errors for damage.
        """
        if packet is not None and not packet.size:
            return []  # an empty packet would end the decoder
        try:
            frames = self._stream.decode(packet)
        except self._invalid:
            if self._time is not None or packet is None or packet.is_keyframe:
                raise
            return []  # a recording may begin between two key frames
        if self._time is None:  # so it may for pictures that lack the ones they are made of
            frames = list(dropwhile(lambda frame: frame.is_corrupt and not frame.key_frame, frames))
        return [Shown(frame, self._date(frame), self._aspect(frame)) for frame in frames]

    def _date(self, frame: VideoFrame) -> float:
        """Return the time of a frame, in seconds. It is never before that of the frame before."""
        ticks, base, before = self._guess(frame.pts, frame.dts), self._stream.time_base, self._time
        self.steady &= ticks == frame.pts
        time = None if ticks is None or base is None else float(ticks * base) + self._shift
        if time is None:
            time = 0.0 if before is None else before + self._step(frame)
            self.steady = False
        elif before is not None and time < before:
            continued = before if before - time < _JUMP else before + self._step(frame)
            self._shift += continued - time if before - time >= _JUMP else 0.0
            time, self.steady = continued, False
        self._time = time
        return time

    def _step(self, frame: VideoFrame) -> float:
        """Return for how long a frame is shown, in seconds."""
        if frame.duration and self._stream.time_base:
            return float(frame.duration * self._stream.time_base)
        return float(1 / (self._stream.average_rate or 25))

    def _aspect(self, frame: VideoFrame) -> float:
        """Return width over height of the shown picture; the pixels of a film need not be squares."""
        aspect = frame.width * float(self._stream.sample_aspect_ratio or 1) / frame.height
        return 1 / aspect if orientation(frame, self._name)[0] else aspect


class _TimeGuess:
    """FFmpeg's choice between the two times of a frame: that with fewer faults.

    FFmpeg calls it best_effort_timestamp. Packed B-frames, for instance, have the times of the packets that
    they share.
    """

    def __init__(self) -> None:
        """Start without a fault."""
        self._last: tuple[int | None, int | None] = None, None
        self._pts_faults = self._dts_faults = 0

    def __call__(self, pts: int | None, dts: int | None) -> int | None:
        """Return the time of the next frame, in ticks; None where it has none.

        Args:
            pts: when it is to be shown.
            dts: of the packet on which the decoder gave it away.
        """
        last_pts, last_dts = self._last
        self._pts_faults += pts is not None and last_pts is not None and pts <= last_pts
        self._dts_faults += dts is not None and last_dts is not None and dts <= last_dts
        self._last = dts if pts is None else pts, pts if dts is None else dts
        return pts if dts is None or (pts is not None and self._pts_faults <= self._dts_faults) else dts


def shown(container: InputContainer, stream: VideoStream, name: str) -> Iterator[Shown]:
    """Yield the frames of a film from where its container is. Raises FFmpeg's errors for damage."""
    decoder = FilmDecoder(stream, name)
    for packet in container.demux(stream):
        yield from decoder.feed(packet)
    yield from decoder.feed(None)


def orientation(frame: VideoFrame, name: str) -> tuple[bool, bool, bool]:
    """Return how FFmpeg turns a frame: transposed, then mirrored, then flipped.

    The frame's display matrix decides. Mirrored exchanges left and right, flipped exchanges top and bottom.

    Raises DataError for an angle that is no multiple of 90 degrees.
    """
    matrix = _display_matrix(frame)
    if matrix is None:
        return False, False, False
    a, b, c, d = matrix  # a pixel (x, y) is shown at (a x + c y, b x + d y)
    if not (math.hypot(a, c) and math.hypot(b, d)):
        return False, False, False
    angle = round(math.degrees(math.atan2(b / math.hypot(b, d), a / math.hypot(a, c))))
    if abs(angle - 90 * round(angle / 90)) > 1:
        raise DataError(
            name,
            f"its pictures are to be turned by {angle} degrees; only multiples of 90 are read, so write it "
            "anew as it is to be shown",
        )
    return (True, c < 0, b < 0) if round(angle / 90) % 2 else (False, a < 0, d < 0)


def upright(frame: VideoFrame, name: str) -> np.ndarray:
    """Return the picture of a frame as FFmpeg shows it, without alpha.

    It is uint8 (height, width, 3).
    """
    transposed, mirrored, flipped = orientation(frame, name)
    picture = _rgb(frame, name)
    picture = picture.transpose(1, 0, 2) if transposed else picture
    picture = picture[:, ::-1] if mirrored else picture
    return picture[::-1] if flipped else picture


def thumbnail(frame: VideoFrame, side: int, name: str) -> np.ndarray:
    """Return a frame as it was decoded, reduced to uint8 (side, side, 3)."""
    return _rgb(frame, name, width=side, height=side, interpolation="AREA")


def encode_mp4(clip: np.ndarray, rate: float) -> bytes:
    """Encode frames as an H.264 mp4 file; the same frames give the same bytes.

    Args:
        clip: uint8 (frames, height, width, 3), height and width even.
        rate: frames a second.
    """
    av = av_package("writing mp4")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001), options=_X264)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        for picture in clip:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"))
            )
        container.mux(stream.encode())
    return buffer.getvalue()


def decode_mp4(data: bytes, clip: Clip, name: str) -> np.ndarray:
    """Decode the frames of an mp4 file, uint8 (frames, height, width, 3).

    Raises DataError for damage, and for another number or size of frames than in `clip`.
    """
    found = np.empty((clip.frames, clip.height, clip.width, 3), np.uint8)
    with open_video(data, name) as (container, stream):
        size = sorted((stream.height, stream.width))  # a picture may be turned
        _demand(
            name, size == sorted((clip.height, clip.width)), f"{stream.height}x{stream.width} pixels", clip
        )
        number = 0
        for frame, _, _ in shown(container, stream, name):
            _demand(name, not frame.is_corrupt, "damaged frames", clip)
            picture = upright(frame, name)
            _demand(
                name,
                number < clip.frames and picture.shape[:2] == (clip.height, clip.width),
                "more or other frames",
                clip,
            )
            found[number] = picture
            number += 1
    _demand(name, number == clip.frames, f"{number} frames", clip)
    return found


def measure_mp4(data: bytes, name: str) -> tuple[int, int, int, float | None]:
    """Return frames, height, width and frames a second of an mp4 file. Raises DataError."""
    frames, high, wide = 0, 0, 0
    with open_video(data, name) as (container, stream):
        for frame, _, _ in shown(container, stream, name):
            frames += 1
            if frames == 1:
                turned = orientation(frame, name)[0]
                high, wide = (frame.width, frame.height) if turned else (frame.height, frame.width)
        return frames, high, wide, float(stream.average_rate) if stream.average_rate else None


def _opened(source: Path | bytes, **letters: str) -> InputContainer:
    """Open a container.

    Args:
        source: a file or its bytes.
        letters: how PyAV below 19 reads titles that are no UTF-8; it raises where nothing is given.
    """
    av = av_package("reading videos")
    options = _OPEN if isinstance(source, Path) else {"format_whitelist": _OPEN["format_whitelist"]}
    file = str(source.absolute()) if isinstance(source, Path) else io.BytesIO(source)
    try:
        container: InputContainer = av.open(file, options=options, **letters)
    except UnicodeDecodeError:
        return _opened(source, metadata_errors="replace")
    return container


def _film(container: InputContainer, source: Path | bytes, name: str) -> VideoStream:
    """Return the stream that FFmpeg plays: its best one that is no still picture.

    Covers and previews need not be marked. So of several streams, one of a single picture is passed over.

    Raises DataError where there is none.
    """
    streams = container.streams.video
    films = [stream for stream in streams if not stream.disposition & stream.disposition.attached_pic]
    if not films:
        found = "a cover picture but no film" if streams else "no video"
        raise DataError(name, f"it holds {found}; remove it from the videos")
    best = container.streams.best("video")
    if len(films) > 1:
        moving = _moving(source, best)
        films = [stream for stream in films if stream.index in moving] or films
    default = next(stream.disposition.default for stream in films)
    return next(
        (stream for stream in films if stream is best),
        max(films, key=lambda stream: (bool(stream.disposition & default), stream.width * stream.height)),
    )


def _moving(source: Path | bytes, best: Stream | None) -> set[int]:
    """Return the numbers of video streams with a second packet.

    The search ends when the best one is among them.
    """
    seen, moving = set[int](), set[int]()
    with _opened(source) as container:
        for packet in container.demux(list(container.streams.video)):
            if packet.size and not packet.is_discard:
                (moving if packet.stream_index in seen else seen).add(packet.stream_index)
                if best is not None and best.index in moving:
                    break
    return moving


def _rgb(frame: VideoFrame, name: str, **change: Any) -> np.ndarray:
    """Return a frame by its own colour space and range, uint8 (height, width, 3).

    One thread converts it, because a frame keeps the converter and its threads. A fork copies no threads: a
    loader's worker that frees a frame of its parent would wait for them for ever.
    """
    try:
        return frame.to_ndarray(format="rgb24", threads=1, **change)
    except av_package("reading videos").error.FFmpegError as error:
        reason = f"its colours cannot be converted (colour space {frame.colorspace}); write it anew in bt709"
        raise DataError(name, reason) from error


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int] | None:
    """Return a, b, c and d of a frame's display matrix; None where it has none."""
    sides: Any
    try:
        sides = frame.side_data
        side = sides.get("DISPLAYMATRIX")
    except ValueError:  # PyAV 18 knows no EXIF (mjpeg), and refuses all side data beside it but the rotation
        turn = round(frame.rotation / 90) % 4  # counterclockwise
        return ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[turn]
    if side is None:
        return None
    a, b, _, c, d, *_ = (int(value) for value in np.frombuffer(bytes(side), np.int32))
    return a, b, c, d


def _demand(name: str, fine: bool, found: str, clip: Clip) -> None:
    if not fine:
        raise DataError(name, f"it has {found}; in the index it is {clip}")
