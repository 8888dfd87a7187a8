"""Text-conditional video diffusion, in the latents of a VAE or in pixels.

Paper Sec. 5.4; SPEC section 6.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from mhla_lightning.tasks.text_diffusion import TextBackbone, TextDiffusionTask, Wording


@runtime_checkable
class VideoDiffusionBackbone(TextBackbone, Protocol):
    """What this task asks of a backbone besides the base's :class:`TextBackbone`."""

    grid: tuple[int, int, int]

    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor: ...


class VideoDiffusionTask(TextDiffusionTask):
    """Learns to remove noise from videos that a text describes (SPEC 6.6).

    It learns by flow matching with shifted logit-normal times. A video may have another length and size than
    the backbone's input_size, and an image is a video of one frame. All samples of a batch have one shape.

    Args:
        backbone, attention, backbone_options, diffusion, loss, task: see :class:`TextDiffusionTask`.

    Raises:
        UserError: see :class:`TextDiffusionTask`.
    """

    samples = ("latent", "clip")
    wording = Wording(
        "video diffusion",
        "video models",
        "wan_1_3b or wan_tiny",
        ("clips", "video_latents"),
        "clips or video latents",
        ("frames", "height", "width"),
    )

    def fits(self, backbone: object) -> bool:
        return isinstance(backbone, VideoDiffusionBackbone) and len(backbone.grid) == len(self.wording.axes)
