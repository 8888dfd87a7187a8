"""The LightningDataModule of images with captions, in pixels."""

from __future__ import annotations

from typing import Any

from mhla_lightning.data.index import INDEX_NAME, SPLITS, ShardIndex, TextEncoding
from mhla_lightning.data.kinds import CaptionedImages
from mhla_lightning.data.kinds.base import label_of
from mhla_lightning.data.kinds.captions import CAPTION, caption_of
from mhla_lightning.data.modules.images import READING, ImageDataModule
from mhla_lightning.data.modules.options import ORDER, OrderConfig, ReadingConfig
from mhla_lightning.data.modules.text import TextConditioned, demand_words
from mhla_lightning.data.skips import BadSample
from mhla_lightning.data.transforms import Augmentation
from mhla_lightning.errors import DataError


class CaptionedImageDataModule(TextConditioned, ImageDataModule):
    """Images in pixels, and features of their captions, encoded while loading.

    Samples of the shards are images with KEY.txt, and perhaps KEY.cls, which evaluation uses. Batches hold
    `image`, float32 (B, 3, H, W), and `text`, float32 (B, tokens, channels), zero-padded.

    Args:
        text_encoder: the encoder of captions: words:N. Others are too slow here; latents keep their features.
        path, batch_size, micro_batch_size, epochs, order, reading: see :class:`ShardDataModule`.
        image_size, augmentation: see :class:`ImageDataModule`. A text model reads words as they are, so
            leave mirroring and cropping out where a caption tells a side.
        source: raw data with captions that prepare_data packs into `path` when `path` holds no shards yet:
            digit_scenes.
    """

    def __init__(
        self,
        text_encoder: TextEncoding,
        path: str | None = None,
        batch_size: int = 256,
        micro_batch_size: int | None = None,
        epochs: float | None = None,
        image_size: int | tuple[int, int] = 224,
        augmentation: Augmentation | None = None,
        source: str | None = None,
        order: OrderConfig = ORDER,
        reading: ReadingConfig = READING,
    ) -> None:
        """Store and validate the arguments. Raises UserError."""
        super().__init__(
            path, batch_size, micro_batch_size, epochs, image_size, augmentation, source, None, order, reading
        )
        demand_words(text_encoder, "images", "train on latents with text features (LatentDataModule)")
        self.text_encoder = text_encoder

    def kind(self, index: ShardIndex) -> CaptionedImages:
        """Return images with this module's augmentation and text encoder."""
        return CaptionedImages(
            len(index.classes), self.image_size, self.augmentation, self.seed, text=self._encoding()
        )

    def check(self, world_size: int) -> None:
        """Check also the text encoder and the captions. Raises UserError or DataError."""
        super().check(world_size)
        from mhla_lightning.data.encoders.text_encoders import load_text_encoder

        load_text_encoder(self._encoding())  # refuse another encoder than the recipe's now, not in a worker
        for name in SPLITS:
            for split in self.splits(name):
                if split.samples and CAPTION not in split.read([0])[0]:
                    raise DataError(
                        split.store.address(INDEX_NAME),
                        f"its first sample has no caption (KEY.{CAPTION}); text-to-image training needs one "
                        "beside every image",
                    )

    def captions(self, split: str = "val") -> list[tuple[str, int]]:
        """Return the caption and the label of every sample of a split, in its order.

        Raises DataError without such a split, or for a sample without caption or label.
        """
        classes = len(self.index(split).classes)
        found = []
        for part in self.splits(split):
            for sample in part.read(range(part.samples)):
                try:
                    found.append((caption_of(sample), label_of(sample, classes)))
                except BadSample as error:
                    raise DataError(sample["__url__"], f"sample {sample['__key__']}: {error}") from error
        return found

    def facts(self) -> dict[str, Any]:
        """Return the kind, (3, H, W), (tokens, channels) of the text, and the classes."""
        text = self._encoding()
        shares = {} if self.buckets is None else self.shares()
        facts = {
            "kind": "captioned_images",
            "shapes": [(3, *size) for size in dict.fromkeys([self.image_size, *shares])],
            "text": (text.tokens, text.channels),
            "vae": None,
            "classes": self.num_classes,
        }
        return {**facts, "sizes": shares} if shares else facts
