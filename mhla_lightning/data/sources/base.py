"""What every source gives."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class SourceSample:
    """One image as the bytes of a file. extension: "jpg" or "png". label: position in the source's classes. name: where it came from."""

    name: str
    image: bytes
    extension: str
    label: int


class Split(Protocol):
    """Samples in a fixed order, read one by one."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, position: int) -> SourceSample:
        """The sample at `position`."""


@dataclass(frozen=True)
class Source:
    """Class names, and the splits that the source has of its own: "train" always, "val" and "test" perhaps."""

    classes: tuple[str, ...]
    splits: dict[str, Split]


def png_bytes(image: Image.Image) -> bytes:
    """An image as PNG: grayscale stays grayscale, everything else becomes RGB."""
    buffer = io.BytesIO()
    image.convert("L" if image.mode in ("1", "L") else "RGB").save(buffer, format="PNG")
    return buffer.getvalue()
