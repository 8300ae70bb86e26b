"""The whole read in one kernel, where nobody asks for the branches: exact sets, the queries' features, memory, merge.

y = (Σ exp(s) v + g φ(q)ᵀM) / (Σ exp(s) + g φ(q)ᵀm) is one online softmax, which begins with what the memory gives:
neither φ(q) nor the exact branch nor its normaliser is ever written. Features of keys and the memory at every tile come
from the other kernels; what is trained goes through `ExactFunction` and `MemoryFunction`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .feature_maps import Hedgehog
from .fused_exact import Exact, absorb, arguments, chunk_of, rows_at, rows_of, scores_on, sink_keys
from .fused_map import projected, softmax_rows
from .fused_memory import Order, clocks_of, entries, memory_at, near_weights, states_of
from .fused_select import TILE
from .fused_triton import Launch, constexpr, jit, power_of_two, tl
from .state import Kernel

LAUNCH = {"read": Launch(heads=2, chunk=32, warps=4, stages=3)}  # warps for one head
WIDEST, COLUMNS = 128, 64  # channels of a head, and columns of its map, that fit


def serves(kernel: Kernel, q: Tensor) -> bool:
    """Whether the kernel does such a layer: a hedgehog map of at most 64 columns, heads of at most 128 channels."""
    mapping = kernel.map_q
    return type(mapping) is Hedgehog and mapping.columns <= COLUMNS and q.shape[-1] <= WIDEST


@jit
def maps_of(
    q, Weight, head, h, d, c, scale,
    G: constexpr, HP: constexpr, D: constexpr, C: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Both softmaxes [rows, columns] of the queries, each under its own head's matrix."""
    first = tl.min(head, 0)
    z = projected(q, Weight, h * G + tl.minimum(first, G - 1), d, c, D, C, PRECISION)
    for other in tl.static_range(1, HP):
        theirs = projected(q, Weight, h * G + tl.minimum(first + other, G - 1), d, c, D, C, PRECISION)
        z = tl.where((head == first + other)[:, None], theirs, z)
    z = z * scale
    there = (c < C)[None, :]
    return softmax_rows(tl.where(there, z, float("-inf"))), softmax_rows(tl.where(there, -z, float("-inf")))


@jit
def from_memory(
    q, Weight, Order, Phi, V, Clock, ClockEnd, Local, LocalNorm, Start, StartNorm, head, at, scale, tile, row, b, h,
    svb, svh, svt, X, n, length, segments, tiles, c, d,
    G: constexpr, HP: constexpr, D: constexpr, TILE: constexpr, BLOCK: constexpr, C: constexpr, DECAY: constexpr,
    PRECISION: constexpr,
):  # fmt: skip
    """(numerator [rows, D], normaliser [rows]) that the memory gives to the rows of one tile."""
    up, down = maps_of(q, Weight, head, h, d, c, scale, G, HP, D, C, PRECISION)
    up, down = up.to(Phi.dtype.element_ty), down.to(Phi.dtype.element_ty)
    block = at // BLOCK
    now, far, shrink = clocks_of(ClockEnd, row, tile, block, n, tiles, HP * TILE, TILE // BLOCK, DECAY, False)
    begin = tile // tiles
    high, norm = memory_at(Local, LocalNorm, Start, StartNorm, row, tile, begin, n, segments, shrink, c, d, 2 * C, D)
    acc = tl.dot(up, high.to(up.dtype), input_precision=PRECISION)
    z = tl.sum(up.to(tl.float32) * norm[None, :], 1)
    low, norm = memory_at(Local, LocalNorm, Start, StartNorm, row, tile, begin, n, segments, shrink, C + c, d, 2 * C, D)
    acc = tl.dot(down, low.to(up.dtype), acc, input_precision=PRECISION)
    z += tl.sum(down.to(tl.float32) * tl.where(c < C, norm, 0.0)[None, :], 1)
    index, here, phi, v, clock = entries(
        Order, row, tile, length, Phi, V, Clock, svb, svh, svt, b, h, X, c, d, 2 * C, D, TILE, DECAY
    )
    near = tl.dot(up, tl.trans(phi), input_precision=PRECISION)
    phi = tl.load(Phi + (row * X + index)[:, None] * (2 * C) + C + c[None, :], mask=here[:, None] & (c < C)[None, :],
                  other=0.0)  # fmt: skip
    near = tl.dot(down, tl.trans(phi), near, input_precision=PRECISION)
    near = near * near_weights(block, tile * (TILE // BLOCK), here, now, clock, TILE, BLOCK, False, DECAY)
    acc = tl.dot(near.to(v.dtype), v, acc * far[:, None], input_precision=PRECISION)
    return acc, z * far + tl.sum(near, 1)


@jit
def read_kernel(
    Q, K, V, Table, Death, Bounds, Y,
    Weight, Order, Phi, Clock, ClockEnd, Local, LocalNorm, Start, StartNorm, Gate, SinkLogit,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
    scaling, softcap, W, X, front, n, kv_heads, width, limit, scale, length, segments, tiles, chunks,
    G: constexpr, HP: constexpr, D: constexpr, DP: constexpr, TILE: constexpr, CHUNK: constexpr, BLOCK: constexpr,
    BACK: constexpr, REACH: constexpr, SINKS: constexpr, SP: constexpr, SLOTS: constexpr,
    SOFTCAP: constexpr, FAR: constexpr, PRECISION: constexpr, C: constexpr, CP: constexpr, DECAY: constexpr,
    SINK: constexpr,
):  # fmt: skip
    """y of a tile: an online softmax that begins with what the memory gives, then reads window, holders and sinks."""
    tile, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = row // kv_heads, row % kv_heads
    head, at, live = rows_of(tile, part, HP, G, TILE, W)
    d, c = tl.arange(0, DP), tl.arange(0, CP)
    wide = live[:, None] & (d < D)[None, :]
    where_q = b * sqb + (h * G + head)[:, None] * sqh + at.to(tl.int64)[:, None] * sqt
    q = tl.load(Q + where_q + d[None, :], mask=wide, other=0.0)
    acc, z = from_memory(
        q, Weight, Order, Phi, V, Clock, ClockEnd, Local, LocalNorm, Start, StartNorm, head, at, scale, tile, row, b, h,
        svb, svh, svt, X, n, length, segments, tiles, c, d, G, HP, D, TILE, BLOCK, C, DECAY, PRECISION,
    )  # fmt: skip
    filled = z > 1.1754943508222875e-38
    z = tl.where(filled, z, 1.0)
    gate = tl.load(Gate + h * G + head, mask=head < G, other=0.0)
    m = tl.where(filled, tl.log2(z) + gate * 1.4426950408889634, -1e30)
    l, acc = tl.where(filled, 1.0, 0.0), acc * tl.where(filled, 1.0 / z, 0.0)[:, None]
    if SINK:  # a logit that only the normaliser sees
        sink = tl.load(SinkLogit + h * G + head, mask=head < G, other=0.0).to(tl.float32) * 1.4426950408889634
        new = tl.maximum(m, sink)
        l, acc, m = l * tl.exp2(m - new) + tl.exp2(sink - new), acc * tl.exp2(m - new)[:, None], new
    key, value = K + b * skb + h * skh, V + b * svb + h * svh
    table, death = Table + (row * n + tile) * width, Death + row * X
    lo, hi = tl.load(Bounds + b * 4), tl.load(Bounds + b * 4 + 1)
    for step in tl.range(chunks):
        index, visible = chunk_of(
            step, tile, table, death, lo, hi, at, front, width, SLOTS, REACH, CHUNK, TILE, BLOCK, BACK
        )
        k, v = rows_at(key, index, skt, d, D), rows_at(value, index, svt, d, D)
        s = scores_on(q, k, scaling, softcap, SOFTCAP, PRECISION)
        m, l, acc = absorb(s, v, visible, m, l, acc, scaling, SOFTCAP, PRECISION)
    if SINKS:
        index, visible = sink_keys(b, at, Bounds, X, SINKS, SP)
        k, v = rows_at(key, index, skt, d, D), rows_at(value, index, svt, d, D)
        s = scores_on(q, k, scaling, softcap, SOFTCAP, PRECISION)
        m, l, acc = absorb(s, v, visible, m, l, acc, scaling, SOFTCAP, PRECISION)
    acc = acc * tl.where(l > 0, 1.0 / tl.where(l > 0, l, 1.0), 0.0)[:, None]  # padding sees nothing
    out = (row * G + head) * W + at
    tl.store(Y + out[:, None] * D + d[None, :], acc.to(Y.dtype.element_ty), mask=wide)


def read(
    q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, given: Exact, order: Order, phi: Tensor, clock: Tensor,
    clock_end: Tensor, memory: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [B, H, W, D], the memory at the end [B, Hk, F, D + 1]); shapes as in `ExactFunction` and `MemoryFunction`."""
    (B, H, W, D), (Hk, F), mapping = q.shape, (k.shape[1], phi.shape[-1]), kernel.map_q
    assert isinstance(mapping, Hedgehog)
    assert kernel.log_gate is not None
    states, end = states_of(order, phi, v, clock, clock_end, memory)
    launch = launch_of(q, H // Hk)
    scalars, sizes = arguments(q, k, v, given, launch)
    y = torch.empty(B, H, W, D, device=q.device, dtype=q.dtype)
    sink = kernel.sink_logits
    read_kernel[(-(-W // TILE), -(-(H // Hk) // launch.heads), B * Hk)](
        q, k, v, given.table, given.death, given.bounds, y,
        mapping.weight.float().contiguous(), order.tokens, phi, clock, clock_end, *states,
        kernel.log_gate.float(), kernel.log_gate if sink is None else sink,
        *scalars, kernel.scaling**0.5, order.tokens.shape[1], order.segments, order.tiles,
        **sizes, C=F // 2, CP=power_of_two(F // 2), DECAY=order.decays, SINK=sink is not None,
    )  # fmt: skip
    return y, end


def launch_of(q: Tensor, group: int) -> Launch:
    given = LAUNCH["read"]
    heads = min(power_of_two(group, 1), given.heads)
    return given._replace(heads=heads, warps=given.warps * heads)
