"""A split that can be read: its index, its store, and any of its samples by number."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from mhla_lightning.data.index import ShardIndex, parse_offsets
from mhla_lightning.data.members import RawSample, parse_sample, scan_shard
from mhla_lightning.data.stores import Store
from mhla_lightning.errors import DataError

MAX_SAMPLE_BYTES = 2**30  # a sample that claims more is damage or an attack, not data
_RUN_BYTES = 2**26  # neighbours are read together up to this size
_NPY_HEAD_BYTES = 2**16  # more than the header of any npy file
_SHARDS_KNOWN = 128  # shards whose offsets are kept


class Split:
    """Samples of one split by their index. Picklable; opens a shard at its first use.

    Args:
        index: of the split.
        store: of its files.
    """

    def __init__(self, index: ShardIndex, store: Store) -> None:
        self.index, self.store = index, store
        self._firsts = index.first_indices()
        self._addresses = [store.address(shard.name) for shard in index.shards]
        self._offsets: OrderedDict[int, np.ndarray] = OrderedDict()

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self._firsts[-1]

    def place(self, sample: int) -> tuple[int, int]:
        """Return the number of the shard of a sample, and its position in the shard."""
        shard = bisect_right(self._firsts, sample) - 1
        return shard, sample - self._firsts[shard]

    def address(self, shard: int) -> str:
        """Return the address of a shard for messages."""
        return self._addresses[shard]

    def read(self, samples: Sequence[int]) -> list[RawSample]:
        """Read samples by index, in the given order; neighbours share one request.

        Raises:
            DataError: a shard or its offsets cannot be read, or differ from the index.
        """
        places = sorted((*self.place(sample), number) for number, sample in enumerate(samples))
        runs: list[list[tuple[int, int, int]]] = []
        for place in places:
            if runs and self._continues(runs[-1], place):
                runs[-1].append(place)
            else:
                runs.append([place])
        stretches = [self._stretch(run) for run in runs]
        found: list[RawSample] = [{}] * len(samples)
        for run, (_, start, _), data in zip(runs, stretches, self.store.read_many(stretches), strict=True):
            for shard, position, number in run:
                offsets = self.offsets(shard)
                piece = (
                    data[offsets[position] - start : offsets[position + 1] - start] if len(run) > 1 else data
                )
                found[number] = parse_sample(piece, self.address(shard), int(samples[number]))
        return found

    def _continues(self, run: list[tuple[int, int, int]], place: tuple[int, int, int]) -> bool:
        shard, position, _ = run[-1]
        if (shard, position + 1) != place[:2]:
            return False
        offsets = self.offsets(shard)
        return bool(offsets[place[1] + 1] - offsets[run[0][1]] <= _RUN_BYTES)

    def _stretch(self, run: list[tuple[int, int, int]]) -> tuple[str, int, int]:
        shard, first, _ = run[0]
        offsets = self.offsets(shard)
        start, stop = int(offsets[first]), int(offsets[run[-1][1] + 1])
        if stop - start > max(MAX_SAMPLE_BYTES, _RUN_BYTES):
            raise DataError(
                self.address(shard),
                f"sample {self._firsts[shard] + first} has {stop - start} bytes, more than "
                f"{MAX_SAMPLE_BYTES}",
            )
        return self.index.shards[shard].name, start, stop

    def offsets(self, shard: int) -> np.ndarray:
        """Return the byte offsets of a shard's samples, int64 (samples + 1,).

        They come from the file beside the shard, or from one pass over its headers.
        """
        if shard in self._offsets:
            self._offsets.move_to_end(shard)
        else:
            self._offsets[shard] = self._load_offsets(shard)
            if len(self._offsets) > _SHARDS_KNOWN:
                self._offsets.popitem(last=False)
        return self._offsets[shard]

    def _load_offsets(self, shard: int) -> np.ndarray:
        entry, kind = self.index.shards[shard], self.index.kind
        name = f"{entry.name}.offsets.npy"
        size = self.store.size(name)
        if size is not None and size > 8 * (entry.samples + 1) + _NPY_HEAD_BYTES:
            raise DataError(
                self.store.address(name),
                f"{size} bytes are too many for {entry.samples} samples: copy it again",
            )
        if size is not None:
            return parse_offsets(self.store.read(name, 0, size), entry, kind, self.store.address(name))
        if kind == "tokens":
            raise DataError(
                self.store.address(name),
                "the file is missing, and token shards need it: copy it again or run 'mhla data index'",
            )
        with self.store.open(entry.name) as file:
            scan = scan_shard(file, self.address(shard))
        if len(scan.keys) != entry.samples:
            raise DataError(
                self.address(shard),
                f"it ends after {len(scan.keys)} of {entry.samples} samples: it was cut; copy it again",
            )
        return scan.offsets

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_offsets": OrderedDict()}
