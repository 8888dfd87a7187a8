"""The images to encode: of packed shards or of what `mhla data pack` takes, cropped as ADM and DiT do."""

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

_FEWEST_SHARDS = {
    "train": 16,
    "val": 4,
    "test": 4,
}  # so that small sets can still be dealt over ranks x workers
_READ = 64  # images that are asked of a store at once
NUMBER = re.compile(r"^\d{8}-")  # that packing put in front of a name


class Picture(NamedTuple):
    """pixels: uint8 (size, size, 3). json: the bytes of the sample's member of this name."""

    name: str
    label: int
    pixels: np.ndarray
    json: bytes | None


@dataclass(frozen=True)
class LabelledImages:
    """What there is to encode. header: of the images. splits: in the order of writing. fingerprint:
    changes with images, order and splits.
    """

    header: ShardIndex
    splits: list[PlannedSplit]
    fingerprint: str


@dataclass(frozen=True)
class ShardPart:
    """Samples of a split of packed shards, by their index there. at_once: that are asked of the store."""

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
    """Labelled images of a folder or an address of packed shards, whose splits and order are kept, or of a
    source of `mhla data pack`.

    options: see pack; val and seed are for a source that is not packed. sample_bytes: that a sample will take
        in the shards to be written.
    Raises UserError for a source that there is not or options that do not fit it, DataError for anything but
    images with classes.
    """
    if _is_packed(source):
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
    """ADM's centre crop (guided-diffusion's image_datasets.py, as in DiT's train.py): uint8 (size, size, 3).

    The image is halved by a box filter while its shorter side is at least twice `size`, then resized
    (bicubic) until that side is `size`.
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
    """A sample read and cropped, or why it cannot be."""
    try:
        return Picture(
            sample.name,
            label_of(sample.members, classes),
            crop(decode_image(sample.members), size),
            sample.members.get("json"),
        )
    except BadSample as reason:
        return reason


def _is_packed(source: str | Path) -> bool:
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
        raise UserError(
            f"--val {options.val} was given, but {source} is packed and has its splits: leave --val out"
        )
    splits = {name: Split(read_index(store), store) for name, store in find_splits(source).items()}
    first = next(iter(splits.values())).index
    for split in splits.values():
        address = split.store.address(INDEX_NAME)
        _demand_labelled(address, split.index)
        if split.index.classes != first.classes:
            raise DataError(
                f"{address} lists other classes than the other splits: data used together has one "
                "list of classes"
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
        raise DataError(f"{source} holds {header.kind}; images with classes are needed")
    if not header.classes:
        raise DataError(f"{source} holds images without classes; images with classes are needed")


def shards_for(split: PlannedSplit, options: PackOptions, sample_bytes: int) -> int:
    """Shards to write a split into. sample_bytes: that a sample takes in them."""
    if split.name == "train" and options.shards is not None:
        return min(options.shards, len(split.order))
    return min(
        max(_FEWEST_SHARDS[split.name], math.ceil(sample_bytes * len(split.order) / SHARD_BYTES)),
        len(split.order),
    )
