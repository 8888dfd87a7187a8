"""The norm of gradients that clipping goes by, the same under every strategy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def total_norm(gradients: list[Tensor]) -> Tensor:
    """2-norm of all, a scalar in float64 as DeepSpeed's: in float32 that of 20 million numbers is off by
    4e-6, and a run under ZeRO would be clipped otherwise than one under DDP."""
    if not gradients:
        return torch.zeros(())
    wide = torch.float32 if gradients[0].device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0, dtype=wide)))


def norm_of_partitions(
    optimizer: Any, gradients: Iterable[Tensor], params: Any, norm_type: float = 2
) -> Tensor:
    """total_norm of the gradients of all ranks; -1 where it is not finite, as DeepSpeed has it.

    DeepSpeed's stages 1 and 2 round every rank's sum of squares to float32 before they add them; stage 3 does
    not. 20 clipped steps later such a rounding is in the fourth digit of a language model's loss.

    Args:
        optimizer: DeepSpeed's, of stage 1 or 2.
        gradients: the parts that this rank owns.
        params, norm_type: as DeepSpeed hands them over; 2 is the only norm that it clips by.
    """
    parts = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    total = total_norm(parts).double().square().to(optimizer.device)
    dist.all_reduce(total, group=optimizer.dp_process_group)
    total = total.sqrt()
    return total.where(total.isfinite(), -1)
