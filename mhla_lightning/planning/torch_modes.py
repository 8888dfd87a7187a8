"""torch's modes for tensors without data, and for watching every operation.

torch has no public name for either. These were checked with torch 2.14; no other file names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FakeTensor", "FakeTensorMode", "TorchDispatchMode", "tensors_in", "unset_fake_temporarily"]


def tensors_in(values: object) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results of an operation, nested ones included."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from tensors_in(value)
    elif isinstance(values, Sequence) and not isinstance(values, str):
        for value in values:
            yield from tensors_in(value)
