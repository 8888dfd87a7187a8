"""Shards in, batches out.

`index`, `order`, `mixture` and `batching` import without torch, so that planning stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mhla_lightning.data.index import TextEncoding
    from mhla_lightning.data.modules.captioned_images import CaptionedImageDataModule
    from mhla_lightning.data.modules.clips import ClipDataModule
    from mhla_lightning.data.modules.images import ImageDataModule
    from mhla_lightning.data.modules.latents import LatentDataModule
    from mhla_lightning.data.modules.options import (
        BucketConfig,
        ClipConfig,
        OrderConfig,
        ReadingConfig,
        TextConfig,
    )
    from mhla_lightning.data.modules.tokens import TokenDataModule
    from mhla_lightning.data.transforms import Augmentation

__all__ = [
    "Augmentation",
    "BucketConfig",
    "CaptionedImageDataModule",
    "ClipConfig",
    "ClipDataModule",
    "ImageDataModule",
    "LatentDataModule",
    "OrderConfig",
    "ReadingConfig",
    "TextConfig",
    "TextEncoding",
    "TokenDataModule",
]

_WHERE = {
    "Augmentation": "mhla_lightning.data.transforms",
    "CaptionedImageDataModule": "mhla_lightning.data.modules.captioned_images",
    "ClipDataModule": "mhla_lightning.data.modules.clips",
    "ImageDataModule": "mhla_lightning.data.modules.images",
    "LatentDataModule": "mhla_lightning.data.modules.latents",
    "BucketConfig": "mhla_lightning.data.modules.options",
    "ClipConfig": "mhla_lightning.data.modules.options",
    "OrderConfig": "mhla_lightning.data.modules.options",
    "ReadingConfig": "mhla_lightning.data.modules.options",
    "TextConfig": "mhla_lightning.data.modules.options",
    "TextEncoding": "mhla_lightning.data.index",
    "TokenDataModule": "mhla_lightning.data.modules.tokens",
}


def __getattr__(name: str) -> object:
    """Import a class that needs torch at its first use."""
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
