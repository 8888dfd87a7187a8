"""Class-conditional image diffusion, in the latents of a VAE or in pixels.

Paper Sec. 5.2; SPEC section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mhla_lightning.backbones import BACKBONES, default_options
from mhla_lightning.diffusion import build_process
from mhla_lightning.errors import UserError, inside
from mhla_lightning.tasks.batches import Stage, entry, keys, named
from mhla_lightning.tasks.diffusion import DiffusionLoss, DiffusionTask, check_loss
from mhla_lightning.tasks.distillation import Distillation
from mhla_lightning.tasks.sizes import sizes_of


@runtime_checkable
class ImageDiffusionBackbone(Protocol):
    """What this task asks of a backbone besides the base's :class:`Backbone`."""

    in_channels: int
    out_channels: int
    input_size: tuple[int, int]
    num_classes: int

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ImageDiffusionLossConfig:
    """The loss of image diffusion.

    Args:
        label_dropout: share of training samples whose class is replaced by the null label, for
            classifier-free guidance (arXiv 2207.12598).
        time_bins, distill: see :class:`DiffusionLoss`.

    Raises:
        UserError: a share outside [0, 1], or no part of the time axis.
    """

    label_dropout: float = 0.1
    time_bins: int = 4
    distill: Distillation | None = None

    def __post_init__(self) -> None:
        check_loss("label_dropout", self.label_dropout, self.time_bins)


class ImageDiffusionTask(DiffusionTask):
    """Learns to remove noise from images of a class.

    The number of classes is the backbone's option num_classes; its option learn_sigma follows from the noise
    process.

    Args:
        backbone, attention, backbone_options, diffusion: see :class:`DiffusionTask`.
        loss: None takes the defaults.
        eval_sizes: sizes of samples, numbers or [height, width], besides the trained one at which validation
            samples are evaluated: `val_64/loss` and so on. None adds none.
        task: further arguments of :class:`Task`: optimizer, schedule, init_from and so on.

    Attributes:
        num_classes: classes without the null label.
        sample_shape: (C, H, W) of backbone_options.input_size.

    Raises:
        UserError: see :class:`DiffusionTask`.
    """

    samples = ("latent", "image")

    def __init__(
        self,
        backbone: str,
        attention: str | Mapping[str, Any] | Sequence[Any] = "mhla",
        backbone_options: Mapping[str, Any] | None = None,
        diffusion: str | Mapping[str, Any] = "ddpm",
        loss: ImageDiffusionLossConfig | None = None,
        eval_sizes: list[int | list[int]] | None = None,
        **task: Any,
    ) -> None:
        if backbone in BACKBONES and "learn_sigma" not in default_options(backbone):
            raise _not_for_images(backbone)
        with inside("diffusion"):
            learns_variance = build_process(diffusion).out_channels(1) == 2
        options = {**(backbone_options or {}), "learn_sigma": learns_variance}
        loss = loss or ImageDiffusionLossConfig()
        super().__init__(
            backbone,
            attention,
            options,
            diffusion,
            DiffusionLoss(loss.label_dropout, loss.time_bins, loss.distill),
            **task,
        )
        with torch.device("meta"):
            plan = self._build()
        if not isinstance(plan, ImageDiffusionBackbone):
            raise _not_for_images(backbone)
        self.num_classes = plan.num_classes
        self.sample_shape = (plan.in_channels, *plan.input_size)
        self.eval_sizes = sizes_of("eval_sizes", eval_sizes, plan.input_size)
        self._let_take(plan)
        self._add_metrics()

    @property
    def null_label(self) -> int:
        """The label of no class."""
        return self.num_classes

    def entries(self, batch: Any, stage: Stage) -> dict[str, Any]:
        """Return the samples and labels of (image, label), or of a mapping.

        Raises UserError where they do not fit this model.
        """
        found = named(batch, ("image", "label"))
        name = next((name for name in self.samples if name in found), "image")
        sample = found.get(name)
        size = tuple(sample.shape[2:]) if isinstance(sample, Tensor) else ()
        size = size if size in (*self.eval_sizes, *self.train_sizes) else self.sample_shape[1:]
        shape = (None, self.sample_shape[0], *size)
        clean = entry(found, name, shape, "float", "samples of about unit size")
        labels = entry(found, "label", (len(clean),), "int64", f"classes from 0 to {self.num_classes - 1}")
        self.label_checks.within(labels, self.num_classes, "backbone_options.num_classes")
        return found

    def empty_condition(self) -> int:
        return self.null_label

    def condition(self, batch: Mapping[str, Tensor], dropped: Tensor) -> Tensor:
        """Return labels (batch,), the null label where the class is dropped."""
        return batch["label"].masked_fill(dropped, self.null_label)

    def example_batch(self, samples: int) -> dict[str, Tensor]:
        size = self.largest_size(self.sample_shape[1:])
        latents = torch.empty(samples, self.sample_shape[0], *size, device="meta")
        return {"latent": latents, "label": torch.zeros(samples, dtype=torch.int64), **keys(samples)}

    def check_data(self, facts: Mapping[str, Any], micro_batch: int) -> None:
        """Refuse data that this model cannot take, before training.

        Raises:
            UserError: neither images nor latents, another number of channels, another size or number of
                classes.
        """
        if facts["kind"] not in ("latents", "images"):
            raise UserError(
                None, f"image diffusion needs images or latents, and the data holds {facts['kind']}"
            )
        self.take_sizes(facts)
        if facts["classes"] != self.num_classes:
            raise UserError(
                "backbone_options.num_classes",
                f"it is {self.num_classes} and the data has {facts['classes']} classes; set it to "
                f"{facts['classes']}",
            )

    def take_sizes(self, facts: Mapping[str, Any]) -> None:
        """Refuse samples of another size than the model's, and let it take those of buckets."""
        latents = facts["kind"] == "latents"
        if not latents and facts["kind"] != "images":
            return
        shape = tuple(facts["vae"].shape) if latents else (3, *facts["image_size"])
        if shape != self.sample_shape:
            key = "data.vae.shape" if latents else "data.image_size"
            raise UserError(
                "backbone_options.input_size",
                f"the model takes samples of {self.sample_shape}, with `model.backbone_options.in_channels` "
                f"first, and the data has {shape} (`{key}`); they must be equal",
            )
        if facts.get("sizes") and self.teacher is not None:
            raise UserError("loss.distill", "a teacher takes samples of one size, and the data has several")
        missing = [size for size in self.eval_sizes if latents and size not in _sizes_of(facts)]
        if missing:
            raise UserError(
                "eval_sizes",
                f"the data has no latents of {missing[0]}, and latents are never resized; add some of that "
                "size to `data.mix`, with `data.order.mix_by` batch",
            )
        super().take_sizes(facts)


def _sizes_of(facts: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Return the sizes of all latents of the data."""
    return [tuple(shape[1:]) for shape in facts.get("shapes", ())]


def _not_for_images(backbone: str) -> UserError:
    return UserError(
        "backbone", f"'{backbone}' is no image diffusion model; take dit_s2, dit_b2, dit_l2 or dit_xl2"
    )
