"""Counting what torch.compile does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch._dynamo.utils import counters


@dataclass
class CompiledCounts:
    """Counts since the block began."""

    @property
    def graphs(self) -> int:
        """Graphs that were compiled."""
        return int(counters["stats"]["unique_graphs"])

    @property
    def breaks(self) -> dict[str, int]:
        """Graph breaks by reason."""
        return dict(counters["graph_break"])


@contextmanager
def compiled_counts() -> Iterator[CompiledCounts]:
    counters.clear()
    yield CompiledCounts()
