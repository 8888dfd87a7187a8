"""Locks on folders in the making: one process builds, one process uses a device.

The package filelock takes the lock by flock(2), which the kernel releases however the process ends.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mhla_lightning.errors import UserError

LOCK_FILES = ("lock", "holder.json")


@contextmanager
def hold_folder(folder: Path, target: Path, wait: bool) -> Iterator[None]:
    """Make `folder` and hold it in the block.

    Args:
        folder: the hidden folder of the work.
        target: the folder that the work makes; messages name it.
        wait: wait until another process releases the folder; False refuses at once.

    Raises:
        UserError: the folder cannot be made or locked, or another process holds it.
    """
    lock = _locked(folder, target, wait)
    try:
        (folder / "holder.json").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        yield
    finally:
        if folder.is_dir() and all(path.name in LOCK_FILES for path in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)  # nothing was begun
        lock.release()


def try_lock(path: Path) -> FileLock | None:
    """Lock a file until the lock is released or the process ends.

    Returns None while another process holds the lock. Raises OSError where the file system knows no locks.
    """
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def _locked(folder: Path, target: Path, wait: bool) -> FileLock:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(str(target), f"cannot be made: {error.strerror} in {target.parent}") from error
        lock = FileLock(folder / "lock", fallback_to_soft=False)
        try:
            lock.acquire(blocking=wait)
            return lock
        except Timeout:
            raise UserError(
                str(target), f"{_holder(folder)} is making it; wait for it, or choose another folder"
            ) from None
        except FileNotFoundError:  # the process that held the lock finished and removed the folder
            continue
        except OSError as error:
            raise UserError(
                str(target),
                f"{folder}/lock cannot be locked ({error.strerror}); make it on a local disk and copy it",
            ) from error


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / "holder.json").read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
