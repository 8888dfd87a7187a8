"""Augmentation by timm, and random numbers that belong to the sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mhla_lightning.errors import UserError

ImageSize = int | tuple[int, int]
Transform = Callable[[Image.Image], torch.Tensor]


@dataclass(frozen=True)
class Augmentation:
    """Image preprocessing, with the names of timm.data.create_transform.

    The defaults are DeiT's training recipe for ImageNet-1k.

    Args:
        scale: smallest and largest area of the random crop, as shares of the image.
        ratio: smallest and largest aspect ratio of the random crop.
        hflip: probability of mirroring from left to right.
        vflip: probability of mirroring from top to bottom.
        color_jitter: strength; timm leaves it out where `auto_augment` is on. None is off.
        auto_augment: a RandAugment, AutoAugment or AugMix string of timm; None is off.
        interpolation: of the random crop; `random` draws bilinear or bicubic.
        eval_interpolation: of resizing for validation.
        re_prob: probability of random erasing.
        re_mode: content of the erased area.
        re_count: largest number of erased areas.
        crop_pct: share of the image's side that the crop of validation keeps.
        crop_mode: how validation crops.
        mean: of the pixels in [0, 1], one value a channel.
        std: of the pixels in [0, 1], one value a channel.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float | None = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    interpolation: Literal["random", "bilinear", "bicubic", "nearest"] = "random"
    eval_interpolation: Literal["bilinear", "bicubic", "nearest"] = "bicubic"
    re_prob: float = 0.25
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    re_count: int = 1
    crop_pct: float = 0.875
    crop_mode: Literal["center", "squash", "border"] = "center"
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        for name in ("hflip", "vflip", "re_prob"):
            _demand(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a probability from 0 to 1")
        _demand(
            0 < self.scale[0] <= self.scale[1] <= 1,
            "scale",
            self.scale,
            "(low, high) with 0 < low <= high <= 1",
        )
        _demand(0 < self.ratio[0] <= self.ratio[1], "ratio", self.ratio, "(low, high) with 0 < low <= high")
        _demand(0 < self.crop_pct <= 1, "crop_pct", self.crop_pct, "above 0 and at most 1")
        _demand(len(self.mean) == 3, "mean", self.mean, "three numbers")
        _demand(len(self.std) == 3 and min(self.std) > 0, "std", self.std, "three numbers above 0")
        _demand(self.re_count >= 1, "re_count", self.re_count, "at least 1")

    def for_timm(self) -> dict[str, Any]:
        """Return the preprocessing of validation, with the keys of timm's pretrained_cfg."""
        shared = {name: getattr(self, name) for name in ("crop_pct", "crop_mode", "mean", "std")}
        return {**shared, "interpolation": self.eval_interpolation}


def image_hw(size: ImageSize, key: str = "image_size") -> tuple[int, int]:
    """Return (height, width) of a size given as one int or as a pair.

    Raises UserError, with this key, unless both are at least 1.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise UserError(key, f"{size} is too small; it must be at least 1 in height and width")
    return height, width


def train_transform(size: ImageSize, augmentation: Augmentation) -> Transform:
    """Build the transform of training: PIL image -> float32 (3, H, W).

    It draws from the global generators (see sample_rng). Raises UserError for an auto_augment that timm does
    not know.
    """
    a = augmentation
    try:
        transform = create_transform(
            image_hw(size),
            is_training=True,
            scale=a.scale,
            ratio=a.ratio,
            hflip=a.hflip,
            vflip=a.vflip,
            color_jitter=a.color_jitter,  # type: ignore[arg-type]  # timm takes None, its annotation does not
            auto_augment=a.auto_augment,
            interpolation=a.interpolation,
            mean=a.mean,
            std=a.std,
            re_prob=a.re_prob,
            re_mode=a.re_mode,
            re_count=a.re_count,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            "augmentation.auto_augment",
            f"timm knows no policy {a.auto_augment!r}; one that works is rand-m9-mstd0.5-inc1",
        ) from error
    for op in chain.from_iterable(_augment_ops(part) for part in transform.transforms):
        if op.aug_fn is posterize:
            op.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **unused: Any) -> Image.Image:
    """Apply timm's posterize; draw the black image of 0 bits, which Pillow 13 refuses."""
    return posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


def _augment_ops(policy: Any) -> Iterator[AugmentOp]:
    """Yield the operations of timm's RandAugment and AugMix (`ops`) or AutoAugment (`policy`)."""
    for op in [*getattr(policy, "ops", ()), *chain(*getattr(policy, "policy", ()))]:
        if isinstance(op, AugmentOp):
            yield op


def eval_transform(size: ImageSize, augmentation: Augmentation) -> Transform:
    """Build the transform of validation, without randomness: PIL image -> float32 (3, H, W)."""
    a = augmentation
    return create_transform(
        image_hw(size),
        is_training=False,
        interpolation=a.eval_interpolation,
        crop_pct=a.crop_pct,
        crop_mode=a.crop_mode,
        mean=a.mean,
        std=a.std,
    )


def _demand(fine: bool, name: str, value: object, allowed: str) -> None:
    if not fine:
        raise UserError(f"augmentation.{name}", f"{value} is not allowed; it must be {allowed}")
