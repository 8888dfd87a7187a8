"""A folder behind http(s), s3 or gs: bounded requests, retried, in ranges."""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from mhla_lightning.data.stores.addresses import Address, check_name, parse
from mhla_lightning.data.stores.base import COPY_BYTES, Sink, Store, check_range
from mhla_lightning.data.stores.clients import NO_RANGES, HttpClient, RemoteClient, failure
from mhla_lightning.data.stores.io_thread import Connection
from mhla_lightning.data.stores.objects import gs_client, s3_client
from mhla_lightning.data.stores.retry import Failure, NoRanges, retrying
from mhla_lightning.data.stores.settings import Remote
from mhla_lightning.errors import DataError, UserError

T = TypeVar("T")
PARALLEL = 8
BLOCK = COPY_BYTES  # the most one request asks for, so that the timeout means the same for every read
CLIENTS: dict[str, Callable[[Address, Remote], RemoteClient]] = {
    "http": HttpClient,
    "https": HttpClient,
    "s3": s3_client,
    "gs": gs_client,
}


class RemoteStore(Store):
    """A remote folder, with one connection for each process, also after a fork."""

    def __init__(self, url: str, options: Remote) -> None:
        self._address = parse(url)
        if self._address.protocol not in CLIENTS:
            raise UserError(
                url, f"it is no remote folder; a RemoteStore reads {', '.join(f'{p}://' for p in CLIENTS)}"
            )
        self._options = options
        self.url = self._address.shown()
        # By process id. There is no lock: one held during a fork would stay locked in the child.
        self._connections: dict[int, Connection] = {}
        self._new_client()  # so that a missing package or credentials fail here, not in the first worker

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connections": {}}

    def address(self, name: str) -> str:
        return self._address.shown(name)

    def size(self, name: str) -> int | None:
        check_name(name)
        return self._retrying(name, lambda: self._run(self._client().size(name)))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        check_name(name)
        check_range(start, stop)
        if stop is None and start == 0 and isinstance(self._client(), HttpClient):
            return self._retrying(name, lambda: b"".join(self._whole(name)))
        if stop is None:
            stop = self._known_size(name)
        blocks = [self._block(name, first, min(stop, first + BLOCK)) for first in range(start, stop, BLOCK)]
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def read_many(self, requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Do Store.read_many, eight requests at a time."""
        if len(requests) < 2:
            return super().read_many(requests)
        self._connection()  # before the threads: they would each make one
        with ThreadPoolExecutor(min(PARALLEL, len(requests)), "mhla-store-read") as pool:
            return list(pool.map(lambda request: self.read(*request), requests))

    def open(self, name: str) -> io.BufferedReader:
        """Open a buffered file that reads ranges, with this store's retries and errors."""
        raw = _RangeFile(self, check_name(name), self._known_size(name))
        return io.BufferedReader(raw, BLOCK)

    def copy(self, name: str, size: int, sink: Sink) -> None:
        """Do Store.copy, eight ranges at a time.

        A server without ranges gets one request for the whole file, repeated after each failure.
        """
        pieces = [(name, start, min(size, start + COPY_BYTES)) for start in range(0, size, COPY_BYTES)]
        try:
            for first in range(0, len(pieces), PARALLEL):
                for data in self.read_many(pieces[first : first + PARALLEL]):
                    sink.write(data)
        except NoRanges:
            self._retrying(name, lambda: self._copy_whole(name, size, sink))

    def close(self) -> None:
        connection = self._connections.pop(os.getpid(), None)
        if connection is not None:
            connection.close()

    def _copy_whole(self, name: str, size: int, sink: Sink) -> None:
        sink.restart()
        rest = size
        for data in self._whole(name):
            rest -= len(data)
            if rest < 0:  # an endless answer must not fill the disk
                raise Failure(f"long answer: more than {size} bytes")
            sink.write(data)

    def _whole(self, name: str) -> Iterator[bytes]:
        """Yield a file's bytes by one request. Raises Failure.

        No pause may exceed the timeout.
        """
        client = cast(HttpClient, self._client())
        answer = self._run(client.begin(name))
        try:
            while data := self._run(client.piece(answer)):
                yield data
        finally:
            self._run(_call(answer.close))

    def _block(self, name: str, start: int, stop: int) -> bytes:
        try:
            return self._retrying(name, lambda: self._run(self._client().read(name, start, stop)))
        except DataError as error:
            if isinstance(error.__cause__, Failure) and error.__cause__.what == NO_RANGES:
                advice = "set `data.reading.remote.cache_dir` so that shards are downloaded whole"
                raise NoRanges(
                    self.address(name), f"it cannot be read in parts: {NO_RANGES}; {advice}"
                ) from error
            raise

    def _known_size(self, name: str) -> int:
        size = self.size(name)
        if size is None:
            raise DataError(
                self.address(name), "the file is missing: check the address or copy the file there"
            )
        return size

    def _connection(self) -> Connection:
        process = os.getpid()
        connection = self._connections.get(process)
        if connection is None:
            made = Connection(self._new_client())
            connection = self._connections.setdefault(process, made)
            if connection is not made:
                made.close()
            else:
                weakref.finalize(self, made.close)
        return connection

    def _new_client(self) -> RemoteClient:
        return CLIENTS[self._address.protocol](self._address, self._options)

    def _client(self) -> RemoteClient:
        return cast(RemoteClient, self._connection().client)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._connection().run(work, self._options.timeout)
        except TimeoutError as error:
            raise failure(error, self._options.timeout) from error

    def _retrying(self, name: str, attempt: Callable[[], T]) -> T:
        return retrying(attempt, self.address(name), self._options)


async def _call(function: Callable[[], object]) -> None:
    function()


class _RangeFile(io.RawIOBase):
    """A remote file as a raw stream; in a BufferedReader it requests whole blocks."""

    def __init__(self, store: RemoteStore, name: str, size: int) -> None:
        super().__init__()
        self._store, self.name, self._size, self._position = store, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise ValueError(f"{self._store.address(self.name)} has no byte {origin + offset}")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._size, self._position + len(buffer))
        data = self._store.read(self.name, self._position, stop) if stop > self._position else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
