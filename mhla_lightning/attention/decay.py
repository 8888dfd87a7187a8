"""Initial values of learned decays in (0, 1)."""

from __future__ import annotations

import torch
from torch import Tensor

_SHORTEST, _LONGEST = 4.0, 256.0  # tokens


def spread_logits(heads: int) -> Tensor:
    """Return (heads,) logits of decays whose spans run from 4 to 256 tokens.

    A head of span n has sigmoid(logit) = 1 - 1 / n. The spans are evenly spaced in log, so that each head
    forgets at its own rate.
    """
    spans = torch.logspace(torch.tensor(_SHORTEST).log2(), torch.tensor(_LONGEST).log2(), heads, base=2.0)
    return torch.log(spans - 1)
