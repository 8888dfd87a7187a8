"""A folder of whole shards that the processes of a node share: names, locks, room.

<sha256>.tar: a complete shard. It gets this name after its bytes were compared with the index.

<sha256>.<uuid>.tmp: a shard during its download, at its full size, so that its room is reserved.

<sha256>.lock: locked by the process that downloads this shard. It is never removed, because a lock on a
removed file excludes nobody.

room.lock: locked while room is made.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)
_IN_USE = 60.0  # seconds; shards that were used more recently are removed last
_ABANDONED = 86_400.0  # seconds
_POLL = 0.1  # seconds


class CacheFolder:
    """Shards by the sha256 of their content.

    Args:
        folder: shared by the processes of a node.
        max_bytes: largest size of all shards.
        patience: seconds to wait for another process without progress.
    """

    def __init__(self, folder: str | Path, max_bytes: int, patience: float) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.patience = patience

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        """Hold NAME.lock, and yield True; yield False without the lock.

        That happens when its holder wrote nothing for `patience` seconds.
        Raises OSError.
        """
        descriptor = os.open(self.folder / f"{name}.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            held = _try_lock(descriptor) or self._wait(descriptor, name)
            try:
                yield held
            finally:
                # Unlock explicitly: a child forked meanwhile holds the lock by its copy of the descriptor.
                if held:
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def reserve(self, sha256: str, size: int) -> Path | None:
        """Return a new sparse temporary file of `size` bytes; None without room.

        Other shards are removed to make room.
        The caller holds the shard's lock, so any other temporary file of this shard belongs to a process that
        has ended. Raises OSError.
        """
        with self.lock("room") as held:
            if not held:
                return None
            for leftover in self._leftovers(sha256):
                leftover.unlink(missing_ok=True)
            if not self._make_room(size):
                return None
            path = self.folder / f"{sha256}.{uuid.uuid4().hex}.tmp"
            with open(path, "xb") as file:
                file.truncate(size)
            return path

    def _wait(self, descriptor: int, name: str) -> bool:
        logger.info("%s is being fetched by another process: waiting", self.folder / name)
        seen, since = self._progress(name), time.monotonic()
        while time.monotonic() - since < self.patience:
            time.sleep(_POLL)
            if _try_lock(descriptor):
                return True
            if (now := self._progress(name)) != seen:
                seen, since = now, time.monotonic()
        logger.warning(
            "%s: another process has held it for %.0f s without progress; continuing without it",
            self.folder / name,
            self.patience,
        )
        return False

    def _progress(self, name: str) -> list[tuple[str, int]]:
        """Return the temporary files of `name` and their write times: its progress."""
        found = []
        for path in self.folder.glob(f"{name}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                found.append((path.name, path.stat().st_mtime_ns))
        return sorted(found)

    def _leftovers(self, own: str) -> Iterator[Path]:
        """Yield temporary files of processes that have ended.

        These are of the shard `own`, whose lock the caller holds, of shards without a lock, and very old.
        """
        for path in self.folder.glob("*.tmp"):
            sha256 = path.name.split(".")[0]
            with contextlib.suppress(FileNotFoundError):
                if sha256 == own or time.time() - path.stat().st_mtime > _ABANDONED or self._is_free(sha256):
                    yield path

    def _is_free(self, sha256: str) -> bool:
        descriptor = os.open(self.folder / f"{sha256}.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            free = _try_lock(descriptor)
            if free:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            return free
        finally:
            os.close(descriptor)

    def _make_room(self, size: int) -> bool:
        """Remove shards, least recently used first, until `size` more bytes fit.

        Processes that have a removed file open can still read it.
        """
        shards = []
        total = size
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.suffix in (".tar", ".tmp"):
                    status = path.stat()
                    total += status.st_size
                    shards += [(status.st_mtime, status.st_size, path)] if path.suffix == ".tar" else []
        # Shards used in the last minute come last, and are removed only when nothing else is left.
        shards.sort(key=lambda shard: shard[0])
        recent = time.time() - _IN_USE
        for used, bytes_, path in shards:
            if total <= self.max_bytes:
                break
            if used > recent:
                logger.info(
                    "%s is removed although it was used in the last minute: data.reading.remote.cache_bytes "
                    "is small for this work",
                    path,
                )
            path.unlink(missing_ok=True)
            total -= bytes_
        return total <= self.max_bytes


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
