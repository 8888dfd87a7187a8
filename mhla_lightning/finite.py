"""Weights that are no numbers: NaN and infinite values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mhla_lightning.errors import UserError

_TESTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What torch can test; narrower types are widened."""


def not_finite(value: Tensor) -> str:
    """Return `NaN` or `an infinite number` where a tensor holds one, else an empty text."""
    if not value.is_floating_point() or value.is_meta:
        return ""
    wide = value if value.dtype in _TESTED else value.float()
    if bool(torch.isfinite(wide).all()):
        return ""
    return "NaN" if bool(torch.isnan(wide).any()) else "an infinite number"


def check_finite(tensors: Mapping[str, Tensor], key: str, where: str = "") -> None:
    """Refuse weights that are not numbers.

    Args:
        tensors: by name.
        key: the argument or file that they come from, for the error.
        where: before the tensor's name in the error; empty or with a blank at its end.

    Raises:
        UserError: a tensor holds NaN or an infinite number.
    """
    for name, value in tensors.items():
        found = not_finite(value)
        if found:
            raise UserError(
                key,
                f"{where}{name} holds {found}, so every result would be NaN; take an earlier checkpoint or "
                "other weights",
            )
