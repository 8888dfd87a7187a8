"""One checkpoint in the making: what this rank writes, now or in a thread beside the training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from mhla_lightning.checkpoints.atomic import sync
from mhla_lightning.weights.disk_errors import complaint

_POLL = 0.05  # seconds


@dataclass
class Parts:
    """The files of one rank.

    Attributes:
        folder: the unfinished checkpoint folder, which all ranks write into.
        rank: of this process.
        files: path -> what writes it.
        bytes: of the tensors in them.
    """

    folder: Path
    rank: int
    files: dict[Path, Callable[[], None]] = field(default_factory=dict)
    bytes: int = 0

    def add(self, name: str, size: int, write: Callable[[Path], None]) -> None:
        """A file of the folder, and the bytes of the tensors that `write` writes into it."""
        path = self.folder / name
        self.files[path] = lambda: write(path)
        self.bytes += size

    def write(self) -> None:
        """Writes all files and has them on disk. Raises OSError."""
        for path, write in self.files.items():
            path.parent.mkdir(exist_ok=True)
            write()
            sync(path)


def tensor_bytes(values: Any) -> int:
    """Bytes of all tensors in nested containers."""
    return sum(value.nbytes for value in tree_leaves(values) if isinstance(value, torch.Tensor))


def copied(values: Any) -> Any:
    """The same containers with copies of their tensors in the host's memory: training may change its own
    meanwhile.
    """
    return tree_map(
        lambda value: value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value,
        values,
    )


class Writer:
    """Writes one checkpoint at a time beside the training. Threads speak through files: a collective in a
    thread could meet one of the training.

    Args:
        finish: what rank 0 calls once every rank has written.
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
        """Until the checkpoint is there, or no longer than so many seconds; returns what went wrong on
        this rank.
        """
        self._thread.join(seconds)
        return self.error
