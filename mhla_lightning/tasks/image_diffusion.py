"""Class-conditional image diffusion, in the latents of a VAE or in pixels (paper Sec. 5.2; SPEC section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from mhla_lightning.diffusion import build_process
from mhla_lightning.errors import UserError
from mhla_lightning.keyed import generator
from mhla_lightning.randomness import run_seed
from mhla_lightning.tasks.base import PREFIXES, Task
from mhla_lightning.tasks.optimization import OptimizerConfig, ScheduleConfig


@runtime_checkable
class DiffusionBackbone(Protocol):
    """What this task asks of a backbone besides tasks.base's."""

    in_channels: int
    out_channels: int
    input_size: tuple[int, int]
    num_classes: int

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor: ...


class ImageDiffusionTask(Task):
    """Learns to remove noise from images of a class.

    Noise, time and label dropout of a sample are drawn by (seed, epoch, index), so that a step is the same on any number of ranks.

    Args:
        backbone, attention, backbone_options, optimizer, schedule, init_from, train_only, checkpoint_activations: see :class:`Task`. The backbone's
            num_classes and learn_sigma follow from the arguments below.
        num_classes: classes of the data.
        diffusion: noise process: `ddpm`, `flow`, or a mapping of `name` and its options.
        label_dropout: share of training samples whose class is replaced by the null label, for classifier-free guidance (arXiv 2207.12598).
        time_bins: the loss is logged for so many equal parts of the time axis, as loss_by_time/train_1of4 (least noise) and so on.

    Raises:
        UserError: see :class:`Task`; an unknown process or option, a share outside [0, 1].
    """

    def __init__(
        self,
        backbone: str,
        attention: str | Mapping[str, Any] | Sequence[Any] = "mhla",
        backbone_options: Mapping[str, Any] | None = None,
        num_classes: int = 1000,
        diffusion: str | Mapping[str, Any] = "ddpm",
        label_dropout: float = 0.1,
        time_bins: int = 4,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        init_from: str | None = None,
        train_only: list[str] | None = None,
        checkpoint_activations: Literal["none", "blocks"] = "none",
    ) -> None:
        if num_classes < 1:
            raise UserError(f"model.num_classes is {num_classes}; it must be at least 1")
        if not 0 <= label_dropout <= 1:
            raise UserError(f"model.label_dropout is {label_dropout}; it is a share from 0 to 1")
        if time_bins < 1:
            raise UserError(f"model.time_bins is {time_bins}; it must be at least 1")
        process = build_process(diffusion)
        options = {**(backbone_options or {}), "num_classes": num_classes, "learn_sigma": process.out_channels(1) == 2}
        super().__init__(backbone, attention, options, optimizer, schedule, init_from, train_only, checkpoint_activations)
        self.num_classes, self.process, self.label_dropout, self.time_bins = num_classes, process, label_dropout, time_bins
        with torch.device("meta"):
            plan = self._build()
        if not isinstance(plan, DiffusionBackbone):
            raise UserError(f"backbone '{backbone}' is no image diffusion model; take dit_s2, dit_b2, dit_l2 or dit_xl2")
        self.sample_shape = (plan.in_channels, *plan.input_size)
        self.metrics = nn.ModuleDict({prefix: nn.ModuleDict(self._metrics()) for prefix in PREFIXES})
        self.register_buffer("_by_time", torch.zeros(2, time_bins), persistent=False)  # sums and counts since the last point in TensorBoard
        self._by_time: Tensor
        self._counted_step = 0

    def _metrics(self) -> dict[str, Metric]:
        names = ["loss", *self.process.parts, *(f"time_{n}" for n in range(self.time_bins))]
        return {name: MeanMetric() for name in names}

    @property
    def null_label(self) -> int:
        """The label of no class."""
        return self.num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(batch, C, H, W), model times (batch,), labels (batch,) -> prediction (batch, C or 2C, H, W)."""
        assert self.backbone is not None, "configure_model has not run"
        return self.backbone(x, t, y)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        losses, times = self._losses(batch, batch["epoch"].tolist(), "diffusion", self.label_dropout)
        self._count(losses["loss"], times)
        return losses["loss"].mean()

    def _losses(self, batch: Mapping[str, Tensor], epochs: Sequence[int], purpose: str, dropout: float) -> tuple[dict[str, Tensor], Tensor]:
        """Losses (batch,) by name, and the times (batch,)."""
        clean = clean_images(batch)
        noise, times, dropped = self._draw(tuple(clean.shape[1:]), epochs, batch["index"].tolist(), purpose, dropout)
        noise, times, dropped = noise.to(clean), times.to(clean.device), dropped.to(clean.device)
        noisy = self.process.add_noise(clean, noise, times)
        labels = batch["label"].masked_fill(dropped, self.null_label)
        prediction = self(noisy, self.process.model_time(times), labels)
        return self.process.losses(prediction.float(), clean, noise, noisy, times), times

    def _draw(
        self, shape: tuple[int, ...], epochs: Sequence[int], indices: Sequence[int], purpose: str, dropout: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (batch, *shape), times (batch,) and whether the label is dropped (batch,), each sample's by its own key."""
        count = len(indices)
        noise, times, dropped = np.empty((count, *shape), np.float32), np.empty(count, np.float32), np.empty(count, bool)
        for row, key in enumerate(zip(epochs, indices, strict=True)):
            rng = generator(run_seed(), purpose, *key)
            times[row], dropped[row] = self.process.draw_time(rng), rng.random() < dropout
            noise[row] = rng.standard_normal(shape, np.float32)
        return torch.from_numpy(noise), torch.from_numpy(times), torch.from_numpy(dropped)

    @torch.no_grad()
    def _count(self, losses: Tensor, times: Tensor) -> None:
        bins = self.process.bins(times, self.time_bins)
        self._by_time[0].index_add_(0, bins, losses.detach().to(self._by_time.dtype))
        self._by_time[1].index_add_(0, bins, torch.ones_like(losses, dtype=self._by_time.dtype))

    def on_train_start(self) -> None:
        self._counted_step = self.trainer.global_step

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        if step == self._counted_step or step % cast(Any, self.trainer).log_every_n_steps:  # the first while gradients accumulate
            return
        self._counted_step = step
        sums, counts = cast(Tensor, self.trainer.strategy.reduce(self._by_time, reduce_op="sum")).tolist()
        for number, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                self.log(self._bin_tag("train", number), total / count)
        self._by_time.zero_()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what was counted since the last point, of all ranks: a run that is resumed between two points draws the same curve."""
        if self.trainer.global_step % cast(Any, self.trainer).log_every_n_steps:  # else all of it is logged before anything more is counted
            checkpoint["loss_by_time"] = self.trainer.strategy.reduce(self._by_time.clone(), reduce_op="sum")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        waiting = checkpoint.get("loss_by_time")
        if waiting is not None and self.trainer.is_global_zero:
            self._by_time.copy_(waiting)

    def _bin_tag(self, prefix: str, number: int) -> str:
        return f"loss_by_time/{prefix}_{number + 1}of{self.time_bins}"

    def evaluate(self, batch: Mapping[str, Tensor], prefix: str) -> None:
        """Adds a batch to the metrics under `prefix` (one of PREFIXES); a sample meets the same noise and time at every validation."""
        real = batch["weight"] > 0
        losses, times = self._losses(batch, [0] * len(real), "validation", 0.0)
        metrics = cast(dict[str, Metric], self.metrics[prefix])
        bins = self.process.bins(times, self.time_bins)
        for name in ("loss", *self.process.parts):
            metrics[name].update(losses[name][real])
            self.log(f"{prefix}/{name}", metrics[name], prog_bar=prefix == "val" and name == "loss", batch_size=len(real))
        for number in range(self.time_bins):
            mine = losses["loss"][real & (bins == number)]
            metrics[f"time_{number}"].update(mine.sum() / max(1, len(mine)), weight=len(mine))
            self.log(self._bin_tag(prefix, number), metrics[f"time_{number}"], batch_size=len(real))

    def check_data(self, facts: Mapping[str, Any], micro_batch: int) -> None:
        """Refuses data that this model cannot take, before training.

        Raises:
            UserError: neither images nor latents, another number of channels, another size or number of classes.
        """
        if facts["kind"] == "latents":
            shape, key = tuple(facts["vae"].shape), "data.vae.shape"
        elif facts["kind"] == "images":
            shape, key = (3, *facts["image_size"]), "data.image_size"
        else:
            raise UserError(f"image diffusion needs images or latents, and the data holds {facts['kind']}")
        if shape != self.sample_shape:
            raise UserError(
                f"the data's samples are {shape} ({key}) and the model takes {self.sample_shape}"
                " (model.backbone_options.in_channels and input_size); they must be equal"
            )
        if facts["classes"] != self.num_classes:
            raise UserError(
                f"model.num_classes is {self.num_classes} and the data has {facts['classes']} classes; set model.num_classes to {facts['classes']}"
            )


def clean_images(batch: Mapping[str, Tensor]) -> Tensor:
    """(batch, C, H, W): latents, or pixels where the data holds no latents."""
    return batch["latent"] if "latent" in batch else batch["image"]
