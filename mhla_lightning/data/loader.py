"""A webdataset WebLoader around one of our streams: sized, with errors as one sentence, and with workers that a signal to the job does not kill."""

from __future__ import annotations

import atexit
import os
import signal
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset

from mhla_lightning.data.stream import Batch
from mhla_lightning.errors import UserError

StartMethod = Literal["fork", "forkserver", "spawn"]
_started: weakref.WeakSet[DataLoader] = weakref.WeakSet()


@dataclass(frozen=True)
class LoaderOptions:
    """How batches travel. workers: processes (0: this one). prefetch: batches each worker keeps ready. start_method: None is Python's default."""

    workers: int
    prefetch: int = 2
    pin_memory: bool = False
    start_method: StartMethod | None = None


def build_loader(stream: IterableDataset[Batch], options: LoaderOptions, batches: int | None = None) -> wds.WebLoader:
    """A loader of ready batches. batches: its length, after which it ends; None: no length, it ends when the stream does.

    torch itself sets one thread in every worker. Workers stay alive between passes; shut_down ends them.
    """
    loader = wds.WebLoader(
        _ErrorsAsItems(stream),
        batch_size=None,
        num_workers=options.workers,
        pin_memory=options.pin_memory,
        worker_init_fn=_start_worker,
        persistent_workers=options.workers > 0,
        prefetch_factor=options.prefetch if options.workers else None,
        multiprocessing_context=options.start_method if options.workers else None,
    )
    _started.add(loader.stage(0))
    loader = loader.map(_raise_error)
    return loader if batches is None else loader.with_epoch(batches).with_length(batches, silent=True)


def shut_down(loader: wds.WebLoader) -> None:
    """End the workers of a loader. Needed, because they ignore the SIGTERM by which Python ends them at exit."""
    _end_workers(loader.stage(0))


def ignore_signals(worker: int) -> None:
    """A signal to the whole job (SLURM's warning, Ctrl-C) is the main process's to answer."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _start_worker(worker: int) -> None:
    """Worker initialisation. A spawned worker that is ended in mid-stream aborts now and then (torch's sending thread outlives the interpreter), and
    the main process takes that for a crash: so it leaves without tearing the interpreter down, as a forked one always does.
    """
    ignore_signals(worker)
    atexit.register(os._exit, 0)


def _end_workers(loader: DataLoader) -> None:
    """torch has no public way to do it; this is what Lightning's CombinedLoader.reset does to a bare DataLoader."""
    iterator, loader._iterator = loader._iterator, None
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):  # the iterator without worker processes has none
        iterator._shutdown_workers()


@atexit.register  # runs before multiprocessing's own exit, which would wait for ever for workers that ignore SIGTERM
def _end_all_workers() -> None:
    for loader in list(_started):
        _end_workers(loader)


@dataclass
class _ErrorsAsItems(IterableDataset[Batch | UserError]):
    """Hands a UserError on as the last item: a DataLoader would put the worker's whole traceback into the message."""

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
