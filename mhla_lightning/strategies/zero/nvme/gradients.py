"""Gradients read back from a disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ALIGNED = 512  # bytes: reads that go past the page cache need memory on such a boundary


def read_aligned(swapper: Any) -> None:
    """Has an optimizer's swapper read each gradient into aligned memory first.

    DeepSpeed reads it straight to its place among the others of its group, wherever that is. Where the place
    is not aligned the kernel reads nothing, nobody says so, and the step is taken with what was there before
    (DeepSpeed 0.19, libaio).

    Args:
        swapper: DeepSpeed's, of the optimizer's state.
    """
    swapper._swap_in_pinned_gradients = _AlignedReads(swapper)


class _AlignedReads:
    def __init__(self, swapper: Any) -> None:
        self._swapper, self._direct = swapper, swapper._swap_in_pinned_gradients
        self._landing = torch.empty(0)

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
