"""The exact branch: softmax over sinks, window and slot holders, forward and backward, without repeated keys.

The rows of a program are the queries of a tile, those of several heads of a group under each other. All keys stand in
one store [B, Hk, X, D]: coordinate c at front + c, sinks at 0 … sinks − 1. Gradients of keys and values are added up
in float32 with atomics, since a holder is read by many tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fused_select import TILE, scaled_scores
from .fused_triton import constexpr, jit, power_of_two, precision, tl
from .spec import KernelSpec

CHUNK = 64  # holders that are read together
HEADS = 2  # of a group that one program takes, where they fit


@jit
def rows_of(tile, part, HP: constexpr, G: constexpr, TILE: constexpr, W):
    """(head in the group, coordinate, whether there is such a query) of a program's rows."""
    r = tl.arange(0, HP * TILE)
    head, at = part * HP + r // TILE, tile * TILE + r % TILE
    return head, at, (head < G) & (at < W)


@jit
def keys_of(
    step, tile, row, Table, Death, Bounds, b, at, X, n, front, width,
    SINKS: constexpr, SP: constexpr, SLOTS: constexpr, REACH: constexpr, CHUNK: constexpr, TILE: constexpr,
    BLOCK: constexpr, BACK: constexpr, KIND: constexpr,
):  # fmt: skip
    """(index in the store, whether there is a key, which rows see it) of one chunk of keys: KIND 0 sinks, 1 window,
    2 holders."""
    block = at // BLOCK
    if KIND == 0:
        index = tl.arange(0, SP)
        base = tl.load(Bounds + b * 4 + 3)
        here = (index < SINKS) & (index < X)
        visible = here[None, :] & (index[None, :] <= (base + at)[:, None])
    elif KIND == 1:
        lo, hi = tl.load(Bounds + b * 4), tl.load(Bounds + b * 4 + 1)
        c = (tile + 1 - REACH + step) * TILE + tl.arange(0, TILE)
        here = (c >= lo) & (c < hi)
        # a token is seen until it leaves the window, or if it leaves inside this tile, until it loses its slot;
        # those that left before stand in the table
        until = (c + REACH * TILE) // BLOCK - REACH * TILE // BLOCK + BACK + 1  # c may be negative
        index = front + c
        if SLOTS:
            late = here & (until > tile * (TILE // BLOCK))
            until = tl.load(Death + row.to(tl.int64) * X + index, mask=late, other=0)
        until = tl.where(here, until, 0)
        visible = (c[None, :] <= at[:, None]) & (block[:, None] < until[None, :])
    else:
        i = step * CHUNK + tl.arange(0, CHUNK)
        index = tl.load(Table + (row.to(tl.int64) * n + tile) * width + i, mask=i < width, other=-1)
        here = index >= 0
        until = tl.load(Death + row.to(tl.int64) * X + index, mask=here, other=0)
        visible = block[:, None] < until[None, :]
    return index, here, visible


@jit
def far_keys(KFar, Pos, row, X, index, here, at, base, limit, d, D: constexpr):
    """(keys turned to position 0, which rows see them from beyond the reach)."""
    at_store = row.to(tl.int64) * X + index.to(tl.int64)
    k = tl.load(KFar + at_store[:, None] * D + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0)
    there = tl.load(Pos + at_store, mask=here, other=0)
    return k, (base + at)[:, None] - there[None, :] > limit


@jit
def absorb(s, v, visible, m, l, acc, PRECISION: constexpr):
    """One step of an online softmax."""
    s = tl.where(visible, s, float("-inf"))
    new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - new[:, None])
    shrink = tl.exp2(m - new)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return new, l * shrink + tl.sum(p, 1), acc


@jit
def exact_kernel(
    Q, K, V, Table, Death, Bounds, QFar, KFar, Pos, Out, Lse,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
    scaling, softcap, W, X, front, n, kv_heads, width, limit, chunks,
    G: constexpr, HP: constexpr, D: constexpr, DP: constexpr, TILE: constexpr, CHUNK: constexpr, BLOCK: constexpr,
    BACK: constexpr, REACH: constexpr, SINKS: constexpr, SP: constexpr, SLOTS: constexpr,
    SOFTCAP: constexpr, FAR: constexpr, PRECISION: constexpr,
):  # fmt: skip
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
        where_far = ((row * G + head).to(tl.int64) * W + at)[:, None] * D
        far_q = tl.load(QFar + where_far + d[None, :], mask=live[:, None] & wide, other=0.0)
    key = K + b.to(tl.int64) * skb + h.to(tl.int64) * skh
    value = V + b.to(tl.int64) * svb + h.to(tl.int64) * svh
    m = tl.full([HP * TILE], -1e30, tl.float32)
    l = tl.zeros([HP * TILE], tl.float32)
    acc = tl.zeros([HP * TILE, DP], tl.float32)
    for step in range(REACH):
        index, here, visible = keys_of(
            step, tile, row, Table, Death, Bounds, b, at, X, n, front, width,
            SINKS, SP, SLOTS, REACH, CHUNK, TILE, BLOCK, BACK, 1,
        )  # fmt: skip
        k = tl.load(key + index.to(tl.int64)[:, None] * skt + d[None, :], mask=here[:, None] & wide, other=0.0)
        v = tl.load(value + index.to(tl.int64)[:, None] * svt + d[None, :], mask=here[:, None] & wide, other=0.0)
        s = scaled_scores(q, k, scaling, softcap, SOFTCAP, PRECISION)
        m, l, acc = absorb(s, v, visible, m, l, acc, PRECISION)
    for step in tl.range(chunks):
        index, here, visible = keys_of(
            step, tile, row, Table, Death, Bounds, b, at, X, n, front, width,
            SINKS, SP, SLOTS, REACH, CHUNK, TILE, BLOCK, BACK, 2,
        )  # fmt: skip
        k = tl.load(key + index.to(tl.int64)[:, None] * skt + d[None, :], mask=here[:, None] & wide, other=0.0)
        v = tl.load(value + index.to(tl.int64)[:, None] * svt + d[None, :], mask=here[:, None] & wide, other=0.0)
        s = scaled_scores(q, k, scaling, softcap, SOFTCAP, PRECISION)
        if FAR:  # noqa: SIM102  this is known when the kernel is compiled, the next when it runs
            if beyond:
                far_k, away = far_keys(KFar, Pos, row, X, index, here, at, base, limit, d, D)
                s = tl.where(away, scaled_scores(far_q, far_k, scaling, softcap, SOFTCAP, PRECISION), s)
        m, l, acc = absorb(s, v, visible, m, l, acc, PRECISION)
    if SINKS:
        index, here, visible = keys_of(
            0, tile, row, Table, Death, Bounds, b, at, X, n, front, width,
            SINKS, SP, SLOTS, REACH, CHUNK, TILE, BLOCK, BACK, 0,
        )  # fmt: skip
        k = tl.load(key + index.to(tl.int64)[:, None] * skt + d[None, :], mask=here[:, None] & wide, other=0.0)
        v = tl.load(value + index.to(tl.int64)[:, None] * svt + d[None, :], mask=here[:, None] & wide, other=0.0)
        s = scaled_scores(q, k, scaling, softcap, SOFTCAP, PRECISION)
        if FAR:  # noqa: SIM102  this is known when the kernel is compiled, the next when it runs
            if beyond:
                far_k, away = far_keys(KFar, Pos, row, X, index, here, at, base, limit, d, D)
                s = tl.where(away, scaled_scores(far_q, far_k, scaling, softcap, SOFTCAP, PRECISION), s)
        m, l, acc = absorb(s, v, visible, m, l, acc, PRECISION)
    seen = l > 0  # rows of padding see nothing
    acc = acc / tl.where(seen, l, 1.0)[:, None]
    lse = tl.where(seen, (m + tl.log2(tl.where(seen, l, 1.0))) * 0.6931471805599453, 0.0)
    out = (row * G + head).to(tl.int64) * W + at
    tl.store(Out + out[:, None] * D + d[None, :], acc.to(Out.dtype.element_ty), mask=live[:, None] & wide)
    tl.store(Lse + out, lse, mask=live)


@jit
def grad_scores(s, v, g, lse, delta, visible, scaling, softcap, SOFTCAP: constexpr, PRECISION: constexpr):
    """(probabilities, gradients of q·k) [rows, keys], from the normaliser and Δ = Σ g·out − gradient of lse."""
    p = tl.where(visible, tl.exp2(s - lse[:, None]), 0.0)
    ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None]) * scaling
    if SOFTCAP:
        t = s * 0.6931471805599453 / softcap
        ds = ds * (1 - t * t)
    return p, ds


@jit
def query_grad_kernel(
    Q, K, V, Table, Death, Bounds, QFar, KFar, Pos, Out, Lse, Grad, GradLse, Delta, GradQ, GradQFar,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
    scaling, softcap, W, X, front, n, kv_heads, width, limit, chunks,
    G: constexpr, HP: constexpr, D: constexpr, DP: constexpr, TILE: constexpr, CHUNK: constexpr, BLOCK: constexpr,
    BACK: constexpr, REACH: constexpr, SINKS: constexpr, SP: constexpr, SLOTS: constexpr,
    SOFTCAP: constexpr, FAR: constexpr, PRECISION: constexpr,
):  # fmt: skip
    tile, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = row // kv_heads, row % kv_heads
    head, at, live = rows_of(tile, part, HP, G, TILE, W)
    d = tl.arange(0, DP)
    wide = (d < D)[None, :]
    where_q = b.to(tl.int64) * sqb + (h * G + head).to(tl.int64)[:, None] * sqh + at.to(tl.int64)[:, None] * sqt
    q = tl.load(Q + where_q + d[None, :], mask=live[:, None] & wide, other=0.0)
    out = (row * G + head).to(tl.int64) * W + at
    g = tl.load(Grad + out[:, None] * D + d[None, :], mask=live[:, None] & wide, other=0.0)
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
    acc = tl.zeros([HP * TILE, DP], tl.float32)
    for step in range(REACH):
        index, here, visible = keys_of(
            step, tile, row, Table, Death, Bounds, b, at, X, n, front, width,
            SINKS, SP, SLOTS, REACH, CHUNK, TILE, BLOCK, BACK, 1,
        )  # fmt: skip
        k = tl.load(key + index.to(tl.int64)[:, None] * skt + d[None, :], mask=here[:, None] & wide, other=0.0)
        v = tl.load(value + index.to(tl.int64)[:, None] * svt + d[None, :], mask=here[:, None] & wide, other=0.0)
        s = scaled_scores(q, k, scaling, softcap, SOFTCAP, PRECISION)
        _, ds = grad_scores(s, v, g, lse, delta, visible, scaling, softcap, SOFTCAP, PRECISION)
        acc += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    for step in tl.range(chunks):
        index, here, visible = keys_of(
            step, tile, row, Table, Death, Bounds, b, at, X, n, front, width,
            SINKS, SP, SLOTS, REACH, CHUNK, TILE, BLOCK, BACK, 2,
        )  # fmt: skip
        k = tl.load(key + index.to(tl.int64)[:, None] * skt + d[None, :], mask=here[:, None] & wide, other=0.0)
        v = tl.load(value + index.to(tl.int64)[:, None] * svt + d[None, :], mask=here[:, None] & wide, other=0.0)
        s = scaled_scores(q, k, scaling, softcap, SOFTCAP, PRECISION)
        if FAR:
            far_k, away = far_keys(KFar, Pos, row, X, index, here, at, base, limit, d, D)
            s = tl.where(away, scaled_scores(far_q, far_k, scaling, softcap, SOFTCAP, PRECISION), s)
        _, ds = grad_scores(s, v, g, lse, delta, visible, scaling, softcap, SOFTCAP, PRECISION)
        if FAR:
            far_acc += tl.dot(tl.where(away, ds, 0.0).to(k.dtype), far_k, input_precision=PRECISION)
            ds = tl.where(away, 0.0, ds)
        acc += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    if SINKS:
        index, here, visible = keys_of(
            0, tile, row, Table, Death, Bounds, b, at, X, n, front, width,
            SINKS, SP, SLOTS, REACH, CHUNK, TILE, BLOCK, BACK, 0,
        )  # fmt: skip
        k = tl.load(key + index.to(tl.int64)[:, None] * skt + d[None, :], mask=here[:, None] & wide, other=0.0)
        v = tl.load(value + index.to(tl.int64)[:, None] * svt + d[None, :], mask=here[:, None] & wide, other=0.0)
        s = scaled_scores(q, k, scaling, softcap, SOFTCAP, PRECISION)
        if FAR:
            far_k, away = far_keys(KFar, Pos, row, X, index, here, at, base, limit, d, D)
            s = tl.where(away, scaled_scores(far_q, far_k, scaling, softcap, SOFTCAP, PRECISION), s)
        _, ds = grad_scores(s, v, g, lse, delta, visible, scaling, softcap, SOFTCAP, PRECISION)
        if FAR:
            far_acc += tl.dot(tl.where(away, ds, 0.0).to(k.dtype), far_k, input_precision=PRECISION)
            ds = tl.where(away, 0.0, ds)
        acc += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    tl.store(GradQ + out[:, None] * D + d[None, :], acc.to(GradQ.dtype.element_ty), mask=live[:, None] & wide)
    if FAR:
        tl.store(
            GradQFar + out[:, None] * D + d[None, :], far_acc.to(GradQ.dtype.element_ty), mask=live[:, None] & wide
        )


@jit
def key_grad_chunk(
    Q, Lse, Grad, Delta, GradK, GradV, Table, Death, Bounds, key, value, QFar, KFar, Pos, GradKFar,
    step, tile, row, b, h, sqb, sqh, sqt, skt, svt,
    scaling, softcap, W, X, front, n, width, limit,
    G: constexpr, HP: constexpr, D: constexpr, DP: constexpr, TILE: constexpr, CHUNK: constexpr, BLOCK: constexpr,
    BACK: constexpr, REACH: constexpr, SINKS: constexpr, SP: constexpr, SLOTS: constexpr,
    SOFTCAP: constexpr, FAR: constexpr, PRECISION: constexpr, KIND: constexpr, SIZE: constexpr,
):  # fmt: skip
    """Adds what one tile's queries of all heads of a group say about one chunk of keys."""
    d = tl.arange(0, DP)
    wide = (d < D)[None, :]
    _, at, _ = rows_of(tile, 0, HP, G, TILE, W)
    index, here, visible = keys_of(
        step, tile, row, Table, Death, Bounds, b, at, X, n, front, width,
        SINKS, SP, SLOTS, REACH, CHUNK, TILE, BLOCK, BACK, KIND,
    )  # fmt: skip
    k = tl.load(key + index.to(tl.int64)[:, None] * skt + d[None, :], mask=here[:, None] & wide, other=0.0)
    v = tl.load(value + index.to(tl.int64)[:, None] * svt + d[None, :], mask=here[:, None] & wide, other=0.0)
    grad_k, grad_v = tl.zeros([SIZE, DP], tl.float32), tl.zeros([SIZE, DP], tl.float32)
    grad_far = grad_k
    if FAR:
        base = tl.load(Bounds + b * 4 + 3)
        grad_far = tl.zeros([SIZE, DP], tl.float32)
    for part in range((G + HP - 1) // HP):
        head, at, live = rows_of(tile, part, HP, G, TILE, W)
        where_q = b.to(tl.int64) * sqb + (h * G + head).to(tl.int64)[:, None] * sqh + at.to(tl.int64)[:, None] * sqt
        q = tl.load(Q + where_q + d[None, :], mask=live[:, None] & wide, other=0.0)
        out = (row * G + head).to(tl.int64) * W + at
        g = tl.load(Grad + out[:, None] * D + d[None, :], mask=live[:, None] & wide, other=0.0)
        delta = tl.load(Delta + out, mask=live, other=0.0)
        lse = tl.load(Lse + out, mask=live, other=0.0) * 1.4426950408889634
        s = scaled_scores(q, k, scaling, softcap, SOFTCAP, PRECISION)
        if FAR:
            far_q = tl.load(QFar + out[:, None] * D + d[None, :], mask=live[:, None] & wide, other=0.0)
            far_k, away = far_keys(KFar, Pos, row, X, index, here, at, base, limit, d, D)
            s = tl.where(away, scaled_scores(far_q, far_k, scaling, softcap, SOFTCAP, PRECISION), s)
        p, ds = grad_scores(s, v, g, lse, delta, visible & live[:, None], scaling, softcap, SOFTCAP, PRECISION)
        grad_v += tl.dot(tl.trans(p).to(g.dtype), g, input_precision=PRECISION)
        if FAR:
            far_ds = tl.where(away, ds, 0.0)
            grad_far += tl.dot(tl.trans(far_ds).to(q.dtype), far_q, input_precision=PRECISION)
            ds = tl.where(away, 0.0, ds)
        grad_k += tl.dot(tl.trans(ds).to(q.dtype), q, input_precision=PRECISION)
    to = (row.to(tl.int64) * X + index.to(tl.int64))[:, None] * D + d[None, :]
    tl.atomic_add(GradK + to, grad_k, mask=here[:, None] & wide, sem="relaxed")
    tl.atomic_add(GradV + to, grad_v, mask=here[:, None] & wide, sem="relaxed")
    if FAR:
        tl.atomic_add(GradKFar + to, grad_far, mask=here[:, None] & wide, sem="relaxed")


@jit
def key_grad_kernel(
    Q, K, V, Table, Death, Bounds, QFar, KFar, Pos, Lse, Grad, Delta, GradK, GradV, GradKFar,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
    scaling, softcap, W, X, front, n, kv_heads, width, limit, chunks,
    G: constexpr, HP: constexpr, D: constexpr, DP: constexpr, TILE: constexpr, CHUNK: constexpr, BLOCK: constexpr,
    BACK: constexpr, REACH: constexpr, SINKS: constexpr, SP: constexpr, SLOTS: constexpr,
    SOFTCAP: constexpr, FAR: constexpr, PRECISION: constexpr,
):  # fmt: skip
    tile, step, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = row // kv_heads, row % kv_heads
    key = K + b.to(tl.int64) * skb + h.to(tl.int64) * skh
    value = V + b.to(tl.int64) * svb + h.to(tl.int64) * svh
    if step < REACH:
        key_grad_chunk(
            Q, Lse, Grad, Delta, GradK, GradV, Table, Death, Bounds, key, value, QFar, KFar, Pos, GradKFar,
            step, tile, row, b, h, sqb, sqh, sqt, skt, svt, scaling, softcap, W, X, front, n, width, limit,
            G, HP, D, DP, TILE, CHUNK, BLOCK, BACK, REACH, SINKS, SP, SLOTS, SOFTCAP, False, PRECISION, 1, TILE,
        )  # fmt: skip
    elif step < REACH + chunks:
        key_grad_chunk(
            Q, Lse, Grad, Delta, GradK, GradV, Table, Death, Bounds, key, value, QFar, KFar, Pos, GradKFar,
            step - REACH, tile, row, b, h, sqb, sqh, sqt, skt, svt, scaling, softcap, W, X, front, n, width, limit,
            G, HP, D, DP, TILE, CHUNK, BLOCK, BACK, REACH, SINKS, SP, SLOTS, SOFTCAP, FAR, PRECISION, 2, CHUNK,
        )  # fmt: skip
    else:
        key_grad_chunk(
            Q, Lse, Grad, Delta, GradK, GradV, Table, Death, Bounds, key, value, QFar, KFar, Pos, GradKFar,
            0, tile, row, b, h, sqb, sqh, sqt, skt, svt, scaling, softcap, W, X, front, n, width, limit,
            G, HP, D, DP, TILE, CHUNK, BLOCK, BACK, REACH, SINKS, SP, SLOTS, SOFTCAP, FAR, PRECISION, 0, SP,
        )  # fmt: skip


class Exact(NamedTuple):
    """What the exact branch needs beside q, k and v; no gradients."""

    spec: KernelSpec
    table: Tensor  # [R, n, slots] int32
    death: Tensor  # [R, X] int32
    bounds: Tensor  # [B, 4] int32
    front: int
    scaling: float
    softcap: float | None
    pos: Tensor | None  # [R, X] int32, of the keys; None: no key is further back than the spec's reach


def arguments(q: Tensor, k: Tensor, v: Tensor, given: Exact, heads: int) -> tuple[list, dict]:
    """The kernels' common arguments: strides and scalars, and their compile-time constants."""
    spec, (_, H, W, D), (_, Hk, X, _) = given.spec, q.shape, k.shape
    scalars = [
        given.scaling,
        given.softcap or 0.0,
        W,
        X,
        given.front,
        -(-W // TILE),
        Hk,
        max(spec.slots, 1),
        spec.reach,
    ]
    sizes = {
        "G": H // Hk, "HP": heads, "D": D, "DP": power_of_two(D), "TILE": TILE, "CHUNK": CHUNK, "BLOCK": spec.block,
        "BACK": spec.back, "REACH": -(-spec.back * spec.block // TILE) + 1, "SINKS": spec.sinks,
        "SP": power_of_two(spec.sinks), "SLOTS": spec.slots > 0, "chunks": -(-spec.slots // CHUNK),
        "SOFTCAP": given.softcap is not None, "FAR": given.pos is not None, "PRECISION": precision(q.dtype),
    }  # fmt: skip
    return [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *scalars], sizes


def heads_of(q: Tensor, group: int) -> int:
    """Heads of a group that one program takes: more share what they read, but fewer registers are left."""
    narrow = q.shape[-1] <= 128 and q.dtype != torch.float32
    return min(power_of_two(group, 1), HEADS if narrow else 1)


def stages(q: Tensor, given: Exact) -> int:
    return 2 if q.shape[-1] <= 128 and q.dtype != torch.float32 and given.pos is None else 1


class ExactFunction(torch.autograd.Function):
    """q [B, H, W, D], k and v [B, Hk, X, D] -> (exact [B, H, W, D] of q's dtype, lse [B, H, W] float32).

    `far_q` and `far_k` are q and k turned to where they are seen from beyond reach, contiguous; without `given.pos`
    they are not looked at.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, far_q: Tensor, far_k: Tensor, given: Exact
    ) -> tuple[Tensor, Tensor]:
        (B, H, W, D), Hk = q.shape, k.shape[1]
        out = torch.empty(B, H, W, D, device=q.device, dtype=q.dtype)
        lse = torch.empty(B, H, W, device=q.device, dtype=torch.float32)
        heads = heads_of(q, H // Hk)
        scalars, sizes = arguments(q, k, v, given, heads)
        grid = (-(-W // TILE), -(-(H // Hk) // heads), B * Hk)
        exact_kernel[grid](
            *inputs(q, k, v, far_q, far_k, given), out, lse, *scalars, **sizes, num_warps=4 * heads,
            num_stages=stages(q, given),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, far_q, far_k, out, lse)
        ctx.given = given
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, far_q, far_k, out, lse = ctx.saved_tensors
        given = ctx.given
        (B, H, W, D), Hk = q.shape, k.shape[1]
        tensors = inputs(q, k, v, far_q, far_k, given)
        grad, grad_lse, n = grad.contiguous(), grad_lse.contiguous(), -(-W // TILE)
        delta, grad_q = torch.empty_like(lse), torch.empty_like(out)
        grad_far_q = torch.empty_like(far_q)
        heads = heads_of(q, H // Hk)
        scalars, sizes = arguments(q, k, v, given, heads)
        query_grad_kernel[(n, -(-(H // Hk) // heads), B * Hk)](
            *tensors, out, lse, grad, grad_lse, delta, grad_q, grad_far_q, *scalars, **sizes, num_warps=8,
            num_stages=stages(q, given),
        )  # fmt: skip
        grad_k, grad_far_k = (torch.zeros(x.shape, device=q.device, dtype=torch.float32) for x in (k, far_k))
        grad_v = torch.zeros_like(grad_k)
        scalars, sizes = arguments(q, k, v, given, 1)
        chunks = sizes["REACH"] + sizes["chunks"] + (given.spec.sinks > 0)
        key_grad_kernel[(n, chunks, B * Hk)](
            *tensors, lse, grad, delta, grad_k, grad_v, grad_far_k, *scalars, **sizes,
            num_warps=8 if D > 64 else 4, num_stages=1,
        )  # fmt: skip
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_far_q, grad_far_k.to(k.dtype), None


def inputs(q: Tensor, k: Tensor, v: Tensor, far_q: Tensor, far_k: Tensor, given: Exact) -> tuple[Tensor, ...]:
    """What every kernel reads."""
    pos = given.table if given.pos is None else given.pos
    return q, k, v, given.table, given.death, given.bounds, far_q, far_k, pos
