"""Read folders of `mhla sample`, and prepare folders for image scorers. Imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import check_folder, read_json, write_json

IMAGES = "images"
"""Subfolder of a prepared folder."""

PREPARED = "prepared.json"
"""Names our files in a prepared folder; no other file is ever removed."""


def sampled_files(folder: Path, kind: Literal["images", "videos"]) -> list[tuple[Path, str]]:
    """Return files and prompts of a folder of `mhla sample`, in its order.

    Raises:
        UserError: no samples.json, a name in it outside the folder, or a missing file.
    """
    listed = read_json(folder / "samples.json")
    if not isinstance(listed, dict) or not listed.get(kind):
        raise UserError(
            str(folder),
            f"holds no samples.json with {kind}; give a run, or a folder that mhla sample has filled",
        )
    found = []
    for entry in listed[kind]:
        name = str(entry["file"])
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(
                str(folder / "samples.json"), f"names {name}, which is no {kind[:-1]} in that folder"
            )
        found.append((folder / name, str(entry["prompt"])))
    return found


def written_before(to: Path, key: str, *folders: Path) -> set[str]:
    """Check that a folder can be prepared, and read which files an earlier call wrote.

    Args:
        to: the folder, which may not exist yet.
        key: of the names in its PREPARED.
        folders: below it.

    Returns:
        the names, which may be of files that are no longer there or outside.

    Raises:
        UserError: a file in the place of a folder, no right to write, or a PREPARED of another form.
    """
    for wanted in (to, *folders):
        check_folder("to", wanted)
    held = read_json(to / PREPARED)
    listed = held.get(key) if isinstance(held, dict) else None
    if os.path.lexists(to / PREPARED) and not isinstance(listed, list):
        raise UserError(
            "to", f"{to} holds a {PREPARED} that mhla did not write; name an empty or a new folder"
        )
    return {name for name in listed or [] if isinstance(name, str)}


def check_prepared(to: Path) -> set[str]:
    """Check that :func:`prepare` can use a folder; nothing is made or changed.

    Args:
        to: the folder, which may not exist yet.

    Returns:
        names below TO/images of the files that an earlier call wrote.

    Raises:
        UserError: a file in the place of a folder, no right to write, or a file in TO/images that no earlier
            call wrote.
    """
    written = written_before(to, "files", to / IMAGES)
    # From the folder, since a name in the list could point outside.
    found = {
        path.relative_to(to / IMAGES).as_posix()
        for path in (to / IMAGES).rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    if strange := sorted(found - written):
        raise UserError(
            "to",
            f"{to / IMAGES} holds {strange[0]}, which mhla did not write; name an empty or a new folder",
        )
    return found


def prepare(files: Mapping[str, Path | bytes], to: Path) -> None:
    """Write files into TO/images, in place of those of an earlier call.

    No other file is removed.

    Args:
        files: name below TO/images -> a file, which is linked or copied, or the content.
        to: the folder.

    Raises:
        UserError: a folder that :func:`check_prepared` refuses or that cannot be written.
    """
    assert all(".." not in PurePosixPath(name).parts and not name.startswith("/") for name in files)
    earlier, folder = check_prepared(to), to / IMAGES
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Written first, so that a call that is stopped leaves no file that the next call does not know.
        write_json(to / PREPARED, {"files": sorted(earlier.union(files))})
        for name in earlier:
            (folder / name).unlink()
        for path in sorted(folder.rglob("*"), reverse=True):  # empty folders, from the inside
            path.rmdir()
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
                continue
            try:
                os.link(content, folder / name)
            except OSError:  # another file system, or one without links
                shutil.copyfile(content, folder / name)
    except OSError as error:
        raise UserError("to", f"{to} cannot be written ({error.strerror})") from error
