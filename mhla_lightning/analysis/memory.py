"""Peak memory of a piece of work: CUDA's statistics there, torch's MemTracker on CPU, whose allocator keeps none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes of the tensors that `work` holds at once, at most; what was there before does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    tracker = MemTracker()
    with tracker:
        work()
    peaks = tracker.get_tracker_snapshot("peak")
    return sum(int(kinds["Total"]) for where, kinds in peaks.items() if where.type == device.type)
