"""Who holds a slot, and when: attention received, recall error, lifetimes. Nothing here has a gradient.

Lifetimes are found in parallel. A token is held while fewer than `capacity` of those that applied are better, so the
best `capacity` of every segment, merged in log(segments) steps, tell each segment who stands when it begins; inside
a segment it is counting. Those whom a share rejects are listed by the block of their rejection: this list is the
next share's applicants, and that of the last share the order in which the memory takes tokens in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .fused_triton import constexpr, jit, power_of_two, precision, tl
from .spec import KernelSpec
from .state import Kernel

SEGMENT = 512  # applicants that one program takes in their order
TILE = 64  # queries that are computed together
LEAST_LIST = 64  # places of a list: with fewer nothing is faster, and every size is compiled by itself


# --- attention received -------------------------------------------------------------------------------------


@jit
def capped(s, cap):
    """cap · tanh(s / cap)."""
    return cap * (2 * tl.sigmoid(2 * s / cap) - 1)


@jit
def scaled_scores(q, k, scaling, softcap, SOFTCAP: constexpr, PRECISION: constexpr):
    """Scores of q [rows, D] on k [keys, D], in units of log 2."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
    if SOFTCAP:
        s = capped(s, softcap)
    return s * 1.4426950408889634


@jit
def window_scores(
    q, key, lo, hi, tile, step, at, block, front, skt, d, scaling, softcap,
    D: constexpr, TILE: constexpr, BLOCK: constexpr, BACK: constexpr, REACH: constexpr, KEYS: constexpr,
    SOFTCAP: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """(blocks, scores that are −inf out of the window) of KEYS keys of the reach."""
    c = (tile + 1 - REACH) * TILE + step * KEYS + tl.arange(0, KEYS)
    here = (c >= lo) & (c < hi)
    k = tl.load(key + (front + c).to(tl.int64)[:, None] * skt + d[None, :], mask=here[:, None] & (d < D)[None, :],
                other=0.0)  # fmt: skip
    s = scaled_scores(q, k, scaling, softcap, SOFTCAP, PRECISION)
    born = (c + REACH * TILE) // BLOCK - REACH * TILE // BLOCK  # c may be negative
    until = tl.where(here, born + BACK, -1)
    return born, tl.where((c[None, :] <= at[:, None]) & (block[:, None] <= until[None, :]), s, float("-inf"))


@jit
def mass_kernel(
    Q, K, Bounds, QFar, KFar, Out,
    sqb, sqh, sqt, skb, skh, skt,
    scaling, softcap, W, X, front, n, kv_heads, limit,
    G: constexpr, HP: constexpr, D: constexpr, DP: constexpr, TILE: constexpr, BLOCK: constexpr, BACK: constexpr,
    REACH: constexpr, KEYS: constexpr, SINKS: constexpr, SP: constexpr, SOFTCAP: constexpr, FAR: constexpr,
    PRECISION: constexpr,
):  # fmt: skip
    """Probability that a tile's queries of later blocks give to the keys in reach, under sinks and window alone."""
    tile, row = tl.program_id(0), tl.program_id(1)
    GROUPS: constexpr = (G + HP - 1) // HP
    part = row % GROUPS
    b, h = row // GROUPS // kv_heads, row // GROUPS % kv_heads
    lo, hi = tl.load(Bounds + b * 4), tl.load(Bounds + b * 4 + 1)
    fresh, base = tl.load(Bounds + b * 4 + 2), tl.load(Bounds + b * 4 + 3)

    r = tl.arange(0, HP * TILE)
    head, at = part * HP + r // TILE, tile * TILE + r % TILE
    d = tl.arange(0, DP)
    live = (head < G) & (at < W)
    where_q = b.to(tl.int64) * sqb + (h * G + head).to(tl.int64)[:, None] * sqh + at.to(tl.int64)[:, None] * sqt
    q = tl.load(Q + where_q + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
    key = K + b.to(tl.int64) * skb + h.to(tl.int64) * skh
    counts = live & (at >= fresh) & (at < hi)

    m = tl.full([HP * TILE], -1e30, tl.float32)
    l = tl.zeros([HP * TILE], tl.float32)
    block = at // BLOCK
    if SINKS:
        i = tl.arange(0, SP)
        wide = ((i < SINKS) & (i < X))[:, None] & (d < D)[None, :]
        sinks = tl.load(key + i[:, None] * skt + d[None, :], mask=wide, other=0.0)
        first = scaled_scores(q, sinks, scaling, softcap, SOFTCAP, PRECISION)
        if FAR:
            where_far = ((b * kv_heads * G + h * G + head).to(tl.int64) * W + at)[:, None] * D
            far_q = tl.load(QFar + where_far + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
            where_far = ((b * kv_heads + h).to(tl.int64) * X + i)[:, None] * D
            far_k = tl.load(KFar + where_far + d[None, :], mask=wide, other=0.0)
            away = (base + at)[:, None] - i[None, :] > limit
            first = tl.where(away, scaled_scores(far_q, far_k, scaling, softcap, SOFTCAP, PRECISION), first)
        first = tl.where((i < SINKS)[None, :] & (i[None, :] <= (base + at)[:, None]), first, float("-inf"))
        m = tl.maximum(m, tl.max(first, 1))
        l = tl.sum(tl.exp2(first - m[:, None]), 1)
    if REACH * TILE == KEYS:  # one score matrix: the second pass has it already
        born, s = window_scores(q, key, lo, hi, tile, 0, at, block, front, skt, d, scaling, softcap,
                                   D, TILE, BLOCK, BACK, REACH, KEYS, SOFTCAP, PRECISION)  # fmt: skip
        new = tl.maximum(m, tl.max(s, 1))
        lse = new + tl.log2(tl.maximum(l * tl.exp2(m - new) + tl.sum(tl.exp2(s - new[:, None]), 1), 1e-30))
        lse = tl.where(counts, lse, float("inf"))
        p = tl.sum(tl.where(block[:, None] > born[None, :], tl.exp2(s - lse[:, None]), 0.0), 0)
        tl.store(Out + (row.to(tl.int64) * n + tile) * REACH * TILE + tl.arange(0, KEYS), p)
    else:
        for step in range(REACH * TILE // KEYS):
            born, s = window_scores(q, key, lo, hi, tile, step, at, block, front, skt, d, scaling, softcap,
                                       D, TILE, BLOCK, BACK, REACH, KEYS, SOFTCAP, PRECISION)  # fmt: skip
            new = tl.maximum(m, tl.max(s, 1))
            l = l * tl.exp2(m - new) + tl.sum(tl.exp2(s - new[:, None]), 1)
            m = new
        lse = tl.where(counts, m + tl.log2(tl.maximum(l, 1e-30)), float("inf"))
        for step in range(REACH * TILE // KEYS):
            born, s = window_scores(q, key, lo, hi, tile, step, at, block, front, skt, d, scaling, softcap,
                                       D, TILE, BLOCK, BACK, REACH, KEYS, SOFTCAP, PRECISION)  # fmt: skip
            p = tl.sum(tl.where(block[:, None] > born[None, :], tl.exp2(s - lse[:, None]), 0.0), 0)
            place = (row.to(tl.int64) * n + tile) * REACH * TILE + step * KEYS + tl.arange(0, KEYS)
            tl.store(Out + place, p)


# --- lifetimes ----------------------------------------------------------------------------------------------


@jit
def beats(score_a, index_a, score_b, index_b):
    """Whether a is preferred to b: the better score, else the earlier token; a may be no token (−1)."""
    return (index_a >= 0) & ((score_a > score_b) | ((score_a == score_b) & (index_a < index_b)))


@jit
def best_kernel(
    Applicants, Score, Index, Best, X, length, lists, capacity, L: constexpr, CP: constexpr, CHUNK: constexpr
):
    """The best `capacity` applicants of one segment, in order, as list segment + 1."""
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = segment * L + tl.arange(0, L)
    index = tl.load(Applicants + row * length + at, mask=at < length, other=-1)
    score = tl.load(Score + row * X + index, mask=index >= 0, other=float("-inf"))
    rank = tl.zeros([L], tl.int32)
    for start in range(0, L, CHUNK):
        near = segment * L + start + tl.arange(0, CHUNK)
        other = tl.load(Applicants + row * length + near, mask=near < length, other=-1)
        theirs = tl.load(Score + row * X + other, mask=other >= 0, other=float("-inf"))
        better = beats(theirs[None, :], other[None, :], score[:, None], index[:, None])
        rank += tl.sum(better.to(tl.int32), 1)
    out = (row * lists + segment + 1) * CP
    keep = (index >= 0) & (rank < capacity)
    tl.store(Index + out + rank, index, mask=keep)
    tl.store(Best + out + rank, score, mask=keep)
    free = tl.arange(0, CP)
    total = tl.minimum(tl.sum((index >= 0).to(tl.int32), 0), capacity)
    tl.store(Index + out + free, tl.full([CP], -1, tl.int32), mask=free >= total)


@jit
def merge_kernel(Index, Best, IndexOut, BestOut, lists, shift, capacity, CP: constexpr, CHUNK: constexpr):
    """List i becomes the best of lists i and i − shift, which have no token in common."""
    here, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    mine, theirs = (row * lists + here) * CP, (row * lists + here - shift) * CP
    i = tl.arange(0, CP)
    a = tl.load(Index + mine + i)
    b = tl.load(Index + theirs + i, mask=(here >= shift) & (i < CP), other=-1)
    score_a = tl.load(Best + mine + i)  # of no token: anything, as `beats` looks at the index too
    score_b = tl.load(Best + theirs + i, mask=(here >= shift) & (i < CP), other=0.0)
    rank_a, rank_b = i, i
    for start in range(0, CP, CHUNK):
        j = start + tl.arange(0, CHUNK)
        x = tl.load(Index + mine + j)
        score_x = tl.load(Best + mine + j)
        y = tl.load(Index + theirs + j, mask=(here >= shift) & (j < CP), other=-1)
        score_y = tl.load(Best + theirs + j, mask=(here >= shift) & (j < CP), other=0.0)
        rank_a += tl.sum(beats(score_y[None, :], y[None, :], score_a[:, None], a[:, None]).to(tl.int32), 1)
        rank_b += tl.sum(beats(score_x[None, :], x[None, :], score_b[:, None], b[:, None]).to(tl.int32), 1)
    keep_a, keep_b = (a >= 0) & (rank_a < capacity), (b >= 0) & (rank_b < capacity)
    tl.store(IndexOut + mine + rank_a, a, mask=keep_a)
    tl.store(BestOut + mine + rank_a, score_a, mask=keep_a)
    tl.store(IndexOut + mine + rank_b, b, mask=keep_b)
    tl.store(BestOut + mine + rank_b, score_b, mask=keep_b)
    total = tl.sum((a >= 0).to(tl.int32), 0) + tl.sum((b >= 0).to(tl.int32), 0)
    tl.store(IndexOut + mine + i, tl.full([CP], -1, tl.int32), mask=i >= tl.minimum(total, capacity))


@jit
def death_kernel(
    Applicants, Score, Index, Best, Death, Rejected, Table,
    X, length, lists, blocks, n, capacity, first, width,
    L: constexpr, CP: constexpr, CHUNK: constexpr, BLOCK: constexpr, TILE: constexpr,
):  # fmt: skip
    """Takes one segment's blocks in order: who is rejected when, and who holds a place when a tile begins."""
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, x = tl.arange(0, CP), tl.arange(0, L)
    holder = tl.load(Index + (row * lists + segment) * CP + i)
    holder_score = tl.load(Best + (row * lists + segment) * CP + i, mask=holder >= 0, other=float("-inf"))
    mine = tl.load(Applicants + row * length + segment * L + x, mask=segment * L + x < length, other=-1)
    score = tl.load(Score + row * X + mine, mask=mine >= 0, other=float("-inf"))
    better_h, better_x = i, tl.zeros([L], tl.int32)
    for start in range(0, CP, CHUNK):
        near = start + tl.arange(0, CHUNK)
        other = tl.load(Index + (row * lists + segment) * CP + near)
        theirs = tl.load(Best + (row * lists + segment) * CP + near, mask=other >= 0, other=float("-inf"))
        better_x += tl.sum(beats(theirs[None, :], other[None, :], score[:, None], mine[:, None]).to(tl.int32), 1)
    alive_h = holder >= 0
    waits = mine >= 0
    alive_x = waits & (x < 0)
    death_h, death_x = tl.zeros([CP], tl.int32), tl.zeros([L], tl.int32)
    for j in range(L // BLOCK):
        block = segment * (L // BLOCK) + j
        at = block * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(Applicants + row * length + at, mask=at < length, other=-1)
        score_y = tl.load(Score + row * X + y, mask=y >= 0, other=float("-inf"))
        better_h += tl.sum(beats(score_y[None, :], y[None, :], holder_score[:, None], holder[:, None]).to(tl.int32), 1)
        better_x += tl.sum(beats(score_y[None, :], y[None, :], score[:, None], mine[:, None]).to(tl.int32), 1)
        alive_x = alive_x | (waits & (x // BLOCK == j))
        dies_h, dies_x = alive_h & (better_h >= capacity), alive_x & (better_x >= capacity)
        death_h, death_x = tl.where(dies_h, block, death_h), tl.where(dies_x, block, death_x)
        alive_h = alive_h & (better_h < capacity)
        alive_x = alive_x & (better_x < capacity)
        waits = waits & (x // BLOCK != j)
        if block < blocks:
            count_h, count_x = dies_h.to(tl.int32), dies_x.to(tl.int32)
            place_h = tl.cumsum(count_h, 0) - 1
            place_x = tl.cumsum(count_x, 0) - 1 + tl.sum(count_h, 0)
            tl.store(Rejected + row * length + block * BLOCK + place_h, holder, mask=dies_h)
            tl.store(Rejected + row * length + block * BLOCK + place_x, mine, mask=dies_x)
            if (j % (TILE // BLOCK) == 0) & (capacity > 0):
                count_h, count_x = alive_h.to(tl.int32), alive_x.to(tl.int32)
                here = (row * n + block // (TILE // BLOCK)) * width + first
                tl.store(Table + here + tl.cumsum(count_h, 0) - 1, holder, mask=alive_h)
                tl.store(Table + here + tl.cumsum(count_x, 0) - 1 + tl.sum(count_h, 0), mine, mask=alive_x)
    tl.store(Death + row * X + holder, death_h, mask=(holder >= 0) & ~alive_h)
    tl.store(Death + row * X + mine, death_x, mask=(mine >= 0) & ~alive_x)


class Lives(NamedTuple):
    """What the competition for the slots gave; indices point into the store, −1 is no token."""

    death: Tensor  # [R, X] int32: the block from which no share holds a token any more, `blocks` if none
    table: Tensor  # [R, n, slots] int32: who holds a slot at the first block of a tile
    order: Tensor  # [R, n·tile] int32: the tokens in the order of their deaths, those of block b from b·block on
    holders: Tensor  # [R, slots] int32: who holds a slot at the end


def segment_best(applicants: Tensor, score: Tensor, first: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The lists of the best: entry 0 the holders at the start, entry i + 1 those of segment i alone."""
    R, length = applicants.shape
    CP, segments = power_of_two(capacity, LEAST_LIST), -(-length // SEGMENT)
    index = applicants.new_full((R, segments + 1, CP), -1)
    best = score.new_full((R, segments + 1, CP), -torch.inf)
    if first.shape[1]:
        index[:, 0, : first.shape[1]], best[:, 0, : first.shape[1]] = ranked(first, score)
    grid = (segments, R)
    best_kernel[grid](
        applicants,
        score,
        index,
        best,
        score.shape[1],
        length,
        segments + 1,
        capacity,
        L=SEGMENT,
        CP=CP,
        CHUNK=16,
        num_warps=8,
    )
    return index, best


def ranked(index: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Holders [R, capacity] and their scores, best first, −1 last."""
    mine = score.gather(1, index.clamp(min=0).long()).masked_fill(index < 0, -torch.inf)
    order = mine.argsort(dim=1, descending=True, stable=True)
    return index.gather(1, order), mine.gather(1, order)


def compete(
    spec: KernelSpec, applicants: Tensor, score: Tensor, first: Tensor, capacity: int, lives: Lives, start: int
) -> tuple[Tensor, Tensor]:
    """One share's competition -> (its rejected ones by block [R, n·tile], its holders at the end [R, capacity]).

    Writes the deaths, and its part of the slot tables from column `start` on.
    """
    R, length = applicants.shape
    index, best = segment_best(applicants, score, first, capacity)
    lists, CP = index.shape[1:]
    shift = 1
    while shift < lists:
        index_out, best_out = torch.empty_like(index), torch.zeros_like(best)
        merge_kernel[(lists, R)](index, best, index_out, best_out, lists, shift, capacity, CP=CP, CHUNK=min(CP, 64))
        index, best, shift = index_out, best_out, 2 * shift
    rejected = torch.full_like(applicants, -1)
    n, width = lives.table.shape[1:]
    death_kernel[(lists - 1, R)](
        applicants, score, index, best, lives.death, rejected, lives.table,
        score.shape[1], length, lists, length // spec.block, n, capacity, start, width,
        L=SEGMENT, CP=CP, CHUNK=16, BLOCK=spec.block, TILE=TILE, num_warps=8,
    )  # fmt: skip
    return rejected, index[:, -1, :capacity]


def lifetimes(spec: KernelSpec, applicants: Tensor, scores: list[Tensor], old: Tensor) -> Lives:
    """Who holds a slot when.

    applicants [R, n·tile] int32 are the tokens by the block at which they leave the window, scores a share [R, X], old
    [R, slots] int32 the holders at the start (no columns: none).
    """
    R, length = applicants.shape
    X = scores[0].shape[1] if scores else 1
    lives = Lives(
        applicants.new_full((R, X), length // spec.block),
        applicants.new_full((R, length // TILE, spec.slots), -1),
        applicants,
        applicants[:, :0],
    )
    if not spec.slots:
        return lives
    holders, start, rejected = [], 0, applicants
    for score, (_, capacity) in zip(scores, spec.shares, strict=True):
        if capacity:
            lives.death.fill_(length // spec.block)  # whom an earlier share rejected may live on in this one
            first = old[:, start : start + capacity]
            rejected, last = compete(spec, rejected, score, first, capacity, lives, start)
            holders.append(last)
        start += capacity
    return lives._replace(order=rejected, holders=torch.cat(holders, 1))


def received(
    kernel: Kernel, q: Tensor, k: Tensor, bounds: Tensor, front: int, far: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Attention mass [B, Hk, X] that the store k [B, Hk, X, D] receives from the queries q [B, H, W, D].

    `far` are both as sinks are seen from beyond reach, contiguous; None where nothing is so far back.
    """
    spec, (B, H, W, D), (_, Hk, X, _) = kernel.spec, q.shape, k.shape
    G, n = H // Hk, -(-W // TILE)
    HP = min(power_of_two(G, 1), 2 if q.dtype != torch.float32 else 1)
    parts, reach = -(-G // HP), -(-spec.back * spec.block // TILE) + 1
    out = torch.empty(B, Hk, parts, n, reach, TILE, device=q.device, dtype=torch.float32)
    mass_kernel[(n, B * Hk * parts)](
        q, k, bounds, *(far or (q, k)), out, *q.stride()[:3], *k.stride()[:3],
        kernel.scaling, kernel.softcap or 0.0, W, X, front, n, Hk, spec.reach,
        G=G, HP=HP, D=D, DP=power_of_two(D), TILE=TILE, BLOCK=spec.block, BACK=spec.back, REACH=reach,
        KEYS=TILE * (1 if reach % 2 else 2),
        SINKS=spec.sinks, SP=power_of_two(spec.sinks), SOFTCAP=kernel.softcap is not None,
        FAR=far is not None, PRECISION=precision(q.dtype), num_warps=4 * HP,
    )  # fmt: skip
    piece = out[:, :, 0] if parts == 1 else out.sum(2)
    mass = out.new_zeros(B, Hk, max(0, (reach - 1) * TILE - front) + max(X, front + n * TILE))
    first = max(0, (reach - 1) * TILE - front)
    for part in range(reach):
        start = first + front + (part - reach + 1) * TILE
        mass[:, :, start : start + n * TILE] += piece[:, :, :, part].flatten(2)
    return mass[:, :, first : first + X].contiguous()
