"""The captions of packed samples, read without the images or clips themselves."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping

from webdataset.tariterators import base_plus_ext

from mhla_lightning.data.members import shown
from mhla_lightning.data.prepare.caption_files import CAPTION, LONGEST_CAPTION
from mhla_lightning.data.prepare.latents.images import NUMBER
from mhla_lightning.data.split import Split
from mhla_lightning.errors import DataError
from mhla_lightning.textfiles import NotText, decode

TEXT, JSON = "txt", "json"  # members that may hold a caption


def caption_in(members: Mapping[str, bytes], key: str | None = None) -> tuple[str | None, str]:
    """Return the caption in the members of a sample, and why there is none.

    Args:
        members: content by extension.
        key: of the caption in the member json; None takes the member txt or else the key `caption`.

    Raises:
        NotText: a member that is no text, no JSON object, or has no text under the key.
    """
    caption: str | None = None
    missing = f"there is no member {TEXT} or {JSON}"
    if key is None and TEXT in members:
        caption, missing = decode(members[TEXT]), f"its member {TEXT} is empty"
    elif JSON in members:
        key = key or CAPTION
        try:
            found = json.loads(decode(members[JSON]))
        except (ValueError, RecursionError) as error:
            raise NotText(f"its member {JSON} is no JSON ({error})") from error
        if not isinstance(found, dict):
            raise NotText(f"its member {JSON} holds a {type(found).__name__}; an object is needed")
        value = found.get(key)
        if not isinstance(value, str | None):
            raise NotText(f"its member {JSON} has a {type(value).__name__} under the key {key}, and no text")
        caption = value
        missing = f"its member {JSON} has no text under the key {key}"
    elif key is not None:
        missing = f"there is no member {JSON} for the key {key}"
    return (caption or "").strip() or None, missing


def shard_texts(split: Split, split_name: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the name of every sample, in order, and its members txt and json.

    Args:
        split: of shards.
        split_name: for messages.

    Raises:
        DataError: a text that is too long, or a shard that differs from its index.
    """
    for number, entry in enumerate(split.index.shards):
        address, found = split.address(number), 0
        with split.store.open(entry.name) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for key, members in _samples(tar, split_name):
                        found += 1
                        yield _name(key), members
            except tarfile.TarError as error:
                raise DataError(
                    address, f"it cannot be read as a tar file ({error}): copy it again"
                ) from error
        if found != entry.samples:
            raise DataError(
                address, f"it holds {found} samples, and its index says {entry.samples}: index it again"
            )


def _samples(tar: tarfile.TarFile, split_name: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the key of every sample, and its members that may hold a caption."""
    key = ""
    members: dict[str, bytes] = {}
    for info in tar:
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them all
        found, extension = base_plus_ext(info.name)
        if not info.isreg() or not found or not extension:
            continue
        if found != key:
            if key:
                yield key, members
            key, members = found, {}
        if extension.lower() in (TEXT, JSON):
            members[extension.lower()] = _content(tar, info, f"{split_name} sample {_name(found)}")
    if key:
        yield key, members


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo, sample: str) -> bytes:
    file = tar.extractfile(info) if 0 <= info.size <= LONGEST_CAPTION else None
    if file is None:
        raise DataError(sample, f"its caption has {info.size} bytes, more than any text")
    return file.read()


def _name(key: str) -> str:
    """Return the name of a sample, without the number that packing puts in front of it."""
    return shown(NUMBER.sub("", key.rpartition("/")[2]))
