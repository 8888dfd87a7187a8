"""The interface of every store: one folder of files, local or remote."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from io import BufferedReader
from typing import Protocol

COPY_BYTES = 8 * 2**20  # one piece of a copy; remote stores request several at a time


class Sink(Protocol):
    """The target of a copy: takes pieces in order, from the beginning again after restart()."""

    def write(self, data: bytes) -> object: ...

    def restart(self) -> object: ...


class Store(ABC):
    """One folder of files, local or remote.

    A store is picklable: spawned workers get a copy, without open handles. It is usable after a fork: handles
    and connections belong to a process. Names are plain relative names; others raise UserError. A file that
    cannot be read raises DataError with a remedy.
    """

    url: str  # the folder as the user wrote it, without credentials and query: for messages

    @abstractmethod
    def address(self, name: str) -> str:
        """Return the path or URL of a file for messages, without credentials and query."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None when there is no such file."""

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read exactly the bytes [start, stop) of a file; stop None reads to its end.

        Raises DataError for a file that ends before `stop`.
        """

    @abstractmethod
    def open(self, name: str) -> BufferedReader:
        """Open a seekable BinaryIO for one pass, by tarfile or for hashing."""

    def read_many(self, requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Read every (name, start, stop), and return the results in order."""
        return [self.read(name, start, stop) for name, start, stop in requests]

    def copy(self, name: str, size: int, sink: Sink) -> None:
        """Write the first `size` bytes of a file into `sink`, piece by piece.

        Errors of the sink pass through.
        """
        for start in range(0, size, COPY_BYTES):
            sink.write(self.read(name, start, min(size, start + COPY_BYTES)))

    def close(self) -> None:  # noqa: B027  a store without handles has nothing to do
        """Release handles and connections; a later use makes new ones."""


def check_range(start: int, stop: int | None) -> None:
    """Raise ValueError for an impossible range: a mistake in code, not in data."""
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"bytes [{start}, {stop}) are no range")
