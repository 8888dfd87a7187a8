"""The files below a folder: the one walk through folders of a user.

Linked folders are followed. A folder is read once, under the first of its names, so that a loop of links ends
and no file is taken twice.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mhla_lightning.errors import DataError

Wanted = Callable[[str], bool]  # of a name in a folder
_log = logging.getLogger(__name__)


@dataclass
class Walk:
    """What a walk has met.

    Args:
        files: in order.
        broken: links to nothing.
        repeated: links to folders that are read under another name, or that hold the root.
        special: pipes, sockets and devices.
    """

    files: list[Path] = field(default_factory=list)
    broken: list[Path] = field(default_factory=list)
    repeated: list[Path] = field(default_factory=list)
    special: list[Path] = field(default_factory=list)


def visible(name: str) -> bool:
    """Return whether a name is not hidden."""
    return not name.startswith(".")


def files_below(root: Path, files: Wanted = visible, folders: Wanted = visible) -> list[Path]:
    """List the files below a folder, sorted; folders and files that are left out are logged.

    Args:
        root: of the walk.
        files: names of files to list.
        folders: names of folders to enter.

    Raises:
        DataError: a link to nothing, or a folder that cannot be listed.
    """
    found = walk(root, files, folders)
    if found.broken:
        first = found.broken[0]
        others = f", as are {len(found.broken) - 1} others below {root}" if len(found.broken) > 1 else ""
        raise DataError(
            str(first),
            f"cannot be read: it is a link to nothing ({os.readlink(first)}){others}; repair or remove it",
        )
    if found.repeated:
        first = found.repeated[0]
        _log.warning(
            "%s: %d linked folders are left out, for they lead to folders that are read under another name, "
            "or to one above; the first is %s -> %s",
            root,
            len(found.repeated),
            first,
            first.resolve(),
        )
    if found.special:
        _log.warning(
            "%s: %d pipes, sockets or devices are left out; the first is %s",
            root,
            len(found.special),
            found.special[0],
        )
    return found.files


def walk(root: Path, files: Wanted = visible, folders: Wanted = visible) -> Walk:
    """Visit a folder, the folders below it, and those that links lead to, each one once.

    Links are followed after all folders that are really there, so that those keep their names.
    A broken link counts where its name is wanted as a file, or as a folder and has no suffix.

    Args:
        root: of the walk.
        files: names of files to list.
        folders: names of folders to enter.

    Raises:
        DataError: a folder cannot be listed.
    """
    found = Walk()
    seen = {_identity(folder) for folder in root.resolve().parents}
    links = [root]
    while links:
        followed, links = sorted(links), []
        for link in followed:
            if _identity(link) in seen:
                found.repeated.append(link)
            else:
                links += _visit(link, seen, found, files, folders)
    for paths in (found.files, found.broken, found.repeated, found.special):
        paths.sort()
    return found


def _visit(root: Path, seen: set[tuple[int, int]], found: Walk, files: Wanted, folders: Wanted) -> list[Path]:
    """Add the files of a folder and of all that is really below it.

    Returns the links to other folders.
    """
    waiting = [root]
    links: list[Path] = []
    while waiting:
        folder = waiting.pop()
        identity = _identity(folder)
        if identity in seen:
            found.repeated.append(folder)
            continue
        seen.add(identity)
        for entry in _entries(folder):
            path = folder / entry.name
            what = _what(entry)
            if what == "folder":
                if folders(entry.name):
                    (links if entry.is_symlink() else waiting).append(path)
            elif what == "broken":
                if files(entry.name) or (folders(entry.name) and not path.suffix):
                    found.broken.append(path)
            elif files(entry.name):
                (found.files if what == "file" else found.special).append(path)
    return links


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(str(folder), f"cannot be listed ({error.strerror}); repair or remove it") from error


def _what(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link to itself
        return "broken"
    return "broken" if entry.is_symlink() and not os.path.exists(entry.path) else "special"


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise DataError(str(folder), f"cannot be read ({error.strerror}); repair or remove it") from error
    return status.st_dev, status.st_ino
