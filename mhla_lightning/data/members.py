"""The members of tar shards, without extracting, decoding or unpickling.

Samples are grouped by webdataset's rule: neighbouring members share the name up to the first dot of the file
name. webdataset's own tar reader starts at the beginning of a shard. It takes a cut between two members for
the end, and silently skips links and devices. Training needs single samples by their position, and an error
for each of those cases.
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
# tarfile raises these for bytes that are no tar file.
_NO_TAR = (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_IMAGE_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class Scan(NamedTuple):
    """The result of one pass over a shard's headers.

    keys: of the samples, in order. offsets: int64 (samples + 1,), see data/README.md.
    """

    keys: list[str]
    offsets: np.ndarray


def parse_sample(data: bytes, address: str, index: int) -> RawSample:
    """Return the sample whose members fill `data`, a piece of the shard at `address`.

    Raises:
        DataError: no tar members. A member that is cut, exists twice, or belongs to another sample. A member
            that is no regular file, or has a path outside its folder.
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
                    address,
                    f"member {shown(info.name)} has {size} by its header: copy or pack the shard again",
                )
            if sample["__key__"] not in ("", key) or extension in sample:
                raise DataError(
                    address,
                    f"member {shown(info.name)} is inside the sample {sample['__key__'] or key}: index the "
                    "shard again",
                )
            sample["__key__"] = key
            sample[extension] = data[info.offset_data : info.offset_data + info.size]
    except _NO_TAR as error:
        raise DataError(
            address,
            f"there is no tar header for sample {index} ({error}): its bytes changed; copy it again",
        ) from error
    if not sample["__key__"]:
        raise DataError(address, f"it holds no members for sample {index}: copy it again")
    return sample


def scan_shard(file: BinaryIO, address: str) -> Scan:
    """Read the headers of a shard in one pass.

    Raises:
        DataError: no tar file, a cut inside a member, samples with scattered members, a refused member.
    """
    keys: list[str] = []
    starts: list[int] = []
    extensions: set[str] = set()
    end = 0
    try:
        _demand_uncompressed(file, address)
        with tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:", encoding="utf-8") as tar:
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
                        address, f"member {shown(info.name)} exists twice; every sample needs its own name"
                    )
                extensions.add(extension)
                end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them all
            _demand_end(file, tar.offset, address)
    except (*_NO_TAR, OSError) as error:
        raise DataError(
            address,
            f"it cannot be read as a tar file after {len(keys)} samples ({error}): it was cut or damaged; "
            "copy "
            "it again",
        ) from error
    _demand_together(keys, address)
    return Scan(keys, np.array([*starts, end] if starts else [0], dtype=np.int64))


def image_extension(data: bytes) -> str | None:
    """Return 'jpg', 'png' or 'webp' by the first bytes, None for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for magic, extension in _IMAGE_MAGIC.items() if data.startswith(magic)), None)


class _Headers:
    """A file for tarfile, where a header that claims gigabytes takes no memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if size < 0:
            raise tarfile.HeaderError("negative size")
        return self._read(min(size, _LONGEST_HEADER))


def _demand_uncompressed(file: BinaryIO, address: str) -> None:
    start = file.read(8)
    file.seek(0)
    by = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
    if by is not None:
        raise DataError(
            address,
            f"it is compressed by {by}, so single samples cannot be read from it: decompress it first",
        )


def _demand_end(file: BinaryIO, offset: int, address: str) -> None:
    """Raise unless only zeros follow.

    tarfile takes a damaged or zeroed header for the end of the archive.
    """
    file.seek(offset)
    end = offset
    while block := file.read(_LONGEST_HEADER):
        if block.count(0) == len(block):
            end += len(block)
            continue
        place = end + (len(block) - len(block.lstrip(b"\0"))) // _BLOCK * _BLOCK
        if place >= offset + 2 * _BLOCK and _is_header(file, place):
            raise DataError(
                address,
                f"it is several tar files joined by cat, and another one begins at byte {place}: cut it "
                f"there (head -c {place} FILE > FIRST.tar; tail -c +{place + 1} FILE > REST.tar)",
            )
        raise tarfile.ReadError(f"no tar header at byte {offset}, and more data after it")


def _is_header(file: BinaryIO, place: int) -> bool:
    file.seek(place)
    try:
        tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _demand_together(keys: list[str], address: str) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise DataError(
                address,
                f"the members of sample {key} are not next to each other, or two samples have this name; "
                "sort "
                "the tar by name",
            )
        seen.add(key)


def _headers(data: bytes) -> Iterator[tarfile.TarInfo]:
    """Yield the headers in a piece of a tar file.

    tarfile's own reader takes four times as long; it reads only long names and extended attributes.
    """
    offset, found = 0, []
    while offset + _BLOCK <= len(data) and any(data[offset : offset + _BLOCK]):
        info = tarfile.TarInfo.frombuf(data[offset : offset + _BLOCK], "utf-8", "surrogateescape")
        if info.type in _EXTENDED:
            piece = cast(BinaryIO, _Headers(io.BytesIO(data)))
            with tarfile.open(fileobj=piece, mode="r:", encoding="utf-8") as tar:
                yield from tar
            return
        _demand_size(info)
        info.offset, info.offset_data = offset, offset + _BLOCK
        found.append(info)
        offset = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
    yield from found


def _named(info: tarfile.TarInfo, address: str) -> tuple[str, str] | None:
    """Return (key, extension) of a member; None for a folder or a name without an extension."""
    _demand_size(info)
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(
            address,
            f"member {shown(info.name)} has a path outside its folder: such a shard is not read",
        )
    if info.isdir():
        return None
    if info.type not in _REGULAR or info.issparse():
        raise DataError(
            address,
            f"member {shown(info.name)} is no regular file (a link, a device or a file with holes): such a "
            "shard is not read",
        )
    key, extension = base_plus_ext(info.name)
    return None if not key or not extension else (shown(key), extension.lower())


def _demand_size(info: tarfile.TarInfo) -> None:
    """Raise HeaderError for a size below 0: the next member would be this one again, forever."""
    if info.size < 0:
        raise tarfile.HeaderError(f"member {shown(info.name)} has {info.size} bytes")


def shown(name: str) -> str:
    """Return a name for messages and logs: in one line, without control characters."""
    return name if name.isprintable() else ascii(name)
