"""A webdataset WebLoader around one of our streams: sized, with errors as one sentence, and with workers
that a signal to the job does not kill.
"""

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
class Loading:
    """How batches travel from the loader's workers.

    Args:
        prefetch_factor: batches that a worker keeps ready.
        start_method: how workers start: fork, forkserver or spawn; None is Python's default.
        pin_memory: copy batches to page-locked memory; None does so where training runs on a GPU.
    """

    prefetch_factor: int = 2
    start_method: StartMethod | None = None
    pin_memory: bool | None = None

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        if self.prefetch_factor < 1:
            raise UserError(f"data.loading.prefetch_factor is {self.prefetch_factor}; it must be at least 1")


def build_loader(
    stream: IterableDataset[Batch],
    workers: int,
    loading: Loading | None = None,
    on_gpu: bool = False,
    batches: int | None = None,
) -> wds.WebLoader:
    """A loader of ready batches.

    workers: processes; 0 is this one. on_gpu: whether training runs on one. batches: its length, after which
        it ends; None: no length, it ends when
    the stream does.

    torch itself sets one thread in every worker. Workers stay alive between passes; shut_down ends them.
    """
    loading = loading or Loading()
    loader = wds.WebLoader(
        _ErrorsAsItems(stream),
        batch_size=None,
        num_workers=workers,
        pin_memory=on_gpu if loading.pin_memory is None else loading.pin_memory,
        worker_init_fn=_start_worker,
        persistent_workers=workers > 0,
        prefetch_factor=loading.prefetch_factor if workers else None,
        multiprocessing_context=loading.start_method if workers else None,
    )
    _started.add(loader.stage(0))
    loader = loader.map(_raise_error)
    return loader if batches is None else loader.with_epoch(batches).with_length(batches, silent=True)


def shut_down(loader: wds.WebLoader) -> None:
    """End the workers of a loader. Needed, because they ignore the SIGTERM by which Python ends them at
    exit.
    """
    _end_workers(loader.stage(0))


def ignore_signals(worker: int) -> None:
    """A signal to the whole job (SLURM's warning, Ctrl-C) is the main process's to answer."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _start_worker(worker: int) -> None:
    """Worker initialisation. A spawned worker that is ended in mid-stream aborts now and then (torch's
    sending thread outlives the interpreter), and
    the main process takes that for a crash: so it leaves without tearing the interpreter down, as a forked
        one always does.
    """
    ignore_signals(worker)
    atexit.register(os._exit, 0)


def _end_workers(loader: DataLoader) -> None:
    """torch has no public way to do it; this is what Lightning's CombinedLoader.reset does to a bare
    DataLoader.
    """
    iterator, loader._iterator = loader._iterator, None
    if iterator is not None and hasattr(
        iterator, "_shutdown_workers"
    ):  # the iterator without worker processes has none
        iterator._shutdown_workers()
        for worker in getattr(iterator, "_workers", ()):
            # only does something to one that hangs: torch sends it a SIGTERM, which it ignores, and exit
            # would wait for it
            worker.kill()


# runs before multiprocessing's own exit, which would wait for ever for workers that ignore SIGTERM
@atexit.register
def _end_all_workers() -> None:
    for loader in list(_started):
        _end_workers(loader)


@dataclass
class _ErrorsAsItems(IterableDataset[Batch | UserError]):
    """Hands a UserError on as the last item: a DataLoader would put the worker's whole traceback into the
    message.
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
