"""An event loop on a thread of its own, for one client in one process.

fsspec's own loop is not used: a forked child inherits the loop's epoll descriptor, so that closing an
inherited session there takes the sockets out of the parent's poll set, and fsspec closes sessions from
finalizers that run wherever garbage is collected. Here a connection is closed by the process that made it, on
its own loop; any other process keeps it, untouched, for as long as it lives.

A thread that has used OpenSSL takes a lock of OpenSSL's when it ends. A process that forks at that moment
gives its child the lock for ever held, and the child stands still at its first TLS context: so close()
returns when its threads are really gone.
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
_GRACE = 5.0  # seconds that a loop gets to notice its own timeout, or to close its sockets


class Client(Protocol):
    """Something with sockets. It is used and closed on the connection's loop only."""

    async def close(self) -> None: ...


_ALIVE: set[Connection] = set()  # keeps inherited connections from being collected in a forked child


class Connection:
    """A client, its loop and the loop's thread (a daemon: a process that ends does not wait for it)."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._helpers: list[
            threading.Thread
        ] = []  # of the loop, which looks names up and makes TLS contexts in them
        self._loop.set_default_executor(
            ThreadPoolExecutor(4, "mhla-store-help", lambda: self._helpers.append(threading.current_thread()))
        )
        self._thread = threading.Thread(target=self._serve, name="mhla-store-io", daemon=True)
        self._thread.start()
        _ALIVE.add(self)

    def run(self, work: Coroutine[Any, Any, T], timeout: float) -> T:
        """The result of `work`, or its exception. Raises TimeoutError after `timeout` seconds, a few later
        when the loop itself is stuck.
        """
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout), self._loop)
        try:
            return future.result(timeout + _GRACE)
        finally:
            future.cancel()  # does nothing to a result; ends the request when this thread was interrupted

    def close(self) -> None:
        """Close the client and end the loop; nothing in a process that inherited them."""
        if os.getpid() != self.process or self not in _ALIVE:
            return
        _ALIVE.discard(self)
        self._loop.call_soon_threadsafe(self._loop.stop)
        if (
            threading.current_thread() is not self._thread
        ):  # garbage may be collected on the loop's own thread
            for thread in (self._thread, *self._helpers):
                _join(thread, 2 * _GRACE)

    def _serve(self) -> None:
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        try:
            with contextlib.suppress(
                OSError, TimeoutError
            ):  # what cannot be closed in good order is closed with its socket
                self._loop.run_until_complete(asyncio.wait_for(self.client.close(), _GRACE))
            self._loop.run_until_complete(asyncio.sleep(0))  # transports report their end on the next turn
        finally:
            self._loop.close()


def _join(thread: threading.Thread, timeout: float) -> None:
    """Wait for the end of a thread, and then of what the system still does for it (seen on Linux only)."""
    until = time.monotonic() + timeout
    thread.join(timeout)
    while os.path.exists(f"/proc/self/task/{thread.native_id}") and time.monotonic() < until:
        time.sleep(0.0005)
