"""Functions that all kernels share, and constants that every launch passes.

Names inside kernels: B0 to B2 are the tokens of a block per axis, G0 to G2 those of the grid. NB1 and NB2 are
blocks per axis. One and two axes are padded with ones in front. D and DV are channels a head; DP and DVP are
the same, rounded up to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhla_lightning.attention.mhla.grid import BlockGrid

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels of this process run on Triton's interpreter."""

PART: tl.constexpr = tl.constexpr(32)
"""Terms of an exact float32 product that are added up at once."""


@triton.jit
def product(a: tl.tensor, b: tl.tensor, UP: tl.constexpr, PREC: tl.constexpr) -> tl.tensor:
    """Matrix product with a float32 result.

    Triton 3.8's interpreter multiplies the bit patterns of bf16, so UP casts operands to float32 there.
    """
    if UP:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PREC)


@triton.jit
def product_in_parts(a: tl.tensor, b: tl.tensor, UP: tl.constexpr, PREC: tl.constexpr) -> tl.tensor:
    """Matrix product with a float32 result; exact float32 operands add up PART terms at a time.

    One long sum loses a digit more. The backward does without: at 128 channels its parts would need more
    shared memory than GPUs of capability 8.6 and 8.9 have.
    """
    if PREC == "ieee" and a.dtype == tl.float32 and a.shape[1] > PART:
        x = tl.permute(tl.reshape(a, (a.shape[0], a.shape[1] // PART, PART)), (1, 0, 2))
        y = tl.reshape(b, (b.shape[0] // PART, PART, b.shape[1]))
        c = tl.sum(tl.dot(x, y, input_precision=PREC), 0)
    else:
        c = product(a, b, UP, PREC)
    return c


@triton.jit
def place_of(
    block: tl.tensor,
    t: tl.tensor,
    M: tl.tensor,
    NB1: tl.tensor,
    NB2: tl.tensor,
    G0: tl.tensor,
    G1: tl.tensor,
    G2: tl.tensor,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
) -> tl.tuple:
    """Raster place of token t of a block, and whether there is such a token."""
    r2 = (block % NB2) * B2 + t % B2
    r1 = (block // NB2 % NB1) * B1 + t // B2 % B1
    r0 = block // (NB2 * NB1) * B0 + t // (B2 * B1)
    there = (t < B0 * B1 * B2) & (block < M) & (r0 < G0) & (r1 < G1) & (r2 < G2)
    return tl.where(there, (r0 * G1 + r1) * G2 + r2, 0), there


@triton.jit
def rows_of_tile(
    tile: tl.tensor,
    M: tl.tensor,
    NB1: tl.tensor,
    NB2: tl.tensor,
    G0: tl.tensor,
    G1: tl.tensor,
    G2: tl.tensor,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    W: tl.constexpr,
    TP: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tuple:
    """Places of a tile's W rows, which of them are tokens, and the tile's first block.

    Tiles are in block order. A tile holds W / TP whole blocks of TP padded rows, or W of the rows of one
    block where TP is larger. EVEN says that every row of every tile is a token, so that no load has a mask.
    """
    row = tl.arange(0, W)
    if TP <= W:
        first = tile * (W // TP)
        place, there = place_of(first + row // TP, row % TP, M, NB1, NB2, G0, G1, G2, B0, B1, B2)
    else:
        first = tile // (TP // W)
        t = tile % (TP // W) * W + row
        place, there = place_of(first + t * 0, t, M, NB1, NB2, G0, G1, G2, B0, B1, B2)
    if EVEN:
        there = tl.full((W,), 1, tl.int1)
    return place, there, first


@triton.jit
def rows(
    base: tl.tensor,
    place: tl.tensor,
    there: tl.tensor,
    stride: tl.tensor,
    D: tl.constexpr,
    DP: tl.constexpr,
    EVICT: tl.constexpr = "",
) -> tl.tensor:
    """Load (rows, DP) of a token tensor; absent rows and channels are 0."""
    d = tl.arange(0, DP)
    inside = there[:, None] if D == DP else there[:, None] & (d < D)[None, :]
    places = base + place[:, None] * stride + d[None, :]
    return tl.load(places, mask=inside, other=0.0, eviction_policy=EVICT)


@triton.jit
def keep(
    base: tl.tensor,
    place: tl.tensor,
    there: tl.tensor,
    stride: tl.tensor,
    values: tl.tensor,
    D: tl.constexpr,
    DP: tl.constexpr,
) -> tl.tensor:
    """Store (rows, DP) to a token tensor."""
    d = tl.arange(0, DP)
    inside = there[:, None] if D == DP else there[:, None] & (d < D)[None, :]
    tl.store(base + place[:, None] * stride + d[None, :], values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def features(
    raw: tl.tensor, there: tl.tensor, offset: tl.tensor, D: tl.constexpr, DP: tl.constexpr
) -> tl.tensor:
    """relu(x) + offset in float32; 0 at absent rows and channels."""
    phi = tl.maximum(raw.to(tl.float32), 0.0) + offset
    inside = there[:, None] if D == DP else there[:, None] & (tl.arange(0, DP) < D)[None, :]
    return tl.where(inside, phi, 0.0)


def geometry(grid: BlockGrid) -> dict[str, int]:
    """Return the kernels' arguments for a grid; the block's sides are constants."""
    three = [(1,) * (3 - len(x)) + tuple(x) for x in (grid.blocks, grid.grid, grid.block_size)]
    (_, nb1, nb2), (g0, g1, g2), (b0, b1, b2) = three
    return {
        "M": grid.num_blocks,
        "NB1": nb1,
        "NB2": nb2,
        "G0": g0,
        "G1": g1,
        "G2": g2,
        "B0": b0,
        "B1": b1,
        "B2": b2,
    }


def strides(names: str, x: Tensor) -> dict[str, int]:
    """Return the strides over batch, tokens and heads as `s` + name + b, n and h."""
    return {f"s{names}{axis}": x.stride(i) for i, axis in enumerate("bnh")}


def contiguous_channels(x: Tensor) -> Tensor:
    """Return x, copied only where its channels are apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def precision(dtype: torch.dtype) -> str:
    """Return how products of a dtype run: float32 on tensor cores only where torch allows TF32."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" and not INTERPRETED
    return "tf32" if tf32 else "ieee"
