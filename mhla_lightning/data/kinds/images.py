"""Images: KEY.jpg, KEY.png or KEY.webp, and KEY.cls.

Images with captions, KEY.txt or KEY.json, need no class; see captioned_images.py and `mhla data latents`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.kinds.base import Kind, label_of, member
from mhla_lightning.data.members import IMAGE_EXTENSIONS, RawSample, image_extension
from mhla_lightning.data.pixels import BadImage, decode
from mhla_lightning.data.skips import BadSample
from mhla_lightning.data.transforms import Augmentation, Transform, eval_transform, train_transform
from mhla_lightning.errors import DataError
from mhla_lightning.randomness import sample_rng


@dataclass
class Images(Kind):
    """Images as float32 (3, H, W) and labels as int64 ().

    Args:
        classes: number of classes; 0 where images have captions, for tools.
        size: (height, width) in pixels after the transformation.
        augmentation: of training and validation.
        seed: of the augmentation.
    """

    classes: int
    size: tuple[int, int] = (224, 224)
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise UserError for an augmentation that timm does not know."""
        self._train: Transform = train_transform(self.size, self.augmentation)
        self._eval: Transform = eval_transform(self.size, self.augmentation)

    def inspect(self, sample: RawSample) -> tuple[Image.Image, int]:
        """Return the RGB image and the label, 0 where images have captions."""
        return decode_image(sample), label_of(sample, self.classes) if self.classes else 0

    def train(self, sample: RawSample, epoch: int) -> dict[str, Tensor]:
        """Augment by random numbers of (seed, epoch, index)."""
        image, label = self.inspect(sample)
        with sample_rng(self.seed, "augmentation", epoch, sample["__index__"]):
            return {"image": self._train(image), "label": torch.tensor(label)}

    def evaluate(self, sample: RawSample) -> dict[str, Tensor]:
        """Resize and crop."""
        image, label = self.inspect(sample)
        return {"image": self._eval(image), "label": torch.tensor(label)}

    def padding(self) -> dict[str, Tensor]:
        """Return a black image of class 0."""
        return {"image": torch.zeros(3, *self.size), "label": torch.tensor(0)}

    def check(self, index: ShardIndex, address: str) -> None:
        """Refuse anything but images with classes."""
        if index.kind != "images" or not index.classes:
            raise DataError(
                address,
                f"it holds {index.kind} with {len(index.classes)} classes; images with classes are needed",
            )


def decode_image(sample: RawSample) -> Image.Image:
    """Decode the image of a raw sample to upright RGB (see pixels.py).

    Raises BadSample with the reason.
    """
    extension, data = member(sample, *IMAGE_EXTENSIONS)
    if image_extension(data) is None:
        raise BadSample(f"member {extension} is neither JPEG, PNG nor WebP")
    try:
        image = decode(data).image
    except BadImage as reason:
        raise BadSample(f"image cannot be decoded: {reason}") from reason
    return image if image.mode == "RGB" else image.convert("RGB")
