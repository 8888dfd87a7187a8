"""Decays in (0, 1): how they start."""

from __future__ import annotations

import torch
from torch import Tensor

_SHORTEST, _LONGEST = 4.0, 256.0  # tokens


def spread_logits(heads: int) -> Tensor:
    """(heads,) with sigmoid(logit) = 1 - 1 / span, the spans spread evenly in log from 4 to 256 tokens:
    each head forgets at its own pace.
    """
    spans = torch.logspace(torch.tensor(_SHORTEST).log2(), torch.tensor(_LONGEST).log2(), heads, base=2.0)
    return torch.log(spans - 1)
