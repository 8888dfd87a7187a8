"""Causal MHLA, dense for short rows and in chunks for long ones; decays and documents.

A[t, s] = w[c(t), c(s)] fade(t, s) phi(q_t) . phi(k_s) for s <= t, and o_t = sum_s A[t, s] v_s, divided by
sum_s A[t, s] + eps where there is a normalizer. c(t) is the chunk of token t in its row. The weights w hold
the mixing, the scale, the documents and the decay between chunks; `terms.py` makes them.

fade(t, s) is exp(until_t - until_s) inside a chunk. Where the decay spans the sequence, it is
exp(until_t + after_s) between chunks.

Tiles hold whole chunks, each padded to a power of two, or a part of one chunk. `layout` gives the place of
every row of a chunk in a packed batch. The dense form (FAR = 0) reads all chunks of a tile's documents. The
form in chunks (FAR = 1) reads the own chunk, and earlier ones through mixed means of phi(k) v^T. Both take
the same three kernels. Nothing is added atomically.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.attention.mhla.triton import tiles
from mhla_lightning.attention.mhla.triton.device import (
    INTERPRETED,
    contiguous_channels,
    features,
    keep,
    precision,
    product,
    rows,
    strides,
)
from mhla_lightning.attention.mhla.triton.launch import Launch, capability_of, start
from mhla_lightning.attention.mhla.triton.terms import CausalTerms


@triton.jit
def chunk_rows(
    tile: tl.tensor,
    layout: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    T: tl.constexpr,
    W: tl.constexpr,
    TP: tl.constexpr,
    PACKED: tl.constexpr,
) -> tl.tuple:
    """Places of a tile's W rows, and which are tokens.

    Then come their chunks, their places there, and the tile's first chunk.
    """
    row = tl.arange(0, W)
    if TP <= W:
        first = tile * (W // TP)
        chunk = first + row // TP
        t = row % TP
    else:
        first = tile // (TP // W)
        chunk = first + row * 0
        t = tile % (TP // W) * W + row
    there = (t < T) & (chunk < M)
    place = chunk * T + t
    if PACKED:
        place = tl.load(layout + chunk * (T + 2) + t, mask=there, other=-1)
        there = there & (place >= 0)
    else:
        there = there & (place < N)
    return tl.where(there, place, 0), there, chunk, t, first


@triton.jit
def logs(base: tl.tensor, chunk: tl.tensor, t: tl.tensor, there: tl.tensor, stride: tl.tensor) -> tl.tensor:
    """Load a log decay of every row."""
    return tl.load(base + chunk * stride + t, mask=there, other=0.0)


@triton.jit
def positive(
    base: tl.tensor, place: tl.tensor, there: tl.tensor, stride: tl.tensor, D: tl.constexpr, DP: tl.constexpr
) -> tl.tensor:
    """Which of (rows, DP) of a token tensor are above 0.

    A second load costs less than registers through a whole loop. Its policy differs from the first one's, or
    the compiler would merge the two.
    """
    d = tl.arange(0, DP)
    inside = there[:, None] & (d < D)[None, :]
    at = base + place[:, None] * stride + d[None, :]
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first") > 0


@triton.jit
def weight_tile(
    weights: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    M: tl.tensor,
    sa: tl.tensor,
    sb: tl.tensor,
    W: tl.constexpr,
    V: tl.constexpr,
    TP: tl.constexpr,
) -> tl.tensor:
    """Return w[a + i // TP, b + j // TP] of a W x V tile.

    M is no constant, unlike in `dense.py`: packed batches differ in their number of chunks.
    """
    NA: tl.constexpr = W // TP if TP <= W else 1
    NB: tl.constexpr = V // TP if TP <= V else 1
    row, column = a + tl.arange(0, NA), b + tl.arange(0, NB)
    there = (row < M)[:, None] & (column < M)[None, :]
    w = tl.load(weights + row[:, None] * sa + column[None, :] * sb, mask=there, other=0.0)
    return tl.reshape(tl.broadcast_to(w[:, None, :, None], (NA, W // NA, NB, V // NB)), (W, V))


@triton.jit
def fading(
    before: tl.tensor,
    same: tl.tensor,
    until_query: tl.tensor,
    until_key: tl.tensor,
    after_key: tl.tensor,
    DECAY: tl.constexpr,
) -> tl.tensor:
    """fade(t, s) of a tile; 0 where the key is later."""
    if DECAY == 0:
        fade = tl.where(before, 1.0, 0.0)
    else:
        exponent = tl.where(same, until_query - until_key, 0.0)
        if DECAY == 2:
            exponent = tl.where(same, exponent, until_query + after_key)
        fade = tl.where(before, tl.exp(tl.where(before, exponent, 0.0)), 0.0)
    return fade


@triton.jit
def chunk_sum_kernel(
    x: tl.tensor,
    y: tl.tensor,
    layout: tl.tensor,
    fade: tl.tensor,
    out: tl.tensor,
    inverse: tl.tensor,
    sums: tl.tensor,
    z: tl.tensor,
    sxb: tl.tensor,
    sxn: tl.tensor,
    sxh: tl.tensor,
    syb: tl.tensor,
    syn: tl.tensor,
    syh: tl.tensor,
    sob: tl.tensor,
    son: tl.tensor,
    soh: tl.tensor,
    sfb: tl.tensor,
    sfh: tl.tensor,
    sfc: tl.tensor,
    H: tl.tensor,
    N: tl.tensor,
    M: tl.tensor,
    offset: tl.tensor,
    scale: tl.tensor,
    T: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    DVP: tl.constexpr,
    BT: tl.constexpr,
    SLICES: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
    FADES: tl.constexpr,
    GRADIENT: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """Mean of phi(x) y^T over one chunk, for a slice of x's channels.

    A gradient y is divided by the normalizer.
    """
    h, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    chunk = tl.program_id(1) // SLICES
    d = tl.program_id(1) % SLICES * BD + tl.arange(0, BD)
    x += b * sxb + h * sxh
    y += b * syb + h * syh
    out += b * sob + h * soh
    fade += b * sfb + h * sfh + chunk * sfc
    layout += b * M * (T + 2)
    acc = tl.zeros((BD, DVP), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    for t0 in range(0, T, BT):
        t = t0 + tl.arange(0, BT)
        there = t < T
        place = chunk * T + t
        if PACKED:
            place = tl.load(layout + chunk * (T + 2) + t, mask=there, other=-1)
            there = there & (place >= 0)
        else:
            there = there & (place < N)
        place = tl.where(there, place, 0)
        inside = there[:, None] & (d < D)[None, :]
        raw = tl.load(x + place[:, None] * sxn + d[None, :], mask=inside, other=0.0)
        phi = tl.where(inside, tl.maximum(raw.to(tl.float32), 0.0) + offset, 0.0)
        if FADES:
            phi *= tl.exp(tl.load(fade + t, mask=there, other=0.0))[:, None]
        values = rows(y, place, there, syn, DV, DVP)
        if GRADIENT:
            if NORM:
                g = (
                    values.to(tl.float32)
                    * tl.load(inverse + (b * H + h) * N + place, mask=there, other=0.0)[:, None]
                )
                o = rows(out, place, there, son, DV, DVP).to(tl.float32)
                total -= tl.sum(phi * tl.sum(g * o, 1)[:, None], 0)
                values = g.to(raw.dtype)
        elif NORM:
            total += tl.sum(phi, 0)
        acc += product(tl.trans(phi.to(values.dtype)), values, UP, PREC)
    row = (b * H + h) * M + chunk
    dv = tl.arange(0, DVP)
    sums += row * D * DV + d[:, None] * DV + dv[None, :]
    tl.store(sums, (acc * scale).to(sums.dtype.element_ty), mask=(d < D)[:, None] & (dv < DV)[None, :])
    if NORM:
        tl.store(z + row * D + d, total, mask=d < D)


@triton.jit
def causal_forward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    weights: tl.tensor,
    layout: tl.tensor,
    until: tl.tensor,
    after: tl.tensor,
    mixed: tl.tensor,
    z_mixed: tl.tensor,
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
    swb: tl.tensor,
    swh: tl.tensor,
    sub: tl.tensor,
    suh: tl.tensor,
    suc: tl.tensor,
    sab: tl.tensor,
    sah: tl.tensor,
    sac: tl.tensor,
    H: tl.tensor,
    N: tl.tensor,
    M: tl.tensor,
    offset: tl.tensor,
    back: tl.tensor,
    eps: tl.tensor,
    T: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    TP: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
    DECAY: tl.constexpr,
    FAR: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """Output of one tile of queries."""
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    k += b * skb + h * skh
    v += b * svb + h * svh
    weights += b * swb + h * swh
    until += b * sub + h * suh
    after += b * sab + h * sah
    layout += b * M * (T + 2)
    place, there, chunk, t, qa = chunk_rows(tile, layout, M, N, T, BQ, TP, PACKED)
    raw = rows(q + b * sqb + h * sqh, place, there, sqn, D, DP)
    phi = features(raw, there, offset, D, DP)
    queries = phi.to(raw.dtype)
    until_query = tl.zeros((BQ,), tl.float32)
    if DECAY > 0:
        until_query = logs(until, chunk, t, there, suc)
    acc = tl.zeros((BQ, DVP), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    if FAR:
        d = tl.arange(0, DP)
        row = (b * H + h) * M + qa
        s = rows(mixed + row * D * DV, d, d < D, DV, DV, DVP)
        acc = product(phi.to(s.dtype), s, UP, PREC) * back
        if NORM:
            z = tl.load(z_mixed + row * D + d, mask=d < D, other=0.0)
            total = tl.sum(phi * z[None, :], 1)
        if DECAY == 2:
            acc *= tl.exp(until_query)[:, None]
            total *= tl.exp(until_query)
    begin = 0
    if FAR:
        begin = qa * TP // BK
    elif PACKED:
        begin = tl.load(layout + qa * (T + 2) + T) * TP // BK
    rank = tile * BQ + tl.arange(0, BQ)
    for j in range(begin, ((tile + 1) * BQ + BK - 1) // BK):
        at, is_key, key_chunk, s_, ka = chunk_rows(j, layout, M, N, T, BK, TP, PACKED)
        keys = features(rows(k, at, is_key, skn, D, DP), is_key, offset, D, DP).to(raw.dtype)
        values = rows(v, at, is_key, svn, DV, DVP)
        until_key = tl.zeros((BK,), tl.float32)
        after_key = until_key
        if DECAY > 0:
            until_key = logs(until, key_chunk, s_, is_key, suc)
        if DECAY == 2:
            after_key = logs(after, key_chunk, s_, is_key, sac)
        before = rank[:, None] >= (j * BK + tl.arange(0, BK))[None, :]
        same = chunk[:, None] == key_chunk[None, :]
        fade = fading(before, same, until_query[:, None], until_key[None, :], after_key[None, :], DECAY)
        a = product(queries, tl.trans(keys), UP, PREC)
        a *= weight_tile(weights, qa, ka, M, M, 1, BQ, BK, TP) * fade
        if NORM:
            total += tl.sum(a, 1)
        acc += product(a.to(values.dtype), values, UP, PREC)
    if NORM:
        one_over = 1.0 / (total + eps)
        acc *= one_over[:, None]
        tl.store(inverse + (b * H + h) * N + place, one_over, mask=there)
    keep(out + b * sob + h * soh, place, there, son, acc, DV, DVP)


@triton.jit
def causal_queries_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    weights: tl.tensor,
    layout: tl.tensor,
    until: tl.tensor,
    after: tl.tensor,
    mixed: tl.tensor,
    z_mixed: tl.tensor,
    out: tl.tensor,
    inverse: tl.tensor,
    grad: tl.tensor,
    dq: tl.tensor,
    d_total: tl.tensor,
    d_weights: tl.tensor,
    d_until: tl.tensor,
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
    swb: tl.tensor,
    swh: tl.tensor,
    sub: tl.tensor,
    suh: tl.tensor,
    suc: tl.tensor,
    sab: tl.tensor,
    sah: tl.tensor,
    sac: tl.tensor,
    H: tl.tensor,
    N: tl.tensor,
    M: tl.tensor,
    offset: tl.tensor,
    back: tl.tensor,
    ROWS: tl.tensor,
    COLUMNS: tl.tensor,
    T: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    TP: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
    DECAY: tl.constexpr,
    FAR: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """Gradients of one tile of queries and of its weights."""
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    k += b * skb + h * skh
    v += b * svb + h * svh
    weights += b * swb + h * swh
    until += b * sub + h * suh
    after += b * sab + h * sah
    layout += b * M * (T + 2)
    place, there, chunk, t, qa = chunk_rows(tile, layout, M, N, T, BQ, TP, PACKED)
    raw = rows(q + b * sqb + h * sqh, place, there, sqn, D, DP)
    phi = features(raw, there, offset, D, DP)
    queries = phi.to(raw.dtype)
    until_query = tl.zeros((BQ,), tl.float32)
    if DECAY > 0:
        until_query = logs(until, chunk, t, there, suc)
    g = rows(grad + b * sgb + h * sgh, place, there, sgn, DV, DVP)
    d_sum = tl.zeros((BQ,), tl.float32)
    if NORM:
        one_over = tl.load(inverse + (b * H + h) * N + place, mask=there, other=0.0)
        scaled = g.to(tl.float32) * one_over[:, None]
        o = rows(out + b * sob + h * soh, place, there, son, DV, DVP).to(tl.float32)
        d_sum = -tl.sum(scaled * o, 1)
        tl.store(d_total + (b * H + h) * N + place, d_sum, mask=there)
        g = scaled.to(raw.dtype)
    acc = tl.zeros((BQ, DP), tl.float32)
    d_log = tl.zeros((BQ,), tl.float32)
    if FAR:
        d = tl.arange(0, DP)
        row = (b * H + h) * M + qa
        VS: tl.constexpr = (
            128 if DVP > 128 else DVP
        )  # all channels of v at once would take too many registers
        for v0 in range(0, DVP, VS):
            channel = v0 + tl.arange(0, VS)
            at_s = mixed + row * D * DV + d[:, None] * DV + channel[None, :]
            s = tl.load(at_s, mask=(d < D)[:, None] & (channel < DV)[None, :], other=0.0)
            at_g = grad + b * sgb + h * sgh + place[:, None] * sgn + channel[None, :]
            part = tl.load(at_g, mask=there[:, None] & (channel < DV)[None, :], other=0.0)
            if NORM:
                part = (part.to(tl.float32) * one_over[:, None]).to(raw.dtype)
            acc += product(part.to(s.dtype), tl.trans(s), UP, PREC)
        acc *= back
        if NORM:
            z = tl.load(z_mixed + row * D + d, mask=d < D, other=0.0)
            acc += d_sum[:, None] * z[None, :]
        if DECAY == 2:
            acc *= tl.exp(until_query)[:, None]
            d_log = tl.sum(acc * phi, 1)
    begin = 0
    if FAR:
        begin = qa * TP // BK
    elif PACKED:
        begin = tl.load(layout + qa * (T + 2) + T) * TP // BK
    NA: tl.constexpr = BQ // TP if TP <= BQ else 1
    NB: tl.constexpr = BK // TP if TP <= BK else 1
    d_weights += (b * H + h) * ROWS * COLUMNS + tile * NA * COLUMNS
    cells = tl.arange(0, NA)[:, None] * COLUMNS + tl.arange(0, NB)[None, :]
    own = tl.zeros((NA, NB), tl.float32)
    rank = tile * BQ + tl.arange(0, BQ)
    for j in range(begin, ((tile + 1) * BQ + BK - 1) // BK):
        at, is_key, key_chunk, s_, ka = chunk_rows(j, layout, M, N, T, BK, TP, PACKED)
        keys = features(rows(k, at, is_key, skn, D, DP), is_key, offset, D, DP).to(raw.dtype)
        values = rows(v, at, is_key, svn, DV, DVP)
        until_key = tl.zeros((BK,), tl.float32)
        after_key = until_key
        if DECAY > 0:
            until_key = logs(until, key_chunk, s_, is_key, suc)
        if DECAY == 2:
            after_key = logs(after, key_chunk, s_, is_key, sac)
        before = rank[:, None] >= (j * BK + tl.arange(0, BK))[None, :]
        same = chunk[:, None] == key_chunk[None, :]
        fade = fading(before, same, until_query[:, None], until_key[None, :], after_key[None, :], DECAY)
        m = weight_tile(weights, qa, ka, M, M, 1, BQ, BK, TP)
        da = (product(g, tl.trans(values), UP, PREC) + d_sum[:, None]) * fade
        p = product(queries, tl.trans(keys), UP, PREC) * da
        sums = tl.sum(tl.sum(tl.reshape(p, (NA, BQ // NA, NB, BK // NB)), 3), 1)
        if FAR:
            own += sums
        else:
            tl.store(
                d_weights + j * NB + cells,
                sums,
                mask=(qa + tl.arange(0, NA)[:, None] < M) & (ka + tl.arange(0, NB)[None, :] < M),
            )
        da *= m
        if DECAY == 1:
            d_log += tl.sum(tl.where(same, p * m, 0.0), 1)
        if DECAY == 2:
            d_log += tl.sum(p * m, 1)
        acc += product(da.to(raw.dtype), keys, UP, PREC)
    if FAR:
        tl.store(d_weights + cells, own)
    if DECAY > 0:
        tl.store(d_until + ((b * H + h) * M + chunk) * T + t, d_log, mask=there)
    kept = positive(q + b * sqb + h * sqh, place, there, sqn, D, DP)
    keep(dq + (b * N * H + h) * D, place, there, H * D, tl.where(kept, acc, 0.0), D, DP)


@triton.jit
def causal_keys_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    weights: tl.tensor,
    layout: tl.tensor,
    until: tl.tensor,
    after: tl.tensor,
    d_summary: tl.tensor,
    d_z: tl.tensor,
    inverse: tl.tensor,
    grad: tl.tensor,
    d_total: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    d_until: tl.tensor,
    d_after: tl.tensor,
    sqb: tl.tensor,
    sqn: tl.tensor,
    sqh: tl.tensor,
    skb: tl.tensor,
    skn: tl.tensor,
    skh: tl.tensor,
    svb: tl.tensor,
    svn: tl.tensor,
    svh: tl.tensor,
    sgb: tl.tensor,
    sgn: tl.tensor,
    sgh: tl.tensor,
    swb: tl.tensor,
    swh: tl.tensor,
    sub: tl.tensor,
    suh: tl.tensor,
    suc: tl.tensor,
    sab: tl.tensor,
    sah: tl.tensor,
    sac: tl.tensor,
    H: tl.tensor,
    N: tl.tensor,
    M: tl.tensor,
    offset: tl.tensor,
    back: tl.tensor,
    TILES: tl.tensor,
    T: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    TP: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
    DECAY: tl.constexpr,
    FAR: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """Gradients of one tile of keys and values."""
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q += b * sqb + h * sqh
    grad += b * sgb + h * sgh
    weights += b * swb + h * swh
    until += b * sub + h * suh
    after += b * sab + h * sah
    layout += b * M * (T + 2)
    place, there, chunk, t, ka = chunk_rows(tile, layout, M, N, T, BK, TP, PACKED)
    raw = rows(k + b * skb + h * skh, place, there, skn, D, DP)
    phi = features(raw, there, offset, D, DP)
    keys = phi.to(raw.dtype)
    values = rows(v + b * svb + h * svh, place, there, svn, DV, DVP)
    until_key = tl.zeros((BK,), tl.float32)
    after_key = until_key
    if DECAY > 0:
        until_key = logs(until, chunk, t, there, suc)
    if DECAY == 2:
        after_key = logs(after, chunk, t, there, sac)
    d_keys = tl.zeros((BK, DP), tl.float32)
    d_values = tl.zeros((BK, DVP), tl.float32)
    d_log = tl.zeros((BK,), tl.float32)
    d_end = tl.zeros((BK,), tl.float32)
    if FAR:
        d = tl.arange(0, DP)
        row = (b * H + h) * M + ka
        ds = rows(d_summary + row * D * DV, d, d < D, DV, DV, DVP)
        d_values = product(phi.to(ds.dtype), ds, UP, PREC) * back
        d_keys = product(values.to(ds.dtype), tl.trans(ds), UP, PREC) * back
        if NORM:
            dz = tl.load(d_z + row * D + d, mask=d < D, other=0.0)
            d_keys += dz[None, :]
        if DECAY == 2:
            d_values *= tl.exp(after_key)[:, None]
            d_keys *= tl.exp(after_key)[:, None]
            d_end = tl.sum(d_keys * phi, 1)
    end = TILES
    if FAR:
        end = ((ka + 1) * TP + BQ - 1) // BQ
    elif PACKED:
        last = tl.minimum(ka + (BK // TP if TP <= BK else 1), M) - 1
        end = (tl.load(layout + last * (T + 2) + T + 1) * TP + BQ - 1) // BQ
    rank = tile * BK + tl.arange(0, BK)
    for i in range(tile * BK // BQ, end):
        at, is_query, query_chunk, t_, qa = chunk_rows(i, layout, M, N, T, BQ, TP, PACKED)
        queries = features(rows(q, at, is_query, sqn, D, DP), is_query, offset, D, DP).to(raw.dtype)
        g = rows(grad, at, is_query, sgn, DV, DVP)
        if NORM:
            one_over = tl.load(inverse + (b * H + h) * N + at, mask=is_query, other=0.0)
            g = (g.to(tl.float32) * one_over[:, None]).to(raw.dtype)
        until_query = tl.zeros((BQ,), tl.float32)
        if DECAY > 0:
            until_query = logs(until, query_chunk, t_, is_query, suc)
        before = (i * BQ + tl.arange(0, BQ))[None, :] >= rank[:, None]
        same = query_chunk[None, :] == chunk[:, None]
        fade = fading(before, same, until_query[None, :], until_key[:, None], after_key[:, None], DECAY)
        m = weight_tile(weights, ka, qa, M, 1, M, BK, BQ, TP) * fade
        a = product(keys, tl.trans(queries), UP, PREC) * m
        d_values += product(a.to(raw.dtype), g, UP, PREC)
        da = product(values, tl.trans(g), UP, PREC)
        if NORM:
            da += tl.load(d_total + (b * H + h) * N + at, mask=is_query, other=0.0)[None, :]
        if DECAY > 0:
            d_log -= tl.sum(tl.where(same, a * da, 0.0), 1)
        if DECAY == 2:
            d_end += tl.sum(tl.where(same, 0.0, a * da), 1)
        d_keys += product((da * m).to(raw.dtype), queries, UP, PREC)
    slot = ((b * H + h) * M + chunk) * T + t
    if DECAY > 0:
        tl.store(d_until + slot, tl.load(d_until + slot, mask=there, other=0.0) + d_log, mask=there)
    if DECAY == 2:
        tl.store(d_after + slot, d_end, mask=there)
    keep(dv + (b * N * H + h) * DV, place, there, H * DV, d_values, DV, DVP)
    kept = positive(k + b * skb + h * skh, place, there, skn, D, DP)
    keep(dk + (b * N * H + h) * D, place, there, H * D, tl.where(kept, d_keys, 0.0), D, DP)


@dataclass(frozen=True)
class CausalPlan:
    """What one call shares between forward and backward.

    Attributes:
        size: tokens per chunk.
        far: whether chunks are summed up; else every key is read.
        offset: added by the feature map.
        eps: added to the normalizer; None means no normalizer.
    """

    size: int
    far: bool
    offset: float
    eps: float | None = None

    @property
    def padded(self) -> int:
        """Rows that a chunk takes in a tile."""
        rows_ = tiles.padded_block(self.size)
        return tiles.power_of_two(rows_) if self.far else rows_

    def tiles_of(self, chunks: int, rows_of_a_tile: int) -> int:
        """Return the tiles that hold all chunks."""
        if self.padded <= rows_of_a_tile:
            return ceil_div(chunks, rows_of_a_tile // self.padded)
        return chunks * (self.padded // rows_of_a_tile)


def _four(name: str, x: Tensor) -> dict[str, int]:
    """Return strides over batch and heads of a term; 0 where it is shared."""
    return {f"s{name}{axis}": x.stride(i) if x.shape[i] > 1 else 0 for i, axis in enumerate("bh")}


def _constants(q: Tensor, v: Tensor, terms: CausalTerms, plan: CausalPlan) -> dict[str, Any]:
    """Return the arguments that all kernels of a call share."""
    d, dv = q.shape[3], v.shape[3]
    return {
        "layout": q if terms.layout is None else terms.layout,
        "offset": plan.offset,
        "H": q.shape[2],
        "N": q.shape[1],
        "M": terms.chunks,
        "T": plan.size,
        "D": d,
        "DV": dv,
        "DVP": tiles.power_of_two(dv),
        "NORM": plan.eps is not None,
        "PACKED": terms.layout is not None,
        "UP": INTERPRETED,
        "PREC": precision(q.dtype),
    }


def _pair_constants(q: Tensor, v: Tensor, terms: CausalTerms, plan: CausalPlan) -> dict[str, Any]:
    """Return the further arguments of the kernels that read pairs of tokens."""
    until = q.new_empty((1,) * 4) if terms.until is None else terms.until
    after = until if terms.after is None else terms.after
    return {
        **_constants(q, v, terms, plan),
        **_four("w", terms.weights),
        **_four("u", until),
        **_four("a", after),
        "suc": until.stride(2),
        "sac": after.stride(2),
        "weights": terms.weights,
        "until": until,
        "after": after,
        "back": float(plan.size),
        "DP": tiles.power_of_two(q.shape[3]),
        "TP": plan.padded,
        "DECAY": (terms.until is not None) + (terms.after is not None),
        "FAR": plan.far,
    }


def _tile(kernel: str, q: Tensor, v: Tensor, plan: CausalPlan, chunks: int) -> tiles.Tile:
    wide = max(tiles.power_of_two(q.shape[3]), tiles.power_of_two(v.shape[3]))
    rows_ = plan.padded if plan.far else chunks * plan.padded
    return tiles.causal_tile(kernel, wide, rows_, q.element_size(), capability_of(q))


def chunk_sums(
    x: Tensor,
    y: Tensor,
    fade: Tensor | None,
    terms: CausalTerms,
    plan: CausalPlan,
    forward_results: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Return the means of phi(x) y^T of every chunk, and the sums of phi(x) for the normalizer.

    Args:
        x: (batch, tokens, heads, dim_k), k or q.
        y: (batch, tokens, heads, dim_v), v or the gradient of the output.
        fade: (batch, heads, M, size), log decay of each x; None means no decay.
        terms, plan: of the call.
        forward_results: output and 1 / normalizer where y is a gradient.

    Returns:
        (batch, heads, M, dim_k, dim_v) and (batch, heads, M, dim_k); the latter is empty without normalizer.
    """
    batch, _, heads, dim = x.shape
    dim_v, count = y.shape[3], terms.chunks
    sums = torch.empty((batch, heads, count, dim, dim_v), dtype=x.dtype, device=x.device)
    z_shape = sums.shape[:-1] if plan.eps is not None else (0,) * 4
    z = torch.empty(z_shape, dtype=torch.float32, device=x.device)
    tile = _tile("sum", x, y, plan, count)
    slice_, slices = tiles.slices_of(tiles.power_of_two(dim), tiles.power_of_two(dim_v))
    out, inverse = forward_results or (y, z)
    shared = x if fade is None else fade
    constants = _constants(x, y, terms, plan)
    arguments = {
        **constants,
        **strides("x", x),
        **strides("y", y),
        **strides("o", out),
        **_four("f", shared),
        "sfc": shared.stride(2),
        "x": x,
        "y": y,
        "fade": shared,
        "out": out,
        "inverse": inverse,
        "sums": sums,
        "z": z,
        "scale": 1 / plan.size,
        "BD": slice_,
        "BT": tile.queries,
        "SLICES": slices,
        "FADES": fade is not None,
        "GRADIENT": bool(forward_results),
    }
    padded = ceil_div(plan.size, tile.queries) * tile.queries
    flops = 2 * batch * heads * count * padded * slice_ * slices * constants["DVP"]
    reads = ("x", "y") + (("out", "inverse") if forward_results and plan.eps is not None else ())
    grid = (heads, count * slices, batch)
    start(Launch(chunk_sum_kernel, grid, arguments, tile.warps, tile.stages, flops, reads, ("sums", "z")))
    return sums, z


def mix_earlier(weights: Tensor, x: Tensor) -> Tensor:
    """Return sum_b w[i, b] x_b, with float32 sums.

    Args:
        weights: (batch or 1, heads or 1, M, M); rounded to x's dtype.
        x: (batch, heads, M, ...).
    """
    w = weights.to(x.dtype).expand(*x.shape[:2], -1, -1).flatten(0, 1)
    return torch.bmm(w, x.flatten(0, 1).flatten(2)).view(x.shape)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of all pairs of chunks in float32, (batch, heads, M, M)."""
    x, y = a.flatten(0, 1).flatten(2), b.flatten(0, 1).flatten(2).mT
    if a.dtype != torch.float32 and not INTERPRETED:
        pairs = torch.bmm(x, y, out_dtype=torch.float32)
    else:
        pairs = torch.bmm(x.float(), y.float())
    return pairs.unflatten(0, a.shape[:2])


def _launch_pairs(
    kernel: Any, tile: tiles.Tile, arguments: dict[str, Any], products: tuple[int, int], batch: int
) -> None:
    """Start a kernel over pairs of tokens.

    Args:
        kernel: one of this file.
        tile: its tile.
        arguments: all but the tile's sizes.
        products: matrix products of dim_k and of dim_v channels a pair.
        batch: samples.
    """
    over_keys = kernel is causal_keys_kernel
    padded, count, far = arguments["TP"], arguments["M"], arguments["FAR"]
    width = tile.keys if over_keys else tile.queries
    programs = ceil_div(count, width // padded) if padded <= width else count * (padded // width)
    pairs = batch * arguments["H"] * padded**2 * (count if far else count**2) // 2
    flops = 2 * pairs * (products[0] * arguments["DP"] + products[1] * arguments["DVP"])
    arguments = {**arguments, "BQ": tile.queries, "BK": tile.keys}
    reads, writes = _TRAFFIC[kernel.__name__]
    normal = {"inverse", "out"} if not arguments["NORM"] else set()
    absent = normal | ({"mixed", "d_summary"} if not far else set())
    reads = tuple(name for name in reads if name not in absent)
    start(
        Launch(
            kernel,
            (arguments["H"], programs, batch),
            arguments,
            tile.warps,
            tile.stages,
            flops,
            reads,
            writes,
        )
    )


_TRAFFIC: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "causal_forward_kernel": (("q", "k", "v", "weights", "mixed"), ("out", "inverse")),
    "causal_queries_kernel": (
        ("q", "k", "v", "weights", "mixed", "inverse", "out", "grad"),
        ("dq", "d_weights", "d_total"),
    ),
    "causal_keys_kernel": (("q", "k", "v", "weights", "d_summary", "inverse", "grad"), ("dk", "dv")),
}
"""What each kernel reads and writes, beside decays and index arrays."""


def _room(x: Tensor, terms: CausalTerms) -> Tensor:
    """Return room for a token tensor; 0 where padding is not written."""
    make = torch.empty if terms.layout is None else torch.zeros
    return make(x.shape, dtype=x.dtype, device=x.device)


def forward(
    q: Tensor, k: Tensor, v: Tensor, terms: CausalTerms, plan: CausalPlan
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, 1 / normalizer, mixed means and sums, means and sums of chunks.

    The last four are empty in the dense form. See `causal_ops.causal`.
    """
    q, k, v = (contiguous_channels(x) for x in (q, k, v))
    batch, tokens, heads, _ = q.shape
    out = _room(v, terms)
    inverse = torch.empty(
        (batch, heads, tokens if plan.eps is not None else 0), dtype=torch.float32, device=q.device
    )
    empty = [q.new_empty((0,) * 5), inverse.new_empty((0,) * 4)]
    (mixed, z_mixed), (summary, z) = empty, [x.clone() for x in empty]
    if plan.far:
        summary, z = chunk_sums(k, v, terms.after, terms, plan)
        earlier = terms.weights.tril(-1)
        mixed = mix_earlier(earlier, summary)
        z_mixed = torch.empty_like(z) if plan.eps is None else mix_earlier(earlier, z)
    arguments = {
        **_pair_constants(q, v, terms, plan),
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("o", out),
        "q": q,
        "k": k,
        "v": v,
        "mixed": mixed,
        "z_mixed": z_mixed,
        "out": out,
        "inverse": inverse,
        "eps": plan.eps or 0.0,
    }
    tile = _tile("forward", q, v, plan, terms.chunks)
    _launch_pairs(causal_forward_kernel, tile, arguments, (1, 1), batch)
    return out, inverse, mixed, z_mixed, summary, z


def backward(
    grad: Tensor,
    tokens: Sequence[Tensor],
    terms: CausalTerms,
    saved: Sequence[Tensor],
    plan: CausalPlan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, the weights, `until` and `after`; absent ones are empty.

    Args:
        grad: of the output.
        tokens: q, k and v.
        terms, plan: of the call.
        saved: of :func:`forward`.
    """
    out, inverse, mixed, z_mixed, summary, z = saved
    grad, q, k, v = (contiguous_channels(x) for x in (grad, *tokens))
    batch, length, heads, _ = q.shape
    dq, dk, dv = (_room(x, terms) for x in (q, k, v))
    count, device = terms.chunks, q.device
    d_until, d_after = (
        torch.zeros(
            (batch, heads, count, plan.size) if x is not None else (0,) * 4,
            dtype=torch.float32,
            device=device,
        )
        for x in (terms.until, terms.after)
    )
    d_total = torch.empty(inverse.shape, dtype=torch.float32, device=device)
    d_summary, d_z = mixed, z_mixed
    if plan.far:
        until = terms.until if terms.after is not None else None
        d_mixed, d_z_mixed = chunk_sums(q, grad, until, terms, plan, (out, inverse))
        transposed = terms.weights.tril(-1).mT
        d_summary = mix_earlier(transposed, d_mixed)
        d_z = d_z_mixed if plan.eps is None else mix_earlier(transposed, d_z_mixed)
    tile, keys_tile = (_tile(name, q, v, plan, count) for name in ("queries", "keys"))
    down, across = (max(1, plan.padded // width) for width in (tile.queries, tile.keys))  # tiles of a chunk
    shape = (batch, heads, count * down, 1 if plan.far else count * across)
    make = torch.empty if plan.far else torch.zeros  # the dense form passes over pairs without a weight
    parts = make(shape, dtype=torch.float32, device=device)
    arguments = {
        **_pair_constants(q, v, terms, plan),
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("g", grad),
        "q": q,
        "k": k,
        "v": v,
        "inverse": inverse,
        "grad": grad,
        "d_total": d_total,
        "d_until": d_until,
    }
    _launch_pairs(
        causal_queries_kernel,
        tile,
        {
            **arguments,
            **strides("o", out),
            "mixed": mixed,
            "z_mixed": z_mixed,
            "out": out,
            "dq": dq,
            "d_weights": parts,
            "ROWS": shape[2],
            "COLUMNS": shape[3],
        },
        (2, 1),
        batch,
    )
    _launch_pairs(
        causal_keys_kernel,
        keys_tile,
        {
            **arguments,
            "d_summary": d_summary,
            "d_z": d_z,
            "dk": dk,
            "dv": dv,
            "d_after": d_after,
            "TILES": plan.tiles_of(count, keys_tile.queries),
        },
        (2, 2),
        batch,
    )
    if plan.far:
        d_weights = _products(d_mixed, summary) * plan.size**2
        if plan.eps is not None:
            d_weights += _products(d_z_mixed, z)
        d_weights = d_weights.tril(-1) + torch.diag_embed(parts.unflatten(2, (count, down)).sum((3, 4)))
    elif down * across > 1:
        d_weights = parts.unflatten(3, (count, across)).sum(4).unflatten(2, (count, down)).sum(3)
    else:
        d_weights = parts
    shared = [axis for axis in (0, 1) if terms.weights.shape[axis] == 1]
    if shared:
        d_weights = d_weights.sum(shared, keepdim=True)
    return dq, dk, dv, d_weights, d_until, d_after
