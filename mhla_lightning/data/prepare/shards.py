"""Shard files: equal input gives equal bytes."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from webdataset.writer import TarWriter

from mhla_lightning.data.check import sha256_of
from mhla_lightning.data.columns import find_columns
from mhla_lightning.data.index import ShardEntry
from mhla_lightning.data.members import Scan, scan_shard
from mhla_lightning.data.prepare.samples import Sample
from mhla_lightning.errors import DataError

SHARD_BYTES = 512 * 2**20


class TokenMembers(NamedTuple):
    """The shape of a token shard.

    Args:
        rows: rows of every member, in order.
        length: tokens a row.
    """

    rows: list[int]
    length: int


def shard_name(split: str, number: int) -> str:
    """Return the file name of shard `number` of a split."""
    return f"{split}-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[Sample], first: int = 0) -> None:
    """Write a tar file with fixed times, owners and modes.

    Args:
        path: of the file.
        samples: in the order of writing.
        first: index in the split of the first sample.
    """
    with open(path, "wb") as file:
        with open_tar(file) as tar:
            for sample in samples:
                write_sample(tar, sample, first)
                first += sample.rows
        file.flush()
        os.fsync(file.fileno())


def open_tar(file: BinaryIO) -> TarWriter:
    """Open webdataset's writer with all fields fixed that would differ between two runs."""
    return TarWriter(file, user="mhla", group="mhla", mode=0o444, mtime=0, encoder=False, compress=False)


def write_sample(tar: TarWriter, sample: Sample, index: int) -> int:
    """Write the members of a sample in their order and return their size in the file, in bytes.

    Args:
        tar: the open shard.
        sample: what to write.
        index: of the sample in the split.
    """
    key = _key(index, sample.name)
    for extension, data in sample.members.items():
        tar.write({"__key__": key, extension: data})  # one by one: in one go they would be sorted by name
    return sum(
        tarfile.BLOCKSIZE * (1 + -(-len(data) // tarfile.BLOCKSIZE)) for data in sample.members.values()
    )


def describe_shard(path: Path, kind: str = "images") -> tuple[ShardEntry, np.ndarray]:
    """Return the index entry of a tar file and its offsets, int64 (samples + 1,).

    Raises:
        DataError: the file cannot be a shard.
    """
    with open(path, "rb") as file:
        scan = scan_shard(file, str(path))
        offsets = (
            scan.offsets if kind != "tokens" else row_offsets(scan, token_members(file, scan, str(path)))
        )
        file.seek(0)
        return ShardEntry(path.name, len(offsets) - 1, path.stat().st_size, sha256_of(file)), offsets


def row_offsets(scan: Scan, members: TokenMembers) -> np.ndarray:
    """Return the offsets of a token shard, int64 (rows + 1,).

    For each row they give the byte of the first tar header of its member, then the end of the last member.
    """
    return np.append(np.repeat(scan.offsets[:-1], members.rows), scan.offsets[-1])


def token_members(file: BinaryIO, scan: Scan, address: str) -> TokenMembers:
    """Read the number of rows of every member of a token shard, and their length.

    Raises:
        DataError: members that cannot be read row by row, or rows of several lengths.
    """

    def read(start: int, stop: int) -> bytes:
        file.seek(start)
        return file.read(stop - start)

    shapes = [
        find_columns(read, int(start), int(end), address)[0].shape for start, end in pairwise(scan.offsets)
    ]
    lengths = {length for _, length in shapes}
    if len(lengths) > 1:
        raise DataError(
            address,
            f"holds rows of {' and '.join(map(str, sorted(lengths)))} tokens; all rows of a split "
            "must be equally long",
        )
    return TokenMembers([rows for rows, _ in shapes], lengths.pop() if lengths else 0)


def _key(index: int, name: str) -> str:
    """Return a key that is unique by its number and readable by its name.

    It holds no dots, since webdataset cuts there, and is short enough for a tar header.
    """
    return f"{index:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:60]}"
