"""Files of text as they are, or compressed by gzip, zstd, xz or bzip2.

Their first bytes decide.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from mhla_lightning.errors import DataError, UserError, missing_extra

SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
HEAD_BYTES = 512  # of a file, enough to tell compressed files and archives
_BEGINNINGS = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz"}
_BZIP2 = (b"1AY&SY", b"\x17rE8P\x90")  # after BZh and a digit: a block, or the end of an empty file
_SKIPPED_FRAME = b"\x2a\x4d\x18"  # after 0x50 to 0x5F; zstd's own tools begin some files with one
_WINDOW = 2**31  # bytes: what `zstd --long=31` writes, the most there is


class Opened(NamedTuple):
    """A file as it is on the disk, whose position shows the progress, and its content."""

    raw: IO[bytes]
    plain: IO[bytes]


def compression_of(head: bytes) -> str | None:
    """Return gzip, zstd, xz or bzip2 by the first bytes of a file, else None."""
    for beginning, name in _BEGINNINGS.items():
        if head.startswith(beginning):
            return name
    if head[:3] == b"BZh" and head[4:10] in _BZIP2:
        return "bzip2"
    return "zstd" if head[1:4] == _SKIPPED_FRAME and head[0] >> 4 == 5 else None


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Give the block a file's content, decompressed where it is compressed.

    Members and frames that follow each other are one content.

    Raises:
        UserError: the package that zstd needs is not installed.
        DataError: a file that cannot be opened, or in the block that ends early or is damaged.
    """
    try:
        raw = open(path, "rb")  # noqa: SIM115  closed below
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror}); repair or remove it") from error
    with raw:
        head = raw.read(HEAD_BYTES)
        raw.seek(0)
        compression = compression_of(head)
        errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
        if compression == "zstd":
            errors += (zstandard(path).ZstdError,)
        try:
            with _plain(path, raw, compression) as plain:
                yield Opened(raw, plain)
        except errors as error:
            raise DataError(
                str(path), f"cannot be read to its end ({error}); it was cut or damaged, so copy it again"
            ) from error


@contextmanager
def _plain(path: Path, raw: IO[bytes], compression: str | None) -> Iterator[IO[bytes]]:
    if compression == "gzip":
        with gzip.open(raw) as plain:
            yield plain  # type: ignore[misc]
    elif compression == "xz":
        with lzma.open(raw) as plain:
            yield plain
    elif compression == "bzip2":
        with bz2.open(raw) as plain:
            yield plain
    elif compression == "zstd":
        decompressor = zstandard(path).ZstdDecompressor(max_window_size=_WINDOW)
        with decompressor.stream_reader(raw, read_across_frames=True) as stream:
            yield io.BufferedReader(stream, 2**20)
    else:
        yield raw


def zstandard(path: Path) -> Any:
    """Return the package zstandard. Raises UserError, with the file as its key."""
    try:
        import zstandard as package
    except ImportError as error:
        raise UserError(str(path), missing_extra("zstandard", "language", "reading it")) from error
    return package
