"""Folders with one subfolder a class: FOLDER/CLASS/*, or FOLDER/{train,val,test}/CLASS/*. Hidden files are left out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mhla_lightning.data.index import SPLITS
from mhla_lightning.data.tools.sources.base import files_fingerprint
from mhla_lightning.errors import DataError


@dataclass(frozen=True)
class Listing:
    """classes: the sorted names of the subfolders of train. files: (path, label) by split. fingerprint: of names, sizes and times."""

    classes: tuple[str, ...]
    files: dict[str, list[tuple[Path, int]]]
    fingerprint: str


def list_classes(folder: Path, example: str) -> Listing:
    """What a folder of classes holds. example: a file's name for messages.

    Raises DataError for a folder without classes, a class without files, a file outside a class, and a class that train lacks.
    """
    roots = {split: folder / split for split in SPLITS if (folder / split).is_dir()} if (folder / "train").is_dir() else {"train": folder}
    classes = tuple(path.name for path in _entries(roots["train"]) if path.is_dir())
    if not classes:
        raise DataError(f"{roots['train']} has no class folders: expected FOLDER/CLASS/{example} or FOLDER/train/CLASS/{example}")
    files = {split: _list_files(root, classes, example) for split, root in roots.items()}
    return Listing(classes, files, files_fingerprint(folder, (path for found in files.values() for path, _ in found)))


def _list_files(root: Path, classes: tuple[str, ...], example: str) -> list[tuple[Path, int]]:
    found: list[tuple[Path, int]] = []
    for folder in _entries(root):
        if not folder.is_dir():
            raise DataError(f"{folder} lies outside the class folders: expected {root}/CLASS/{example}")
        if folder.name not in classes:
            raise DataError(f"{folder} is a class that train does not have; classes of train: {', '.join(classes[:10])}")
        files = _files_below(folder)
        if not files:
            raise DataError(f"{folder} holds no files: remove it or put files into it")
        found += [(path, classes.index(folder.name)) for path in files]
    return found


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _files_below(folder: Path) -> list[Path]:
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names if not name.startswith("."))
    return sorted(files)
