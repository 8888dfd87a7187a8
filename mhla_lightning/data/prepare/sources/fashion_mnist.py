"""Fashion-MNIST from Debian's package dataset-fashion-mnist: 70,000 images, no download.

Paper: Xiao, Rasul and Vollgraf, arXiv 1708.07747.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.prepare.samples import Sample, image_sample
from mhla_lightning.data.prepare.sources.base import SampleSource, png_bytes
from mhla_lightning.errors import DataError, UserError

NAME = "fashion_mnist"
FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_SIDE = 28  # pixels
_MOST = 1_000_000  # items of a file; a damaged header must not fill the memory
_PREFIXES = {"train": "train", "val": "t10k"}
_IMAGES, _LABELS = "images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"
_MAGIC = {_IMAGES: 0x0803, _LABELS: 0x0801}  # bytes in three axes, bytes in one


def is_fashion_mnist(spec: str) -> bool:
    """Return whether a source is `fashion_mnist` or `fashion_mnist:FOLDER`."""
    return spec.partition(":")[0] == NAME


def missing_fashion_mnist(source: str = NAME) -> str | None:
    """Return why a source cannot be read; None where all of its files are there."""
    folder = _folder(source)
    names = [f"{prefix}-{kind}" for prefix in _PREFIXES.values() for kind in _MAGIC]
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return None
    return (
        f"{NAME} has no file {folder / missing[0]}; install it with `apt-get install dataset-fashion-mnist`, "
        f"or write {NAME}:FOLDER for a folder with the four files"
    )


def open_fashion_mnist(source: str = NAME) -> SampleSource:
    """Open 60,000 grayscale images of 28 x 28 pixels as train, and 10,000 as val.

    Args:
        source: fashion_mnist[:FOLDER]; without a folder, Debian's.

    Raises:
        UserError: a file is missing.
        DataError: a file is damaged.
    """
    missing = missing_fashion_mnist(source)
    if missing is not None:
        raise UserError("source", missing)
    folder, header, digest = _folder(source), ShardIndex("images", (), CLASSES), hashlib.sha256()
    parts = {}
    for split, prefix in _PREFIXES.items():
        pixels = _read(folder / f"{prefix}-{_IMAGES}", _IMAGES)
        labels = _read(folder / f"{prefix}-{_LABELS}", _LABELS)
        if len(pixels) != len(labels) or labels.max(initial=0) >= len(CLASSES):
            raise DataError(
                str(folder),
                f"{prefix} has {len(pixels)} images and {len(labels)} labels up to {labels.max()}",
            )
        digest.update(pixels.tobytes() + labels.tobytes())
        parts[split] = _Images(header, split, pixels, labels, np.arange(len(labels)))
    return SampleSource(header, {**parts}, digest.hexdigest())


def _folder(source: str) -> Path:
    given = source.partition(":")[2]
    return Path(given).expanduser() if given else FOLDER


def _read(path: Path, kind: str) -> np.ndarray:
    """Return the bytes of an idx file, (items, 28, 28) or (items,) uint8."""
    axes = _MAGIC[kind] & 0xFF
    try:
        with gzip.open(path) as file:
            header = np.frombuffer(file.read(4 * (1 + axes)), ">u4")
            if len(header) != 1 + axes or header[0] != _MAGIC[kind] or not 0 < header[1] <= _MOST:
                raise DataError(str(path), "is no idx file of this kind; its header does not fit")
            shape = tuple(int(size) for size in header[1:])
            if shape[1:] not in ((), (_SIDE, _SIDE)):
                raise DataError(str(path), f"has items of {shape[1:]} pixels; they must be 28 x 28")
            size = int(np.prod(shape))
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(str(path), f"cannot be read ({error}); install it again") from error
    if len(content) != size:
        raise DataError(str(path), f"has not the {size:,} bytes that its header names; install it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


@dataclass(frozen=True)
class _Images:
    """Some of the images of a split.

    Args:
        header: an index that describes the samples.
        split: train or val.
        images: uint8 (N, 28, 28).
        labels: (N,).
        numbers: places in the split, (N,).
    """

    header: ShardIndex
    split: str
    images: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Sample]:
        for image, label, number in zip(self.images, self.labels, self.numbers, strict=True):
            name = f"{NAME}-{self.split}-{number}"
            yield image_sample(self.header, name, png_bytes(Image.fromarray(image)), int(label))

    def take(self, positions: Sequence[int]) -> _Images:
        chosen = np.asarray(positions)
        return _Images(
            self.header, self.split, self.images[chosen], self.labels[chosen], self.numbers[chosen]
        )
