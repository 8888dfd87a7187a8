"""The LightningDataModule of labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhla_lightning.data.check import Verify
from mhla_lightning.data.corpus import Source
from mhla_lightning.data.index import INDEX_NAME, SPLITS, ShardIndex
from mhla_lightning.data.kinds import Images
from mhla_lightning.data.loader import Loading
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.data.order import LANES, WINDOW
from mhla_lightning.data.stores import Remote
from mhla_lightning.data.transforms import Augmentation, image_hw
from mhla_lightning.errors import DataError


class ImageDataModule(ShardDataModule):
    """Labelled images from shards.

    Args:
        path, batch_size, micro_batch_size, epochs, num_workers, mix: see :class:`ShardDataModule`.
        image_size: height and width in pixels, one number or a pair.
        augmentation: None is the ImageNet recipe of DeiT.
        source: packed into `path` by prepare_data when `path` holds no shards yet, e.g. mnist, a folder,
            torchvision:CIFAR10.
        lanes, window, seed, max_skipped_share, verify, loading, remote: see :class:`ShardDataModule`.
    """

    def __init__(
        self,
        path: str | None = None,
        batch_size: int = 256,
        micro_batch_size: int | None = None,
        epochs: float | None = None,
        image_size: int | tuple[int, int] = 224,
        num_workers: int = 4,
        augmentation: Augmentation | None = None,
        source: str | None = None,
        mix: list[Source] | None = None,
        lanes: int = LANES,
        window: int = WINDOW,
        seed: int | None = None,
        max_skipped_share: float = 0.01,
        verify: Verify = "auto",
        loading: Loading | None = None,
        remote: Remote | None = None,
    ) -> None:
        """Store and validate the arguments. Raises UserError."""
        super().__init__(
            path,
            batch_size,
            micro_batch_size,
            epochs,
            num_workers,
            mix,
            lanes,
            window,
            seed,
            max_skipped_share,
            verify,
            loading,
            remote,
        )
        self._take_source(source, path)
        self.image_size, self.augmentation = image_hw(image_size), augmentation or Augmentation()
        Images(1, self.image_size, self.augmentation)  # refuses unknown policies now

    def _pack(self, source: str, folder: Path) -> None:
        from mhla_lightning.data.prepare.pack import pack

        pack(source, folder)

    def kind(self, index: ShardIndex) -> Images:
        """Images with this module's augmentation."""
        return Images(len(index.classes), self.image_size, self.augmentation, self.seed)

    def check(self, world_size: int) -> None:
        """Also that all splits have the same classes."""
        super().check(world_size)
        for name in SPLITS:
            for split in self.splits(name):
                if split.index.classes != self.index().classes:
                    address = split.store.address(INDEX_NAME)
                    raise DataError(
                        f"{address} lists other classes than {self.sources[0].path}: data used "
                        "together has one list of classes"
                    )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.index().classes)

    def to_images(self, x: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, H, W) back to uint8 (batch, H, W, 3)."""
        mean, std = (
            torch.tensor(values, device=x.device)[:, None, None]
            for values in (self.augmentation.mean, self.augmentation.std)
        )
        return ((x.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def facts(self) -> dict[str, Any]:
        """Kind, classes and (height, width) of the images."""
        return {"kind": "images", "classes": self.num_classes, "image_size": self.image_size}
