"""Masks of real tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mhla_lightning.errors import UserError


def check_mask(mask: Tensor | None, shape: Sequence[int] | None = None, key: str = "mask") -> None:
    """Refuse a mask that is not bool.

    Numbers mean different things elsewhere: 1 and 0, or 0 and -inf to be added to scores.

    Args:
        mask: None passes.
        shape: that it must have; None allows any.
        key: of the error.

    Raises:
        UserError: another type or shape.
    """
    if mask is None:
        return
    if mask.dtype != torch.bool:
        kind = str(mask.dtype).removeprefix("torch.")
        raise UserError(key, f"it holds {kind}; give bool, True = a real token, such as mask > 0")
    if shape is not None and mask.shape != torch.Size(shape):
        raise UserError(key, f"its shape is {tuple(mask.shape)}; it must be {tuple(shape)}")
