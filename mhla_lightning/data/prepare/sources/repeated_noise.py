"""Pictures of noise whose lower half repeats the upper half: a test of long range.

Pixels within a half have nothing in common, so a neighbour tells nothing. What helps is the same place of
the other half, half a picture away. A diffusion model that finds it there has two noisy views of each pixel.

Under flow matching the least loss is known. A pixel x of mean 0 and variance 1 is seen in n views. Each is
(1 - t) x + t noise, with a noise of its own. The model guesses the velocity, noise - x, of one of them. Its
best mean squared error is 1 / (t^2 + n (1 - t)^2). Over uniform times the mean of that is pi / (2 sqrt(n)):
1.571 for one view, 1.111 for two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.prepare.samples import Sample, image_sample
from mhla_lightning.data.prepare.sources.base import SampleSource, png_bytes
from mhla_lightning.errors import UserError
from mhla_lightning.randomness import generator

NAME = "repeated_noise"
SIDE, LARGEST = 16, 256  # pixels of a picture
MEAN, STD = 127.5, 42.5  # of 8-bit values: three deviations on either side
PICTURES = {"train": 10_000, "val": 500}
_VERSION = 1  # of the rule; another one makes other pictures


def open_repeated_noise(source: str = NAME) -> SampleSource:
    """Open square RGB pictures of one class: 10,000 to train, 500 to validate.

    A picture depends on its side, split and number alone. Its pixels are normal with MEAN and STD, cut to 8
    bits.

    Args:
        source: repeated_noise[:SIDE].

    Raises:
        UserError: a side that is odd, no number or too large.
    """
    text = source.partition(":")[2] or str(SIDE)
    side = int(text) if text.isascii() and text.isdigit() else 0
    if not 2 <= side <= LARGEST or side % 2:
        raise UserError(
            "source", f"{source} is not of the form {NAME}[:SIDE] with an even SIDE from 2 to {LARGEST}"
        )
    header = ShardIndex("images", (), ("noise",))
    parts = {split: _Noise(header, split, side, range(count)) for split, count in PICTURES.items()}
    return SampleSource(header, {**parts}, f"{NAME} {_VERSION} {side}")


def draw_repeated(side: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a picture, uint8 (side, side, 3)."""
    half = np.rint(rng.normal(MEAN, STD, (side // 2, side, 3))).clip(0, 255).astype(np.uint8)
    return np.concatenate((half, half))


@dataclass(frozen=True)
class _Noise:
    """Some pictures of a split.

    Args:
        header: an index that describes the samples.
        split: train or val.
        side: pixels.
        numbers: of the pictures.
    """

    header: ShardIndex
    split: str
    side: int
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Sample]:
        for number in self.numbers:
            picture = draw_repeated(self.side, generator(NAME, self.side, self.split, number))
            yield image_sample(self.header, f"noise-{number}", png_bytes(Image.fromarray(picture)), 0)

    def take(self, positions: Sequence[int]) -> _Noise:
        return replace(self, numbers=[self.numbers[position] for position in positions])
