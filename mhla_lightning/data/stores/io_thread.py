"""An event loop on its own thread, for one client in one process.

fsspec's own loop is not used. A forked child inherits the loop's epoll descriptor, so closing an inherited
session there takes the sockets out of the parent's poll set. fsspec closes sessions from finalizers, which
run wherever garbage is collected. Here the process that made a connection closes it, on its own loop. Any
other process keeps it, untouched, until it ends.

A thread that has used OpenSSL takes a lock of OpenSSL when it ends. A process that forks at that moment gives
its child a lock that is held forever, and the child hangs at its first TLS context. So close() returns only
after its threads have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
_GRACE = 5.0  # seconds for a loop to notice its own timeout, or to close its sockets


class Client(Protocol):
    """A client with sockets, used and closed on the connection's loop only."""

    async def close(self) -> None: ...


# Protects inherited connections from garbage collection in a forked child.
_ALIVE: set[Connection] = set()


class Connection:
    """A client, its loop and the loop's thread, a daemon for which no process waits at its end."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._helpers: list[threading.Thread] = []  # the loop resolves names and makes TLS contexts in them
        self._loop.set_default_executor(
            ThreadPoolExecutor(4, "mhla-store-help", lambda: self._helpers.append(threading.current_thread()))
        )
        self._thread = threading.Thread(target=self._serve, name="mhla-store-io", daemon=True)
        self._thread.start()
        _ALIVE.add(self)

    def run(self, work: Coroutine[Any, Any, T], timeout: float) -> T:
        """Return the result of `work`, or raise its exception.

        Raises TimeoutError after `timeout` seconds, a few later when the loop itself hangs.
        """
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout), self._loop)
        try:
            return future.result(timeout + _GRACE)
        finally:
            future.cancel()  # ends the request when this thread was interrupted; a result stays

    def close(self) -> None:
        """Close the client and end the loop; do nothing in a process that inherited them."""
        if os.getpid() != self.process or self not in _ALIVE:
            return
        _ALIVE.discard(self)
        self._loop.call_soon_threadsafe(self._loop.stop)
        # Garbage may be collected on the loop's own thread, which cannot join itself.
        if threading.current_thread() is not self._thread:
            for thread in (self._thread, *self._helpers):
                _join(thread, 2 * _GRACE)

    def _serve(self) -> None:
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        try:
            # A connection that cannot be closed in order is closed with its socket.
            with contextlib.suppress(OSError, TimeoutError):
                self._loop.run_until_complete(asyncio.wait_for(self.client.close(), _GRACE))
            self._loop.run_until_complete(asyncio.sleep(0))  # transports report their end on the next turn
        finally:
            self._loop.close()


def _join(thread: threading.Thread, timeout: float) -> None:
    """Wait until a thread has ended, also for the operating system (checked on Linux only)."""
    until = time.monotonic() + timeout
    thread.join(timeout)
    while os.path.exists(f"/proc/self/task/{thread.native_id}") and time.monotonic() < until:
        time.sleep(0.0005)
