"""Entries that batches of all kinds have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def real_rows(batch: Mapping[str, Any]) -> Tensor:
    """Return the places of a batch that are no padding, int64."""
    return (batch["weight"] > 0).nonzero().flatten()


def keys_of(batch: Mapping[str, Any], rows: Tensor) -> list[str]:
    """Return the names of some samples of a batch."""
    return [batch["key"][row] for row in rows.tolist()]


def keys(samples: int) -> dict[str, Tensor]:
    """Return `index`, `epoch` and `weight` of an example batch."""
    return {
        "index": torch.arange(samples),
        "epoch": torch.zeros(samples, dtype=torch.int64),
        "weight": torch.ones(samples),
    }
