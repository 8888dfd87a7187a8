"""Mixup and cutmix of pairs; the random numbers of a pair depend on the pair alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data.mixup import one_hot
from torch import Tensor

from mhla_lightning.randomness import generator

MIXUP = "mixup"
"""Key of a batch whose mixtures are drawn already."""


@dataclass(frozen=True)
class PairMix:
    """Mixes each image with its neighbour in the batch: 0 with 1, 2 with 3, ...

    The loader keeps these pairs together on any number of ranks, so the mixture is a function of the global
    batch. timm's Mixup uses the process's generator and pairs by the place in the micro batch: both change
    with the number of processes.

    Args:
        mixup: alpha of mixup's Beta distribution (arXiv 1710.09412); 0 is off.
        cutmix: alpha of cutmix's (arXiv 1905.04899); 0 is off.
        prob: share of pairs that are mixed.
        switch_prob: share of mixed pairs that take cutmix when both are on.
        label_smoothing: mass spread over all classes.
        num_classes: classes of the data.
    """

    mixup: float
    cutmix: float
    prob: float
    switch_prob: float
    label_smoothing: float
    num_classes: int

    def __call__(
        self, images: Tensor, labels: Tensor, epochs: Tensor, indices: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Return mixed images (B, C, H, W) and soft targets (B, classes).

        Args:
            images: (B, C, H, W); B is even.
            labels: (B,).
            epochs, indices: int64 (B,) of the samples; the first sample of a pair keys its random numbers.
            seed: the run's.
        """
        table = self.table(images.shape[-2:], epochs, indices, seed)
        return self.mix(images, labels, table.to(images.device))

    def table(self, size: Sequence[int], epochs: Tensor, indices: Tensor, seed: int) -> Tensor:
        """Return the mixtures of all pairs, float32 (B / 2, 6) on the host.

        Args:
            size: height and width of the images.
            epochs, indices, seed: see :meth:`__call__`.
        """
        height, width = size
        pairs = zip(epochs[::2].tolist(), indices[::2].tolist(), strict=True)
        return torch.tensor([self._draw(height, width, seed, *key) for key in pairs], dtype=torch.float32)

    def mix(self, images: Tensor, labels: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images and soft targets as :meth:`__call__` does, from a :meth:`table`."""
        height, width = images.shape[-2:]
        blend, keep, top, bottom, left, right = table[:, :, None, None, None].unbind(1)
        rows = torch.arange(height, device=images.device)[:, None]
        columns = torch.arange(width, device=images.device)
        inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # (pairs, 1, H, W)
        pairs = images.unflatten(0, (-1, 2))
        blend = blend[:, None].to(images.dtype)
        mixed = torch.where(
            inside[:, None], pairs.flip(1), blend * pairs + (1 - blend) * pairs.flip(1)
        ).flatten(0, 1)
        off = self.label_smoothing / self.num_classes
        targets = one_hot(labels, self.num_classes, 1 - self.label_smoothing + off, off).unflatten(0, (-1, 2))
        share = keep.view(-1, 1, 1)
        return mixed, (share * targets + (1 - share) * targets.flip(1)).flatten(0, 1)

    def _draw(
        self, height: int, width: int, seed: int, epoch: int, index: int
    ) -> tuple[float, float, int, int, int, int]:
        """Return the mixture of one pair.

        Returns:
            Weight of the own pixels outside the box, share of the own label, and the box: top, bottom, left,
            right. The box holds the neighbour's pixels.
        """
        rng = generator(seed, "mixup", epoch, index)
        if rng.random() >= self.prob:
            return 1.0, 1.0, 0, 0, 0, 0
        if self.cutmix == 0 or (self.mixup > 0 and rng.random() >= self.switch_prob):
            share = float(rng.beta(self.mixup, self.mixup))
            return share, share, 0, 0, 0, 0
        side = np.sqrt(1 - rng.beta(self.cutmix, self.cutmix))
        top, bottom = _cut(height, side, int(rng.integers(height)))
        left, right = _cut(width, side, int(rng.integers(width)))
        return 1.0, 1 - (bottom - top) * (right - left) / (height * width), top, bottom, left, right


def _cut(length: int, side: float, centre: int) -> tuple[int, int]:
    half = int(length * side) // 2
    return max(0, centre - half), min(length, centre + half)


@dataclass(frozen=True)
class PairDraws:
    """Draws the mixtures of a batch's pairs on the host, as the entry `mixup` of the batch.

    Args:
        pairs: draws.
        seed: the run's.
    """

    pairs: PairMix
    seed: int

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors to add to a batch."""
        table = self.pairs.table(batch["image"].shape[-2:], batch["epoch"], batch["index"], self.seed)
        # As bits: a precision of bf16-true rounds every float of a batch.
        return {MIXUP: table.view(torch.int32)}
