"""Text-to-image diffusion, in the latents of an autoencoder or in pixels.

SANA: arXiv 2410.10629; with MHLA: paper Tab. 4.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from mhla_lightning.tasks.text_diffusion import TextBackbone, TextDiffusionTask, Wording


@runtime_checkable
class TextToImageBackbone(TextBackbone, Protocol):
    """What this task asks of a backbone besides the base's :class:`TextBackbone`."""

    grid: tuple[int, int]

    def __call__(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor: ...


class TextToImageTask(TextDiffusionTask):
    """Learns to remove noise from images that a text describes.

    It learns by flow matching with shifted logit-normal times. An image may have another size than the
    backbone's input_size. All samples of a batch have one shape. Rows of text features that are zero are
    padding, which the model does not see.

    Args:
        backbone, attention, backbone_options, diffusion, loss, task: see :class:`TextDiffusionTask`.

    Raises:
        UserError: see :class:`TextDiffusionTask`.
    """

    samples = ("latent", "image")
    wording = Wording(
        "text-to-image diffusion",
        "text-to-image models",
        "sana_600m, sana_1600m or sana_tiny",
        ("captioned_images", "latents"),
        "latents of images, or images with captions",
        ("height", "width"),
    )

    def fits(self, backbone: object) -> bool:
        return isinstance(backbone, TextToImageBackbone) and len(backbone.grid) == len(self.wording.axes)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the prediction (batch, C, height, width).

        Args:
            x: (batch, C, height, width).
            t: model times (batch,).
            condition: text features (batch, rows, channels), zeros after the rows of a text.
        """
        return self.built_backbone()(x, t, condition, condition.ne(0).any(-1))
