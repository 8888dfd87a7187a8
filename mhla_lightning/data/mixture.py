"""Several data sets as one endless sequence: a pure function of the position. numpy only.

The sequence consists of blocks of 1,000 positions. A block holds a fixed number of samples of every source,
its weight's share, in a permuted order. A source that may run out (`drop`, `stop`) ends with a shorter block
in the same proportions. Then the weights of the other sources are scaled up.

With groups (whole batches of one source, for example clips of one size), blocks consist of groups instead of
samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from mhla_lightning.data.order import Order, draws, permutation

BLOCK = 1000  # weights are kept to one part in a thousand
WhenExhausted = Literal["repeat", "drop", "stop"]


@dataclass(frozen=True)
class Ingredient:
    """One source of a mixture.

    Args:
        order: of its samples; gives the epochs and indices of the mixture.
        weight: its share of the samples, relative to the other weights.
        replacement: whether each sample is drawn independently, instead of epoch after epoch.
        when_exhausted: policy after its first epoch. `repeat` begins the next, `drop` leaves its share to
            the others, `stop` ends the sequence.
    """

    order: Order
    weight: float = 1.0
    replacement: bool = False
    when_exhausted: WhenExhausted = "repeat"

    @property
    def supply(self) -> float:
        """Samples that the source gives in total."""
        return float("inf") if self.replacement or self.when_exhausted == "repeat" else self.order.samples


class Located(NamedTuple):
    """The samples at P positions: source, epoch, index in the source; int64 (P,) each."""

    sources: np.ndarray
    epochs: np.ndarray
    indices: np.ndarray


@dataclass(frozen=True)
class _Stretch:
    """Consecutive blocks with the same composition, counted in groups.

    first: group at which they begin. counts: groups of every source in a block. drawn: groups of every source
    before. blocks: number of blocks.
    """

    first: int
    counts: np.ndarray
    drawn: np.ndarray
    blocks: float

    @property
    def size(self) -> int:
        return int(self.counts.sum())

    @property
    def end(self) -> float:
        return self.first + self.blocks * self.size


class Mixture:
    """The sequence of a mixture: from a position to a sample of a source.

    Args:
        ingredients: the sources; their global indices follow one another in this order.
        seed: of the order inside the blocks.
        group: positions [n * group, (n + 1) * group) are all of one source. A source that may run out loses
            the samples beyond its whole groups.

    Attributes:
        length: positions until a source with `stop` has run out, or all have; inf when that never happens.

    Raises:
        ValueError: no source. A weight that is not positive, or below one in 1,000 samples. A source that may
            run out and has less than a group.
    """

    def __init__(self, ingredients: Sequence[Ingredient], seed: int | str = 0, group: int = 1) -> None:
        self.ingredients, self.seed, self.group = tuple(ingredients), seed, group
        if not ingredients or min(item.weight for item in ingredients) <= 0:
            raise ValueError("a mixture needs sources with weights above 0")
        short = next((item for item in ingredients if item.supply < group), None)
        if short is not None:
            raise ValueError(
                f"a source that is to {short.when_exhausted} has {short.order.samples} samples, less "
                f"than a batch of {group}"
            )
        self.samples = sum(item.order.samples for item in ingredients)
        self._stretches = self._plan()
        self.length = self._stretches[-1].end * group
        self._pattern: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))

    def locate(self, positions: np.ndarray) -> Located:
        """Return the source, epoch and index of every position, int64 (P,).

        Raises IndexError at or beyond `length`.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if len(self.ingredients) == 1 and len(positions):  # faster, with the same result
            for position in (positions.min(), positions.max()):
                self._block_of(int(position))  # refuses one outside
            return Located(np.zeros_like(positions), *self._locate_in(0, positions))
        groups, within = np.divmod(positions, self.group)
        sources, drawn = np.empty_like(positions), np.empty_like(positions)
        left = np.ones(len(positions), dtype=bool)
        while left.any():  # once for every block that a batch touches
            stretch, block, start = self._block_of(int(positions[left][0]))
            here = (groups >= start) & (groups < start + stretch.size)
            pattern, ranks = self._pattern_of(stretch, start)
            sources[here] = pattern[groups[here] - start]
            drawn[here] = (stretch.drawn + block * stretch.counts)[sources[here]] + ranks[
                groups[here] - start
            ]
            left &= ~here
        drawn = drawn * self.group + within
        epochs, indices = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(sources):
            here = sources == number
            epochs[here], indices[here] = self._locate_in(int(number), drawn[here])
        return Located(sources, epochs, indices)

    def counts(self, positions: int) -> list[int]:
        """Return the samples of every source among the first `positions` positions."""
        if positions == 0:
            return [0] * len(self.ingredients)
        stretch, block, start = self._block_of(positions - 1)
        pattern, _ = self._pattern_of(stretch, start)
        groups, begun = divmod(positions, self.group)
        counts = (
            stretch.drawn
            + block * stretch.counts
            + np.bincount(pattern[: groups - start], minlength=len(self.ingredients))
        ) * self.group
        if begun:
            counts[pattern[groups - start]] += begun
        return counts.tolist()

    def _block_of(self, position: int) -> tuple[_Stretch, int, int]:
        """Return the stretch of a position, its block number there, and that block's first group."""
        if not 0 <= position < self.length:
            raise IndexError(f"position {position} lies outside a mixture of {self.length} samples")
        group = position // self.group
        stretch = next(stretch for stretch in self._stretches if group < stretch.end)
        block = (group - stretch.first) // stretch.size
        return stretch, block, stretch.first + block * stretch.size

    def _pattern_of(self, stretch: _Stretch, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of every group of the block at `start`, and its rank in that source."""
        if self._pattern[0] != start:
            sources = np.repeat(np.arange(len(stretch.counts)), stretch.counts)[
                permutation(stretch.size, self.seed, "mixture", start)
            ]
            ranks = np.empty_like(sources)
            for number, count in enumerate(stretch.counts):
                ranks[sources == number] = np.arange(count)
            self._pattern = start, sources, ranks
        return self._pattern[1], self._pattern[2]

    def _locate_in(self, number: int, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        item = self.ingredients[number]
        if not item.replacement:
            return item.order.locate(drawn)
        chosen = [
            int(draws(1, item.order.seed, "draw", int(n))[0] % np.uint64(item.order.samples)) for n in drawn
        ]
        return drawn // item.order.samples, np.array(chosen, dtype=np.int64)

    def _plan(self) -> list[_Stretch]:
        weights = np.array([item.weight for item in self.ingredients], dtype=np.float64)
        supply = np.floor(np.array([item.supply for item in self.ingredients], dtype=np.float64) / self.group)
        drawn, first, plan = np.zeros(len(weights), dtype=np.int64), 0, []
        while True:
            counts = _shares(np.where(drawn < supply, weights, 0.0))
            bounded = (counts > 0) & np.isfinite(supply)
            blocks = float(np.min((supply[bounded] - drawn[bounded]) // counts[bounded], initial=np.inf))
            if blocks > 0:
                plan.append(_Stretch(first, counts, drawn.copy(), blocks))
            if blocks == float("inf"):
                return plan
            first, drawn = first + int(blocks) * int(counts.sum()), drawn + int(blocks) * counts
            left = np.where(bounded, supply - drawn, counts).astype(np.int64)
            scarcest = int(np.argmin(np.where(bounded, left / np.maximum(counts, 1), np.inf)))
            if left[scarcest]:  # a short block in the same proportions, with the last of the scarcest source
                last = counts * left[scarcest] // counts[scarcest]
                plan.append(_Stretch(first, last, drawn.copy(), 1.0))
                first, drawn = first + int(last.sum()), drawn + last
            ended = drawn >= supply
            if ended.all() or any(
                item.when_exhausted == "stop" and done
                for item, done in zip(self.ingredients, ended, strict=True)
            ):
                return plan


def _shares(weights: np.ndarray) -> np.ndarray:
    """Return whole numbers in the proportions of `weights`, by largest remainders.

    They sum to 1,000.
    Raises ValueError when one would be 0.
    """
    exact = weights / weights.sum() * BLOCK
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: BLOCK - int(counts.sum())]] += 1
    if (counts[weights > 0] == 0).any():
        raise ValueError(f"a weight below one in {BLOCK} of the sum is never drawn")
    return counts
