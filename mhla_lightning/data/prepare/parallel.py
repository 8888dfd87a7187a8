"""Work in several processes: results as they come, errors as they are, and no process that outlives its
parent or is waited for in vain.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from mhla_lightning.errors import UserError

J = TypeVar("J")
R = TypeVar("R")
MOST_WORKERS = 8  # by default; more seldom help, since disks are shared


class Interrupted(UserError):
    """Work stopped for a reason outside the data: what is finished is worth keeping."""


def default_workers() -> int:
    """The number of cores that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores)


def run_jobs(work: Callable[[J], R], jobs: Iterable[J], workers: int) -> Generator[R, None, None]:
    """The results of `work` for every job, in the order in which they are ready; workers=1 works in this
    process.

    Close the iterator (contextlib.closing) when it is left early: that ends the workers. work: a function of
    a module; jobs are taken one by one. Raises the UserError of a worker as it is, any other error as a
    RuntimeError with the worker's traceback, and Interrupted when a worker is gone.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    waiting = iter(jobs)
    head = list(itertools.islice(waiting, workers))  # no more workers than jobs
    if workers == 1 or len(head) < 2:
        yield from map(work, itertools.chain(head, waiting))
        return
    team = [_Worker(work) for _ in head]
    try:
        yield from _share_out(team, itertools.chain(head, waiting))
    finally:
        for worker in team:
            worker.end()


class _Worker:
    """A process that does one job after another. spawned, not forked: torch and the progress bar run
    threads here.
    """

    def __init__(self, work: Callable[[Any], Any]) -> None:
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([work.__module__])  # imported once, not by every worker
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        theirs.close()

    def give(self, job: object) -> None:
        try:
            self.pipe.send(job)
        except OSError as error:
            raise self._gone() from error

    def answer(self) -> Any:
        try:
            error, result = self.pipe.recv()
        except (EOFError, OSError) as gone:
            raise self._gone() from gone
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _gone(self) -> Interrupted:
        self.process.join(5)
        return Interrupted(
            f"a worker process ended unasked (exit code {self.process.exitcode}; -9 is the kernel's "
            "way when memory runs out):"
            " run the same command again, with fewer --workers if memory is short"
        )


def _share_out(team: list[_Worker], jobs: Iterator[Any]) -> Iterator[Any]:
    busy: dict[Any, _Worker] = {}
    for worker, job in zip(team, jobs, strict=False):
        worker.give(job)
        busy[worker.pipe] = worker
    while busy:
        for pipe in wait(list(busy)):
            worker = busy.pop(pipe)
            result = worker.answer()
            for job in itertools.islice(jobs, 1):
                worker.give(job)
                busy[pipe] = worker
            yield result


def _serve(pipe: Connection, work: Callable[[Any], Any]) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole process group; the parent answers it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(_answer(work, job))


def _answer(work: Callable[[Any], Any], job: object) -> tuple[Exception | None, Any]:
    try:
        return None, work(job)
    except UserError as error:
        return error, None
    except Exception:  # noqa: BLE001  whatever it is, the parent raises it
        return RuntimeError(f"in a worker process:\n{traceback.format_exc()}"), None


def _end_with_parent() -> None:
    """A worker whose parent was killed would finish its job, or wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
