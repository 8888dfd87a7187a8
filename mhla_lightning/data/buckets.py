"""Images of several sizes: which image belongs to which size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from mhla_lightning.data.kinds.base import member
from mhla_lightning.data.members import IMAGE_EXTENSIONS, RawSample
from mhla_lightning.data.npy import load_npy
from mhla_lightning.data.pixels import BadImage, size_of
from mhla_lightning.data.skips import BadSample
from mhla_lightning.data.split import Split

Side = tuple[int, int]
_HEAD_BYTES = 2**10  # more than the header of the file
_AT_ONCE = 64  # images


class PartOfSplit(Split):
    """Some samples of a split, as a split of its own.

    Args:
        whole: the split.
        chosen: indices of the samples, int64, ascending.
    """

    def __init__(self, whole: Split, chosen: np.ndarray) -> None:
        firsts = whole.index.first_indices()
        counts = np.diff(np.searchsorted(chosen, firsts))
        shards = tuple(
            replace(shard, samples=int(count))
            for shard, count in zip(whole.index.shards, counts, strict=True)
            if count
        )
        super().__init__(replace(whole.index, shards=shards), whole.store)
        self._whole, self._chosen = whole, chosen

    def read(self, samples: Sequence[int]) -> list[RawSample]:
        """Read samples by index in this part. Raises DataError as the whole split does."""
        found = self._whole.read([int(self._chosen[sample]) for sample in samples])
        return [sample | {"__index__": int(number)} for sample, number in zip(found, samples, strict=True)]


def nearest_by_aspect(sizes: np.ndarray, buckets: Sequence[Side]) -> np.ndarray:
    """Return the bucket of every image: the one whose ratio of sides is nearest.

    Where several are as near, it is the largest that the image fills in height and width, else the smallest.

    Args:
        sizes: (images, 2), height and width.
        buckets: (height, width) each.

    Returns:
        int64 (images,)
    """
    ratio = np.log(sizes[:, :1] / sizes[:, 1:])
    wanted = np.array(buckets, dtype=np.float64)
    distance = np.abs(ratio - np.log(wanted[:, 0] / wanted[:, 1])).round(9)
    filled = (sizes[:, None] >= wanted).all(-1)
    area = wanted.prod(-1)
    near = distance == distance.min(1, keepdims=True)
    rank = np.where(filled, area, -area)  # the largest that is filled, else the smallest
    return np.where(near, rank, -np.inf).argmax(1)


def image_sizes(split: Split) -> np.ndarray:
    """Return height and width of every image of a split, upright, int32 (images, 2).

    They come from the file that :func:`keep_image_sizes` has left beside the shards, or from the header of
    every image. An image that cannot be read counts as a square.

    Raises:
        DataError: a shard that cannot be read.
    """
    name, shape = _file_name(split), (split.samples, 2)
    size = split.store.size(name)
    if size is not None and size <= 8 * split.samples + _HEAD_BYTES:
        kept = load_npy(split.store.read(name, 0, size), split.store.address(name))
        if kept.shape == shape and kept.dtype == np.int32 and (kept > 0).all():
            return kept
    found = np.ones(shape, dtype=np.int32)
    for start in range(0, split.samples, _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, split.samples))
        for number, sample in zip(numbers, split.read(numbers), strict=True):
            with suppress(BadSample, BadImage):
                found[number] = size_of(member(sample, *IMAGE_EXTENSIONS)[1])
    return found


def keep_image_sizes(split: Split, folder: Path) -> None:
    """Write the sizes of a split's images beside its shards, where that folder can be written.

    Args:
        split: whose images are measured.
        folder: that its store reads.
    """
    path = folder / _file_name(split)
    if path.exists():
        return
    sizes, temporary = image_sizes(split), path.with_name(f".{path.name}-{os.getpid()}")
    with suppress(OSError):
        with temporary.open("wb") as file:
            np.save(file, sizes, allow_pickle=False)
        os.replace(temporary, path)


def _file_name(split: Split) -> str:
    return f"image_sizes-{split.index.hash[:16]}.npy"
