"""Transport of a batch from a loader's worker to the training process."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_SMALL_BYTES = 2**14


class _TensorView(NamedTuple):
    """A tensor as a view of a piece of memory."""

    piece: int
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class LightBatch(dict[str, Any]):
    """A batch that leaves a worker in few pieces.

    torch opens a file and a connection for every tensor that it sends, 0.2 ms and more each. Here small
    tensors are sent as bytes, and tensors that share a piece of memory are sent as that piece.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        pieces: dict[int, Tensor] = {}
        return _arrived, ({name: _sent(value, pieces) for name, value in self.items()}, pieces)

    def __copy__(self) -> LightBatch:  # DataLoader copies a batch that it sends
        return LightBatch(self)


def _sent(value: Any, pieces: dict[int, Tensor]) -> Any:
    # A worker sends no other tensors, but a copy of a batch may hold some.
    if not isinstance(value, Tensor) or value.device.type != "cpu" or value.dtype == torch.bfloat16:
        return value
    if value.nbytes <= _SMALL_BYTES:
        return value.numpy()
    storage = value.untyped_storage()
    pieces.setdefault(storage.data_ptr(), torch.empty(0, dtype=torch.uint8).set_(storage))
    return _TensorView(
        storage.data_ptr(), value.dtype, int(value.storage_offset()), value.shape, value.stride()
    )


def _arrived(sent: dict[str, Any], pieces: dict[int, Tensor]) -> dict[str, Any]:
    return {name: _received(value, pieces) for name, value in sent.items()}


def _received(value: Any, pieces: dict[int, Tensor]) -> Any:
    if isinstance(value, _TensorView):
        return torch.empty(0, dtype=value.dtype).set_(
            pieces[value.piece].untyped_storage(), value.offset, value.size, value.stride
        )
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
