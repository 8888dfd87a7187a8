"""Whole shards of another store, kept in a folder that the processes of a node share."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any

from mhla_lightning.data.stores.background import Fetcher
from mhla_lightning.data.stores.base import Store, check_range
from mhla_lightning.data.stores.cache_folder import CacheFolder
from mhla_lightning.data.stores.local import LocalStore
from mhla_lightning.data.stores.retry import NoRanges
from mhla_lightning.errors import DataError

logger = logging.getLogger(__name__)
DOWNLOADS = 3  # of a shard with wrong bytes; the inner store retries other failures
# Seconds; coarse enough to cost nothing, fine enough for the cache's "used in the last minute".
_TOUCH_EVERY = 10.0
# A reader waits for a shard up to this size. A larger one is read in parts while it is downloaded.
WAIT_BYTES = 64 * 2**20
_LATER = 60.0  # seconds until a shard is tried again that found no room or whose download did not end


class CachedStore(Store):
    """A store in front of another one, which downloads whole shards once a node.

    Shards are compared with the index before use.
    A reader waits for shards of up to 64 MiB. Larger ones are read from `inner` in parts until their download
    ends: an epoch begins in dozens of shards at once, and training would wait for all of them. When the
    folder cannot be written, is full, or is too small for a shard, one warning follows and `inner` is read
    directly.

    Args:
        inner: the store behind.
        files: shard name -> (sha256 as 64 hex digits, bytes), from the index; other names are read from
            `inner`.
        folder: of the cache; made when missing; shared by processes, runs and data sets.
        max_bytes: largest size of the folder.
        patience: seconds to wait for another process that downloads a shard without progress.
    """

    def __init__(
        self,
        inner: Store,
        files: Mapping[str, tuple[str, int]],
        folder: str | Path,
        max_bytes: int,
        patience: float = 600.0,
    ) -> None:
        for name, (sha256, _) in files.items():
            if not re.fullmatch("[0-9a-f]{64}", sha256):
                raise DataError(
                    inner.address(name),
                    f"its sha256 in the index is {sha256!r}, not 64 hex digits: pack the data again",
                )
        self.url = inner.url
        self._inner = inner
        self._files = dict(files)
        self._folder = CacheFolder(folder, max_bytes, patience)
        self._local = LocalStore(folder)
        self._off = False
        self._warned_size = False
        self._patience, self._wait_bytes = patience, float(WAIT_BYTES)
        self._fetchers: dict[int, Fetcher] = {}  # by process id: threads do not survive a fork
        # Shard name -> time.monotonic() of the next attempt to cache it.
        self._not_before: dict[str, float] = {}
        self._touched: dict[str, float] = {}

    def address(self, name: str) -> str:
        return self._inner.address(name)

    def size(self, name: str) -> int | None:
        """Return the size in the inner store; a cached shard does not prove its source."""
        return self._inner.size(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        check_range(start, stop)
        if not self._fetched(name):
            try:
                return self._inner.read(name, start, stop)
            except NoRanges:
                if not self._fetch_now(name):
                    raise
        return self._local.read(self._file(name), start, stop)

    def read_many(self, requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
        direct = [request for request in requests if not self._fetched(request[0])]
        try:
            found = dict(zip(direct, self._inner.read_many(direct), strict=True)) if direct else {}
        except NoRanges:
            found = {request: self.read(*request) for request in direct}
        return [
            found[request] if request in found else self._local.read(self._file(request[0]), *request[1:])
            for request in requests
        ]

    def open(self, name: str) -> BufferedReader:
        return self._local.open(self._file(name)) if self._fetched(name) else self._inner.open(name)

    def close(self) -> None:
        self._local.close()
        self._inner.close()

    def _file(self, name: str) -> str:
        return f"{self._files[name][0]}.tar"

    def _is_there(self, name: str) -> bool:
        """Return whether the shard is cached with its size; if so, keep it open.

        A cached shard is marked as used.
        """
        if not self._local.hold(self._file(name), self._files[name][1]):
            return False
        now = time.monotonic()
        if now - self._touched.get(name, -_TOUCH_EVERY) >= _TOUCH_EVERY:
            self._touched[name] = now
            # It may have been removed meanwhile, or the folder is read-only; the file is open here.
            with contextlib.suppress(OSError):
                os.utime(self._folder.folder / self._file(name))
        return True

    def _fetched(self, name: str) -> bool:
        """Return whether the shard is in the cache, after an attempt to download it.

        Raises DataError when its bytes differ from the index.
        """
        if name not in self._files:
            return False
        try:
            if self._is_there(name):
                return True
        except OSError as error:
            self._give_up(error)
            return False
        if self._off or time.monotonic() < self._not_before.get(name, 0.0) or not self._fits(name):
            return False
        if self._files[name][1] > self._wait_bytes:
            self._fetcher().ask(name)
            return False
        return self._fetch_now(name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fetchers": {}}

    def _fetcher(self) -> Fetcher:
        process = os.getpid()
        if process not in self._fetchers:
            other = CachedStore(
                copy.deepcopy(self._inner),
                self._files,
                self._folder.folder,
                self._folder.max_bytes,
                self._patience,
            )
            other._wait_bytes = float("inf")
            self._fetchers[process] = Fetcher(other._fetched)
        return self._fetchers[process]

    def _fetch_now(self, name: str) -> bool:
        """Download a shard of any size; return False without room or cache. Raises DataError."""
        try:
            self._folder.folder.mkdir(parents=True, exist_ok=True)
            fetched = self._fetch(name)
        except OSError as error:
            self._give_up(error)
            return False
        if not fetched:
            self._not_before[name] = time.monotonic() + _LATER
        return fetched

    def _give_up(self, error: OSError) -> None:
        if not self._off:
            logger.warning(
                "%s: nothing more is cached there (%s); shards are read directly",
                self._folder.folder,
                error.strerror or error,
            )
        self._off = True

    def _fits(self, name: str) -> bool:
        size, bound = self._files[name][1], self._folder.max_bytes
        if size > bound and not self._warned_size:
            self._warned_size = True
            logger.warning(
                "%s has %d bytes, more than data.reading.remote.cache_bytes (%d): read directly",
                self.address(name),
                size,
                bound,
            )
        return size <= bound

    def _fetch(self, name: str) -> bool:
        """Download a shard, or wait for the process that does; return False without room or lock.

        Raises OSError for the cache, DataError for the source.
        """
        sha256, size = self._files[name]
        with self._folder.lock(sha256) as held:
            if not held:
                return False
            for attempt in range(1, DOWNLOADS + 1):
                if self._is_there(name):
                    return True
                temporary = self._folder.reserve(sha256, size)
                if temporary is None:
                    return False
                try:
                    found = self._download(name, temporary)
                    if found == (sha256, size):
                        os.replace(temporary, self._folder.folder / self._file(name))
                        return self._is_there(name)
                finally:
                    temporary.unlink(missing_ok=True)
                logger.warning(
                    "%s: try %d of %d brought sha256 %s..., %d bytes",
                    self.address(name),
                    attempt,
                    DOWNLOADS,
                    found[0][:12],
                    found[1],
                )
        raise DataError(
            self.address(name),
            f"after {DOWNLOADS} downloads, its sha256 is {found[0][:12]}... with {found[1]} bytes, but "
            f"{sha256[:12]}... with {size} in the index: its bytes changed; copy it again",
        )

    def _download(self, name: str, temporary: Path) -> tuple[str, int]:
        """Write a shard's bytes to `temporary` and to the disk; return their sha256 and number."""
        with _DownloadSink(temporary) as sink:
            self._inner.copy(name, self._files[name][1], sink)
            return sink.finish()


class _DownloadSink:
    """A base.Sink that overwrites an existing file and hashes the bytes."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._hash = hashlib.sha256()
        self._written = 0

    def __enter__(self) -> _DownloadSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        self._hash.update(data)
        self._written += len(data)

    def restart(self) -> None:
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._hash = hashlib.sha256()
        self._written = 0

    def finish(self) -> tuple[str, int]:
        """Flush to the disk, and return the sha256 and the number of bytes written."""
        os.ftruncate(self._descriptor, self._written)  # its size was a reservation and may be larger
        os.fsync(self._descriptor)
        return self._hash.hexdigest(), self._written
