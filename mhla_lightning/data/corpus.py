"""The training data of a run: one data set or a mixture, as one endless sequence of samples."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from mhla_lightning.data.kinds import Kind
from mhla_lightning.data.members import RawSample
from mhla_lightning.data.mixture import Ingredient, Mixture, WhenExhausted
from mhla_lightning.data.order import LANES, WINDOW, Order
from mhla_lightning.data.split import Split
from mhla_lightning.errors import UserError


@dataclass(frozen=True)
class DataSource:
    """One data set of a mixture (data.mix).

    Args:
        path: folder or address of its splits.
        weight: its share of the samples, relative to the other weights, exact to one part in a thousand.
        name: as in TensorBoard's train/consumed/NAME; None takes the last part of the path.
        replacement: whether every sample is drawn independently, instead of epoch after epoch.
        when_exhausted: policy after its first epoch. `repeat` begins the next, `drop` leaves its share to
            the others, `stop` ends the training data.
    """

    path: str
    weight: float = 1.0
    name: str | None = None
    replacement: bool = False
    when_exhausted: WhenExhausted = "repeat"

    @property
    def label(self) -> str:
        """The name, or the last part of the path."""
        return self.name or self.path.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class SamplePlace:
    """The sample at a position: source number, epoch of the source, index over all sources."""

    source: int
    epoch: int
    index: int


class Corpus:
    """Several splits as one list of samples; indices count through the splits in order."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self.splits = tuple(splits)
        self._firsts = list(accumulate((split.samples for split in splits), initial=0))

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self._firsts[-1]

    def first(self, source: int) -> int:
        """Return the index of the first sample of a source."""
        return self._firsts[source]

    def source_of(self, index: int) -> int:
        """Return the number of the source of a sample."""
        return bisect_right(self._firsts, index) - 1

    def read(self, kind: Kind, indices: Sequence[int]) -> list[RawSample]:
        """Read raw samples by index, in the given order. Raises DataError.

        `__index__` of each counts over all sources.
        """
        if len(self.splits) == 1:
            return kind.read(self.splits[0], indices)
        numbers = [self.source_of(index) for index in indices]
        found: list[RawSample] = [{}] * len(indices)
        for number in sorted(set(numbers)):
            slots = [slot for slot, source in enumerate(numbers) if source == number]
            samples = kind.read(self.splits[number], [indices[slot] - self._firsts[number] for slot in slots])
            for slot, sample in zip(slots, samples, strict=True):
                found[slot] = sample | {"__index__": indices[slot]}
        return found


class TrainCorpus(Corpus):
    """The training splits, and the order in which training reads them.

    Args:
        splits: one for every source.
        sources: their weights and policies.
        seed: of the order.
        lanes: see Order.
        window: see Order.
        group: see Mixture.

    Raises:
        UserError: the mixture cannot keep these weights.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        sources: Sequence[DataSource],
        seed: int,
        lanes: int = LANES,
        window: int = WINDOW,
        group: int = 1,
    ) -> None:
        super().__init__(splits)
        self.sources = tuple(sources)
        names: list[int | str] = (
            [seed] if len(splits) == 1 else [f"{seed}/{number}" for number in range(len(splits))]
        )
        orders = [
            Order([e.samples for e in s.index.shards], name, lanes, window)
            for s, name in zip(splits, names, strict=True)
        ]
        try:
            self.mixture = Mixture(
                [
                    Ingredient(order, s.weight, s.replacement, s.when_exhausted)
                    for order, s in zip(orders, sources, strict=True)
                ],
                seed,
                group,
            )
        except ValueError as error:
            raise UserError("mix", str(error)) from error

    @property
    def hash(self) -> str:
        """Identity of the data: the index's hash; of a mixture, over hashes, weights and policies."""
        if len(self.splits) == 1 and self.sources[0] == DataSource(
            self.sources[0].path, name=self.sources[0].name
        ):
            return self.splits[0].index.hash
        lines = (
            f"{split.index.hash} {source.weight} {source.replacement} {source.when_exhausted}\n"
            for split, source in zip(self.splits, self.sources, strict=True)
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def locate(self, positions: np.ndarray) -> list[SamplePlace]:
        """Return the samples at these positions of the endless sequence."""
        sources, epochs, indices = self.mixture.locate(positions)
        return [
            SamplePlace(s, e, i + self._firsts[s])
            for s, e, i in zip(sources.tolist(), epochs.tolist(), indices.tolist(), strict=True)
        ]
