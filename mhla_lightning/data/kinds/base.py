"""The interface of kinds of samples: from a sample to tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.members import RawSample
from mhla_lightning.data.npy import load_npy
from mhla_lightning.data.skips import BadSample
from mhla_lightning.data.split import Split
from mhla_lightning.errors import DataError


class Kind(ABC):
    """One kind of sample, with random numbers for training and without for validation."""

    @abstractmethod
    def inspect(self, sample: RawSample) -> object:
        """Decode a sample, without any transformation. Raises BadSample with the reason."""

    @abstractmethod
    def train(self, sample: RawSample, epoch: int) -> dict[str, Tensor]:
        """Return the tensors of one training sample by their key in the batch. Raises BadSample.

        Random numbers depend on (seed, epoch, index).
        """

    def train_batch(self, samples: Sequence[RawSample], epochs: Sequence[int]) -> dict[str, Tensor] | None:
        """Return the tensors of `train` for B samples at once, (B, ...) each.

        None means that `train` must be called for each: one sample is bad, or nothing would be gained.
        """
        return None

    @abstractmethod
    def evaluate(self, sample: RawSample) -> dict[str, Tensor]:
        """Return the tensors of one validation sample by their key in the batch. Raises BadSample."""

    @abstractmethod
    def padding(self) -> dict[str, Tensor]:
        """Return the tensors of a slot without a sample."""

    def read(self, split: Split, samples: Sequence[int]) -> list[RawSample]:
        """Read raw samples by index in the split. Raises DataError."""
        return split.read(samples)

    def check(self, index: ShardIndex, address: str) -> None:  # noqa: B027  most kinds accept any index
        """Refuse, before training, a split that does not fit the recipe. Raises DataError."""


def member(sample: RawSample, *extensions: str) -> tuple[str, bytes]:
    """Return the first of these members that a sample has. Raises BadSample without one."""
    for extension in extensions:
        if extension in sample:
            return extension, sample[extension]
    raise BadSample(f"no member {' or '.join(extensions)}")


def label_of(sample: RawSample, classes: int) -> int:
    """Return the member cls, 0 <= label < classes. Raises BadSample."""
    text = member(sample, "cls")[1].strip()
    if not text.isdigit() or len(text) > 9 or int(text) >= classes:
        raise BadSample(f"cls is {text[:20]!r}; it must be an integer from 0 to {classes - 1}")
    return int(text)


def array_of(sample: RawSample, extension: str) -> np.ndarray:
    """Return the array of an npy member, checked before memory is taken. Raises BadSample."""
    try:
        return load_npy(member(sample, extension)[1], extension)
    except DataError as error:
        raise BadSample(str(error)) from error
