"""The commit protocol of checkpoint folders, and which of them are kept.

A folder is written under another name, synced to disk, marked COMPLETE and only then renamed.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhla_lightning.runs.folder import complete_checkpoints, read_object, step_folder, write_json

MARKER = "COMPLETE"


def begin(checkpoints: Path, step: int) -> Path:
    """Make an empty folder to write step `step` into, and remove what killed saves left behind.

    Later checkpoints get names that no reader knows: training went on from an earlier one, since they are
    damaged.
    """
    discard(checkpoints)
    for later in complete_checkpoints(checkpoints.parent):
        if int(later.name.removeprefix("step-")) > step:
            set_aside(later)
    folder = checkpoints / f".tmp-{step_folder(step)}"
    folder.mkdir()
    return folder


def discard(checkpoints: Path) -> None:
    """Remove checkpoints that were not written to the end."""
    for left in checkpoints.glob(".tmp-step-*"):
        shutil.rmtree(left, ignore_errors=True)


def set_aside(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name that is no checkpoint's; return it."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def commit(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write state.json and the marker, sync the folders, rename; return the finished folder.

    Args:
        folder: of :func:`begin`; its files are synced already.
        step: optimizer steps done.
        state: content of state.json.
    """
    write_json(folder / "state.json", dict(state))
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(path)
    (folder / MARKER).touch()
    sync(folder / MARKER)
    sync(folder)
    final = folder.parent / step_folder(step)
    if final.exists():  # the same step, saved by an attempt that had resumed from an older checkpoint
        shutil.rmtree(final)
    os.rename(folder, final)
    sync(final.parent)
    return final


@dataclass(frozen=True)
class Keep:
    """Which complete checkpoints stay.

    Attributes:
        last: number of the newest that stay.
        best: number of further ones that stay, the best by `monitor`.
        monitor: a tag of validation; checkpoints saved at a validation hold its value. None: no best ones.
        highest: whether high values are good.
    """

    last: int
    best: int = 0
    monitor: str | None = None
    highest: bool = False


def prune(run: Path, keep: Keep) -> None:
    """Remove the complete checkpoints that need not be kept."""
    found = complete_checkpoints(run)
    stay = {*found[-keep.last :], *best_checkpoints(found, keep)}
    for old in found:
        if old not in stay:
            # Without the marker it is no checkpoint any more, even when the removal is cut short.
            (old / MARKER).unlink()
            shutil.rmtree(old)


def best_checkpoints(checkpoints: Sequence[Path], keep: Keep) -> list[Path]:
    """Return the best by the monitored tag, best first; of equal ones the newest.

    A value that is not finite is never best.
    """
    if not keep.best or keep.monitor is None:
        return []
    values: dict[Path, float] = {}
    for path in reversed(checkpoints):
        value = (read_object(path / "state.json").get("metrics") or {}).get(keep.monitor)
        if value is not None and math.isfinite(value):
            values[path] = -value if keep.highest else value
    return sorted(values, key=lambda path: values[path])[: keep.best]


def sync(path: Path) -> None:
    """Return only when the content of a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
