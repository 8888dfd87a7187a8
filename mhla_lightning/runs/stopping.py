"""SIGTERM and SIGUSR1 ask a run to stop.

Standard library only: the handlers are installed before anything else is imported.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(BaseException):
    """The run was asked to stop and has saved its state.

    It is no Exception, because libraries catch those.

    Args:
        by: the signal, or another reason in words.
    """

    def __init__(self, by: str) -> None:
        super().__init__(by)
        self.by = by


class StopSignals:
    """The signals that have arrived.

    While a run starts, a signal raises Preempted at once: there is nothing to save yet. Between
    `wait_for_step` and `act_at_once` it is only noted, and a callback looks at `received` after every step.

    Attributes:
        received: name of the last signal; None before the first.
        ignored: signals have no effect any more.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.ignored = False
        self._noted_only = False

    def wait_for_step(self) -> None:
        """Note signals from now on."""
        self._noted_only = True

    def act_at_once(self) -> None:
        """Let a signal end the process again."""
        self._noted_only = False

    def ignore(self) -> None:
        """Ignore signals until the process ends."""
        self.ignored = True
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.received = signal.Signals(number).name
        if not self._noted_only:
            raise Preempted(self.received)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Install the handlers, and the earlier ones again afterwards.

    After a stop by a signal, further signals are ignored until the process ends. Outside the main thread
    nothing is installed: Python allows no handlers there.
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
