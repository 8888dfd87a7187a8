"""Rows of a layout, read from chunks: a part of a source that `pack` can write."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mhla_lightning.data.columns import PADDING
from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.prepare.samples import Sample, token_samples
from mhla_lightning.data.prepare.text.chunks import chunk_path
from mhla_lightning.data.prepare.text.layout import Layout

_OPEN = 128  # chunks mapped at a time; each takes a file handle
_FIRSTS = "firsts.npy"


def write_layout(folder: Path, split: str, layout: Layout) -> None:
    """Keep the layout of a split beside the chunks, where every process finds it."""
    for name in ("starts", "lengths", "rows"):
        np.save(folder / f"{split}.{name}.npy", getattr(layout, name), allow_pickle=False)


def write_firsts(folder: Path, tokens: Sequence[int]) -> None:
    """Keep the first token of each chunk in the corpus.

    Args:
        folder: of the chunks.
        tokens: number of tokens of every chunk.
    """
    np.save(folder / _FIRSTS, np.concatenate(([0], np.cumsum(tokens, dtype=np.int64))), allow_pickle=False)


@dataclass(frozen=True)
class Rows:
    """Rows of tokens.

    Args:
        header: an index that describes the rows.
        vocabulary: number of token ids.
        folder: of chunks and layouts.
        split: its name.
        numbers: of these rows in the layout, int64 (rows,).
    """

    header: ShardIndex
    vocabulary: int
    folder: Path
    split: str
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Sample]:
        reader = _Reader(self.folder, self.split, self.header.length or 0)
        yield from token_samples(
            self.header, (reader.row(int(number)) for number in self.numbers), self.vocabulary
        )

    def take(self, positions: Sequence[int]) -> Rows:
        return replace(self, numbers=self.numbers[np.asarray(positions, dtype=np.int64)])


class _Reader:
    """A reader of rows, made anew for every shard; chunks are mapped into memory."""

    def __init__(self, folder: Path, split: str, length: int) -> None:
        self.folder, self.length = folder, length
        self.starts, self.lengths, self.rows = (
            np.load(folder / f"{split}.{name}.npy", mmap_mode="r") for name in ("starts", "lengths", "rows")
        )
        self.firsts = np.load(folder / _FIRSTS)
        self._chunks: OrderedDict[int, np.ndarray] = OrderedDict()

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and documents, (length,) each."""
        tokens = np.zeros(self.length, dtype=np.uint32)
        documents = np.full(self.length, PADDING, dtype=np.uint16)
        place = 0
        for document, piece in enumerate(range(self.rows[number], self.rows[number + 1])):
            size = int(self.lengths[piece])
            tokens[place : place + size] = self._tokens(int(self.starts[piece]), size)
            documents[place : place + size] = document
            place += size
        return tokens, documents

    def _tokens(self, start: int, size: int) -> np.ndarray:
        chunk = int(np.searchsorted(self.firsts, start, side="right")) - 1
        if chunk in self._chunks:
            self._chunks.move_to_end(chunk)
        else:
            self._chunks[chunk] = np.load(chunk_path(self.folder, chunk), mmap_mode="r")
            if len(self._chunks) > _OPEN:
                self._chunks.popitem(last=False)
        start -= int(self.firsts[chunk])
        return self._chunks[chunk][start : start + size]
