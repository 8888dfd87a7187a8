"""Padded and packed batches: positions inside documents, and documents cut into chunks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.masks import check_mask
from mhla_lightning.errors import UserError


@dataclass(frozen=True)
class DocumentChunks:
    """Documents cut into chunks of `size` tokens.

    Every document starts a new chunk, so some of the M chunks of a row are short.

    Attributes:
        size: tokens per chunk.
        count: M, chunks per row, the largest of the batch.
        longest: chunks of the longest document.
        slot: (batch * tokens,) int64, the place of each token in (batch, M * size + 1), flattened. Padding
            goes to the last place of its row.
        number: (batch, M) int64, the chunk's number within its document.
        document: (batch, M) int64, the document of each chunk; -1 where the row has fewer chunks.
        real: (batch, M, size) bool, True where a place holds a token.
    """

    size: int
    count: int
    longest: int
    slot: Tensor
    number: Tensor
    document: Tensor
    real: Tensor

    def split(self, x: Tensor) -> Tensor:
        """Cut (batch, tokens, ...) into (batch, M, size, ...), with zeros at empty places."""
        batch, places = x.shape[0], self.count * self.size + 1
        flat = x.new_zeros(batch * places, *x.shape[2:]).index_copy(0, self.slot, x.flatten(0, 1))
        return flat.unflatten(0, (batch, places))[:, :-1].unflatten(1, (self.count, self.size))

    def join(self, chunks: Tensor) -> Tensor:
        """Undo :meth:`split`: (batch, M, size, ...) -> (batch, tokens, ...), zeros at padding."""
        flat = F.pad(chunks.flatten(1, 2), (0, 0) * (chunks.dim() - 3) + (0, 1)).flatten(0, 1)
        return flat.index_select(0, self.slot).unflatten(0, (chunks.shape[0], -1))

    def earlier(self) -> Tensor:
        """Return (batch, M, M) bool: chunk b precedes chunk i in the same document, at [i, b]."""
        return self._same() & (self.number[:, None, :] < self.number[:, :, None])

    def _same(self) -> Tensor:
        return self.document[:, :, None] == self.document[:, None, :]

    @cached_property
    def layout(self) -> Tensor:
        """The chunks as kernels read them, (batch, M, size + 2) int32.

        These are the token at each place of a chunk, -1 where there is none. Then come the first chunk of the
        chunk's document, and one past its last.
        """
        batch, places = len(self.number), self.count * self.size + 1
        tokens = torch.arange(len(self.slot) // batch, device=self.slot.device)
        token = tokens.new_full((batch * places,), -1).index_copy(0, self.slot, tokens.repeat(batch))
        token = token.unflatten(0, (batch, places))[:, :-1].unflatten(1, (self.count, self.size))
        first = torch.arange(self.count, device=self.number.device) - self.number
        bounds = torch.stack([first, first + self._same().sum(2)], 2)
        return torch.cat([token, bounds], 2).int()


@dataclass(frozen=True)
class Sequences:
    """The real tokens of a batch, concatenated document after document.

    Attributes:
        places: (real tokens,) int64, the position of each in (batch * tokens).
        bounds: (documents + 1,) int64, the start of each document, and the end of the last.
        rows: (documents,) int64, the row of each.
    """

    places: Tensor
    bounds: Tensor
    rows: Tensor

    def join(self, x: Tensor) -> Tensor:
        """Concatenate the real tokens: (batch, tokens, ...) -> (1, real tokens, ...)."""
        return x.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def split(self, x: Tensor, batch: int, tokens: int) -> Tensor:
        """Undo :meth:`join`: (1, real tokens, ...) -> (batch, tokens, ...), zeros at padding."""
        return (
            x.new_zeros(batch * tokens, *x.shape[2:])
            .index_copy(0, self.places, x[0])
            .unflatten(0, (batch, tokens))
        )


class Packing:
    """Mask and documents of a batch, and the layouts derived from them.

    A document is a run of equal numbers; padding belongs to none.

    Args:
        mask: (batch, tokens) bool, True = real token; None means all tokens are real.
        documents: (batch, tokens) int; None means one document per row.
        lengths: of :func:`document_lengths`, on the host; the chunks are then cut without waiting for the
            device. None asks the device.
        few_layouts: fill the chunks of a row up to one of few numbers, so that compiled code serves many
            batches.

    Attributes:
        real: (batch, tokens) bool, True = real token.
        run: (batch, tokens) int64, the number of the document within its row, from 1 on.
        positions: (batch, tokens) int64, the number of real tokens of the same document before each token.

    Raises:
        UserError: neither mask nor documents, or a mask that is not bool.
    """

    def __init__(
        self,
        mask: Tensor | None,
        documents: Tensor | None,
        lengths: Tensor | None = None,
        *,
        few_layouts: bool = False,
    ) -> None:
        either = mask if mask is not None else documents
        if either is None:
            raise UserError("mask", "found neither a mask nor `documents`; a packing needs one of them")
        check_mask(mask)
        self.mask, self.documents, self.lengths = mask, documents, lengths
        self.few_layouts = few_layouts
        self.real = torch.ones_like(either, dtype=torch.bool) if mask is None else mask
        starts = torch.zeros_like(self.real)
        starts[:, 0] = True
        if documents is not None:
            starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        count = self.real.long().cumsum(1)
        before = torch.where(starts, count - self.real.long(), 0).cummax(1).values
        self.run = starts.long().cumsum(1)
        self.positions = (count - before - 1).clamp_min(0)
        self._chunks: dict[int, DocumentChunks] = {}
        self._sequences: Sequences | None = None

    @classmethod
    def of(
        cls,
        mask: Tensor | None,
        documents: Tensor | None,
        lengths: Tensor | None = None,
        *,
        few_layouts: bool = False,
    ) -> Packing | None:
        """Return a packing; None where every token is real and a row is one document."""
        if mask is None and documents is None:
            return None
        return cls(mask, documents, lengths, few_layouts=few_layouts)

    def allowed(self) -> Tensor:
        """Return (batch, 1, tokens, tokens) bool: which keys each query sees.

        These are the real tokens of the same document that are not later. A padded query sees itself, so
        that no row is empty.
        """
        tokens = self.real.shape[1]
        same = self.run[:, :, None] == self.run[:, None, :]
        seen = (same & self.real[:, None, :]).tril()
        return (seen | torch.eye(tokens, dtype=torch.bool, device=seen.device)).unsqueeze(1)

    def chunks(self, size: int) -> DocumentChunks:
        """Cut the documents into chunks of `size` tokens.

        The result is cached, because every layer asks for it and computing it waits for the device.
        """
        if size not in self._chunks:
            self._chunks[size] = self._cut(size)
        return self._chunks[size]

    def sequences(self) -> Sequences:
        """Concatenate the documents without padding; the result is cached."""
        if self._sequences is None:
            places = self.real.flatten().nonzero().squeeze(1)
            starts = (self.positions.flatten()[places] == 0).nonzero().squeeze(1)
            rows = places[starts] // self.real.shape[1]
            self._sequences = Sequences(places, F.pad(starts, (0, 1), value=len(places)), rows)
        return self._sequences

    def _cut(self, size: int) -> DocumentChunks:
        batch, tokens = self.real.shape
        within = self.positions % size
        first = self.real & (within == 0)
        chunk = first.long().cumsum(1) - 1
        numbers = self.positions // size
        if self.lengths is None:
            largest = torch.stack([chunk.max() + 1, torch.where(self.real, numbers, 0).max() + 1])
            count, longest = (int(n) for n in largest.tolist())
        else:
            cut = -(-self.lengths // size)
            count, longest = int(cut.sum(1).max()), max(1, int(cut.max()))
        count = max(1, count)
        if self.few_layouts:
            step = ceil_div(ceil_div(tokens, size), 4)
            count = step * ceil_div(count, step)
        places = count * size + 1
        rows = torch.arange(batch, device=chunk.device)[:, None] * places
        slot = (rows + torch.where(self.real, chunk * size + within, places - 1)).flatten()
        # The first token of each chunk writes the chunk's number and document; all other tokens write into a
        # spare column that is dropped.
        target = torch.where(first, chunk, count)
        number = chunk.new_zeros(batch, count + 1).scatter_(1, target, numbers)[:, :count]
        document = chunk.new_full((batch, count + 1), -1).scatter_(1, target, self.run)[:, :count]
        real = torch.zeros(batch * places, dtype=torch.bool, device=chunk.device)
        real[slot] = self.real.flatten()
        return DocumentChunks(
            size,
            count,
            longest,
            slot,
            number,
            document,
            real.view(batch, places)[:, :-1].view(batch, count, size),
        )


def document_lengths(mask: Tensor | None, documents: Tensor | None) -> Tensor:
    """Return the number of real tokens of every document, (batch, documents) int64.

    A row of fewer documents ends with zeros.

    Args:
        mask, documents: see :class:`Packing`, on the host.

    Raises:
        UserError: neither mask nor documents.
    """
    packing = Packing(mask, documents)
    numbers = packing.run - 1
    lengths = numbers.new_zeros(len(numbers), int(numbers.max()) + 1)
    return lengths.scatter_add_(1, numbers, packing.real.long())


def one_document_per_row(packing: Packing | None) -> None:
    """Refuse packed documents where a streaming state is asked for.

    Raises:
        UserError: the packing was made of documents.
    """
    if packing is not None and packing.documents is not None:
        raise UserError(
            "documents", "found packed documents, but a state follows one document per row; omit them"
        )
