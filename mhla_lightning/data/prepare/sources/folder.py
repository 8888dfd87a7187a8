"""A folder of images, one subfolder a class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.members import image_extension
from mhla_lightning.data.pixels import FILE_FORMATS, BadImage, check_sums, decode
from mhla_lightning.data.prepare.samples import Sample, image_sample
from mhla_lightning.data.prepare.sources.base import SampleSource, png_bytes
from mhla_lightning.data.prepare.sources.listing import LabelledFiles, list_classes
from mhla_lightning.errors import DataError

_KEPT = ("jpg", "png")


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
    data, remarks = _read(path)
    return replace(image_sample(header, f"{path.parent.name}-{path.stem}", data, label), remarks=remarks)


def _read(path: Path) -> tuple[bytes, tuple[str, ...]]:
    """Return an encoded image, and remarks on how it is read.

    Raises DataError for an image that training could not use.
    """
    try:
        data = path.read_bytes()
        found = decode(data, FILE_FORMATS)  # all of it, so that a cut image is found now and not in training
        if image_extension(data) not in _KEPT:
            return png_bytes(found.image), found.remarks
        check_sums(data)
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror}); repair or remove it") from error
    except BadImage as reason:
        raise DataError(
            str(path), f"is no image that can be used ({reason}); repair or remove it"
        ) from reason
    return data, found.remarks
