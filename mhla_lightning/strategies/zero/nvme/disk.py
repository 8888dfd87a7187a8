"""The local disk of `device: nvme` (experimental): its checks, and a run's folder on it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mhla_lightning.errors import UserError

PLACES = ("offload_optimizer", "offload_param")


def on_disk(zero: Mapping[str, Any]) -> list[str]:
    """Return the keys of DeepSpeed's `zero_optimization` that put something on a disk."""
    return [place for place in PLACES if (zero.get(place) or {}).get("device") == "nvme"]


def check_disk(zero: Mapping[str, Any]) -> None:
    """Refuse disks that cannot be used, on the machine that trains and before anything is built.

    Args:
        zero: DeepSpeed's `zero_optimization`.

    Raises:
        UserError: no folder, a folder that cannot be written, or no libaio.
    """
    for place in on_disk(zero):
        key = f"trainer.strategy.zero_optimization.{place}.nvme_path"
        if not zero[place].get("nvme_path"):
            raise UserError(key, "the key is not set; device nvme needs a folder on a fast local disk")
        path = Path(zero[place]["nvme_path"])
        if not path.is_dir():
            raise UserError(key, f"this machine has no folder {path}; name a folder on a fast local disk")
        if not os.access(path, os.W_OK | os.X_OK):
            raise UserError(key, f"{path} cannot be written")
    if on_disk(zero) and not _reads_and_writes():
        raise UserError(
            "trainer.strategy",
            "device nvme needs libaio's headers on this machine (Debian: libaio-dev; conda: libaio) and a "
            "C++ compiler",
        )


def _reads_and_writes() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible())


def swap_folder(base: str | Path, run: Path) -> Path:
    """Return a run's own folder in a folder that several runs may share.

    A resumed run has the same folder again.
    """
    run = run.absolute()
    return Path(base, f"{run.name}-{hashlib.sha256(os.fsencode(run)).hexdigest()[:8]}")


def remove_swapped(folder: Path, rank: int) -> None:
    """Delete a rank's files in a run's :func:`swap_folder`.

    The last rank of a machine also deletes the folder.
    """
    for own in folder.glob(f"*/*/rank{rank}"):
        shutil.rmtree(own, ignore_errors=True)
    with suppress(OSError):  # others still use it
        for parent in (*folder.glob("*/*"), *folder.glob("*"), folder):
            parent.rmdir()
