"""What distinguishes images, tokens and latents: how a sample becomes tensors, and what makes one
unusable.
"""

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
    """One kind of sample, for training with its random numbers and for validation without."""

    @abstractmethod
    def inspect(self, sample: RawSample) -> object:
        """The decoded sample, before any transformation. Raises BadSample with the reason."""

    @abstractmethod
    def train(self, sample: RawSample, epoch: int) -> dict[str, Tensor]:
        """Tensors of one training sample by their key in the batch; random numbers by (seed, epoch,
        index). Raises BadSample.
        """

    def train_batch(self, samples: Sequence[RawSample], epochs: Sequence[int]) -> dict[str, Tensor] | None:
        """The tensors of `train` for B samples at once, (B, ...) each. None: `train` is to be asked, as
        one is bad or nothing would be gained.
        """
        return None

    @abstractmethod
    def evaluate(self, sample: RawSample) -> dict[str, Tensor]:
        """Tensors of one validation sample by their key in the batch. Raises BadSample."""

    @abstractmethod
    def padding(self) -> dict[str, Tensor]:
        """Tensors of a slot without a sample."""

    def read(self, split: Split, samples: Sequence[int]) -> list[RawSample]:
        """Raw samples by index in the split. Raises DataError."""
        return split.read(samples)

    # # most kinds take any index of theirs
    def check(self, index: ShardIndex, address: str) -> None:  # noqa: B027
        """Refuse, before training, a split that does not fit the recipe. Raises DataError."""


def member(sample: RawSample, *extensions: str) -> tuple[str, bytes]:
    """The first of these members that a sample has. Raises BadSample when it has none."""
    for extension in extensions:
        if extension in sample:
            return extension, sample[extension]
    raise BadSample(f"no member {' or '.join(extensions)}")


def label_of(sample: RawSample, classes: int) -> int:
    """The member cls, 0 <= label < classes. Raises BadSample."""
    text = member(sample, "cls")[1].strip()
    if not text.isdigit() or len(text) > 9 or int(text) >= classes:
        raise BadSample(f"cls is {text[:20]!r}; it must be an integer from 0 to {classes - 1}")
    return int(text)


def array_of(sample: RawSample, extension: str) -> np.ndarray:
    """The array of an npy member, checked before memory is taken and never unpickled. Raises BadSample."""
    try:
        return load_npy(member(sample, extension)[1], extension)
    except DataError as error:
        raise BadSample(str(error)) from error
