"""Folders with one subfolder a class: FOLDER/CLASS/*, or FOLDER/{train,val,test}/CLASS/*.

Hidden files are left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mhla_lightning.data.index import SPLITS, ShardIndex
from mhla_lightning.data.prepare.samples import Sample
from mhla_lightning.data.prepare.sources.base import files_fingerprint
from mhla_lightning.errors import DataError


@dataclass(frozen=True)
class Listing:
    """The files of a folder of classes.

    Args:
        classes: sorted names of the subfolders of train.
        files: (path, label) by split.
        fingerprint: of names, sizes and times.
    """

    classes: tuple[str, ...]
    files: dict[str, list[tuple[Path, int]]]
    fingerprint: str


@dataclass(frozen=True)
class LabelledFiles:
    """A part of a source: files with their labels.

    Args:
        header: an index that describes the samples.
        files: (path, label).
        sample: makes a sample of a file; a function of a module, so that it can be pickled.
    """

    header: ShardIndex
    files: list[tuple[Path, int]]
    sample: Callable[[ShardIndex, Path, int], Sample]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Sample]:
        for path, label in self.files:
            yield self.sample(self.header, path, label)

    def take(self, positions: Sequence[int]) -> LabelledFiles:
        return replace(self, files=[self.files[position] for position in positions])


def list_classes(folder: Path, example: str) -> Listing:
    """List the files of a folder of classes.

    Args:
        folder: to list.
        example: the name of a file, for messages.

    Raises:
        DataError: no classes, a class without files, a file outside a class, or a class that train lacks.
    """
    roots = (
        {split: folder / split for split in SPLITS if (folder / split).is_dir()}
        if (folder / "train").is_dir()
        else {"train": folder}
    )
    classes = tuple(path.name for path in _entries(roots["train"]) if path.is_dir())
    if not classes:
        raise DataError(
            str(roots["train"]),
            f"has no class folders; expected FOLDER/CLASS/{example} or FOLDER/train/CLASS/{example}",
        )
    files = {split: _list_files(root, classes, example) for split, root in roots.items()}
    return Listing(
        classes, files, files_fingerprint(folder, (path for found in files.values() for path, _ in found))
    )


def _list_files(root: Path, classes: tuple[str, ...], example: str) -> list[tuple[Path, int]]:
    found: list[tuple[Path, int]] = []
    for folder in _entries(root):
        if not folder.is_dir():
            raise DataError(str(folder), f"is outside the class folders; expected {root}/CLASS/{example}")
        if folder.name not in classes:
            raise DataError(
                str(folder),
                f"is a class that train does not have; classes of train: {', '.join(classes[:10])}",
            )
        files = _files_below(folder)
        if not files:
            raise DataError(str(folder), "holds no files; remove it or put files into it")
        found += [(path, classes.index(folder.name)) for path in files]
    return found


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _files_below(folder: Path) -> list[Path]:
    files = (
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".")
    )
    return sorted(files)
