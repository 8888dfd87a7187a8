"""Is a split whole? Asked before training starts, so that a bad copy costs seconds and not a night."""

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

    verify: "size" opens every shard (presence, size, offsets, tar headers at the first and last sample);
        "sha256" also reads every byte;
    "auto" is "sha256" up to 1 GiB and "size" above on this machine's disks, and "none" elsewhere: there every
    read is checked when it happens; "none" looks at the index only.
    Raises DataError, one sentence that names the file, and UserError for an unknown `verify`.
    """
    if verify not in get_args(Verify):
        raise UserError(unknown_name("data.verify", verify, get_args(Verify)))
    if split.samples == 0:
        raise DataError(f"{split.store.address(INDEX_NAME)} lists no samples: the split is empty")
    if verify == "auto":
        whole = "sha256" if split.index.bytes <= AUTO_SHA256_BYTES else "size"
        verify = whole if isinstance(split.store, LocalStore) else "none"  # type: ignore[assignment]
    for number, entry in enumerate(split.index.shards):
        if verify in ("size", "sha256"):
            check_shard(split, number)
        if verify == "sha256":
            check_sha256(split, entry)


def check_shard(split: Split, number: int) -> None:
    """Presence, size, offsets, and tar headers at a shard's first and last sample. Raises DataError."""
    entry, address = split.index.shards[number], split.address(number)
    size = split.store.size(entry.name)
    if size is None:
        raise DataError(
            f"{address} is missing, but {INDEX_NAME} lists it: copy it again or pack the data again"
        )
    if size != entry.bytes:
        raise DataError(
            f"{address} has {size} bytes, but {INDEX_NAME} says {entry.bytes}: it was cut or "
            "replaced; copy it again"
        )
    offsets = split.offsets(number)
    for offset in {int(offsets[0]), int(offsets[-2])} if entry.samples else ():
        if split.store.read(entry.name, offset + _MAGIC_AT, offset + _MAGIC_AT + len(_MAGIC)) != _MAGIC:
            raise DataError(
                f"{address} has no tar header at byte {offset}, where its offsets say that a sample "
                "begins: copy it again"
            )


def check_sha256(split: Split, entry: ShardEntry) -> None:
    """Every byte of a shard. Raises DataError."""
    address = split.store.address(entry.name)
    try:
        with split.store.open(entry.name) as file:
            found = sha256_of(file)
    except OSError as error:
        raise DataError(
            f"{address} cannot be read ({error.strerror or error}): check the disk and the rights"
        ) from error
    if found != entry.sha256:
        raise DataError(
            f"{address} has sha256 {found[:12]}..., but {INDEX_NAME} says {entry.sha256[:12]}...: "
            "its bytes changed; copy it again"
        )


def sha256_of(file: BinaryIO) -> str:
    """sha256 of what is left of a file, as 64 hex digits."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()
