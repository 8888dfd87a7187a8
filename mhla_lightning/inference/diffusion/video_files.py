"""Write videos as H.264 in mp4, as a contact sheet with captions, or as an animated GIF.

Frames are uint8 (F, H, W, 3).
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mhla_lightning.data.encoders.videos import open_video, shown, upright
from mhla_lightning.errors import UserError, missing_extra
from mhla_lightning.runs.folder import replacing

COLUMNS = 8  # frames of a contact sheet's row
_SIDE = 160  # the longer side of its pictures, about
_GAP, _CAPTION = 4, 18
# Without x264's macroblock tree the same frames give the same bytes in every run.
_X264 = {"crf": "16", "preset": "medium", "mbtree": "0"}
_SLUG = 40  # characters


def require_av() -> None:
    """Check that PyAV, which writes mp4, is installed.

    Raises:
        UserError: it is missing.
    """
    if find_spec("av") is None:
        raise UserError(None, missing_extra("av", "video", "writing mp4"))


def write_mp4(path: Path, frames: np.ndarray, rate: float) -> None:
    """Write frames completely or not at all; the same frames give the same bytes.

    H.264 in 4:2:0 plays in every player and browser. It needs even sides, so an odd side gets its last row or
    column twice.

    Args:
        path: the file.
        frames: uint8 (F, H, W, 3).
        rate: frames per second.

    Raises:
        UserError: PyAV is missing.
    """
    require_av()
    import av

    even = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), "edge")
    fast = {"movflags": "faststart"}
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4", options=fast) as container:
        stream: Any = container.add_stream(
            "libx264", rate=Fraction(rate).limit_denominator(1001), options=_X264
        )
        stream.height, stream.width, stream.pix_fmt = even.shape[1], even.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1  # the file records the number of threads
        for frame in even:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
            )
        container.mux(stream.encode())


def file_name(number: int, prompt: str) -> str:
    """Return a file name such as `0003-a-red-ball-falls.mp4`."""
    return f"{number:04d}-{prompt_slug(prompt)}.mp4"


def prompt_slug(text: str) -> str:
    """Reduce a text to ASCII letters, digits and hyphens, at most 40; `empty` if none are left."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:_SLUG].rstrip("-") or "empty"


def thumbnails(frames: np.ndarray) -> np.ndarray:
    """Pick at most 8 frames evenly over time and scale them: uint8 (<= 8, h, w, 3).

    The first and the last frame are among them.
    """
    return at_a_glance(frames[np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).round().astype(int)])


def at_a_glance(frames: np.ndarray) -> np.ndarray:
    """Scale frames to about 160 pixels on their longer side: uint8 (F, h, w, 3)."""
    height, width = frames.shape[1:3]
    longer = max(height, width)
    if longer <= _SIDE:  # a whole multiple keeps every pixel exact
        return frames.repeat(_SIDE // longer, axis=1).repeat(_SIDE // longer, axis=2)
    size = (max(1, round(width * _SIDE / longer)), max(1, round(height * _SIDE / longer)))
    return np.stack(
        [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in frames]
    )


def video_sheet(rows: Sequence[np.ndarray], captions: Sequence[str]) -> Image.Image:
    """Draw a contact sheet: one row per video, a caption above its frames in their order.

    Args:
        rows: uint8 (frames, h, w, 3) each, all of one size, such as :func:`thumbnails`.
        captions: one per row; a caption is cut at the width of the sheet.
    """
    height, width = rows[0].shape[1:3]
    columns = max(len(row) for row in rows)
    size = (columns * (width + _GAP) + _GAP, len(rows) * (_CAPTION + height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = number * (_CAPTION + height + _GAP)
        draw.text(
            (_GAP, top + 2),
            _fitting(draw, font, " ".join(caption.split()), size[0] - 2 * _GAP),
            fill="black",
            font=font,
        )
        for column, frame in enumerate(row):
            sheet.paste(Image.fromarray(frame), (_GAP + column * (width + _GAP), top + _CAPTION))
    return sheet


def _fitting(draw: ImageDraw.ImageDraw, font: Any, text: str, width: int) -> str:
    while text and draw.textlength(text, font=font) > width:
        text = text[:-2].rstrip("…") + "…" if len(text) > 2 else ""
    return text


def animated_gif(frames: np.ndarray, rate: float) -> bytes:
    """Encode frames as an endless GIF, which TensorBoard plays among its images.

    Args:
        frames: uint8 (F, H, W, 3).
        rate: frames per second; more than 50 are played as 50.
    """
    pictures = [Image.fromarray(frame) for frame in frames]
    out = io.BytesIO()
    pictures[0].save(
        out, "gif", save_all=True, append_images=pictures[1:], duration=max(20, round(1000 / rate)), loop=0
    )
    return out.getvalue()


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video file, uint8 (H, W, 3) each.

    Raises:
        UserError: PyAV is missing.
        DataError: the file is damaged.
    """
    with open_video(path, str(path)) as (container, stream):
        for frame, _, _ in shown(container, stream, str(path)):
            yield upright(frame, str(path))
