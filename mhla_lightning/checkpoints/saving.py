"""The files of a checkpoint that this rank writes, at once or in a thread."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mhla_lightning.checkpoints.atomic import sync
from mhla_lightning.runs.disk_errors import complaint

_POLL = 0.05  # seconds


@dataclass
class Parts:
    """The files of one rank.

    Attributes:
        folder: the unfinished checkpoint folder, which all ranks write into.
        rank: of this process.
        files: path -> the function that writes it.
        bytes: of the tensors in all files.
    """

    folder: Path
    rank: int
    files: dict[Path, Callable[[], None]] = field(default_factory=dict)
    bytes: int = 0

    def add(self, name: str, size: int, write: Callable[[Path], None]) -> None:
        """Add a file.

        Args:
            name: path in the folder.
            size: bytes of its tensors.
            write: called with the path.
        """
        path = self.folder / name
        self.files[path] = lambda: write(path)
        self.bytes += size

    def write(self) -> None:
        """Write all files and return when they are on disk. Raises OSError."""
        for path, write in self.files.items():
            path.parent.mkdir(exist_ok=True)
            write()
            sync(path)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in nested dicts, lists and tuples."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict | list | tuple):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors_in(value)


def tensor_bytes(values: Any) -> int:
    """Return the bytes of all tensors in nested containers."""
    return sum(tensor.nbytes for tensor in tensors_in(values))


def copied(values: Any) -> Any:
    """Return the same containers with copies of their tensors in the host's memory.

    Training may change its own tensors meanwhile.
    """
    if isinstance(values, torch.Tensor):
        return values.detach().to("cpu", copy=True)
    if isinstance(values, dict):
        twin = copy.copy(values)
        twin.update({key: copied(value) for key, value in values.items()})
        return twin
    if isinstance(values, list | tuple):
        return type(values)(copied(value) for value in values)
    return values


class Writer:
    """Writes one checkpoint in a thread beside the training.

    The ranks' threads tell each other by files that they have written: a collective in a thread could meet
    one of the training.

    Args:
        parts: the files of this rank.
        world_size: ranks of the run.
        finish: called by rank 0 once every rank has written.

    Attributes:
        error: the problem of this rank; None without one.
    """

    def __init__(self, parts: Parts, world_size: int, finish: Callable[[], None]) -> None:
        self._parts, self._world_size, self._finish = parts, world_size, finish
        self.error: str | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        mark, text = self._mark(self._parts.rank), ""
        try:
            self._parts.write()
        except (OSError, RuntimeError) as error:
            text = self.error = complaint(error, self._parts.folder.parent)
        try:
            mark.with_suffix(".part").write_text(text)
            mark.with_suffix(".part").rename(mark)
            if self._parts.rank == 0 and self.error is None:
                self._wait_for_all()
        except OSError as error:
            self.error = self.error or complaint(error, self._parts.folder.parent)

    def _wait_for_all(self) -> None:
        marks = [self._mark(rank) for rank in range(self._world_size)]
        while not all(mark.exists() for mark in marks):
            time.sleep(_POLL)
        self.error = next((text for mark in marks if (text := mark.read_text())), None)
        if self.error is None:
            for mark in marks:
                mark.unlink()
            self._finish()

    def _mark(self, rank: int) -> Path:
        return self._parts.folder / f".written-{rank}"

    def wait(self, seconds: float | None = None) -> str | None:
        """Wait until the checkpoint is written, and return this rank's error; None without one.

        Args:
            seconds: to wait at most; None waits until the end.
        """
        self._thread.join(seconds)
        return self.error
