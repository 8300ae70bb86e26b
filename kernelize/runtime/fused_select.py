"""Who holds a slot, and when: attention received, recall error, lifetimes. Nothing here has a gradient.

Lifetimes are found in parallel. A token is held while fewer than `capacity` of those that applied are better, so the
best `capacity` of every segment, merged in levels of groups, tell each segment who stands when it begins; inside
a segment it is counting. KV heads may have capacities of their own: lists and tables are as wide as the largest, and
what is beyond a head's own is empty. Those whom a share rejects are listed by the block of their rejection: this list
is the next share's applicants, and that of the last share the order in which the memory takes tokens in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .fused_triton import Launch, constexpr, jit, power_of_two, precision, tl
from .kept import kept
from .spec import KernelSpec
from .state import Kernel

SEGMENT = 256  # applicants that one program takes in their order
TILE = 64  # queries that are computed together
LEAST_LIST = 64  # places of a list: with fewer nothing is faster, and every size is compiled by itself
ALONE = 16  # lists that are merged at once where there are no more; powers of two
GROUP = 8  # and of more, in groups, the groups, and each list again
FOLDED = 512  # keys of one program that adds up their mass
PLACED = 1024  # programs that list holders by tile from which on one warp for each is faster than four
JUDGED = 64  # holders or applicants of one program that finds deaths
NONE = -0x8000000000000000  # the key of no token
LAUNCH = {"mass": Launch(heads=4, chunk=64, warps=1, stages=2, tile=32)}  # warps for one head, of 16-bit keys
SMALL = {"mass": Launch(heads=1, chunk=64, warps=4, stages=2)}  # of up to 64 channels
WIDE = {"mass": Launch(heads=1, chunk=64, warps=4, stages=2)}


# --- attention received -------------------------------------------------------------------------------------


@jit
def capped(s, cap):
    """cap · tanh(s / cap)."""
    return cap * (2 * tl.sigmoid(2 * s / cap) - 1)


@jit
def scaled_scores(q, k, scaling, softcap, SOFTCAP: constexpr, PRECISION: constexpr):
    """Scores of q [rows, D] on k [keys, D], in units of log 2."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP:
        return capped(s * scaling, softcap) * 1.4426950408889634
    else:
        return s * (scaling * 1.4426950408889634)


@jit
def scores_on(q, k, scaling, softcap, SOFTCAP: constexpr, PRECISION: constexpr):
    """Scores [rows, keys], in units of scaling where nothing caps them."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP:
        s = capped(s * scaling, softcap)
    return s


@jit
def unit_of(scaling, SOFTCAP: constexpr):
    """What scores_on are to be multiplied by, to be in units of log 2."""
    if SOFTCAP:
        return 1.4426950408889634
    else:
        return scaling * 1.4426950408889634


@jit
def seen_by(at, low, until):
    """[rows, keys]: low <= at < until, as one comparison."""
    size = tl.maximum(until - low, 0)
    return (at[:, None] - low[None, :]).to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)[None, :]


@jit
def keys_from(first, key, lo, hi, front, skt, d, D: constexpr, KEYS: constexpr):
    """(coordinates from `first` on, whether there are such keys, these keys)."""
    i = tl.arange(0, KEYS)
    c = first + i
    here = (c >= lo) & (c < hi)
    start = key + (front + first).to(tl.int64) * skt
    k = tl.load(start + (i[:, None] * skt + d[None, :]), mask=here[:, None] & (d < D)[None, :], other=0.0)
    return c, here, k


@jit
def earlier_scores(
    q, k, here, first, at, scaling, softcap,
    BLOCK: constexpr, BACK: constexpr, KEYS: constexpr, SOFTCAP: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Scores on keys before the tile, which is after all of them: −inf where the window is past them."""
    until = tl.where(here, first + (tl.arange(0, KEYS) // BLOCK + 1 + BACK) * BLOCK, 0)
    s = scores_on(q, k, scaling, softcap, SOFTCAP, PRECISION)
    return tl.where(at[:, None] < until[None, :], s, float("-inf"))


@jit
def own_scores(
    q, k, c, here, first, at, scaling, softcap,
    TILE: constexpr, BLOCK: constexpr, BACK: constexpr, SOFTCAP: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """(coordinate of the next block, scores that are −inf where not seen) of the tile's own keys."""
    after = first + (tl.arange(0, TILE) // BLOCK + 1) * BLOCK
    s = scores_on(q, k, scaling, softcap, SOFTCAP, PRECISION)
    if (BACK + 1) * BLOCK >= TILE:  # no window ends within the tile
        seen = at[:, None] >= tl.where(here, c, 1 << 30)[None, :]
    else:
        seen = seen_by(at, c, tl.where(here, after + BACK * BLOCK, c))
    return after, tl.where(seen, s, float("-inf"))


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
    EARLIER: constexpr = (REACH - 1) * TILE
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
    start = (tile + 1 - REACH) * TILE
    c, here, own_k = keys_from(tile * TILE, key, lo, hi, front, skt, d, D, TILE)
    if EARLIER == KEYS:  # all that is read is asked for at once
        _, near, near_k = keys_from(start, key, lo, hi, front, skt, d, D, KEYS)

    m = tl.full([HP * TILE], -1e30, tl.float32)
    l = tl.zeros([HP * TILE], tl.float32)
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
    unit = unit_of(scaling, SOFTCAP)
    after, own = own_scores(q, own_k, c, here, tile * TILE, at, scaling, softcap, TILE, BLOCK, BACK, SOFTCAP, PRECISION)
    later = at[:, None] >= after[None, :]
    pieces = Out + (row.to(tl.int64) * n + tile) * REACH * TILE
    new = tl.maximum(m, tl.max(own, 1) * unit)
    if EARLIER == KEYS:  # nothing is scored twice
        s = earlier_scores(q, near_k, near, start, at, scaling, softcap, BLOCK, BACK, KEYS, SOFTCAP, PRECISION)
        new = tl.maximum(new, tl.max(s, 1) * unit)
        p, own = tl.exp2(s * unit - new[:, None]), tl.exp2(own * unit - new[:, None])
        l = l * tl.exp2(m - new) + tl.sum(p, 1) + tl.sum(own, 1)
        part_of = tl.where(counts, 1 / tl.maximum(l, 1e-30), 0.0)[:, None]
        tl.store(pieces + tl.arange(0, KEYS), tl.sum(p * part_of, 0))
        tl.store(pieces + EARLIER + tl.arange(0, TILE), tl.sum(tl.where(later, own, 0.0) * part_of, 0))
    else:
        l = l * tl.exp2(m - new) + tl.sum(tl.exp2(own * unit - new[:, None]), 1)
        m = new
        for step in range(EARLIER // KEYS):
            x = start + step * KEYS
            _, near, k = keys_from(x, key, lo, hi, front, skt, d, D, KEYS)
            s = earlier_scores(q, k, near, x, at, scaling, softcap, BLOCK, BACK, KEYS, SOFTCAP, PRECISION)
            new = tl.maximum(m, tl.max(s, 1) * unit)
            l = l * tl.exp2(m - new) + tl.sum(tl.exp2(s * unit - new[:, None]), 1)
            m = new
        lse = tl.where(counts, m + tl.log2(tl.maximum(l, 1e-30)), float("inf"))[:, None]
        tl.store(pieces + EARLIER + tl.arange(0, TILE), tl.sum(tl.where(later, tl.exp2(own * unit - lse), 0.0), 0))
        for step in range(EARLIER // KEYS):
            x = start + step * KEYS
            _, near, k = keys_from(x, key, lo, hi, front, skt, d, D, KEYS)
            s = earlier_scores(q, k, near, x, at, scaling, softcap, BLOCK, BACK, KEYS, SOFTCAP, PRECISION)
            tl.store(pieces + step * KEYS + tl.arange(0, KEYS), tl.sum(tl.exp2(s * unit - lse), 0))


@jit
def fold_kernel(Pieces, Out, X, front, n, parts: constexpr, REACH: constexpr, TILE: constexpr, SIZE: constexpr):
    """Adds up what the tiles of queries that reach a key, and the parts of its group, say about it."""
    row = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    c = x - front + REACH * TILE  # never negative where a tile reaches
    total = tl.zeros([SIZE], tl.float32)
    for part in range(parts):
        for step in range(REACH):
            tile = c // TILE - 1 - step  # of queries, in whose reach the key's tile is number step
            at = (((row * parts + part) * n + tile) * REACH + step) * TILE + c % TILE
            total += tl.load(Pieces + at, mask=(c >= 0) & (tile >= 0) & (tile < n), other=0.0)
    tl.store(Out + row * X + x, total, mask=x < X)


# --- lifetimes ----------------------------------------------------------------------------------------------


@jit
def keys_of(score, index):
    """One int64 a token, larger for the better score, then for the earlier token; smaller than any for no token."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 is no worse than 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    return tl.where(index >= 0, key, -0x8000000000000000)


@jit
def token_of(key):
    """The token of a key, −1 for none."""
    token = (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)
    return tl.where(key == -0x8000000000000000, -1, token)


@jit
def counted(theirs, mine):
    """How many of `theirs` are above each of `mine`; in this order a thread counts alone, without the others."""
    return tl.sum((theirs[:, None] > mine[None, :]).to(tl.int32), 0)


@jit
def best_kernel(
    Applicants, Score, Keys, Best, Death, Own, X, length, lists, heads, blocks,
    L: constexpr, CP: constexpr, EMPTY: constexpr,
):  # fmt: skip
    """The keys of a segment's applicants, and its best `capacity` in order as list segment + 1; list 0 if EMPTY.

    All tokens of the store, whether they apply or not, get `blocks` as their death.
    """
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    capacity = tl.load(Own + row % heads)
    at = segment * L + tl.arange(0, L)
    index = tl.load(Applicants + row * length + at, mask=at < length, other=-1)
    score = tl.load(Score + row * X + index, mask=index >= 0, other=0.0)
    key = keys_of(score, index)
    here, out = row * (lists - 1) + segment, (row * lists + segment + 1) * CP
    tl.store(Keys + here * L + tl.arange(0, L), key)
    i, free, none = tl.arange(0, L), tl.arange(0, CP), -0x8000000000000000
    key = tl.where(i < capacity, tl.sort(key, descending=True), none)
    tl.store(Best + out + i, key, mask=i < CP)
    nothing = tl.full([CP], none, tl.int64)
    if CP > L:
        tl.store(Best + out + free, nothing, mask=free >= L)
    if EMPTY:
        tl.store(Best + row * lists * CP + free, nothing, mask=(segment == 0) & (free < CP))
    for start in range(segment * L, X, (lists - 1) * L):
        token = start + tl.arange(0, L)
        tl.store(Death + row * X + token, tl.zeros([L], tl.int32) + blocks, mask=token < X)


@jit
def above(List, key, CP: constexpr, STEPS: constexpr):
    """How many of a list in order, where List points for each key, are no worse than the key."""
    count = tl.zeros_like(key).to(tl.int32)
    for step in tl.static_range(STEPS):
        count += tl.where(tl.load(List + (count + ((CP >> (step + 1)) - 1))) >= key, CP >> (step + 1), 0)
    return count + (tl.load(List + count) >= key).to(tl.int32)


@jit
def put(Out, place, key, capacity, mask, CP: constexpr):
    """Keys into their places of a list of CP, of which `capacity` count."""
    tl.store(Out + place, tl.where(place < capacity, key, -0x8000000000000000), mask=mask & (place < CP))


@jit
def scan_kernel(
    In, Out, Own, in_row, in_step, items, heads, CP: constexpr, STEPS: constexpr, GROUP: constexpr, KEYS: constexpr
):  # fmt: skip
    """Within each group of lists, list i becomes the best of the group's lists up to i.

    A program finds the places of KEYS keys of one list in all later ones. No program waits for another: a place is
    how many are better, and in a list that is in order these are found by halving.
    """
    PARTS: constexpr = CP // KEYS
    item, row = tl.program_id(0) // PARTS, tl.program_id(1).to(tl.int64)
    capacity = tl.load(Own + row % heads)
    source = In + row * in_row
    x = tl.program_id(0) % PARTS * KEYS + tl.arange(0, KEYS)
    other = item // GROUP * GROUP + tl.arange(0, GROUP)
    key = tl.load(source + item * in_step + x)
    # only empty places are equal: those of earlier lists go first, so that every place is written once
    bound = key[None, :] + (other >= item).to(tl.int64)[:, None]
    count = above(source + tl.minimum(other, items - 1)[:, None] * in_step, bound, CP, STEPS)
    place = tl.cumsum(tl.where(other[:, None] == item, x[None, :], count), 0)
    later = (other >= item) & (other < items)
    put(Out + (row * items + other)[:, None] * CP, place, key[None, :], capacity, later[:, None], CP)


@jit
def lift_kernel(
    In, Start, Out, Own, items, groups, heads, CP: constexpr, STEPS: constexpr, GROUP: constexpr, KEYS: constexpr
):  # fmt: skip
    """Adds to each list what all groups before its own have brought."""
    PARTS: constexpr = CP // KEYS
    item, row = tl.program_id(0) // PARTS, tl.program_id(1).to(tl.int64)
    capacity = tl.load(Own + row % heads)
    x = tl.program_id(0) % PARTS * KEYS + tl.arange(0, KEYS)
    mine, out = In + (row * items + item) * CP, Out + (row * items + item) * CP
    key = tl.load(mine + x)
    if item < GROUP:
        tl.store(out + x, key)
    else:
        before = Start + (row * (groups - 1) + item // GROUP - 1) * CP
        put(out, x + above(before, key, CP, STEPS), key, capacity, x >= 0, CP)
        key = tl.load(before + x)
        put(out, x + above(mine, key + 1, CP, STEPS), key, capacity, x >= 0, CP)


@jit
def death_kernel(
    Keys, Lists, Death, Here, Holders, Own,
    X, lists, heads, room, first, width,
    L: constexpr, CP: constexpr, STEPS: constexpr, SIZE: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """When the holders at a segment's start and then its own applicants lose their places, if in this segment.

    A program takes SIZE of them. Here [R, segments, CP + L] is the block, −1 for no token, 2³⁰ for who stays.
    """
    PARTS: constexpr = (CP + L) // SIZE
    segment, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    row = tl.program_id(1).to(tl.int64)
    capacity = tl.load(Own + row % heads)
    i = part * SIZE + tl.arange(0, SIZE)
    none = -0x8000000000000000
    list_here, keys = Lists + (row * lists + segment) * CP, Keys + (row * (lists - 1) + segment) * L
    if part < CP // SIZE:
        mine = tl.load(list_here + i)
        better, arrives = i, tl.zeros([SIZE], tl.int32)
    else:
        mine = tl.load(keys + i - CP)
        better, arrives = above(list_here, mine, CP, STEPS), (i - CP) // BLOCK
    lasts = tl.zeros([SIZE], tl.int32)  # blocks with fewer better than capacity
    for j in range(L // BLOCK):
        better += counted(tl.load(keys + j * BLOCK + tl.arange(0, BLOCK)), mine)
        lasts += (better < capacity).to(tl.int32)
    lasts = tl.maximum(lasts, arrives)  # who is not good enough is rejected on arrival
    stays = 1 << 30
    death = tl.where(mine == none, -1, tl.where(lasts < L // BLOCK, segment * (L // BLOCK) + lasts, stays))
    tl.store(Here + (row * (lists - 1) + segment) * (CP + L) + i, death)
    tl.store(Death + row * X + token_of(mine), death, mask=(death >= 0) & (death < stays))
    if segment == 0:
        last = tl.load(Lists + (row * lists + lists - 1) * CP + i, mask=i < room, other=none)
        tl.store(Holders + row * width + first + i, token_of(last), mask=i < room)


@jit
def place_kernel(
    Applicants, Lists, Here, Rejected, Table,
    length, lists, n, room, first, width,
    L: constexpr, CP: constexpr, BLOCK: constexpr, TILE: constexpr, PARTS: constexpr,
):  # fmt: skip
    """Of one tile: who holds a place at the first block of each of its parts, and whom each of its blocks rejects."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    segment, begin = tile * TILE // L, tile * (TILE // BLOCK)
    i, x = tl.arange(0, CP), segment * L + tl.arange(0, L)
    holder = token_of(tl.load(Lists + (row * lists + segment) * CP + i))
    mine = tl.load(Applicants + row * length + x, mask=x < length, other=-1)
    here = Here + (row * (lists - 1) + segment) * (CP + L)
    death_h, death_x = tl.load(here + i), tl.load(here + CP + tl.arange(0, L))
    for part in range(PARTS):
        block = begin + part * (TILE // PARTS // BLOCK)
        holds_h, holds_x = (death_h > block).to(tl.int32), ((death_x > block) & (x // BLOCK <= block)).to(tl.int32)
        table = Table + ((part * tl.num_programs(1) + row) * n + tile) * width + first
        total = tl.sum(holds_h, 0)
        tl.store(table + tl.cumsum(holds_h, 0) - 1, holder, mask=holds_h > 0)
        tl.store(table + tl.cumsum(holds_x, 0) - 1 + total, mine, mask=holds_x > 0)
        total += tl.sum(holds_x, 0)
        tl.store(table + i, tl.full([CP], -1, tl.int32), mask=(i >= total) & (i < room))
    for j in range(TILE // BLOCK):
        dies_h, dies_x = (death_h == begin + j).to(tl.int32), (death_x == begin + j).to(tl.int32)
        out = Rejected + row * length + (begin + j) * BLOCK
        total = tl.sum(dies_h, 0)
        tl.store(out + tl.cumsum(dies_h, 0) - 1, holder, mask=dies_h > 0)
        tl.store(out + tl.cumsum(dies_x, 0) - 1 + total, mine, mask=dies_x > 0)
        total += tl.sum(dies_x, 0)
        free = tl.arange(0, BLOCK)
        tl.store(out + free, tl.full([BLOCK], -1, tl.int32), mask=free >= total)


class Lives(NamedTuple):
    """What the competition for the slots gave; indices point into the store, −1 is no token."""

    death: Tensor  # [R, X] int32: the block from which no share holds a token any more, `blocks` if none
    table: Tensor  # [parts, R, n, slots] int32: who holds a slot at the first block of each part of a tile
    order: Tensor  # [R, n·tile] int32: the tokens in the order of their deaths, those of block b from b·block on
    holders: Tensor  # [R, slots] int32: who holds a slot at the end


class Room(NamedTuple):
    """The slots of a share."""

    most: int  # of any KV head: the width of lists and tables
    own: Tensor  # [Hk] int32, each KV head's; [1] where all have as many


@kept(512)  # layers may differ
def rooms(spec: KernelSpec, device: torch.device) -> tuple[Room, ...]:
    """The slots of each share."""
    heads = [spec.shares_of(head) for head in range(len(spec.head_slots))] or [spec.shares]
    own = [[shares[s][1] for shares in heads] for s in range(len(spec.shares))]
    with torch.inference_mode(False):  # they outlive this call
        tensors = [torch.tensor(each, dtype=torch.int32).to(device) for each in own]
        return tuple(Room(most, each) for (_, most), each in zip(spec.shares, tensors, strict=True))


def segment_best(
    applicants: Tensor, score: Tensor, first: Tensor, room: Room, death: Tensor, blocks: int
) -> tuple[Tensor, Tensor]:
    """(keys [R, segments · L], the lists of the best): list 0 the holders at the start, i + 1 those of segment i alone.

    Fills `death` [R, X] with `blocks`.
    """
    R, length = applicants.shape
    CP, segments = power_of_two(room.most, LEAST_LIST), -(-length // SEGMENT)
    best = torch.empty(R, segments + 1, CP, dtype=torch.int64, device=score.device)
    keys = torch.empty(R, segments * SEGMENT, dtype=torch.int64, device=score.device)
    if first.shape[1]:
        best[:, 0] = held_keys(first, score, CP)
    best_kernel[(segments, R)](
        applicants, score, keys, best, death, room.own, score.shape[1], length, segments + 1, len(room.own), blocks,
        L=SEGMENT, CP=CP, EMPTY=not first.shape[1], num_warps=4,
    )  # fmt: skip
    return keys, best


def held_keys(index: Tensor, score: Tensor, size: int) -> Tensor:
    """Keys [R, size] of the holders `index` [R, capacity], best first; as `keys_of`."""
    mine = score.gather(1, index.clamp(min=0).long())
    bits = torch.where(mine == 0, 0.0, mine).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    keys = ((ordered << 32) | (0x7FFFFFFF - index).long()).masked_fill(index < 0, NONE)
    keys = torch.nn.functional.pad(keys, (0, size - keys.shape[1]), value=NONE)
    return keys.sort(dim=1, descending=True)[0]


def prefixes(best: Tensor, own: Tensor) -> Tensor:
    """Lists [R, lists, CP]: the best of list i and all before it; in groups, then the groups, then each list again."""
    R, lists, CP = best.shape
    group, keys = (ALONE, 16) if lists <= ALONE else (GROUP, 64)  # few programs are the faster the smaller they are
    programs, groups, out = (lists * (CP // keys), R), -(-lists // group), best.new_empty(R, lists, CP)
    sizes = {"CP": CP, "STEPS": CP.bit_length() - 1, "GROUP": group, "KEYS": keys}
    scan_kernel[programs](best, out, own, *best.stride()[:2], lists, len(own), **sizes)
    if groups == 1:
        return out
    start = prefixes(out[:, group - 1 :: group][:, : groups - 1], own)
    lifted = torch.empty_like(out)
    lift_kernel[programs](out, start, lifted, own, lists, groups, len(own), **sizes)
    return lifted


def compete(
    spec: KernelSpec, applicants: Tensor, score: Tensor, first: Tensor, room: Room, lives: Lives, start: int
) -> Tensor:
    """One share's competition -> its rejected ones by block [R, n·tile].

    Writes the deaths, of all tokens anew (whom an earlier share rejected may live on in this one), and its part of
    slot tables and holders from column `start` on.
    """
    R, length = applicants.shape
    keys, best = segment_best(applicants, score, first, room, lives.death, length // spec.block)
    lists = prefixes(best, room.own)
    (_, count, CP), (parts, _, n, width) = lists.shape, lives.table.shape
    rejected = torch.empty_like(applicants)
    here = applicants.new_empty(R, count - 1, CP + SEGMENT)
    death_kernel[((count - 1) * ((CP + SEGMENT) // JUDGED), R)](
        keys, lists, lives.death, here, lives.holders, room.own,
        score.shape[1], count, len(room.own), room.most, start, width,
        L=SEGMENT, CP=CP, STEPS=CP.bit_length() - 1, SIZE=JUDGED, BLOCK=spec.block, num_warps=2,
    )  # fmt: skip
    place_kernel[(n, R)](
        applicants, lists, here, rejected, lives.table,
        length, count, n, room.most, start, width,
        L=SEGMENT, CP=CP, BLOCK=spec.block, TILE=TILE, PARTS=parts, num_warps=1 if n * R >= PLACED else 4,
    )  # fmt: skip
    return rejected


def lifetimes(spec: KernelSpec, applicants: Tensor, scores: list[Tensor], old: Tensor, parts: int = 1) -> Lives:
    """Who holds a slot when, with slot tables for so many parts of a tile.

    applicants [R, n·tile] int32 are the tokens by the block at which they leave the window, scores a share [R, X], old
    [R, slots] int32 the holders at the start (no columns: none). A spec by KV head is the `spread` one.
    """
    R, length = applicants.shape
    X, blocks = scores[0].shape[1] if scores else 1, length // spec.block
    lives = Lives(
        applicants.new_empty(R, X),
        applicants.new_empty(parts, R, length // TILE, spec.slots),
        applicants,
        applicants.new_empty(R, spec.slots),
    )
    if not spec.slots:
        lives.death.fill_(blocks)
        return lives
    start, rejected = 0, applicants
    for score, room in zip(scores, rooms(spec, applicants.device), strict=True):
        if room.most:
            first = old[:, start : start + room.most]
            rejected = compete(spec, rejected, score, first, room, lives, start)
        start += room.most
    return lives._replace(order=rejected)


def received(
    kernel: Kernel, q: Tensor, k: Tensor, bounds: Tensor, front: int, far: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Attention mass [B, Hk, X] that the store k [B, Hk, X, D] receives from the queries q [B, H, W, D].

    `far` are both as sinks are seen from beyond reach, contiguous; None where nothing is so far back.
    """
    spec, (B, H, W, D), (_, Hk, X, _) = kernel.spec, q.shape, k.shape
    G, window = H // Hk, spec.back * spec.block
    table = WIDE if q.dtype == torch.float32 else SMALL if D <= 64 else LAUNCH
    launch = table["mass"].of_group(G, spec.block, window)
    tile, HP, reach = launch.tile, launch.heads, launch.reach(window)
    n, parts, earlier = -(-W // tile), -(-G // HP), (reach - 1) * tile
    keys = min(earlier & -earlier, launch.chunk) or launch.chunk  # a power of two that divides them
    scores = HP * tile * (tile + keys) // (32 * launch.warps)  # of a thread
    if scores > 96 or keys < earlier or D > 128:  # fewer registers spill
        launch = launch._replace(registers=None)
    out = torch.empty(B, Hk, parts, n, reach, tile, device=q.device, dtype=torch.float32)
    mass_kernel[(n, B * Hk * parts)](
        q, k, bounds, *(far or (q, k)), out, *q.stride()[:3], *k.stride()[:3],
        kernel.scaling, kernel.softcap or 0.0, W, X, front, n, Hk, spec.reach,
        G=G, HP=HP, D=D, DP=power_of_two(D), TILE=tile, BLOCK=spec.block, BACK=spec.back, REACH=reach,
        KEYS=keys, SINKS=spec.sinks, SP=power_of_two(spec.sinks), SOFTCAP=kernel.softcap is not None,
        FAR=far is not None, PRECISION=precision(q.dtype), **launch.options,
    )  # fmt: skip
    mass = torch.empty(B, Hk, X, device=q.device, dtype=torch.float32)
    fold_kernel[(-(-X // FOLDED), B * Hk)](out, mass, X, front, n, parts=parts, REACH=reach, TILE=tile, SIZE=FOLDED)
    return mass
