"""Images with captions: KEY.jpg, KEY.png or KEY.webp, KEY.txt, and perhaps KEY.cls."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mhla_lightning.data.index import ShardIndex, TextEncoding
from mhla_lightning.data.kinds.captions import caption_features
from mhla_lightning.data.kinds.images import Images
from mhla_lightning.data.members import RawSample
from mhla_lightning.errors import DataError


@dataclass
class CaptionedImages(Images):
    """Images as float32 (3, H, W), and features of their captions in place of labels.

    The features are float32 (tokens, channels), zero-padded.

    Args:
        classes, size, augmentation, seed: see :class:`Images`.
        text: encoder of the captions.
    """

    text: TextEncoding = field(kw_only=True)

    def train(self, sample: RawSample, epoch: int) -> dict[str, Tensor]:
        """Augment by random numbers of (seed, epoch, index)."""
        return self._captioned(super().train(sample, epoch)["image"], sample)

    def evaluate(self, sample: RawSample) -> dict[str, Tensor]:
        """Resize and crop."""
        return self._captioned(super().evaluate(sample)["image"], sample)

    def padding(self) -> dict[str, Tensor]:
        """Return a black image without text."""
        return {
            "image": torch.zeros(3, *self.size),
            "text": torch.zeros(self.text.tokens, self.text.channels),
        }

    def check(self, index: ShardIndex, address: str) -> None:
        """Refuse anything but images; they need no classes."""
        if index.kind != "images":
            raise DataError(address, f"it holds {index.kind}; images with captions are needed")

    def _captioned(self, image: Tensor, sample: RawSample) -> dict[str, Tensor]:
        return {"image": image, "text": caption_features(sample, self.text)}
