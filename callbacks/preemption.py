"""Preemption: a run that gets a signal saves at the next step and ends with exit code 75."""

from __future__ import annotations

import os
import time
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from mhla_lightning.callbacks.checkpoint import Checkpoint
from mhla_lightning.callbacks.steps import AfterStep
from mhla_lightning.runs.stopping import Preempted, StopSignals
from mhla_lightning.strategies.launcher import watch_of

JOB_END = "MHLA_JOB_END"  # seconds since 1970; the batch script sets it
_RESERVE = 15.0  # seconds


class Preemption(AfterStep):
    """Saves and stops all ranks at the same step.

    The reason is SIGUSR1 or SIGTERM to one of the ranks, or the end of the job's time or of
    `trainer.max_time`.

    Lightning's own handlers save or broadcast inside the signal handler. With 20 ms between the ranks'
    signals they meet different collectives (Lightning issue 21406), so they are switched off
    (`leave_signals_alone`). Here a signal only sets a flag. An all-reduce of one number on the CPU combines
    the flags; it begins at the start of a step and is awaited at its end. No GPU waits for it, and all ranks
    decide alike.

    A step that was left out is not saved; the next one that is taken is then the last. The checkpoint is
    written by the usual callback: after a validation that is due, and with metrics logged as in any step.

    Lightning's Timer, which `max_time` is elsewhere, stops in the middle of an accumulation and adds a
    validation. It counts the time of earlier starts, so that a resumed run would stop at once.

    Args:
        checkpoint: the callback that saves.
        signals: the signals that have arrived in this process.
        max_time: seconds of training in this start; the first step after them is the last.

    Attributes:
        stopping: whether this step is the last.

    Raises:
        Preempted: from the training, in every rank, when everything is saved.
    """

    def __init__(self, checkpoint: Checkpoint, signals: StopSignals, max_time: float = float("inf")) -> None:
        super().__init__()
        self.checkpoint, self.signals, self.max_time = checkpoint, signals, max_time
        self._deadline = float("inf")
        self.stopping = False
        self.clock = JobClock(float(os.environ.get(JOB_END) or "inf"))
        self._group: Any = None
        self._vote: torch.Tensor | None = None
        self._work: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.world_size > 1 and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        if (watch := watch_of(trainer)) is not None:
            watch.training = True
        self._begin_vote()
        if self._agreed():  # a signal came during the start: there is nothing new to save
            self._stop(trainer)
        self._deadline = time.monotonic() + self.max_time  # from here on: every start takes a step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.stopping:
            self._stop(trainer)
        if self._vote is None:
            self._begin_vote()

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.clock.step()
        if self._agreed():
            self.stopping = True
            self.checkpoint.save_after_this_step()

    def _begin_vote(self) -> None:
        self._vote = torch.tensor([int(self._reason() is not None)])
        if self._group is not None:
            self._work = dist.all_reduce(self._vote, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _reason(self) -> str | None:
        """Why this rank wants to stop; None where it does not."""
        if self.signals.received is not None:
            return self.signals.received
        if self.clock.is_over(self.checkpoint.save_seconds):
            return "the job's time limit"
        over = time.monotonic() >= self._deadline
        return f"trainer.max_time, {self.max_time:g} s of one start" if over else None

    def _agreed(self) -> bool:
        """Whether any rank wants to stop; the same answer on all ranks."""
        if self._vote is None:
            return False
        if self._work is not None:
            self._work.wait()
        vote, self._vote, self._work = bool(self._vote.item()), None, None
        return vote

    def _stop(self, trainer: pl.Trainer) -> None:
        # On all ranks, before the first of them ends: srun then kills the others.
        self.checkpoint.finish_writing(trainer)
        self.signals.ignore()  # until exit: a second signal would kill a rank that is shutting down
        raise Preempted(self._reason() or "another process")


class JobClock:
    """Decides when to stop so that the checkpoint is written before the job ends.

    Args:
        end: of the job, in seconds since 1970; infinite without a limit.

    Attributes:
        longest_step: seconds between the ends of two steps, a validation in between included.
    """

    def __init__(self, end: float) -> None:
        self.end = end
        self._began = time.time()
        self._last: float | None = None
        self.longest_step = 0.0

    def step(self) -> None:
        """Note the end of an optimizer step."""
        now = time.monotonic()
        if self._last is not None:
            self.longest_step = max(self.longest_step, now - self._last)
        self._last = now

    def is_over(self, save_seconds: float) -> bool:
        """Whether the time left is needed to stop.

        Stopping takes the step that begins now, one more, and twice the longest save so far. At most half of
        the job is given away, because a validation may have been the longest step.

        Args:
            save_seconds: the longest save so far.
        """
        needed = 2 * self.longest_step + 2 * save_seconds + _RESERVE
        return time.time() > self.end - min(needed, (self.end - self._began) / 2)


def leave_signals_alone(trainer: pl.Trainer) -> None:
    """Keep Lightning from installing signal handlers.

    Its SIGTERM handler does a broadcast wherever the signal arrives (Lightning 2.6). An environment with
    `auto_requeue=False` (training.session) switches off the SIGUSR1 handler only. Our handlers, installed
    again in on_train_start, would come too late. Lightning's `_signal_connector` installs its own before the
    data loaders start, which takes seconds to minutes. A SIGTERM to one rank would hang all ranks then.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
