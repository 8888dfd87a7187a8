"""A checkpoint folder is written under another name, synced to disk, marked COMPLETE and only then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mhla_lightning.runs.folder import complete_checkpoints, step_folder, write_json

MARKER = "COMPLETE"


def begin(checkpoints: Path, step: int) -> Path:
    """An empty folder to write step `step` into; what killed saves left behind goes."""
    for left in checkpoints.glob(".tmp-step-*"):
        shutil.rmtree(left)
    folder = checkpoints / f".tmp-{step_folder(step)}"
    folder.mkdir()
    return folder


def commit(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Writes state.json and the marker, syncs everything, renames; returns the finished folder."""
    write_json(folder / "state.json", dict(state))
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
    (folder / MARKER).touch()
    _sync(folder / MARKER)
    _sync(folder)
    final = folder.parent / step_folder(step)
    if final.exists():  # the same step, saved by an attempt that went on from an older checkpoint
        shutil.rmtree(final)
    os.rename(folder, final)
    _sync(final.parent)
    return final


def prune(run: Path, keep_last: int) -> None:
    """Removes the oldest complete checkpoints beyond `keep_last`."""
    for old in complete_checkpoints(run)[:-keep_last]:
        (old / MARKER).unlink()  # from here on it is not a checkpoint any more, even when the removal is cut short
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
