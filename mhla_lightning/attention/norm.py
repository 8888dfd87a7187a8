"""Norms that operators and layers share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, with its weight cast to the input's dtype.

    torch leaves its fused kernel, with a warning, when autocast passes bf16 and the weight is float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
