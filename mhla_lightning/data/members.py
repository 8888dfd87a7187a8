"""The members of tar shards: where samples begin, and what a sample holds. Nothing is extracted, decoded or
unpickled here.

Samples are grouped by webdataset's rule: neighbouring members share the name up to the first dot of the file
name. webdataset's own tar reader starts at the beginning of a shard, takes a cut between two members for the
end, and lets links and devices pass by in silence; training needs single samples by their place, and a
sentence for each of those.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from webdataset.tariterators import base_plus_ext

from mhla_lightning.errors import DataError

# "__key__": str, "__url__": the shard's address, "__index__": index in the split, and the members' bytes by
# extension
RawSample = dict[str, Any]
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_BLOCK = tarfile.BLOCKSIZE
_LONGEST_HEADER = 2**16  # bytes; names and attributes are far shorter
_NO_TAR = (
    tarfile.TarError,
    ValueError,
    EOFError,
    OverflowError,
    RecursionError,
)  # what tarfile raises for bytes that are none
_IMAGE_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}


class Scan(NamedTuple):
    """What one pass over a shard's headers finds. keys: of the samples, in order. offsets: int64 (samples
    + 1,), see data/README.md.
    """

    keys: list[str]
    offsets: np.ndarray


def parse_sample(data: bytes, address: str, index: int) -> RawSample:
    """The sample whose members fill `data`, a stretch of the shard at `address`.

    Raises:
        DataError: no tar members, a member that is cut, of another sample, there twice, no regular file, or
            with a path that leads out.
    """
    sample: RawSample = {"__key__": "", "__url__": address, "__index__": index}
    try:
        for info in _headers(data):
            named = _named(info, address)
            if named is None:
                continue
            key, extension = named
            if info.offset_data + info.size > len(data):
                size = f"{info.size} bytes, more than its sample"
                raise DataError(
                    f"{address}: member {shown(info.name)} says it has {size}: copy or pack the shard again"
                )
            if sample["__key__"] not in ("", key) or extension in sample:
                raise DataError(
                    f"{address}: member {shown(info.name)} stands inside the sample "
                    f"{sample['__key__'] or key}: index the shard again"
                )
            sample["__key__"] = key
            sample[extension] = data[info.offset_data : info.offset_data + info.size]
    except _NO_TAR as error:
        raise DataError(
            f"{address} has no tar header where sample {index} should be ({error}): its bytes "
            "changed; copy it again"
        ) from error
    if not sample["__key__"]:
        raise DataError(f"{address} holds no members where sample {index} should be: copy it again")
    return sample


def scan_shard(file: BinaryIO, address: str) -> Scan:
    """One pass over the headers of a shard.

    Raises:
        DataError: no tar file, cut inside a member, samples whose members do not stand together, a refused
            member.
    """
    keys: list[str] = []
    starts: list[int] = []
    extensions: set[str] = set()
    end = 0
    try:
        _demand_uncompressed(file, address)
        with tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:") as tar:
            for info in tar:
                named = _named(info, address)
                if named is None:
                    continue
                key, extension = named
                if not keys or key != keys[-1]:
                    keys.append(key)
                    starts.append(info.offset)
                    extensions = set()
                if extension in extensions:
                    raise DataError(
                        f"{address}: member {shown(info.name)} is there twice; every sample needs a "
                        "name of its own"
                    )
                extensions.add(extension)
                end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them all
            _demand_end(file, tar.offset)
    except (*_NO_TAR, OSError) as error:
        raise DataError(
            f"{address} cannot be read as a tar file after {len(keys)} samples ({error}): it was cut "
            "or damaged; copy it again"
        ) from error
    _demand_together(keys, address)
    return Scan(keys, np.array([*starts, end] if starts else [0], dtype=np.int64))


def image_extension(data: bytes) -> str | None:
    """'jpg' or 'png' by the first bytes, None for anything else."""
    return next((extension for magic, extension in _IMAGE_MAGIC.items() if data.startswith(magic)), None)


class _Headers:
    """A file of which tarfile reads the headers: one that claims to have gigabytes (of a long name, of
    attributes) takes no memory.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if size < 0:
            raise tarfile.HeaderError("negative size")
        return self._read(min(size, _LONGEST_HEADER))


def _demand_uncompressed(file: BinaryIO, address: str) -> None:
    compressed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if compressed:
        raise DataError(
            f"{address} is compressed by gzip, so single samples cannot be read from it: decompress it first"
        )


def _demand_end(file: BinaryIO, offset: int) -> None:
    """Raise ReadError unless only zeros follow: tarfile takes a damaged header, and one that was zeroed,
    for the end of the archive.
    """
    file.seek(offset)
    while block := file.read(_LONGEST_HEADER):
        if block.count(0) != len(block):
            raise tarfile.ReadError(f"no tar header at byte {offset}, and more data after it")


def _demand_together(keys: list[str], address: str) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise DataError(
                f"{address}: the members of sample {key} do not stand side by side, or two samples "
                "have this name; sort the tar by name"
            )
        seen.add(key)


def _headers(data: bytes) -> Iterator[tarfile.TarInfo]:
    """The headers in a stretch of a tar file; tarfile itself only where names are long or attributes
    extended: it takes four times as long.
    """
    offset, found = 0, []
    while offset + _BLOCK <= len(data) and any(data[offset : offset + _BLOCK]):
        info = tarfile.TarInfo.frombuf(data[offset : offset + _BLOCK], "utf-8", "surrogateescape")
        if info.type in _EXTENDED:
            with tarfile.open(fileobj=cast(BinaryIO, _Headers(io.BytesIO(data))), mode="r:") as tar:
                yield from tar
            return
        _demand_size(info)
        info.offset, info.offset_data = offset, offset + _BLOCK
        found.append(info)
        offset = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
    yield from found


def _named(info: tarfile.TarInfo, address: str) -> tuple[str, str] | None:
    """(key, extension) of a member; None for one that belongs to no sample: a folder, or a name without an
    extension.
    """
    _demand_size(info)
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"{address}: member {shown(info.name)} has a path that leads out of its folder: such a "
            "shard is not read"
        )
    if info.isdir():
        return None
    if info.type not in _REGULAR or info.issparse():
        raise DataError(
            f"{address}: member {shown(info.name)} is no regular file (a link, a device or a file "
            "with holes): such a shard is not read"
        )
    key, extension = base_plus_ext(info.name)
    return None if not key or not extension else (shown(key), extension.lower())


def _demand_size(info: tarfile.TarInfo) -> None:
    """Raise HeaderError for a size below 0, which a header can hold: the next member would be this one
    again, for ever.
    """
    if info.size < 0:
        raise tarfile.HeaderError(f"member {shown(info.name)} has {info.size} bytes")


def shown(name: str) -> str:
    """A name as it may stand in a message and a log: in one line, without what a terminal would obey."""
    return name if name.isprintable() else ascii(name)
