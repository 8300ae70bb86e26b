"""The exact branch: softmax over sinks, window and slot holders, forward and backward, without repeated keys.

The rows of a program are the queries of a tile, those of several heads of a group under each other. All keys stand in
one store [B, Hk, X, D]: coordinate c at front + c, sinks at 0 … sinks − 1. Gradients of keys and values are added up
in float32: those of the holders with atomics, since a holder is read by many tiles; then one program each sums those of
the window, and adds them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fused_select import TILE, scaled_scores, scores_on, seen_by, unit_of
from .fused_triton import Launch, constexpr, jit, laid_out_as, power_of_two, precision, rows_first, tl
from .spec import KernelSpec

LAUNCH = {  # heads of up to 128 channels in 16 bits; warps for one head
    "exact": Launch(heads=4, chunk=32, warps=2, stages=1, registers=128, tile=32, near=64),
    "query_grad": Launch(heads=2, chunk=32, warps=2, stages=2, registers=168, tile=32),
    "window_grad": Launch(heads=1, chunk=64, warps=4, stages=1),
    "held_grad": Launch(heads=1, chunk=128, warps=8, stages=2),
    "sink_grad": Launch(heads=1, chunk=16, warps=4, stages=3),
}
SMALL = LAUNCH | {  # of up to 64
    "exact": Launch(heads=1, chunk=64, warps=4, stages=1, registers=128),
    "query_grad": Launch(heads=1, chunk=32, warps=4, stages=3, registers=168),
    "window_grad": Launch(heads=1, chunk=64, warps=4, stages=1),
    "held_grad": Launch(heads=1, chunk=64, warps=4, stages=2),
}
# all others; with eight warps exact_kernel reads beyond its shared memory (Triton 3.6, sm_90, compute-sanitizer)
WIDE = dict.fromkeys(LAUNCH, Launch(heads=1, chunk=64, warps=4, stages=1))
WIDE["sink_grad"] = WIDE["sink_grad"]._replace(chunk=16)
PROGRAMS = 264  # of the sinks' gradients: two a multiprocessor of the largest GPUs
CAST = 1 << 19  # rows that are taken back through a map from which on its matrices are first cast, by a launch more
WALKS = 64  # programs, and fewer than twice as many, for a row's holders: the longer it is, the longer these stay


@jit
def rows_of(tile, part, HP: constexpr, G: constexpr, TILE: constexpr, W):
    """(head in the group, coordinate, whether there is such a query) of a program's rows."""
    r = tl.arange(0, HP * TILE)
    head, at = part * HP + r // TILE, tile * TILE + r % TILE
    return head, at, (head < G) & (at < W)


@jit
def window_until(c, here, dies, tile, TILE: constexpr, BLOCK: constexpr, BACK: constexpr, REACH: constexpr,
                 SLOTS: constexpr):  # fmt: skip
    """Block from which a tile's queries do not see the keys at the coordinates c, which `here` are and die then."""
    # c may be negative. Who left before the tile stands in the table, if it holds a slot
    leaves = (c + REACH * TILE) // BLOCK - REACH * TILE // BLOCK + BACK + 1
    here = here & (leaves > tile * (TILE // BLOCK))
    if SLOTS:
        return tl.where(here, dies, 0)
    else:
        return tl.where(here, leaves, 0)


@jit
def chunk_at(first, key, value, lo, hi, front, skt, svt, d, D: constexpr, KEYS: constexpr):
    """(coordinates, whether there is such a token, keys, values) of what stands together in the store from `first`."""
    i, start = tl.arange(0, KEYS), (front + first).to(tl.int64)
    c = first + i
    here = (c >= lo) & (c < hi)
    k, v = near_rows(key + start * skt, i, here, skt, d, D), near_rows(value + start * svt, i, here, svt, d, D)
    return c, here, k, v


@jit
def earlier_chunk(
    first, key, value, tile, death, lo, hi, front, skt, svt, d,
    D: constexpr, SLOTS: constexpr, REACH: constexpr, KEYS: constexpr, TILE: constexpr, BLOCK: constexpr,
    BACK: constexpr,
):  # fmt: skip
    """(keys, values, coordinate from which they are not seen) of the window at `first`, before the tile."""
    c, here, k, v = chunk_at(first, key, value, lo, hi, front, skt, svt, d, D, KEYS)
    return k, v, near_until(c, here, tile, death, front, SLOTS, TILE, BLOCK, BACK, REACH)


@jit
def own_chunk(
    first, key, value, at, tile, death, lo, hi, front, skt, svt, d,
    D: constexpr, SLOTS: constexpr, REACH: constexpr, TILE: constexpr, BLOCK: constexpr, BACK: constexpr,
):  # fmt: skip
    """(keys, values, which rows see them) of the tile itself, which is at `first`."""
    c, here, k, v = chunk_at(first, key, value, lo, hi, front, skt, svt, d, D, TILE)
    if (BACK + 1) * BLOCK >= TILE:  # none leaves the window within the tile
        return k, v, at[:, None] >= tl.where(here, c, 1 << 30)[None, :]
    else:
        until = near_until(c, here, tile, death, front, SLOTS, TILE, BLOCK, BACK, REACH)
        return k, v, seen_by(at, c, until)


@jit
def near_until(c, here, tile, death, front, SLOTS: constexpr, TILE: constexpr, BLOCK: constexpr, BACK: constexpr,
               REACH: constexpr):  # fmt: skip
    """Coordinate from which keys at the coordinates c in a tile's reach are not seen; 0 for those of no place."""
    leaves = (c + REACH * TILE) // BLOCK - REACH * TILE // BLOCK + BACK + 1  # c may be negative
    if BACK % (TILE // BLOCK):  # else the reach ends where the first query's window does
        here = here & (leaves > tile * (TILE // BLOCK))  # who left before stands in the table, if it holds a slot
    if SLOTS:
        return tl.load(death + front + c, mask=here, other=0) * BLOCK
    else:
        return tl.where(here, leaves, 0) * BLOCK


@jit
def near_rows(pointer, i, here, stride, d, D: constexpr):
    """Rows [keys, D] that stand together, zero where there is none."""
    return tl.load(pointer + (i[:, None] * stride + d[None, :]), mask=here[:, None] & (d < D)[None, :], other=0.0)


@jit
def table_at(Table, tile, row, n, width, PARTS: constexpr):
    """The slots at the first block of a tile, PARTS of which share a place in each of as many tables."""
    of_part = (tile % PARTS * tl.num_programs(2) + row).to(tl.int64) * n
    return Table + (of_part + tile // PARTS) * width


@jit
def holders_at(step, table, width, CHUNK: constexpr):
    """Indices in the store of one chunk of the holders, −1 for no place."""
    i = step * CHUNK + tl.arange(0, CHUNK)
    return tl.load(table + i, mask=i < width, other=-1)


@jit
def held_until(index, death, BLOCK: constexpr):
    """Coordinate from which the holders are not seen; 0 for those of no place."""
    return tl.load(death + index, mask=index >= 0, other=0) * BLOCK


@jit
def sink_keys(b, at, Bounds, X, SINKS: constexpr, SP: constexpr):
    """The same of the sinks."""
    index = tl.arange(0, SP)
    index = tl.where((index < SINKS) & (index < X), index, -1)
    base = tl.load(Bounds + b * 4 + 3)
    return index, (index >= 0)[None, :] & (index[None, :] <= (base + at)[:, None])


@jit
def rows_at(pointer, index, stride, d, D: constexpr):
    """Rows of the store [keys, D] at the indices, zero where there is none."""
    at = pointer + index.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=(index >= 0)[:, None] & (d < D)[None, :], other=0.0)


@jit
def far_keys(KFar, Pos, row, X, index, at, base, limit, d, D: constexpr):
    """(keys turned to position 0, which rows see them from beyond the reach)."""
    there = tl.load(Pos + row.to(tl.int64) * X + index, mask=index >= 0, other=0)
    k = rows_at(KFar + row.to(tl.int64) * X * D, index, D, d, D)
    return k, (base + at)[:, None] - there[None, :] > limit


@jit
def absorb(s, v, visible, m, l, acc, scaling, SOFTCAP: constexpr, PRECISION: constexpr):
    """One step of an online softmax over `scores_on`; scaling > 0."""
    unit = unit_of(scaling, SOFTCAP)
    s = tl.where(visible, s, float("-inf"))
    new = tl.maximum(m, tl.max(s, 1) * unit)
    p = tl.exp2(s * unit - new[:, None])
    shrink = tl.exp2(m - new)
    acc = acc * shrink[:, None]
    return new, l * shrink + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)


@jit
def exact_kernel(
    Q, K, V, Table, Death, Bounds, QFar, KFar, Pos, Out, Lse,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
    scaling, softcap, W, X, front, n, kv_heads, width, limit, chunks,
    G: constexpr, HP: constexpr, D: constexpr, DP: constexpr, TILE: constexpr, CHUNK: constexpr, BLOCK: constexpr,
    BACK: constexpr, REACH: constexpr, PARTS: constexpr, NEAR: constexpr, TOGETHER: constexpr,
    SINKS: constexpr, SP: constexpr, SLOTS: constexpr, SOFTCAP: constexpr, FAR: constexpr, PRECISION: constexpr,
):  # fmt: skip
    EARLIER: constexpr = (REACH - 1) * TILE
    tile, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = row // kv_heads, row % kv_heads
    head, at, live = rows_of(tile, part, HP, G, TILE, W)
    d = tl.arange(0, DP)
    wide = (d < D)[None, :]
    where_q = b.to(tl.int64) * sqb + (h * G + head).to(tl.int64)[:, None] * sqh + at.to(tl.int64)[:, None] * sqt
    q = tl.load(Q + where_q + d[None, :], mask=live[:, None] & wide, other=0.0)
    base = tl.load(Bounds + b * 4 + 3)
    beyond = base + (tile + 1) * TILE > limit  # whether any query of the tile looks so far
    far_q = q
    if FAR:
        far = ((row * G + head).to(tl.int64) * W + at)[:, None] * D
        far_q = tl.load(QFar + far + d[None, :], mask=live[:, None] & wide, other=0.0)
    key = K + b.to(tl.int64) * skb + h.to(tl.int64) * skh
    value = V + b.to(tl.int64) * svb + h.to(tl.int64) * svh
    table, death = table_at(Table, tile, row, n, width, PARTS), Death + row.to(tl.int64) * X
    lo, hi = tl.load(Bounds + b * 4), tl.load(Bounds + b * 4 + 1)
    if SLOTS:
        held = holders_at(0, table, width, CHUNK)
        until = held_until(held, death, BLOCK)
    # own keys, sinks and, where they are one chunk, the window's earlier keys: asked for together, one softmax
    unit, first = unit_of(scaling, SOFTCAP), tile * TILE
    own_k, own_v, own = own_chunk(first, key, value, at, tile, death, lo, hi, front, skt, svt, d, D, SLOTS, REACH, TILE,
                                  BLOCK, BACK)  # fmt: skip
    if SINKS:
        index, visible = sink_keys(b, at, Bounds, X, SINKS, SP)
        sink_k, sink_v = rows_at(key, index, skt, d, D), rows_at(value, index, svt, d, D)
    if TOGETHER:
        k, near_v, past = earlier_chunk(first - NEAR, key, value, tile, death, lo, hi, front, skt, svt, d, D, SLOTS,
                                        REACH, NEAR, TILE, BLOCK, BACK)  # fmt: skip
        near_s = scores_on(q, k, scaling, softcap, SOFTCAP, PRECISION)
        near_s = tl.where(at[:, None] < past[None, :], near_s, float("-inf"))
    own_s = tl.where(own, scores_on(q, own_k, scaling, softcap, SOFTCAP, PRECISION), float("-inf"))
    m = tl.maximum(tl.max(own_s, 1) * unit, -1e30)
    if SINKS:
        s = scores_on(q, sink_k, scaling, softcap, SOFTCAP, PRECISION)
        if FAR:  # noqa: SIM102  this is known when the kernel is compiled, the next when it runs
            if beyond:
                far_k, away = far_keys(KFar, Pos, row, X, index, at, base, limit, d, D)
                s = tl.where(away, scores_on(far_q, far_k, scaling, softcap, SOFTCAP, PRECISION), s)
        sink_s = tl.where(visible, s, float("-inf"))
        m = tl.maximum(m, tl.max(sink_s, 1) * unit)
    if TOGETHER:
        m = tl.maximum(m, tl.max(near_s, 1) * unit)
    p = tl.exp2(own_s * unit - m[:, None])
    l = tl.sum(p, 1)
    acc = tl.dot(p.to(own_v.dtype), own_v, input_precision=PRECISION)
    if SINKS:
        p = tl.exp2(sink_s * unit - m[:, None])
        l += tl.sum(p, 1)
        acc = tl.dot(p.to(sink_v.dtype), sink_v, acc, input_precision=PRECISION)
    if TOGETHER:
        p = tl.exp2(near_s * unit - m[:, None])
        l += tl.sum(p, 1)
        acc = tl.dot(p.to(near_v.dtype), near_v, acc, input_precision=PRECISION)
    else:
        for step in tl.range(EARLIER // NEAR):
            near_k, near_v, past = earlier_chunk(first - EARLIER + step * NEAR, key, value, tile, death, lo, hi, front,
                                                  skt, svt, d, D, SLOTS, REACH, NEAR, TILE, BLOCK, BACK)  # fmt: skip
            near_s, near = scores_on(q, near_k, scaling, softcap, SOFTCAP, PRECISION), at[:, None] < past[None, :]
            m, l, acc = absorb(near_s, near_v, near, m, l, acc, scaling, SOFTCAP, PRECISION)
    if SLOTS:
        for step in tl.range(chunks):
            following = holders_at(step + 1, table, width, CHUNK)  # asked for now, it is there when the rows are to be
            held_k, held_v = rows_at(key, held, skt, d, D), rows_at(value, held, svt, d, D)
            holds = at[:, None] < until[None, :]
            held_s = scores_on(q, held_k, scaling, softcap, SOFTCAP, PRECISION)
            if FAR:  # noqa: SIM102
                if beyond:
                    turned, farther = far_keys(KFar, Pos, row, X, held, at, base, limit, d, D)
                    held_s = tl.where(farther, scores_on(far_q, turned, scaling, softcap, SOFTCAP, PRECISION), held_s)
            m, l, acc = absorb(held_s, held_v, holds, m, l, acc, scaling, SOFTCAP, PRECISION)
            held, until = following, held_until(following, death, BLOCK)
    seen = l > 0  # rows of padding see nothing
    acc = acc * tl.where(seen, 1.0 / tl.where(seen, l, 1.0), 0.0)[:, None]
    lse = tl.where(seen, (m + tl.log2(tl.where(seen, l, 1.0))) * 0.6931471805599453, 0.0)
    out = (row * G + head).to(tl.int64) * W + at
    tl.store(Out + out[:, None] * D + d[None, :], acc.to(Out.dtype.element_ty), mask=live[:, None] & wide)
    tl.store(Lse + out, lse, mask=live)


# --- backward -----------------------------------------------------------------------------------------------


@jit
def grad_scores(s, p, dp, delta, softcap, SOFTCAP: constexpr):
    """Gradients of q·k in units of scaling, as [rows, keys] or [keys, rows], from scores, probabilities and the
    gradients of these; Δ as in `Asked`."""
    ds = p * (dp - delta)
    if SOFTCAP:
        t = s * 0.6931471805599453 / softcap
        ds = ds * (1 - t * t)
    return ds


@jit
def grad_rows(s, v, g, lse, delta, visible, softcap, SOFTCAP: constexpr, PRECISION: constexpr):
    """(probabilities, gradients of q·k in units of scaling) [rows, keys]."""
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    p = tl.where(visible, tl.exp2(s - lse[:, None]), 0.0)
    return p, grad_scores(s, p, dp, delta[:, None], softcap, SOFTCAP)


@jit
def keys_seen(at, low, until):
    """[keys, rows]: `seen_by` the other way round."""
    size = tl.maximum(until - low, 0)
    return (at[None, :] - low[:, None]).to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)[:, None]


@jit
def query_grad_kernel(
    Q, K, V, Table, Death, Bounds, QFar, KFar, Pos, Out, GradLse, More, GradLogits, Matrices, GradQ, GradQFar,
    Lse, Grad, Delta, smb, smh, smt, gqb, gqh, gqt, sgb, sgh, sgt, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
    scaling, softcap, W, X, front, n, kv_heads, width, limit, chunks,
    G: constexpr, HP: constexpr, D: constexpr, DP: constexpr, TILE: constexpr, CHUNK: constexpr, BLOCK: constexpr,
    BACK: constexpr, REACH: constexpr, PARTS: constexpr, NEAR: constexpr, SINKS: constexpr, SP: constexpr,
    SLOTS: constexpr, SOFTCAP: constexpr, FAR: constexpr, MORE: constexpr, KNOWN: constexpr, C: constexpr,
    CP: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, and Δ where it is not KNOWN; C: columns of the map's logits, whose gradients are
    added.

    The loops come first: what a product before them reads would hold shared memory beside their chunks, and there
    would be no room for as many programs a multiprocessor.
    """
    EARLIER: constexpr = (REACH - 1) * TILE
    tile, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = row // kv_heads, row % kv_heads
    head, at, live = rows_of(tile, part, HP, G, TILE, W)
    d = tl.arange(0, DP)
    wide = (d < D)[None, :]
    where_q = b.to(tl.int64) * sqb + (h * G + head).to(tl.int64) * sqh + at.to(tl.int64) * sqt
    q = tl.load(Q + where_q[:, None] + d[None, :], mask=live[:, None] & wide, other=0.0)
    out = (row * G + head).to(tl.int64) * W + at
    where_g = b.to(tl.int64) * sgb + (h * G + head).to(tl.int64) * sgh + at.to(tl.int64) * sgt
    g = tl.load(Grad + where_g[:, None] + d[None, :], mask=live[:, None] & wide, other=0.0)
    if KNOWN:
        delta = tl.load(Delta + out, mask=live, other=0.0)
    else:
        y = tl.load(Out + out[:, None] * D + d[None, :], mask=live[:, None] & wide, other=0.0)
        delta = tl.sum(g.to(tl.float32) * y.to(tl.float32), 1) - tl.load(GradLse + out, mask=live, other=0.0)
        tl.store(Delta + out, delta, mask=live)
    lse = tl.load(Lse + out, mask=live, other=0.0) * 1.4426950408889634
    base = tl.load(Bounds + b * 4 + 3)
    far_q, far_acc = q, tl.zeros([HP * TILE, DP], tl.float32)
    if FAR:
        far_q = tl.load(QFar + out[:, None] * D + d[None, :], mask=live[:, None] & wide, other=0.0)
    key = K + b.to(tl.int64) * skb + h.to(tl.int64) * skh
    value = V + b.to(tl.int64) * svb + h.to(tl.int64) * svh
    table, death = table_at(Table, tile, row, n, width, PARTS), Death + row.to(tl.int64) * X
    lo, hi = tl.load(Bounds + b * 4), tl.load(Bounds + b * 4 + 1)
    if SLOTS:
        held = holders_at(0, table, width, CHUNK)
        until = held_until(held, death, BLOCK)
    first, acc = tile * TILE, tl.zeros([HP * TILE, DP], tl.float32)
    for step in tl.range(EARLIER // NEAR):
        near_k, near_v, past = earlier_chunk(first - EARLIER + step * NEAR, key, value, tile, death, lo, hi, front,
                                             skt, svt, d, D, SLOTS, REACH, NEAR, TILE, BLOCK, BACK)  # fmt: skip
        near_s, near = scaled_scores(q, near_k, scaling, softcap, SOFTCAP, PRECISION), at[:, None] < past[None, :]
        _near_p, near_ds = grad_rows(near_s, near_v, g, lse, delta, near, softcap, SOFTCAP, PRECISION)
        acc = tl.dot(near_ds.to(near_k.dtype), near_k, acc, input_precision=PRECISION)
    if SLOTS:
        for step in tl.range(chunks):
            following = holders_at(step + 1, table, width, CHUNK)  # asked for now, it is there when the rows are to be
            held_k, held_v = rows_at(key, held, skt, d, D), rows_at(value, held, svt, d, D)
            holds = at[:, None] < until[None, :]
            held_s = scaled_scores(q, held_k, scaling, softcap, SOFTCAP, PRECISION)
            if FAR:
                turned, farther = far_keys(KFar, Pos, row, X, held, at, base, limit, d, D)
                held_s = tl.where(farther, scaled_scores(far_q, turned, scaling, softcap, SOFTCAP, PRECISION), held_s)
            _held_p, held_ds = grad_rows(held_s, held_v, g, lse, delta, holds, softcap, SOFTCAP, PRECISION)
            if FAR:
                far_ds = tl.where(farther, held_ds, 0.0).to(held_k.dtype)
                far_acc = tl.dot(far_ds, turned, far_acc, input_precision=PRECISION)
                held_ds = tl.where(farther, 0.0, held_ds)
            acc = tl.dot(held_ds.to(held_k.dtype), held_k, acc, input_precision=PRECISION)
            held, until = following, held_until(following, death, BLOCK)
    own_k, own_v, mine = own_chunk(first, key, value, at, tile, death, lo, hi, front, skt, svt, d, D, SLOTS, REACH,
                                   TILE, BLOCK, BACK)  # fmt: skip
    if SINKS:
        index, visible = sink_keys(b, at, Bounds, X, SINKS, SP)
        k, v = rows_at(key, index, skt, d, D), rows_at(value, index, svt, d, D)
    own_s = scaled_scores(q, own_k, scaling, softcap, SOFTCAP, PRECISION)
    _own_p, own_ds = grad_rows(own_s, own_v, g, lse, delta, mine, softcap, SOFTCAP, PRECISION)
    acc = tl.dot(own_ds.to(own_k.dtype), own_k, acc, input_precision=PRECISION)
    if SINKS:
        s = scaled_scores(q, k, scaling, softcap, SOFTCAP, PRECISION)
        if FAR:
            far_k, away = far_keys(KFar, Pos, row, X, index, at, base, limit, d, D)
            s = tl.where(away, scaled_scores(far_q, far_k, scaling, softcap, SOFTCAP, PRECISION), s)
        _p, ds = grad_rows(s, v, g, lse, delta, visible, softcap, SOFTCAP, PRECISION)
        if FAR:
            far_ds = tl.where(away, ds, 0.0).to(k.dtype)
            far_acc = tl.dot(far_ds, far_k, far_acc, input_precision=PRECISION)
            ds = tl.where(away, 0.0, ds)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    keep, acc = live[:, None] & wide, acc * scaling
    if C:
        z = tl.arange(0, HP * CP)
        c, of = z % CP, part * HP + z // CP  # columns of the map, head by head
        there = (c < C) & (of < G)
        own = (live[:, None] & there[None, :]) & (head[:, None] == of[None, :])
        g_z = tl.load(GradLogits + (out * C)[:, None] + c[None, :], mask=own, other=0.0)
        acc = add_through(acc, g_z, Matrices, (h * G + of) * D * C + c, C, there, d, D, PRECISION)
    b, head, at = b.to(tl.int64), h * G + head, at.to(tl.int64)
    if MORE:  # what q's other readers say
        more = (b * smb + head * smh + at * smt)[:, None] + d[None, :]
        acc += tl.load(More + more, mask=keep, other=0.0).to(tl.float32)
    to = (b * gqb + head * gqh + at * gqt)[:, None] + d[None, :]
    tl.store(GradQ + to, acc.to(GradQ.dtype.element_ty), mask=keep)
    if FAR:
        tl.store(GradQFar + out[:, None] * D + d[None, :], (far_acc * scaling).to(GradQ.dtype.element_ty), mask=keep)


@jit
def add_through(acc, grad_z, Matrices, column, stride, there, d, D: constexpr, PRECISION: constexpr):
    """Adds the gradient of a map's logits [rows, columns] times its columns, which begin at `column`."""
    at, mine = column[:, None] + d[None, :] * stride, there[:, None] & (d < D)[None, :]
    matrix = tl.load(Matrices + at, mask=mine, other=0.0).to(grad_z.dtype)
    return tl.dot(grad_z, matrix, acc, input_precision=PRECISION)


@jit
def add_key_grads(
    grad_k, grad_v, grad_far, k, v, far_k, there, visible, Q, QFar, Lse, Grad, Delta, head, tile, row, b, h,
    sgb, sgh, sgt, sqb, sqh, sqt, scaling, softcap, W, base, limit, d,
    G: constexpr, D: constexpr, TILE: constexpr, SOFTCAP: constexpr, FAR: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Adds what one head's queries of one tile say about the keys k [keys, D] that they see, in units of scaling.

    Scores stand as [keys, rows], so that they are an operand of the next product as they come out of the first.
    FAR: far_k are the keys as they are seen from beyond the reach, `there` where they really stand.
    """
    at = tile * TILE + tl.arange(0, TILE)
    live = (at < W) & (tile >= 0)
    wide = live[:, None] & (d < D)[None, :]
    where_q = b.to(tl.int64) * sqb + (h * G + head).to(tl.int64) * sqh + at.to(tl.int64)[:, None] * sqt
    q = tl.load(Q + where_q + d[None, :], mask=wide, other=0.0)
    out = (row * G + head).to(tl.int64) * W + at
    where_g = b.to(tl.int64) * sgb + (h * G + head).to(tl.int64) * sgh + at.to(tl.int64)[:, None] * sgt
    g = tl.load(Grad + where_g + d[None, :], mask=wide, other=0.0)
    delta = tl.load(Delta + out, mask=live, other=0.0)
    lse = tl.load(Lse + out, mask=live, other=0.0) * 1.4426950408889634
    s = scaled_scores(k, q, scaling, softcap, SOFTCAP, PRECISION)
    if FAR:
        far_q = tl.load(QFar + out[:, None] * D + d[None, :], mask=wide, other=0.0)
        away = (base + at)[None, :] - there[:, None] > limit
        s = tl.where(away, scaled_scores(far_k, far_q, scaling, softcap, SOFTCAP, PRECISION), s)
    if D <= 64:  # more channels have no registers for it so early
        dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    p = tl.where(visible & live[None, :], tl.exp2(s - lse[None, :]), 0.0)
    grad_v = tl.dot(p.to(g.dtype), g, grad_v, input_precision=PRECISION)
    if D > 64:
        dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    ds = grad_scores(s, p, dp, delta[None, :], softcap, SOFTCAP)
    if FAR:
        far_ds = tl.where(away, ds, 0.0).to(q.dtype)
        grad_far = tl.dot(far_ds, far_q, grad_far, input_precision=PRECISION)
        ds = tl.where(away, 0.0, ds)
    grad_k = tl.dot(ds.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v, grad_far


@jit
def ever_held(index, death, X, front, BLOCK: constexpr, BACK: constexpr, SINKS: constexpr, SLOTS: constexpr):
    """Whether the indices of the store are those of sinks, of what came with a state, or of who ever held a slot."""
    held = (index >= 0) & (index < tl.minimum(tl.maximum(front, SINKS), X))
    if SLOTS:
        here = (index >= front) & (index < X)
        leaves = (index - front) // BLOCK + BACK + 1
        held = held | (tl.load(death + index, mask=here, other=-1) > tl.where(here, leaves, 0))
    return held


@jit
def clear_kernel(
    Death, GradK, GradV, X, front,
    D: constexpr, DP: constexpr, SIZE: constexpr, BLOCK: constexpr, BACK: constexpr, SINKS: constexpr, SLOTS: constexpr,
):  # fmt: skip
    """Zeros where gradients are added to, which are few tokens; nobody looks at the others."""
    index, row, d = tl.program_id(0) * SIZE + tl.arange(0, SIZE), tl.program_id(1).to(tl.int64), tl.arange(0, DP)
    held = ever_held(index, Death + row * X, X, front, BLOCK, BACK, SINKS, SLOTS)[:, None] & (d < D)[None, :]
    to, nothing = (row * X + index)[:, None] * D + d[None, :], tl.zeros([SIZE, DP], tl.float32)
    tl.store(GradK + to, nothing, mask=held)
    tl.store(GradV + to, nothing, mask=held)


@jit
def window_grad_kernel(
    Q, K, V, Table, Death, Bounds, QFar, KFar, Pos, HeldK, HeldV, More, GradLogits, Matrices, GradK, GradV,
    Lse, Grad, Delta, gkb, gkh, gkt, gvb, gvh, gvt, sgb, sgh, sgt, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
    scaling, softcap, W, X, front, n, kv_heads, width, limit, chunks,
    G: constexpr, HP: constexpr, D: constexpr, DP: constexpr, TILE: constexpr, CHUNK: constexpr, BLOCK: constexpr,
    BACK: constexpr, REACH: constexpr, SINKS: constexpr, SP: constexpr, SLOTS: constexpr, SOFTCAP: constexpr,
    FAR: constexpr, HELD: constexpr, MORE: constexpr, C: constexpr, CP: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values: from all queries that reach them through the window, with those that they
    have as holders (HELD), of the values with what their other readers say (MORE), and of the keys by the logits of
    their map, which has C columns."""
    first, row = tl.program_id(0) - tl.cdiv(front, TILE), tl.program_id(1)  # the tile of keys
    b, h = row // kv_heads, row % kv_heads
    d = tl.arange(0, DP)
    key = K + b.to(tl.int64) * skb + h.to(tl.int64) * skh
    value = V + b.to(tl.int64) * svb + h.to(tl.int64) * svh
    death = Death + row.to(tl.int64) * X
    lo, hi = tl.load(Bounds + b * 4), tl.load(Bounds + b * 4 + 1)
    c = first * TILE + tl.arange(0, TILE)
    here = (c >= lo) & (c < hi)
    index, dies = tl.where(here, front + c, -1), c
    if SLOTS:
        dies = tl.load(death + index, mask=here, other=0)
    k, v = rows_at(key, index, skt, d, D), rows_at(value, index, svt, d, D)
    grad_k, grad_v = tl.zeros([TILE, DP], tl.float32), tl.zeros([TILE, DP], tl.float32)
    at = (front + c).to(tl.int64)[:, None]
    to, mine = (row.to(tl.int64) * X + at) * D + d[None, :], (at >= 0) & (at < X) & (d < D)[None, :]
    if HELD:
        held = ever_held(front + c, death, X, front, BLOCK, BACK, SINKS, SLOTS)[:, None] & (d < D)[None, :]
        grad_k += tl.load(HeldK + to, mask=held, other=0.0)
        grad_v += tl.load(HeldV + to, mask=held, other=0.0)
    if MORE:
        grad_v += tl.load(More + to, mask=mine, other=0.0).to(tl.float32)
    for step in tl.range(REACH * G):
        tile = first + step // G
        until = window_until(c, here, dies, tile, TILE, BLOCK, BACK, REACH, SLOTS)
        visible = keys_seen(tile * TILE + tl.arange(0, TILE), c, until * BLOCK)
        grad_k, grad_v, _ = add_key_grads(
            grad_k, grad_v, 0, k, v, k, c, visible, Q, QFar, Lse, Grad, Delta, step % G, tile, row, b, h,
            sgb, sgh, sgt, sqb, sqh, sqt, scaling, softcap, W, 0, limit, d, G, D, TILE, SOFTCAP, False, PRECISION,
        )  # fmt: skip
    grad_k = grad_k * scaling
    if C:
        x = tl.arange(0, CP)
        of_map = GradLogits + (row.to(tl.int64) * X + at) * C + x[None, :]
        g_z = tl.load(of_map, mask=(at >= 0) & (at < X) & (x < C)[None, :], other=0.0)
        grad_k = add_through(grad_k, g_z, Matrices, h * D * C + x, C, x < C, d, D, PRECISION)
    to_k = GradK + b.to(tl.int64) * gkb + h.to(tl.int64) * gkh + at * gkt + d[None, :]
    to_v = GradV + b.to(tl.int64) * gvb + h.to(tl.int64) * gvh + at * gvt + d[None, :]
    tl.store(to_k, grad_k.to(GradK.dtype.element_ty), mask=mine)
    tl.store(to_v, grad_v.to(GradV.dtype.element_ty), mask=mine)


@jit
def held_grad_kernel(
    Q, K, V, Table, Death, Bounds, QFar, KFar, Pos, GradK, GradV, GradKFar, Lse, Grad, Delta, sgb, sgh, sgt,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
    scaling, softcap, W, X, front, n, kv_heads, width, limit, tiles, chunks,
    G: constexpr, HP: constexpr, D: constexpr, DP: constexpr, TILE: constexpr, CHUNK: constexpr, BLOCK: constexpr,
    BACK: constexpr, REACH: constexpr, SINKS: constexpr, SP: constexpr, SLOTS: constexpr,
    SOFTCAP: constexpr, FAR: constexpr, WALKS: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Adds what the queries of some tiles (of one, unless it WALKS) say about a chunk of their holders.

    Most hold the same place in the next tile: only the gradients of those that do not are added to the store then.
    Not with FAR, whose gradients leave no registers for it.
    """
    part, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = row // kv_heads, row % kv_heads
    d = tl.arange(0, DP)
    key = K + b.to(tl.int64) * skb + h.to(tl.int64) * skh
    value = V + b.to(tl.int64) * svb + h.to(tl.int64) * svh
    base = tl.load(Bounds + b * 4 + 3)
    grad_k, grad_v = tl.zeros([CHUNK, DP], tl.float32), tl.zeros([CHUNK, DP], tl.float32)
    grad_far, index = 0, tl.full([CHUNK], -1, tl.int32)
    if FAR:
        grad_far = tl.zeros([CHUNK, DP], tl.float32)
    for step in tl.range(tl.minimum(tiles, n - part * tiles) if WALKS else 1):
        tile, before = part * tiles + step, index
        index = holders_at(chunk, Table + (row.to(tl.int64) * n + tile) * width, width, CHUNK)
        until = held_until(index, Death + row.to(tl.int64) * X, BLOCK)
        k, v = rows_at(key, index, skt, d, D), rows_at(value, index, svt, d, D)
        if WALKS:
            left = tl.where(index == before, -1, before)
            if tl.max(left, 0) >= 0:
                add_to_held(GradK, GradV, GradKFar, grad_k, grad_v, grad_far, left, row, X, d, D, False)
                stays = tl.where(left >= 0, 0.0, 1.0)[:, None]
                grad_k, grad_v = grad_k * stays, grad_v * stays
        far_k, there = k, index
        if FAR:
            far_k = rows_at(KFar + row.to(tl.int64) * X * D, index, D, d, D)
            there = tl.load(Pos + row.to(tl.int64) * X + index, mask=index >= 0, other=0)
        visible = (tile * TILE + tl.arange(0, TILE))[None, :] < until[:, None]
        for head in tl.range(G):
            grad_k, grad_v, grad_far = add_key_grads(
                grad_k, grad_v, grad_far, k, v, far_k, there, visible, Q, QFar, Lse, Grad, Delta, head, tile, row, b, h,
                sgb, sgh, sgt, sqb, sqh, sqt, scaling, softcap, W, base, limit, d, G, D, TILE, SOFTCAP, FAR, PRECISION,
            )  # fmt: skip
    add_to_held(GradK, GradV, GradKFar, grad_k, grad_v, grad_far, index, row, X, d, D, FAR)


@jit
def add_to_held(GradK, GradV, GradKFar, grad_k, grad_v, grad_far, index, row, X, d, D: constexpr, FAR: constexpr):
    """Adds gradients [keys, D] to those of the store at the indices."""
    to = (row.to(tl.int64) * X + index.to(tl.int64))[:, None] * D + d[None, :]
    mine = (index >= 0)[:, None] & (d < D)[None, :]
    tl.atomic_add(GradK + to, grad_k, mask=mine, sem="relaxed")
    tl.atomic_add(GradV + to, grad_v, mask=mine, sem="relaxed")
    if FAR:
        tl.atomic_add(GradKFar + to, grad_far, mask=mine, sem="relaxed")


@jit
def sink_grad_kernel(
    Q, K, V, Table, Death, Bounds, QFar, KFar, Pos, GradK, GradV, GradKFar, Lse, Grad, Delta, sgb, sgh, sgt,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
    scaling, softcap, W, X, front, n, kv_heads, width, limit, tiles, chunks,
    G: constexpr, HP: constexpr, D: constexpr, DP: constexpr, TILE: constexpr, CHUNK: constexpr, BLOCK: constexpr,
    BACK: constexpr, REACH: constexpr, SINKS: constexpr, SP: constexpr, SLOTS: constexpr,
    SOFTCAP: constexpr, FAR: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Adds what the queries of some tiles say about a chunk of the sinks, which all queries read.

    A kernel of its own: where the queries' gradients are, it takes registers that are missing there, and its products
    as xᵀp are wrong on Hopper (Triton 3.6).
    """
    part, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = row // kv_heads, row % kv_heads
    d, i = tl.arange(0, DP), chunk * CHUNK + tl.arange(0, CHUNK)
    index = tl.where((i < SINKS) & (i < X), i, -1)
    k = rows_at(K + b.to(tl.int64) * skb + h.to(tl.int64) * skh, index, skt, d, D)
    v = rows_at(V + b.to(tl.int64) * svb + h.to(tl.int64) * svh, index, svt, d, D)
    grad_k, grad_v = tl.zeros([CHUNK, DP], tl.float32), tl.zeros([CHUNK, DP], tl.float32)
    base, far_k, there, grad_far = tl.load(Bounds + b * 4 + 3), k, index, grad_k
    if FAR:
        far_k = rows_at(KFar + row.to(tl.int64) * X * D, index, D, d, D)
        there = tl.load(Pos + row.to(tl.int64) * X + index, mask=index >= 0, other=0)
        grad_far = tl.zeros([CHUNK, DP], tl.float32)
    for step in tl.range(tiles * G):
        tile = part * tiles + step // G
        at = base + tile * TILE + tl.arange(0, TILE)
        visible = (index >= 0)[:, None] & (index[:, None] <= at[None, :])
        grad_k, grad_v, grad_far = add_key_grads(
            grad_k, grad_v, grad_far, k, v, far_k, there, visible, Q, QFar, Lse, Grad, Delta, step % G, tile, row, b, h,
            sgb, sgh, sgt, sqb, sqh, sqt, scaling, softcap, W, base, limit, d, G, D, TILE, SOFTCAP, FAR, PRECISION,
        )  # fmt: skip
    add_to_held(GradK, GradV, GradKFar, grad_k, grad_v, grad_far, index, row, X, d, D, FAR)


class Exact(NamedTuple):
    """What the exact branch needs beside q, k and v; no gradients."""

    spec: KernelSpec
    table: Tensor  # [parts, R, n, slots] int32; those of whole tiles are the first
    death: Tensor  # [R, X] int32
    bounds: Tensor  # [B, 4] int32
    front: int
    scaling: float
    softcap: float | None
    pos: Tensor | None  # [R, X] int32, of the keys; None: no key is further back than the spec's reach
    matrices: tuple[Tensor, Tensor] | None  # [H, D, C] and [Hk, D, C] float32 of the maps; None: nobody asks


def arguments(q: Tensor, k: Tensor, v: Tensor, given: Exact, launch: Launch) -> tuple[list, dict]:
    """The kernels' common arguments: strides and scalars, and their compile-time constants."""
    spec, (_, H, W, D), (_, Hk, X, _) = given.spec, q.shape, k.shape
    scalars = [given.scaling, given.softcap or 0.0, W, X, given.front, -(-W // TILE), Hk, max(spec.slots, 1)]
    scalars.append(spec.reach)
    sizes = {
        "G": H // Hk, "HP": launch.heads, "D": D, "DP": power_of_two(D), "TILE": launch.tile, "CHUNK": launch.chunk,
        "BLOCK": spec.block, "BACK": spec.back, "REACH": launch.reach(spec.back * spec.block),
        "SINKS": spec.sinks, "SP": power_of_two(spec.sinks), "SLOTS": spec.slots > 0,
        "chunks": -(-spec.slots // launch.chunk), "SOFTCAP": given.softcap is not None, "FAR": given.pos is not None,
        "PRECISION": precision(q.dtype), **launch.options,
    }  # fmt: skip
    return [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *scalars], sizes


def launch_of(name: str, q: Tensor, group: int, given: Exact) -> Launch:
    """How the kernel is launched for such queries and `group` heads a key head."""
    return launch_for(name, q, group, given.spec, given.pos is not None)


def launch_for(name: str, q: Tensor, group: int, spec: KernelSpec, far: bool) -> Launch:
    """The same before there is more than a spec; `far`: whether keys may be further back than its reach."""
    wide = q.shape[-1] > 128 or q.dtype == torch.float32
    table = WIDE if wide else SMALL if q.shape[-1] <= 64 else LAUNCH
    launch = table[name].of_group(group, spec.block, spec.back * spec.block)
    return launch._replace(stages=1, registers=None, near=0) if far else launch


def near_sizes(spec: KernelSpec, launch: Launch) -> dict[str, Any]:
    """How the window before a tile is read: by so many keys, a power of two that divides them, or at once."""
    earlier = (launch.reach(spec.back * spec.block) - 1) * launch.tile
    most = earlier & -earlier
    together = 0 < earlier == most <= launch.near
    return {"NEAR": most if together else min(most, launch.chunk) or launch.chunk, "TOGETHER": together}


def parts_of_tile(q: Tensor, k: Tensor, spec: KernelSpec, far: bool) -> int:
    """Slot tables a tile: as many as the kernel with the shortest tiles reads; one with whole tiles reads the first."""
    group = q.shape[1] // k.shape[1]
    return TILE // min(launch_for(name, q, group, spec, far).tile for name in ("exact", "query_grad"))


class Asked(NamedTuple):
    """What a call's readers want of it: with p = exp(score − lse), values get p·grad, scores p·(grad·v − delta).

    That holds for the exact branch alone, where delta = grad·out − gradient of lse. It holds as well for its part in a
    merged output y, with lse the normaliser of both branches and delta = grad·y: the share of the branch need not be
    known, nor its own output.
    """

    lse: Tensor  # [B, H, W] float32
    grad: Tensor  # [B, H, W, D], rows contiguous
    delta: Tensor  # [B, H, W] float32


class ExactFunction(torch.autograd.Function):
    """q [B, H, W, D], k and v [B, Hk, X, D] -> (exact [B, H, W, D] of q's dtype, lse [B, H, W] float32, q, v,
    two logits, three more).

    Who reads the q and v that come back has its gradient added inside the backward's kernels, not by another pass. So
    has who reads q @ matrix or k @ matrix, with `given.matrices`: the logits [B, H, W, C] and
    [B, Hk, X, C], which hold nothing, take its gradient. Who merges the branch gives as gradients of the three more,
    which hold nothing either, an `Asked`.
    `far_q` and `far_k` are q and k turned to where they are seen from beyond reach, contiguous; without `given.pos`
    they are not looked at.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, far_q: Tensor, far_k: Tensor, given: Exact
    ) -> tuple[Tensor, ...]:
        (B, H, W, D), Hk = q.shape, k.shape[1]
        out = torch.empty(B, H, W, D, device=q.device, dtype=q.dtype)
        lse = torch.empty(B, H, W, device=q.device, dtype=torch.float32)
        launch = launch_of("exact", q, H // Hk, given)
        scalars, sizes = arguments(q, k, v, given, launch)
        exact_kernel[(-(-W // launch.tile), -(-(H // Hk) // launch.heads), B * Hk)](
            *inputs(q, k, v, far_q, far_k, given), out, lse, *scalars,
            PARTS=TILE // launch.tile, **near_sizes(given.spec, launch), **sizes,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, far_q, far_k, out, lse)
        ctx.given = given
        ctx.set_materialize_grads(False)  # of what nobody looks at
        merges = (x.new_empty(()).expand(x.shape) for x in (lse, out, lse))
        C, nothing = 0 if given.matrices is None else given.matrices[0].shape[2], out.new_empty(())
        logits = (nothing.expand(*x.shape[:3], C) for x in (q, k))
        return out, lse, q.view_as(q), v.view_as(v), *logits, *merges

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, more_q: Tensor | None, more_v: Tensor | None,
        grad_z: Tensor | None, grad_z_k: Tensor | None, *merged: Any,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        q, k, v, far_q, far_k, out, lse = ctx.saved_tensors
        given: Exact = ctx.given
        (B, H, W, _), Hk = q.shape, k.shape[1]
        tensors = inputs(q, k, v, far_q, far_k, given)
        known = grad is None and grad_lse is None and merged[0] is not None
        asked, grad_lse = (Asked(*merged), lse) if known else asked_alone(out, lse, grad, grad_lse, *merged)
        added = asked.grad if more_q is None else rows_first(more_q)  # what is missing is not read
        (C, *of_q), of_k = of_map(q, grad_z, given, 0), of_map(k, grad_z_k, given, 1)
        grad_q, grad_far_q, held = laid_out_as(q), torch.empty_like(far_q), room_for_held(k, given)
        launch = launch_of("query_grad", q, H // Hk, given)
        scalars, sizes = arguments(q, k, v, given, launch)
        query_grad_kernel[(-(-W // launch.tile), -(-(H // Hk) // launch.heads), B * Hk)](
            *tensors, out, grad_lse, added, *of_q, grad_q, grad_far_q, *asked, *added.stride()[:3],
            *grad_q.stride()[:3], *asked.grad.stride()[:3], *scalars, MORE=more_q is not None, KNOWN=known,
            C=C, CP=power_of_two(C), PARTS=TILE // launch.tile, NEAR=near_sizes(given.spec, launch)["NEAR"], **sizes,
        )  # fmt: skip
        grad_k, grad_v = key_grads(q, k, v, given, tensors, asked, held, more_v, of_k)
        far = (None, None) if given.pos is None else (grad_far_q, (held[2] * given.scaling).to(k.dtype))
        return grad_q, grad_k, grad_v, *far, None


def of_map(x: Tensor, grad_z: Tensor | None, given: Exact, which: int) -> tuple[int, Tensor, Tensor]:
    """(how many columns the map of x has, the gradient of its logits, its matrices); 0 where there is no such gradient,
    and nothing is read."""
    if grad_z is None or given.matrices is None:
        return 0, x, x
    matrices = given.matrices[which]
    if x.shape[:-1].numel() >= CAST:
        matrices = matrices.to(x.dtype)
    return grad_z.shape[-1], grad_z.contiguous(), matrices


def asked_alone(
    out: Tensor, lse: Tensor, grad: Tensor | None, grad_lse: Tensor | None, total: Any, grad_y: Any, delta: Any,
) -> tuple[Asked, Tensor]:  # fmt: skip
    """(what is asked of the branch alone, with room for its delta; the gradient of its lse), from gradients of out and
    lse and, where somebody merges it as well, from what that asks."""
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.contiguous()
    grad = torch.zeros_like(out) if grad is None else rows_first(grad)
    if grad_y is not None:
        share = (lse - total).exp()
        grad_lse = grad_lse + share * ((grad_y.float() * out.float()).sum(-1) - delta)
        grad = (grad + share[..., None] * grad_y).to(out.dtype)
    return Asked(lse, grad, torch.empty_like(lse)), grad_lse


def room_for_held(k: Tensor, given: Exact) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of k, v and far_k in float32, zero for all that are sinks or ever hold a slot; those of k
    and far_k are added up in units of scaling."""
    spec, (B, Hk, X, D) = given.spec, k.shape
    some = spec.slots + spec.sinks > 0
    held = torch.empty(2, *(k.shape if some else (0,)), device=k.device, dtype=torch.float32)
    if some:
        clear_kernel[(-(-X // TILE), B * Hk)](
            given.death, *held, X, given.front, D=D, DP=power_of_two(D), SIZE=TILE, BLOCK=spec.block, BACK=spec.back,
            SINKS=spec.sinks, SLOTS=spec.slots > 0,
        )  # fmt: skip
    return held[0], held[1], held[0, ..., :0] if given.pos is None else torch.zeros_like(held[0])


def key_grads(
    q: Tensor, k: Tensor, v: Tensor, given: Exact, tensors: tuple[Tensor, ...], asked: Asked,
    held: tuple[Tensor, Tensor, Tensor], more_v: Tensor | None, of_map: tuple[int, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of k and v: those of holders are added to those of sinks, and all that to those through the window."""
    C, *of_keys = of_map
    rows, n, strides = k.shape[0] * k.shape[1], -(-q.shape[2] // TILE), asked.grad.stride()[:3]
    if given.spec.sinks:
        launch = launch_of("sink_grad", q, 1, given)
        scalars, sizes = arguments(q, k, v, given, launch)
        programs = -(-given.spec.sinks // launch.chunk) * rows
        tiles = -(-n // max(1, PROGRAMS // programs))
        sink_grad_kernel[(-(-n // tiles), programs // rows, rows)](
            *tensors, *held, *asked, *strides, *scalars, tiles, **sizes
        )
    if given.spec.slots:
        launch = launch_of("held_grad", q, 1, given).of_places(given.spec.slots)
        scalars, sizes = arguments(q, k, v, given, launch)
        programs = -(-given.spec.slots // launch.chunk)
        tiles = 1 if given.pos is not None else max(1, n // WALKS)
        held_grad_kernel[(-(-n // tiles), programs, rows)](
            *tensors, *held, *asked, *strides, *scalars, tiles, WALKS=tiles > 1, **sizes
        )
    grad_k, grad_v = laid_out_as(k), laid_out_as(v)
    added = grad_v if more_v is None else more_v.contiguous()  # what is missing is not read
    scalars, sizes = arguments(q, k, v, given, launch_of("window_grad", q, 1, given))
    window_grad_kernel[(n + -(-given.front // TILE), rows)](
        *tensors, *held[:2], added, *of_keys, grad_k, grad_v, *asked, *grad_k.stride()[:3], *grad_v.stride()[:3],
        *strides, *scalars, HELD=held[0].numel() > 0, MORE=more_v is not None, C=C, CP=power_of_two(C), **sizes,
    )  # fmt: skip
    return grad_k, grad_v


def inputs(q: Tensor, k: Tensor, v: Tensor, far_q: Tensor, far_k: Tensor, given: Exact) -> tuple[Tensor, ...]:
    """What every kernel reads."""
    pos = given.table if given.pos is None else given.pos
    return q, k, v, given.table, given.death, given.bounds, far_q, far_k, pos
