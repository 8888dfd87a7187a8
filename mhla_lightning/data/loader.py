"""A WebLoader around one of our streams: sized, with short errors and steady workers.

Signals to the whole job do not end the workers.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset

from mhla_lightning.data.stream import Batch
from mhla_lightning.errors import UserError

StartMethod = Literal["fork", "forkserver", "spawn"]


@dataclass(frozen=True)
class Loading:
    """How batches travel from the loader's workers.

    Args:
        prefetch_factor: batches that a worker keeps ready.
        start_method: how workers start: fork, forkserver or spawn; None is Python's default.
        pin_memory: whether batches are copied to page-locked memory; None does so for training on a GPU.
    """

    prefetch_factor: int = 2
    start_method: StartMethod | None = None
    pin_memory: bool | None = None

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        if self.prefetch_factor < 1:
            raise UserError(
                "reading.loading.prefetch_factor",
                f"{self.prefetch_factor} is too small; it must be at least 1",
            )


def build_loader(
    stream: IterableDataset[Batch],
    workers: int,
    loading: Loading | None = None,
    on_gpu: bool = False,
    batches: int | None = None,
) -> wds.WebLoader:
    """Build a loader of ready batches.

    torch itself sets one thread in every worker. Workers live on between passes; `shut_down` ends them.

    Args:
        stream: gives batches to each worker.
        workers: processes; 0 loads in this process.
        loading: see Loading; None takes its defaults.
        on_gpu: whether training runs on a GPU.
        batches: length of a pass; None: the loader has no length and ends with the stream.
    """
    loading = loading or Loading()
    processes = _WorkerProcesses(
        partial(
            DataLoader,
            _ErrorsAsItems(stream),
            batch_size=None,
            num_workers=workers,
            pin_memory=on_gpu if loading.pin_memory is None else loading.pin_memory,
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            prefetch_factor=loading.prefetch_factor if workers else None,
            multiprocessing_context=loading.start_method if workers else None,
        )
    )
    loader = _Loader(processes).map(_raise_error)
    return loader if batches is None else loader.with_epoch(batches).with_length(batches, silent=True)


def shut_down(loader: wds.WebLoader) -> None:
    """End the workers of a loader.

    They ignore the SIGTERM by which Python ends its children at exit, so somebody must end them.
    """
    loader.stage(0).shut_down()


def ignore_signals(worker: int) -> None:
    """Ignore signals to the whole job (SLURM's warning, Ctrl-C), which the main process answers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _start_worker(worker: int) -> None:
    """Initialise a worker.

    A spawned worker that ends in the middle of a stream sometimes aborts: torch's sending thread outlives
    the interpreter. The main process then reports a crash. So the worker leaves without closing the
    interpreter, as a forked worker always does.
    """
    ignore_signals(worker)
    atexit.register(os._exit, 0)


class _WorkerProcesses:
    """The first stage of a WebLoader: a DataLoader whose workers can be ended.

    Calling it starts an iteration.
    """

    _alive: weakref.WeakSet[_WorkerProcesses] = weakref.WeakSet()

    def __init__(self, build: Callable[[], DataLoader]) -> None:
        self._build = build
        self._loader: DataLoader | None = None
        self._iterator: Any = None
        self._workers: list[BaseProcess] = []
        self._alive.add(self)

    def __call__(self) -> Iterator[Any]:
        if self._loader is None:
            self._loader = self._build()
        before = multiprocessing.active_children()
        self._iterator = iter(self._loader)  # starts the workers, the first time
        self._workers += [child for child in multiprocessing.active_children() if child not in before]
        return self._iterator

    def __del__(self) -> None:
        """End the workers of a loader that nobody holds; the exit would wait for them forever."""
        self.shut_down()

    def shut_down(self) -> None:
        """End the workers; the next call starts others."""
        iterator, workers, self._workers = self._iterator, self._workers, []
        self._loader = self._iterator = None
        if workers:
            # Private in torch 2.14: it has no public way to end workers. Releasing the iterator does it only
            # when no traceback holds it. tests/private_api names it.
            iterator._shutdown_workers()
        for worker in workers:
            # Only a worker that hangs is still alive: it ignores torch's SIGTERM, and exit would wait for it.
            worker.kill()

    @classmethod
    def shut_down_all(cls) -> None:
        """End the workers of all loaders of this process."""
        for processes in list(cls._alive):
            processes.shut_down()


# This runs before multiprocessing's own exit, which would wait forever for workers that ignore SIGTERM.
atexit.register(_WorkerProcesses.shut_down_all)


class _Loader(wds.WebLoader):
    """A WebLoader over a given first stage, without a DataLoader of its own."""

    def __init__(self, processes: _WorkerProcesses) -> None:
        wds.DataPipeline.__init__(self, processes)


@dataclass
class _ErrorsAsItems(IterableDataset[Batch | UserError]):
    """A stream that passes a UserError on as its last item.

    A DataLoader would put the worker's whole traceback into the message.
    """

    stream: IterableDataset[Batch]

    def __iter__(self) -> Iterator[Batch | UserError]:
        try:
            yield from self.stream
        except UserError as error:
            yield error


def _raise_error(item: Batch | UserError) -> Batch:
    if isinstance(item, UserError):
        raise item
    return item
