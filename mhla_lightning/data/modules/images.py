"""The LightningDataModule of labelled images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhla_lightning.data.corpus import DataSource
from mhla_lightning.data.index import INDEX_NAME, SPLITS, ShardIndex
from mhla_lightning.data.kinds import Images
from mhla_lightning.data.modules.advice import Pixels, StartsFromWeights, advice_on_pixels, advice_on_start
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.data.modules.options import ORDER, OrderConfig, ReadingConfig
from mhla_lightning.data.skips import BadSample
from mhla_lightning.data.transforms import Augmentation, image_hw
from mhla_lightning.errors import DataError

_READING = ReadingConfig(num_workers=4)
_MEASURED = 32  # images whose pixels are compared with the normalisation
_THUMBNAIL = (64, 64)  # pixels; statistics of larger images are the same


class ImageDataModule(ShardDataModule):
    """Labelled images from shards.

    Args:
        path, mix, batch_size, micro_batch_size, epochs, order, reading: see :class:`ShardDataModule`.
        image_size: height and width in pixels, one number or a pair.
        augmentation: preprocessing of training and validation; None is the ImageNet recipe of DeiT.
        source: raw data that prepare_data packs into `path` when `path` holds no shards yet, e.g. mnist,
            fashion_mnist, a folder, torchvision:CIFAR10.
    """

    def __init__(
        self,
        path: str | None = None,
        batch_size: int = 256,
        micro_batch_size: int | None = None,
        epochs: float | None = None,
        image_size: int | tuple[int, int] = 224,
        augmentation: Augmentation | None = None,
        source: str | None = None,
        mix: list[DataSource] | None = None,
        order: OrderConfig = ORDER,
        reading: ReadingConfig = _READING,
    ) -> None:
        """Store and validate the arguments. Raises UserError."""
        super().__init__(path, mix, batch_size, micro_batch_size, epochs, order, reading)
        self._take_source(source, path)
        self.image_size, self.augmentation = image_hw(image_size), augmentation or Augmentation()
        Images(1, self.image_size, self.augmentation)  # refuses an unknown policy before training

    def _pack(self, source: str, folder: Path) -> None:
        from mhla_lightning.data.prepare.pack import pack

        pack(source, folder)

    def kind(self, index: ShardIndex) -> Images:
        """Return images with this module's augmentation."""
        return Images(len(index.classes), self.image_size, self.augmentation, self.seed)

    def check(self, world_size: int) -> None:
        """Check also that all splits have the same classes."""
        super().check(world_size)
        for name in SPLITS:
            for split in self.splits(name):
                if split.index.classes != self.index().classes:
                    raise DataError(
                        split.store.address(INDEX_NAME),
                        f"its classes differ from those of {self.sources[0].path}; data sets that are used "
                        "together need one list of classes",
                    )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.index().classes)

    def sample_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the tensor that :meth:`to_images` makes such an image of."""
        return height, width

    def to_images(self, x: Tensor) -> Tensor:
        """Return normalised pixels (batch, 3, H, W) as uint8 (batch, H, W, 3)."""
        mean, std = (
            torch.tensor(values, device=x.device)[:, None, None]
            for values in (self.augmentation.mean, self.augmentation.std)
        )
        return ((x.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def further_advice(self) -> Iterator[str]:
        """Yield a sentence where pixels are normalised for other images or other weights."""
        used = Pixels(tuple(self.augmentation.mean), tuple(self.augmentation.std))
        module = None if self.trainer is None else self.trainer.lightning_module
        start = module.start_normalisation() if isinstance(module, StartsFromWeights) else None
        if start is not None:
            yield from advice_on_start(Pixels(*start), used)
        elif all("://" not in source.path for source in self.sources):  # else whole shards would be fetched
            measured = self._measured_pixels()
            yield from () if measured is None else advice_on_pixels(measured, used)

    def _measured_pixels(self) -> Pixels | None:
        """Return the statistics of some training images, evenly over the split; None without any."""
        split = self.splits("train")[0]
        kind, found = self.kind(split.index), list[np.ndarray]()
        for number in range(min(_MEASURED, split.samples)):
            raw = kind.read(split, [number * split.samples // min(_MEASURED, split.samples)])[0]
            with suppress(BadSample):
                image, _ = kind.inspect(raw)
                image.thumbnail(_THUMBNAIL)
                found.append(np.asarray(image, dtype=np.float64).reshape(-1, 3) / 255)
        if not found:
            return None
        mean = np.mean([pixels.mean(0) for pixels in found], axis=0)
        square = np.mean([(pixels**2).mean(0) for pixels in found], axis=0)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        return Pixels(tuple(map(float, mean)), tuple(map(float, std)))

    def facts(self) -> dict[str, Any]:
        """Return the kind, the number of classes, and (height, width) of the images."""
        return {"kind": "images", "classes": self.num_classes, "image_size": self.image_size}
