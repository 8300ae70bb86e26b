"""One decoding step of a layer in two Triton launches: the same as `reference.step`, for any position.

`leave_kernel` lets a block leave the window where one begins (else it ends at once): scores, competition for the slots,
folding into the memory. `read_kernel` writes the token, reads window, sinks, slots and memory, and counts. A program
takes a key head with the query heads of its group; of FEW key heads several programs take one, and the last to come
merges. Positions are on the device, and the state is overwritten where it lies, so that a step can be part of a CUDA
graph.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .feature_maps import Hedgehog
from .fused import DTYPES, unsupported
from .fused_map import LARGEST
from .fused_triton import AMPLE, constexpr, interpreted, jit, power_of_two, shared_memory, tl, triton
from .spec import KernelSpec
from .state import TINY, UNIT_SOFTPLUS, AttentionOutput, Kernel, Rotation, State

TILE, SMALL_TILE = 64, 32  # keys that are read together; where they are wide, or holders of a block that leaves
NARROW = 256  # bytes of a key up to which the larger tile fits into shared memory
MOST_GROUP = 64  # query heads of a key head
FEW = 32  # rows (sequences times key heads) up to which several programs read one, for else most of a GPU has no work
COUNT = 1 << 48  # in `seen`, above the tokens: programs that have read it
KINDS = ("attention", "recall", "value", "forecast")


def lacks(spec: KernelSpec) -> str | None:
    """What the kernels lack for a spec, whatever the tensors."""
    if spec.has_memory and spec.feature_map != "hedgehog":
        return f"feature_map={spec.feature_map!r} is not 'hedgehog'"
    return unsupported(spec)


def supports(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, state: State) -> str | None:
    """Why the step cannot run on these tensors, or None if it can; shapes as in `reference.step`."""
    if triton is None:
        return "Triton is not installed"
    if not q.is_cuda and not interpreted():
        return f"the tensors are on {q.device.type}, not on a GPU"
    if torch.is_grad_enabled():
        return "the step has no backward"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype == state.keys.dtype == state.values.dtype:
        return (
            f"dtypes {q.dtype}, {k.dtype}, {v.dtype} on a state of {state.keys.dtype}: one of 16 or 32 bits is needed"
        )
    D, group = q.shape[-1], q.shape[1] // k.shape[1]
    if v.shape[-1] != D or group > MOST_GROUP:
        return f"heads of {D} with values of {v.shape[-1]} channels, {group} a key head"
    if kernel.map_k is not None and type(kernel.map_k) is not Hedgehog:
        return f"the feature map is {type(kernel.map_k).__name__}, not Hedgehog"
    if kernel.map_k is not None and power_of_two(D) * power_of_two(kernel.map_k.columns) > LARGEST:
        return f"heads of {D} with {kernel.map_k.feature_dim} features do not fit into registers"
    if not all(x.is_contiguous() for x in state):
        return "the state is not contiguous"
    return lacks(kernel.spec)


# --- a block leaves the window ------------------------------------------------------------------------------


@jit
def projected(x, Weight, h, d, c, D: constexpr, C: constexpr, PRECISION: constexpr):
    """x [rows, D] by the head's float32 matrix; a 16-bit x takes it as the sum of two 16-bit matrices."""
    w = tl.load(Weight + h * D * C + d[:, None] * C + c[None, :], mask=(d < D)[:, None] & (c < C)[None, :], other=0.0)
    if x.dtype == tl.float32:
        return tl.dot(x, w.to(tl.float32), input_precision=PRECISION)
    high = w.to(x.dtype)
    return tl.dot(x, high) + tl.dot(x, (w - high.to(tl.float32)).to(x.dtype))


@jit
def softmax_rows(z):
    e = tl.exp(z - tl.max(z, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@jit
def better(score, pos, other_score, other_pos):
    return (score > other_score) | ((score == other_score) & (pos < other_pos))


@jit
def hedgehog(x, Weight, h, d, c, scale, D: constexpr, C: constexpr, PRECISION: constexpr):
    """Both halves [rows, C] of the features of x [rows, D]."""
    z = projected(x, Weight, h, d, c, D, C, PRECISION) * scale
    inside = (c < C)[None, :]
    return softmax_rows(tl.where(inside, z, float("-inf"))), softmax_rows(tl.where(inside, -z, float("-inf")))


@jit
def rows_at(X, index, here, d, D: constexpr):
    """X [.., D] at the rows `index`, zero where not `here`."""
    return tl.load(X + index[:, None] * D + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0)


@jit
def slots_of(Owned, row, b, h, kv_heads, share, places, PACKED: constexpr):
    """(number of the head's first slot, counted through all rows; slots of its first share; its slots)."""
    number, one, all_slots = row * places, share, places
    if PACKED:
        number = b * kv_heads * places + tl.load(Owned + h * 3)
        one, all_slots = tl.load(Owned + h * 3 + 1), tl.load(Owned + h * 3 + 2)
    return number, one, all_slots


@jit
def slot_at(slots, number, i, places, SINKS: constexpr, RING: constexpr, PACKED: constexpr):
    """Where the position axes of all rows have the head's slot i; its first is at `slots` unless heads share rows."""
    if PACKED:
        at = number + i
        return at // places * (SINKS + RING + places) + SINKS + RING + at % places
    else:
        return slots + i


@jit
def put_rows(X, index, x, here, d, D: constexpr):
    tl.store(X + index[:, None] * D + d[None, :], x, mask=here[:, None] & (d < D)[None, :])


@jit
def half_memory(Memory, f, inside, d, D: constexpr):
    """(numerators [F, D], normalisers [F]) of the features f of one head's memory."""
    at = Memory + f[:, None] * (D + 1) + d[None, :]
    return (
        tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0),
        tl.load(Memory + f * (D + 1) + D, mask=inside, other=0.0),
    )


@jit
def fold(Memory, phi, lost, value, factor, f, inside, d, D: constexpr):
    """Memory · factor + Σ phi · lost · [value, 1] for one half of the features."""
    m, n = half_memory(Memory, f, inside, d, D)
    weighted = phi * lost[:, None]
    m = m * factor + tl.dot(tl.trans(weighted), value, input_precision="ieee")
    tl.store(Memory + f[:, None] * (D + 1) + d[None, :], m, mask=inside[:, None] & (d < D)[None, :])
    tl.store(Memory + f * (D + 1) + D, n * factor + tl.sum(weighted, 0), mask=inside)


@jit
def recall_error(
    Keys, Values, Pos, Decay, Memory, Wk, slots, number, own, places, h, up, down, value, scale, d, c,
    D: constexpr, C: constexpr, SINKS: constexpr, RING: constexpr, PACKED: constexpr,
    TILE: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """‖v − what the memory and the slot holders answer‖ of the tokens whose features are up and down [rows, C]."""
    m, n = half_memory(Memory, c, c < C, d, D)
    total = tl.dot(up, m, input_precision="ieee")
    norm = tl.sum(up * n[None, :], 1)
    m, n = half_memory(Memory, C + c, c < C, d, D)
    total += tl.dot(down, m, input_precision="ieee")
    norm += tl.sum(down * n[None, :], 1)
    for first in range(0, own, TILE):
        i = first + tl.arange(0, TILE)
        slot = slot_at(slots, number, i, places, SINKS, RING, PACKED)
        held = tl.load(Pos + slot, mask=i < own, other=-1) >= 0
        age = tl.load(Decay + slot, mask=held, other=float("-inf"))
        key = rows_at(Keys, slot, held, d, D)
        held_up, held_down = hedgehog(key, Wk, h, d, c, scale, D, C, PRECISION)
        weight = tl.dot(up, tl.trans(held_up), input_precision="ieee")
        weight += tl.dot(down, tl.trans(held_down), input_precision="ieee")
        weight = weight * tl.exp(age)[None, :]
        total += tl.dot(weight, rows_at(Values, slot, held, d, D).to(tl.float32), input_precision="ieee")
        norm += tl.sum(weight, 1)
    filled = norm > 1.1754943508222875e-38
    recalled = tl.where(filled[:, None], total / tl.where(filled, norm, 1.0)[:, None], 0.0)
    miss = value - recalled
    return tl.sqrt(tl.sum(miss * miss, 1))


@jit
def direction(x, D: constexpr, TINY: constexpr):
    """x [rows, D] float32, of mean square one."""
    return x / tl.sqrt(tl.sum(x * x, 1) / D + TINY)[:, None]


@jit
def forecast_of(
    mass, error, norm, key, value, Skip, In, Out, h, d,
    D: constexpr, RECALL: constexpr, HIDDEN: constexpr, TINY: constexpr,
):  # fmt: skip
    """`state.forecast` of tokens [rows] with these statistics and key and value [rows, D]."""
    LAST: constexpr = 3 if RECALL else 2  # the column of ones
    SIZE: constexpr = LAST + 1 + 2 * D
    w, skip, into = tl.arange(0, HIDDEN), Skip + h * SIZE, In + h * SIZE * HIDDEN
    mass, norm = tl.log(mass + TINY), tl.log(norm + TINY)
    total = mass * tl.load(skip) + norm * tl.load(skip + LAST - 1) + tl.load(skip + LAST)
    hidden = (
        mass[:, None] * tl.load(into + w)[None, :] + norm[:, None] * tl.load(into + (LAST - 1) * HIDDEN + w)[None, :]
    )
    hidden += tl.load(into + LAST * HIDDEN + w)[None, :]
    if RECALL:
        error = tl.log(error + TINY)
        total += error * tl.load(skip + 1)
        hidden += error[:, None] * tl.load(into + HIDDEN + w)[None, :]
    for side in tl.static_range(2):
        x = direction(key.to(tl.float32) if side == 0 else value, D, TINY)
        at, here = LAST + 1 + side * D + d, d < D
        total += tl.sum(x * tl.load(skip + at, mask=here, other=0.0)[None, :], 1)
        weight = tl.load(into + at[:, None] * HIDDEN + w[None, :], mask=here[:, None], other=0.0)
        hidden += tl.dot(x, weight, input_precision="ieee")
    hidden = hidden * tl.sigmoid(hidden)
    return total + tl.sum(hidden * tl.load(Out + h * HIDDEN + w)[None, :], 1)


@jit
def score_of(
    mass, error, key, value, pos, aging, Skip, In, Out, h, d,
    KIND: constexpr, AGING: constexpr, D: constexpr, RECALL: constexpr, HIDDEN: constexpr, TINY: constexpr,
):  # fmt: skip
    if KIND == 0:
        score = mass
        if AGING:
            score = tl.log(mass + TINY) + tl.where(pos > 0, pos, 0).to(tl.float32) / aging
    elif KIND == 1:
        score = error
    else:
        score = tl.sqrt(tl.sum(value * value, 1))
        if KIND == 3:
            score = forecast_of(mass, error, score, key, value, Skip, In, Out, h, d, D, RECALL, HIDDEN, TINY)
    return score


@jit
def compete(
    Score, Pos, slots, number, capacity, places, score, pos, applies,
    SHARE: constexpr, SHARES: constexpr, SP: constexpr, SINKS: constexpr, RING: constexpr, PACKED: constexpr,
    TILE: constexpr,
):  # fmt: skip
    """(slot of the share that a newcomer wins, slot whose holder it displaces there), −1 for none.

    The share's first slot is at `slots` in Pos, see `slot_at`, and its `number` that of the row in Score.
    """
    i = tl.arange(0, SP)
    here = slot_at(slots, number, i, places, SINKS, RING, PACKED)
    held_pos = tl.load(Pos + here, mask=i < capacity, other=-1)
    held = held_pos >= 0
    held_score = tl.load(Score + (number + i) * SHARES + SHARE, mask=held, other=0.0)
    beats = better(score[:, None], pos[:, None], held_score[None, :], held_pos[None, :]) & applies[:, None]
    rank = tl.sum((beats & held[None, :]).to(tl.int32), 0)  # of a holder
    mine = tl.sum((held[None, :] & (beats == 0)).to(tl.int32), 1)  # of a newcomer
    among = better(score[None, :], pos[None, :], score[:, None], pos[:, None]) & applies[None, :]
    mine += tl.sum(among.to(tl.int32), 1)
    for first in range(0, capacity, TILE):
        j = first + tl.arange(0, TILE)
        slot = slot_at(slots, number, j, places, SINKS, RING, PACKED)
        other_pos = tl.load(Pos + slot, mask=j < capacity, other=-1)
        other = tl.load(Score + (number + j) * SHARES + SHARE, mask=other_pos >= 0, other=0.0)
        above = better(other[:, None], other_pos[:, None], held_score[None, :], held_pos[None, :])
        rank += tl.sum((above & (other_pos >= 0)[:, None]).to(tl.int32), 0)
    wins = applies & (mine < capacity)
    out = held & (rank >= capacity)
    free = (i < capacity) & ((held == 0) | out)
    turn = (tl.cumsum(wins.to(tl.int32), 0) - 1)[:, None]
    takes = wins[:, None] & free[None, :] & (turn == (tl.cumsum(free.to(tl.int32), 0) - 1)[None, :])
    drops = wins[:, None] & out[None, :] & (turn == (tl.cumsum(out.to(tl.int32), 0) - 1)[None, :])
    place = tl.sum(tl.where(takes, i[None, :] + 1, 0), 1) - 1
    return place, tl.sum(tl.where(drops, i[None, :] + 1, 0), 1) - 1


@jit
def put_entries(Pos, Decay, Mass, Score, Keys, Values, slot, score_at, won, pos, decay, s0, s1, k, v, d,
                SHARES: constexpr, D: constexpr):  # fmt: skip
    """Newcomers that have `won` move into their slots."""
    tl.store(Pos + slot, pos, mask=won)
    tl.store(Decay + slot, decay, mask=won)
    tl.store(Mass + slot, tl.zeros_like(decay), mask=won)
    tl.store(Score + score_at * SHARES, s0, mask=won)
    if SHARES == 2:
        tl.store(Score + score_at * SHARES + 1, s1, mask=won)
    put_rows(Keys, slot, k, won, d, D)
    put_rows(Values, slot, v, won, d, D)


@jit
def leave_kernel(
    Keys, Values, Pos, Decay, Mass, Score, Memory, Seen, Valid, Wk, Owned, Skip, In, Out, Frequencies, Arrived, scale,
    aging, kv_heads, share, places,
    HAS_VALID: constexpr, MEMORY: constexpr, D: constexpr, DP: constexpr, C: constexpr, CP: constexpr,
    SINKS: constexpr, RING: constexpr, SLOTS: constexpr, PACKED: constexpr, SHARES: constexpr,
    SP0: constexpr, SP1: constexpr, BLOCK: constexpr, BP: constexpr, KIND0: constexpr, KIND1: constexpr,
    RECALL: constexpr, AGING: constexpr, HIDDEN: constexpr, TURNED: constexpr, WIDTH: constexpr,
    NEIGHBOURS: constexpr, TILE: constexpr, TINY: constexpr, PRECISION: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tl.store(Arrived + row, 0)
    b, h = row // kv_heads, row % kv_heads
    seen = tl.load(Seen + b)
    begins = (seen >= RING) & (seen % BLOCK == 0)
    if HAS_VALID:
        begins = begins & (tl.load(Valid + b) != 0)
    if begins:
        base = row * (SINKS + RING + places)
        slots = base + SINKS + RING
        number, one, own_slots = slots_of(Owned, row, b, h, kv_heads, share, places, PACKED)
        memory = Memory + row * (2 * C * (D + 1))
        d, c, j = tl.arange(0, DP), tl.arange(0, CP), tl.arange(0, BP)
        entry = base + SINKS + seen % RING + j
        pos = tl.load(Pos + entry, mask=j < BLOCK, other=-1)
        fresh = pos >= 0
        own = tl.load(Decay + entry, mask=fresh, other=0.0)
        total = tl.sum(own, 0)
        decay = total - tl.cumsum(own, 0)  # what the later tokens of the block put on each
        key, raw = rows_at(Keys, entry, fresh, d, D), rows_at(Values, entry, fresh, d, D)
        value = raw.to(tl.float32)
        mass = tl.load(Mass + entry, mask=fresh, other=0.0)
        error = mass
        if RECALL:
            up, down = hedgehog(key, Wk, h, d, c, scale, D, C, PRECISION)
            error = recall_error(
                Keys, Values, Pos, Decay, memory, Wk, slots, number, own_slots, places, h, up, down, value, scale, d, c,
                D, C, SINKS, RING, PACKED, TILE, PRECISION,
            )  # fmt: skip
        bare = key  # as the forecast sees it, without its position
        if TURNED:
            other = rows_at(Keys, entry, fresh, partner_of(d, WIDTH, NEIGHBOURS), D).to(tl.float32)
            bare = turned(key.to(tl.float32), other, pos, 0.0, Frequencies, d, WIDTH, NEIGHBOURS)
        s0 = score_of(mass, error, bare, value, pos, aging, Skip, In, Out, h, d, KIND0, AGING, D, RECALL, HIDDEN, TINY)
        s1 = s0
        # who gets a slot; `source`, `at`, `age`: entry, position and decay of who still applies
        gone, source, at, age = fresh, entry, pos, decay
        place0 = tl.full([BP], -1, tl.int32)
        place1 = tl.full([BP], -1, tl.int32)
        moved_key, moved_raw, moved_at, moved_age, moved_s0, moved_s1 = key, raw, pos, decay, s0, s0
        if SLOTS:
            place0, dropped = compete(
                Score, Pos, slots, number, one, places, s0, pos, fresh, 0, SHARES, SP0, SINKS, RING, PACKED, TILE
            )
            out = dropped >= 0
            gone = (fresh & (place0 < 0)) | out
            source = tl.where(out, slot_at(slots, number, dropped, places, SINKS, RING, PACKED), entry)
            at = tl.where(out, tl.load(Pos + source, mask=out, other=-1), pos)
            age = tl.where(out, tl.load(Decay + source, mask=out, other=0.0) + total, decay)
        if SHARES == 2:
            s1 = score_of(
                mass, error, bare, value, pos, aging, Skip, In, Out, h, d, KIND1, AGING, D, RECALL, HIDDEN, TINY
            )
            held = (number + dropped) * SHARES
            moved_s0 = tl.where(out, tl.load(Score + held, mask=out, other=0.0), s0)
            moved_s1 = tl.where(out, tl.load(Score + held + 1, mask=out, other=0.0), s1)
            moved_at, moved_age = at, age
            moved_key, moved_raw = rows_at(Keys, source, gone, d, D), rows_at(Values, source, gone, d, D)
            place1, dropped = compete(
                Score, Pos, slots + one, number + one, own_slots - one, places, moved_s1, at, gone, 1, SHARES, SP1,
                SINKS, RING, PACKED, TILE,
            )  # fmt: skip
            out = dropped >= 0
            gone = (gone & (place1 < 0)) | out
            source = tl.where(out, slot_at(slots, number, one + dropped, places, SINKS, RING, PACKED), source)
            at = tl.where(out, tl.load(Pos + source, mask=out, other=-1), at)
            age = tl.where(out, tl.load(Decay + source, mask=out, other=0.0) + total, age)
        gone_key, gone_value = rows_at(Keys, source, gone, d, D), rows_at(Values, source, gone, d, D).to(tl.float32)
        tl.debug_barrier()  # all is read; now it is overwritten
        if MEMORY:
            up, down = hedgehog(gone_key, Wk, h, d, c, scale, D, C, PRECISION)
            lost, factor = tl.where(gone, tl.exp(age), 0.0), tl.exp(total)
            fold(memory, up, lost, gone_value, factor, c, c < C, d, D)
            fold(memory, down, lost, gone_value, factor, C + c, c < C, d, D)
        for first in range(0, own_slots, TILE):
            i = first + tl.arange(0, TILE)
            slot = slot_at(slots, number, i, places, SINKS, RING, PACKED)
            holds = tl.load(Pos + slot, mask=i < own_slots, other=-1) >= 0
            tl.store(Decay + slot, tl.load(Decay + slot, mask=holds, other=0.0) + total, mask=holds)
        tl.debug_barrier()
        if SHARES == 2:
            slot = slot_at(slots, number, one + place1, places, SINKS, RING, PACKED)
            put_entries(
                Pos, Decay, Mass, Score, Keys, Values, slot, number + one + place1, place1 >= 0,
                moved_at, moved_age, moved_s0, moved_s1, moved_key, moved_raw, d, SHARES, D,
            )  # fmt: skip
        if SLOTS:
            slot = slot_at(slots, number, place0, places, SINKS, RING, PACKED)
            put_entries(
                Pos, Decay, Mass, Score, Keys, Values, slot, number + place0, place0 >= 0,
                pos, decay, s0, s1, key, raw, d, SHARES, D,
            )  # fmt: skip
        left = j < BLOCK
        tl.store(Pos + entry, tl.full([BP], -1, tl.int64), mask=left)
        tl.store(Decay + entry, tl.zeros_like(decay), mask=left)
        tl.store(Mass + entry, tl.zeros_like(decay), mask=left)
        put_rows(Keys, entry, tl.zeros_like(key), left, d, D)
        put_rows(Values, entry, tl.zeros_like(raw), left, d, D)


# --- a token comes ------------------------------------------------------------------------------------------


@jit
def product(p, v):
    """p [rows, keys] float32 by v: exact to float32, of 16-bit values in two products on the tensor cores."""
    if v.dtype == tl.float32:
        return tl.dot(p, v, input_precision="ieee")
    high = p.to(v.dtype)
    return tl.dot(high, v) + tl.dot((p - high.to(tl.float32)).to(v.dtype), v)


@jit
def turned(x, other, start, end, Frequencies, d, WIDTH: constexpr, NEIGHBOURS: constexpr):
    """Channels x [rows, D] moved from positions `start` [rows] to `end`; `other` are those of `partner_of`."""
    second = d % 2 == 1 if NEIGHBOURS else d >= WIDTH // 2
    pair = d // 2 if NEIGHBOURS else d % (WIDTH // 2)
    frequency = tl.load(Frequencies + pair, mask=d < WIDTH, other=0.0)[None, :]
    here, there = start.to(tl.float32)[:, None] * frequency, end * frequency
    # by addition theorems: what the model turned by a coarse angle is turned back by the same
    cos = tl.cos(here) * tl.cos(there) + tl.sin(here) * tl.sin(there)
    sin = tl.cos(here) * tl.sin(there) - tl.sin(here) * tl.cos(there)
    return x * cos + tl.where(second[None, :], other, -other) * sin


@jit
def partner_of(d, WIDTH: constexpr, NEIGHBOURS: constexpr):
    """The channel that each of the first WIDTH turns with; any other is its own."""
    partner = d + 1 - 2 * (d % 2) if NEIGHBOURS else (d + WIDTH // 2) % WIDTH
    return tl.where(d < WIDTH, partner, d)


@jit
def tile_scores(q, Keys, Pos, place, t, limit, entry, seen, new_key, d, scaling, softcap,
                far_q, Frequencies, reach, D: constexpr, SOFTCAP: constexpr, FAR: constexpr, WIDTH: constexpr,
                NEIGHBOURS: constexpr):  # fmt: skip
    """(scores [heads, keys], −inf where there is no token, positions [keys]); the token itself stands at `entry`.

    Those of the head's entries t, which are at `place` in the position axes of all rows.
    """
    here = t < limit
    key = tl.where((t == entry)[:, None], new_key[None, :], rows_at(Keys, place, here, d, D))
    pos = tl.where(t == entry, seen, tl.load(Pos + place, mask=here, other=-1))
    s = tl.dot(q, tl.trans(key), input_precision="ieee") * scaling
    if FAR:  # noqa: SIM102  this is known when the kernel is compiled, the next when it runs
        if seen > reach:
            other = rows_at(Keys, place, here, partner_of(d, WIDTH, NEIGHBOURS), D).to(tl.float32)
            far_k = turned(key.to(tl.float32), other, pos, 0.0, Frequencies, d, WIDTH, NEIGHBOURS)
            far = tl.dot(far_q, tl.trans(far_k), input_precision="ieee") * scaling
            s = tl.where((seen - pos > reach)[None, :], far, s)
    if SOFTCAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
    return tl.where((here & (pos >= 0))[None, :], s, float("-inf")), pos


@jit
def absorb(s, value, m, l, acc):
    """One step of an online softmax; m begins at a finite number, so that no row is NaN."""
    new = tl.maximum(m, tl.max(s, 1))
    p, shrink = tl.exp(s - new[:, None]), tl.exp(m - new)
    return new, l * shrink + tl.sum(p, 1), acc * shrink[:, None] + product(p, value)


@jit
def ask_memory(z, Memory, d, c, scale, D: constexpr, C: constexpr):
    """(numerators [GP, D], normalisers [GP]) that the memory answers to queries of the logits z [GP, CP]."""
    z, inside = z * scale, (c < C)[None, :]
    up, down = softmax_rows(tl.where(inside, z, float("-inf"))), softmax_rows(tl.where(inside, -z, float("-inf")))
    m, n = half_memory(Memory, c, c < C, d, D)
    total, norm = tl.dot(up, m, input_precision="ieee"), tl.sum(up * n[None, :], 1)
    m, n = half_memory(Memory, C + c, c < C, d, D)
    return total + tl.dot(down, m, input_precision="ieee"), norm + tl.sum(down * n[None, :], 1)


@jit
def logits_of(
    q, Wq, head, g, d, c, G: constexpr, GP: constexpr, CP: constexpr, D: constexpr, C: constexpr, PRECISION: constexpr
):
    """[GP, CP] of the group's queries [GP, D]: every head has a map of its own, all rows go by it, its own counts."""
    z = tl.zeros([GP, CP], tl.float32)
    for i in range(G):
        z = tl.where((g == i)[:, None], projected(q, Wq, head + i, d, c, D, C, PRECISION), z)
    return z


@jit
def merge(m, l, acc, total, norm, SinkLogit, LogGate, head, g, SINK: constexpr, MEMORY: constexpr, G: constexpr):
    """y [heads, D] of a softmax and what the memory answers, under one normaliser."""
    filled = l > 0.0
    lse = tl.where(filled, m + tl.log(tl.where(filled, l, 1.0)), -1e30)
    y = acc / tl.where(filled, l, 1.0)[:, None]
    if SINK:
        sink = tl.load(SinkLogit + head + g, mask=g < G, other=0.0).to(tl.float32)
        y = y * tl.sigmoid(lse - sink)[:, None]
        top = tl.maximum(lse, sink)
        lse = top + tl.log(tl.exp(lse - top) + tl.exp(sink - top))
    if MEMORY:
        any_there = norm > 1.1754943508222875e-38
        safe = tl.where(any_there, norm, 1.0)
        gate = tl.load(LogGate + head + g, mask=g < G, other=0.0).to(tl.float32)
        weight = tl.where(any_there, tl.sigmoid(lse - tl.log(safe) - gate), 1.0)[:, None]
        y = weight * y + (1.0 - weight) * total / safe[:, None]
    return y


@jit
def say(Said, m, l, acc, here, g, d, D: constexpr):
    """Stores a part's maximum, sum and numerators where heads are `here`."""
    at = Said + g * (D + 2)
    tl.store(at[:, None] + d[None, :], acc, mask=here[:, None] & (d < D)[None, :])
    tl.store(at + D, m, mask=here)
    tl.store(at + D + 1, l, mask=here)


@jit
def said(Said, g, d, G: constexpr, D: constexpr):
    """(maximum, sum, numerators) of a part."""
    at = Said + g * (D + 2)
    acc = tl.load(at[:, None] + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
    return tl.load(at + D, mask=g < G, other=-1e30), tl.load(at + D + 1, mask=g < G, other=0.0), acc


@jit
def receive(Mass, base, s, pos, t, entry, seen, valid, m, l, inside,
            SINKS: constexpr, LOCAL: constexpr, BLOCK: constexpr):  # fmt: skip
    """Adds the attention that earlier blocks of the window receive, of scores s [heads, keys] under m and l."""
    p = tl.exp(s - m[:, None]) / tl.where(l > 0.0, l, 1.0)[:, None]
    got = tl.sum(tl.where(inside[:, None], p, 0.0), 0)
    ring = (t >= SINKS) & (t < LOCAL) & (valid != 0)
    earlier = (pos >= 0) & (pos // BLOCK < seen // BLOCK)
    mass = tl.where(t == entry, 0.0, tl.load(Mass + base + t, mask=ring, other=0.0))
    tl.store(Mass + base + t, mass + tl.where(earlier, got, 0.0), mask=ring)


@jit
def softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@jit
def read_kernel(
    Q, K, V, Y, Keys, Values, Pos, Decay, Mass, Memory, Seen, Valid, Wq, LogGate, LogRate, DecayWeight, SinkLogit,
    Frequencies, Owned, Said, Arrived, q_row, q_head, k_row, k_head, v_row, v_head, scaling, scale, softcap, reach,
    kv_heads, places, chunks,
    HAS_VALID: constexpr, MEMORY: constexpr, RATE: constexpr, MASS: constexpr, SOFTCAP: constexpr, SINK: constexpr,
    G: constexpr, GP: constexpr, D: constexpr, DP: constexpr, C: constexpr, CP: constexpr,
    SINKS: constexpr, RING: constexpr, PACKED: constexpr, BLOCK: constexpr, TILE: constexpr, SPLIT: constexpr,
    COUNT: constexpr, UNIT: constexpr, FAR: constexpr, WIDTH: constexpr, NEIGHBOURS: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """SPLIT: a program each does window and sinks, a tile of slots, and the memory for one head; the last to arrive
    merges what they have said. Else one program does all."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = row // kv_heads, row % kv_heads
    seen = tl.load(Seen + b) % COUNT
    valid = 1
    if HAS_VALID:
        valid = (tl.load(Valid + b) != 0).to(tl.int32)
    base = row * (SINKS + RING + places)
    d, g = tl.arange(0, DP), tl.arange(0, GP)
    entry = tl.where(seen < SINKS, seen, SINKS + seen % RING)
    entry = tl.where(valid != 0, entry, -1)
    key = tl.load(K + b * k_row + h * k_head + d, mask=d < D, other=0.0)
    head = h * G
    at, there = Q + b * q_row + (head + g)[:, None] * q_head, (g < G)[:, None] & (d < D)[None, :]
    q = tl.load(at + d[None, :], mask=there, other=0.0)
    far_q = q.to(tl.float32)
    if FAR:
        other = tl.load(at + partner_of(d, WIDTH, NEIGHBOURS)[None, :], mask=there, other=0.0).to(tl.float32)
        far_q = turned(far_q, other, seen + 0 * g, reach + 0.0, Frequencies, d, WIDTH, NEIGHBOURS)
    m = tl.full([GP], -1e30, tl.float32)
    l = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)
    LOCAL: constexpr = SINKS + RING

    if part == 0:
        # the token is written
        value = tl.load(V + b * v_row + h * v_head + d, mask=d < D, other=0.0)
        rate = 0.0
        if RATE > 0:
            rate = -tl.exp(tl.load(LogRate + h).to(tl.float32))
        if RATE == 2:
            w = DecayWeight + h * 2 * D + d
            x = tl.sum(tl.load(w, mask=d < D, other=0.0).to(tl.float32) * key.to(tl.float32), 0)
            x += tl.sum(tl.load(w + D, mask=d < D, other=0.0).to(tl.float32) * value.to(tl.float32), 0)
            rate = rate * softplus(x + UNIT)
        if valid != 0:
            tl.store(Keys + (base + entry) * D + d, key, mask=d < D)
            tl.store(Values + (base + entry) * D + d, value, mask=d < D)
            tl.store(Pos + base + entry, seen)
            tl.store(Decay + base + entry, rate)

        # window and sinks
        t = tl.arange(0, TILE)
        first_s, first_pos = tile_scores(q, Keys, Pos, base + t, t, LOCAL, entry, seen, key, d, scaling, softcap,
                                         far_q, Frequencies, reach, D, SOFTCAP, FAR, WIDTH, NEIGHBOURS)  # fmt: skip
        old = tl.where((t == entry)[:, None], value[None, :], rows_at(Values, base + t, t < LOCAL, d, D))
        m, l, acc = absorb(first_s, old, m, l, acc)
        for first in range(TILE, LOCAL, TILE):
            t = first + tl.arange(0, TILE)
            s, _ = tile_scores(q, Keys, Pos, base + t, t, LOCAL, entry, seen, key, d, scaling, softcap,
                               far_q, Frequencies, reach, D, SOFTCAP, FAR, WIDTH, NEIGHBOURS)  # fmt: skip
            old = tl.where((t == entry)[:, None], value[None, :], rows_at(Values, base + t, t < LOCAL, d, D))
            m, l, acc = absorb(s, old, m, l, acc)

        # attention received by the window's earlier blocks
        if MASS:
            receive(Mass, base, first_s, first_pos, tl.arange(0, TILE), entry, seen, valid, m, l, g < G,
                    SINKS, LOCAL, BLOCK)  # fmt: skip
            for first in range(TILE, LOCAL, TILE):
                t = first + tl.arange(0, TILE)
                s, pos = tile_scores(q, Keys, Pos, base + t, t, LOCAL, entry, seen, key, d, scaling, softcap,
                                     far_q, Frequencies, reach, D, SOFTCAP, FAR, WIDTH, NEIGHBOURS)  # fmt: skip
                receive(Mass, base, s, pos, t, entry, seen, valid, m, l, g < G, SINKS, LOCAL, BLOCK)

    # slots
    number, _one, own_slots = slots_of(Owned, row, b, h, kv_heads, places, places, PACKED)
    begin, end = 0, own_slots
    if SPLIT:
        begin = tl.minimum(tl.where(part > 0, part - 1, chunks) * TILE, own_slots)
        end = tl.minimum(begin + TILE, own_slots)
        if part > chunks:
            end = begin
    for first in range(begin, end, TILE):
        t = LOCAL + first + tl.arange(0, TILE)
        place = slot_at(base + LOCAL, number, t - LOCAL, places, SINKS, RING, PACKED)
        s, _ = tile_scores(q, Keys, Pos, place, t, LOCAL + own_slots, entry, seen, key, d, scaling, softcap,
                           far_q, Frequencies, reach, D, SOFTCAP, FAR, WIDTH, NEIGHBOURS)  # fmt: skip
        m, l, acc = absorb(s, rows_at(Values, place, t < LOCAL + own_slots, d, D), m, l, acc)

    # the memory
    c, memory = tl.arange(0, CP), Memory + row * (2 * C * (D + 1))
    out = Y + (b * kv_heads * G + head + g)[:, None] * D + d[None, :]
    total, norm = acc, l
    last = True
    if SPLIT:
        one = Said + row * (chunks + 2) * (G * (D + 2))
        if part <= chunks:
            say(one + part * (G * (D + 2)), m, l, acc, g < G, g, d, D)
        elif MEMORY:
            own = part - chunks - 1
            z = projected(q, Wq, head + own, d, c, D, C, PRECISION)
            total, norm = ask_memory(z, memory, d, c, scale, D, C)
            say(one + (chunks + 1) * (G * (D + 2)), norm, norm, total, g == own, g, d, D)
        tl.debug_barrier()  # all of it is said
        last = tl.atomic_add(Arrived + row, 1) == tl.num_programs(1) - 1
        if last:
            m, l, acc = said(one, g, d, G, D)
            for p in range(1, chunks + 1):
                more_m, more_l, more = said(one + p * (G * (D + 2)), g, d, G, D)
                new = tl.maximum(m, more_m)
                near, far = tl.exp(m - new), tl.exp(more_m - new)
                m, l, acc = new, l * near + more_l * far, acc * near[:, None] + more * far[:, None]
            if MEMORY:
                norm, _l, total = said(one + (chunks + 1) * (G * (D + 2)), g, d, G, D)
    elif MEMORY:
        z = logits_of(q, Wq, head, g, d, c, G, GP, CP, D, C, PRECISION)
        total, norm = ask_memory(z, memory, d, c, scale, D, C)
    if last:
        y = merge(m, l, acc, total, norm, SinkLogit, LogGate, head, g, SINK, MEMORY, G)
        tl.store(out, y.to(Y.dtype.element_ty), mask=there)
        # the last program of a sequence counts the token, when all have read the number
        tl.debug_barrier()
        before = tl.atomic_add(Seen + b, COUNT)
        if before // COUNT == kv_heads - 1:
            tl.store(Seen + b, seen + valid)


# --- the call -----------------------------------------------------------------------------------------------


@torch.no_grad()
def step(
    q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, state: State, valid: Tensor | None = None, in_place: bool = False
) -> tuple[AttentionOutput, State]:
    """As `reference.step`, without the branches; with `in_place` the state given is overwritten."""
    with torch.cuda.device_of(q):
        state = state if in_place else state.map(torch.clone)
        y = torch.empty_like(q, memory_format=torch.contiguous_format)  # [B, H, 1, D]
        common = sizes(kernel, q, k, state)
        valid = None if valid is None else valid.contiguous()
        arrived = torch.empty(state.pos.shape[0] * state.pos.shape[1], device=q.device, dtype=torch.int32)
        leave(arrived, kernel, state, valid, common)
        read(arrived, q, k, v, y, kernel, state, valid, common)
    nothing = y.new_empty(0)
    return AttentionOutput(y, nothing, nothing, nothing, nothing), state


def sizes(kernel: Kernel, q: Tensor, k: Tensor, state: State) -> dict[str, Any]:
    """What both kernels are compiled for: not the number of slots, in which layers differ."""
    spec, D = kernel.spec, q.shape[-1]
    C = state.memory.shape[2] // 2
    return {
        "HAS_VALID": False, "MEMORY": spec.has_memory, "D": D, "DP": power_of_two(D), "C": C, "CP": power_of_two(C),
        "SINKS": spec.sinks, "RING": spec.ring, "BLOCK": spec.block,
        "PACKED": spec.is_packed,
        "TILE": TILE if power_of_two(D) * q.element_size() <= NARROW else SMALL_TILE,
    }  # fmt: skip


def stages(device: torch.device) -> int:
    """How many loads a kernel is ahead: in one stage all of 16 bits fit into 99 KB, the least of a GPU since sm_80."""
    return 3 if shared_memory(device) >= AMPLE else 1


def owned(spec: KernelSpec, nothing: Tensor) -> Tensor:
    """What `slots_of` looks up, on the device of `nothing`: that where all KV heads have as many slots."""
    return slot_table(spec, nothing.device) if spec.is_packed else nothing


@lru_cache(maxsize=512)  # layers may differ; a captured step must find its own
def slot_table(spec: KernelSpec, device: torch.device) -> Tensor:
    """[Hk, 3] int32: of each KV head the number of its first slot, the slots of its first share, its slots."""
    rows, start = [], 0
    for head, slots in enumerate(spec.head_slots):
        rows.append([start, spec.shares_of(head)[0][1], slots])
        start += slots
    with torch.inference_mode(False):  # it outlives this call
        return torch.tensor(rows, dtype=torch.int32).to(device)


def rotary(rotation: Rotation | None, nothing: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The frequencies [R], and what a kernel that turns keys is compiled for."""
    if rotation is None:
        return nothing, {"WIDTH": 2, "NEIGHBOURS": False}
    width = 2 * len(rotation.frequencies)
    return rotation.frequencies.float().contiguous(), {"WIDTH": width, "NEIGHBOURS": rotation.interleaved}


def leave(arrived: Tensor, kernel: Kernel, state: State, valid: Tensor | None, common: dict[str, Any]) -> None:
    """Of every row; `arrived` [rows] becomes zero."""
    spec = kernel.spec
    shares = (spec.spread if spec.is_packed else spec).shares if spec.slots else ((KINDS[0], 0),)
    kinds = [KINDS.index(name) for name, _ in shares] + [-1]
    rest = shares[1][1] if len(shares) == 2 else 0
    weight = kernel.map_k.weight.contiguous() if isinstance(kernel.map_k, Hedgehog) else state.memory
    given = (kernel.forecast_skip, kernel.forecast_in, kernel.forecast_out)
    network = [state.memory if x is None else x.float().contiguous() for x in given]
    width = 0 if kernel.forecast_out is None else kernel.forecast_out.shape[-1]
    frequencies, turning = rotary(kernel.key_rotation, state.memory)
    leave_kernel[(len(arrived),)](
        state.keys, state.values, state.pos, state.decay, state.mass, state.score, state.memory, state.seen,
        state.seen if valid is None else valid, weight, owned(spec, state.seen), *network, frequencies, arrived,
        kernel.scaling**0.5, float(spec.aging), state.pos.shape[1], shares[0][1], spec.slots,
        **common | {"HAS_VALID": valid is not None, "TILE": SMALL_TILE},
        SLOTS=spec.slots > 0, SHARES=len(shares), SP0=power_of_two(shares[0][1]), SP1=power_of_two(rest),
        BP=power_of_two(spec.block), KIND0=kinds[0], KIND1=kinds[1],
        RECALL=spec.measures("recall"), AGING=spec.aging > 0, HIDDEN=width, TINY=TINY,
        TURNED=kernel.key_rotation is not None, **turning,
        PRECISION="ieee", num_warps=8, num_stages=stages(state.keys.device),
    )  # fmt: skip


def read(
    arrived: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, kernel: Kernel, state: State, valid: Tensor | None,
    common: dict[str, Any],
) -> None:  # fmt: skip
    spec, nothing = kernel.spec, state.memory
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    weight = kernel.map_q.weight.contiguous() if isinstance(kernel.map_q, Hedgehog) else nothing
    rate = 0 if kernel.log_rate is None else 1 if kernel.decay_weight is None else 2
    group = q.shape[1] // k.shape[1]
    rotation = kernel.rotation if spec.reach else None
    tile = 2 * TILE if common["TILE"] == TILE and rotation is None else common["TILE"]  # turned keys are of 32 bits
    frequencies, turning = rotary(rotation, nothing)
    optional = (kernel.log_gate, kernel.log_rate, kernel.decay_weight, kernel.sink_logits)
    rows, chunks = len(arrived), -(-max(spec.head_slots, default=spec.slots) // tile)
    split = rows <= FEW
    parts = 1 + chunks + group * spec.has_memory if split else 1
    room = torch.empty(rows * split, chunks + 2, group, q.shape[-1] + 2, device=q.device, dtype=torch.float32)
    read_kernel[(rows, parts)](
        q, k, v, y, state.keys, state.values, state.pos, state.decay, state.mass, state.memory, state.seen,
        state.seen if valid is None else valid, weight, *(nothing if x is None else x.contiguous() for x in optional),
        frequencies, owned(spec, state.seen), room, arrived,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], kernel.scaling, kernel.scaling**0.5,
        kernel.softcap or 1.0, spec.reach, state.pos.shape[1], spec.slots, chunks,
        **common | {"HAS_VALID": valid is not None, "TILE": tile}, SPLIT=split, RATE=rate,
        MASS=spec.measures("attention"), SOFTCAP=kernel.softcap is not None, SINK=kernel.sink_logits is not None,
        G=group, GP=power_of_two(group), COUNT=COUNT, UNIT=UNIT_SOFTPLUS, FAR=rotation is not None, **turning,
        PRECISION="ieee",
        num_warps=8, num_stages=stages(q.device),
    )  # fmt: skip
