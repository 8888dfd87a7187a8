"""The norm of gradients that clipping uses, the same under every strategy."""

from __future__ import annotations

import torch
from torch import Tensor


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients together, a scalar in float64.

    In float32 the norm of 20 million numbers is off by 4e-6. DeepSpeed sums in float64, so a run under ZeRO
    would be clipped by another factor than one under DDP.

    torch.nn.utils.get_total_norm sums in the gradients' own type, and torch.linalg.vector_norm starts one
    kernel per tensor; `torch._foreach_norm` (torch 2.14) takes the type and all tensors at once.
    """
    if not gradients:
        return torch.zeros(())
    wide = torch.float32 if gradients[0].device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0, dtype=wide)))
