"""A folder of this machine."""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

from mhla_lightning.data.stores.addresses import check_name
from mhla_lightning.data.stores.base import Store, check_range
from mhla_lightning.errors import DataError

OPEN_FILES = 64


def _open_regular(path: str | Path) -> int:
    """Open a regular file for reading.

    Raises OSError for a pipe or a device, where a plain open would wait for a writer.
    """
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "it is no regular file")
    return number


class _Descriptor:
    """An open file, closed with its last reference.

    So a thread never reads from a descriptor number that was given to another file.
    """

    def __init__(self, path: Path) -> None:
        self.number = _open_regular(path)

    def size(self) -> int:
        # `self` keeps the file open during fstat; another thread could close a bare number.
        return os.fstat(self.number).st_size

    # A default argument, because `os` may be deleted first at the end of the interpreter.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "number"):
            close(self.number)


class LocalStore(Store):
    """A local folder, read with pread; the 64 most recently used files stay open."""

    def __init__(self, folder: str | Path) -> None:
        self.url = str(folder)
        self._folder = Path(folder)
        # Without a lock: single operations of an OrderedDict are atomic, and a lock held during a fork would
        # stay locked in the child.
        self._open_files: OrderedDict[str, _Descriptor] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open_files": OrderedDict()}

    def address(self, name: str) -> str:
        return str(self._folder / name)

    def size(self, name: str) -> int | None:
        path = self._folder / check_name(name)
        try:
            return path.stat().st_size if path.is_file() else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._unreadable(name, error) from error

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        check_range(start, stop)
        try:
            data = self._read(name, start, stop)
            if stop is not None and len(data) < stop - start:
                # The file may have been replaced since it was opened: open it again before reporting a cut.
                self._open_files.pop(name, None)
                data = self._read(name, start, stop)
        except OSError as error:
            raise self._unreadable(name, error) from error
        if stop is not None and len(data) < stop - start:
            end = start + len(data) if data else min(start, self.size(name) or 0)
            raise DataError(
                self.address(name), f"it ends at byte {end}, before byte {stop}: it was cut; copy it again"
            )
        return data

    def read_many(self, requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Read with one system call a request; `read` repeats and reports incomplete ones."""
        held: dict[str, _Descriptor] = {}  # keeps each file open for all its requests
        found = []
        for name, start, stop in requests:
            try:
                if name not in held:
                    held[name] = self._descriptor(name)
                data = os.pread(held[name].number, stop - start, start)
            except OSError:
                data = b""
            found.append(data if len(data) == stop - start else self.read(name, start, stop))
        return found

    def open(self, name: str) -> BufferedReader:
        try:
            return open(self._folder / check_name(name), "rb", opener=lambda path, flags: _open_regular(path))
        except OSError as error:
            raise self._unreadable(name, error) from error

    def hold(self, name: str, size: int) -> bool:
        """Return whether the file exists with `size` bytes, and keep it open.

        So it can be read even when its name is removed afterwards. Raises OSError.
        """
        try:
            if self._descriptor(name).size() == size:
                return True
            self._open_files.pop(name, None)  # it may have been replaced since it was opened
            return self._descriptor(name).size() == size
        except FileNotFoundError:
            return False

    def close(self) -> None:
        self._open_files.clear()

    def _read(self, name: str, start: int, stop: int | None) -> bytes:
        descriptor = self._descriptor(name)
        end = descriptor.size() if stop is None else stop
        pieces, position = [], start
        while position < end:
            piece = os.pread(descriptor.number, end - position, position)  # at most 2 GiB at a time
            if not piece:
                break
            pieces.append(piece)
            position += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _descriptor(self, name: str) -> _Descriptor:
        descriptor = self._open_files.pop(name, None)
        if descriptor is None:
            descriptor = _Descriptor(self._folder / check_name(name))
        self._open_files[name] = descriptor
        while len(self._open_files) > OPEN_FILES:
            self._open_files.popitem(last=False)
        return descriptor

    def _unreadable(self, name: str, error: OSError) -> DataError:
        if isinstance(error, FileNotFoundError):
            return DataError(self.address(name), "the file is missing: copy it again or pack the data again")
        reason = f"it cannot be read ({error.strerror or error}): check the disk and the rights"
        return DataError(self.address(name), reason)
