"""Download of shards into a cache while training reads them in parts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from mhla_lightning.errors import DataError

THREADS = 2  # of a process; the locks of the shards share the work among the processes of a node


class Fetcher:
    """A queue of shards that daemon threads fetch in order.

    Args:
        fetch: brings one shard into the cache. It is called in other threads and must share nothing with the
            caller.
    """

    def __init__(self, fetch: Callable[[str], object]) -> None:
        self._fetch = fetch
        self._names: SimpleQueue[str] = SimpleQueue()
        self._asked: set[str] = set()
        self._failed: dict[str, DataError] = {}
        for _ in range(THREADS):
            threading.Thread(target=self._run, name="mhla-cache", daemon=True).start()

    def ask(self, name: str) -> None:
        """Queue `name` unless it is queued already. Raises the DataError of an earlier attempt."""
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
