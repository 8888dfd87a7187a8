"""Multi-query associative recall (Zoology, arXiv 2312.04927): can a model find the value that an earlier
key came with?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mhla_lightning.data.index import MAX_LENGTH, ShardIndex
from mhla_lightning.data.prepare.samples import Sample, token_samples
from mhla_lightning.data.prepare.sources.base import Source
from mhla_lightning.errors import UserError

NAME = "mqar"
KEYS = 64  # ids 0 to 63 are keys, 64 to 127 values
VOCABULARY = 2 * KEYS
PAIRS, LENGTH = 16, 128
ROWS = {"train": 20_000, "val": 1_000}


def is_mqar(spec: str) -> bool:
    """Whether a source is `mqar` or `mqar:PAIRS`."""
    return spec.partition(":")[0] == NAME


def open_mqar(
    spec: str = NAME,
    length: int = LENGTH,
    val_length: int | None = None,
    val: int = ROWS["val"],
    seed: int = 0,
) -> Source:
    """Rows of tokens: PAIRS distinct keys, each followed by a value; then the same pairs once more, in
    another order and at random places.

    Between them stand random values, so a key that comes a second time is a query, and the token after it the
    answer. A row is a function of (seed, split, its number). spec: mqar[:PAIRS]. val: rows of the val split.
    Raises UserError for a number of pairs that is none or does not fit.
    """
    text = spec.partition(":")[2] or str(PAIRS)
    pairs = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= pairs <= KEYS:
        raise UserError(f"the source {spec} is not of the form mqar[:PAIRS] with 1 to {KEYS} pairs")
    lengths = {"train": length, "val": length if val_length is None else val_length}
    for size in lengths.values():
        if not 4 * pairs <= size <= MAX_LENGTH:
            raise UserError(
                f"rows of {size} tokens do not hold {pairs} pairs twice: {spec} needs at least {4 * pairs}"
            )
    if not (isinstance(val, int) and val > 0):
        raise UserError(f"the val split of {spec} is a number of rows from 1 on; got {val}")
    header = ShardIndex("tokens", (), tokenizer=NAME, length=length)
    source = Source(header, {}, f"{NAME} {pairs} {lengths} {val} {seed}", lengths)
    for number, (split, rows) in enumerate((ROWS | {"val": val}).items()):
        source.parts[split] = _Recall(source.header_of(split), pairs, (seed, number), range(rows))
    return source


def recall_row(pairs: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """One row, int64 (length,)."""
    row = rng.integers(KEYS, VOCABULARY, length)
    keys, values = rng.permutation(KEYS)[:pairs], rng.integers(KEYS, VOCABULARY, pairs)
    row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2] = keys, values
    # places of the queries: any choice among all that leaves room for the answers
    places = 2 * pairs + np.sort(rng.choice(length - 3 * pairs, pairs, replace=False)) + np.arange(pairs)
    order = rng.permutation(pairs)
    row[places], row[places + 1] = keys[order], values[order]
    return row


@dataclass(frozen=True)
class _Recall:
    """Some rows of a split. seed: of the split."""

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
