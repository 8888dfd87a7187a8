"""Sizes of a data set that train and measure less than they seem to."""

from __future__ import annotations

from collections.abc import Iterator

_FEW = 100  # samples of validation


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
