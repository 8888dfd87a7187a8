"""Causal Multi-Head Linear Attention in chunks (SPEC section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.chunks import ChunkedTokens, chunk_tokens, real_places, weights
from mhla_lightning.attention.mhla.decode import MHLAState
from mhla_lightning.attention.mhla.fused_causal import fused_causal, pays
from mhla_lightning.attention.mhla.prefill import state_after
from mhla_lightning.attention.mhla.rule import CausalFeatures, CausalRule
from mhla_lightning.attention.packing import Packing, one_document_per_row


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
) -> Tensor:
    """Compute causal MHLA as in the paper.

    :func:`attend_in_chunks` has the options beyond it. A[t, s] = m[c(t), c(s)] q_t . k_s scale for s <= t,
    where c(t) is the chunk of token t in its document.

    Args:
        q, k: (batch, heads, tokens, dim_k), already through the feature map; any number of tokens.
        v: (batch, heads, tokens, dim_v).
        mixing: (blocks, blocks) or (heads, blocks, blocks); row = query chunk. Entries above the diagonal are
            not read.
        chunk_size, scale, normalizer, eps: see :class:`CausalRule`.
        documents: (batch, tokens) int, a run of equal numbers is a document and chunks restart with each;
            None means one document per row.
        mask: (batch, tokens) bool, True = real token; None means all tokens are real. Padded keys count
            nowhere, padded queries give 0.

    Returns:
        (batch, heads, tokens, dim_v)

    Raises:
        UserError: unknown normalizer, or a document of more chunks than the matrix has.
    """
    rule = CausalRule(chunk_size=chunk_size, scale=scale, normalizer=normalizer, eps=eps)
    return attend_in_chunks(CausalFeatures(q, k, v), mixing, rule, Packing.of(mask, documents))


def attend_in_chunks(
    features: CausalFeatures, mixing: Tensor, rule: CausalRule, packing: Packing | None = None
) -> Tensor:
    """Compute causal MHLA by any rule.

    Args:
        features: q, k, v and what else the rule takes of each token.
        mixing: (blocks, blocks) or (heads, blocks, blocks); of form `relative` (heads or 1, distances).
        rule: the settings.
        packing: of a padded or packed batch; None means one document per row.

    Returns:
        (batch, heads, tokens, dim_v)

    Raises:
        UserError: a document beyond the matrix, without extrapolation.
    """
    return _compute(features, mixing, rule, packing, keep=False)[0]


def prefill_in_chunks(
    features: CausalFeatures, mixing: Tensor, rule: CausalRule, packing: Packing | None = None
) -> tuple[Tensor, MHLAState]:
    """Compute :func:`attend_in_chunks`, and the state after the last real token of each row.

    Raises:
        UserError: a document beyond the matrix, or packed documents.
    """
    one_document_per_row(packing)
    out, state = _compute(features, mixing, rule, packing, keep=True)
    assert state is not None
    return out, state


def _compute(
    features: CausalFeatures, mixing: Tensor, rule: CausalRule, packing: Packing | None, *, keep: bool
) -> tuple[Tensor, MHLAState | None]:
    q, k, v, size = features.q, features.k, features.v, rule.chunk_size
    chunks = None if packing is None else packing.chunks(size)
    longest = ceil_div(q.shape[2], size) if chunks is None else chunks.longest
    parts = weights(mixing, rule.form, rule.extrapolation, longest=longest, size=size, chunks=chunks)
    # The weights are the smallest tensors that can take the scale.
    among, diagonal = (rule.scale_for(q.shape[-1]) * part for part in parts)
    simple = chunks is None and features.log_decay is None and rule.normalizer == "none"
    if simple and rule.own_chunk and not keep and pays(size, q, k, v, mixing):
        return fused_causal(q, k, v, among.tril(-1), diagonal, size), None
    own = diagonal if rule.own_chunk else None
    tokens = chunk_tokens(q, k, v, size, packing, log_decay=features.log_decay, decay_span=rule.decay_span)
    summaries, ones, sums = tokens.summaries(), None, None
    out = _read(tokens, summaries, among, own)
    if rule.normalizer == "block":
        ones = tokens.of_ones(
            tokens.q if features.q_norm is None else tokens.split(features.q_norm),
            tokens.k if features.k_norm is None else tokens.split(features.k_norm),
        )
        sums = ones.summaries()
        normalizers = _read(ones, sums, among, own) + rule.eps
        # Without the 1, an empty place would give 0 / 0, and NaN in the gradients.
        out = out / normalizers.masked_fill(~real_places(tokens), 1)
    if not keep:
        return tokens.join(out), None
    real = None if packing is None else packing.real
    return tokens.join(out), state_after(tokens, summaries, ones, sums, real, mixing, rule)


def _read(tokens: ChunkedTokens, summaries: Tensor, among: Tensor, diagonal: Tensor | None) -> Tensor:
    """Read earlier chunks and, with the weights `diagonal`, the own chunk."""
    earlier = tokens.read_earlier(summaries, among)
    if diagonal is None:
        return earlier
    return torch.addcmul(earlier, diagonal[..., None, None], tokens.read_own())
