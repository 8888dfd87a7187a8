"""Class-conditional image diffusion, in the latents of a VAE or in pixels (paper Sec. 5.2; SPEC section
4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from mhla_lightning.diffusion import build_process
from mhla_lightning.errors import UserError
from mhla_lightning.tasks.base import keys
from mhla_lightning.tasks.diffusion import DiffusionTask
from mhla_lightning.tasks.distillation import Distillation
from mhla_lightning.tasks.optimization import OptimizerConfig, ScheduleConfig


@runtime_checkable
class ImageDiffusionBackbone(Protocol):
    """What this task asks of a backbone besides tasks.base's."""

    in_channels: int
    out_channels: int
    input_size: tuple[int, int]
    num_classes: int

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor: ...


class ImageDiffusionTask(DiffusionTask):
    """Learns to remove noise from images of a class.

    Args:
        backbone, attention, backbone_options, diffusion, time_bins, distill, optimizer, schedule, init_from,
        train_only, checkpoint_activations:
            see :class:`DiffusionTask`. The backbone's num_classes and learn_sigma follow from the arguments
            below.
        num_classes: classes of the data.
        label_dropout: share of training samples whose class is replaced by the null label, for
            classifier-free guidance (arXiv 2207.12598).

    Raises:
        UserError: see :class:`DiffusionTask`.
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
        distill: Distillation | None = None,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        init_from: str | None = None,
        train_only: list[str] | None = None,
        checkpoint_activations: Literal["none", "blocks"] = "none",
    ) -> None:
        if num_classes < 1:
            raise UserError(f"model.num_classes is {num_classes}; it must be at least 1")
        options = {
            **(backbone_options or {}),
            "num_classes": num_classes,
            "learn_sigma": build_process(diffusion).out_channels(1) == 2,
        }
        dropout = ("label_dropout", label_dropout)
        shared = (distill, optimizer, schedule, init_from, train_only, checkpoint_activations)
        super().__init__(backbone, attention, options, diffusion, dropout, time_bins, *shared)
        self.num_classes = num_classes
        with torch.device("meta"):
            plan = self._build()
        if not isinstance(plan, ImageDiffusionBackbone):
            raise UserError(
                f"backbone '{backbone}' is no image diffusion model; take dit_s2, dit_b2, dit_l2 or dit_xl2"
            )
        self.sample_shape = (plan.in_channels, *plan.input_size)

    @property
    def null_label(self) -> int:
        """The label of no class."""
        return self.num_classes

    def clean(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(batch, C, H, W): latents, or pixels where the data holds no latents."""
        return batch["latent"] if "latent" in batch else batch["image"]

    def condition(self, batch: Mapping[str, Tensor], dropped: Tensor) -> Tensor:
        """Labels (batch,)."""
        return batch["label"].masked_fill(dropped, self.null_label)

    def example_batch(self, samples: int) -> dict[str, Tensor]:
        latents = torch.empty(samples, *self.sample_shape, device="meta")
        return {"latent": latents, "label": torch.zeros(samples, dtype=torch.int64), **keys(samples)}

    def check_data(self, facts: Mapping[str, Any], micro_batch: int) -> None:
        """Refuses data that this model cannot take, before training.

        Raises:
            UserError: neither images nor latents, another number of channels, another size or number of
                classes.
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
                f"model.num_classes is {self.num_classes} and the data has {facts['classes']} "
                f"classes; set model.num_classes to {facts['classes']}"
            )
