"""A folder of whole shards that the processes of a node share: names, locks, room. Knows files and sizes,
nothing of stores.

<sha256>.tar         a shard, complete: it got this name after its bytes were compared with the index
<sha256>.<uuid>.tmp  a shard on its way, as long as the shard will be, so that its room is taken
<sha256>.lock        flocked by the one process that fetches this shard; never removed, for a lock on a
removed file keeps nobody out room.lock            flocked while room is made
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
_IN_USE = 60.0  # seconds: what was used more recently is removed last
_ABANDONED = 86_400.0  # seconds
_POLL = 0.1  # seconds


class CacheFolder:
    """Shards by the sha256 of their content, in at most `max_bytes`. patience: seconds to wait for another
    process that shows no progress.
    """

    def __init__(self, folder: str | Path, max_bytes: int, patience: float) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.patience = patience

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        """Hold NAME.lock. Yields False without it when whoever holds it wrote nothing for `patience`
        seconds. Raises OSError.
        """
        descriptor = os.open(self.folder / f"{name}.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            held = _try_lock(descriptor) or self._wait(descriptor, name)
            try:
                yield held
            finally:
                # said aloud, because a child forked meanwhile holds the same lock through its copy of the
                # descriptor
                if held:
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def reserve(self, sha256: str, size: int) -> Path | None:
        """A new temporary file of `size` bytes (a hole, still unwritten) after making room for it; None when
        there is no room to make.

        The caller holds the shard's lock, so that any other temporary file of this shard is of a process that
        is gone. Raises OSError.
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
            "%s: another process has held it for %.0f s without progress; going on without it",
            self.folder / name,
            self.patience,
        )
        return False

    def _progress(self, name: str) -> list[tuple[str, int]]:
        """Whatever changes while somebody fetches `name`: its temporary files and when they were written."""
        found = []
        for path in self.folder.glob(f"{name}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                found.append((path.name, path.stat().st_mtime_ns))
        return sorted(found)

    def _leftovers(self, own: str) -> Iterator[Path]:
        """Temporary files of processes that are gone: of the shard whose lock the caller holds, of shards
        nobody has locked, and very old ones.
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
        """Remove shards, least recently used first, until `size` more bytes fit. Open files stay readable
        for those who opened them.
        """
        shards = []
        total = size
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.suffix in (".tar", ".tmp"):
                    status = path.stat()
                    total += status.st_size
                    shards += [(status.st_mtime, status.st_size, path)] if path.suffix == ".tar" else []
        shards.sort(
            key=lambda shard: shard[0]
        )  # so those used in the last minute come last, and go only when nothing else is left
        recent = time.time() - _IN_USE
        for used, bytes_, path in shards:
            if total <= self.max_bytes:
                break
            if used > recent:
                logger.info(
                    "%s is removed although it was used in the last minute: data.remote.cache_bytes "
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
