"""One process a folder in the making. The kernel lets a lock go when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mhla_lightning.errors import UserError


@contextmanager
def hold_folder(folder: Path, target: Path, wait: bool) -> Iterator[None]:
    """Make `folder` and hold it. target: what messages call the work. wait: until another process lets it go,
    instead of refusing.

    Raises UserError when the folder cannot be made or locked, and when another process holds it.
    """
    file = _locked(folder, target, wait)
    try:
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
        file.flush()
        yield
    finally:
        if folder.is_dir() and [path.name for path in folder.iterdir()] == ["lock"]:
            shutil.rmtree(
                folder, ignore_errors=True
            )  # nothing was begun; whoever waits for the lock sees that it is gone
        file.close()


def _locked(folder: Path, target: Path, wait: bool) -> TextIO:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{target} cannot be made: {error.strerror} in {target.parent}") from error
        try:
            file = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115  held by the caller
        except FileNotFoundError:  # another process finished, and removed the folder between these two lines
            continue
        except OSError as error:
            raise UserError(f"{target} cannot be made: {error.strerror} in {target.parent}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise _taken(file, target) from None
        except OSError as error:
            file.close()
            raise UserError(
                f"{folder}/lock cannot be locked ({error.strerror}): make {target} on a disk of this "
                "machine and copy it"
            ) from error
        if _same(file, folder / "lock"):
            return file
        file.close()  # its holder removed it on finishing


def _taken(file: TextIO, target: Path) -> UserError:
    with file:
        file.seek(0)
        try:
            owner = json.load(file)
            who = f"process {owner['pid']} on {owner['host']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
    return UserError(f"{target} is being made by {who}: wait for it, or choose another folder")


def _same(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
