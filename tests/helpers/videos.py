"""Small real videos, written by PyAV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

_CODECS = {
    ".mp4": ("libx264", "yuv420p"),
    ".mkv": ("libx264", "yuv420p"),
    ".webm": ("libvpx", "yuv420p"),
    ".gif": ("gif", "gray"),
}
_OPTIONS = {"libx264": {"crf": "4"}, "libvpx": {"b": "4M"}}
Parcel = tuple[bytes, int, bool]  # the content of a packet, its time in ticks, whether it is a key frame
STEP = 6  # levels of grey between neighbouring frames of `greys`


def greys(frames: int, size: tuple[int, int] = (32, 48)) -> list[np.ndarray]:
    """Flat frames that tell their number: frame n is 20 + STEP * n. At most 36."""
    assert frames * STEP <= 220
    return [np.full((*size, 3), 20 + STEP * number, np.uint8) for number in range(frames)]


def numbers(clip: np.ndarray) -> list[int]:
    """The numbers of the frames of `greys` in a clip, (frames, height, width, 3)."""
    levels = (clip.astype(np.float64).mean(axis=(1, 2, 3)) - 20) / STEP
    assert np.abs(levels - levels.round()).max() < 0.4, "no frame of greys"
    return levels.round().astype(int).tolist()


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    rate: int = 10,
    times: Sequence[float] | None = None,
    faststart: bool = False,
    key_every: int = 10,
    codec: tuple[str, str, dict[str, str]] | None = None,
    container: dict[str, str] | None = None,
    prepare: Callable[[Any], None] = lambda stream: None,
) -> Path:
    """A video of frames, uint8 (height, width, 3) each. times: in seconds, of every frame; None is at
    `rate`. faststart: the header comes first. codec: its name, the pixel format and options. container: its
    options. prepare: called with the stream before it is opened.
    """
    coder, pixels = _CODECS[path.suffix] if codec is None else codec[:2]
    path.parent.mkdir(parents=True, exist_ok=True)
    container_options = {"movflags": "+faststart"} if faststart else container or {}
    with av.open(str(path), "w", options=container_options) as file:
        stream = file.add_stream(coder, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        stream.codec_context.time_base = stream.time_base = Fraction(
            1, 100 if path.suffix == ".gif" else 1000
        )
        stream.codec_context.gop_size = key_every
        stream.codec_context.thread_count = 1
        stream.codec_context.options = _OPTIONS.get(coder, {}) if codec is None else codec[2]
        prepare(stream)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(
                format=pixels,
                threads=1,
            )
            time = number / rate if times is None else times[number]
            frame.pts, frame.time_base = (
                round(time / stream.codec_context.time_base),
                stream.codec_context.time_base,
            )
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def repack(source: Path, target: Path, packets: Callable[[list[Any]], Iterable[Parcel]]) -> Path:
    """The video of `source`, in the packets that a function makes of its packets."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        out = new.add_stream_from_template(stream, opaque=True)
        assert stream.time_base is not None
        for data, time, key in packets([packet for packet in old.demux(stream) if packet.size]):
            packet = av.Packet(data)
            packet.pts = packet.dts = time
            packet.time_base, packet.is_keyframe, packet.stream = stream.time_base, key, out
            new.mux(packet)
    return target


def save_videos(
    folder: Path, count: int, frames: int = 30, suffix: str = ".mp4", size: tuple[int, int] = (32, 48)
) -> None:
    """video0, video1, ... of `greys` with captions beside them."""
    for number in range(count):
        write_video(folder / f"video{number}{suffix}", greys(frames, size))
        (folder / f"video{number}.txt").write_text(f"grey film number {number}\n")
