"""One process group a run folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import read_json

_held: dict[Path, dict[str, object]] = {}  # by this process


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds a run folder. A lock whose process is gone (killed on this host, or an earlier start of the same
    SLURM job) is taken over.

    Raises:
        UserError: another process holds it.
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
            with open(lock, "x") as file:
                json.dump(owner, file)
            break
        except FileExistsError:
            held = read_json(lock) or {}
            if _alive(held, owner):
                job = f", job {held['job']}" if held.get("job") else ""
                raise UserError(
                    f"run {folder.name} is in use by process {held.get('pid')} on {held.get('host')}{job};"
                    f" wait for it, choose another --run-id, or remove {lock} if that process is gone"
                ) from None
            lock.unlink(missing_ok=True)
    else:
        raise UserError(f"run {folder.name} was taken by another process just now; try again")
    _held[folder] = owner
    try:
        yield
    finally:
        del _held[folder]
        if read_json(lock) == owner:
            lock.unlink(missing_ok=True)


def check_held(folder: Path) -> None:
    """A node that SLURM has lost may train on while its job has begun again elsewhere: the earlier process
    must write nothing any more.

    Raises:
        UserError: this process held the folder, and another one does now.
    """
    owner = _held.get(folder)
    if owner is not None and read_json(folder / "lock") != owner:
        raise UserError(
            f"run {folder.name} was taken over by another process (a later start of its job); this one stops"
        )


def _alive(held: dict[str, object], owner: dict[str, object]) -> bool:
    if owner["job"] is not None and held.get("job") == owner["job"]:
        return False  # a requeued job keeps its id and starts only after its last process has ended
    if held.get("host") != owner["host"]:
        return True  # cannot be looked up from here
    pid = held.get("pid")
    return isinstance(pid, int) and _started(pid) is not None and _started(pid) == held.get("started")


def _started(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot: tells it from a later one with the same number.
    None when there is no such process.
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
