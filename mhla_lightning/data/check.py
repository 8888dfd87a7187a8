"""Comparison of a split with its index before training, so that a bad copy costs seconds."""

from __future__ import annotations

import hashlib
from typing import BinaryIO, Literal, get_args

from mhla_lightning.data.index import INDEX_NAME, ShardEntry
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import LocalStore
from mhla_lightning.errors import DataError, UserError, unknown_name

Verify = Literal["auto", "size", "sha256", "none"]
AUTO_SHA256_BYTES = 2**30  # up to here reading everything once takes a second or two
_MAGIC_AT, _MAGIC = 257, b"ustar"


def check_split(split: Split, verify: Verify = "auto") -> None:
    """Compare a split's files with its index.

    Args:
        split: to check.
        verify: `none` reads the index only. `size` opens every shard and checks presence, size, offsets, and
            the tar headers at the first and last sample. `sha256` also reads every byte. On disks of this
            machine, `auto` is sha256 up to 1 GiB and size above. Elsewhere it is none: every read is checked
            when it happens.

    Raises DataError for a file, UserError for an unknown `verify`.
    """
    if verify not in get_args(Verify):
        raise UserError("verify", unknown_name("value", verify, get_args(Verify)))
    if split.samples == 0:
        raise DataError(split.store.address(INDEX_NAME), "it lists no samples: the split is empty")
    if verify == "auto":
        whole = "sha256" if split.index.bytes <= AUTO_SHA256_BYTES else "size"
        verify = whole if isinstance(split.store, LocalStore) else "none"  # type: ignore[assignment]
    for number, entry in enumerate(split.index.shards):
        if verify in ("size", "sha256"):
            check_shard(split, number)
        if verify == "sha256":
            check_sha256(split, entry)


def check_shard(split: Split, number: int) -> None:
    """Check presence, size, offsets, and the first and last header of a shard. Raises DataError."""
    entry, address = split.index.shards[number], split.address(number)
    size = split.store.size(entry.name)
    if size is None:
        raise DataError(
            address, f"the file is missing, but {INDEX_NAME} lists it: copy it again or pack the data again"
        )
    if size != entry.bytes:
        raise DataError(
            address,
            f"it has {size} bytes, but {entry.bytes} in {INDEX_NAME}: it was cut or replaced; copy it again",
        )
    offsets = split.offsets(number)
    for offset in {int(offsets[0]), int(offsets[-2])} if entry.samples else ():
        if split.store.read(entry.name, offset + _MAGIC_AT, offset + _MAGIC_AT + len(_MAGIC)) != _MAGIC:
            raise DataError(
                address,
                f"there is no tar header at byte {offset}, where a sample begins by its offsets: copy it "
                "again",
            )


def check_sha256(split: Split, entry: ShardEntry) -> None:
    """Check every byte of a shard. Raises DataError."""
    address = split.store.address(entry.name)
    try:
        with split.store.open(entry.name) as file:
            found = sha256_of(file)
    except OSError as error:
        raise DataError(
            address, f"it cannot be read ({error.strerror or error}): check the disk and the rights"
        ) from error
    if found != entry.sha256:
        raise DataError(
            address,
            f"its sha256 is {found[:12]}..., but {entry.sha256[:12]}... in {INDEX_NAME}: its bytes changed; "
            "copy it again",
        )


def sha256_of(file: BinaryIO) -> str:
    """Return the sha256 of the rest of a file, as 64 hex digits."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()
