"""Untrusted video files by PyAV: frames as a player shows them, clips as mp4. No torch."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mhla_lightning.data.index import Clip
from mhla_lightning.errors import DataError, UserError, missing_extra

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".gif")
# FFmpeg also knows play lists and image patterns, which open other files and addresses.
_OPEN = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif", "protocol_whitelist": "file"}
_X264 = {"crf": "14", "preset": "medium", "threads": "1"}  # other numbers of threads give other bytes
_MOST_PIXELS = 2**26  # of a frame; more is damage or an attack


def av_package(purpose: str) -> Any:
    """Return the package PyAV. Raises UserError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError(None, missing_extra("av", "video", purpose)) from error
    return av


@contextmanager
def open_video(source: Path | bytes, name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video file, or the bytes of an mp4 file, and its first video stream.

    Args:
        source: file or bytes.
        name: of the file, for messages.

    Raises DataError for a file that cannot be opened, has no pictures, or fails while the block reads it.
    """
    av = av_package(f"reading {name}")
    try:
        options = _OPEN if isinstance(source, Path) else {"format_whitelist": _OPEN["format_whitelist"]}
        with av.open(
            str(source.absolute()) if isinstance(source, Path) else io.BytesIO(source), options=options
        ) as container:
            if not container.streams.video:
                raise DataError(name, "it holds no video")
            stream = container.streams.video[0]
            if stream.codec_context is None or not 0 < stream.width * stream.height <= _MOST_PIXELS:
                raise DataError(
                    name,
                    f"its video has {stream.width}x{stream.height} pixels or an unknown codec, and cannot be "
                    "decoded",
                )
            yield container, stream
    except (av.error.FFmpegError, av.error.PyAVCallbackError, UnicodeDecodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            name,
            f"it cannot be decoded ({reason}): it is no video, or was cut or damaged; copy it again or "
            "remove it",
        ) from error


def pixels(frame: VideoFrame) -> np.ndarray:
    """Return the picture of a frame, rotated by its file's setting, uint8 (height, width, 3)."""
    picture = frame.to_ndarray(format="rgb24")
    quarters = round(frame.rotation / 90) % 4  # counterclockwise, as np.rot90
    return np.rot90(picture, quarters) if quarters else picture


def shown_aspect(stream: VideoStream, rotation: int = 0) -> float:
    """Return width over height of the shown picture.

    Pixels may be no squares; rotation: in degrees.
    """
    aspect = stream.width * float(stream.sample_aspect_ratio or 1) / stream.height
    return 1 / aspect if round(rotation / 90) % 2 else aspect


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
        stream.codec_context.thread_count = 1  # the workers of the loader already use all cores
        _demand(
            name,
            (stream.height, stream.width) == (clip.height, clip.width),
            f"{stream.height}x{stream.width} pixels",
            clip,
        )
        number = 0
        for frame in container.decode(stream):
            _demand(
                name,
                number < clip.frames and (frame.height, frame.width) == (clip.height, clip.width),
                "more or other frames",
                clip,
            )
            _demand(name, not frame.is_corrupt, "damaged frames", clip)
            found[number] = frame.to_ndarray(format="rgb24")
            number += 1
    _demand(name, number == clip.frames, f"{number} frames", clip)
    return found


def measure_mp4(data: bytes, name: str) -> tuple[int, int, int, float | None]:
    """Return frames, height, width and frames a second of an mp4 file. Raises DataError."""
    with open_video(data, name) as (container, stream):
        frames = sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
        return (
            frames,
            stream.height,
            stream.width,
            float(stream.average_rate) if stream.average_rate else None,
        )


def _demand(name: str, fine: bool, found: str, clip: Clip) -> None:
    if not fine:
        raise DataError(name, f"it has {found}; in the index it is {clip}")
