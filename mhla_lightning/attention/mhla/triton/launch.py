"""One launch of a kernel: run it, or take it down for counting and compiling.

A recorded call works on meta tensors and needs no GPU. Its launches are those that a GPU would get: the
roofline, the ahead-of-time compilation and the count of kernels all read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments.

    Attributes:
        kernel: the function under `triton.jit`.
        grid: programs per axis.
        arguments: by name, constants included.
        warps, stages: of the compiled program.
        flops: of its matrix products, padding included.
        reads, writes: names of the tensors that cross memory once.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    warps: int
    stages: int
    flops: int
    reads: Sequence[str]
    writes: Sequence[str]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__

    @property
    def bytes(self) -> int:
        """Bytes to and from memory, each tensor once; a broadcast dimension counts once."""
        return sum(_held_bytes(self.arguments[name]) for name in (*self.reads, *self.writes))


def _held_bytes(x: Tensor) -> int:
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count


class _Recorder:
    """What :func:`recorded` collects; one at a time."""

    launches: list[Launch] | None = None
    major = 9


def start(launch: Launch) -> None:
    """Run a kernel on its tensors' device, or note it inside :func:`recorded`."""
    if _Recorder.launches is not None:
        _Recorder.launches.append(launch)
        return
    device = next(x.device for x in launch.arguments.values() if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        launch.kernel[launch.grid](**launch.arguments, num_warps=launch.warps, num_stages=launch.stages)


@contextmanager
def recorded(major: int = 9) -> Iterator[list[Launch]]:
    """Collect launches instead of running them.

    Args:
        major: compute capability of the GPU whose tiles are taken.
    """
    _Recorder.launches, _Recorder.major = [], major
    try:
        yield _Recorder.launches
    finally:
        _Recorder.launches = None


def capability_of(x: Tensor) -> int:
    """Return the major compute capability of x's device.

    Outside CUDA and in a recording it is the recording's.
    """
    if _Recorder.launches is not None or not x.is_cuda:
        return _Recorder.major
    return torch.cuda.get_device_properties(x.device).major
