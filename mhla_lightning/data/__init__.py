"""Shards in, batches out. `index`, `check` and `batching` import without torch, so that the command line can plan before it loads anything heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mhla_lightning.data.module import ImageDataModule
    from mhla_lightning.data.transforms import Augmentation

__all__ = ["Augmentation", "ImageDataModule"]


def __getattr__(name: str) -> object:
    """The classes that need torch, imported when they are first asked for."""
    if name == "ImageDataModule":
        from mhla_lightning.data.module import ImageDataModule

        return ImageDataModule
    if name == "Augmentation":
        from mhla_lightning.data.transforms import Augmentation

        return Augmentation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
