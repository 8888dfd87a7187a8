"""The content of a tar file of unknown origin: kind, number of samples, facts for an index."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mhla_lightning.data.check import sha256_of
from mhla_lightning.data.encoders.videos import measure_mp4
from mhla_lightning.data.index import ShardEntry, offsets_path
from mhla_lightning.data.members import (
    IMAGE_EXTENSIONS,
    RawSample,
    Scan,
    image_extension,
    parse_sample,
    scan_shard,
)
from mhla_lightning.data.npy import load_npy
from mhla_lightning.data.pixels import BadImage, check_header
from mhla_lightning.data.prepare.shards import row_offsets, token_members
from mhla_lightning.errors import DataError

_UNPACK = "unpack the shards into FOLDER/CLASS/* and run `mhla data pack`"
LATENT_KINDS = {3: "latents", 4: "video_latents"}


class ClipFacts(NamedTuple):
    """The size of clips, and their rate.

    Args:
        frames: of a clip.
        height: in pixels.
        width: in pixels.
        rate: frames a second; None where the shard does not hold it.
    """

    frames: int
    height: int
    width: int
    rate: float | None


@dataclass(frozen=True)
class SurveyJob:
    """A tar file to read.

    Args:
        path: of the tar file.
        kind: kind of its samples; None finds out.
        to: folder for its offsets.
        captioned: whether images have captions instead of classes.
    """

    path: Path
    kind: str | None
    to: Path
    captioned: bool = False


@dataclass(frozen=True)
class Survey:
    """What a tar file holds.

    Args:
        entry: for the index.
        kind: of the samples.
        keys: of the samples, or of the token members.
        labels: 1 + the largest class number; 0 without labels.
        length: tokens a row; None for other kinds.
        shape: of a latent; empty for other kinds.
        clip: size and rate of clips; None for other kinds.
        unusable: images that training will skip, as far as their headers show.
        reason: the first of these, and why.
        contents: a hash of each sample's members; empty where samples are not read.
    """

    entry: ShardEntry
    kind: str
    keys: list[str] = field(repr=False)
    labels: int = 0
    length: int | None = None
    shape: tuple[int, ...] = ()
    clip: ClipFacts | None = None
    unusable: int = 0
    reason: str = ""
    contents: list[bytes] = field(default_factory=list, repr=False)


def survey_shard(job: SurveyJob) -> Survey:
    """Read a shard and write its offsets into `job.to`.

    Raises:
        DataError: a shard that cannot be read, or is not of the kind.
    """
    address = str(job.path)
    try:
        with open(job.path, "rb") as file:
            scan = scan_shard(file, address)
            if not scan.keys:
                raise DataError(address, "holds no samples; remove it")
            first = _sample(file, scan, 0, address)
            kind, shape = _kind(first, address, job.captioned)
            clip = _clip(first, address) if kind == "clips" else None
            if job.kind not in (None, kind):
                raise DataError(
                    address,
                    f"sample {first['__key__']} is of {kind}, not of {job.kind}; a split holds one kind",
                )
            members = token_members(file, scan, address) if kind == "tokens" else None
            offsets = row_offsets(scan, members) if members else scan.offsets
            labelled = not members and clip is None and "cls" in first and not job.captioned
            looked = _look(file, scan, kind, address) if labelled else Looked()
            file.seek(0)
            entry = ShardEntry(job.path.name, len(offsets) - 1, job.path.stat().st_size, sha256_of(file))
    except OSError as error:
        raise DataError(address, f"cannot be read ({error.strerror or error})") from error
    np.save(offsets_path(job.to, entry.name), offsets, allow_pickle=False)
    return Survey(
        entry,
        kind,
        scan.keys,
        looked.labels,
        members.length if members else None,
        shape,
        clip,
        len(looked.bad),
        looked.bad[0] if looked.bad else "",
        looked.contents,
    )


def _sample(file: BinaryIO, scan: Scan, number: int, address: str) -> RawSample:
    start, stop = int(scan.offsets[number]), int(scan.offsets[number + 1])
    file.seek(start)
    return parse_sample(file.read(stop - start), address, number)


def _kind(sample: RawSample, address: str, captioned: bool) -> tuple[str, tuple[int, ...]]:
    """Return the kind of a sample, and the shape of its latent."""
    what = f"sample {sample['__key__']}"
    members = {name for name in sample if not name.startswith("__")}
    if "tokens.npy" in members:
        _demand(address, what, members, "documents.npy")
        return "tokens", ()
    if "latent.npy" in members:
        shape = load_npy(sample["latent.npy"], f"{address}: {what}, latent.npy").shape
        if len(shape) not in LATENT_KINDS:
            raise DataError(address, f"{what}: latent.npy is {shape}; (C, h, w) or (C, t, h, w) is needed")
        _demand(address, what, members, "cls", "text.npy")
        return LATENT_KINDS[len(shape)], shape
    if "clip.npy" in members or "mp4" in members:
        _demand(address, what, members, "txt")
        return "clips", ()
    image = next((name for name in IMAGE_EXTENSIONS if name in members), None)
    if image is not None and image_extension(sample[image]) is not None:
        _demand(address, what, members, *(("txt", "json") if captioned else ("cls",)))
        return "images", ()
    found = ", ".join(sorted(members))
    if image is not None:
        raise DataError(
            address,
            f"{what} has the members {found}, but {image} holds neither JPEG, PNG nor WebP: {_UNPACK}",
        )
    known = (
        "jpg, jpeg, png or webp with cls, tokens.npy with documents.npy, latent.npy with cls or text.npy, "
        "clip.npy or mp4 with txt"
    )
    raise DataError(address, f"{what} has the members {found}; known are {known}; {_UNPACK}")


def _clip(sample: RawSample, address: str) -> ClipFacts:
    what = f"sample {sample['__key__']}"
    if "clip.npy" not in sample:
        return ClipFacts(*measure_mp4(sample["mp4"], f"{address}: {what}, mp4"))
    shape = load_npy(sample["clip.npy"], f"{address}: {what}, clip.npy").shape
    if len(shape) != 4 or shape[-1] != 3:
        raise DataError(address, f"{what}: clip.npy is {shape}; (frames, height, width, 3) is needed")
    return ClipFacts(*shape[:3], None)


def _demand(address: str, what: str, members: set[str], *wanted: str) -> None:
    if not members & set(wanted):
        others = [name for name in ("json", "txt") if name in members]
        named = " or ".join(f"KEY.{name}" for name in others)
        read = f"; labels in {named} are not read, and captions only with `captioned`" if others else ""
        raise DataError(
            address,
            f"{what} has the members {', '.join(sorted(members))} and lacks {' or '.join(wanted)}"
            + (f"{read}: write the class number as KEY.cls, or {_UNPACK}" if "cls" in wanted else ""),
        )


@dataclass
class Looked:
    """What one pass over labelled samples shows.

    Args:
        labels: 1 + the largest class number.
        bad: images that training will skip, each with the reason.
        contents: a hash of each sample's members.
    """

    labels: int = 0
    bad: list[str] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)


def _look(file: BinaryIO, scan: Scan, kind: str, address: str) -> Looked:
    looked = Looked()
    for number in range(len(scan.keys)):
        sample = _sample(file, scan, number, address)
        members = {name: data for name, data in sample.items() if not name.startswith("__")}
        what = f"sample {sample['__key__']}"
        _demand(address, what, set(members), "cls")
        text = members["cls"].strip()
        if not text.isdigit() or len(text) > 9:
            raise DataError(
                address,
                f"{what} has cls {text[:20]!r}; the class number is needed, an integer from 0 on: write it, "
                f"or {_UNPACK}",
            )
        looked.labels = max(looked.labels, 1 + int(text))
        digest = hashlib.blake2b(digest_size=8)
        for name, data in sorted(members.items()):
            digest.update(f"{name} {len(data)} ".encode(errors="surrogateescape") + data)
        looked.contents.append(digest.digest())
        try:
            if kind == "images":
                check_header(next((members[name] for name in IMAGE_EXTENSIONS if name in members), b""))
        except BadImage as reason:
            looked.bad.append(f"{sample['__key__']} of {address} ({reason})")
    return looked
