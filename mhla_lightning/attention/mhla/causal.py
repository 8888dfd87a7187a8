"""Causal Multi-Head Linear Attention, chunk by chunk (SPEC section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from mhla_lightning.attention.chunks import (
    EXTRAPOLATIONS,
    SPANS,
    ChunkedTokens,
    chunk_tokens,
    real_places,
    weights,
)
from mhla_lightning.attention.mhla.decode import MHLAState
from mhla_lightning.attention.mhla.fused_causal import fused_causal, pays
from mhla_lightning.attention.mhla.mixing import FORMS
from mhla_lightning.attention.mhla.prefill import state_after
from mhla_lightning.attention.packing import Packing
from mhla_lightning.errors import UserError, unknown_name

CAUSAL_NORMALIZERS = ("none", "block")


def causal_mhla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    *,
    chunk_size: int = 64,
    scale: float | None = None,
    normalizer: str = "none",
    eps: float = 1e-6,
    documents: Tensor | None = None,
    mask: Tensor | None = None,
    form: str = "absolute",
    extrapolation: str | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    packing: Packing | None = None,
    log_decay: Tensor | None = None,
    decay_span: str = "chunk",
    own: bool = True,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, MHLAState]:
    """A[t, s] = m[c(t), c(s)] q_t . k_s scale for s <= t, with c(t) the chunk of a token within its document.

    Args:
        q, k: (batch, heads, tokens, dim_k), already through the feature map; any number of tokens.
        v: (batch, heads, tokens, dim_v).
        mixing: (blocks, blocks) or (heads, blocks, blocks); row = query chunk; what stands above the diagonal
            is not read. With form `relative` (heads or 1, distances), see :class:`MixingMatrix`.
        chunk_size: tokens a chunk.
        scale: factor on q.k; None is dim_k ** -0.5.
        normalizer: `none` (the paper's, for language) or `block`, which divides by sum_s A[t, s] + eps.
        documents: (batch, tokens) int; a run of equal numbers is a document, chunks start anew with each.
        mask: (batch, tokens) bool, True = real token. Padded keys count nowhere, padded queries give 0.
        extrapolation: None refuses a document of more chunks than the matrix has; `shift` lets every later
            row use the last one, moved along, so that the last `blocks` chunks are seen.
        q_norm, k_norm: features for the normalizer where they differ (rotary); default q, k.
        packing: of the same mask and documents, where it was made already.
        log_decay: (batch, heads, tokens), or (heads,) for all tokens alike, at most 0: A[t, s] also takes
            exp(sum of log_decay over s+1..t) inside a chunk, and across chunks with decay_span `sequence`.
        own: False leaves out the chunk of the query: what earlier chunks give alone.
        return_state: also gives the state behind the last real token; for one document a row.

    Returns:
        (batch, heads, tokens, dim_v), and the state where asked.

    Raises:
        UserError: unknown names, a document beyond the matrix, or a state of packed documents.
    """
    _check(normalizer, decay_span, form, extrapolation)
    packing = packing or Packing.of(mask, documents)
    if return_state and packing is not None and packing.documents is not None:
        raise UserError("a state follows one document a row; leave documents out")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chunks = None if packing is None else packing.chunks(chunk_size)
    longest = -(-q.shape[2] // chunk_size) if chunks is None else chunks.longest
    parts = weights(mixing, form, extrapolation, longest=longest, size=chunk_size, chunks=chunks)
    among, diagonal = (scale * part for part in parts)  # the smallest tensors that the scale can go into
    plain = chunks is None and log_decay is None and normalizer == "none" and own and not return_state
    if plain and pays(q, chunk_size):
        return fused_causal(q, k, v, among.tril(-1), diagonal, chunk_size)
    tokens = chunk_tokens(q, k, v, chunk_size, packing, log_decay=log_decay, decay_span=decay_span)
    summaries, ones, sums = tokens.summaries(), None, None
    out = _read(tokens, summaries, among, diagonal if own else None)
    if normalizer == "block":
        ones = tokens.of_ones(
            tokens.q if q_norm is None else tokens.split(q_norm),
            tokens.k if k_norm is None else tokens.split(k_norm),
        )
        sums = ones.summaries()
        normalizers = _read(ones, sums, among, diagonal if own else None) + eps
        out = out / normalizers.masked_fill(
            ~real_places(tokens), 1
        )  # 0 / 0 where no token stands would poison the gradients
    if not return_state:
        return tokens.join(out)
    real = None if packing is None else packing.real
    state = state_after(
        tokens, summaries, ones, sums, real, mixing, merges=form == "relative", extrapolation=extrapolation
    )
    return tokens.join(out), state


def _check(normalizer: str, decay_span: str, form: str, extrapolation: str | None) -> None:
    """Refuses unknown names. Raises UserError."""
    for what, value, known in (
        ("normalizer", normalizer, CAUSAL_NORMALIZERS),
        ("decay_span", decay_span, SPANS),
        ("form", form, FORMS),
    ):
        if value not in known:
            raise UserError(unknown_name(what, value, known))
    if extrapolation not in EXTRAPOLATIONS:
        raise UserError(unknown_name("extrapolation", extrapolation, ("null", "shift")))


def _read(tokens: ChunkedTokens, summaries: Tensor, among: Tensor, diagonal: Tensor | None) -> Tensor:
    """What every token reads of earlier chunks and, with the weights `diagonal`, of its own."""
    earlier = tokens.read_earlier(summaries, among)
    return (
        earlier if diagonal is None else torch.addcmul(earlier, diagonal[..., None, None], tokens.read_own())
    )
