"""Shards fetched into a cache while training reads them in parts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from mhla_lightning.errors import DataError

THREADS = 2  # of a process; the lock of each shard shares the work among the processes of a node


class Fetcher:
    """Fetches what it is asked for, in that order, in threads that end with the process.

    fetch: brings one shard into the cache; called in other threads, so it must share nothing with the caller.
    """

    def __init__(self, fetch: Callable[[str], object]) -> None:
        self._fetch = fetch
        self._names: SimpleQueue[str] = SimpleQueue()
        self._asked: set[str] = set()
        self._failed: dict[str, DataError] = {}
        for _ in range(THREADS):
            threading.Thread(target=self._run, name="mhla-cache", daemon=True).start()

    def ask(self, name: str) -> None:
        """Fetch `name` when it is not being fetched yet. Raises the DataError of an earlier attempt."""
        if name in self._failed:
            raise self._failed.pop(name)
        if name not in self._asked:
            self._asked.add(name)
            self._names.put(name)

    def _run(self) -> None:
        while True:
            name = self._names.get()
            try:
                self._fetch(name)
            except DataError as error:
                self._failed[name] = error
            finally:
                self._asked.discard(name)
