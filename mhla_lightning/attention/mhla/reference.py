"""Multi-Head Linear Attention as the paper writes it: the full attention matrix. For tests and for
reading; float64 friendly.
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
    scale: float = 1.0,
    causal: bool = False,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Paper Eq. 5 with the N x N matrix written out; tokens in raster order.

    Args:
        q, k: (batch, heads, tokens, dim_k), already through the feature map.
        v: (batch, heads, tokens, dim_v).
        mixing: (blocks, blocks) or (heads, blocks, blocks); row = query block.
        block_of_token: (tokens,) or (batch, tokens) int64.
        normalizer: `block` divides by the row sum (Eq. 4); `slot` is the release's rule (SPEC 1.1); `none`.
        eps: added to the normalizer.
        scale: factor on q.k.
        causal: token t sees s <= t only.
        mask: (batch, tokens) bool, True = real token. Padded keys count nowhere, padded queries give 0.
        documents: (batch, tokens) int; tokens see their own document only.

    Returns:
        (batch, heads, tokens, dim_v)
    """
    block = block_of_token.expand(q.shape[0], -1)
    heads_mixing = mixing.expand(q.shape[1], -1, -1)
    m = heads_mixing[:, block[:, :, None], block[:, None, :]].transpose(
        0, 1
    )  # m[b(i), b(t)]: (batch, heads, tokens, tokens)
    allowed = _allowed(block, causal, mask, documents).to(q.dtype)
    attention = (
        m * (scale * q @ k.transpose(-2, -1)) * allowed[:, None]
    )  # Eq. 5: A[i, t] = m[b(i), b(t)] q_i . k_t
    out = attention @ v
    if normalizer == "block":
        out = out / (attention.sum(-1, keepdim=True) + eps)  # Eq. 4: q_i . z~_b(i)
    elif normalizer == "slot":
        out = out / _slot_normalizer(q, k * allowed[:, None, -1, :, None], mixing, block_of_token, eps)
    return out if mask is None else out * mask[:, None, :, None]


def _allowed(block: Tensor, causal: bool, mask: Tensor | None, documents: Tensor | None) -> Tensor:
    """(batch, tokens, tokens) bool: which key every query may see."""
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
    """(batch, heads, tokens, 1): n[i, w] = eps + sum_b m[i, b] q[b, w] . z_b, every block's own query at
    the same place w. Equal blocks only.
    """
    blocks = mixing.shape[-1]
    order = torch.argsort(block_of_token, stable=True).view(
        blocks, -1
    )  # (blocks, tokens_per_block): token at place w of block b
    z = k[..., order, :].sum(-2)
    own = torch.einsum("...bwd,...bd->...bw", q[..., order, :], z)
    mixed = mixing @ own + eps
    out = torch.empty_like(q[..., :1])
    out[..., order.flatten(), 0] = mixed.flatten(-2)
    return out
