"""Bidirectional MHLA on tokens in block order (paper Eq. 4; SPEC section 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mhla_lightning.attention.base import accumulation_dtype, known
from mhla_lightning.attention.context import Rotary
from mhla_lightning.attention.masks import check_mask
from mhla_lightning.attention.mhla.grid import BlockGrid
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
        mixing: (blocks, blocks) or (heads, blocks, blocks); of cross-attention (query blocks, key blocks).
    """
    if summaries.dim() <= 4:
        return mixing @ summaries
    return (mixing @ summaries.flatten(3)).unflatten(-1, summaries.shape[3:])


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
        UserError: unknown normalizer, `slot` with a mask, or a mask that is not bool.
    """
    known("normalizer", normalizer, NORMALIZERS)
    check_mask(mask)
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


def mhla_on_grid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    blocks: BlockGrid,
    *,
    phi: Callable[[Tensor], Tensor],
    normalizer: str = "block",
    eps: float = 1e-6,
    rotary: Rotary | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute :func:`mhla` of tokens in raster order, with sums in float32 at least.

    Args:
        q, k: (batch, tokens, heads, dim_k), before the feature map.
        v: (batch, tokens, heads, dim_v).
        mixing: (blocks, blocks) or (heads, blocks, blocks).
        blocks: of the grid; short last blocks are allowed.
        phi: the feature map.
        normalizer, eps: see :func:`mhla`.
        rotary: turns q and k by position, in the numerator only; None means no positions.
        mask: (batch, tokens) bool, True = real token; None means all tokens are real.

    Returns:
        (batch, tokens, heads, dim_v) in v's dtype.
    """
    dtype = v.dtype
    q, k, v = (x.to(accumulation_dtype(x)) for x in (q, k, v))
    q, k = phi(q), phi(k)
    if mask is not None:
        k = k * mask[:, :, None, None].to(k.dtype)
    # Short blocks are filled with zeros after the feature map, so empty places count nowhere (SPEC 1.5).
    q_turned, k_turned = (q, k) if rotary is None else (rotary(q), rotary(k))
    apart = rotary is not None and normalizer != "none"  # the normalizer takes unturned features
    out = mhla(
        _to_blocks(q_turned, blocks),
        _to_blocks(k_turned, blocks),
        _to_blocks(v, blocks),
        mixing.to(q.dtype),
        normalizer=normalizer,
        eps=eps,
        q_norm=_to_blocks(q, blocks) if apart else None,
        k_norm=_to_blocks(k, blocks) if apart else None,
    )
    out = blocks.from_blocks(out).transpose(1, 2)
    if mask is not None:
        out = out * mask[:, :, None, None].to(out.dtype)
    return out.to(dtype)


@dataclass(frozen=True)
class ReluMHLA:
    """One setting of MHLA with features relu(x) + offset, which the hand-written forms compute.

    Attributes:
        grid: the blocks; short last blocks are allowed.
        offset: added by the feature map.
        normalize: whether to divide by q . z~ + eps.
        eps: added to the normalizer.
        dtype: of the sums.
    """

    grid: BlockGrid
    offset: float
    normalize: bool
    eps: float
    dtype: torch.dtype

    def plain(self, q: Tensor, k: Tensor, v: Tensor, mixing: Tensor | None) -> Tensor:
        """Compute it in torch's own operations, as :func:`mhla_on_grid` does.

        A mixing of None reads the sum of all summaries, which is linear attention.
        """
        grid = self.grid
        if mixing is None:
            grid, mixing = BlockGrid((q.shape[1],), 1), q.new_ones(1, 1)
        return mhla_on_grid(
            q,
            k,
            v,
            mixing,
            grid,
            phi=lambda x: torch.relu(x) + self.offset,
            normalizer="block" if self.normalize else "none",
            eps=self.eps,
        )


def _to_blocks(x: Tensor, blocks: BlockGrid) -> Tensor:
    """Reorder raster order to block order in one copy.

    (batch, tokens, heads, dim) -> (batch, heads, blocks, tokens_per_block, dim).
    """
    return blocks.to_blocks(x.transpose(1, 2))


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
