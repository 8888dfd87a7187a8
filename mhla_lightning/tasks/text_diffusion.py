"""Text-conditional diffusion of images and of videos, in the latents of a VAE or in pixels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from mhla_lightning.diffusion import build_process
from mhla_lightning.errors import UserError, inside
from mhla_lightning.tasks.batches import Stage, entry, keys, named
from mhla_lightning.tasks.diffusion import DiffusionLoss, DiffusionTask, check_loss
from mhla_lightning.tasks.distillation import Distillation


class TextBackbone(Protocol):
    """What these tasks ask of a backbone besides the base's :class:`Backbone`."""

    in_channels: int
    input_size: tuple[int, ...]
    text_dim: int
    text_length: int

    def check_size(self, shape: Sequence[int]) -> object: ...


@dataclass(frozen=True)
class Wording:
    """What the samples of a task are, in words.

    Args:
        task: name of what is learned, such as `video diffusion`.
        models: such as `video models`.
        backbones: some that fit.
        kinds: kinds of data that fit.
        data: these kinds in words.
        axes: name of each axis of a sample, after the channels.
    """

    task: str
    models: str
    backbones: str
    kinds: tuple[str, ...]
    data: str
    axes: tuple[str, ...]


@runtime_checkable
class GivesNullText(Protocol):
    """What these tasks ask of a data module."""

    def null_text(self) -> Tensor: ...


@dataclass(frozen=True)
class TextDiffusionLossConfig:
    """The loss of diffusion with a text.

    Args:
        text_dropout: share of training samples whose text is replaced by the empty prompt, for
            classifier-free guidance.
        time_bins, distill: see :class:`DiffusionLoss`.

    Raises:
        UserError: a share outside [0, 1], or no part of the time axis.
    """

    text_dropout: float = 0.1
    time_bins: int = 4
    distill: Distillation | None = None

    def __post_init__(self) -> None:
        check_loss("text_dropout", self.text_dropout, self.time_bins)


class TextDiffusionTask(DiffusionTask):
    """Learns to remove noise from samples that a text describes.

    It learns by flow matching with shifted logit-normal times. Samples may have another size than the
    backbone's input_size. All samples of a batch have one shape.

    Args:
        backbone, attention, backbone_options, diffusion: see :class:`DiffusionTask`.
        loss: None takes the defaults.
        task: further arguments of :class:`Task`: optimizer, schedule, init_from and so on.

    Attributes:
        wording: what the samples are.
        sample_shape: (C, ...) of backbone_options.input_size.
        text_shape: largest (tokens, channels) of the text features.
        null_text: (tokens, channels), the features of the empty prompt, which training takes from its data.
            No checkpoint holds it, because sampling encodes the empty prompt together with the others.

    Raises:
        UserError: see :class:`DiffusionTask`; a process that learns a variance, which these models do not
            predict.
    """

    wording: ClassVar[Wording]

    def __init__(
        self,
        backbone: str,
        attention: str | Mapping[str, Any] | Sequence[Any] = "mhla",
        backbone_options: Mapping[str, Any] | None = None,
        diffusion: str | Mapping[str, Any] = "flow",
        loss: TextDiffusionLossConfig | None = None,
        **task: Any,
    ) -> None:
        with inside("diffusion"):
            process = build_process(diffusion)
        if process.out_channels(1) != 1:
            raise UserError(
                "diffusion",
                f"'{process.name}' learns a variance, which {self.wording.models} do not predict; take flow",
            )
        loss = loss or TextDiffusionLossConfig()
        super().__init__(
            backbone,
            attention,
            backbone_options,
            diffusion,
            DiffusionLoss(loss.text_dropout, loss.time_bins, loss.distill),
            **task,
        )
        plan = self._plan()
        self.sample_shape = (plan.in_channels, *plan.input_size)
        self.text_shape = (plan.text_length, plan.text_dim)
        # No buffer: DDP broadcasts buffers before every forward.
        self.null_text = torch.zeros(self.text_shape)

    @abstractmethod
    def fits(self, backbone: object) -> bool:
        """Return whether a backbone draws such samples."""

    def _plan(self) -> TextBackbone:
        with torch.device("meta"):
            plan = self._build()
        if not self.fits(plan):
            raise UserError(
                "backbone",
                f"'{self.backbone_name}' is no {self.wording.task} model; take {self.wording.backbones}",
            )
        return cast(TextBackbone, plan)

    def check_size(self, size: Sequence[int]) -> None:
        """Refuse a size that the patch or a layer's blocks cannot take.

        Args:
            size: of a latent (or of pixels) along each axis.

        Raises:
            UserError: names the nearest sizes that work.
        """
        self._plan().check_size(size)

    def entries(self, batch: Any, stage: Stage) -> dict[str, Any]:
        """Return samples and text of a pair, or of a mapping of `text` and a key of `samples`.

        Raises UserError where they do not fit this model.
        """
        usual = self.samples[-1]
        found = named(batch, (usual, "text"))
        name = next((name for name in self.samples if name in found), usual)
        axes = self.wording.axes
        shape = (None, self.sample_shape[0], *(None for _ in axes))
        clean = entry(found, name, shape, "float", f"samples (batch, channels, {', '.join(axes)})")
        tokens, channels = self.text_shape
        text = entry(found, "text", (len(clean), None, channels), "float", f"at most {tokens} text features")
        if text.shape[1] > tokens:
            raise UserError("batch.text", f"it has {text.shape[1]} tokens, and the model takes {tokens}")
        return found

    def empty_condition(self) -> Tensor:
        return self.null_text

    def condition(self, batch: Mapping[str, Tensor], dropped: Tensor) -> Tensor:
        """Return text features (batch, tokens, channels), the empty prompt's where dropped."""
        text = batch["text"]
        return torch.where(dropped[:, None, None], self.null_text[: text.shape[1]].to(text), text)

    def example_batch(self, samples: int) -> dict[str, Tensor]:
        size = self.largest_size(self.sample_shape[1:])
        shapes = {"latent": (self.sample_shape[0], *size), "text": self.text_shape}
        return {name: torch.empty(samples, *shape, device="meta") for name, shape in shapes.items()} | keys(
            samples
        )

    def on_train_start(self) -> None:
        super().on_train_start()
        self._take_null_text()

    def on_predict_start(self) -> None:
        """Take the features of the empty prompt, which only guidance needs here."""
        if self.sampling.guidance.scale != 1:
            self._take_null_text()

    def _take_null_text(self) -> None:
        data = cast(Any, self.trainer).datamodule
        if not isinstance(data, GivesNullText):
            raise UserError(None, f"{type(data).__name__} has no features of the empty prompt (null_text)")
        found = data.null_text()
        self.null_text = torch.nn.functional.pad(
            found.float(), (0, 0, 0, len(self.null_text) - len(found))
        ).to(self.device)

    def check_data(self, facts: Mapping[str, Any], micro_batch: int) -> None:
        """Refuse data that this model cannot take, before training.

        Raises:
            UserError: another kind of data; another number of channels; a size that the patch or a layer's
                blocks cannot take; too many text features, or features of another width.
        """
        if facts["kind"] not in self.wording.kinds:
            raise UserError(
                None, f"{self.wording.task} needs {self.wording.data}, and the data holds {facts['kind']}"
            )
        plan = self._plan()
        for channels, *size in facts["shapes"]:
            if channels != plan.in_channels:
                raise UserError(
                    "backbone_options.in_channels",
                    f"it is {plan.in_channels}, and the data's samples have {channels} channels",
                )
            try:
                plan.check_size(size)
            except UserError as error:
                raise UserError("backbone_options.input_size", error.reason or "") from error
        if facts["text"] is None:
            raise UserError(
                None,
                f"{self.wording.task} needs text features, and `data.text_encoder` does not describe them: "
                "name, tokens and channels",
            )
        tokens, channels = facts["text"]
        if channels != plan.text_dim:
            raise UserError(
                "backbone_options.text_dim",
                f"it is {plan.text_dim}, and the data's text features have {channels} channels",
            )
        if tokens > plan.text_length:
            raise UserError(
                "backbone_options.text_length",
                f"it is {plan.text_length}, and the data's text features have {tokens} tokens; it must be at "
                "least that",
            )
