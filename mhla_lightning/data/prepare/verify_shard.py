"""The check of one shard.

Nothing here raises an error about the shard: one problem must not hide the others.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mhla_lightning.data.check import sha256_of
from mhla_lightning.data.index import INDEX_NAME, ShardEntry, ShardIndex, offsets_path, parse_offsets
from mhla_lightning.data.kinds import Kind, kind_of
from mhla_lightning.data.members import Scan, scan_shard
from mhla_lightning.data.prepare.shards import row_offsets, token_members
from mhla_lightning.data.skips import BadSample
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import LocalStore, Store
from mhla_lightning.errors import DataError, UserError

MOST_PROBLEMS = 1_000  # of one shard that are listed; all are counted
_NO_KEYS = np.zeros(0, dtype=np.uint64)


class Problem(NamedTuple):
    """One finding.

    Args:
        file: SPLIT/NAME.
        sample: a key, or a number in the split; "" where the problem is about the file.
        problem: what is wrong, and what to do.
    """

    file: str
    sample: str
    problem: str


@dataclass(frozen=True)
class VerifyJob:
    """A shard to check.

    Args:
        split: its name.
        store: of the split.
        index: of the one shard.
        first: index in the split of its first sample.
    """

    split: str
    store: Store
    index: ShardIndex
    first: int

    @property
    def entry(self) -> ShardEntry:
        """The shard's entry in the index."""
        return self.index.shards[0]


@dataclass
class Findings:
    """The problems of a shard.

    Args:
        split: its name.
        shard: file name.
        first: index in the split of the first sample.
        samples: number of samples, as the index gives it.
        problems: the first 1,000.
        found: number of all problems.
        unusable: samples that cannot be trained on.
        keys: 64-bit hashes of the keys, uint64 (samples,).
    """

    split: str
    shard: str
    first: int
    samples: int
    problems: list[Problem] = field(default_factory=list)
    found: int = 0
    unusable: int = 0
    keys: np.ndarray = field(default_factory=_NO_KEYS.copy)

    def add(self, problem: str, sample: str = "", beside: str = "") -> None:
        """Add a problem of the shard, of one of its samples, or of the file NAME + beside."""
        self.found += 1
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(Problem(f"{self.split}/{self.shard}{beside}", sample, problem))


def verify_shard(job: VerifyJob) -> Findings:
    """Check everything in a shard."""
    findings = Findings(job.split, job.entry.name, job.first, job.entry.samples)
    with tempfile.TemporaryDirectory(prefix="mhla-verify-") as folder:
        try:
            path = _local_copy(job, Path(folder), findings)
        except DataError as error:
            findings.add(reason_for(error, job.store.address(job.entry.name)))
            path = None
        if path is None:
            findings.unusable = job.entry.samples
            return findings
        offsets = _offsets(job, path, findings)
        if offsets is None:
            findings.unusable = job.entry.samples
            return findings
        np.save(offsets_path(folder, job.entry.name), offsets, allow_pickle=False)
        entry = replace(job.entry, samples=len(offsets) - 1, bytes=max(path.stat().st_size, int(offsets[-1])))
        _samples(job, Split(replace(job.index, shards=(entry,)), LocalStore(folder)), findings)
    findings.unusable = min(findings.unusable + max(0, job.entry.samples - entry.samples), job.entry.samples)
    return findings


class _HashingSink:
    """A sink that hashes the data that it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        self._file.write(data)

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.digest = hashlib.sha256()


def _local_copy(job: VerifyJob, folder: Path, findings: Findings) -> Path | None:
    """Check size and sha256, and return the shard as a file in `folder`.

    A local shard becomes a link, a remote one is downloaded.
    """
    entry, path = job.entry, folder / job.entry.name
    size = job.store.size(entry.name)
    if size is None:
        findings.add(f"is missing, but {INDEX_NAME} lists it; copy it again or pack the data again")
        return None
    if isinstance(job.store, LocalStore):
        path.symlink_to(Path(job.store.address(entry.name)).absolute())
        with job.store.open(entry.name) as file:
            sha256 = sha256_of(file)
    else:
        sha256 = _download(job, size, path)
    if size != entry.bytes:
        findings.add(
            f"has {size} bytes, but {INDEX_NAME} says {entry.bytes}; it was cut or replaced, so copy it again"
        )
    elif sha256 != entry.sha256:
        findings.add(
            f"has sha256 {sha256[:12]}..., but {INDEX_NAME} says {entry.sha256[:12]}...; its bytes "
            "changed, so copy it again"
        )
    return path


def _download(job: VerifyJob, size: int, path: Path) -> str:
    """Copy a shard and return its sha256.

    Raises UserError when there is no room on this machine.
    """
    try:
        with open(path, "wb") as copy:
            sink = _HashingSink(copy)
            job.store.copy(job.entry.name, size, sink)
    except OSError as error:
        raise UserError(
            str(path.parent),
            f"has no room for {size} bytes ({error.strerror or error}); set TMPDIR to a folder that has",
        ) from error
    return sink.digest.hexdigest()


def _offsets(job: VerifyJob, path: Path, findings: Findings) -> np.ndarray | None:
    """Return where samples really begin, int64 (samples + 1,).

    Where the shard cannot be scanned, its offsets file is the answer; without that, None.
    """
    stored = _stored_offsets(job, findings)
    try:
        with open(path, "rb") as file:
            scan = scan_shard(file, job.entry.name)
            real = (
                scan.offsets
                if job.index.kind != "tokens"
                else row_offsets(scan, token_members(file, scan, job.entry.name))
            )
    except (DataError, OSError) as error:
        findings.add(reason_for(error, job.entry.name))
        return stored
    findings.keys = _hashes(scan)
    if len(real) - 1 != job.entry.samples:
        findings.add(
            f"holds {len(real) - 1} samples, but {INDEX_NAME} says {job.entry.samples}; it was cut "
            "or replaced, so copy it again"
        )
    elif stored is not None and not np.array_equal(stored, real):
        sample = int(np.flatnonzero(stored != real)[0])
        findings.add(
            f"says byte {stored[sample]}, but sample {sample} of the shard is at byte "
            f"{real[sample]}: copy it again",
            beside=".offsets.npy",
        )
    return real


def _stored_offsets(job: VerifyJob, findings: Findings) -> np.ndarray | None:
    name = f"{job.entry.name}.offsets.npy"
    address = job.store.address(name)
    try:
        size = job.store.size(name)
        if size is None:
            raise DataError(address, "is missing; copy it again or run `mhla data index --overwrite`")
        return parse_offsets(job.store.read(name, 0, size), job.entry, job.index.kind, address)
    except DataError as error:
        findings.add(reason_for(error, address), beside=".offsets.npy")
        return None


def _samples(job: VerifyJob, split: Split, findings: Findings) -> None:
    for number, name, problem in _bad_samples(split, kind_of(job.index)):
        findings.unusable += 1
        findings.add(problem, sample=name or f"sample {job.first + number}")


def _bad_samples(split: Split, kind: Kind) -> Iterator[tuple[int, str, str]]:
    """Yield (position, key if known, problem) of every sample that cannot be used.

    One sample is in memory at a time.
    """
    for number in range(split.samples):
        key = ""
        try:
            sample = kind.read(split, [number])[0]
            key = str(sample["__key__"])
            kind.inspect(sample)
        except BadSample as error:
            yield number, key, str(error)
        except DataError as error:
            yield number, key, reason_for(error, split.address(0))


def _hashes(scan: Scan) -> np.ndarray:
    digests = b"".join(
        hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest() for key in scan.keys
    )
    return np.frombuffer(digests, dtype=np.uint64)


def reason_for(error: Exception, address: str) -> str:
    """Return the text of an error without the file's name.

    A report has a column for the name.
    """
    return error.reason if isinstance(error, UserError) and error.key == address else str(error)
