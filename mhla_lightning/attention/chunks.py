"""Tokens in chunks: what a causal operator reads from earlier chunks and from its own. No loop over chunks
(SPEC section 2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention.packing import Chunks, Packing
from mhla_lightning.errors import UserError

SPANS = ("chunk", "sequence")
EXTRAPOLATIONS = (None, "shift")


@dataclass(frozen=True)
class Decay:
    """Decays of every token within its chunk, as logs.

    until: (batch or 1, heads, M or 1, size), sum from the chunk's first token to each, both included. total:
        (batch or 1, heads, M), of whole chunks.
    span: `chunk` decays what a token reads from its own chunk; `sequence` also what it reads from earlier
        ones.
    """

    until: Tensor
    total: Tensor
    span: str

    def within(self) -> Tensor:
        """(..., size, size): exp of the decay from token s to token t of a chunk, 0 for s > t."""
        size = self.until.shape[-1]
        later = torch.ones(size, size, dtype=torch.bool, device=self.until.device).triu(1)
        return (self.until[..., :, None] - self.until[..., None, :]).masked_fill(later, -torch.inf).exp()

    def between(self) -> Tensor:
        """(batch or 1, heads, M, M): log decay from the end of chunk b to the start of chunk i, for b < i.

        Summed from b on, not as a difference of sums from the row's start: those would carry the rounding of
        other documents.
        """
        count = self.total.shape[-1]
        after = torch.ones(count, count, dtype=torch.bool, device=self.total.device).tril(-1)
        each = torch.where(after, self.total[..., :, None], 0)  # at [c, b]: the total of chunk c, for c > b
        return F.pad(each, (0, 0, 1, 0))[..., :-1, :].cumsum(-2)


@dataclass(frozen=True)
class ChunkedTokens:
    """q, k and v of one call in chunks.

    Attributes:
        q, k: (batch, heads, M, size, dim_k), feature-mapped. v: (batch, heads, M, size, dim_v).
        chunks: of a padded or packed batch; None is one document of `tokens` tokens a row.
        decay: None is none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tokens: int
    chunks: Chunks | None
    decay: Decay | None

    def split(self, x: Tensor) -> Tensor:
        """(batch, heads, tokens, dim) -> (batch, heads, M, size, dim)."""
        return split(x, self.k.shape[3], self.chunks)

    def join(self, x: Tensor) -> Tensor:
        """(batch, heads, M, size, dim) -> (batch, heads, tokens, dim)."""
        if self.chunks is None:
            return x.flatten(2, 3)[:, :, : self.tokens]
        return self.chunks.join(x.permute(0, 2, 3, 1, 4)).transpose(1, 2)

    def of_ones(self, q: Tensor, k: Tensor) -> ChunkedTokens:
        """The same with v = 1 and these features: reads sum_s A[t, s], the normalizer."""
        return replace(self, q=q, k=k, v=torch.ones_like(k[..., :1]))

    def summaries(self) -> Tensor:
        """S_b = sum_s k_s v_s^T of every chunk, (batch, heads, M, dim_k, dim_v), decayed to its end where
        the decay spans the sequence.
        """
        k = self.k
        if self.decay is not None and self.decay.span == "sequence":
            k = k * (self.decay.total[..., None] - self.decay.until).exp().unsqueeze(-1)
        return k.transpose(-2, -1) @ self.v

    def read_earlier(self, summaries: Tensor, mixing: Tensor | None) -> Tensor:
        """q_t sum_{b<i} m[i, b] S_b, (batch, heads, M, size, dim_v); mixing as :func:`weights` gives it,
        None is all ones.
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
        lower = (
            self._earlier(count, summaries)
            if mixing is None
            else mixing.tril(-1)
            if self.chunks is None
            else mixing * self._earlier(count, mixing)
        )
        if decayed:
            assert self.decay is not None
            lower = lower * self.decay.between().masked_fill(~self._earlier(count, lower).bool(), 0).exp()
        return (lower @ summaries.flatten(3)).view_as(summaries)

    def _earlier(self, count: int, like: Tensor) -> Tensor:
        """(M, M) or (batch, 1, M, M): 1 where chunk b is earlier in the same document as chunk i."""
        if self.chunks is None:
            return torch.ones(count, count, dtype=like.dtype, device=like.device).tril(-1)
        return self.chunks.earlier().to(like.dtype).unsqueeze(1)

    def read_own(self) -> Tensor:
        """sum_{s<=t in the chunk} (q_t . k_s) v_s, decayed, (batch, heads, M, size, dim_v)."""
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
    """Cuts (batch, heads, tokens, dim) into chunks; see
    :func:`mhla_lightning.attention.mhla.causal.causal_mhla` for the arguments.
    """
    chunks = None if packing is None else packing.chunks(chunk_size)
    q, k, tokens = split(q, chunk_size, chunks), split(k, chunk_size, chunks), v.shape[2]
    decay = None if log_decay is None else _decay(log_decay, tokens, chunk_size, chunks, decay_span)
    return ChunkedTokens(q, k, split(v, chunk_size, chunks), tokens, chunks, decay)


def split(x: Tensor, size: int, chunks: Chunks | None) -> Tensor:
    """(batch, heads, tokens, dim) -> (batch, heads, M, size, dim), zeros where no token stands."""
    if chunks is None:
        cut = F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))
    else:
        cut = chunks.split(x.transpose(1, 2)).permute(0, 3, 1, 2, 4)
    return cut.contiguous()  # once, or every product that reads it copies it anew


def _decay(log_decay: Tensor, tokens: int, size: int, chunks: Chunks | None, span: str) -> Decay:
    """log_decay: (batch, heads, tokens), or (heads,) where all tokens decay alike."""
    if log_decay.dim() == 1:
        # Only full chunks are read from later ones, so a short chunk's total may count places where no token
        # stands.
        until = log_decay[None, :, None, None] * torch.arange(
            1, size + 1, device=log_decay.device, dtype=log_decay.dtype
        )
        count = -(-tokens // size) if chunks is None else chunks.count
        return Decay(until, until[..., -1].expand(-1, -1, count), span)
    until = split(log_decay.unsqueeze(-1), size, chunks).squeeze(-1).cumsum(-1)
    return Decay(until, until[..., -1], span)


def real_places(tokens: ChunkedTokens) -> Tensor:
    """Bool, broadcastable to (batch, heads, M, size, 1): True where a token stands."""
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
    chunks: Chunks | None = None,
) -> tuple[Tensor, Tensor]:
    """Mixing weights between the chunks of a call, broadcastable to (batch, heads, M, M), and of each chunk
    with itself, to (batch, heads, M).

    mixing: (blocks, blocks) or (heads, blocks, blocks); for the relative form (heads or 1, distances).
        longest: chunks of the longest document.
    size: tokens a chunk. chunks: of a padded or packed batch.

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
    """Refuses a document longer than the mixing matrix (SPEC N6) unless it is extrapolated. Raises
    UserError.
    """
    if chunks > blocks and extrapolation is None:
        raise UserError(
            f"the mixing matrix serves {blocks} chunks of {size} = {blocks * size} tokens a "
            "document, and there are more (prompt and context count"
            " whole); give max_chunks, extrapolation: shift or mix_form: relative in the recipe, "
            "--extrapolation shift to a trained run, or less text"
        )


def shifted(mixing: Tensor, count: int) -> Tensor:
    """The matrix with `count` rows: m'[i, b] = m[L-1, L-1-(i-b)] for rows i >= L, 0 where that column is
    not there.
    """
    blocks, number = mixing.shape[-1], torch.arange(count, device=mixing.device)
    row = number.clamp_max(blocks - 1)[:, None]
    column = row - (number[:, None] - number)
    return mixing[..., row, column.clamp(0, blocks - 1)] * ((column >= 0) & (column <= row)).to(mixing.dtype)
