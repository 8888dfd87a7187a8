"""Multi-Head Linear Attention as the paper writes it: the full attention matrix.

For tests and for reading; it works in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_mhla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    block_of_token: Tensor,
    *,
    normalizer: str = "block",
    eps: float = 0.0,
    causal: bool = False,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Compute paper Eq. 5 with the N x N matrix written out; tokens in raster order.

    A scale on q.k is a scale on q.

    Args:
        q, k: (batch, heads, tokens, dim_k), already through the feature map.
        v: (batch, heads, tokens, dim_v).
        mixing: (blocks, blocks) or (heads, blocks, blocks); row = query block.
        block_of_token: (tokens,) or (batch, tokens) int64.
        normalizer: `block` divides by the row sum (Eq. 4); `slot` is the release's rule (SPEC 1.1); `none`.
        eps: added to the normalizer.
        causal: token t sees s <= t only.
        mask: (batch, tokens) bool, True = real token; None means all tokens are real. Padded keys count
            nowhere, padded queries give 0.
        documents: (batch, tokens) int, tokens see their own document only; None means one document per row.

    Returns:
        (batch, heads, tokens, dim_v)
    """
    block = block_of_token.expand(q.shape[0], -1)
    allowed = _allowed(block, causal, mask, documents).to(q.dtype)
    m = mixing.expand(q.shape[1], -1, -1)
    m = m[:, block[:, :, None], block[:, None, :]].transpose(0, 1)  # m[b(i), b(t)], one entry per token pair
    attention = m * (q @ k.mT) * allowed[:, None]  # Eq. 5: A[i, t] = m[b(i), b(t)] q_i . k_t
    out = attention @ v  # Eq. 5: o_i = sum_t A[i, t] v_t
    if normalizer == "block":
        out = out / (attention.sum(-1, keepdim=True) + eps)  # Eq. 4: over q_i . z~_b(i) = sum_t A[i, t]
    elif normalizer == "slot":
        out = out / _slot_normalizer(q, k * allowed[:, None, -1, :, None], mixing, block_of_token, eps)
    return out if mask is None else out * mask[:, None, :, None]


def dense_cross_mhla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    query_block: Tensor,
    key_block: Tensor,
    *,
    normalizer: str = "block",
    eps: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute Eq. 5 between two sequences, with the matrix of tokens x keys written out.

    Args:
        q: (batch, heads, tokens, dim_k), already through the feature map.
        k, v: (batch, heads, keys, dim_k) and (batch, heads, keys, dim_v).
        mixing: (query blocks, key blocks) or (heads, query blocks, key blocks).
        query_block, key_block: (tokens,) and (keys,) int64.
        normalizer: `block` divides by the row sum; `none`.
        eps: added to the normalizer.
        mask: (batch, keys) bool, True = real key; None means all keys are real.

    Returns:
        (batch, heads, tokens, dim_v)
    """
    attention = mixing[..., query_block[:, None], key_block] * (q @ k.mT)
    if mask is not None:
        attention = attention * mask[:, None, None].to(q.dtype)
    out = attention @ v
    return out / (attention.sum(-1, keepdim=True) + eps) if normalizer == "block" else out


def _allowed(block: Tensor, causal: bool, mask: Tensor | None, documents: Tensor | None) -> Tensor:
    """Return (batch, tokens, tokens) bool: which keys each query may see."""
    batch, tokens = block.shape
    allowed = torch.ones(batch, tokens, tokens, dtype=torch.bool, device=block.device)
    if causal:
        allowed = allowed.tril()
    if mask is not None:
        allowed = allowed & mask[:, None, :]
    if documents is not None:
        allowed = allowed & (documents[:, :, None] == documents[:, None, :])
    return allowed


def _slot_normalizer(q: Tensor, k: Tensor, mixing: Tensor, block_of_token: Tensor, eps: float) -> Tensor:
    """Return the release's normalizer (SPEC 1.1), (batch, heads, tokens, 1); equal blocks only.

    n[i, w] = eps + sum_b m[i, b] q[b, w] . z_b: each block b contributes its own query at the same place w.
    """
    blocks = mixing.shape[-1]
    order = torch.argsort(block_of_token, stable=True).view(
        blocks, -1
    )  # at [b, w]: the token at place w of b
    z = k[..., order, :].sum(-2)  # z_b = sum_t k_t
    own = torch.einsum("...bwd,...bd->...bw", q[..., order, :], z)  # q[b, w] . z_b
    mixed = mixing @ own + eps
    out = torch.empty_like(q[..., :1])
    out[..., order.flatten(), 0] = mixed.flatten(-2)
    return out
