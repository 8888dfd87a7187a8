"""SIGTERM and SIGUSR1 ask a run to stop. Standard library only: handlers stand before anything else is
imported.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(BaseException):
    """The run was told to stop and has saved what there was to save. No Exception: libraries must not take
    it for an error of theirs.
    """

    def __init__(self, by: str) -> None:
        super().__init__(by)
        self.by = by


class StopSignals:
    """What has arrived.

    A signal raises Preempted where it arrives: starting takes minutes, and there is nothing to save. Between
    `wait_for_step` and `act_at_once` it is only noted, and whoever trains looks at `received`.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.ignored = False
        self._noted_only = False

    def wait_for_step(self) -> None:
        """From now on signals are noted."""
        self._noted_only = True

    def act_at_once(self) -> None:
        """From now on a signal ends the process again."""
        self._noted_only = False

    def ignore(self) -> None:
        """From now on signals do nothing, until the process ends."""
        self.ignored = True
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of all of them."""
        self.received = signal.Signals(number).name
        if not self._noted_only:
            raise Preempted(self.received)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Installs the handlers; afterwards the signals do what they did before, unless the run was stopped by
    one: then they are ignored until exit.

    Outside the main thread, where Python installs none, signals do what they did.
    """
    signals = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.handle) for number in SIGNALS}
    try:
        yield signals
    except Preempted:
        signals.ignore()
        raise
    finally:
        if not signals.ignored:
            for number, handler in before.items():
                signal.signal(number, handler)
