"""The norm of gradients that are split over ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def norm_of_partitions(optimizer: Any, gradients: Iterable[Tensor], params: Any, norm_type: float = 2) -> Tensor:
    """2-norm of the gradients of all ranks, a scalar in float64; -1 where it is not finite, as DeepSpeed has it.

    DeepSpeed's stages 1 and 2 round every rank's sum of squares to float32 before they add them; stage 3 does not, and neither does
    callbacks.Health. A clipped step would depend on the strategy by that rounding, and 20 steps later the loss in its fourth digit.

    Args:
        optimizer: DeepSpeed's, of stage 1 or 2.
        gradients: the parts that this rank owns.
        params, norm_type: as DeepSpeed hands them over: 2 is the only norm it clips by.
    """
    parts = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    wide = torch.float32 if optimizer.device == "mps" else torch.float64
    squares = [torch.linalg.vector_norm(part, dtype=wide).square() for part in parts] or [torch.zeros((), dtype=wide)]
    total = torch.stack(squares).sum().to(optimizer.device)
    dist.all_reduce(total, group=optimizer.dp_process_group)
    total = total.sqrt()
    return total.where(total.isfinite(), -1)
