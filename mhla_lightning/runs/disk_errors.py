"""Plain words for a full or failing disk. Standard library only."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mhla_lightning.errors import DiskError, UserError
from mhla_lightning.runs.folder import NO_ROOM, newest_checkpoint

_ROOM = 1.05  # bytes of a checkpoint over those of its tensors
_FAILING = (errno.EIO, errno.EROFS, errno.ESTALE)


def complaint(error: OSError | RuntimeError, folder: Path) -> str:
    """Return what went wrong with the disk of a folder, in words."""
    number = getattr(error, "errno", None)
    if number in NO_ROOM or "No space left" in str(error):
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


def disk_problem(error: BaseException, folder: Path) -> str | None:
    """Return the full or failing disk behind an error, in words; None for another cause.

    Args:
        error: a library may have wrapped the disk's own error.
        folder: named where the error names no file.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DiskError):
            return cause.reason
        if isinstance(cause, OSError) and cause.errno in (*NO_ROOM, *_FAILING):
            named = Path(str(cause.filename)).absolute().parent if cause.filename else folder
            return complaint(cause, named)
        cause = cause.__cause__ or cause.__context__
    return None


def disk_error(run: Path, problem: str, place: Path | None = None) -> DiskError:
    """Return the error of a run whose disk is full or fails; it says how to go on.

    Args:
        run: the run folder.
        problem: in words.
        place: the key of the error; None takes the run folder.
    """
    last = newest_checkpoint(run)
    where = f"the last checkpoint, {last.name}, is intact" if last else "there is no earlier checkpoint"
    return DiskError(
        str(place or run),
        f"{problem}; {where}: make room, or name another place with `runs`, and give the same command again",
    )


@contextmanager
def disk_errors(run: Path) -> Iterator[None]:
    """Turn errors of the disk in the block into one :class:`DiskError`, also those of threads.

    Args:
        run: the run folder.
    """
    show = threading.excepthook

    def quiet(args: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread keeps its error for the next call of the main thread, and prints it, too.
        if args.exc_value is None or disk_problem(args.exc_value, run) is None:
            show(args)

    threading.excepthook = quiet
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        problem = disk_problem(error, run)
        if problem is None:
            raise
        raise disk_error(run, problem) from error
    finally:
        threading.excepthook = show
