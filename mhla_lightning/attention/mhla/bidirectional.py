"""Bidirectional MHLA on tokens in block order (paper Eq. 4; SPEC section 1)."""

from __future__ import annotations

from torch import Tensor

from mhla_lightning.attention.base import known
from mhla_lightning.errors import UserError

NORMALIZERS = ("block", "slot", "none")


def block_summaries(k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum up every block: S_b = sum_t k_t v_t^T and z_b = sum_t k_t.

    Args:
        k: (batch, heads, blocks, tokens_per_block, dim_k), feature-mapped.
        v: (batch, heads, blocks, tokens_per_block, dim_v).
        mask: (blocks, tokens_per_block) or (batch, blocks, tokens_per_block) bool, True = real token; None
            means all tokens are real.

    Returns:
        S (batch, heads, blocks, dim_k, dim_v) and z (batch, heads, blocks, dim_k).
    """
    k = _masked(k, mask)
    return k.transpose(-2, -1) @ v, k.sum(-2)


def mix(summaries: Tensor, mixing: Tensor) -> Tensor:
    """Mix over blocks: S~_i = sum_b m[i, b] S_b.

    Args:
        summaries: (batch, heads, blocks, ...).
        mixing: (blocks, blocks) or (heads, blocks, blocks).
    """
    return (mixing @ summaries.flatten(3)).view_as(summaries) if summaries.dim() > 4 else mixing @ summaries


def read(q: Tensor, mixed: Tensor) -> Tensor:
    """Read the own block's mixture with every query: q_t S~_b(t).

    Args:
        q: (batch, heads, blocks, tokens_per_block, dim_k).
        mixed: S~, (batch, heads, blocks, dim_k, dim_v).
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
    """Compute MHLA, Eq. 4: every block reads its own mixture of all summaries.

    Args:
        q, k: (batch, heads, blocks, tokens_per_block, dim_k), already through the feature map.
        v: (batch, heads, blocks, tokens_per_block, dim_v).
        mixing: (blocks, blocks) or (heads, blocks, blocks); row = query block.
        normalizer: `block` (Eq. 4, the implied attention rows sum to 1), `slot` (the release's rule, full
            blocks only) or `none`.
        eps: added to the normalizer.
        mask: (blocks, tokens_per_block) or (batch, blocks, tokens_per_block) bool; None means all tokens are
            real. Padded keys count nowhere, padded queries give 0.
        q_norm, k_norm: features for the normalizer where they differ, because rotary turns q and k in the
            numerator only; None means q and k.

    Returns:
        (batch, heads, blocks, tokens_per_block, dim_v)

    Raises:
        UserError: unknown normalizer, or `slot` with a mask.
    """
    known("normalizer", normalizer, NORMALIZERS)
    if normalizer == "slot" and mask is not None:
        raise UserError(
            "normalizer",
            "'slot' pairs queries by their place in the block and needs full blocks without padding; use "
            "'block' or 'none'",
        )
    summaries, z = block_summaries(k, v, mask)
    out = read(q, mix(summaries, mixing))
    if normalizer != "none":
        z = z if k_norm is None else _masked(k_norm, mask).sum(-2)
        out = out / (_normalizer(q if q_norm is None else q_norm, z, mixing, normalizer) + eps)
    return _masked(out, mask)


def _normalizer(q: Tensor, z: Tensor, mixing: Tensor, kind: str) -> Tensor:
    """Return the normalizer without eps, (batch, heads, blocks, tokens_per_block, 1)."""
    if kind == "block":
        return q @ mix(z, mixing).unsqueeze(-1)
    own = (q @ z.unsqueeze(-1)).squeeze(-1)
    return mix(own, mixing).unsqueeze(-1)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x (batch, heads, blocks, tokens_per_block, dim) with padded tokens set to 0."""
    if mask is None:
        return x
    over_heads = mask.unsqueeze(-3) if mask.dim() == 3 else mask[None, None]
    return x * over_heads.unsqueeze(-1).to(x.dtype)
