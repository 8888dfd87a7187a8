"""MHLA for short rows: Eq. 5 as one N x N kernel, like FlashAttention without a softmax.

A[i, j] = m[b(i), b(j)] phi(q_i) . phi(k_j) and o_i = sum_j A[i, j] v_j / (sum_j A[i, j] + eps).

Tiles hold tokens in block order, each block padded to a power of two. So a tile of A needs few entries of m,
and the gradient of m is a sum over whole rectangles of a tile. Tokens are read and written in raster order.

The backward finishes all queries and all keys of a short row in one program, so tokens cross memory once.
Longer rows take two kernels, one over queries and one over keys. Nothing is added atomically, and both ways
give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.mhla.grid import BlockGrid
from mhla_lightning.attention.mhla.triton import choice, tiles
from mhla_lightning.attention.mhla.triton.device import (
    INTERPRETED,
    contiguous_channels,
    features,
    geometry,
    keep,
    precision,
    product,
    rows,
    rows_of_tile,
    strides,
)
from mhla_lightning.attention.mhla.triton.launch import Launch, capability_of, start


@triton.jit
def mixing_tile(
    mixing: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    M: tl.constexpr,
    sa: tl.tensor,
    sb: tl.tensor,
    W: tl.constexpr,
    V: tl.constexpr,
    TP: tl.constexpr,
) -> tl.tensor:
    """Return m[a + i // TP, b + j // TP] of a W x V tile; the strides may transpose m."""
    NA: tl.constexpr = W // TP if TP <= W else 1
    NB: tl.constexpr = V // TP if TP <= V else 1
    row, column = a + tl.arange(0, NA), b + tl.arange(0, NB)
    there = (row < M)[:, None] & (column < M)[None, :]
    m = tl.load(mixing + row[:, None] * sa + column[None, :] * sb, mask=there, other=0.0).to(tl.float32)
    return tl.reshape(tl.broadcast_to(m[:, None, :, None], (NA, W // NA, NB, V // NB)), (W, V))


@triton.jit
def loaded(
    base: tl.tensor,
    place: tl.tensor,
    there: tl.tensor,
    stride: tl.tensor,
    D: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    EVICT: tl.constexpr = "",
) -> tl.tuple:
    """Load rows of D channels as P0 and P1 of them; without P1 the second part is unused."""
    first = rows(base, place, there, stride, D, P0, EVICT)
    second = rows(base + P0, place, there, stride, D - P0, P1, EVICT) if P1 else first
    return first, second


@triton.jit
def mapped(
    raw0: tl.tensor,
    raw1: tl.tensor,
    there: tl.tensor,
    offset: tl.tensor,
    D: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
) -> tl.tuple:
    """Features of both parts, in the tokens' dtype."""
    first = features(raw0, there, offset, D, P0).to(raw0.dtype)
    second = features(raw1, there, offset, D - P0, P1).to(raw0.dtype) if P1 else first
    return first, second


@triton.jit
def inner(
    a0: tl.tensor,
    a1: tl.tensor,
    b0: tl.tensor,
    b1: tl.tensor,
    P1: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> tl.tensor:
    """Inner products of all rows of a with all rows of b."""
    sums = product(a0, tl.trans(b0), UP, PREC)
    if P1:
        sums += product(a1, tl.trans(b1), UP, PREC)
    return sums


@triton.jit
def stored(
    base: tl.tensor,
    place: tl.tensor,
    there: tl.tensor,
    stride: tl.tensor,
    x0: tl.tensor,
    x1: tl.tensor,
    D: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
) -> None:
    """Store both parts of rows."""
    keep(base, place, there, stride, x0, D, P0)
    if P1:
        keep(base + P0, place, there, stride, x1, D - P0, P1)


@triton.jit
def dense_forward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    mixing: tl.tensor,
    out: tl.tensor,
    inverse: tl.tensor,
    sqb: tl.tensor,
    sqn: tl.tensor,
    sqh: tl.tensor,
    skb: tl.tensor,
    skn: tl.tensor,
    skh: tl.tensor,
    svb: tl.tensor,
    svn: tl.tensor,
    svh: tl.tensor,
    sob: tl.tensor,
    son: tl.tensor,
    soh: tl.tensor,
    smh: tl.tensor,
    H: tl.tensor,
    N: tl.tensor,
    QUERY_TILES: tl.tensor,
    KEY_TILES: tl.tensor,
    M: tl.constexpr,
    NB1: tl.constexpr,
    NB2: tl.constexpr,
    G0: tl.constexpr,
    G1: tl.constexpr,
    G2: tl.constexpr,
    offset: tl.tensor,
    eps: tl.tensor,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    TP: tl.constexpr,
    EVEN: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """Output of one tile of queries."""
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    k += b * skb + h * skh
    v += b * svb + h * svh
    place, there, qa = rows_of_tile(tile, M, NB1, NB2, G0, G1, G2, B0, B1, B2, BQ, TP, EVEN)
    raw0, raw1 = loaded(q + b * sqb + h * sqh, place, there, sqn, D, D0, D1)
    q0, q1 = mapped(raw0, raw1, there, offset, D, D0, D1)
    acc0 = tl.zeros((BQ, V0), tl.float32)
    acc1 = tl.zeros((BQ, V1), tl.float32) if V1 else acc0
    total = tl.zeros((BQ,), tl.float32)
    for j in range(KEY_TILES):
        at, is_key, ka = rows_of_tile(j, M, NB1, NB2, G0, G1, G2, B0, B1, B2, BK, TP, EVEN)
        raw_k0, raw_k1 = loaded(k, at, is_key, skn, D, D0, D1)
        k0, k1 = mapped(raw_k0, raw_k1, is_key, offset, D, D0, D1)
        v0, v1 = loaded(v, at, is_key, svn, DV, V0, V1)
        a = inner(q0, q1, k0, k1, D1, UP, PREC)
        a *= mixing_tile(mixing + h * smh, qa, ka, M, M, 1, BQ, BK, TP)
        total += tl.sum(a, 1)
        a = a.to(v0.dtype)
        acc0 += product(a, v0, UP, PREC)
        if V1:
            acc1 += product(a, v1, UP, PREC)
    if NORM:
        one_over = 1.0 / (total + eps)
        acc0 *= one_over[:, None]
        if V1:
            acc1 *= one_over[:, None]
        tl.store(inverse + (b * H + h) * N + place, one_over, mask=there)
    stored(out + b * sob + h * soh, place, there, son, acc0, acc1, DV, V0, V1)


@triton.jit
def queries_backward(
    tile: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    mixing: tl.tensor,
    out: tl.tensor,
    inverse: tl.tensor,
    grad: tl.tensor,
    dq: tl.tensor,
    d_total: tl.tensor,
    d_mixing: tl.tensor,
    sqn: tl.tensor,
    skn: tl.tensor,
    svn: tl.tensor,
    son: tl.tensor,
    sgn: tl.tensor,
    sdn: tl.tensor,
    KEY_TILES: tl.tensor,
    COLUMNS: tl.tensor,
    M: tl.constexpr,
    NB1: tl.constexpr,
    NB2: tl.constexpr,
    G0: tl.constexpr,
    G1: tl.constexpr,
    G2: tl.constexpr,
    offset: tl.tensor,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    TP: tl.constexpr,
    EVEN: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """Gradients of one tile of queries, and this tile's part of m's.

    All pointers are at one head. d_mixing is (rows, COLUMNS), a sum for every pair of blocks or of their
    parts.
    """
    place, there, qa = rows_of_tile(tile, M, NB1, NB2, G0, G1, G2, B0, B1, B2, BQ, TP, EVEN)
    raw0, raw1 = loaded(q, place, there, sqn, D, D0, D1)
    q0, q1 = mapped(raw0, raw1, there, offset, D, D0, D1)
    g0, g1 = loaded(grad, place, there, sgn, DV, V0, V1)
    if NORM:
        one_over = tl.load(inverse + place, mask=there, other=0.0)
        o0, o1 = loaded(out, place, there, son, DV, V0, V1)
        d_sum = -tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
        if V1:
            d_sum -= tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
        tl.store(d_total + place, d_sum, mask=there)
    NA: tl.constexpr = BQ // TP if TP <= BQ else 1
    NB: tl.constexpr = BK // TP if TP <= BK else 1
    cells = (tile * NA + tl.arange(0, NA))[:, None] * COLUMNS + tl.arange(0, NB)[None, :]
    acc0 = tl.zeros((BQ, D0), tl.float32)
    acc1 = tl.zeros((BQ, D1), tl.float32) if D1 else acc0
    for j in range(KEY_TILES):
        at, is_key, ka = rows_of_tile(j, M, NB1, NB2, G0, G1, G2, B0, B1, B2, BK, TP, EVEN)
        raw_k0, raw_k1 = loaded(k, at, is_key, skn, D, D0, D1)
        k0, k1 = mapped(raw_k0, raw_k1, is_key, offset, D, D0, D1)
        v0, v1 = loaded(v, at, is_key, svn, DV, V0, V1)
        da = inner(g0, g1, v0, v1, V1, UP, PREC)
        if NORM:
            da = (da + d_sum[:, None]) * one_over[:, None]
        p = inner(q0, q1, k0, k1, D1, UP, PREC) * da
        sums = tl.sum(tl.sum(tl.reshape(p, (NA, BQ // NA, NB, BK // NB)), 3), 1)
        tl.store(d_mixing + j * NB + cells, sums)
        da = (da * mixing_tile(mixing, qa, ka, M, M, 1, BQ, BK, TP)).to(raw0.dtype)
        acc0 += product(da, k0, UP, PREC)
        if D1:
            acc1 += product(da, k1, UP, PREC)
    raw0, raw1 = loaded(q, place, there, sqn, D, D0, D1, "evict_first")  # again, to free registers above
    acc0 = tl.where(raw0 > 0, acc0, 0.0)
    if D1:
        acc1 = tl.where(raw1 > 0, acc1, 0.0)
    stored(dq, place, there, sdn, acc0, acc1, D, D0, D1)


@triton.jit
def keys_backward(
    tile: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    mixing: tl.tensor,
    inverse: tl.tensor,
    grad: tl.tensor,
    d_total: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    sqn: tl.tensor,
    skn: tl.tensor,
    svn: tl.tensor,
    sgn: tl.tensor,
    sdn: tl.tensor,
    sen: tl.tensor,
    QUERY_TILES: tl.tensor,
    M: tl.constexpr,
    NB1: tl.constexpr,
    NB2: tl.constexpr,
    G0: tl.constexpr,
    G1: tl.constexpr,
    G2: tl.constexpr,
    offset: tl.tensor,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    TP: tl.constexpr,
    EVEN: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """Gradients of one tile of keys and values; all pointers are at one head."""
    place, there, ka = rows_of_tile(tile, M, NB1, NB2, G0, G1, G2, B0, B1, B2, BK, TP, EVEN)
    raw0, raw1 = loaded(k, place, there, skn, D, D0, D1)
    k0, k1 = mapped(raw0, raw1, there, offset, D, D0, D1)
    v0, v1 = loaded(v, place, there, svn, DV, V0, V1)
    dk0 = tl.zeros((BK, D0), tl.float32)
    dk1 = tl.zeros((BK, D1), tl.float32) if D1 else dk0
    dv0 = tl.zeros((BK, V0), tl.float32)
    dv1 = tl.zeros((BK, V1), tl.float32) if V1 else dv0
    for i in range(QUERY_TILES):
        at, is_query, qa = rows_of_tile(i, M, NB1, NB2, G0, G1, G2, B0, B1, B2, BQ, TP, EVEN)
        raw_q0, raw_q1 = loaded(q, at, is_query, sqn, D, D0, D1)
        q0, q1 = mapped(raw_q0, raw_q1, is_query, offset, D, D0, D1)
        g0, g1 = loaded(grad, at, is_query, sgn, DV, V0, V1)
        m = mixing_tile(mixing, ka, qa, M, 1, M, BK, BQ, TP)
        if NORM:
            m *= tl.load(inverse + at, mask=is_query, other=0.0)[None, :]
        a = (inner(k0, k1, q0, q1, D1, UP, PREC) * m).to(raw0.dtype)
        dv0 += product(a, g0, UP, PREC)
        if V1:
            dv1 += product(a, g1, UP, PREC)
        da = inner(v0, v1, g0, g1, V1, UP, PREC)
        if NORM:
            da += tl.load(d_total + at, mask=is_query, other=0.0)[None, :]
        da = (da * m).to(raw0.dtype)
        dk0 += product(da, q0, UP, PREC)
        if D1:
            dk1 += product(da, q1, UP, PREC)
    stored(dv, place, there, sen, dv0, dv1, DV, V0, V1)
    raw0, raw1 = loaded(k, place, there, skn, D, D0, D1, "evict_first")  # again, to free registers above
    dk0 = tl.where(raw0 > 0, dk0, 0.0)
    if D1:
        dk1 = tl.where(raw1 > 0, dk1, 0.0)
    stored(dk, place, there, sdn, dk0, dk1, D, D0, D1)


@triton.jit
def dense_backward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    mixing: tl.tensor,
    out: tl.tensor,
    inverse: tl.tensor,
    grad: tl.tensor,
    dq: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    d_total: tl.tensor,
    d_mixing: tl.tensor,
    sqb: tl.tensor,
    sqn: tl.tensor,
    sqh: tl.tensor,
    skb: tl.tensor,
    skn: tl.tensor,
    skh: tl.tensor,
    svb: tl.tensor,
    svn: tl.tensor,
    svh: tl.tensor,
    sob: tl.tensor,
    son: tl.tensor,
    soh: tl.tensor,
    sgb: tl.tensor,
    sgn: tl.tensor,
    sgh: tl.tensor,
    smh: tl.tensor,
    H: tl.tensor,
    N: tl.tensor,
    QUERY_TILES: tl.tensor,
    KEY_TILES: tl.tensor,
    ROWS: tl.tensor,
    COLUMNS: tl.tensor,
    M: tl.constexpr,
    NB1: tl.constexpr,
    NB2: tl.constexpr,
    G0: tl.constexpr,
    G1: tl.constexpr,
    G2: tl.constexpr,
    offset: tl.tensor,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    TP: tl.constexpr,
    EVEN: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
    WHOLE: tl.constexpr,
    QUERIES: tl.constexpr,
) -> None:
    """Gradients of one tile of queries or of keys, or of a WHOLE row.

    dq, dk and dv are contiguous, and d_mixing is (batch, heads, ROWS, COLUMNS).
    """
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = b * H + h
    q += b * sqb + h * sqh
    k += b * skb + h * skh
    v += b * svb + h * svh
    out += b * sob + h * soh
    grad += b * sgb + h * sgh
    mixing += h * smh
    inverse += row * N
    d_total += row * N
    d_mixing += row * ROWS * COLUMNS
    dq += (b * N * H + h) * D
    dk += (b * N * H + h) * D
    dv += (b * N * H + h) * DV
    if WHOLE or QUERIES:
        for i in range(tile, QUERY_TILES if WHOLE else tile + 1):
            queries_backward(
                i,
                q,
                k,
                v,
                mixing,
                out,
                inverse,
                grad,
                dq,
                d_total,
                d_mixing,
                sqn,
                skn,
                svn,
                son,
                sgn,
                H * D,
                KEY_TILES,
                COLUMNS,
                M,
                NB1,
                NB2,
                G0,
                G1,
                G2,
                offset,
                B0,
                B1,
                B2,
                D,
                DV,
                D0,
                D1,
                V0,
                V1,
                TP,
                EVEN,
                BQ,
                BK,
                NORM,
                UP,
                PREC,
            )
    if WHOLE:
        tl.debug_barrier()  # keys read d_total, which other threads have stored
    if WHOLE or not QUERIES:
        for j in range(tile, KEY_TILES if WHOLE else tile + 1):
            keys_backward(
                j,
                q,
                k,
                v,
                mixing,
                inverse,
                grad,
                d_total,
                dk,
                dv,
                sqn,
                skn,
                svn,
                sgn,
                H * D,
                H * DV,
                QUERY_TILES,
                M,
                NB1,
                NB2,
                G0,
                G1,
                G2,
                offset,
                B0,
                B1,
                B2,
                D,
                DV,
                D0,
                D1,
                V0,
                V1,
                TP,
                EVEN,
                BQ,
                BK,
                NORM,
                UP,
                PREC,
            )


def _constants(q: Tensor, v: Tensor, mixing: Tensor, grid: BlockGrid) -> dict[str, Any]:
    """Return the arguments that all kernels of a call share."""
    heads, d, dv = q.shape[2], q.shape[3], v.shape[3]
    return {
        **geometry(grid),
        "smh": mixing.stride(0) if mixing.dim() == 3 else 0,
        "H": heads,
        "N": grid.tokens,
        "D": d,
        "DV": dv,
        **dict(
            zip(("D0", "D1", "V0", "V1"), (*tiles.channel_parts(d), *tiles.channel_parts(dv)), strict=True)
        ),
        "TP": tiles.padded_block(grid.tokens_per_block),
        "UP": INTERPRETED,
        "PREC": precision(q.dtype),
    }


def _tiles_of(grid: BlockGrid, rows_of_a_tile: int) -> int:
    """Return the tiles that hold all blocks, each padded to a power of two."""
    padded = tiles.padded_block(grid.tokens_per_block)
    if padded <= rows_of_a_tile:
        return ceil_div(grid.num_blocks, rows_of_a_tile // padded)
    return grid.num_blocks * (padded // rows_of_a_tile)


def _even(grid: BlockGrid, tile: tiles.Tile) -> bool:
    """Return whether every row of every tile is a token."""
    padded = tiles.padded_block(grid.tokens_per_block)
    full = grid.even and padded == grid.tokens_per_block
    return full and grid.tokens % tile.queries == 0 and grid.tokens % tile.keys == 0


def _channels(constants: dict[str, Any]) -> tuple[int, int]:
    """Return the channels of q and of v that a tile holds, padding included."""
    return constants["D0"] + constants["D1"], constants["V0"] + constants["V1"]


def forward(
    q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, grid: BlockGrid, offset: float, eps: float | None
) -> tuple[Tensor, Tensor]:
    """Return the output and 1 / normalizer, (batch, heads, tokens) float32; see `ops.dense`."""
    q, k, v = (contiguous_channels(x) for x in (q, k, v))
    mixing = mixing.contiguous()
    batch, _, heads, _ = q.shape
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    shape = (batch, heads, grid.tokens if eps is not None else 0)
    inverse = torch.empty(shape, dtype=torch.float32, device=q.device)
    constants = _constants(q, v, mixing, grid)
    channels, padded = _channels(constants), grid.num_blocks * constants["TP"]
    tile = tiles.dense_forward(max(channels), padded, q.element_size(), capability_of(q))
    across, down = _tiles_of(grid, tile.keys), _tiles_of(grid, tile.queries)
    arguments = {**constants, **strides("q", q), **strides("k", k), **strides("v", v), **strides("o", out)}
    arguments |= {"q": q, "k": k, "v": v, "mixing": mixing, "out": out, "inverse": inverse}
    arguments |= {"QUERY_TILES": down, "KEY_TILES": across, "offset": offset, "eps": eps or 0.0}
    arguments |= {"BQ": tile.queries, "BK": tile.keys, "NORM": eps is not None, "EVEN": _even(grid, tile)}
    flops = 2 * batch * heads * down * across * tile.queries * tile.keys * sum(channels)
    reads, writes = ("q", "k", "v", "mixing"), ("out", "inverse")
    programs = (heads, down, batch)
    start(Launch(dense_forward_kernel, programs, arguments, tile.warps, tile.stages, flops, reads, writes))
    return out, inverse


def backward(
    grad: Tensor,
    tokens: Sequence[Tensor],
    mixing: Tensor,
    saved: Sequence[Tensor],
    grid: BlockGrid,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the mixing matrix; `saved` is of :func:`forward`."""
    grad, q, k, v = (contiguous_channels(x) for x in (grad, *tokens))
    out, inverse = saved
    mixing = mixing.contiguous()
    batch, _, heads, _ = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    constants = _constants(q, v, mixing, grid)
    channels, padded = _channels(constants), grid.num_blocks * constants["TP"]
    whole = padded <= choice.WHOLE_ROW and batch * heads >= tiles.WHOLE_ROWS
    tile = tiles.dense_backward(max(channels), padded, q.element_size(), capability_of(q))
    down, across = _tiles_of(grid, tile.queries), _tiles_of(grid, tile.keys)
    rows_, columns = (
        count * max(1, width // constants["TP"])
        for count, width in ((down, tile.queries), (across, tile.keys))
    )
    parts = torch.empty((batch, heads, rows_, columns), dtype=torch.float32, device=q.device)
    arguments = {**constants, **strides("q", q), **strides("k", k), **strides("v", v)}
    arguments |= {**strides("o", out), **strides("g", grad), "offset": offset, "NORM": inverse.numel() > 0}
    arguments |= {"q": q, "k": k, "v": v, "mixing": mixing, "out": out, "inverse": inverse, "grad": grad}
    arguments |= {"dq": dq, "dk": dk, "dv": dv, "d_total": torch.empty_like(inverse), "d_mixing": parts}
    arguments |= {"QUERY_TILES": down, "KEY_TILES": across, "ROWS": rows_, "COLUMNS": columns}
    arguments |= {"BQ": tile.queries, "BK": tile.keys, "WHOLE": whole, "EVEN": _even(grid, tile)}
    pairs = 2 * batch * heads * down * across * tile.queries * tile.keys
    query_flops, key_flops = pairs * (2 * channels[0] + channels[1]), pairs * 2 * sum(channels)
    reads: tuple[str, ...] = ("q", "k", "v", "mixing", "inverse", "grad")
    query_reads = (*reads, "out") if inverse.numel() else reads

    def go(queries: bool, programs: int, flops: int, reads: tuple[str, ...], writes: tuple[str, ...]) -> None:
        own = {**arguments, "QUERIES": queries}
        shape = (heads, programs, batch)
        start(Launch(dense_backward_kernel, shape, own, tile.warps, tile.stages, flops, reads, writes))

    if whole:
        writes = ("dq", "dk", "dv", "d_total", "d_mixing")
        go(True, 1, query_flops + key_flops, query_reads, writes)
    else:
        go(True, down, query_flops, query_reads, ("dq", "d_total", "d_mixing"))
        go(False, across, key_flops, (*reads, "d_total"), ("dk", "dv"))
    d_mixing = parts.sum((0, 1) if mixing.dim() == 2 else 0)
    for axis, width in ((-2, tile.queries), (-1, tile.keys)):
        if constants["TP"] > width:  # a block has several tiles
            d_mixing = d_mixing.unflatten(axis, (grid.num_blocks, -1)).sum(axis)
        else:
            d_mixing = d_mixing.narrow(axis, 0, grid.num_blocks)
    return dq, dk, dv, d_mixing.to(mixing.dtype).contiguous()
