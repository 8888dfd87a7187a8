"""MHLA between two sequences: queries and keys have grids of their own (beyond the paper).

The summaries of the keys' blocks are mixed for every block of queries, as in Eq. 4, by a matrix of query
blocks x key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mhla_lightning.attention.base import known
from mhla_lightning.attention.masks import check_mask
from mhla_lightning.attention.mhla.bidirectional import block_summaries, mix, read
from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.attention.mhla.mixing import MixingInit, MixingMatrix
from mhla_lightning.errors import UserError

CROSS_NORMALIZERS = ("block", "none")
CROSS_INITS = ("uniform", "local_row", "exp", "const")


def cross_mhla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    queries: BlockGrid,
    keys: BlockGrid,
    *,
    normalizer: str = "block",
    eps: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute Eq. 4 with keys of another sequence.

    o_t = q_t (sum_b m[b(t), b] S_b) / (q_t . sum_b m[b(t), b] z_b + eps), with sums S_b and z_b over the keys
    of block b.

    Args:
        q: (batch, tokens, heads, dim_k) in raster order of the queries' grid, feature-mapped.
        k: (batch, keys, heads, dim_k) in raster order of the keys' grid, feature-mapped.
        v: (batch, keys, heads, dim_v).
        mixing: (query blocks, key blocks), or one per head: (heads, query blocks, key blocks).
        queries, keys: the blocks of both grids; short last blocks are allowed.
        normalizer: `block` or `none`.
        eps: added to the normalizer.
        mask: (batch, keys) bool, True = real key; None means all keys are real. Without a real key the
            output is 0.

    Returns:
        (batch, tokens, heads, dim_v)

    Raises:
        UserError: unknown normalizer, tokens that do not fill their grid, or a mask that is not bool.
    """
    known("normalizer", normalizer, CROSS_NORMALIZERS)
    for name, tokens, blocks in (("q", q, queries), ("k", k, keys)):
        if tokens.shape[1] != blocks.tokens:
            raise UserError(
                name, f"its {tokens.shape[1]} tokens do not fill {blocks.grid}, which has {blocks.tokens}"
            )
    check_mask(mask, k.shape[:2])
    if mask is not None:
        k = k * mask[:, :, None, None].to(k.dtype)
    q, k, v = (blocks.to_blocks(x.transpose(1, 2)) for x, blocks in ((q, queries), (k, keys), (v, keys)))
    summaries, z = block_summaries(k, v)
    out = read(q, mix(summaries, mixing))
    if normalizer == "block":
        out = out / (q @ mix(z, mixing).unsqueeze(-1) + eps)
    return queries.from_blocks(out).transpose(1, 2)


def cross_mhla_flops(
    queries: BlockGrid, keys: BlockGrid, heads: int, dim_k: int, dim_v: int, normalizer: str = "block"
) -> int:
    """Return the matrix-product FLOPs of :func:`cross_mhla` of one sample, 2 a multiply-add."""
    mixed = queries.num_blocks * keys.num_blocks
    read_tokens, summed = (blocks.num_blocks * blocks.tokens_per_block for blocks in (queries, keys))
    divided = mixed + read_tokens if normalizer == "block" else 0
    return 2 * heads * dim_k * (dim_v * (read_tokens + summed + mixed) + divided)


def cross_distances(queries: BlockGrid, keys: BlockGrid) -> Tensor:
    """Return the distances of query blocks and key blocks, (query blocks, key blocks) float64.

    Both grids cover the same image, so that a place is a share of an axis; the unit is one query block along
    an axis. Equal blocks have the distances of :meth:`BlockGrid.distances`.

    Raises:
        UserError: grids of different numbers of axes.
    """
    if len(queries.grid) != len(keys.grid):
        raise UserError(
            "init",
            f"blocks of {queries.grid} and {keys.grid} tokens have no distances, because their grids have "
            "different numbers of axes; take uniform or const",
        )
    places = []
    for blocks in (queries, keys):
        axes = [
            (torch.arange(own, dtype=torch.float64) + 0.5) / own * unit
            for own, unit in zip(blocks.blocks, queries.blocks, strict=True)
        ]
        places.append(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2))
    return (places[0][:, None] - places[1][None]).square().sum(-1).sqrt()


def initial_cross_mixing(
    queries: BlockGrid, keys: BlockGrid, init: str, options: MixingInit | None = None
) -> Tensor:
    """Return the initial mixing matrix, (query blocks, key blocks) float64.

    Args:
        queries, keys: the blocks of both grids.
        init: `uniform`, 1 / key blocks; `const`; for two grids of as many axes also `local_row`, the paper's
            rule, and `exp`, exp(-distance / exp_sigma). Rows of all but `const` sum to 1.
        options: of the rule; None takes their defaults.

    Raises:
        UserError: another name, or grids that have no distances.
    """
    known("init", init, CROSS_INITS)
    options = options or MixingInit()
    weight = torch.ones(queries.num_blocks, keys.num_blocks, dtype=torch.float64)
    if init == "const":
        return weight * options.value
    if init != "uniform":
        distance = cross_distances(queries, keys)
        if init == "exp":
            weight = torch.exp(-distance / (3.0 if options.exp_sigma is None else options.exp_sigma))
        else:
            weight = 1 - distance / distance.amax(1, keepdim=True).clamp_min(1e-12)
            weight[(weight.sum(1) < 1e-9) | (distance.amax(1) < 1e-9)] = 1.0  # all keys are as far
    return weight / weight.sum(1, keepdim=True)


class CrossMixingMatrix(MixingMatrix):
    """The mixing matrix of query blocks x key blocks.

    Args:
        queries, keys: the blocks of both grids.
        init: see :func:`initial_cross_mixing`.
        learnable, clamp, heads, init_options: as of :class:`MixingMatrix`.

    Attributes:
        weight: (query blocks, key blocks) or (heads, query blocks, key blocks).

    Raises:
        UserError: an unknown rule, or one that the grids do not allow; an invalid range.
    """

    def __init__(
        self,
        queries: BlockGrid,
        keys: BlockGrid,
        init: str = "uniform",
        *,
        learnable: bool = True,
        clamp: Sequence[float] | None = (0.0, 1.0),
        heads: int | None = None,
        init_options: MixingInit | None = None,
    ) -> None:
        super().__init__(1, "uniform", learnable, clamp=clamp)
        weight = initial_cross_mixing(queries, keys, init, init_options).float()
        if heads is not None:
            weight = weight.expand(heads, -1, -1).clone()
        self.weight = nn.Parameter(weight, requires_grad=learnable)

    def form_of(self, shape: Sequence[int]) -> str | None:
        return None  # no other form

    def matrix(self, blocks: int | Sequence[int] | None = None) -> Tensor:
        """Return the weight; its rows and columns are the blocks of the two grids."""
        return self()
