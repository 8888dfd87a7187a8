"""The place of every piece of a document in the rows, from the documents' lengths alone."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np

from mhla_lightning.data.columns import PADDING
from mhla_lightning.errors import DataError, UserError, unknown_name

Packing = Literal["best-fit", "concatenate"]


class Layout(NamedTuple):
    """Rows of pieces of documents.

    Args:
        starts: first token of every piece in the corpus, int64 (pieces,).
        lengths: tokens of every piece, int64 (pieces,).
        rows: first piece of every row, and the number of pieces, int64 (rows + 1,).
        dropped: number of tokens that are in no row.
    """

    starts: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    dropped: int = 0


def lay_out(packing: str, starts: np.ndarray, lengths: np.ndarray, row: int) -> Layout:
    """Lay documents out in rows of `row` tokens.

    Args:
        packing: best-fit or concatenate.
        starts: first token of every document in the corpus, int64 (documents,).
        lengths: tokens of every document, at least 1, int64 (documents,).
        row: tokens a row.

    Raises:
        UserError: an unknown packing.
        DataError: a row would hold more documents than can be numbered.
    """
    check_packing(packing)
    layout = best_fit(starts, lengths, row) if packing == "best-fit" else concatenate(starts, lengths, row)
    most = int(np.diff(layout.rows).max(initial=0))
    if most > PADDING:
        raise DataError(
            "length",
            f"a row of {row} tokens would hold {most} documents, and at most {PADDING} can be "
            "numbered; choose a smaller one",
        )
    return layout


def check_packing(packing: str) -> None:
    """Raise UserError for an unknown packing."""
    if packing not in get_args(Packing):
        raise UserError("packing", unknown_name("packing", packing, get_args(Packing)))


def best_fit(starts: np.ndarray, lengths: np.ndarray, row: int) -> Layout:
    """Lay documents out by best-fit-decreasing (arXiv 2404.10830).

    Documents are cut only where they are longer than a row, and the rest of a row is padding. Each piece, the
    longest first, goes where it leaves the least room. In a row, pieces keep the order of the corpus.
    """
    counts = -(-lengths // row)
    owners = np.repeat(np.arange(len(lengths)), counts)
    # Of each piece in its document.
    places = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = starts[owners] + places * row
    lengths = np.minimum(lengths[owners] - places * row, row)
    order = np.argsort(-lengths, kind="stable")
    numbers = np.empty(len(lengths), dtype=np.int64)
    numbers[order] = _assign(lengths[order], row)
    by_row = np.argsort(numbers, kind="stable")
    rows = np.concatenate(([0], np.cumsum(np.bincount(numbers))))
    return Layout(starts[by_row], lengths[by_row], rows)


def _assign(sizes: np.ndarray, row: int) -> np.ndarray:
    """Return the row of each piece, int64 (pieces,); sizes must not grow."""
    free: dict[int, list[int]] = {}  # rows by their free places
    some = 0  # bit n: some row has n free places
    full = int((sizes == row).sum())
    numbers, rows = np.arange(len(sizes)), full
    for place in range(full, len(sizes)):
        size = int(sizes[place])
        fitting = some >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = free[room].pop()
            if not free[room]:
                some ^= 1 << room
        else:
            room, number, rows = row, rows, rows + 1
        numbers[place] = number
        if room > size:
            free.setdefault(room - size, []).append(number)
            some |= 1 << (room - size)
    return numbers


def concatenate(starts: np.ndarray, lengths: np.ndarray, row: int) -> Layout:
    """Lay documents out one after another and cut them into rows.

    The tokens that do not fill the last row are dropped.
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    kept = total // row * row
    cuts = np.union1d(ends - lengths, np.arange(0, kept + 1, row))
    cuts = cuts[cuts <= kept]  # begins of pieces, and the end
    begins = cuts[:-1]
    owners = np.searchsorted(ends, begins, side="right")
    rows = np.searchsorted(begins, np.arange(0, kept + 1, row))
    return Layout(starts[owners] + begins - (ends - lengths)[owners], np.diff(cuts), rows, total - kept)


def held_out(documents: int, val: int | float, seed: int) -> np.ndarray:
    """Choose the documents that are held out, bool (documents,).

    They are those with the smallest hashes of (seed, number).

    Args:
        documents: number of all documents.
        val: how many (int), or which share (float below 1).
        seed: of the hashes.

    Raises:
        UserError: nothing would be left of one of the parts.
    """
    count = max(1, round(documents * val)) if 0 < val < 1 else val
    if documents < 2:
        raise DataError(
            "val",
            f"the input holds {documents} document{'s' * (documents != 1)}, and one is held out; "
            "a file is a document, so split it",
        )
    if not (0 < count < documents and count == int(count)):
        raise UserError(
            "val",
            f"got {val}; it must be a number of documents from 1 to {documents - 1}, or a share "
            "above 0 and below 1",
        )
    chosen = np.zeros(documents, dtype=bool)
    chosen[np.argsort(_hash(seed, documents), kind="stable")[: int(count)]] = True
    return chosen


def _hash(seed: int, count: int) -> np.ndarray:
    """Return splitmix64 of the numbers 0 to count - 1, uint64 (count,)."""
    with np.errstate(over="ignore"):
        mixed = (
            np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed * 0xD1342543DE82EF95 % 2**64)
        ) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
