"""Shard files: written so that equal input gives equal bytes, and described for the index."""

from __future__ import annotations

import math
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from mhla_lightning.data.check import file_sha256
from mhla_lightning.data.index import ShardEntry, ShardIndex, offsets_path, write_index
from mhla_lightning.data.sources import SourceSample, Split

Progress = Callable[[str, int, int], None]  # split, samples done, samples in all
SHARD_BYTES = 512 * 2**20
_FEWEST_SHARDS = {"train": 16, "val": 4, "test": 4}  # so that small sets can still be dealt over ranks x workers
_PROBED = 64  # samples read to estimate the size of a split


def number_of_shards(name: str, split: Split, order: list[int]) -> int:
    """Shards for the split called `name`: about 512 MB each, but at least 16 (train) or 4."""
    probes = order[:_PROBED]
    mean_bytes = sum(len(split[position].image) for position in probes) / len(probes)
    return max(_FEWEST_SHARDS[name], math.ceil(mean_bytes * len(order) / SHARD_BYTES))


def write_split(
    folder: Path, classes: tuple[str, ...], split: Split, order: list[int], shards: int | None = None, on_progress: Progress | None = None
) -> ShardIndex:
    """Write the samples of `split` at the positions `order` into the new `folder`: tar files, offsets and index.

    shards: how many; None: see number_of_shards. Never more than samples.
    """
    folder.mkdir()
    number = min(shards or number_of_shards(folder.name, split, order), len(order))
    entries = []
    for shard in range(number):
        start, stop = len(order) * shard // number, len(order) * (shard + 1) // number
        path = folder / f"{folder.name}-{shard:06d}.tar"
        _write_shard(path, ((index, split[order[index]]) for index in range(start, stop)))
        entry, offsets = describe_shard(path)
        np.save(offsets_path(folder, path.name), offsets, allow_pickle=False)
        entries.append(entry)
        if on_progress is not None:
            on_progress(folder.name, stop, len(order))
    index = ShardIndex("images", tuple(entries), classes)
    write_index(folder, index)
    return index


def describe_shard(path: Path) -> tuple[ShardEntry, np.ndarray]:
    """The index entry of a tar file and its offsets, int64 (samples + 1,)."""
    starts: list[int] = []
    end, previous = 0, None
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _ = base_plus_ext(member.name)
            if key != previous:
                starts.append(member.offset)
            previous = key
            end = member.offset_data + math.ceil(member.size / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    entry = ShardEntry(path.name, len(starts), path.stat().st_size, file_sha256(path))
    return entry, np.array([*starts, end], dtype=np.int64)


def _write_shard(path: Path, samples: Iterator[tuple[int, SourceSample]]) -> None:
    """mtime, owner and mode are fixed, so that equal input gives equal bytes."""
    with open(path, "wb") as file, TarWriter(file, user="mhla", group="mhla", mode=0o444, mtime=0, encoder=False, compress=False) as tar:
        for index, sample in samples:
            tar.write({"__key__": _key(index, sample.name), sample.extension: sample.image, "cls": str(sample.label).encode()})


def _key(index: int, name: str) -> str:
    """Unique by its number, readable by its name; no dots (webdataset cuts there) and short enough for a tar header."""
    return f"{index:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:60]}"
