"""Cross-attention by MHLA: tokens read another sequence (beyond the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mhla_lightning.attention.base import accumulation_dtype, feature_map, full_precision, known
from mhla_lightning.attention.layers.inputs import check_tokens
from mhla_lightning.attention.mhla.cross import (
    CROSS_NORMALIZERS,
    CrossMixingMatrix,
    cross_mhla,
    cross_mhla_flops,
)
from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.attention.mhla.mixing import MixingInit, keys_of_an_entry
from mhla_lightning.attention.norm import RMSNorm
from mhla_lightning.errors import UserError


@dataclass(frozen=True)
class CrossAttentionOptions:
    """Options of :class:`MHLACrossAttention`.

    Args:
        blocks, block_size: of the queries, per axis; give one of them.
        context_blocks, context_block_size: of the keys, per axis; give one of them.
        normalizer: `block` or `none`, see :func:`cross_mhla`.
        mix_init, mix_init_options: see :func:`initial_cross_mixing`.
        mix_learnable, mix_clamp: `learnable` and `clamp` of the mixing matrix.
        mix_per_head: one mixing matrix per head instead of one.
        feature_map: see :func:`mhla_lightning.attention.base.feature_map`.
        qk_norm: RMSNorm of q and k over all channels.
        eps: added to the normalizer, and by `relu_eps` to the features.

    Raises:
        UserError: unknown `normalizer`.
    """

    blocks: int | Sequence[int] | None = None
    block_size: int | Sequence[int] | None = None
    context_blocks: int | Sequence[int] | None = None
    context_block_size: int | Sequence[int] | None = None
    normalizer: str = "block"
    mix_init: str = "uniform"
    mix_init_options: Mapping[str, float] | None = None
    mix_learnable: bool = True
    mix_clamp: Sequence[float] | None = (0.0, 1.0)
    mix_per_head: bool = False
    feature_map: str = "relu_eps"
    qk_norm: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        known("normalizer", self.normalizer, CROSS_NORMALIZERS)


class MHLACrossAttention(nn.Module):
    """Multi-head cross-attention in time linear in both sequences.

    Args:
        dim: channels C of the tokens, a multiple of heads.
        heads: number of heads.
        grid: token counts per axis of the queries: (N,), (H, W) or (T, H, W).
        context_grid: the same of the keys; (L,) for a text padded to L tokens.
        context_dim: channels of the keys; None means C.
        options: blocks of both, mixing matrix, feature map.

    Raises:
        UserError: heads that do not divide C, blocks that do not fit a grid, unknown names.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        grid: Sequence[int],
        context_grid: Sequence[int],
        options: CrossAttentionOptions,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise UserError("heads", f"{heads} heads do not divide {dim} channels")
        self.dim, self.heads, self.options = dim, heads, options
        self.context_dim = dim if context_dim is None else context_dim
        self.queries = BlockGrid(grid, options.blocks, block_size=options.block_size)
        self.keys = _context_blocks(context_grid, options)
        self.phi = feature_map(options.feature_map, options.eps)
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(self.context_dim, 2 * dim)
        self.q_norm = RMSNorm(dim, eps=1e-6) if options.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim, eps=1e-6) if options.qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        init_options = MixingInit.of(options.mix_init_options)
        with keys_of_an_entry():
            self.mixing = CrossMixingMatrix(
                self.queries,
                self.keys,
                options.mix_init,
                learnable=options.mix_learnable,
                clamp=options.mix_clamp,
                heads=heads if options.mix_per_head else None,
                init_options=init_options,
            )

    def forward(self, x: Tensor, context: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Read `context` with every token of x; sums are float32 at least.

        Args:
            x: (batch, tokens, dim) in raster order.
            context: (batch, keys, context_dim) in raster order of its grid.
            mask: (batch, keys) bool, True = real key; None means all keys are real. Tokens of a sample
                without a real key read zeros.

        Returns:
            (batch, tokens, dim)

        Raises:
            UserError: a tensor or mask of another shape.
        """
        check_tokens(x, self.dim)
        if context.dim() != 3 or context.shape[-1] != self.context_dim or len(context) != len(x):
            raise UserError(
                "context",
                f"its shape is {tuple(context.shape)}; the layer takes ({len(x)}, keys, {self.context_dim})",
            )
        if mask is not None and mask.shape != context.shape[:2]:
            raise UserError(
                "mask", f"its shape is {tuple(mask.shape)}; the layer takes {tuple(context.shape[:2])}"
            )
        k, v = self.kv(context).chunk(2, dim=-1)
        q, k = self.q_norm(self.q(x)), self.k_norm(k)
        with full_precision(q):
            q, k, v = (t.to(accumulation_dtype(t)).unflatten(-1, (self.heads, -1)) for t in (q, k, v))
            mixing = self.mixing.matrix().to(q.dtype)
            out = cross_mhla(
                self.phi(q),
                self.phi(k),
                v,
                mixing,
                self.queries,
                self.keys,
                normalizer=self.options.normalizer,
                eps=self.options.eps,
                mask=mask,
            )
        return self.proj(out.flatten(2).to(x.dtype))

    def flops(self) -> int:
        """Return the FLOPs of one sample's forward, 2 a multiply-add; matrix products count."""
        tokens, keys = self.queries.tokens, self.keys.tokens
        head_dim = self.dim // self.heads
        projections = 2 * tokens * self.dim**2 + 2 * keys * self.context_dim * self.dim
        return 2 * projections + cross_mhla_flops(
            self.queries, self.keys, self.heads, head_dim, head_dim, self.options.normalizer
        )


def _context_blocks(grid: Sequence[int], options: CrossAttentionOptions) -> BlockGrid:
    """Return the blocks of the keys, with errors in the words of their options."""
    try:
        return BlockGrid(grid, options.context_blocks, block_size=options.context_block_size)
    except UserError as error:
        error.key = f"context_{error.key}"
        error.args = (error.key, error.reason)
        raise
