"""A folder of images, one subfolder a class."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.members import image_extension
from mhla_lightning.data.prepare.samples import Sample, image_sample
from mhla_lightning.data.prepare.sources.base import SampleSource, png_bytes
from mhla_lightning.data.prepare.sources.listing import LabelledFiles, list_classes
from mhla_lightning.errors import DataError

# The formats that PIL decodes by itself: its PostScript plugin would start a program.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


def open_folder(folder: Path) -> SampleSource:
    """Open an image folder. JPEG and PNG are kept as they are, other formats become PNG.

    Raises DataError (see list_classes).
    """
    listing = list_classes(folder, "image.jpg")
    header = ShardIndex("images", (), listing.classes)
    return SampleSource(
        header,
        {split: LabelledFiles(header, files, _sample) for split, files in listing.files.items()},
        listing.fingerprint,
    )


def _sample(header: ShardIndex, path: Path, label: int) -> Sample:
    return image_sample(header, f"{path.parent.name}-{path.stem}", _read(path), label)


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image_extension(data) is None:
                return png_bytes(image)
            image.verify()
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image.load()  # all of it, so that a cut image is found now and not in training
    except Exception as error:  # PIL's plugins raise nearly anything on damaged bytes
        reason = "no JPEG, PNG or other known format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(str(path), f"is no image that can be read ({reason}); repair or remove it") from error
    return data
