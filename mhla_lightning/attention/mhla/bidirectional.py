"""Bidirectional Multi-Head Linear Attention on tokens in block order (paper Eq. 4; SPEC section 1)."""

from __future__ import annotations

from torch import Tensor

from mhla_lightning.errors import UserError, unknown_name

NORMALIZERS = ("block", "slot", "none")


def block_summaries(k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S_b = sum_t k_t v_t^T and z_b = sum_t k_t of every block.

    Args:
        k: (batch, heads, blocks, tokens_per_block, dim_k), feature-mapped.
        v: (batch, heads, blocks, tokens_per_block, dim_v).
        mask: (blocks, tokens_per_block) or (batch, blocks, tokens_per_block) bool, True = real token.

    Returns:
        S (batch, heads, blocks, dim_k, dim_v) and z (batch, heads, blocks, dim_k).
    """
    k = _masked(k, mask)
    return k.transpose(-2, -1) @ v, k.sum(-2)


def mix(summaries: Tensor, mixing: Tensor) -> Tensor:
    """S~_i = sum_b m[i, b] S_b over the block axis, the third of `summaries`; mixing is (blocks, blocks)
    or (heads, blocks, blocks).
    """
    return (mixing @ summaries.flatten(3)).view_as(summaries) if summaries.dim() > 4 else mixing @ summaries


def read(q: Tensor, mixed: Tensor) -> Tensor:
    """q_t S~_b(t): (batch, heads, blocks, tokens_per_block, dim_k) on (batch, heads, blocks, dim_k,
    dim_v).
    """
    return q @ mixed


def mhla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    *,
    normalizer: str = "block",
    eps: float = 1e-6,
    mask: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> Tensor:
    """Multi-Head Linear Attention, Eq. 4: every block reads its own mixture of all block summaries.

    Args:
        q, k: (batch, heads, blocks, tokens_per_block, dim_k), already through the feature map.
        v: (batch, heads, blocks, tokens_per_block, dim_v).
        mixing: (blocks, blocks) or (heads, blocks, blocks); row = query block.
        normalizer: `block` (Eq. 4, the implied attention rows sum to 1), `slot` (the release's rule, full
            blocks only) or `none`.
        eps: added to the normalizer.
        mask: (blocks, tokens_per_block) or (batch, blocks, tokens_per_block) bool. Padded keys count nowhere,
            padded queries give 0.
        q_norm, k_norm: features for the normalizer where they differ (rotary turns q and k in the numerator
            only).

    Returns:
        (batch, heads, blocks, tokens_per_block, dim_v)

    Raises:
        UserError: unknown normalizer, or `slot` with a mask.
    """
    if normalizer not in NORMALIZERS:
        raise UserError(unknown_name("normalizer", normalizer, NORMALIZERS))
    if normalizer == "slot" and mask is not None:
        raise UserError(
            "normalizer 'slot' pairs queries by their place in the block and needs full blocks "
            "without padding; use 'block' or 'none'"
        )
    summaries, z = block_summaries(k, v, mask)
    out = read(q, mix(summaries, mixing))
    if normalizer != "none":
        z = z if k_norm is None else _masked(k_norm, mask).sum(-2)
        out = out / (_normalizer(q if q_norm is None else q_norm, z, mixing, normalizer) + eps)
    return _masked(out, mask)


def _normalizer(q: Tensor, z: Tensor, mixing: Tensor, kind: str) -> Tensor:
    """(batch, heads, blocks, tokens_per_block, 1)"""
    if kind == "block":
        return q @ mix(z, mixing).unsqueeze(-1)
    own = (q @ z.unsqueeze(-1)).squeeze(-1)
    return mix(own, mixing).unsqueeze(-1)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (batch, heads, blocks, tokens_per_block, dim) with padded tokens set to 0."""
    if mask is None:
        return x
    over_heads = mask.unsqueeze(-3) if mask.dim() == 3 else mask[None, None]
    return x * over_heads.unsqueeze(-1).to(x.dtype)
