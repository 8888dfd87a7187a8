"""Whether a video file lacks its end.

The boxes of mp4, the elements of Matroska and the blocks of GIF tell it.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

_EXTENSION, _PICTURE, _TRAILER = 0x21, 0x2C, 0x3B  # first bytes of the blocks of a GIF
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067


def lacks_bytes(path: Path, kind: str) -> bool | None:
    """Return whether the end of a file is missing; None where the file does not tell.

    Args:
        path: of the video.
        kind: FFmpeg's name of the format.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if kind == "gif":
            return _gif(file)
        if "matroska" in kind:
            return _matroska(file, size)
        return _mp4(file, size) if "mp4" in kind else None


def _mp4(file: BinaryIO, size: int) -> bool | None:
    """Return whether a box reaches beyond the end; None where the last one has no size."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        (length,) = struct.unpack(">I4x", file.read(8))
        if length == 0:
            return None
        if length == 1 and at + 16 <= size:
            (length,) = struct.unpack(">Q", file.read(8))
        if length < 8:  # no box, but something that was added behind the film
            return False
        at += length
    return at > size


def _matroska(file: BinaryIO, size: int) -> bool | None:
    """Return whether the first segment reaches beyond the end; None where it has no size."""
    length = 0
    for wanted in (_EBML, _SEGMENT):
        file.seek(length, os.SEEK_CUR)
        name, found = _number(file, keep_marker=True), _number(file)
        if name != wanted or found is None:
            return None
        length = found
    return file.tell() + length > size


def _number(file: BinaryIO, keep_marker: bool = False) -> int | None:
    """Read a number of Matroska's variable length.

    None is an unknown length or the end of the file.
    """
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    rest = file.read(more)
    value = int.from_bytes(first + rest, "big")
    if keep_marker:
        return value
    bits = 7 * (more + 1)
    value &= (1 << bits) - 1
    return None if len(rest) < more or value == (1 << bits) - 1 else value


def _gif(file: BinaryIO) -> bool:
    """Return whether a GIF ends inside a block. FFmpeg needs no trailer."""
    header = file.read(13)
    if len(header) < 13:
        return True
    file.seek(_palette(header[10]), os.SEEK_CUR)
    while label := file.read(1):
        if label[0] == _TRAILER:
            return False
        if label[0] == _EXTENSION:
            file.seek(1, os.SEEK_CUR)
        elif label[0] == _PICTURE:
            place = file.read(9)
            if len(place) < 9:
                return True
            file.seek(_palette(place[8]) + 1, os.SEEK_CUR)
        else:
            continue  # zeros between blocks, or something that was added behind the film
        if not _passed(file):
            return True
    return False


def _palette(flags: int) -> int:
    """Return the bytes of a table of colours."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _passed(file: BinaryIO) -> bool:
    """Go to the end of a block's data. Return whether it is there."""
    while length := file.read(1):
        if not length[0]:
            return True
        file.seek(length[0], os.SEEK_CUR)
    return False
