"""npy arrays from untrusted bytes: checked before memory is taken, never unpickled."""

from __future__ import annotations

import io
from typing import BinaryIO

import numpy as np

from mhla_lightning.errors import DataError


def npy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and type of the array in an npy file, read up to the start of its data.

    Raises ValueError, in one line: no npy file of version 1 or 2, objects inside, column-major order, or a
    dimension that is no size.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        read_header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read_header(file)
    except Exception as error:  # Python's parser, which reads the header, raises nearly anything on damage
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0][:200]) from error
    if dtype.hasobject or fortran or any(type(size) is not int or not 0 <= size < 2**62 for size in shape):
        raise ValueError(
            f"{str(dtype)[:100]} {str(shape)[:100]} {'by columns ' if fortran else ''}is not read"
        )
    return shape, dtype


def load_npy(data: bytes, address: str) -> np.ndarray:
    """Return the array in the bytes of an npy file.

    Raises:
        DataError: no npy file, objects inside, or another size than in the header.
    """
    stream = io.BytesIO(data)
    try:
        shape, dtype = npy_header(stream)
        if int(np.prod(shape, dtype=object)) * dtype.itemsize != len(data) - stream.tell():
            raise ValueError(f"{str(dtype)[:100]} {str(shape)[:100]} does not fill its {len(data)} bytes")
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OverflowError) as error:  # numpy counts items in 64 bits, and allows 64 dimensions
        raise DataError(address, f"it is no npy array that can be read ({error})") from error
