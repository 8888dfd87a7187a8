"""Every change to DeepSpeed and every private name of DeepSpeed that the strategies use.

Each entry names its reason. All are for DeepSpeed 0.19 (tested with 0.19.8). When an upgrade moves one of
them, tests/private_api/test_deepspeed.py fails at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mhla_lightning.strategies.norm import total_norm

ALIGNED = 512  # bytes: reads that bypass the page cache need memory on such a boundary
_SHARED_MEMORY_OP = "deepspeed_shm_comm"
NO_MASTER = object()


def leave_out_shared_memory() -> None:
    """Keep DeepSpeed 0.19 from reducing through shared memory on CPUs.

    DeepSpeed compiles that operator at its first use, for about a minute. Its reductions wait without end for
    a rank that has died. There is no setting for it.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OP] = False


def patch_training(optimizer: Any, stage: int) -> None:
    """Change the optimizer of a training engine (DeepSpeed 0.19).

    Stages 1 and 2 look for NaN in float32 gradients only when asked to; stage 3 always does. The other
    changes: see :func:`norm_of_partitions` and :class:`AlignedReads`.

    Args:
        optimizer: DeepSpeed's, of any stage of ZeRO.
        stage: of ZeRO.
    """
    optimizer.check_grad_overflow = True
    if stage < 3:
        optimizer.get_grad_norm_direct = partial(norm_of_partitions, optimizer)
    elif optimizer.swap_optimizer:
        AlignedReads(optimizer.optimizer_swapper)


def norm_of_partitions(
    optimizer: Any, gradients: Iterable[Tensor], params: Any, norm_type: float = 2
) -> Tensor:
    """Return the norm of the gradients of all ranks; -1 where it is not finite.

    Stages 1 and 2 of DeepSpeed 0.19 round every rank's sum of squares to float32 before they add them; stage
    3 does not. After 20 clipped steps such a rounding shows in the fourth digit of a language model's loss.

    Args:
        optimizer: DeepSpeed's, of stage 1 or 2.
        gradients: the parts that this rank owns.
        params: unused; DeepSpeed passes it.
        norm_type: unused; 2 is the only norm that DeepSpeed clips by.
    """
    parts = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    total = total_norm(parts).double().square().to(optimizer.device)
    dist.all_reduce(total, group=optimizer.dp_process_group)
    total = total.sqrt()
    return total.where(total.isfinite(), -1)


def master_of(tensor: Tensor) -> Any:
    """Return the place of a parameter's float32 master at stages 1 and 2.

    deepspeed.utils.safe_get_local_fp32_param returns the master's values, but not their place in the
    optimizer's flat tensor, which a checkpoint needs (DeepSpeed 0.19).

    Returns:
        The place; None where another rank has the master; NO_MASTER where no rank has one.
    """
    return getattr(tensor, "_hp_mapping", NO_MASTER)


class AlignedReads:
    """Has an optimizer's swapper read each gradient into aligned memory first.

    DeepSpeed 0.19 reads a gradient straight to its place among the others of its group. Where that place is
    not aligned, libaio reads nothing and reports success, and the step uses old numbers.

    Args:
        swapper: DeepSpeed's, of the optimizer's state; its method is replaced.
    """

    def __init__(self, swapper: Any) -> None:
        self._swapper, self._landing = swapper, torch.empty(0)
        self._direct, swapper._swap_in_pinned_gradients = swapper._swap_in_pinned_gradients, self

    def __call__(self, aio_handle: Any, parameter: Tensor, gradient_tensor: Tensor) -> None:
        info = self._swapper.swap_params_info[self._swapper.parameter_id(parameter)]
        stored = [
            (gradient_tensor.narrow(0, gradient.offset, gradient.length), gradient.path)
            for gradient in info.swapped_gradients.values()
        ]
        if all(place.data_ptr() % ALIGNED == 0 for place, _ in stored):
            self._direct(aio_handle, parameter, gradient_tensor)
            return
        longest = max(len(place) for place, _ in stored)
        if len(self._landing) < longest:
            self._landing = aio_handle.new_cpu_locked_tensor(
                longest, torch.empty(0, dtype=gradient_tensor.dtype)
            )
        for place, path in stored:
            read = self._landing.narrow(0, 0, len(place))
            aio_handle.async_pread(read, path, 0)
            if aio_handle.wait() != 1:
                raise OSError(f"{path} cannot be read")
            place.copy_(read)
