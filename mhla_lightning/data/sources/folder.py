"""A folder of images, one subfolder a class: FOLDER/CLASS/*, or FOLDER/{train,val,test}/CLASS/*."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from mhla_lightning.data.decode import image_extension
from mhla_lightning.data.index import SPLITS
from mhla_lightning.data.sources.base import Source, SourceSample, png_bytes
from mhla_lightning.errors import DataError

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")  # what PIL decodes by itself; its PostScript plugin would start a program


def open_folder(folder: Path) -> Source:
    """An image folder; class names are the sorted names of the subfolders of train. Hidden files are left out.

    Raises DataError for a folder without classes, a class without files, a file outside a class, and a class that train lacks.
    """
    roots = {split: folder / split for split in SPLITS if (folder / split).is_dir()} if (folder / "train").is_dir() else {"train": folder}
    classes = tuple(path.name for path in _entries(roots["train"]) if path.is_dir())
    if not classes:
        raise DataError(f"{roots['train']} has no class folders: expected FOLDER/CLASS/image.jpg or FOLDER/train/CLASS/image.jpg")
    return Source(classes, {split: _Files(_list_files(root, classes)) for split, root in roots.items()})


def _list_files(root: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    found: list[tuple[Path, int]] = []
    for folder in _entries(root):
        if not folder.is_dir():
            raise DataError(f"{folder} lies outside the class folders: expected {root}/CLASS/image.jpg")
        if folder.name not in classes:
            raise DataError(f"{folder} is a class that train does not have; classes of train: {', '.join(classes[:10])}")
        files = _files_below(folder)
        if not files:
            raise DataError(f"{folder} holds no files: remove it or put images into it")
        found += [(path, classes.index(folder.name)) for path in files]
    return found


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _files_below(folder: Path) -> list[Path]:
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names if not name.startswith("."))
    return sorted(files)


@dataclass(frozen=True)
class _Files:
    """Image files with their labels."""

    files: list[tuple[Path, int]]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> SourceSample:
        path, label = self.files[position]
        data = path.read_bytes()
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                extension = image_extension(data)
                if extension is None:
                    return SourceSample(f"{path.parent.name}-{path.stem}", png_bytes(image), "png", label)
                image.verify()
        except Exception as error:  # PIL's plugins raise nearly anything on damaged bytes
            reason = "no JPEG, PNG or other known format" if isinstance(error, UnidentifiedImageError) else error
            raise DataError(f"{path} is no image that can be read ({reason}): repair or remove it") from error
        return SourceSample(f"{path.parent.name}-{path.stem}", data, extension, label)
