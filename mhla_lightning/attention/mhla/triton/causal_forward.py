"""Causal MHLA, dense for short rows and in chunks for long ones; decays and documents.

A[t, s] = w[c(t), c(s)] fade(t, s) phi(q_t) . phi(k_s) for s <= t, and o_t = sum_s A[t, s] v_s, divided by
sum_s A[t, s] + eps where there is a normalizer. c(t) is the chunk of token t in its row. The weights w hold
the mixing, the scale, the documents and the decay between chunks; `terms.py` makes them.

fade(t, s) is exp(until_t - until_s) inside a chunk. Where the decay spans the sequence, it is
exp(until_t + after_s) between chunks. Rotary positions turn phi in the numerator only.

Tiles hold whole chunks, each padded to a power of two, or a part of one chunk. `layout` gives the place of
every row of a chunk in a packed batch. The dense form (FAR = 0) reads all chunks of a tile's documents. The
form in chunks (FAR = 1) reads the own chunk, and earlier ones through mixed means of phi(k) v^T. Both take
the same three kernels. Nothing is added atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mhla_lightning.attention.mhla.triton.causal_device import (
    channel_rows,
    channels,
    chunk_rows,
    fading,
    inside_of,
    logs,
    phi_of,
    turned,
    weight_tile,
)
from mhla_lightning.attention.mhla.triton.device import keep, product, rows


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
    cos: tl.tensor,
    sin: tl.tensor,
    scb: tl.tensor,
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
    TURN: tl.constexpr,
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
    cos += b * scb
    sin += b * scb
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
        raw = channel_rows(x, place, inside, sxn, d)
        plain = phi_of(raw, inside, offset)
        phi = turned(plain, x, place, inside, sxn, cos, sin, offset, d, D, TURN)
        if FADES:
            faded = tl.exp(tl.load(fade + t, mask=there, other=0.0))[:, None]
            phi *= faded
            plain *= faded
        values = rows(y, place, there, syn, DV, DVP)
        if GRADIENT:
            if NORM:
                g = (
                    values.to(tl.float32)
                    * tl.load(inverse + (b * H + h) * N + place, mask=there, other=0.0)[:, None]
                )
                o = rows(out, place, there, son, DV, DVP).to(tl.float32)
                total -= tl.sum(plain * tl.sum(g * o, 1)[:, None], 0)
                values = g.to(raw.dtype)
        elif NORM:
            total += tl.sum(plain, 0)
        acc += product(tl.trans(phi.to(values.dtype)), values, UP, PREC)
    row = (b * H + h) * M + chunk
    dv = tl.arange(0, DVP)
    sums += row * D * DV + d[:, None] * DV + dv[None, :]
    tl.store(sums, (acc * scale).to(sums.dtype.element_ty), mask=(d < D)[:, None] & (dv < DV)[None, :])
    if NORM:
        tl.store(z + row * D + d, total, mask=d < D)


@triton.jit
def mix_kernel(
    x: tl.tensor,
    other: tl.tensor,
    weights: tl.tensor,
    mixed: tl.tensor,
    pairs: tl.tensor,
    swb: tl.tensor,
    swh: tl.tensor,
    H: tl.tensor,
    M: tl.tensor,
    X: tl.tensor,
    scale: tl.tensor,
    MP: tl.constexpr,
    XB: tl.constexpr,
    TILES: tl.constexpr,
    BACK: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """Mix a slice of the means x of all chunks with the weights of earlier ones.

    A mean has X elements. BACK mixes with the transposed weights, and also writes the slice's part of
    scale x y^T for all pairs of chunks, where y is `other`.
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, MP)
    earlier = (i[:, None] > i[None, :]) & (i < M)[:, None]
    cells = i[:, None] * M + i[None, :]
    w = tl.load(weights + row // H * swb + row % H * swh + cells, mask=earlier, other=0.0)
    if BACK:
        w = tl.trans(w)
    w = w.to(x.dtype.element_ty)
    acc = tl.zeros((MP, MP), tl.float32)
    for tile in range(TILES):
        channel = (part * TILES + tile) * XB + tl.arange(0, XB)
        at = row * M * X + i[:, None] * X + channel[None, :]
        there = (i < M)[:, None] & (channel < X)[None, :]
        values = tl.load(x + at, mask=there, other=0.0)
        tl.store(mixed + at, product(w, values, UP, PREC).to(mixed.dtype.element_ty), mask=there)
        if BACK:
            y = tl.load(other + at, mask=there, other=0.0)
            acc += product(values, tl.trans(y), UP, PREC)
    if BACK:
        pairs += (row * tl.num_programs(0) + part) * M * M
        tl.store(pairs + cells, tl.where(earlier, acc * scale, 0.0), mask=(i < M)[:, None] & (i < M)[None, :])


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
    cos: tl.tensor,
    sin: tl.tensor,
    scb: tl.tensor,
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
    TURN: tl.constexpr,
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
    cos += b * scb
    sin += b * scb
    place, there, chunk, t, qa = chunk_rows(tile, layout, M, N, T, BQ, TP, PACKED)
    q += b * sqb + h * sqh
    d, is_channel = channels(D, DP, TURN)
    inside = inside_of(there, is_channel, D, DP)
    raw = channel_rows(q, place, inside, sqn, d)
    plain = phi_of(raw, inside, offset)
    phi = turned(plain, q, place, inside, sqn, cos, sin, offset, d, D, TURN)
    queries = phi.to(raw.dtype)
    plain_queries = queries
    if TURN and NORM:
        plain_queries = plain.to(raw.dtype)
    until_query = tl.zeros((BQ,), tl.float32)
    if DECAY > 0:
        until_query = logs(until, chunk, t, there, suc)
    acc = tl.zeros((BQ, DVP), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    if FAR:
        row = (b * H + h) * M + qa
        s = rows(mixed + row * D * DV, d, is_channel, DV, DV, DVP)
        acc = product(phi.to(s.dtype), s, UP, PREC) * back
        if NORM:
            z = tl.load(z_mixed + row * D + d, mask=is_channel, other=0.0)
            total = tl.sum(plain * z[None, :], 1)
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
        key_inside = inside_of(is_key, is_channel, D, DP)
        plain_keys = phi_of(channel_rows(k, at, key_inside, skn, d), key_inside, offset)
        keys = turned(plain_keys, k, at, key_inside, skn, cos, sin, offset, d, D, TURN).to(raw.dtype)
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
        w = weight_tile(weights, qa, ka, M, M, 1, BQ, BK, TP) * fade
        a *= w
        if NORM:
            if TURN:
                total += tl.sum(product(plain_queries, tl.trans(plain_keys.to(raw.dtype)), UP, PREC) * w, 1)
            else:
                total += tl.sum(a, 1)
        acc += product(a.to(values.dtype), values, UP, PREC)
    if NORM:
        one_over = 1.0 / (total + eps)
        acc *= one_over[:, None]
        tl.store(inverse + (b * H + h) * N + place, one_over, mask=there)
    keep(out + b * sob + h * soh, place, there, son, acc, DV, DVP)
