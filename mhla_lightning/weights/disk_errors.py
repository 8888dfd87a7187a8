"""Plain words for a full or failing disk."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

_ROOM = 1.05  # bytes of a checkpoint over those of its tensors
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def complaint(error: OSError | RuntimeError, folder: Path) -> str:
    """Return what went wrong with the disk of a folder, in words."""
    number = getattr(error, "errno", None)
    if number in _NO_ROOM or "No space left" in str(error):
        return f"the disk of {folder} is full"
    return f"{folder} cannot be written ({getattr(error, 'strerror', None) or str(error).splitlines()[0]})"


def lack_of_room(folder: Path, needed: int, what: str = "a checkpoint") -> str | None:
    """Return what to report where bytes do not fit on a disk; None where they do.

    Args:
        folder: any folder of the disk.
        needed: bytes.
        what: what needs them.
    """
    free = shutil.disk_usage(folder).free
    if free >= needed * _ROOM:
        return None
    return (
        f"{what} of {needed / 2**20:,.0f} MiB does not fit: {free / 2**20:,.0f} MiB are free on the disk "
        f"of {folder}"
    )
