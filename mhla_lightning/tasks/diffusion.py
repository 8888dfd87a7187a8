"""What image and video diffusion share: keyed noise, losses by time, distillation (SPEC sections 4.3,
6.6).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from mhla_lightning.diffusion import build_process
from mhla_lightning.errors import UserError
from mhla_lightning.randomness import generator, run_seed
from mhla_lightning.tasks.base import PREFIXES, Task
from mhla_lightning.tasks.distillation import Distillation, Teacher
from mhla_lightning.tasks.optimization import OptimizerConfig, ScheduleConfig


class DiffusionTask(Task):
    """Learns to remove noise from samples under a condition.

    Noise, time and dropout of the condition are drawn for a sample by (seed, epoch, index), so that a step is
    the same on any number of ranks.

    Args:
        backbone, attention, backbone_options, optimizer, schedule, init_from, train_only,
        checkpoint_activations: see :class:`Task`.
        diffusion: noise process: `ddpm`, `flow`, or a mapping of `name` and its options.
        dropout: the condition's: its key in a recipe, and the share of training samples that lose it, for
            classifier-free guidance (arXiv 2207.12598).
        time_bins: the loss is logged for so many equal parts of the time axis, as loss_by_time/train_1of4
            (least noise) and so on.
        distill: a frozen teacher, whose output and attention this model learns beside the data.

    Raises:
        UserError: see :class:`Task`; an unknown process or option, a share outside [0, 1], a teacher that is
            not there.
    """

    def __init__(
        self,
        backbone: str,
        attention: str | Mapping[str, Any] | Sequence[Any],
        backbone_options: Mapping[str, Any] | None,
        diffusion: str | Mapping[str, Any],
        dropout: tuple[str, float],
        time_bins: int,
        distill: Distillation | None,
        optimizer: OptimizerConfig | None,
        schedule: ScheduleConfig | None,
        init_from: str | None,
        train_only: list[str] | None,
        checkpoint_activations: Literal["none", "blocks"],
    ) -> None:
        key, self.dropout = dropout
        if not 0 <= self.dropout <= 1:
            raise UserError(f"model.{key} is {self.dropout}; it is a share from 0 to 1")
        if time_bins < 1:
            raise UserError(f"model.time_bins is {time_bins}; it must be at least 1")
        process = build_process(diffusion)
        super().__init__(
            backbone,
            attention,
            backbone_options,
            optimizer,
            schedule,
            init_from,
            train_only,
            checkpoint_activations,
        )
        self.process, self.time_bins = process, time_bins
        self.teacher = Teacher(distill, backbone, self.backbone_options) if distill is not None else None
        self.metrics = nn.ModuleDict({prefix: nn.ModuleDict(self._metrics()) for prefix in PREFIXES})
        # Sums and counts since the last point in TensorBoard. No buffers: DDP gives every rank those of rank
        # 0, and bf16 counts to 256.
        self._by_time = {prefix: torch.zeros(2, time_bins) for prefix in ("train", *PREFIXES)}
        self._counted_step = 0

    def _metrics(self) -> dict[str, Metric]:
        return {
            name: MeanMetric(nan_strategy="disable") for name in ("loss", *self.process.parts)
        }  # NaN is shown, not left out

    @abstractmethod
    def clean(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The samples without noise, (batch, C, ...)."""

    @abstractmethod
    def condition(self, batch: Mapping[str, Tensor], dropped: Tensor) -> Tensor:
        """What the model is told of every sample, (batch, ...); nothing where `dropped` (batch,) bool says
        so.
        """

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """(batch, C, ...), model times (batch,), the condition of :meth:`condition` -> prediction (batch,
        out_channels, ...).
        """
        assert self.backbone is not None, "configure_model has not run"
        return self.backbone(x, t, condition)

    def rehearsal(self, depth: int | None = None) -> Task:
        twin = cast(DiffusionTask, super().rehearsal(depth))
        if twin.teacher is not None:
            twin.teacher = twin.teacher.rehearsal(twin.backbone_options)
        return twin

    def configure_model(self) -> None:
        super().configure_model()
        if self.teacher is not None:
            self.teacher.configure()

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        epochs = batch["epoch"].tolist()
        if self.teacher is None:
            losses, times = self._losses(batch, epochs, "diffusion", self.dropout)
            total = losses["loss"].mean()
        else:
            with self.teacher.watch(self) as lesson:
                losses, times = self._losses(batch, epochs, "diffusion", self.dropout)
                apart = lesson.losses()
            total = losses["loss"].mean() + self.teacher.weigh(apart)
            for name, value in apart.items():
                self.log(f"train/distill_{name}", value.detach(), batch_size=len(epochs))
        self._count("train", losses["loss"], times)
        return total

    def _losses(
        self, batch: Mapping[str, Tensor], epochs: Sequence[int], purpose: str, dropout: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses (batch,) by name, and the times (batch,)."""
        clean = self.clean(batch)
        noise, times, dropped = self._draw(
            tuple(clean.shape[1:]), epochs, batch["index"].tolist(), purpose, dropout
        )
        noise, times, dropped = noise.to(clean), times.to(clean.device), dropped.to(clean.device)
        noisy = self.process.add_noise(clean, noise, times)
        prediction = self(noisy, self.process.model_time(times), self.condition(batch, dropped))
        return self.process.losses(prediction.float(), clean, noise, noisy, times), times

    def _draw(
        self,
        shape: tuple[int, ...],
        epochs: Sequence[int],
        indices: Sequence[int],
        purpose: str,
        dropout: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (batch, *shape), times (batch,) and whether the condition is dropped (batch,), each
        sample's by its own key.
        """
        count = len(indices)
        noise, times, dropped = (
            np.empty((count, *shape), np.float32),
            np.empty(count, np.float32),
            np.empty(count, bool),
        )
        for row, key in enumerate(zip(epochs, indices, strict=True)):
            rng = generator(run_seed(), purpose, *key)
            times[row], dropped[row] = self.process.draw_time(rng), rng.random() < dropout
            noise[row] = rng.standard_normal(shape, np.float32)
        return torch.from_numpy(noise), torch.from_numpy(times), torch.from_numpy(dropped)

    @torch.no_grad()
    def _count(self, prefix: str, losses: Tensor, times: Tensor) -> None:
        tally = self._by_time[prefix] = self._by_time[prefix].to(losses.device)
        bins, numbers = self.process.bins(times, self.time_bins), losses.isfinite()
        tally[0].index_add_(0, bins, losses.detach().where(numbers, 0).to(tally.dtype))
        tally[1].index_add_(0, bins, numbers.to(tally.dtype))

    def _counted(self, prefix: str) -> Tensor:
        """Sums and counts (2, time_bins) of all ranks."""
        return cast(
            Tensor,
            self.trainer.strategy.reduce(self._by_time[prefix].to(self.device, copy=True), reduce_op="sum"),
        )

    def _means_by_time(self, prefix: str) -> dict[str, float]:
        """The mean loss of every part of the time axis that met a sample, the same on all ranks; the next
        mean begins.
        """
        counted = enumerate(self._counted(prefix).T.tolist(), start=1)
        means = {
            f"loss_by_time/{prefix}_{number}of{self.time_bins}": total / count
            for number, (total, count) in counted
            if count
        }
        self._by_time[prefix].zero_()
        return means

    def _log_by_time(self, prefix: str) -> None:
        for tag, mean in self._means_by_time(prefix).items():
            self.log(
                tag, mean, batch_size=1, sync_dist=True
            )  # all ranks agree; Lightning warns unless told so

    def on_train_start(self) -> None:
        self._counted_step = self.trainer.global_step
        if self.teacher is not None:
            self.teacher.prepare(self.device)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        if (
            step == self._counted_step or step % cast(Any, self.trainer).log_every_n_steps
        ):  # the first while gradients accumulate
            return
        self._counted_step = step
        means = self._means_by_time("train")
        for logger in (
            self.trainer.loggers
        ):  # self.log would write a part that no sample has met once more, with its last value
            logger.log_metrics(means, step)

    def on_validation_epoch_end(self) -> None:
        for prefix in ("val", "val_ema"):
            self._log_by_time(prefix)

    def on_test_epoch_end(self) -> None:
        for prefix in ("test", "test_ema"):
            self._log_by_time(prefix)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what was counted since the last point, of all ranks: a run that is resumed between two
        points draws the same curve.
        """
        if (
            self.trainer.global_step % cast(Any, self.trainer).log_every_n_steps
        ):  # else all of it is logged before anything more is counted
            checkpoint["loss_by_time"] = self._counted("train")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        waiting = checkpoint.get("loss_by_time")
        if waiting is not None and self.trainer.is_global_zero:
            self._by_time["train"].copy_(waiting)

    def evaluate(self, batch: Mapping[str, Tensor], prefix: str) -> None:
        """Adds a batch to the metrics under `prefix` (one of PREFIXES); a sample meets the same noise and
        time at every validation.
        """
        real = batch["weight"] > 0
        losses, times = self._losses(batch, [0] * len(real), "validation", 0.0)
        metrics = cast(dict[str, Metric], self.metrics[prefix])
        for name, metric in metrics.items():
            metric.update(losses[name][real])
            self.log(
                f"{prefix}/{name}", metric, prog_bar=prefix == "val" and name == "loss", batch_size=len(real)
            )
        self._count(prefix, losses["loss"][real], times[real])
