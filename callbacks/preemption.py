"""A run that is told to stop saves at the next step and ends with exit code 75."""

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

JOB_END = "MHLA_JOB_END"  # seconds since 1970; the batch script sets it
_RESERVE = 15.0  # seconds


class Preemption(AfterStep):
    """Saves and stops all ranks at the same step when one of them got SIGUSR1 or SIGTERM, or when the time of
    the job runs out.

    Lightning's own handlers save or broadcast inside the signal handler: with 20 ms between the ranks'
    signals they meet different collectives (Lightning issue 21406), so they are taken out
    (`leave_signals_alone`). Here a signal sets a flag and nothing else. The flags meet in an all-reduce of
    one number on the CPU, begun at the start of a step and awaited at its end: no GPU waits for it, and all
    ranks decide alike.
    A step that was left out is not saved: the next that is taken is the last then.
    The checkpoint is the callback's that saves anyway: after a validation that is due at that step, with
    metrics logged as in any other step.

    Args:
        checkpoint: the callback that saves.
        signals: what has arrived in this process.

    Raises:
        Preempted: from the training, in every rank, when all is saved.
    """

    def __init__(self, checkpoint: Checkpoint, signals: StopSignals) -> None:
        super().__init__()
        self.checkpoint, self.signals = checkpoint, signals
        self.stopping = False
        self.clock = JobClock(float(os.environ.get(JOB_END) or "inf"))
        self._group: Any = None
        self._vote: torch.Tensor | None = None
        self._work: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.world_size > 1 and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        self._begin_vote()
        if self._agreed():  # told while it was starting: there is nothing new to save
            self._stop(trainer)

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
        wanted = self.signals.received is not None or self.clock.is_over(self.checkpoint.save_seconds)
        self._vote = torch.tensor([int(wanted)])
        if self._group is not None:
            self._work = dist.all_reduce(self._vote, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _agreed(self) -> bool:
        """Whether any rank wants to stop; the same on all of them."""
        if self._vote is None:
            return False
        if self._work is not None:
            self._work.wait()
        vote, self._vote, self._work = bool(self._vote.item()), None, None
        return vote

    def _stop(self, trainer: pl.Trainer) -> None:
        self.checkpoint.finish_writing(
            trainer
        )  # on all ranks, before the first of them ends: srun then kills the others
        self.signals.ignore()  # until exit: a second signal would kill a rank that is shutting down
        raise Preempted(
            self.signals.received
            or (
                "the job's time limit"
                if self.clock.is_over(self.checkpoint.save_seconds)
                else "another process"
            )
        )


class JobClock:
    """Says when to stop so that the checkpoint is written before the job ends.

    Args:
        end: of the job, seconds since 1970; infinite where nothing limits it.
    """

    def __init__(self, end: float) -> None:
        self.end = end
        self._began = time.time()
        self._last: float | None = None
        self.longest_step = 0.0  # seconds between the ends of two steps, a validation between them included

    def step(self) -> None:
        """An optimizer step has ended."""
        now = time.monotonic()
        if self._last is not None:
            self.longest_step = max(self.longest_step, now - self._last)
        self._last = now

    def is_over(self, save_seconds: float) -> bool:
        """Whether there is only time left for the step that begins now, one more, and twice the longest save
        so far.

        At most half of the job is given away: a validation may have been the longest step.
        """
        needed = 2 * self.longest_step + 2 * save_seconds + _RESERVE
        return time.time() > self.end - min(needed, (self.end - self._began) / 2)


def leave_signals_alone(trainer: pl.Trainer) -> None:
    """Keeps Lightning from installing signal handlers: its SIGTERM handler does a broadcast where the
    signal happens to arrive.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
