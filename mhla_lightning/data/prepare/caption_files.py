"""Captions in files: a list of JSON lines, or NAME.txt beside each image or video."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhla_lightning.errors import DataError
from mhla_lightning.textfiles import NotText, json_rows, read_text

CAPTION = "caption"  # the key of a caption in a row, unless the user names another
LONGEST_CAPTION = 2**20  # bytes
_MOST_BYTES = 2**34  # of a list


@dataclass(frozen=True)
class CaptionFiles:
    """The captions of the files of a folder.

    Args:
        root: the folder.
        listed: captions by file, from `source`; None where each file has NAME.txt beside it.
        source: the list, for messages.
    """

    root: Path
    listed: dict[str, str] | None = None
    source: Path | None = None

    def find(self, path: Path) -> tuple[str, str]:
        """Return the caption of a file, without white space at its ends, and why it is empty.

        Raises:
            DataError: a caption that is no text or too long.
        """
        if self.listed is not None:
            names = (str(path.relative_to(self.root)), path.name)
            caption = next((self.listed[name] for name in names if name in self.listed), None)
            missing = f"has no caption in {self.source}"
        else:
            beside = path.with_suffix(".txt")
            caption = None
            if beside.is_file():
                caption = read_text(beside, most=LONGEST_CAPTION, kind=DataError).strip()
            missing = f"has no caption: there is no {beside.name} beside it"
        return caption or "", "has an empty caption" if caption == "" else missing


def read_caption_list(path: str | Path, key: str = CAPTION) -> dict[str, str]:
    """Read a list of captions: JSON lines, or one array, of {"file": ..., "caption": ...}.

    Args:
        path: of the list.
        key: of the caption in a row.

    Returns:
        captions by file, as the list names it.

    Raises:
        DataError: a list that cannot be read, or a row of another form.
    """
    path = Path(path).expanduser()
    captions: dict[str, str] = {}
    for place, row in _rows(path):
        file, caption = _entry(row, key, path, place)
        name = os.path.normpath(file)
        if captions.setdefault(name, caption.strip()) != caption.strip():
            raise DataError(str(path), f"{place} has a second caption for {file}")
    return captions


def _entry(row: Any, key: str, path: Path, place: str) -> tuple[str, str]:
    found = row if isinstance(row, dict) else {}
    file, caption = found.get("file"), found.get(key)
    if isinstance(file, str) and isinstance(caption, str):
        return file, caption
    keys = ", ".join(map(str, found))[:100] or "none"
    wrong = next((name for name in ("file", key) if name in found and not isinstance(found[name], str)), None)
    reason = f"{wrong} is no text" if wrong else f"its keys are {keys}"
    raise DataError(str(path), f'{place} is not {{"file": "NAME", "{key}": "..."}} ({reason})')


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        yield from json_rows(read_text(path, most=_MOST_BYTES, kind=DataError))
    except NotText as error:
        raise DataError(str(path), str(error)) from error
