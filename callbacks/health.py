"""Leaves out optimizer steps that would spoil the weights, and stops a run that has no others."""

from __future__ import annotations

import logging
import statistics
from collections import deque
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from mhla_lightning.callbacks.first_layer import first_layer
from mhla_lightning.callbacks.steps import StepGuard
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import FORMAT, RunFolder, complete_checkpoints, step_folder, write_json
from mhla_lightning.runs.ranks import end_within
from mhla_lightning.strategies.zero.norm import total_norm
from mhla_lightning.tasks import Task

log = logging.getLogger(__name__)
WINDOW, ENOUGH = 100, 20  # steps that the median of losses is of, at most and at least
HANGS = 40.0  # seconds after an error in which a rank of several has to end
_SHOWN = 4  # samples that the message names


class Health(StepGuard):
    """Leaves out a step whose loss or gradients are not finite, or whose loss leaps, counts it
    (train/skipped_steps) and names its samples in the run folder; after too many in a row the run stops.

    Weights, optimizer and average are then as before the step, bit for bit; the step number, the data and the
    learning rate go on. A rank's bad loss makes its gradients NaN, and so those of all ranks: all see the
    same norm and decide alike, without asking each other. DeepSpeed looks at the gradients and leaves out the
    step by itself; elsewhere the gradients are taken away, and the optimizer finds nothing to do. On a GPU
    that makes the host wait for the backward once a step, as a loss scaler does.

    Args:
        run: the run folder.
        max_skipped: steps in a row that may be left out.
        spike_factor: leave out a step whose loss is more than so many times the median of the last 100 steps
            taken, from the 20th on; None does not look. The loss is that of the global batch, which costs a
            reduction a step.

    Raises:
        UserError: from the training, more than `max_skipped` steps in a row.
    """

    def __init__(self, run: RunFolder, max_skipped: int = 10, spike_factor: float | None = None) -> None:
        self.run, self.max_skipped, self.factor = run, max_skipped, spike_factor
        self.row = 0
        self._step = 0
        self._losses: list[Tensor] = []
        self._loss, self._leapt = 0.0, False
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._batches: list[tuple[list[str], Tensor]] = []
        self._kept: list[tuple[Any, int]] = []
        self._searching = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self._scaled = str(trainer.precision).startswith("16")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._searching:
            return
        bad = ~loss.detach().isfinite()
        if self.factor is not None and self._leaps(trainer, loss.detach()):
            bad = torch.ones_like(bad)
        loss.register_hook(lambda gradient: gradient.masked_fill(bad, torch.nan))

    def _leaps(self, trainer: pl.Trainer, loss: Tensor) -> bool:
        """Whether a step's loss is too large, told at its last micro batch."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._losses.append(loss / scaler.get_scale() if scaler is not None else loss)
        if len(self._losses) < trainer.accumulate_grad_batches:
            return False
        self._loss = float(trainer.strategy.reduce(torch.stack(self._losses).mean(), reduce_op="mean"))
        self._losses.clear()
        usual = statistics.median(self._recent) if len(self._recent) >= ENOUGH else 0.0
        # # not None: see the caller
        self._leapt = usual > 0 and self._loss > self.factor * usual  # type: ignore[operator]
        return self._leapt

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if hasattr(
            trainer.strategy, "skipped_step"
        ):  # DeepSpeed: no gradients here, and it comes after every micro batch
            return
        parameters = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        self.gradient_norm = total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
        if isinstance(pl_module, Task):
            pl_module.clip_by(self.gradient_norm)
        self.skipped = not self.gradient_norm.isfinite()
        if self.skipped:
            for parameter in parameters:
                parameter.grad = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches.append((batch["key"], outputs["loss"].detach()))
        if (
            self.row == self.max_skipped
        ):  # the next step left out is the last, and its batches will be looked at
            self._kept.append((batch, batch_idx))
        if trainer.global_step == self._step:  # still accumulating
            return
        self._step = trainer.global_step
        told = getattr(trainer.strategy, "skipped_step", None)
        self.skipped = self.skipped if told is None else told()
        if self.skipped:
            self._leave_out(trainer, pl_module)
        else:
            self.row = 0
            if self.factor is not None:
                self._recent.append(self._loss)
        self._batches, self._kept, self._leapt = [], [], False

    def _leave_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.skipped_steps += 1
        reason, keys = self._judge(trainer)
        if not reason:
            return
        self.row += 1
        folder = self._report(reason, keys, trainer.global_rank)
        if self.row > self.max_skipped:
            layer = "" if self._leapt else f"{self._first_layer(trainer, pl_module)}; "
            raise UserError(
                f"{reason}, and {self.row} steps in a row were left out (health.max_skipped is "
                f"{self.max_skipped}); {layer}"
                f"{self._checkpoint(self._step - self.row)}; {folder} names the samples "
                f"({_some(_of_all_ranks(trainer, keys))}): look at them"
                " (mhla data preview), or lower model.optimizer.lr or set trainer.gradient_clip_val, "
                "and resume"
            )
        if trainer.is_global_zero:
            log.warning(f"step {self._step} is left out: {reason}; {folder} names its samples")

    def _judge(self, trainer: pl.Trainer) -> tuple[str, list[str]]:
        """Why the step was left out, the same on all ranks, and the samples of this rank that it is about.
        No reason: a loss scale too large.
        """
        everything = [key for keys, _ in self._batches for key in keys]
        if self._leapt:
            times = self._loss / statistics.median(self._recent)
            return (
                f"the loss of step {self._step} is {times:.3g} times the median before it "
                f"(health.spike_factor is {self.factor})",
                everything,
            )
        bad = [not loss.isfinite() for _, loss in self._batches]
        if trainer.strategy.reduce(
            torch.tensor(float(any(bad)), device=trainer.strategy.root_device), reduce_op="sum"
        ):
            keys = [key for (keys, _), wrong in zip(self._batches, bad, strict=True) if wrong for key in keys]
            return f"the loss of step {self._step} is not finite", keys
        if self._scaled:  # float16 finds its loss scale by leaving out steps
            return "", []
        return f"the loss of step {self._step} is finite, but a gradient is not finite", everything

    def _report(self, reason: str, keys: list[str], rank: int) -> Path:
        """Names samples in the run folder."""
        folder = self.run.path / ("spikes" if self._leapt else "not_finite")
        if keys:
            folder.mkdir(exist_ok=True)
            report = {"format": FORMAT, "reason": reason, "batches": [{"step": self._step, "keys": keys}]}
            write_json(folder / f"{step_folder(self._step)}-rank-{rank}.json", report)
        return folder

    def _first_layer(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        self._searching = True
        try:
            return first_layer(trainer, pl_module, self._kept)
        finally:
            self._searching = False

    def _checkpoint(self, taken: int) -> str:
        """Which checkpoint can be gone on from, `taken` being the last step that was: whether its weights
        are good no later loss has shown.
        """
        names = [path.name for path in complete_checkpoints(self.run.path)]
        good = [name for name in names if name < step_folder(taken)]
        if not names:
            return "there is no checkpoint yet"
        if good[-1:] == names[-1:]:
            return f"the last checkpoint, {names[-1]}, is good"
        before = (
            f"{good[-1]}, before it, is good: remove the later one to go back"
            if good
            else "there is none before it"
        )
        return f"the last checkpoint, {names[-1]}, holds the very weights that fail, and {before}"

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if trainer.world_size > 1 and isinstance(
            exception, Exception
        ):  # not Ctrl-C, nor a signal to save and stop
            end_within(HANGS, exception, trainer.global_rank)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_steps": self.skipped_steps, "recent": list(self._recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped_steps = state_dict["skipped_steps"]
        self._recent.extend(state_dict["recent"])


def _of_all_ranks(trainer: pl.Trainer, keys: list[str]) -> list[str]:
    if trainer.world_size == 1:
        return keys
    gathered: list[list[str]] = [[]] * trainer.world_size
    torch.distributed.all_gather_object(gathered, keys)
    return [key for part in gathered for key in part]


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
