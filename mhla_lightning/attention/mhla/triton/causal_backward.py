"""Gradients of causal MHLA; see `causal_forward.py` for the terms and the layout."""

from __future__ import annotations

import triton
import triton.language as tl

from mhla_lightning.attention.mhla.triton.causal_device import (
    channel_rows,
    channels,
    chunk_rows,
    fading,
    inside_of,
    keep_positive,
    logs,
    phi_of,
    turned,
    turned_back,
    weight_tile,
)
from mhla_lightning.attention.mhla.triton.device import keep, product, rows


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
    cos: tl.tensor,
    sin: tl.tensor,
    scb: tl.tensor,
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
    TURN: tl.constexpr,
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
    # The normalizer takes features that are not turned.
    APART: tl.constexpr = TURN and NORM
    plain_queries = queries
    if APART:
        plain_queries = plain.to(raw.dtype)
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
    plain_acc = acc
    d_log = tl.zeros((BQ,), tl.float32)
    if FAR:
        row = (b * H + h) * M + qa
        VS: tl.constexpr = (
            128 if DVP > 128 else DVP
        )  # all channels of v at once would take too many registers
        for v0 in range(0, DVP, VS):
            channel = v0 + tl.arange(0, VS)
            at_s = mixed + row * D * DV + d[:, None] * DV + channel[None, :]
            s = tl.load(at_s, mask=is_channel[:, None] & (channel < DV)[None, :], other=0.0)
            at_g = grad + b * sgb + h * sgh + place[:, None] * sgn + channel[None, :]
            part = tl.load(at_g, mask=there[:, None] & (channel < DV)[None, :], other=0.0)
            if NORM:
                part = (part.to(tl.float32) * one_over[:, None]).to(raw.dtype)
            acc += product(part.to(s.dtype), tl.trans(s), UP, PREC)
        acc *= back
        if NORM:
            z = tl.load(z_mixed + row * D + d, mask=is_channel, other=0.0)
            if APART:
                plain_acc += d_sum[:, None] * z[None, :]
            else:
                acc += d_sum[:, None] * z[None, :]
        if DECAY == 2:
            acc *= tl.exp(until_query)[:, None]
            d_log = tl.sum(acc * phi, 1)
            if APART:
                plain_acc *= tl.exp(until_query)[:, None]
                d_log += tl.sum(plain_acc * plain, 1)
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
        m = weight_tile(weights, qa, ka, M, M, 1, BQ, BK, TP)
        da = product(g, tl.trans(values), UP, PREC)
        if APART:
            da *= fade
            plain_da = d_sum[:, None] * fade
            p = product(queries, tl.trans(keys), UP, PREC) * da
            p += product(plain_queries, tl.trans(plain_keys.to(raw.dtype)), UP, PREC) * plain_da
            plain_acc += product((plain_da * m).to(raw.dtype), plain_keys.to(raw.dtype), UP, PREC)
        else:
            da = (da + d_sum[:, None]) * fade
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
    acc = turned_back(acc, place, there, cos, sin, BQ, D, DP, TURN)
    if APART:
        acc += plain_acc
    keep_positive(dq + (b * N * H + h) * D, q, place, inside, sqn, H * D, d, acc)


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
    cos: tl.tensor,
    sin: tl.tensor,
    scb: tl.tensor,
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
    TURN: tl.constexpr,
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
    cos += b * scb
    sin += b * scb
    place, there, chunk, t, ka = chunk_rows(tile, layout, M, N, T, BK, TP, PACKED)
    k += b * skb + h * skh
    d, is_channel = channels(D, DP, TURN)
    inside = inside_of(there, is_channel, D, DP)
    raw = channel_rows(k, place, inside, skn, d)
    plain = phi_of(raw, inside, offset)
    phi = turned(plain, k, place, inside, skn, cos, sin, offset, d, D, TURN)
    keys = phi.to(raw.dtype)
    APART: tl.constexpr = TURN and NORM
    plain_keys = keys
    if APART:
        plain_keys = plain.to(raw.dtype)
    values = rows(v + b * svb + h * svh, place, there, svn, DV, DVP)
    until_key = tl.zeros((BK,), tl.float32)
    after_key = until_key
    if DECAY > 0:
        until_key = logs(until, chunk, t, there, suc)
    if DECAY == 2:
        after_key = logs(after, chunk, t, there, sac)
    d_keys = tl.zeros((BK, DP), tl.float32)
    plain_d_keys = d_keys
    d_values = tl.zeros((BK, DVP), tl.float32)
    d_log = tl.zeros((BK,), tl.float32)
    d_end = tl.zeros((BK,), tl.float32)
    if FAR:
        row = (b * H + h) * M + ka
        ds = rows(d_summary + row * D * DV, d, is_channel, DV, DV, DVP)
        d_values = product(phi.to(ds.dtype), ds, UP, PREC) * back
        d_keys = product(values.to(ds.dtype), tl.trans(ds), UP, PREC) * back
        if NORM:
            dz = tl.load(d_z + row * D + d, mask=is_channel, other=0.0)
            if APART:
                plain_d_keys += dz[None, :]
            else:
                d_keys += dz[None, :]
        if DECAY == 2:
            d_values *= tl.exp(after_key)[:, None]
            d_keys *= tl.exp(after_key)[:, None]
            d_end = tl.sum(d_keys * phi, 1)
            if APART:
                plain_d_keys *= tl.exp(after_key)[:, None]
                d_end += tl.sum(plain_d_keys * plain, 1)
    end = TILES
    if FAR:
        end = ((ka + 1) * TP + BQ - 1) // BQ
    elif PACKED:
        last = tl.minimum(ka + (BK // TP if TP <= BK else 1), M) - 1
        end = (tl.load(layout + last * (T + 2) + T + 1) * TP + BQ - 1) // BQ
    rank = tile * BK + tl.arange(0, BK)
    for i in range(tile * BK // BQ, end):
        at, is_query, query_chunk, t_, qa = chunk_rows(i, layout, M, N, T, BQ, TP, PACKED)
        query_inside = inside_of(is_query, is_channel, D, DP)
        plain_queries = phi_of(channel_rows(q, at, query_inside, sqn, d), query_inside, offset)
        queries = turned(plain_queries, q, at, query_inside, sqn, cos, sin, offset, d, D, TURN).to(raw.dtype)
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
            d_sum = tl.load(d_total + (b * H + h) * N + at, mask=is_query, other=0.0)
        p = a * da
        if APART:
            plain_da = m * d_sum[None, :]
            p += product(plain_keys, tl.trans(plain_queries.to(raw.dtype)), UP, PREC) * plain_da
            plain_d_keys += product(plain_da.to(raw.dtype), plain_queries.to(raw.dtype), UP, PREC)
        elif NORM:
            da += d_sum[None, :]
            p = a * da
        if DECAY > 0:
            d_log -= tl.sum(tl.where(same, p, 0.0), 1)
        if DECAY == 2:
            d_end += tl.sum(tl.where(same, 0.0, p), 1)
        d_keys += product((da * m).to(raw.dtype), queries, UP, PREC)
    slot = ((b * H + h) * M + chunk) * T + t
    if DECAY > 0:
        tl.store(d_until + slot, tl.load(d_until + slot, mask=there, other=0.0) + d_log, mask=there)
    if DECAY == 2:
        tl.store(d_after + slot, d_end, mask=there)
    keep(dv + (b * N * H + h) * DV, place, there, H * DV, d_values, DV, DVP)
    d_keys = turned_back(d_keys, place, there, cos, sin, BK, D, DP, TURN)
    if APART:
        d_keys += plain_d_keys
    keep_positive(dk + (b * N * H + h) * D, k, place, inside, skn, H * D, d, d_keys)


@triton.jit
def causal_own_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    weights: tl.tensor,
    layout: tl.tensor,
    mixed: tl.tensor,
    d_summary: tl.tensor,
    grad: tl.tensor,
    dq: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    d_weights: tl.tensor,
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
    cos: tl.tensor,
    sin: tl.tensor,
    scb: tl.tensor,
    H: tl.tensor,
    N: tl.tensor,
    M: tl.tensor,
    offset: tl.tensor,
    back: tl.tensor,
    T: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    TP: tl.constexpr,
    VS: tl.constexpr,
    PACKED: tl.constexpr,
    TURN: tl.constexpr,
    UP: tl.constexpr,
    PREC: tl.constexpr,
) -> None:
    """All gradients of one chunk in the form in chunks, without decay and normalizer.

    It reads q, k, v and the gradient once, v's channels slice by slice.
    """
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q += b * sqb + h * sqh
    k += b * skb + h * skh
    v += b * svb + h * svh
    grad += b * sgb + h * sgh
    layout += b * M * (T + 2)
    cos += b * scb
    sin += b * scb
    place, there, _, _, chunk = chunk_rows(tile, layout, M, N, T, TP, TP, PACKED)
    own = tl.load(weights + b * swb + h * swh + chunk * (M + 1))
    d, is_channel = channels(D, DP, TURN)
    wide = inside_of(there, is_channel, D, DP)
    raw = channel_rows(q, place, wide, sqn, d)
    queries = turned(phi_of(raw, wide, offset), q, place, wide, sqn, cos, sin, offset, d, D, TURN)
    queries = queries.to(raw.dtype)
    phi = phi_of(channel_rows(k, place, wide, skn, d), wide, offset)
    keys = turned(phi, k, place, wide, skn, cos, sin, offset, d, D, TURN).to(raw.dtype)
    t = tl.arange(0, TP)
    fade = tl.where(t[:, None] >= t[None, :], 1.0, 0.0)
    a = product(queries, tl.trans(keys), UP, PREC) * fade
    weighted = (a * own).to(raw.dtype)
    da = tl.zeros((TP, TP), tl.float32)
    d_queries = tl.zeros((TP, DP), tl.float32)
    d_keys = tl.zeros((TP, DP), tl.float32)
    row = (b * H + h) * M + chunk
    for v0 in range(0, DVP, VS):
        channel = v0 + tl.arange(0, VS)
        at = d[:, None] * DV + channel[None, :]
        inside = is_channel[:, None] & (channel < DV)[None, :]
        token = there[:, None] & (channel < DV)[None, :]
        g = tl.load(grad + place[:, None] * sgn + channel[None, :], mask=token, other=0.0)
        s = tl.load(mixed + row * D * DV + at, mask=inside, other=0.0)
        d_queries += product(g, tl.trans(s), UP, PREC)
        values = tl.load(v + place[:, None] * svn + channel[None, :], mask=token, other=0.0)
        da += product(g, tl.trans(values), UP, PREC)
        ds = tl.load(d_summary + row * D * DV + at, mask=inside, other=0.0)
        d_keys += product(values, tl.trans(ds), UP, PREC)
        d_values = product(keys, ds, UP, PREC) * back + product(tl.trans(weighted), g, UP, PREC)
        at = dv + (b * N * H + h) * DV + place[:, None] * (H * DV) + channel[None, :]
        tl.store(at, d_values.to(dv.dtype.element_ty), mask=token)
    da *= fade
    tl.store(d_weights + row, tl.sum(tl.sum(a * da, 1), 0))
    da = (da * own).to(raw.dtype)
    d_queries = d_queries * back + product(da, keys, UP, PREC)
    d_queries = turned_back(d_queries, place, there, cos, sin, TP, D, DP, TURN)
    keep_positive(dq + (b * N * H + h) * D, q, place, wide, sqn, H * D, d, d_queries)
    d_keys = d_keys * back + product(tl.trans(da), queries, UP, PREC)
    d_keys = turned_back(d_keys, place, there, cos, sin, TP, D, DP, TURN)
    keep_positive(dk + (b * N * H + h) * D, k, place, wide, skn, H * D, d, d_keys)
