"""Health: optimizer steps that would spoil the weights are left out, and counted."""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from mhla_lightning.callbacks.first_layer import first_layer
from mhla_lightning.callbacks.run_folder import run_folder_of
from mhla_lightning.callbacks.steps import StepGuard, completed
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import FORMAT, RunFolder, complete_checkpoints, step_folder, write_json
from mhla_lightning.runs.ranks import end_within
from mhla_lightning.strategies.launcher import watch_of
from mhla_lightning.strategies.norm import total_norm
from mhla_lightning.strategies.sharding import sharding_of
from mhla_lightning.tasks import Task

log = logging.getLogger(__name__)
WINDOW, ENOUGH = 100, 20  # number of steps in the median of losses, at most and at least
HANGS = 40.0  # seconds that a rank of several has to end after an error
_SHOWN = 4  # samples named in the message


class Verdict:
    """A flag on its way from a GPU to the host, which reads it when it is needed.

    Args:
        flag: bool, a scalar on a GPU; the host waits for the work before it alone, not for what came later.
    """

    def __init__(self, flag: Tensor) -> None:
        self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._host.copy_(flag, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def read(self) -> bool:
        """Wait until the flag has arrived; return it."""
        self._arrived.synchronize()
        return bool(self._host)


class Health(StepGuard):
    """Leaves out a step whose loss or gradients are not finite, or whose loss leaps.

    It counts the step (train/skipped_steps) and names the samples in the run folder. After too many in a row
    the run stops. Weights, optimizer and average are as before the step, bit for bit. The step number, the
    data and the learning rate move on.

    A rank's bad loss makes its gradients NaN, and so those of all ranks. All ranks see the same norm and
    decide alike, without communication. DeepSpeed checks the gradients and leaves out the step itself. Under
    other strategies the gradients are removed, and the optimizer finds nothing to do. A fused optimizer gets
    the verdict on the device instead: its step is then queued before the host waits for the backward, once
    per step.

    Args:
        run: the run folder; None takes that of the trainer's logger, or `default_root_dir`.
        max_skipped: number of steps in a row that may be left out.
        spike_factor: leave out a step whose loss is more than this factor times the median of the last 100
            steps taken, from the 20th on. It costs one reduction per step. None does not compare losses.

    Raises:
        UserError: from the training, more than `max_skipped` steps in a row.
    """

    def __init__(
        self, run: RunFolder | None = None, max_skipped: int = 10, spike_factor: float | None = None
    ) -> None:
        self._given, self.max_skipped, self.factor = run, max_skipped, spike_factor
        self.run = run or RunFolder(Path())
        self.row = 0
        self._step = 0
        self._losses: list[Tensor] = []
        self._loss, self._leapt = 0.0, False
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._batches: list[tuple[list[str], Tensor]] = []
        self._kept: list[tuple[Any, int]] = []
        self._verdict: Verdict | None = None
        self._searching = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._given is None:
            self.run = run_folder_of(trainer)

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
        """Whether a step's loss is too large; known at its last micro batch, False before."""
        plugin = trainer.precision_plugin
        scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
        self._losses.append(loss / scaler.get_scale() if scaler is not None else loss)
        if len(self._losses) < trainer.accumulate_grad_batches:
            return False
        self._loss = float(trainer.strategy.reduce(torch.stack(self._losses).mean(), reduce_op="mean"))
        self._losses.clear()
        usual = statistics.median(self._recent) if len(self._recent) >= ENOUGH else 0.0
        self._leapt = usual > 0 and self._loss > cast(float, self.factor) * usual
        return self._leapt

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # DeepSpeed has no gradients here, and calls this hook after every micro batch.
        if sharding_of(trainer.strategy).guards_steps:
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
        bad = ~self.gradient_norm.isfinite()
        if self._scaled or not all(group.get("fused") for group in optimizer.param_groups):
            self.skipped = bool(bad)
            if self.skipped:
                for parameter in parameters:
                    parameter.grad = None
        else:
            cast(Any, optimizer).found_inf = bad.float()  # a fused optimizer of torch then changes nothing
            self._verdict = Verdict(bad)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        batch = completed(pl_module, batch, batch_idx)
        named = isinstance(batch, Mapping) and "key" in batch
        keys = (
            batch["key"]
            if named
            else [f"sample {n} of batch {batch_idx}" for n in range(extract_batch_size(batch))]
        )
        self._batches.append((keys, outputs["loss"].detach()))
        if self.row == self.max_skipped:  # one more step left out ends the run; its batches are searched
            self._kept.append((batch, batch_idx))
        if trainer.global_step == self._step:  # still accumulating
            return
        self._step = trainer.global_step
        sharding = sharding_of(trainer.strategy)
        if sharding.guards_steps:
            self.skipped = sharding.skipped_step()
        elif self._verdict is not None:
            self.skipped, self._verdict = self._verdict.read(), None
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
                None,
                f"{reason}, and {self.row} steps in a row were left out (`health.max_skipped` is "
                f"{self.max_skipped}); {layer}{self._checkpoint(self._step - self.row)}; {folder} names the "
                f"samples ({_some(_of_all_ranks(trainer, keys))}): look at them (mhla data preview), or "
                "lower `model.optimizer.lr` or set `trainer.gradient_clip_val`, and resume",
            )
        if trainer.is_global_zero:
            log.warning(f"step {self._step} is left out: {reason}; {folder} names its samples")

    def _judge(self, trainer: pl.Trainer) -> tuple[str, list[str]]:
        """Return why the step was left out, the same on all ranks, and this rank's samples of it.

        The reason is empty where the loss scale was too large.
        """
        everything = [key for keys, _ in self._batches for key in keys]
        if self._leapt:
            times = self._loss / statistics.median(self._recent)
            return (
                f"the loss of step {self._step} is {times:.3g} times the median before it "
                f"(`health.spike_factor` is {self.factor})",
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
        """Write samples into the run folder; return the folder of such files."""
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
        """Return a clause that names the newest checkpoint with good weights.

        Args:
            taken: the last step that was taken; no later loss has shown whether its weights are good.
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
        return f"the last checkpoint, {names[-1]}, holds the weights that fail, and {before}"

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if trainer.world_size > 1 and isinstance(exception, Exception):
            end_within(HANGS, exception, trainer.global_rank)
        elif isinstance(exception, KeyboardInterrupt) and (watch := watch_of(trainer)) is not None:
            watch.asked = True  # the other ranks have Ctrl-C too; their end is no failure

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
