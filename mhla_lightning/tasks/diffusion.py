"""The common part of image and video diffusion (SPEC sections 4.3, 6.6).

Noise keyed by the sample, losses by time, distillation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from mhla_lightning.diffusion import Guidance, build_process, default_sampler
from mhla_lightning.diffusion.drawing import draw_samples
from mhla_lightning.diffusion.draws import BatchDraws, Draws, drawn
from mhla_lightning.errors import UserError, inside
from mhla_lightning.randomness import run_seed
from mhla_lightning.tasks.base import PREFIXES, Drawing, Task
from mhla_lightning.tasks.batches import keys_of, real_rows
from mhla_lightning.tasks.distillation import Distillation, Teacher
from mhla_lightning.tasks.trainers import draws_point


@dataclass(frozen=True)
class DiffusionLoss:
    """The settings that the losses of image and video diffusion share.

    Args:
        dropout: share of training samples that lose their condition, for classifier-free guidance (arXiv
            2207.12598).
        time_bins: the loss is logged for this number of equal parts of the time axis, as
            loss_by_time/train_1of4 (least noise) and so on.
        distill: a frozen teacher, whose output and attention this model learns beside the data; None is off.
    """

    dropout: float
    time_bins: int
    distill: Distillation | None


@dataclass(frozen=True)
class PredictSettings:
    """How :meth:`DiffusionTask.predict_step` draws.

    Args:
        steps: calls of the network.
        sampler: see diffusion.SAMPLERS; empty takes the usual one of the noise process.
        guidance: of the condition.
        seed: of the noise.
        pixels: whether the data module also makes images or videos of the samples. For latents it opens the
            VAE.
    """

    steps: int = 50
    sampler: str = ""
    guidance: Guidance = Guidance()  # noqa: RUF009  frozen
    seed: int = 0
    pixels: bool = True


@runtime_checkable
class ShowsImages(Protocol):
    """A data module that makes pixels of samples."""

    def to_images(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class ShowsVideos(Protocol):
    """A data module that makes frames of samples."""

    def to_videos(self, x: Tensor) -> Tensor: ...


def check_loss(key: str, dropout: float, time_bins: int) -> None:
    """Refuse a share or a number of parts that cannot be.

    Keys begin with `loss`, the task's argument: a recipe's parser builds the loss before the task is there to
    name it.

    Args:
        key: name of the dropout in the task's loss.
        dropout, time_bins: see :class:`DiffusionLoss`.

    Raises:
        UserError: a share outside [0, 1], or no part.
    """
    if not 0 <= dropout <= 1:
        raise UserError(f"loss.{key}", f"{dropout} is no share; it must be from 0 to 1")
    if time_bins < 1:
        raise UserError("loss.time_bins", f"{time_bins} is too few; it must be at least 1")


class DiffusionTask(Task):
    """Learns to remove noise from samples under a condition.

    Noise, time and dropout of a sample depend on (seed, epoch, index) alone, so that a step is the same on
    any number of ranks.

    Args:
        backbone, attention, backbone_options: see :class:`Task`.
        diffusion: noise process: `ddpm`, `flow`, or a mapping of `name` and its options.
        loss: see :class:`DiffusionLoss`.
        task: further arguments of :class:`Task`.

    Raises:
        UserError: see :class:`Task`; an unknown process or option, a teacher that does not exist.

    Attributes:
        samples: keys of a batch that may hold the samples; the first that it has counts.
        sampling: how predict_step draws.
    """

    samples: ClassVar[tuple[str, ...]]
    sampling = PredictSettings()

    def __init__(
        self,
        backbone: str,
        attention: str | Mapping[str, Any] | Sequence[Any],
        backbone_options: Mapping[str, Any] | None,
        diffusion: str | Mapping[str, Any],
        loss: DiffusionLoss,
        **task: Any,
    ) -> None:
        with inside("diffusion"):
            process = build_process(diffusion)
        super().__init__(backbone, attention, backbone_options, **task)
        self.process, self.dropout, self.time_bins = process, loss.dropout, loss.time_bins
        self.teacher: Teacher | None = None
        if loss.distill is not None:
            if self.compilation is not None:
                raise UserError(
                    "compile",
                    "`loss.distill` reads the outputs of single layers, and a compiled model shows none; "
                    "choose one of the two",
                )
            with inside("loss.distill"):
                self.teacher = Teacher(loss.distill, backbone, self.backbone_options)
        self._add_metrics()
        # Sums and counts since the last point in TensorBoard. They are no buffers: DDP would give every rank
        # those of rank 0, and bf16 counts to 256 only.
        self._by_time = {prefix: torch.zeros(2, loss.time_bins) for prefix in ("train", *PREFIXES)}
        self._waiting: Tensor | None = None  # the counts of a checkpoint
        self._counted_step = 0

    def _add_metrics(self) -> None:
        self.metrics = nn.ModuleDict({tag: nn.ModuleDict(self._metrics()) for tag in self.tags()})

    def _metrics(self) -> dict[str, Metric]:
        # "disable" shows NaN instead of leaving it out.
        return {name: MeanMetric(nan_strategy="disable") for name in ("loss", *self.process.parts)}

    def clean(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the samples without noise, (batch, C, ...), by the first key of `samples` there."""
        return next(batch[name] for name in self.samples if name in batch)

    @abstractmethod
    def condition(self, batch: Mapping[str, Tensor], dropped: Tensor) -> Tensor:
        """Return the condition of every sample, (batch, ...).

        Args:
            batch: of a loader.
            dropped: (batch,) bool, True where the sample gets the empty condition.
        """

    @abstractmethod
    def empty_condition(self) -> int | Tensor:
        """Return the empty condition of one sample."""

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Draw a sample under the condition of each sample of a batch, as :attr:`sampling` says.

        Returns:
            `key`, and `sample` (batch, C, ...) float32. Also `images` (batch, height, width, 3) or `videos`
            (batch, frames, height, width, 3), uint8, where a data module of ours makes them.
        """
        batch = self.completed(batch, batch_idx, "predict")
        kept = real_rows(batch)
        shape, indices = self.clean(batch).shape[1:], batch["index"].to(kept.device)[kept].tolist()
        settings = replace(self.sampling, sampler=self.sampling.sampler or default_sampler(self.process))
        nothing_dropped = torch.zeros_like(batch["weight"], dtype=torch.bool)
        sample = draw_samples(
            self,
            self.condition(batch, nothing_dropped)[kept],
            self.empty_condition(),
            shape,
            [(settings.seed, "sample", index) for index in indices],
            settings,
        )
        return {"key": keys_of(batch, kept), "sample": sample, **self._shown(sample)}

    def _shown(self, sample: Tensor) -> dict[str, Tensor]:
        """Return the pixels of samples, where the data module makes them."""
        data = cast(Any, self.trainer).datamodule
        if not self.sampling.pixels:
            return {}
        if sample.ndim == 5:
            return {"videos": data.to_videos(sample)} if isinstance(data, ShowsVideos) else {}
        return {"images": data.to_images(sample)} if isinstance(data, ShowsImages) else {}

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the prediction (batch, out_channels, ...).

        Args:
            x: (batch, C, ...).
            t: model times (batch,).
            condition: of :meth:`condition`.
        """
        return self.built_backbone()(x, t, condition)

    def rehearsal(self, depth: int | None = None) -> Task:
        twin = cast(DiffusionTask, super().rehearsal(depth))
        if twin.teacher is not None:
            twin.teacher = twin.teacher.rehearsal(twin.backbone_options)
        return twin

    def configure_model(self) -> None:
        super().configure_model()
        if self.teacher is not None:
            self.teacher.configure()

    def frozen_models(self) -> list[nn.Module]:
        return [] if self.teacher is None or self.teacher.model is None else [self.teacher.model]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self.completed(batch, batch_idx, "train")
        epochs = batch["epoch"].tolist()
        if self.teacher is None:
            losses, times = self._losses(batch, epochs, "diffusion", self.dropout)
            total = losses["loss"].mean()
        else:
            with self.teacher.watch(self.built_backbone()) as lesson:
                losses, times = self._losses(batch, epochs, "diffusion", self.dropout)
                errors = lesson.losses()
            total = losses["loss"].mean() + self.teacher.weigh(errors)
            for name, value in errors.items():
                self.log(f"train/distill_{name}", value.detach(), batch_size=len(epochs))
        self._count("train", losses["loss"], times)
        return total

    def _losses(
        self, batch: Mapping[str, Tensor], epochs: Sequence[int], purpose: str, dropout: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return losses (batch,) by name, and the times (batch,)."""
        clean = self.clean(batch)
        found = drawn(batch) or self._draws(purpose, dropout)(
            clean.shape[1:], epochs, batch["index"].tolist()
        )
        noise, times, dropped = found
        noise, times, dropped = noise.to(clean), times.to(clean.device), dropped.to(clean.device)
        noisy = self.process.add_noise(clean, noise, times)
        prediction = self(noisy, self.process.model_time(times), self.condition(batch, dropped))
        return self.process.losses(prediction.float(), clean, noise, noisy, times), times

    def _draws(self, purpose: str, dropout: float) -> Draws:
        return Draws(self.process, run_seed(), purpose, dropout)

    def draws_ahead(self, training: bool) -> Drawing:
        if training:
            return BatchDraws(self._draws("diffusion", self.dropout), self.samples)
        return BatchDraws(self._draws("validation", 0.0), self.samples, by_epoch=False)

    @torch.no_grad()
    def _count(self, prefix: str, losses: Tensor, times: Tensor) -> None:
        tally = self._by_time[prefix] = self._by_time[prefix].to(losses.device)
        bins, numbers = self.process.bins(times, self.time_bins), losses.isfinite()
        tally[0].index_add_(0, bins, losses.detach().where(numbers, 0).to(tally.dtype))
        tally[1].index_add_(0, bins, numbers.to(tally.dtype))

    def _counted(self, prefix: str) -> Tensor:
        """Return sums and counts (2, time_bins) of all ranks."""
        return cast(
            Tensor,
            self.trainer.strategy.reduce(self._by_time[prefix].to(self.device, copy=True), reduce_op="sum"),
        )

    def _means_by_time(self, prefix: str) -> dict[str, float]:
        """Return the mean loss of every part of the time axis that had a sample.

        All ranks get the same; counting then starts anew.
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
            # All ranks have the same mean; sync_dist keeps Lightning from warning.
            self.log(tag, mean, batch_size=1, sync_dist=True)

    def on_train_start(self) -> None:
        super().on_train_start()
        self._counted_step = self.trainer.global_step
        if self._waiting is not None and self.trainer.is_global_zero:
            self._by_time["train"].copy_(self._waiting)
        self._waiting = None
        if self.teacher is not None:
            self.teacher.prepare(self.device)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        step = self.trainer.global_step
        accumulating = step == self._counted_step
        if accumulating or not draws_point(self.trainer):
            return
        self._counted_step = step
        means = self._means_by_time("train")
        # self.log would write the last value again for a part of the time axis without samples.
        for logger in self.trainer.loggers:
            logger.log_metrics(means, step)

    def on_validation_epoch_end(self) -> None:
        for prefix in ("val", "val_ema"):
            self._log_by_time(prefix)

    def on_test_epoch_end(self) -> None:
        for prefix in ("test", "test_ema"):
            self._log_by_time(prefix)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the counts of all ranks since the last point.

        A run that resumes between two points then draws the same curve.
        """
        super().on_save_checkpoint(checkpoint)
        # At other steps the counts are logged before anything more is counted.
        if not draws_point(self.trainer):
            checkpoint["loss_by_time"] = self._counted("train")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._waiting = checkpoint.get("loss_by_time")

    def run_backbone(self, batch: Mapping[str, Tensor]) -> None:
        """Run the backbone on a batch, each sample with its noise and time of validation."""
        self._losses(batch, [0] * len(batch["weight"]), "validation", 0.0)

    def evaluate(self, batch: Mapping[str, Tensor], prefix: str) -> None:
        """Add a batch to the metrics under a prefix, one of PREFIXES.

        A sample meets the same noise and time at every validation.
        """
        real = batch["weight"] > 0
        losses, times = self._losses(batch, [0] * len(real), "validation", 0.0)
        tag = self.tag(prefix, self.clean(batch).shape[2:])
        metrics = cast(dict[str, Metric], self.metrics[tag])
        for name, metric in metrics.items():
            metric.update(losses[name][real])
            self.log(f"{tag}/{name}", metric, prog_bar=tag == "val" and name == "loss", batch_size=len(real))
        if tag == prefix:
            self._count(prefix, losses["loss"][real], times[real])
