"""The lock of a run folder: one process at a time trains there.

Not `filelock`: the kernel's lock that it takes names no owner and cannot change hands. This one names host,
process and SLURM job in a file. So a requeued job takes over the lock of its earlier start. And a process on
a node that SLURM has given up sees that it has lost the run.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import read_object

_held: dict[Path, dict[str, object]] = {}  # by this process
_WRITING = 1.0  # seconds in which another process may still be writing its lock


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run folder, and take over a lock whose process is gone.

    A process is gone when it was killed on this host, or was an earlier start of the same SLURM job. A lock
    that is empty or damaged names no process: a full disk or a power cut has left it.

    Raises:
        UserError: another process holds the folder.
        OSError: the lock cannot be written; nothing is left then.
    """
    lock = folder / "lock"
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
    }
    for _ in range(2):
        try:
            _write_new(lock, owner)
            break
        except FileExistsError:
            held = _holder(lock)
            if held and _alive(held, owner):
                job = f", job {held['job']}" if held.get("job") else ""
                raise UserError(
                    str(folder),
                    f"run {folder.name} is in use by process {held.get('pid')} on {held.get('host')}{job}; "
                    f"wait for it, choose another `run_id`, or remove {lock} if that process is gone",
                ) from None
            lock.unlink(missing_ok=True)
    else:
        raise UserError(str(folder), "another process has just taken the run; try again")
    _held[folder] = owner
    try:
        yield
    finally:
        del _held[folder]
        if read_object(lock) in ({}, owner):
            lock.unlink(missing_ok=True)


def is_held(folder: Path) -> bool:
    """Return whether a process trains in a run folder; one on another host counts."""
    held = read_object(folder / "lock")
    return bool(held) and _alive(held, {"host": socket.gethostname(), "job": None})


def check_held(folder: Path) -> None:
    """Stop a process that has lost its run folder.

    A node that SLURM has given up may train on while its job has begun again elsewhere. The earlier process
    must not write any more.

    Raises:
        UserError: this process held the folder, and another one does now.
    """
    owner, lock = _held.get(folder), folder / "lock"
    if owner is None:
        return
    found = read_object(lock)
    if found != owner and (found or not lock.exists()):
        raise UserError(
            str(folder), "another process (a later start of its job) has taken over the run; this one stops"
        )


def _write_new(lock: Path, owner: dict[str, object]) -> None:
    """Write a lock that appears whole or not at all. Raises FileExistsError where there is one."""
    temporary = lock.with_name(f".lock-{socket.gethostname()[:100]}-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(owner))
        try:
            os.link(temporary, lock)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            _write_exclusively(lock, owner)
    finally:
        temporary.unlink(missing_ok=True)


def _write_exclusively(lock: Path, owner: dict[str, object]) -> None:
    with lock.open("x") as file:
        try:
            json.dump(owner, file)
            file.flush()
        except OSError:
            lock.unlink(missing_ok=True)
            raise


def _holder(lock: Path) -> dict[str, object]:
    """The process that a lock names; empty where the lock stays damaged."""
    deadline = time.monotonic() + _WRITING
    while not (held := read_object(lock)) and lock.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return held


def _alive(held: dict[str, object], owner: dict[str, object]) -> bool:
    if owner["job"] is not None and held.get("job") == owner["job"]:
        return False  # a requeued job keeps its id and starts only after its last process has ended
    if held.get("host") != owner["host"]:
        return True  # its processes cannot be seen from here
    pid = held.get("pid")
    return isinstance(pid, int) and _started(pid) is not None and _started(pid) == held.get("started")


def _started(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None where there is no such process.

    It distinguishes a process from a later one with the same number.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown" if not Path("/proc/self/stat").exists() else None
