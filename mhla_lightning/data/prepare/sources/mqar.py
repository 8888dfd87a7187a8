"""Multi-query associative recall (Zoology, arXiv 2312.04927).

The task: given a key, name the value that came with it earlier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mhla_lightning.data.index import MAX_LENGTH, ShardIndex
from mhla_lightning.data.prepare.samples import Sample, token_samples
from mhla_lightning.data.prepare.sources.base import SampleSource
from mhla_lightning.errors import UserError

NAME = "mqar"
KEYS = 64  # ids 0 to 63 are keys, 64 to 127 values
VOCABULARY = 2 * KEYS
PAIRS, LENGTH = 16, 128
ROWS = {"train": 20_000, "val": 1_000}


def is_mqar(spec: str) -> bool:
    """Return whether a source is `mqar` or `mqar:PAIRS`."""
    return spec.partition(":")[0] == NAME


def open_mqar(
    source: str = NAME,
    length: int = LENGTH,
    val_length: int | None = None,
    val: int = ROWS["val"],
    seed: int = 0,
) -> SampleSource:
    """Open rows of tokens in which pairs of keys and values occur twice.

    First comes each distinct key with its value. The same pairs follow in another order and at random places,
    with random values between them. So a key that comes a second time is a query, and the token after it the
    answer. A row depends on the seed, the split and its number alone.

    Args:
        source: mqar[:PAIRS].
        length: tokens a row.
        val_length: tokens a row of the val split; None is the same.
        val: rows of the val split.
        seed: of the rows.

    Raises:
        UserError: a number of pairs that is not valid or does not fit.
    """
    text = source.partition(":")[2] or str(PAIRS)
    pairs = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= pairs <= KEYS:
        raise UserError("source", f"{source} is not of the form mqar[:PAIRS] with 1 to {KEYS} pairs")
    lengths = {"train": length, "val": length if val_length is None else val_length}
    for size in lengths.values():
        if not 4 * pairs <= size <= MAX_LENGTH:
            raise UserError(
                "val_length" if size == val_length else "length",
                f"is {size} tokens; {source} holds {pairs} pairs twice and needs at least {4 * pairs}",
            )
    if not (isinstance(val, int) and val > 0):
        raise UserError("val", f"is {val}; for {source} it must be a number of rows from 1 on")
    header = ShardIndex("tokens", (), tokenizer=NAME, length=length)
    rows_of = SampleSource(header, {}, f"{NAME} {pairs} {lengths} {val} {seed}", lengths)
    for number, (split, rows) in enumerate((ROWS | {"val": val}).items()):
        rows_of.parts[split] = _Recall(rows_of.header_of(split), pairs, (seed, number), range(rows))
    return rows_of


def recall_row(pairs: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Make one row, int64 (length,)."""
    row = rng.integers(KEYS, VOCABULARY, length)
    keys, values = rng.permutation(KEYS)[:pairs], rng.integers(KEYS, VOCABULARY, pairs)
    row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2] = keys, values
    # Places of the queries: any choice that leaves room for the answers.
    places = 2 * pairs + np.sort(rng.choice(length - 3 * pairs, pairs, replace=False)) + np.arange(pairs)
    order = rng.permutation(pairs)
    row[places], row[places + 1] = keys[order], values[order]
    return row


@dataclass(frozen=True)
class _Recall:
    """Some rows of a split.

    Args:
        header: an index that describes the rows.
        pairs: keys with values in a row.
        seed: of the split.
        numbers: of the rows.
    """

    header: ShardIndex
    pairs: int
    seed: tuple[int, int]
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Sample]:
        yield from token_samples(self.header, map(self._row, self.numbers), VOCABULARY, NAME)

    def take(self, positions: Sequence[int]) -> _Recall:
        return replace(self, numbers=[self.numbers[position] for position in positions])

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        length = self.header.length or 0
        row = recall_row(self.pairs, length, np.random.default_rng([*self.seed, number]))
        return row, np.zeros(length, dtype=np.int64)
