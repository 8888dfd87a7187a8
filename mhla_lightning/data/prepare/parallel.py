"""Jobs in several processes, whose results come as they are ready.

`concurrent.futures` runs them. A thread in each worker adds two promises that it does not make. The workers
end at once when the caller stops early, and when the calling process is killed.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from mhla_lightning.errors import UserError

J = TypeVar("J")
R = TypeVar("R")
_MOST_AT_ALL = 1024
MOST_WORKERS = 8  # by default: more processes seldom help, since they share the disk


class Interrupted(UserError):
    """The work stopped for a reason outside the data; what is finished is worth keeping."""


def default_workers() -> int:
    """Return the number of cores that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores)


def check_workers(workers: int) -> None:
    """Raise UserError for fewer than one process, or for more than a machine can start."""
    if not 1 <= workers <= _MOST_AT_ALL:
        raise UserError("workers", f"is {workers}; it must be at least 1 and at most {_MOST_AT_ALL}")


def run_jobs(work: Callable[[J], R], jobs: Iterable[J], workers: int) -> Generator[R, None, None]:
    """Yield the result of `work` for every job, in the order in which the results are ready.

    Close the iterator (contextlib.closing) to stop early: that ends the workers, also in the middle of a job.

    Args:
        work: a function of a module, so that it can be pickled.
        jobs: taken one by one, as workers become free.
        workers: processes; 1 works in this process.

    Raises:
        UserError: `work` raised it in a worker, or `workers` is below 1.
        RuntimeError: any other error of a worker, with the worker's traceback.
        Interrupted: a worker process ended by itself.
    """
    check_workers(workers)
    waiting = iter(jobs)
    head = list(itertools.islice(waiting, workers))  # no more workers than jobs
    if workers == 1 or len(head) < 2:
        yield from map(work, itertools.chain(head, waiting))
        return
    context = _context(work.__module__)
    stop, stopper = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(len(head), context, initializer=_watch, initargs=(stop,))
    try:
        # One job a worker: a queue of the pool's own would take all jobs at once.
        running: set[Future[R]] = {pool.submit(partial(_answer, work), job) for job in head}
        while running:
            done, running = wait_for(running, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                running |= {pool.submit(partial(_answer, work), job) for job in itertools.islice(waiting, 1)}
                yield result
    except BrokenProcessPool as error:
        raise Interrupted(
            "workers",
            "a worker process ended by itself, perhaps killed because memory ran out; run the same command "
            "again, with fewer workers if memory is short",
        ) from error
    finally:
        stopper.close()  # the end of the pipe is what _watch waits for
        pool.shutdown(cancel_futures=True)
        stop.close()


def _context(module: str) -> multiprocessing.context.BaseContext:
    """Return a way to start processes without a fork.

    Torch and the progress bar run threads in this process, and a fork would copy their locks.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([module])  # imported once, not by every worker
    return context


def _watch(stop: Connection) -> None:
    """Prepare a worker process: it leaves Ctrl-C to its parent and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group
    threading.Thread(target=_end_when_told, args=(stop,), daemon=True).start()


def _end_when_told(stop: Connection) -> None:
    """End the process when `stop` is closed at its other end, or the parent is gone."""
    parent = multiprocessing.parent_process()
    wait([stop] if parent is None else [stop, parent.sentinel])
    os._exit(1)


def _answer(work: Callable[[J], R], job: J) -> R:
    try:
        return work(job)
    except UserError:
        raise
    except Exception:  # noqa: BLE001  another error might not survive pickling, which would break the pool
        raise RuntimeError(f"in a worker process:\n{traceback.format_exc()}") from None
