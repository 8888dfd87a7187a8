"""Folders with one subfolder a class: FOLDER/CLASS/*, or FOLDER/{train,val,test}/CLASS/*.

Hidden files are left out, linked folders are followed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mhla_lightning.data.index import SPLITS, ShardIndex
from mhla_lightning.data.prepare.places import folder_split
from mhla_lightning.data.prepare.samples import Sample
from mhla_lightning.data.prepare.sources.base import files_fingerprint
from mhla_lightning.data.prepare.walking import files_below, visible
from mhla_lightning.errors import DataError

_log = logging.getLogger(__name__)


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
        DataError: no classes, a class without files, a file outside a class, a class that train lacks.
            Folders that look like splits and have other names.
    """
    roots = _split_folders(folder)
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


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of the splits; without a folder train, all is the training part."""
    found = [path for path in _entries(folder) if path.is_dir()]
    named = {path: split for path in found if (split := folder_split(path.name)) is not None}
    has_train = (folder / "train").is_dir()
    odd = next((path for path, split in named.items() if path.name != split), None)
    if odd is not None and (has_train or _are_all_splits(found, named)):
        raise DataError(
            str(odd), f"looks like a split; splits are folders train, val and test: rename it to {named[odd]}"
        )
    if not has_train:
        return {"train": folder}
    for path in found:
        if path.name not in SPLITS:
            _log.warning("%s is left out: beside train, only val and test are read", path)
    return {split: folder / split for split in SPLITS if (folder / split).is_dir()}


def _are_all_splits(found: list[Path], named: dict[Path, str]) -> bool:
    """Return whether folders are splits of classes, rather than classes with such names."""
    return (
        len(named) == len(found)
        and "train" in named.values()
        and all(any(path.is_dir() for path in _entries(split)) for split in found)
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
        files = files_below(folder)
        if not files:
            raise DataError(str(folder), "holds no files; remove it or put files into it")
        found += [(path, classes.index(folder.name)) for path in files]
    return found


def _entries(folder: Path) -> list[Path]:
    """List what is in a folder, sorted. Raises DataError for a link to nothing."""
    found = sorted(path for path in folder.iterdir() if visible(path.name))
    broken = next((path for path in found if path.is_symlink() and not path.exists()), None)
    if broken is not None:
        raise DataError(str(broken), f"is a link to nothing ({broken.readlink()}); repair or remove it")
    return found
