"""Cross-attention by MHLA: tokens read another sequence (beyond the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhla_lightning.arguments.checked import CheckedOptions
from mhla_lightning.attention.base import accumulation_dtype, feature_map, full_precision, known, positive
from mhla_lightning.attention.layers.inputs import check_tokens
from mhla_lightning.attention.masks import check_mask
from mhla_lightning.attention.mhla.cross import (
    CROSS_NORMALIZERS,
    CrossMixingMatrix,
    cross_mhla,
    cross_mhla_flops,
)
from mhla_lightning.attention.mhla.grid import BlockGrid, cut_alike
from mhla_lightning.attention.mhla.mixing import MixingInit, keys_of_an_entry
from mhla_lightning.attention.norm import RMSNorm
from mhla_lightning.errors import UserError


@dataclass(frozen=True)
class CrossAttentionOptions(CheckedOptions):
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
        super().__post_init__()
        known("normalizer", self.normalizer, CROSS_NORMALIZERS)


class MHLACrossAttention(nn.Module):
    """Multi-head cross-attention in time linear in both sequences.

    The parameters but the mixing matrix have the names of Wan2.1's softmax cross-attention, whose weights
    they take.

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
        for key, value in (("dim", dim), ("heads", heads), ("context_dim", context_dim)):
            if key != "context_dim" or value is not None:
                positive(key, value)
        if dim % heads:
            raise UserError("heads", f"{heads} heads do not divide {dim} channels")
        self.dim, self.heads, self.options = dim, heads, options
        self.context_dim = dim if context_dim is None else context_dim
        self.queries = BlockGrid(grid, options.blocks, block_size=options.block_size)
        self.keys = _context_blocks(context_grid, options)
        self.phi = feature_map(options.feature_map, options.eps)
        self.q = nn.Linear(dim, dim)
        self.k, self.v = nn.Linear(self.context_dim, dim), nn.Linear(self.context_dim, dim)
        self.norm_q = RMSNorm(dim, eps=1e-6) if options.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim, eps=1e-6) if options.qk_norm else nn.Identity()
        self.o = nn.Linear(dim, dim)
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
        self.recompute = False

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        mask: Tensor | None = None,
        grid: Sequence[int] | None = None,
    ) -> Tensor:
        """Read `context` with every token of x; sums are float32 at least.

        Args:
            x: (batch, tokens, dim) in raster order.
            context: (batch, keys, context_dim) in raster order of its grid.
            mask: (batch, keys) bool, True = real key; None means all keys are real. Tokens of a sample
                without a real key read zeros.
            grid: token counts per axis of x; None means the grid given at construction. Another grid has
                as many blocks. A single frame has the blocks of the first frames.

        Returns:
            (batch, tokens, dim)

        Raises:
            UserError: a tensor or mask of another shape, a mask that is not bool, or a grid of other blocks.
        """
        check_tokens(x, self.dim)
        if context.dim() != 3 or context.shape[-1] != self.context_dim or len(context) != len(x):
            raise UserError(
                "context",
                f"its shape is {tuple(context.shape)}; the layer takes ({len(x)}, keys, {self.context_dim})",
            )
        check_mask(mask, context.shape[:2])
        queries = self._queries(grid)
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        if self.recompute and self.training:
            out = checkpoint(
                self._read, q, k, v, mask, queries, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out = self._read(q, k, v, mask, queries)
        return self.o(out.flatten(2).to(x.dtype))

    def _read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, queries: BlockGrid) -> Tensor:
        """Return (batch, tokens, heads, dim / heads) of q, k and v, (batch, tokens or keys, dim)."""
        with full_precision(q):
            q, k, v = (t.to(accumulation_dtype(t)).unflatten(-1, (self.heads, -1)) for t in (q, k, v))
            mixing = self.mixing.matrix()[..., : queries.num_blocks, :].to(q.dtype)
            return cross_mhla(
                self.phi(q),
                self.phi(k),
                v,
                mixing,
                queries,
                self.keys,
                normalizer=self.options.normalizer,
                eps=self.options.eps,
                mask=mask,
            )

    def _queries(self, grid: Sequence[int] | None) -> BlockGrid:
        """Return the blocks of a grid of queries. Raises UserError where they are not as many."""
        if grid is None or tuple(grid) == self.queries.grid:
            return self.queries
        blocks = cut_alike(self.queries, grid, self.options.blocks, self.options.block_size)
        first = (1, *self.queries.blocks[1:])  # of the blocks of an image in those of videos
        if blocks.blocks != self.queries.blocks and (blocks.blocks != first or blocks.grid[0] != 1):
            raise UserError(
                "grid",
                f"{blocks.grid} tokens make {blocks.blocks} blocks, and the mixing matrix serves "
                f"{self.queries.blocks}; with `blocks` instead of `block_size` every grid has as many",
            )
        return blocks

    def flops(self, grid: Sequence[int] | None = None, keys: int | None = None) -> int:
        """Return the FLOPs of one sample's forward, 2 a multiply-add; matrix products count.

        Args:
            grid: token counts per axis of the queries; None means the grid given at construction.
            keys: number of keys; None means those of the context's grid.

        Raises:
            UserError: a grid of other blocks, or keys that do not fill the context's grid.
        """
        if keys not in (None, self.keys.tokens):
            raise UserError("keys", f"{keys} do not fill {self.keys.grid}")
        queries = self._queries(grid)
        head_dim = self.dim // self.heads
        projections = 2 * queries.tokens * self.dim**2 + 2 * self.keys.tokens * self.context_dim * self.dim
        return 2 * projections + cross_mhla_flops(
            queries, self.keys, self.heads, head_dim, head_dim, self.options.normalizer
        )


def _context_blocks(grid: Sequence[int], options: CrossAttentionOptions) -> BlockGrid:
    """Return the blocks of the keys, with errors in the words of their options."""
    try:
        return BlockGrid(grid, options.context_blocks, block_size=options.context_block_size)
    except UserError as error:
        error.key = f"context_{error.key}"
        error.args = (error.key, error.reason)
        raise
