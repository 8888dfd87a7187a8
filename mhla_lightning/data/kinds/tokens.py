"""Packed token sequences; a sample is a row.

A member pair is KEY.tokens.npy and KEY.documents.npy, (rows, length) each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mhla_lightning.data.columns import PADDING, find_columns
from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.kinds.base import Kind
from mhla_lightning.data.members import RawSample
from mhla_lightning.data.skips import BadSample
from mhla_lightning.data.split import Split
from mhla_lightning.errors import DataError

_LAYOUTS_KNOWN = 2**16


class _Rows(NamedTuple):
    """The rows of a pair of members: tokens and documents.

    first: number of its first row in the shard. tokens, documents: byte of the first row, bytes of a row,
    type.
    """

    first: int
    tokens: tuple[int, int, np.dtype]
    documents: tuple[int, int, np.dtype]


@dataclass
class Tokens(Kind):
    """Token ids and the document number of each in its row, int64 (T,) each.

    The document number of padding is -1.

    Args:
        length: T, tokens of a row.
        vocabulary: number of token ids; None takes any.
    """

    length: int
    vocabulary: int | None = None
    _layouts: dict[tuple[str, int], _Rows] = field(default_factory=dict, repr=False)

    def read(self, split: Split, samples: Sequence[int]) -> list[RawSample]:
        """Read each row by two short requests, once the layout of its member is known."""
        found: list[RawSample] = []
        requests, types = [], []
        for sample in samples:
            shard, row = split.place(int(sample))
            first, *columns = self._rows(split, shard, row)
            name = split.index.shards[shard].name
            for start, row_bytes, dtype in columns:
                start += (row - first) * row_bytes
                requests.append((name, start, start + row_bytes))
                types.append(dtype)
            found.append(
                {"__key__": f"{name}:{row}", "__url__": split.address(shard), "__index__": int(sample)}
            )
        arrays = map(np.frombuffer, split.store.read_many(requests), types)
        for raw in found:
            raw["tokens"], raw["documents"] = next(arrays), next(arrays)
        return found

    def inspect(self, sample: RawSample) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens and documents of a row as stored; padding is document PADDING."""
        tokens, documents = sample["tokens"], sample["documents"]
        if self.vocabulary is not None and tokens.max() >= self.vocabulary:
            raise BadSample(f"token {tokens.max()} is outside the vocabulary of {self.vocabulary}")
        if (documents[1:] < documents[:-1]).any():
            raise BadSample("the document numbers of a row must not fall")
        if documents[-1] > PADDING:
            raise BadSample(f"document number {documents[-1]} is above {PADDING}, the number of padding")
        return tokens, documents

    def train(self, sample: RawSample, epoch: int) -> dict[str, Tensor]:
        """Return the row without augmentation."""
        return self.evaluate(sample)

    def train_batch(self, samples: Sequence[RawSample], epochs: Sequence[int]) -> dict[str, Tensor] | None:
        """Return all rows in one array; checking them one by one would be slower."""
        tokens, documents = (
            np.concatenate([sample[name] for sample in samples]).reshape(len(samples), -1)
            for name in ("tokens", "documents")
        )
        if (self.vocabulary is not None and tokens.max() >= self.vocabulary) or (
            documents[:, 1:] < documents[:, :-1]
        ).any():
            return None
        last = documents[:, -1]
        if last.max() > PADDING:
            return None
        both = np.stack([tokens, documents], dtype=np.int64)  # in one piece, as a worker sends it
        for row in np.flatnonzero(last == PADDING):  # padding is at the end of a row, as numbers do not fall
            both[1, row, np.searchsorted(documents[row], PADDING) :] = -1
        tensor = torch.from_numpy(both)
        return {"tokens": tensor[0], "documents": tensor[1]}

    def evaluate(self, sample: RawSample) -> dict[str, Tensor]:
        """Return tokens and documents as int64, with padding as document -1."""
        tokens, documents = (array.astype(np.int64) for array in self.inspect(sample))
        documents[np.searchsorted(documents, PADDING) :] = -1
        return {"tokens": torch.from_numpy(tokens), "documents": torch.from_numpy(documents)}

    def padding(self) -> dict[str, Tensor]:
        """Return a row of token 0 in one document."""
        zeros = torch.zeros(self.length, dtype=torch.int64)
        return {"tokens": zeros, "documents": zeros}

    def check(self, index: ShardIndex, address: str) -> None:
        """Refuse anything but tokens in rows of `length`."""
        if index.kind != "tokens":
            raise DataError(address, f"it holds {index.kind}; tokens are needed")
        if index.length != self.length:
            raise DataError(
                address, f"its rows have length {index.length}; tokens of length {self.length} are needed"
            )

    def _rows(self, split: Split, shard: int, row: int) -> _Rows:
        offsets = split.offsets(shard)
        start = int(offsets[row])
        key = split.address(shard), start
        if key not in self._layouts:
            if len(self._layouts) >= _LAYOUTS_KNOWN:
                self._layouts.clear()
            self._layouts[key] = self._layout(split, shard, offsets, start)
        return self._layouts[key]

    def _layout(self, split: Split, shard: int, offsets: np.ndarray, start: int) -> _Rows:
        first, stop = (
            int(np.searchsorted(offsets[:-1], start, "left")),
            int(np.searchsorted(offsets[:-1], start, "right")),
        )
        end = int(offsets[stop])
        name, address = split.index.shards[shard].name, split.address(shard)
        tokens, documents = find_columns(
            lambda begin, stop: split.store.read(name, begin, stop), start, end, address
        )
        if tokens.shape != (stop - first, self.length):
            raise DataError(
                address,
                f"the tokens at byte {start} are {tokens.shape}; ({stop - first}, {self.length}) are needed: "
                "index it again",
            )
        return _Rows(
            first, *((column.start, column.row_bytes, column.dtype) for column in (tokens, documents))
        )
