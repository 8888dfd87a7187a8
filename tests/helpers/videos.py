"""Small real videos, written by PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_CODECS = {
    ".mp4": ("libx264", "yuv420p"),
    ".mkv": ("libx264", "yuv420p"),
    ".webm": ("libvpx", "yuv420p"),
    ".gif": ("gif", "gray"),
}
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
) -> Path:
    """A video of frames, uint8 (height, width, 3) each. times: in seconds, of every frame; None is at
    `rate`. faststart: the header comes first.
    """
    codec, pixels = _CODECS[path.suffix]
    path.parent.mkdir(parents=True, exist_ok=True)
    container_options = {"movflags": "+faststart"} if faststart else {}
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        stream.codec_context.time_base = stream.time_base = Fraction(
            1, 100 if path.suffix == ".gif" else 1000
        )
        stream.codec_context.gop_size = key_every
        stream.codec_context.options = (
            {"crf": "4"} if codec == "libx264" else {"b": "4M"} if codec == "libvpx" else {}
        )
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(
                format=pixels
            )
            time = number / rate if times is None else times[number]
            frame.pts, frame.time_base = (
                round(time / stream.codec_context.time_base),
                stream.codec_context.time_base,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def save_videos(
    folder: Path, count: int, frames: int = 30, suffix: str = ".mp4", size: tuple[int, int] = (32, 48)
) -> None:
    """video0, video1, ... of `greys` with captions beside them."""
    for number in range(count):
        write_video(folder / f"video{number}{suffix}", greys(frames, size))
        (folder / f"video{number}.txt").write_text(f"grey film number {number}\n")
