"""Tokens in chunks: reads from earlier chunks and from the own chunk (SPEC section 2).

No function here loops over chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.packing import DocumentChunks, Packing
from mhla_lightning.errors import UserError

SPANS = ("chunk", "sequence")
EXTRAPOLATIONS = (None, "shift")


@dataclass(frozen=True)
class Decay:
    """Log decays of every token within its chunk.

    Attributes:
        until: (batch or 1, heads, M or 1, size), the sum from the chunk's first token to each, both included.
        total: (batch or 1, heads, M), the sum over each chunk.
        span: `chunk` decays reads from the own chunk only; `sequence` also reads from earlier chunks.
    """

    until: Tensor
    total: Tensor
    span: str

    def within(self) -> Tensor:
        """Return (..., size, size): the decay from token s to token t of a chunk, 0 for s > t."""
        size = self.until.shape[-1]
        later = torch.ones(size, size, dtype=torch.bool, device=self.until.device).triu(1)
        return (self.until[..., :, None] - self.until[..., None, :]).masked_fill(later, -torch.inf).exp()

    def between(self) -> Tensor:
        """Return the log decay from the end of chunk b to the start of chunk i > b.

        It is (batch or 1, heads, M, M), at [i, b]. The sum begins at b. A difference of two sums from the
        row's start would carry the rounding of other documents.
        """
        count = self.total.shape[-1]
        after = torch.ones(count, count, dtype=torch.bool, device=self.total.device).tril(-1)
        each = torch.where(after, self.total[..., :, None], 0)  # at [c, b]: the total of chunk c, for c > b
        return F.pad(each, (0, 0, 1, 0))[..., :-1, :].cumsum(-2)


@dataclass(frozen=True)
class ChunkedTokens:
    """q, k and v of one call, cut into M chunks of `size` tokens.

    Attributes:
        q, k: (batch, heads, M, size, dim_k), feature-mapped.
        v: (batch, heads, M, size, dim_v).
        tokens: tokens per row.
        chunks: layout of a padded or packed batch; None means one document per row.
        decay: None means no decay.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tokens: int
    chunks: DocumentChunks | None
    decay: Decay | None

    def split(self, x: Tensor) -> Tensor:
        """Cut (batch, heads, tokens, dim) into (batch, heads, M, size, dim)."""
        return split(x, self.k.shape[3], self.chunks)

    def join(self, x: Tensor) -> Tensor:
        """Undo :meth:`split`: (batch, heads, M, size, dim) -> (batch, heads, tokens, dim)."""
        if self.chunks is None:
            return x.flatten(2, 3)[:, :, : self.tokens]
        return self.chunks.join(x.permute(0, 2, 3, 1, 4)).transpose(1, 2)

    def of_ones(self, q: Tensor, k: Tensor) -> ChunkedTokens:
        """Return the same chunks with v = 1 and these features.

        They read the normalizer, sum_s A[t, s].
        """
        return replace(self, q=q, k=k, v=torch.ones_like(k[..., :1]))

    def summaries(self) -> Tensor:
        """Return S_b = sum_s k_s v_s^T of every chunk, (batch, heads, M, dim_k, dim_v).

        Where the decay spans the sequence, S_b is decayed to the end of its chunk.
        """
        k = self.k
        if self.decay is not None and self.decay.span == "sequence":
            k = k * (self.decay.total[..., None] - self.decay.until).exp().unsqueeze(-1)
        return k.transpose(-2, -1) @ self.v

    def read_earlier(self, summaries: Tensor, mixing: Tensor | None) -> Tensor:
        """Return q_t sum_{b<i} m[i, b] S_b, (batch, heads, M, size, dim_v).

        Args:
            summaries: S, (batch, heads, M, dim_k, dim_v).
            mixing: m, as :func:`weights` returns it; None means all ones.
        """
        q = self.q
        if self.decay is not None and self.decay.span == "sequence":
            q = q * self.decay.until.exp().unsqueeze(-1)
        return q @ self._prefix(summaries, mixing)

    def _prefix(self, summaries: Tensor, mixing: Tensor | None) -> Tensor:
        decayed = self.decay is not None and self.decay.span == "sequence"
        if mixing is None and self.chunks is None and not decayed:
            return F.pad(summaries[:, :, :-1], (0, 0, 0, 0, 1, 0)).cumsum(2)
        count = summaries.shape[2]
        if mixing is None:
            lower = self._earlier(count, summaries)
        elif self.chunks is None:
            lower = mixing.tril(-1)
        else:
            lower = mixing * self._earlier(count, mixing)
        if decayed:
            assert self.decay is not None
            lower = lower * self.decay.between().masked_fill(~self._earlier(count, lower).bool(), 0).exp()
        return (lower @ summaries.flatten(3)).view_as(summaries)

    def _earlier(self, count: int, like: Tensor) -> Tensor:
        """Return (M, M) or (batch, 1, M, M): 1 where chunk b precedes chunk i in its document."""
        if self.chunks is None:
            return torch.ones(count, count, dtype=like.dtype, device=like.device).tril(-1)
        return self.chunks.earlier().to(like.dtype).unsqueeze(1)

    def read_own(self) -> Tensor:
        """Return sum_{s<=t in the chunk} (q_t . k_s) v_s, decayed, (batch, heads, M, size, dim_v)."""
        scores = self.q @ self.k.transpose(-2, -1)
        scores = scores.tril() if self.decay is None else scores * self.decay.within()
        return scores @ self.v


def chunk_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    packing: Packing | None,
    *,
    log_decay: Tensor | None = None,
    decay_span: str = "chunk",
) -> ChunkedTokens:
    """Cut q, k and v into chunks.

    Args:
        q, k: (batch, heads, tokens, dim_k), feature-mapped.
        v: (batch, heads, tokens, dim_v).
        chunk_size: tokens per chunk.
        packing: of a padded or packed batch; None means one document per row.
        log_decay: (batch, heads, tokens), or (heads,) where all tokens decay alike; None means no decay.
        decay_span: see :class:`Decay`.
    """
    chunks = None if packing is None else packing.chunks(chunk_size)
    q, k, tokens = split(q, chunk_size, chunks), split(k, chunk_size, chunks), v.shape[2]
    decay = None if log_decay is None else decays(log_decay, tokens, chunk_size, chunks, decay_span)
    return ChunkedTokens(q, k, split(v, chunk_size, chunks), tokens, chunks, decay)


def split(x: Tensor, size: int, chunks: DocumentChunks | None) -> Tensor:
    """Cut (batch, heads, tokens, dim) into (batch, heads, M, size, dim).

    Empty places are zeros.
    """
    if chunks is None:
        # Padding by nothing would copy, and torch.compile takes the copy's strides for those of true padding.
        missing = -x.shape[2] % size
        cut = (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (-1, size))
    else:
        cut = chunks.split(x.transpose(1, 2)).permute(0, 3, 1, 2, 4)
    return cut.contiguous()  # one copy here, or every product that reads it makes its own


def decays(log_decay: Tensor, tokens: int, size: int, chunks: DocumentChunks | None, span: str) -> Decay:
    """Return the decays of (batch, heads, tokens), or of (heads,) where all tokens decay alike."""
    if log_decay.dim() == 1:
        # Only full chunks are read from later ones, so the total of a short chunk may include empty places.
        places = torch.arange(1, size + 1, device=log_decay.device, dtype=log_decay.dtype)
        until = log_decay[None, :, None, None] * places
        count = ceil_div(tokens, size) if chunks is None else chunks.count
        return Decay(until, until[..., -1].expand(-1, -1, count), span)
    until = split(log_decay.unsqueeze(-1), size, chunks).squeeze(-1).cumsum(-1)
    return Decay(until, until[..., -1], span)


def real_places(tokens: ChunkedTokens) -> Tensor:
    """Return which places hold a token: bool, broadcastable to (batch, heads, M, size, 1)."""
    if tokens.chunks is not None:
        return tokens.chunks.real[:, None, :, :, None]
    count, size = tokens.k.shape[2:4]
    return (torch.arange(count * size, device=tokens.k.device) < tokens.tokens).view(count, size, 1)


def weights(
    mixing: Tensor,
    form: str,
    extrapolation: str | None,
    *,
    longest: int,
    size: int,
    chunks: DocumentChunks | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mixing weights of a call: between chunks, and of each chunk with itself.

    Args:
        mixing: (blocks, blocks) or (heads, blocks, blocks); for the relative form (heads or 1, distances).
        form: `absolute` or `relative`, see :class:`MixingMatrix`.
        extrapolation: None or `shift`, see :func:`shifted`.
        longest: chunks of the longest document.
        size: tokens per chunk.
        chunks: layout of a padded or packed batch; None means one document per row.

    Returns:
        Weights broadcastable to (batch, heads, M, M), and their diagonals, to (batch, heads, M).

    Raises:
        UserError: a document of more chunks than the matrix has, without extrapolation.
    """
    blocks = mixing.shape[-1]
    if form == "relative":
        number = torch.arange(longest, device=mixing.device)
        mixing = mixing[:, (number[:, None] - number).clamp(0, blocks - 1)]
    elif longest > blocks:
        check_reach(longest, blocks, size, extrapolation)
        mixing = shifted(mixing, longest)
    if chunks is None:
        among = mixing[..., :longest, :longest]
    else:
        number = chunks.number
        per_row = mixing[..., number[:, :, None], number[:, None, :]]  # (batch, M, M) or (heads, batch, M, M)
        among = per_row.unsqueeze(1) if mixing.dim() == 2 else per_row.transpose(0, 1)
    return among, among.diagonal(dim1=-2, dim2=-1)


def check_reach(chunks: int, blocks: int, size: int, extrapolation: str | None) -> None:
    """Refuse a document longer than the mixing matrix (SPEC N6), unless it is extrapolated.

    Raises:
        UserError: more than `blocks` chunks without extrapolation.
    """
    if chunks > blocks and extrapolation is None:
        raise UserError(
            "extrapolation",
            f"null serves at most {blocks} chunks of {size} = {blocks * size} tokens a document, and there "
            "are more (prompt and output count together); choose 'shift', a larger `max_chunks`, mix_form "
            "'relative', or less text",
        )


def shifted(mixing: Tensor, count: int) -> Tensor:
    """Extend a matrix of L rows to `count` rows.

    Each row i >= L repeats the last row, shifted: m'[i, b] = m[L-1, L-1-(i-b)], and 0 where i - b >= L.
    """
    blocks, number = mixing.shape[-1], torch.arange(count, device=mixing.device)
    row = number.clamp_max(blocks - 1)[:, None]
    column = row - (number[:, None] - number)
    return mixing[..., row, column.clamp(0, blocks - 1)] * ((column >= 0) & (column <= row)).to(mixing.dtype)
