"""The names of the classes that a run was trained on, kept in its folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from mhla_lightning.runs.folder import FORMAT, read_object, write_json

log = logging.getLogger(__name__)

_NAME = "classes.json"
_KEY = "classes"


def keep_classes(folder: Path, names: Sequence[str]) -> None:
    """Write the names into a run folder, in the order of the labels."""
    write_json(folder / _NAME, {"format": FORMAT, _KEY: list(names)})


def kept_classes(folder: Path, count: int) -> tuple[str, ...]:
    """Return the names that :func:`keep_classes` wrote, one line each.

    Where there are none, they are the labels themselves: `0`, `1` and so on. An earlier version kept no
    names. A warning says so where a file holds something else.

    Args:
        folder: of the run, or of one of its checkpoints.
        count: classes of the model.
    """
    places = [folder, folder.parent.parent] if (folder / "COMPLETE").is_file() else [folder]
    for place in places:
        file = place / _NAME
        found = read_object(file).get(_KEY) if file.is_file() else None  # no pipe of a stranger's folder
        if isinstance(found, list) and len(found) == count and all(isinstance(name, str) for name in found):
            return tuple(name if name.isprintable() else ascii(name) for name in found)
        if file.exists():
            log.warning("%s does not name %d classes: they are shown by their labels", file, count)
    return tuple(map(str, range(count)))
