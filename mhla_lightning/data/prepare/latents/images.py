"""The images to encode: packed shards, or a source of `mhla data pack`.

They are cropped as ADM and DiT do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mhla_lightning.data.check import check_split
from mhla_lightning.data.index import INDEX_NAME, SPLITS, ShardIndex, read_index
from mhla_lightning.data.kinds.base import label_of
from mhla_lightning.data.kinds.images import decode_image
from mhla_lightning.data.prepare.pack import PackOptions, PlannedSplit, plan
from mhla_lightning.data.prepare.places import find_splits, tar_files
from mhla_lightning.data.prepare.samples import Sample
from mhla_lightning.data.prepare.shards import SHARD_BYTES
from mhla_lightning.data.prepare.sources import open_sample_source
from mhla_lightning.data.skips import BadSample
from mhla_lightning.data.split import Split
from mhla_lightning.errors import DataError, UserError

# Few enough samples a shard that small sets can still be dealt over ranks x workers.
_FEWEST_SHARDS = {"train": 16, "val": 4, "test": 4}
_READ = 64  # images that are read from a store at once
NUMBER = re.compile(r"^\d{8}-")  # packing puts it in front of a name


class Picture(NamedTuple):
    """An image that is read and cropped.

    Args:
        name: of the sample.
        label: class number; None where images have captions.
        caption: None where images have classes.
        pixels: uint8 (size, size, 3).
        json: content of the sample's member of this name; None without one.
    """

    name: str
    label: int | None
    caption: str | None
    pixels: np.ndarray
    json: bytes | None


@dataclass(frozen=True)
class LabelledImages:
    """The images to encode.

    Args:
        header: an index that describes the images.
        splits: in the order of writing.
        fingerprint: changes with images, order and splits.
    """

    header: ShardIndex
    splits: list[PlannedSplit]
    fingerprint: str


@dataclass(frozen=True)
class ShardPart:
    """Samples of a split of packed shards.

    Args:
        split: of the source.
        positions: index of each sample in the split.
        at_once: samples that are read from the store at once.
    """

    split: Split
    positions: Sequence[int]
    at_once: int = _READ

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self.positions), self.at_once):
            for raw in self.split.read(self.positions[start : start + self.at_once]):
                members = {name: data for name, data in raw.items() if not name.startswith("__")}
                yield Sample(NUMBER.sub("", raw["__key__"]), members)

    def take(self, positions: Sequence[int]) -> ShardPart:
        return replace(self, positions=[self.positions[position] for position in positions])


def open_images(source: str | Path, options: PackOptions, sample_bytes: int) -> LabelledImages:
    """Open labelled images.

    Args:
        source: folder or address of packed shards, whose splits and order are kept; or a source of
            `mhla data pack`.
        options: val and seed are for a source that is not packed.
        sample_bytes: expected bytes of a sample in the new shards.

    Raises:
        UserError: a source that does not exist, or options that do not fit it.
        DataError: anything but images with classes.
    """
    if is_packed(source):
        images = _open_packed(str(source), options)
    else:
        opened = open_sample_source(source)
        _demand_labelled(str(source), opened.header)
        images = LabelledImages(opened.header, plan(opened, options), opened.fingerprint)
    return replace(
        images,
        splits=[replace(split, shards=shards_for(split, options, sample_bytes)) for split in images.splits],
    )


def crop(image: Image.Image, size: int) -> np.ndarray:
    """Crop an image as ADM and DiT do, to uint8 (size, size, 3).

    The image is halved by a box filter while its shorter side is at least twice `size`. Then it is resized
    (bicubic) until that side is `size`, and the middle is kept. Source: guided-diffusion's image_datasets.py.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize(
        (round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def picture(sample: Sample, size: int, classes: int) -> Picture | BadSample:
    """Read and crop a sample, or return the reason why that fails.

    Args:
        sample: an image with the member cls or, without classes, txt.
        size: pixels a side.
        classes: number of classes.
    """
    try:
        return Picture(
            sample.name,
            label_of(sample.members, classes) if classes else None,
            None if classes else sample.members["txt"].decode(),
            crop(decode_image(sample.members), size),
            sample.members.get("json"),
        )
    except BadSample as reason:
        return reason


def is_packed(source: str | Path) -> bool:
    """Return whether a source is packed shards or an address."""
    folder = Path(source)
    if "://" in str(source):
        return True
    return any(
        (place / INDEX_NAME).is_file() or tar_files(place)
        for place in (folder, *(folder / name for name in SPLITS))
        if place.is_dir()
    )


def _open_packed(source: str, options: PackOptions) -> LabelledImages:
    if options.val is not None:
        raise UserError("val", f"got {options.val}, but {source} is packed and has its splits; leave it out")
    splits = {name: Split(read_index(store), store) for name, store in find_splits(source).items()}
    first = next(iter(splits.values())).index
    for split in splits.values():
        address = split.store.address(INDEX_NAME)
        _demand_labelled(address, split.index)
        if split.index.classes != first.classes:
            raise DataError(
                address,
                "lists other classes than the other splits; data used together has one list of classes",
            )
        check_split(split, "size" if "://" not in source else "none")
    parts = {name: ShardPart(split, range(split.samples)) for name, split in splits.items()}
    planned = [PlannedSplit(name, part, list(range(len(part))), 1) for name, part in parts.items()]
    return LabelledImages(
        replace(first, shards=()),
        planned,
        " ".join(f"{name} {split.index.hash}" for name, split in splits.items()),
    )


def _demand_labelled(source: str, header: ShardIndex) -> None:
    if header.kind != "images":
        raise DataError(source, f"holds {header.kind}; images with classes are needed")
    if not header.classes:
        raise DataError(source, "holds images without classes; images with classes are needed")


def shards_for(split: PlannedSplit, options: PackOptions, sample_bytes: int) -> int:
    """Return the number of shards of a split.

    Args:
        split: to write.
        options: shards is the number of training shards.
        sample_bytes: expected bytes of a sample.
    """
    if split.name == "train" and options.shards is not None:
        return min(options.shards, len(split.order))
    return min(
        max(_FEWEST_SHARDS[split.name], math.ceil(sample_bytes * len(split.order) / SHARD_BYTES)),
        len(split.order),
    )
