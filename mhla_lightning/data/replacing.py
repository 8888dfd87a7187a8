"""A folder that appears whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mhla_lightning.data.index import INDEX_NAME, SPLITS
from mhla_lightning.errors import UserError


@contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its name when the block ends well and disappears when it does not.

    overwrite: replace a target that holds splits and nothing else. Raises UserError when the target is in use, or came into use meanwhile.
    """
    _demand_free(target, overwrite)
    building = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{target} cannot be made: {error.strerror} in {target.parent}") from error
    try:
        yield building
        _move(building, target, overwrite)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _demand_free(target: Path, overwrite: bool) -> None:
    if target.is_dir() and not _names(target):
        return
    if not target.exists():
        return
    if not overwrite:
        raise UserError(f"{target} exists and is not empty: choose another folder, or pass --overwrite")
    foreign = target.name if target.is_file() else next((name for name in _names(target) if not _is_split(target / name)), None)
    if foreign is not None:
        raise UserError(f"{target} holds {foreign}, which mhla data pack did not write, so it is not overwritten: choose another folder")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _is_split(folder: Path) -> bool:
    return folder.name in SPLITS and (folder / INDEX_NAME).is_file()


def _move(building: Path, target: Path, overwrite: bool) -> None:
    old = building.with_suffix(".old")
    try:
        if overwrite and target.exists():
            target.rename(old)
        building.rename(target)  # fails on a folder that is not empty: one that another process finished first
    except OSError as error:
        raise UserError(f"{target} was made by another process meanwhile, or cannot be written ({error.strerror})") from error
    shutil.rmtree(old, ignore_errors=True)
