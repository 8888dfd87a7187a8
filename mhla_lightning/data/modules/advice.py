"""Advice on sizes of a data set and on the normalisation of its pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

_FEW = 100  # samples of validation
_SHIFT = 0.75  # largest mean of normalised pixels, in deviations; photographs of other cameras stay below
_STRETCH = 2.0  # largest deviation of normalised pixels, and the inverse of the smallest
_SAME = 0.02  # largest difference between two statistics of one data set
_OF_NO_DATA_SET = (((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3))
"""Statistics that only bring pixels to [-1, 1] or leave them in [0, 1]."""


class Pixels(NamedTuple):
    """Mean and standard deviation of pixels in [0, 1], one number a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        """Return both as a recipe has them."""
        return f"mean {_written(self.mean)} and std {_written(self.std)}"


@runtime_checkable
class StartsFromWeights(Protocol):
    """A LightningModule that may start from weights of another training."""

    def start_normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Return mean and std of the images of that training, empty where they are not known.

        None starts from random weights.
        """
        ...


def advice(samples: int, batch_size: int, val_samples: int) -> Iterator[str]:
    """Yield a sentence for each size that a user should know of before training.

    Args:
        samples: of training.
        batch_size: samples of one optimizer step.
        val_samples: of validation; 0 is none.
    """
    if samples < batch_size:
        yield (
            f"the train split has {samples:,} samples and data.batch_size is {batch_size:,}: every step "
            "takes some of them several times"
        )
    if 0 < val_samples < _FEW:
        yield (
            f"the val split has {val_samples:,} samples: one of them is {1 / val_samples:.1%} of an "
            "accuracy, and differences between runs are mostly chance"
        )


def advice_on_pixels(measured: Pixels, used: Pixels) -> Iterator[str]:
    """Yield a sentence where pixels are normalised by statistics that are far from their own.

    Args:
        measured: of some images.
        used: mean and std of the recipe.
    """
    if used in _OF_NO_DATA_SET:
        return
    channels = list(zip(measured.mean, measured.std, used.mean, used.std, strict=True))
    shift = max(abs(mean - used_mean) / used_std for mean, _, used_mean, used_std in channels)
    stretch = max(max(std / used_std, used_std / max(std, 1e-6)) for _, std, _, used_std in channels)
    if shift > _SHIFT or stretch > _STRETCH:
        yield (
            f"data.augmentation normalises pixels by {used}, which are those of other images: these have "
            f"{measured}; set data.augmentation.mean to {_written(measured.mean)} and "
            f"data.augmentation.std to {_written(measured.std)}"
        )


def advice_on_start(start: Pixels, used: Pixels) -> Iterator[str]:
    """Yield a sentence where pixels are normalised otherwise than for the first weights.

    Args:
        start: of those weights; empty where they are not known.
        used: mean and std of the recipe.
    """
    pairs = [*zip(start.mean, used.mean, strict=False), *zip(start.std, used.std, strict=False)]
    if any(abs(one - other) > _SAME for one, other in pairs):
        yield (
            f"the weights of model.init_from were trained on pixels normalised by {start}, and "
            f"data.augmentation normalises by {used}; set data.augmentation.mean and "
            "data.augmentation.std to those of the weights"
        )


def _written(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.3g}' for value in values)}]"
