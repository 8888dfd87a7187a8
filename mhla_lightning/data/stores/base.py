"""What every store can do: one folder of files, wherever it lies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from io import BufferedReader
from typing import Protocol

COPY_BYTES = 8 * 2**20  # one piece of a copy; remote stores ask for several at a time


class Sink(Protocol):
    """Where a copy goes: pieces in order, or from the beginning again after restart()."""

    def write(self, data: bytes) -> object: ...

    def restart(self) -> object: ...


class Store(ABC):
    """One folder of files, local or remote.

    Picklable (workers that are spawned get a copy, without open handles) and usable after a fork (handles and
    connections belong to a process). Names are plain relative names; others raise UserError. What cannot be
    read raises DataError, one sentence that names the file and what to do.
    """

    url: str  # the folder as the user wrote it, without credentials and query: for messages

    @abstractmethod
    def address(self, name: str) -> str:
        """What a message calls a file: its path or url, without credentials and query."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None when there is no such file."""

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Exactly the bytes [start, stop) of a file; stop None: to its end. A file that ends before `stop`
        raises DataError.
        """

    @abstractmethod
    def open(self, name: str) -> BufferedReader:
        """A seekable BinaryIO for one pass, by tarfile or for hashing."""

    def read_many(self, requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """One read for every (name, start, stop), results in that order."""
        return [self.read(name, start, stop) for name, start, stop in requests]

    def copy(self, name: str, size: int, sink: Sink) -> None:
        """Write the first `size` bytes of a file into `sink`, piece by piece. An error of the sink passes
        through.
        """
        for start in range(0, size, COPY_BYTES):
            sink.write(self.read(name, start, min(size, start + COPY_BYTES)))

    def close(self) -> None:  # noqa: B027  a store without handles has nothing to do
        """Let go of handles and connections. The store may be used again: they are made anew."""


def check_range(start: int, stop: int | None) -> None:
    """Raise ValueError for a range that no caller means: a mistake in code, not in data."""
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"bytes [{start}, {stop}) are no range")
