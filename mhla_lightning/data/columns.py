"""Positions of rows of tokens in a tar file, found by a few short reads."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mhla_lightning.data.members import shown
from mhla_lightning.data.npy import npy_header
from mhla_lightning.errors import DataError

TOKEN_TYPES = ("uint16", "uint32")
PADDING = 2**16 - 1  # document number of padding in a row; -1 in a batch
COLUMNS = ("tokens.npy", "documents.npy")
_BLOCK = tarfile.BLOCKSIZE
_HEAD_BYTES = _BLOCK + 256  # a tar header, and more than the header of an npy file with two dimensions takes
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)  # webdataset's writer makes one for every mtime


class Column(NamedTuple):
    """The rows of a member: byte at which they start, (rows, length) and type of the array."""

    start: int
    shape: tuple[int, int]
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.shape[1] * self.dtype.itemsize


def find_columns(
    read: Callable[[int, int], bytes], start: int, end: int, address: str
) -> tuple[Column, Column]:
    """Find the tokens and the documents of one sample.

    Args:
        read: returns the bytes [start, stop) of the shard.
        start: byte of the first tar header of the sample.
        end: byte after its last member.
        address: of the shard, for messages.

    Raises DataError for anything but two arrays (rows, length) of uint16 or uint32.
    """
    found: dict[str, Column] = {}
    position = start
    while position < end and len(found) < len(COLUMNS):
        head = read(position, min(position + _HEAD_BYTES, end))
        try:
            info = tarfile.TarInfo.frombuf(head[:_BLOCK], "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError) as error:
            raise DataError(
                address,
                f"there is no tar header at byte {position} ({error}): its bytes changed; copy it again",
            ) from error
        after = position + _BLOCK + -(-info.size // _BLOCK) * _BLOCK
        if not position < after <= end:  # a header can hold a size below 0
            raise DataError(
                address,
                f"member {shown(info.name)} has {info.size} bytes by its header, more than its sample: copy "
                "or pack the shard again",
            )
        extension = next((name for name in COLUMNS if info.name.endswith(f".{name}")), None)
        if extension is not None and info.type not in _EXTENDED:
            found[extension] = _column(info, head[_BLOCK:], position + _BLOCK, address)
        position = after
    if len(found) < len(COLUMNS) or found[COLUMNS[0]].shape != found[COLUMNS[1]].shape:
        shapes = ", ".join(f"{name} {column.shape}" for name, column in found.items()) or "neither"
        raise DataError(
            address,
            f"the sample at byte {start} needs {' and '.join(COLUMNS)} of equal shape, and has {shapes}: "
            "index or pack it again",
        )
    return found[COLUMNS[0]], found[COLUMNS[1]]


def _column(info: tarfile.TarInfo, head: bytes, start: int, address: str) -> Column:
    stream = io.BytesIO(head)
    try:
        shape, dtype = npy_header(stream)
    except ValueError as error:
        raise DataError(
            address,
            f"member {shown(info.name)} is no npy array ({error}): its bytes changed; copy it again",
        ) from error
    fits = (
        info.isreg() and dtype.name in TOKEN_TYPES and dtype.isnative and len(shape) == 2 and min(shape) > 0
    )
    if not fits or info.size != stream.tell() + shape[0] * shape[1] * dtype.itemsize:
        raise DataError(
            address,
            f"member {shown(info.name)} is {dtype} {shape} in {info.size} bytes; (rows, length) of uint16 or "
            "uint32 is needed",
        )
    return Column(start + stream.tell(), (shape[0], shape[1]), dtype)
