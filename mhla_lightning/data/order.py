"""The order of training samples: a pure function of (seed, position). numpy only.

Training is one endless sequence of epochs. Position p is in epoch p // N, and every epoch is a permutation of
all N samples:

1. The shards are permuted and laid end to end; the result is rotated by a random number of samples.
2. That line is cut into `lanes` equal pieces. The epoch takes one sample from each lane in turn, so
   neighbours are far apart.
3. Inside a lane the samples are permuted within windows of about `window` samples, so that reading stays near
   one position of one or two shards.

Every random choice is a keyed draw from (seed, purpose, epoch, ...). So any process can compute any position
at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mhla_lightning.randomness import philox

LANES = 48  # a multiple of most ranks x workers on one machine
WINDOW = 2048


def draws(count: int, *key: int | str) -> np.ndarray:
    """Return `count` random uint64 that depend on `key` alone."""
    return philox(*key).random_raw(count)


def permutation(size: int, *key: int | str) -> np.ndarray:
    """Return a permutation of range(size), int64, that depends on `key` alone."""
    return np.argsort(draws(size, *key), kind="stable")


@dataclass(frozen=True)
class _Epoch:
    """The line of shards of one epoch: first global index, size and end on the line of each."""

    firsts: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray
    rotation: int


class Order:
    """The endless training sequence: from a position to a sample.

    Memory: O(shards) for the current epoch, and a table of lanes x window small integers.

    Args:
        shard_sizes: samples of every shard, in the order of the index.
        seed: an integer, or a text that names the sequence.
        lanes: pieces of the line that are read side by side.
        window: samples; the largest distance over which samples are mixed inside a lane.

    Raises:
        ValueError: no samples, or lanes or window below 1.
    """

    def __init__(
        self, shard_sizes: Sequence[int], seed: int | str = 0, lanes: int = LANES, window: int = WINDOW
    ) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.samples, self.seed, self.lanes, self.window = int(self._sizes.sum()), seed, lanes, window
        if self.samples < 1 or lanes < 1 or window < 1:
            raise ValueError(
                f"an order needs samples, lanes and a window, not {self.samples}, {lanes}, {window}"
            )
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._short, self._longer = divmod(
            self.samples, lanes
        )  # the first `_longer` lanes hold one sample more
        self._epochs: dict[int, _Epoch] = {}
        width = min(window, -(-self.samples // lanes))
        self._table = np.zeros(
            (lanes, width), dtype=np.int32
        )  # of every lane, the window that it was asked for last
        self._filled = np.full((lanes, 2), -1, dtype=np.int64)  # its epoch and its number

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch and the sample index of every position: int64 (P,) -> two int64 (P,)."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.samples)
        indices = np.empty_like(places)
        for epoch in (
            np.unique(epochs) if (epochs != epochs[:1]).any() else epochs[:1]
        ):  # nearly always one: unique is slow
            here = epochs == epoch
            indices[here] = self._indices(int(epoch), places[here])
        return epochs, indices

    def _indices(self, epoch: int, places: np.ndarray) -> np.ndarray:
        line = self._line(epoch)
        spots, lanes = np.divmod(places, self.lanes)
        starts = lanes * self._short + np.minimum(lanes, self._longer)
        on_line = (starts + self._mixed(epoch, lanes, spots) + line.rotation) % self.samples
        shards = np.searchsorted(line.ends, on_line, side="right")
        return line.firsts[shards] + on_line - (line.ends[shards] - line.sizes[shards])

    def _mixed(self, epoch: int, lanes: np.ndarray, spots: np.ndarray) -> np.ndarray:
        """Return the position in its lane of each sample.

        Windows of a lane differ by at most one sample in size, so no unmixed tail remains.
        """
        lengths = self._short + (lanes < self._longer)
        windows = -(-lengths // self.window)
        numbers = ((spots + 1) * windows - 1) // lengths
        starts, stops = numbers * lengths // windows, (numbers + 1) * lengths // windows
        mixed = np.empty_like(spots)
        left = np.arange(len(spots))
        while len(left):  # once or twice: a large batch reaches into a lane's next window
            lane, number = lanes[left], numbers[left]
            stale = (self._filled[lane, 0] != epoch) | (self._filled[lane, 1] != number)
            if stale.any():
                for place in left[stale][np.unique(lane[stale], return_index=True)[1]]:
                    self._fill(
                        epoch, int(lanes[place]), int(numbers[place]), int(stops[place] - starts[place])
                    )
            fits = left[self._filled[lane, 1] == number]
            mixed[fits] = starts[fits] + self._table[lanes[fits], spots[fits] - starts[fits]]
            left = left[self._filled[lane, 1] != number]
        return mixed

    def _fill(self, epoch: int, lane: int, number: int, size: int) -> None:
        self._table[lane, :size] = permutation(size, self.seed, "window", epoch, lane, number)
        self._filled[lane] = epoch, number

    def _line(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            shards = permutation(len(self._sizes), self.seed, "shards", epoch)
            sizes = self._sizes[shards]
            rotation = int(draws(1, self.seed, "rotation", epoch)[0] % np.uint64(self.samples))
            if len(self._epochs) > 1:  # a batch spans two
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = _Epoch(self._firsts[shards], sizes, np.cumsum(sizes), rotation)
        return self._epochs[epoch]
