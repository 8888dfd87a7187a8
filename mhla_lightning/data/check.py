"""Is a split whole? Asked before training starts, so that a bad copy costs seconds and not a night. No torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, get_args

from mhla_lightning.data.index import INDEX_NAME, ShardEntry, ShardIndex, read_index, read_offsets
from mhla_lightning.errors import DataError, UserError, unknown_name

Verify = Literal["auto", "size", "sha256", "none"]
AUTO_SHA256_BYTES = 2**30  # up to here reading everything once takes a second or two
_MAGIC_AT, _MAGIC = 257, b"ustar"


def check_split(split_dir: str | Path, verify: Verify = "auto") -> ShardIndex:
    """Compare a split's files with its index and return the index.

    verify: "size" opens every shard (presence, size, offsets, tar headers at the first and last sample); "sha256" also reads every byte;
    "auto" is "sha256" up to 1 GiB and "size" above; "none" reads only the index.
    Raises DataError, one sentence that names the file, and UserError for an unknown `verify`.
    """
    if verify not in get_args(Verify):
        raise UserError(unknown_name("data.verify", verify, get_args(Verify)))
    index = read_index(split_dir)
    if index.samples == 0:
        raise DataError(f"{Path(split_dir, INDEX_NAME)} lists no samples: the split is empty")
    if verify != "none":
        for entry in index.shards:
            _check_shard(Path(split_dir), entry)
    if verify == "sha256" or (verify == "auto" and index.bytes <= AUTO_SHA256_BYTES):
        for entry in index.shards:
            _check_sha256(Path(split_dir, entry.name), entry)
    return index


def file_sha256(path: str | Path) -> str:
    """sha256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_shard(split_dir: Path, entry: ShardEntry) -> None:
    path = split_dir / entry.name
    if not path.is_file():
        raise DataError(f"{path} is missing, but {INDEX_NAME} lists it: copy it again or pack the data again")
    size = path.stat().st_size
    if size != entry.bytes:
        raise DataError(f"{path} has {size} bytes, but {INDEX_NAME} says {entry.bytes}: it was cut or replaced; copy it again")
    offsets = read_offsets(split_dir, entry)
    for offset in {int(offsets[0]), int(offsets[-2])} if entry.samples else ():
        if not _is_header(path, offset):
            raise DataError(f"{path} has no tar header at byte {offset}, where its offsets say that a sample begins: copy it again")


def _is_header(path: Path, offset: int) -> bool:
    with open(path, "rb") as file:
        file.seek(offset + _MAGIC_AT)
        return file.read(len(_MAGIC)) == _MAGIC


def _check_sha256(path: Path, entry: ShardEntry) -> None:
    found = file_sha256(path)
    if found != entry.sha256:
        raise DataError(f"{path} has sha256 {found[:12]}..., but {INDEX_NAME} says {entry.sha256[:12]}...: its bytes changed; copy it again")
