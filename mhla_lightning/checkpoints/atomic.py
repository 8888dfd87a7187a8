"""A checkpoint folder is written under another name, synced to disk, marked COMPLETE and only then
renamed; which of them are kept.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhla_lightning.runs.folder import complete_checkpoints, read_json, step_folder, write_json

MARKER = "COMPLETE"


def begin(checkpoints: Path, step: int) -> Path:
    """An empty folder to write step `step` into; what killed saves left behind goes."""
    discard(checkpoints)
    folder = checkpoints / f".tmp-{step_folder(step)}"
    folder.mkdir()
    return folder


def discard(checkpoints: Path) -> None:
    """Removes checkpoints that were not written to the end."""
    for left in checkpoints.glob(".tmp-step-*"):
        shutil.rmtree(left, ignore_errors=True)


def commit(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Writes state.json and the marker, syncs the folders, renames; returns the finished folder. The files
    were synced by those who wrote them.
    """
    write_json(folder / "state.json", dict(state))
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(path)
    (folder / MARKER).touch()
    sync(folder / MARKER)
    sync(folder)
    final = folder.parent / step_folder(step)
    if final.exists():  # the same step, saved by an attempt that went on from an older checkpoint
        shutil.rmtree(final)
    os.rename(folder, final)
    sync(final.parent)
    return final


@dataclass(frozen=True)
class Keep:
    """Which complete checkpoints stay.

    Attributes:
        last: so many of the newest.
        best: so many more, the best by `monitor`.
        monitor: a tag of validation; checkpoints saved at a validation know its value.
        highest: whether high values are good.
    """

    last: int
    best: int = 0
    monitor: str | None = None
    highest: bool = False


def prune(run: Path, keep: Keep) -> None:
    """Removes the complete checkpoints that need not be kept."""
    found = complete_checkpoints(run)
    stay = {*found[-keep.last :], *best_checkpoints(found, keep)}
    for old in found:
        if old not in stay:
            (
                old / MARKER
            ).unlink()  # from here on it is not a checkpoint any more, even when the removal is cut short
            shutil.rmtree(old)


def best_checkpoints(checkpoints: Sequence[Path], keep: Keep) -> list[Path]:
    """The best by the monitored tag, best first; of equal ones the newest. What is no number is never
    best.
    """
    if not keep.best or keep.monitor is None:
        return []
    values = {
        path: (read_json(path / "state.json") or {}).get("metrics", {}).get(keep.monitor)
        for path in reversed(checkpoints)
    }
    measured = [path for path, value in values.items() if value is not None and math.isfinite(value)]
    return sorted(measured, key=lambda path: -values[path] if keep.highest else values[path])[: keep.best]


def sync(path: Path) -> None:
    """Has a file's or folder's content on disk before it returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
