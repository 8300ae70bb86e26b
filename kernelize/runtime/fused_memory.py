"""The memory branch: a linear attention over the tokens in the order of their deaths, merged with the exact branch.

Entry j of the order died at block j // block, and is seen from that block on. The sequence is cut into segments of
tiles. One pass adds up what every segment brings, and writes down before every tile what is the segment's own; a scan
over the few segments gives what each begins with; then all tiles are read at once, and their readers add the two. The
backward does the same from the end. Where segments are tiles, the scan writes the memory as a whole for a kernel that
reads it alone.
M [F, D + 1]: the last column is the normaliser. With clock_end(b) the clock when block b's predecessors have been
folded, edge(i) is clock_end of the block before tile i (`edge_at`), and M stands at edge.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fused_exact import Asked
from .fused_map import (
    both_halves,
    factor_of,
    logits_grad,
    matrix_grad,
    matrix_of,
    of_halves,
    parts_at,
    product_of,
    rounded,
    split_matrices,
)
from .fused_select import TILE
from .fused_triton import AMPLE, Launch, constexpr, jit, power_of_two, precision, rows_first, shared_memory, tl

CLOCKS = 1024  # tokens of one program that sets clocks
CROSSING = 1024  # entries of M that are multiplied with their gradients at once
WALKED, AHEAD = 256, 6  # entries of one program that walks over the segments, and how many steps ahead it reads
MANY = 2112  # programs from which on a launch that splits the queries' matrices is worth it: 16k tokens of 8 KV heads
MERGED = 16  # queries of one program of the merge's backward
PROGRAMS = 264  # of a pass over the memory's segments: two a multiprocessor of the largest GPUs
LAUNCH = {  # chunk: entries of M that one program holds; features in 16 bits
    "states": Launch(heads=1, chunk=8192, warps=4, stages=3, registers=168),
    "recall": Launch(heads=1, chunk=16384, warps=4, stages=2),
    "mapped_memory": Launch(heads=1, chunk=16384, warps=4, stages=2, split=True),  # elsewhere: `mapped_launch`
    "memory": Launch(heads=1, chunk=16384, warps=4, stages=3),
    "phi_q_grad": Launch(heads=1, chunk=16384, warps=4, stages=2),
    "reverse_states": Launch(heads=1, chunk=8192, warps=4, stages=3),
    "key_grads": Launch(heads=1, chunk=8192, warps=4, stages=3),  # of memories up to that, in place of the next two
    "phi_k_grad": Launch(heads=1, chunk=16384, warps=4, stages=2),
    "value_grad": Launch(heads=1, chunk=16384, warps=4, stages=2),
}
LITTLE = 8192  # entries of M beside which two programs a multiprocessor have room to be a head ahead
SMALL = LAUNCH | {"phi_q_grad": Launch(heads=1, chunk=16384, warps=4, stages=3)}
WIDE = Launch(heads=1, chunk=4096, warps=4, stages=2)  # features in float32


def launch_of(name: str, dtype: torch.dtype, entries: int = 2 * LITTLE) -> Launch:
    """How the kernel is launched for features of the dtype; `entries` of a memory, for those that ask for it."""
    return WIDE if dtype == torch.float32 else (SMALL if entries <= LITTLE else LAUNCH)[name]


@jit
def clock_kernel(Rate, Folded, End, Clock, ClockEnd, X, blocks, heads, SIZE: constexpr):
    """Tokens folded until each token, and until each block's end, times the log decay −exp(Rate)."""
    row, x = tl.program_id(1), tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    b = row // heads
    rate = -tl.exp(tl.load(Rate + row % heads).to(tl.float32))
    tl.store(Clock + row * X + x, tl.load(Folded + b * X + x, mask=x < X) * rate, mask=x < X)
    end = tl.load(End + b * blocks + x, mask=x < blocks)
    tl.store(ClockEnd + row * blocks + x, end * rate, mask=x < blocks)


@jit
def rate_grad_kernel(Clock, ClockEnd, Grad, GradEnd, Out, X, blocks, SIZE: constexpr):
    """Clocks times their gradients, summed over one program's tokens and blocks; in float64, for they cancel out."""
    row, x = tl.program_id(1), tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    at, end = row.to(tl.int64) * X + x, row.to(tl.int64) * blocks + x
    clock, clock_end = tl.load(Clock + at, mask=x < X, other=0.0), tl.load(ClockEnd + end, mask=x < blocks, other=0.0)
    total = clock.to(tl.float64) * tl.load(Grad + at, mask=x < X, other=0.0).to(tl.float64)
    total += clock_end.to(tl.float64) * tl.load(GradEnd + end, mask=x < blocks, other=0.0).to(tl.float64)
    tl.store(Out + row * tl.num_programs(0) + tl.program_id(0), tl.sum(total, 0))


class ClockFunction(torch.autograd.Function):
    """Of a fixed decay: log_rate [Hk], folded [B, 1, X], at a block's end [B, 1, blocks] -> (clock [B, Hk, X],
    clock_end [B, Hk, blocks]) in float32. Their derivative by log_rate is what they are."""

    @staticmethod
    def forward(ctx: Any, log_rate: Tensor, folded: Tensor, folded_end: Tensor) -> tuple[Tensor, Tensor]:
        (B, _, X), blocks, heads = folded.shape, folded_end.shape[2], len(log_rate)
        clock, clock_end = (torch.empty(B, heads, n, device=folded.device) for n in (X, blocks))
        programs = -(-max(X, blocks) // CLOCKS)
        clock_kernel[(programs, B * heads)](
            log_rate, folded, folded_end, clock, clock_end, X, blocks, heads, SIZE=CLOCKS
        )
        ctx.save_for_backward(clock, clock_end)
        ctx.dtype = log_rate.dtype
        return clock, clock_end

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_end: Tensor) -> tuple[Tensor | None, ...]:
        clock, clock_end = ctx.saved_tensors
        (B, heads, X), blocks = clock.shape, clock_end.shape[2]
        programs = -(-max(X, blocks) // CLOCKS)
        by_rate = torch.empty(B, heads, programs, device=clock.device, dtype=torch.float64)
        rate_grad_kernel[(programs, B * heads)](
            clock, clock_end, grad.contiguous(), grad_end.contiguous(), by_rate, X, blocks, SIZE=CLOCKS
        )
        return by_rate.sum((0, 2)).to(ctx.dtype), None, None


@jit
def entries(
    Order, row, tile, length, Phi, V, Clock, svb, svh, svt, b, h, X, f, d,
    F: constexpr, D: constexpr, TILE: constexpr, DECAY: constexpr,
):  # fmt: skip
    """(index, phi [TILE, F], phi of the features `f`, v of the channels `d`, clock) of the entries of one tile."""
    j = tile * TILE + tl.arange(0, TILE)
    index = tl.load(Order + row * length + j, mask=j < length, other=-1).to(tl.int64)
    here = index >= 0
    phi = tl.load(Phi + (row * X + index)[:, None] * F + f[None, :], mask=here[:, None] & (f < F)[None, :], other=0.0)
    v = tl.load(V + b * svb + h * svh + index[:, None] * svt + d[None, :], mask=here[:, None] & (d < D)[None, :],
                other=0.0)  # fmt: skip
    clock = tl.zeros([TILE], tl.float32)
    if DECAY:
        clock = tl.load(Clock + row * X + index, mask=here, other=0.0)
    return index, here, phi, v.to(phi.dtype), clock


@jit
def states_kernel(
    Order, Phi, V, Clock, ClockEnd, Out, OutNorm, Gain, GainNorm,
    svb, svh, svt, X, n, length, segments, tiles, kv_heads,
    F: constexpr, FP: constexpr, D: constexpr, DV: constexpr, TILE: constexpr, BLOCK: constexpr, DECAY: constexpr,
    TILES: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """What a segment that begins with none brings together, and before each of its TILES."""
    segment, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = row // kv_heads, row % kv_heads
    f, d = tl.arange(0, FP), part * DV + tl.arange(0, DV)
    wide = (f < F)[:, None] & (d < D)[None, :]
    acc, norm = tl.zeros([FP, DV], tl.float32), tl.zeros([FP], tl.float32)
    for tile in tl.range(segment * tiles, tl.minimum((segment + 1) * tiles, n)):
        if TILES:
            to = (row * n + tile) * F + f
            tl.store(Out + to[:, None] * D + d[None, :], acc.to(Out.dtype.element_ty), mask=wide)
            tl.store(OutNorm + to, norm, mask=(f < F) & (part == 0))
        _, here, phi, v, clock = entries(
            Order, row, tile, length, Phi, V, Clock, svb, svh, svt, b, h, X, f, d, F, D, TILE, DECAY
        )
        if DECAY:
            before = edge_at(ClockEnd, row, tile, n, TILE // BLOCK)
            after = edge_at(ClockEnd, row, tile + 1, n, TILE // BLOCK)
            shrink = tl.exp(after - before)
            acc, norm = acc * shrink, norm * shrink
            phi = (phi * tl.where(here, tl.exp(tl.minimum(after - clock, 0.0)), 0.0)[:, None]).to(phi.dtype)
        acc = tl.dot(tl.trans(phi), v, acc, input_precision=PRECISION)
        norm += tl.sum(phi.to(tl.float32), 0)
    out = (row * segments + segment) * F + f
    tl.store(Gain + out[:, None] * D + d[None, :], acc, mask=wide)
    tl.store(GainNorm + out, norm, mask=(f < F) & (part == 0))


@jit
def edge_at(ClockEnd, row, tile, n, PER: constexpr):
    """The clock before a tile of PER blocks; n tiles a row."""
    return tl.load(ClockEnd + row * n * PER + tile * PER - 1, mask=tile > 0, other=0.0)


@jit
def walk_along(
    Memory, Gain, Start, End, ClockEnd, row, here, n, segments, tiles, places, width,
    STAGES: constexpr, PER: constexpr, DECAY: constexpr, BACK: constexpr,
):  # fmt: skip
    """Some entries, `width` of which are a whole memory, from border to border."""
    memory = tl.load(Memory, mask=here, other=0.0)
    gain, start = Gain + row * segments * width, Start + row * places * width
    if DECAY:
        edge = edge_at(ClockEnd, row, n if BACK else 0, n, PER)
    for step in tl.range(segments, num_stages=STAGES):
        border = step
        if BACK:
            border = segments - 1 - step
        more = tl.load(gain + border * width, mask=here, other=0.0)
        to = start + (border + (1 if BACK else 0)) * width
        tl.store(to, memory.to(Start.dtype.element_ty), mask=here)
        if DECAY:
            near = edge
            edge = edge_at(ClockEnd, row, border * tiles if BACK else tl.minimum((border + 1) * tiles, n), n, PER)
            memory = memory * tl.exp(near - edge if BACK else edge - near)
        memory += more
    last = 0 if BACK else segments
    tl.store(start + last * width, memory.to(Start.dtype.element_ty), mask=here & (last < places))
    tl.store(End, memory, mask=here)


@jit
def walk_kernel(
    Memory, Gain, GainNorm, ClockEnd, Start, StartNorm, End, n, segments, tiles, places,
    F: constexpr, D: constexpr, SIZE: constexpr, STAGES: constexpr, PER: constexpr, DECAY: constexpr, BACK: constexpr,
):  # fmt: skip
    """The memory at every segment's border, from the one at the start; BACK: its gradient, from the one at the end.

    Start has so many `places` a row: the last border is left out where they are but as many as segments. The last
    programs do the normaliser, which is the last column of Memory and End [F, D + 1].
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    parts, whole = (F * D + SIZE - 1) // SIZE, row * F * (D + 1)
    if part < parts:
        i = part * SIZE + tl.arange(0, SIZE)
        place = whole + i // D * (D + 1) + i % D
        walk_along(Memory + place, Gain + i, Start + i, End + place, ClockEnd, row, i < F * D,
                   n, segments, tiles, places, F * D, STAGES, PER, DECAY, BACK)  # fmt: skip
    else:
        i = (part - parts) * SIZE + tl.arange(0, SIZE)
        place = whole + i * (D + 1) + D
        walk_along(Memory + place, GainNorm + i, StartNorm + i, End + place, ClockEnd, row, i < F,
                   n, segments, tiles, places, F, STAGES, PER, DECAY, BACK)  # fmt: skip


@jit
def sum_at(
    Local, LocalNorm, Start, StartNorm, row, tile, border, n, segments, shrink, f, d, F: constexpr, D: constexpr
):
    """(M [features f, channels d] at a tile, its normaliser): the segment's own, and what comes from its border."""
    start, local = (row * (segments + 1) + border) * F + f, (row * n + tile) * F + f
    wide = (f < F)[:, None] & (d < D)[None, :]
    acc = tl.load(Start + start[:, None] * D + d[None, :], mask=wide, other=0.0) * shrink
    acc += tl.load(Local + local[:, None] * D + d[None, :], mask=wide, other=0.0).to(tl.float32)
    norm = tl.load(StartNorm + start, mask=f < F, other=0.0) * shrink
    return acc, norm + tl.load(LocalNorm + local, mask=f < F, other=0.0)


@jit
def memory_at(
    Local, LocalNorm, Start, StartNorm, ClockEnd, row, tile, n, segments, tiles, f, d,
    F: constexpr, D: constexpr, PER: constexpr, DECAY: constexpr,
):  # fmt: skip
    """(M [features f, channels d] before a tile, its normaliser)."""
    border, shrink = tile // tiles, 1.0
    if DECAY:
        shrink = tl.exp(edge_at(ClockEnd, row, tile, n, PER) - edge_at(ClockEnd, row, border * tiles, n, PER))
    memory, norm = sum_at(Local, LocalNorm, Start, StartNorm, row, tile, border, n, segments, shrink, f, d, F, D)
    return memory.to(Local.dtype.element_ty), norm


@jit
def clocks_of(ClockEnd, row, tile, block, n, ROWS: constexpr, PER: constexpr, DECAY: constexpr, STRICT: constexpr):
    """(the rows' clock, decay from the tile's start to them)."""
    now = tl.zeros([ROWS], tl.float32)
    far = now + 1.0
    if DECAY:
        if STRICT:
            now = tl.load(ClockEnd + row * n * PER + block - 1, mask=block > 0, other=0.0)
        else:
            now = tl.load(ClockEnd + row * n * PER + block)
        far = tl.exp(tl.minimum(now - edge_at(ClockEnd, row, tile, n, PER), 0.0))
    return now, far


@jit
def near_weights(
    block, first, here, now, clock, TILE: constexpr, BLOCK: constexpr, STRICT: constexpr, DECAY: constexpr
):
    """Weights [rows, TILE] of a tile's entries for queries of the blocks `block`, whose clock is `now`."""
    theirs = first + tl.arange(0, TILE) // BLOCK
    if STRICT:
        seen = theirs[None, :] < block[:, None]
    else:
        seen = theirs[None, :] <= block[:, None]
    seen = seen & here[None, :]
    if DECAY:
        return tl.where(seen, tl.exp(tl.minimum(now[:, None] - clock[None, :], 0.0)), 0.0)
    else:
        return tl.where(seen, 1.0, 0.0)


@jit
def recall_kernel(
    Order, Phi, V, Clock, ClockEnd, Local, LocalNorm, Start, StartNorm, Out,
    svb, svh, svt, X, n, length, segments, tiles, kv_heads,
    F: constexpr, FP: constexpr, D: constexpr, DV: constexpr, TILE: constexpr, BLOCK: constexpr, DECAY: constexpr,
    PRECISION: constexpr,
):  # fmt: skip
    """‖v − answer‖² over the channels of one part, of what the memory of all earlier blocks answers to each token."""
    tile, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = row // kv_heads, row % kv_heads
    f, d = tl.arange(0, FP), part * DV + tl.arange(0, DV)
    first = tile * (TILE // BLOCK)
    block = first + tl.arange(0, TILE) // BLOCK
    now, far = clocks_of(ClockEnd, row, tile, block, n, TILE, TILE // BLOCK, DECAY, True)
    low, norm = memory_at(
        Local, LocalNorm, Start, StartNorm, ClockEnd, row, tile, n, segments, tiles, f, d, F, D, TILE // BLOCK, DECAY
    )
    index, here, phi, v, clock = entries(
        Order, row, tile, length, Phi, V, Clock, svb, svh, svt, b, h, X, f, d, F, D, TILE, DECAY
    )
    weight = near_weights(block, first, here, now, clock, TILE, BLOCK, True, DECAY)
    a = tl.dot(phi, tl.trans(phi), input_precision=PRECISION) * weight
    total = tl.dot(phi, low, input_precision=PRECISION) * far[:, None]
    total += tl.dot(a.to(phi.dtype), v, input_precision=PRECISION)
    z = tl.sum(a, 1) + tl.sum(phi.to(tl.float32) * norm[None, :], 1) * far
    answer = tl.where((z > 1.1754943508222875e-38)[:, None], total / tl.where(z > 0, z, 1.0)[:, None], 0.0)
    error = v.to(tl.float32) - answer
    error = tl.sum(tl.where((d < D)[None, :], error * error, 0.0), 1)
    tl.store(Out + (part * tl.num_programs(2) + row) * X + index, error, mask=here)


@jit
def memory_kernel(
    Order, PhiQ, Phi, V, Clock, ClockEnd, Local, LocalNorm, Start, StartNorm, Exact, Lse, Gate,
    Y, Branch, BranchLse, Total, svb, svh, svt, W, X, n, length, segments, tiles, kv_heads,
    G: constexpr, F: constexpr, FP: constexpr, D: constexpr, DV: constexpr, TILE: constexpr, BLOCK: constexpr,
    DECAY: constexpr, BRANCHES: constexpr, AHEAD: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Reads the memory for a tile's queries and merges: y, and where asked the memory alone with its normaliser.

    AHEAD: what the exact branch says is asked for a head before, in registers; more than 64 channels have none free.
    """
    tile, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = row // kv_heads, row % kv_heads
    f, d, r = tl.arange(0, FP), part * DV + tl.arange(0, DV), tl.arange(0, TILE)
    at = tile * TILE + r
    block, live = at // BLOCK, at < W
    now, far = clocks_of(ClockEnd, row, tile, block, n, TILE, TILE // BLOCK, DECAY, False)
    low, norm = memory_at(
        Local, LocalNorm, Start, StartNorm, ClockEnd, row, tile, n, segments, tiles, f, d, F, D, TILE // BLOCK, DECAY
    )
    _, here, phi, v, clock = entries(
        Order, row, tile, length, Phi, V, Clock, svb, svh, svt, b, h, X, f, d, F, D, TILE, DECAY
    )
    where, wide = r[:, None] * D + d[None, :], live[:, None] & (d < D)[None, :]
    weight = near_weights(block, tile * (TILE // BLOCK), here, now, clock, TILE, BLOCK, False, DECAY)
    if AHEAD:
        following = tl.load(Exact + (row * G * W + tile * TILE) * D + where, mask=wide, other=0.0)
    for g in range(G):
        out = (row * G + g) * W + tile * TILE
        rows = PhiQ + out * F + (r[:, None] * F + f[None, :])
        phi_q = tl.load(rows, mask=live[:, None] & (f < F)[None, :], other=0.0)
        if AHEAD:
            exact = following
            following = tl.load(Exact + (out + W) * D + where, mask=wide & (g + 1 < G), other=0.0)
        else:
            exact = tl.load(Exact + out * D + where, mask=wide, other=0.0)
        a = tl.dot(phi_q, tl.trans(phi), input_precision=PRECISION) * weight
        total = tl.dot(phi_q, low, input_precision=PRECISION) * far[:, None]
        total = tl.dot(a.to(phi.dtype), v, total, input_precision=PRECISION)
        z = tl.sum(a, 1) + tl.sum(phi_q.to(tl.float32) * norm[None, :], 1) * far
        to, heads = (b * W + tile * TILE) * (kv_heads * G) + h * G + g, kv_heads * G
        own, gate = tl.load(Lse + out + r, mask=live, other=0.0), tl.load(Gate + h * G + g)
        merge(total, z, exact, own, gate, Y + to * D, Branch + out * D, BranchLse + out, Total + out,
              r, r * heads, live, d, part, D, BRANCHES, True)  # fmt: skip


@jit
def merge(
    total, z, exact, own, gate, Y, Branch, BranchLse, Total, out, to, live, d, part,
    D: constexpr, BRANCHES: constexpr, TOTAL: constexpr,
):  # fmt: skip
    """Stores what the rows `out` read as the rows `to` of y, from the memory's numerator [rows, channels d], its
    normaliser and the exact branch with its `own`. TOTAL: also the normaliser of both."""
    wide = live[:, None] & (d < D)[None, :]
    filled = z > 1.1754943508222875e-38
    safe = tl.where(filled, z, 1.0)
    part_of = tl.where(filled, 1.0 / safe, 0.0)
    lse = tl.where(filled, tl.log(safe) + gate, float("-inf"))
    share = tl.sigmoid(own - lse)
    y = total * (part_of * (1.0 - share))[:, None] + share[:, None] * exact.to(tl.float32)
    tl.store(Y + to[:, None] * D + d[None, :], y.to(Y.dtype.element_ty), mask=wide)
    if BRANCHES:
        memory = total * part_of[:, None]
        tl.store(Branch + out[:, None] * D + d[None, :], memory.to(Branch.dtype.element_ty), mask=wide)
        tl.store(BranchLse + out, lse, mask=live & (part == 0))
    if TOTAL:
        both = tl.maximum(own, lse) + tl.log(1.0 + tl.exp(-tl.abs(own - lse)))
        tl.store(Total + out, both, mask=live & (part == 0))


@jit
def logits_at(
    Q, Weight, factor, h, sqt, live, there,
    C: constexpr, CP: constexpr, D: constexpr, DP: constexpr, SPLIT: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """The rows from Q on times the matrix of head h, where the head is `there`: [rows, CP] in units of log 2."""
    ROWS: constexpr = live.shape[0]
    r, x = tl.arange(0, ROWS), tl.arange(0, DP)
    q = tl.load(Q + (r[:, None] * sqt + x[None, :]), mask=(live & there)[:, None] & (x < D)[None, :], other=0.0)
    if SPLIT:
        z = tl.dot(q, parts_at(Weight, h, x, there, C, CP, D), input_precision=PRECISION)
        return tl.sum(tl.reshape(z, [ROWS, 2, CP]), 1)
    else:
        c = tl.arange(0, CP)
        w, again = matrix_of(Weight, factor, h, x, c, D, C, ""), matrix_of(Weight, factor, h, x, c, D, C, ".ca")
        return product_of(q, w, again, PRECISION)


@jit
def mapped_memory_kernel(
    Order, Q, Weight, Phi, V, Clock, ClockEnd, Memory, Norm, Start, StartNorm, Exact, Lse, Gate, Y, Branch, BranchLse,
    Total, PhiQ, factor, sqb, sqh, sqt, svb, svh, svt, W, X, n, length, segments, tiles, kv_heads,
    G: constexpr, C: constexpr, CP: constexpr, D: constexpr, DP: constexpr, DV: constexpr, TILE: constexpr,
    BLOCK: constexpr, DECAY: constexpr, BRANCHES: constexpr, TRAINS: constexpr, SPLIT: constexpr,
    AHEAD: constexpr, WHOLE: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """`memory_kernel` with the hedgehog map of the queries in it: phi(q) leaves the registers for a backward alone.

    SPLIT: by matrices that `split_kernel` has cut in two, else by the map's own. AHEAD: a head's product with them
    stands at the end of the head before, so that with two stages its operands are on their way all that time; so is
    what the exact branch says, in registers, for else the compiler asks for it where it is needed. WHOLE: Memory and
    Norm are all that a tile's begin with, else a segment's own.
    """
    tile, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = row // kv_heads, row % kv_heads
    d, r = part * DV + tl.arange(0, DV), tl.arange(0, TILE)
    f = of_halves(tl.arange(0, 2 * CP), C, CP)
    at = tile * TILE + r
    block, live = at // BLOCK, at < W
    own_q = Q + b * sqb + h * G * sqh + (tile * TILE).to(tl.int64) * sqt
    now, far = clocks_of(ClockEnd, row, tile, block, n, TILE, TILE // BLOCK, DECAY, False)
    if WHOLE:
        M = Memory + (row * n + tile) * 2 * C * D + (f[:, None] * D + d[None, :])
        memory = tl.load(M, mask=(f < 2 * C)[:, None] & (d < D)[None, :], other=0.0)
        norm = tl.load(Norm + (row * n + tile) * 2 * C + f, mask=f < 2 * C, other=0.0)
    else:
        memory, norm = memory_at(Memory, Norm, Start, StartNorm, ClockEnd, row, tile, n, segments, tiles, f, d,
                                 2 * C, D, TILE // BLOCK, DECAY)  # fmt: skip
    _, here, phi, v, clock = entries(
        Order, row, tile, length, Phi, V, Clock, svb, svh, svt, b, h, X, f, d, 2 * C, D, TILE, DECAY
    )
    where, wide = r[:, None] * D + d[None, :], live[:, None] & (d < D)[None, :]
    if AHEAD:
        z = logits_at(own_q, Weight, factor, h * G, sqt, live, True, C, CP, D, DP, SPLIT, PRECISION)
        exact = tl.load(Exact + (row * G * W + tile * TILE) * D + where, mask=wide, other=0.0)
    weight = near_weights(block, tile * (TILE // BLOCK), here, now, clock, TILE, BLOCK, False, DECAY)
    for g in range(G):
        head, first = h * G + g, (row * G + g) * W + tile * TILE
        own, gate = tl.load(Lse + first + r, mask=live, other=0.0), tl.load(Gate + head)
        if not AHEAD:
            exact = tl.load(Exact + first * D + where, mask=wide, other=0.0)
            z = logits_at(own_q + g * sqh, Weight, factor, head, sqt, live, True, C, CP, D, DP, SPLIT, PRECISION)
        phi_q = both_halves(z, C)
        if TRAINS:
            to = PhiQ + first * (2 * C) + (r[:, None] * (2 * C) + f[None, :])
            tl.store(to, phi_q.to(phi.dtype), mask=live[:, None] & (f < 2 * C)[None, :] & (part == 0))
        a = tl.dot(phi_q.to(phi.dtype), tl.trans(phi), input_precision=PRECISION) * weight
        phi_q = phi_q * far[:, None]
        if phi.dtype != tl.float32:
            phi_q = rounded(phi_q)
        total = tl.dot(phi_q.to(phi.dtype), memory, input_precision=PRECISION)
        total = tl.dot(a.to(phi.dtype), v, total, input_precision=PRECISION)
        norms = tl.sum(a, 1) + tl.sum(phi_q * norm[None, :], 1)
        y, heads = Y + ((b * W + tile * TILE) * (kv_heads * G) + head) * D, kv_heads * G
        merge(total, norms, exact, own, gate, y, Branch + first * D, BranchLse + first, Total + first,
              r, r * heads, live, d, part, D, BRANCHES, TRAINS)  # fmt: skip
        if AHEAD:
            exact = tl.load(Exact + (first + W) * D + where, mask=wide & (g + 1 < G), other=0.0)
            z = logits_at(own_q + (g + 1) * sqh, Weight, factor, head + 1, sqt, live, g + 1 < G,
                          C, CP, D, DP, SPLIT, PRECISION)  # fmt: skip


# --- backward -----------------------------------------------------------------------------------------------


@jit
def merge_grad_kernel(
    Grad, GradBranch, GradBranchLse, Exact, Lse, Branch, BranchLse, GradExact, GradLse, Total, Down, Delta,
    sgb, sgh, sgt, W, heads, D: constexpr, DP: constexpr, TILE: constexpr, BRANCH: constexpr, BRANCH_LSE: constexpr,
):  # fmt: skip
    """Through y = w exact + (1 − w) memory, for each branch on its own: gradients of exact and its lse, and what is
    `Asked` of the memory."""
    row = tl.program_id(1).to(tl.int64)
    at, d = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, DP)
    out, live = row * W + at, at < W
    where = out[:, None] * D + d[None, :]
    wide = live[:, None] & (d < D)[None, :]
    where_g = row // heads * sgb + row % heads * sgh + at.to(tl.int64)[:, None] * sgt + d[None, :]
    g = tl.load(Grad + where_g, mask=wide, other=0.0).to(tl.float32)
    exact = tl.load(Exact + where, mask=wide, other=0.0).to(tl.float32)
    memory = tl.load(Branch + where, mask=wide, other=0.0).to(tl.float32)
    lse = tl.load(BranchLse + out, mask=live, other=float("-inf"))
    share = tl.sigmoid(tl.load(Lse + out, mask=live, other=0.0) - lse)
    turn = tl.sum(g * (exact - memory), 1) * share * (1 - share)
    filled = lse > float("-inf")
    g_lse, down = -turn, (1 - share)[:, None] * g
    if BRANCH:
        down += tl.load(GradBranch + where, mask=wide, other=0.0).to(tl.float32)
    if BRANCH_LSE:
        g_lse += tl.load(GradBranchLse + out, mask=live, other=0.0)
    tl.store(GradExact + where, (share[:, None] * g).to(GradExact.dtype.element_ty), mask=wide)
    tl.store(GradLse + out, turn, mask=live)
    tl.store(Total + out, tl.where(filled, lse, float("inf")), mask=live)  # nothing is asked of what is empty
    tl.store(Down + where, tl.where(filled[:, None], down, 0.0).to(Down.dtype.element_ty), mask=wide)
    tl.store(Delta + out, tl.where(filled, tl.sum(down * memory, 1) - g_lse, 0.0), mask=live)


@jit
def unit_of(gate, total):
    """The probability of a product of features that is 1. The bound is above 1 / the least normaliser that counts, so
    that it holds back only rows whose memory is empty: nothing comes of them, but must not be of infinity either."""
    return tl.exp(tl.minimum(gate - total, 87.5))


@jit
def phi_q_grad_kernel(
    Order, PhiQ, Phi, V, Clock, ClockEnd, Local, LocalNorm, Start, StartNorm, Y, GradPhiQ, GradClock, GradGate,
    Total, Grad, Delta, Gate, scale, sgb, sgh, sgt, svb, svh, svt, W, X, n, length, segments, tiles, kv_heads,
    G: constexpr, F: constexpr, FB: constexpr, D: constexpr, DP: constexpr, TILE: constexpr, BLOCK: constexpr,
    DECAY: constexpr, KNOWN: constexpr, LOGITS: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Gradient of phi(q), for FB of its features, and what it says about clocks and gate; delta where not KNOWN.

    LOGITS: not of phi but of the logits, of which it is the hedgehog map; F = 2 C, all in one program.
    """
    tile, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = row // kv_heads, row % kv_heads
    f, d, r = part * FB + tl.arange(0, FB), tl.arange(0, DP), tl.arange(0, TILE)
    C: constexpr = F // 2
    if LOGITS:
        f = of_halves(f, C, FB // 2)
    at = tile * TILE + r
    block, live = at // BLOCK, at < W
    now, far = clocks_of(ClockEnd, row, tile, block, n, TILE, TILE // BLOCK, DECAY, False)
    low, norm = memory_at(
        Local, LocalNorm, Start, StartNorm, ClockEnd, row, tile, n, segments, tiles, f, d, F, D, TILE // BLOCK, DECAY
    )
    _, here, phi, v, clock = entries(
        Order, row, tile, length, Phi, V, Clock, svb, svh, svt, b, h, X, f, d, F, D, TILE, DECAY
    )
    weight = near_weights(block, tile * (TILE // BLOCK), here, now, clock, TILE, BLOCK, False, DECAY)
    for g in range(G):
        out, head = (row * G + g) * W + tile * TILE, h * G + g
        where, keep = out * F + (r[:, None] * F + f[None, :]), live[:, None] & (f < F)[None, :]
        phi_q = tl.load(PhiQ + where, mask=keep, other=0.0)  # asked for with what comes before it is needed
        wide = live[:, None] & (d < D)[None, :]
        own = Grad + b * sgb + head * sgh + (tile * TILE).to(tl.int64) * sgt
        grad = tl.load(own + (r[:, None] * sgt + d[None, :]), mask=wide, other=0.0)
        if KNOWN:
            delta = tl.load(Delta + out + r, mask=live, other=0.0)
        else:
            heads = kv_heads * G
            of_y = Y + ((b * W + tile * TILE) * heads + head) * D
            y = tl.load(of_y + (r[:, None] * (heads * D) + d[None, :]), mask=wide, other=0.0)
            delta = tl.sum(grad.to(tl.float32) * y.to(tl.float32), 1)
            tl.store(Delta + out + r, delta, mask=live & (part == 0))
        unit = unit_of(tl.load(Gate + head), tl.load(Total + out + r, mask=live, other=0.0))
        grad = grad.to(phi.dtype)
        a = (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None]) * weight
        total = tl.dot(grad, tl.trans(low), input_precision=PRECISION) - delta[:, None] * norm[None, :]
        total = tl.dot(a.to(phi.dtype), phi, total * far[:, None], input_precision=PRECISION) * unit[:, None]
        if LOGITS:
            g_z, turn = logits_grad(phi_q.to(tl.float32), total, scale)
            c = tl.arange(0, FB // 2)
            to, mine = out * C + (r[:, None] * C + c[None, :]), live[:, None] & (c < C)[None, :]
            tl.store(GradPhiQ + to, g_z.to(GradPhiQ.dtype.element_ty), mask=mine)
        else:
            tl.store(GradPhiQ + where, total.to(GradPhiQ.dtype.element_ty), mask=keep)
            turn = tl.sum(phi_q.to(tl.float32) * total, 1)
        of_part = (part * tl.num_programs(2) + row) * G + g
        tl.store(GradGate + of_part * n + tile, tl.sum(turn, 0))
        if DECAY:
            tl.store(GradClock + of_part * W + at, turn, mask=live)


@jit
def queries(
    PhiQ, Total, Grad, Delta, gate, sgb, sgh, sgt, row, b, head, g, tile, W, f, d,
    G: constexpr, F: constexpr, D: constexpr, TILE: constexpr,
):  # fmt: skip
    """(phi(q), what is asked: gradient, unit, delta) of one head's tile."""
    r, first, live = tl.arange(0, TILE), tile * TILE, tile * TILE + tl.arange(0, TILE) < W
    out = (row * G + g) * W + first
    phi_q = tl.load(PhiQ + out * F + (r[:, None] * F + f[None, :]), mask=live[:, None] & (f < F)[None, :], other=0.0)
    own = Grad + b * sgb + head * sgh + first.to(tl.int64) * sgt
    grad = tl.load(own + (r[:, None] * sgt + d[None, :]), mask=live[:, None] & (d < D)[None, :], other=0.0)
    unit = unit_of(gate, tl.load(Total + out + r, mask=live, other=0.0))
    return phi_q, grad.to(phi_q.dtype), unit, tl.load(Delta + out + r, mask=live, other=0.0)


@jit
def reverse_states_kernel(
    PhiQ, ClockEnd, Local, LocalNorm, Gain, GainNorm, Total, Grad, Delta, Gate, sgb, sgh, sgt,
    W, n, segments, tiles, kv_heads,
    G: constexpr, F: constexpr, FP: constexpr, D: constexpr, DV: constexpr, TILE: constexpr, BLOCK: constexpr,
    DECAY: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """The gradient of the memory after every tile, as if nothing followed the segment, and at the segment's start."""
    segment, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = row // kv_heads, row % kv_heads
    f, d = tl.arange(0, FP), part * DV + tl.arange(0, DV)
    wide = (f < F)[:, None] & (d < D)[None, :]
    acc, norm = tl.zeros([FP, DV], tl.float32), tl.zeros([FP], tl.float32)
    blocks = n * (TILE // BLOCK)
    stop = tl.minimum((segment + 1) * tiles, n)
    for step in tl.range(stop - segment * tiles):
        tile = stop - 1 - step
        to = (row * n + tile) * F + f
        tl.store(Local + to[:, None] * D + d[None, :], acc.to(Local.dtype.element_ty), mask=wide)
        tl.store(LocalNorm + to, norm, mask=(f < F) & (part == 0))
        at = tile * TILE + tl.arange(0, TILE)
        far = tl.zeros([TILE], tl.float32) + 1.0
        if DECAY:
            before = edge_at(ClockEnd, row, tile, n, TILE // BLOCK)
            after = edge_at(ClockEnd, row, tile + 1, n, TILE // BLOCK)
            acc, norm = acc * tl.exp(after - before), norm * tl.exp(after - before)
            far = tl.exp(tl.minimum(tl.load(ClockEnd + row * blocks + at // BLOCK) - before, 0.0))
        for g in range(G):
            gate = tl.load(Gate + h * G + g)
            phi_q, grad, unit, delta = queries(
                PhiQ, Total, Grad, Delta, gate, sgb, sgh, sgt, row, b, h * G + g, g, tile, W, f, d, G, F, D, TILE
            )
            phi_q = (phi_q * (far * unit)[:, None]).to(phi_q.dtype)
            acc += tl.dot(tl.trans(phi_q), grad, input_precision=PRECISION)
            norm -= tl.sum(phi_q.to(tl.float32) * delta[:, None], 0)
    out = (row * segments + segment) * F + f
    tl.store(Gain + out[:, None] * D + d[None, :], acc, mask=wide)
    tl.store(GainNorm + out, norm, mask=(f < F) & (part == 0))


@jit
def clocks_after(ClockEnd, clock, row, tile, block, n, tiles, TILE: constexpr, PER: constexpr, DECAY: constexpr):
    """(the rows' clock, decay from the entries to the tile's end, from there to the segment's end)."""
    now = tl.zeros([TILE], tl.float32)
    late, shrink = now + 1.0, 1.0
    if DECAY:
        after = edge_at(ClockEnd, row, tile + 1, n, PER)
        end = tl.minimum((tile // tiles + 1) * tiles, n)
        shrink = tl.exp(edge_at(ClockEnd, row, end, n, PER) - after)
        now = tl.load(ClockEnd + row * n * PER + block)
        late = tl.exp(tl.minimum(after - clock, 0.0))
    return now, late, shrink


@jit
def late_weights(block, first, here, now, clock, TILE: constexpr, BLOCK: constexpr, DECAY: constexpr):
    """`near_weights` the other way round, [TILE, rows]: an operand of the next product as they come."""
    theirs = first + tl.arange(0, TILE) // BLOCK
    seen = (theirs[:, None] <= block[None, :]) & here[:, None]
    if DECAY:
        return tl.where(seen, tl.exp(tl.minimum(now[None, :] - clock[:, None], 0.0)), 0.0)
    else:
        return tl.where(seen, 1.0, 0.0)


@jit
def key_grads_kernel(
    Order, PhiQ, Phi, V, Clock, ClockEnd, Local, LocalNorm, Start, StartNorm, GradPhi, GradClock, GradV,
    Total, Grad, Delta, Gate, scale, sgb, sgh, sgt, svb, svh, svt, W, X, n, length, segments, tiles, kv_heads,
    G: constexpr, GP: constexpr, F: constexpr, FB: constexpr, D: constexpr, DB: constexpr, TILE: constexpr,
    BLOCK: constexpr, DECAY: constexpr, OF_PHI: constexpr, OF_V: constexpr, LOGITS: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Gradients of phi(k), and of v. A program that does but one of them takes FB of its features, or DB channels.

    LOGITS: not of phi but of the logits, as `phi_q_grad_kernel`.
    """
    tile, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = row // kv_heads, row % kv_heads
    f, d = tl.arange(0, FB), tl.arange(0, DB)
    if not OF_V:
        f += part * FB
    if not OF_PHI:
        d += part * DB
    if LOGITS:
        f = of_halves(f, F // 2, FB // 2)
    at = tile * TILE + tl.arange(0, TILE)
    block = at // BLOCK
    index, here, phi, v, clock = entries(
        Order, row, tile, length, Phi, V, Clock, svb, svh, svt, b, h, X, f, d, F, D, TILE, DECAY
    )
    now, late, shrink = clocks_after(ClockEnd, clock, row, tile, block, n, tiles, TILE, TILE // BLOCK, DECAY)
    memory, norm = sum_at(
        Local, LocalNorm, Start, StartNorm, row, tile, tile // tiles + 1, n, segments, shrink, f, d, F, D
    )
    memory = memory.to(phi.dtype)
    if OF_PHI:
        g_phi = (tl.dot(v, tl.trans(memory), input_precision=PRECISION) + norm[None, :]) * late[:, None]
    if OF_V:
        g_v = tl.dot(phi, memory, input_precision=PRECISION) * late[:, None]
    weight = late_weights(block, tile * (TILE // BLOCK), here, now, clock, TILE, BLOCK, DECAY)
    heads = tl.arange(0, GP)  # a load less in the loop: three stages of two programs then fit into shared memory
    gates = tl.load(Gate + h * G + heads, mask=heads < G, other=0.0)
    for g in range(G):
        gate = tl.sum(tl.where(heads == g, gates, 0.0), 0)
        phi_q, grad, unit, delta = queries(
            PhiQ, Total, Grad, Delta, gate, sgb, sgh, sgt, row, b, h * G + g, g, tile, W, f, d, G, F, D, TILE
        )
        share = unit[None, :] * weight
        if OF_V:
            a = tl.dot(phi, tl.trans(phi_q), input_precision=PRECISION) * share
            g_v = tl.dot(a.to(grad.dtype), grad, g_v, input_precision=PRECISION)
        if OF_PHI:
            a = (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :]) * share
            g_phi = tl.dot(a.to(phi.dtype), phi_q, g_phi, input_precision=PRECISION)
    if OF_PHI:
        where, wide = (row * X + index)[:, None] * F + f[None, :], here[:, None] & (f < F)[None, :]
        turn = tl.zeros([TILE], tl.float32)
        if LOGITS:
            C: constexpr = F // 2
            mine, c = tl.load(Phi + where, mask=wide, other=0.0).to(tl.float32), tl.arange(0, FB // 2)
            g_z, turn = logits_grad(mine, g_phi, scale)
            to = GradPhi + (row * X + index)[:, None] * C + c[None, :]
            tl.store(to, g_z.to(GradPhi.dtype.element_ty), mask=here[:, None] & (c < C)[None, :])
        else:
            tl.store(GradPhi + where, g_phi.to(GradPhi.dtype.element_ty), mask=wide)
            if DECAY:
                turn = tl.sum(tl.load(Phi + where, mask=wide, other=0.0).to(tl.float32) * g_phi, 1)
        if DECAY:
            tl.store(GradClock + (part * tl.num_programs(2) + row) * X + index, -turn, mask=here)
    if OF_V:
        out = GradV + (row * X + index)[:, None] * D + d[None, :]
        tl.store(out, g_v.to(GradV.dtype.element_ty), mask=here[:, None] & (d < D)[None, :])


@jit
def crossing_at(border, Start, StartNorm, Back, BackNorm, F: constexpr, D: constexpr, SIZE: constexpr):
    """⟨M, gradient of M⟩ at a segment's border."""
    i = tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for first in tl.range(0, F * D, SIZE):
        at, here = border * F * D + first + i, first + i < F * D
        total += tl.load(Start + at, mask=here, other=0.0) * tl.load(Back + at, mask=here, other=0.0)
    for first in tl.range(0, F, SIZE):
        at, here = border * F + first + i, first + i < F
        total += tl.load(StartNorm + at, mask=here, other=0.0) * tl.load(BackNorm + at, mask=here, other=0.0)
    return tl.sum(total, 0)


@jit
def clock_end_grad_kernel(
    Order, GradClock, Turn, Start, StartNorm, Back, BackNorm, GradEnd, W, X, n, segments, tiles,
    G: constexpr, F: constexpr, D: constexpr, TILE: constexpr, BLOCK: constexpr, SIZE: constexpr,
):  # fmt: skip
    """What the queries of a segment's blocks say about their clocks.

    A decay touches all pairs of tokens on its two sides, so its gradient is a sum over the rest of the sequence, and
    rounding would grow with the length. What crosses the border of a segment is also ⟨M, gradient of M⟩ there, in
    float32: each segment is corrected to that.
    """
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    PER: constexpr = TILE // BLOCK
    stop, block = tl.minimum((segment + 1) * tiles, n), tl.arange(0, PER)
    border = row * (segments + 1) + segment
    after = crossing_at(border + 1, Start, StartNorm, Back, BackNorm, F, D, SIZE)
    error = crossing_at(border, Start, StartNorm, Back, BackNorm, F, D, SIZE) - after
    for tile in tl.range(segment * tiles, stop):
        at = tile * TILE + tl.arange(0, TILE)
        turn = tl.zeros([TILE], tl.float32)
        for g in range(G):
            turn += tl.load(Turn + (row * G + g) * W + at, mask=at < W, other=0.0)
        index = tl.load(Order + row * n * TILE + at)
        folded = tl.load(GradClock + row * X + index, mask=index >= 0, other=0.0)
        error -= tl.sum(turn + folded, 0)
        grad = tl.sum(tl.reshape(turn, [PER, BLOCK]), 1)
        if tile == stop - 1:
            grad += tl.where(block == PER - 1, error + tl.where(stop == n, after, 0.0), 0.0)
        tl.store(GradEnd + row * n * PER + tile * PER + block, grad)


# --- around the kernels -------------------------------------------------------------------------------------


class Order(NamedTuple):
    """Tokens in the order in which the memory takes them in, and how the sequence is cut; no gradients."""

    tokens: Tensor  # [R, n·tile] int32, −1 where nothing comes
    block: int
    segments: int
    tiles: int  # of a segment
    decays: bool

    @property
    def n(self) -> int:
        return self.tokens.shape[1] // TILE


def order_of(index: Tensor, block: int, decays: bool) -> Order:
    """Cuts the sequence into as many segments as fill the GPU."""
    R, n = index.shape[0], index.shape[1] // TILE
    tiles = max(1, -(-n // max(1, PROGRAMS // R)))
    return Order(index, block, -(-n // tiles), tiles, decays)


def walk(
    memory: Tensor, gain: Tensor, gain_norm: Tensor, clock_end: Tensor, order: Order, back: bool,
    dtype: torch.dtype | None = None,
) -> Walked:  # fmt: skip
    """From the memory [B, Hk, F, D + 1] before the first token on; `back`: its gradient, from that of the last on.

    With a `dtype` the segments' starts alone, in it: `Walked.start` and `norm` are without what is after the last.
    """
    R, S, F, D = gain.shape
    places = S + (dtype is None)
    start, start_norm = gain.new_empty(R, places, F, D, dtype=dtype), gain.new_empty(R, places, F)
    end = torch.empty_like(memory, memory_format=torch.contiguous_format)
    walk_kernel[(-(-F * D // WALKED) + -(-F // WALKED), R)](
        memory.contiguous(), gain, gain_norm, clock_end, start, start_norm, end, order.n, S, order.tiles, places,
        F=F, D=D, SIZE=WALKED, STAGES=AHEAD, PER=TILE // order.block, DECAY=order.decays, BACK=back, num_warps=2,
    )  # fmt: skip
    return Walked(start, start_norm, end)


class Walked(NamedTuple):
    """A memory, or its gradient, at every segment's start and after the last."""

    start: Tensor  # [R, segments + 1, F, D] float32
    norm: Tensor  # [R, segments + 1, F] float32
    end: Tensor  # [B, Hk, F, D + 1]: where the walk ended


def split(size: int, other: int, most: int) -> tuple[int, int]:
    """(channels of one program, programs) so that its part of a [other, size] memory has at most `most` entries."""
    whole = power_of_two(size)
    part = min(whole, max(16, most // power_of_two(other)))
    return part, -(-size // part)


class States(NamedTuple):
    """The memory before every tile, or its gradient after each: `whole`, or what a segment alone brings."""

    at: Tensor  # [R, n, F, D] of phi's dtype
    norm: Tensor  # [R, n, F] float32
    start: Tensor  # [R, segments + 1, F, D] float32: at every segment's start, and after the last; empty if whole
    start_norm: Tensor  # [R, segments + 1, F] float32


def states_of(
    order: Order, phi: Tensor, v: Tensor, clock: Tensor, clock_end: Tensor, memory: Tensor, whole: bool
) -> tuple[States, Tensor]:
    """(the states, `whole` or not; the memory after the last token). Whole they can be where segments are tiles.

    phi [B, Hk, X, F], v [B, Hk, X, D], clock [B, Hk, X], memory [B, Hk, F, D + 1] before the first token.
    """
    (B, Hk, X, F), D = phi.shape, v.shape[-1]
    launch = launch_of("states", phi.dtype)
    DV, parts = split(D, F, launch.chunk)
    gain = torch.empty(B * Hk, order.segments, F, D, device=v.device, dtype=torch.float32)
    gain_norm = gain.new_empty(B * Hk, order.segments, F)
    n = 0 if whole else order.n
    at, norm = gain.new_empty(B * Hk, n, F, D, dtype=phi.dtype), gain.new_empty(B * Hk, n, F)
    states_kernel[(order.segments, parts, B * Hk)](
        order.tokens, phi, v, clock, clock_end, at, norm, gain, gain_norm, *v.stride()[:3],
        X, order.n, order.tokens.shape[1], order.segments, order.tiles, Hk,
        F=F, FP=power_of_two(F), D=D, DV=DV, TILE=TILE, BLOCK=order.block, DECAY=order.decays, TILES=not whole,
        PRECISION=precision(phi.dtype), **launch.options,
    )  # fmt: skip
    if whole:  # the walk gives them
        at, norm, end = walk(memory, gain, gain_norm, clock_end, order, back=False, dtype=phi.dtype)
        return States(at, norm, gain[:0], gain_norm[:0]), end
    start, start_norm, end = walk(memory, gain, gain_norm, clock_end, order, back=False)
    return States(at, norm, start, start_norm), end


def recall_errors(order: Order, phi: Tensor, v: Tensor, clock: Tensor, clock_end: Tensor, memory: Tensor) -> Tensor:
    """‖v − answer‖ [R, X] of the memory of all blocks before a token's own, for the tokens of `order`.

    phi [B, Hk, X, F], v [B, Hk, X, D], clock [B, Hk, X], clock_end [B, Hk, blocks], memory [B, Hk, F, D + 1].
    """
    (B, Hk, X, F), D = phi.shape, v.shape[-1]
    states, _ = states_of(order, phi, v, clock, clock_end, memory, whole=False)
    launch = launch_of("recall", phi.dtype)
    DV, parts = split(D, F, launch.chunk)
    out = torch.zeros(parts, B * Hk, X, device=v.device, dtype=torch.float32)
    recall_kernel[(order.n, parts, B * Hk)](
        order.tokens, phi, v, clock, clock_end, *states, out, *v.stride()[:3],
        X, order.n, order.tokens.shape[1], order.segments, order.tiles, Hk,
        F=F, FP=power_of_two(F), D=D, DV=DV, TILE=TILE, BLOCK=order.block, DECAY=order.decays,
        PRECISION=precision(phi.dtype), **launch.options,
    )  # fmt: skip
    return summed(out).sqrt_()


def unwritten(exact: Tensor, lse: Tensor, branches: bool) -> tuple[Tensor, Tensor]:
    """With `branches` room for the memory's branch and its lse."""
    if not branches:
        return exact.new_empty(0), lse.new_empty(0)
    return torch.empty_like(exact), torch.empty_like(lse)


class Read(NamedTuple):
    """What a read of the memory gives, and what its backward needs."""

    y: Tensor  # [B, H, W, D], laid out by token, as the layer's last product reads it
    branch: Tensor  # [B, H, W, D] the memory alone, or empty
    branch_lse: Tensor  # [B, H, W], or empty
    total: Tensor  # [B, H, W] the normaliser of both branches; empty without a backward
    phi_q: Tensor  # [B, H, W, F]; likewise
    states: States
    end: Tensor  # [B, Hk, F, D + 1]


class MemoryFunction(torch.autograd.Function):
    """Reads the memory and merges it with the exact branch.

    queries: phi [B, H, W, F], or with a weight_q [H, D, C] of their hedgehog map q [B, H, W, D] themselves; with that
    keys [B, Hk, X, D] and weight_k [Hk, D, C], of which phi_k is the map; phi_k [B, Hk, X, F], v [B, Hk, X, D], clock
    [B, Hk, X], clock_end [B, Hk, blocks], memory [B, Hk, F, D + 1], exact [B, H, W, D], lse [B, H, W], gate [H] (its
    log), the last outputs of `ExactFunction` (logits of queries and keys, which with those weights take what is said
    about q and keys, and three more, or Nones where exact and lse are not as they came from it) ->
    (y, memory's branch [B, H, W, D], its lse [B, H, W], the memory at the end). Without `branches` the second and
    third are empty, and there is a backward only if it `trains`.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, weight_q: Tensor | None, weight_k: Tensor | None, phi_k: Tensor,
        v: Tensor, clock: Tensor, clock_end: Tensor, memory: Tensor, exact: Tensor, lse: Tensor, gate: Tensor,
        logits_q: Tensor | None, logits_k: Tensor | None, total: Tensor | None,
        grad: Tensor | None, delta: Tensor | None, order: Order, scale: float, branches: bool, trains: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        given = phi_k, v, clock, clock_end, memory, exact, lse, gate, order
        ctx.apart = total is None
        branches = branches or (ctx.apart and trains)
        if weight_q is None:
            got = read_features(queries, *given, branches)
        else:
            got = read_mapped(queries, weight_q, factor_of(scale), *given, branches, trains)
        merged = got.y, got.total, exact, lse, got.branch, got.branch_lse
        of_maps = (None,) * 4 if weight_q is None else (queries, weight_q, keys, weight_k)
        kept = phi_k, v, clock, clock_end, memory, gate, *got.states, *merged
        ctx.save_for_backward(*of_maps, got.phi_q, *kept)
        ctx.order, ctx.scale = order, scale
        ctx.set_materialize_grads(False)  # of what nobody looks at
        return got.y, got.branch, got.branch_lse, got.end

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_branch: Tensor | None, grad_lse: Tensor | None, grad_end: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *of_maps, phi_q, phi_k, v, clock, clock_end, memory, gate = ctx.saved_tensors[:11]
        order, states, (y, total, *apart) = ctx.order, States(*ctx.saved_tensors[11:15]), ctx.saved_tensors[15:]
        grad = torch.zeros_like(y) if grad is None else rows_first(grad)
        grad_end = torch.zeros_like(memory) if grad_end is None else grad_end
        known = ctx.apart or grad_branch is not None or grad_lse is not None
        of_exact: Any = (None, None)
        merged: Any = (None, None, None)
        if known:
            *of_exact, asked = merge_grad(phi_q.dtype, grad, grad_branch, grad_lse, *apart)
        else:  # the gradients of both branches are those of one softmax
            merged = asked = Asked(total, grad, torch.empty_like(total))
        given = (order, phi_q, phi_k, v, clock, clock_end)
        logits = None if of_maps[0] is None else Logits(of_maps[0].dtype, ctx.scale)
        g_q, turn, g_gate = phi_q_grad(*given, states, y, asked, gate, known, logits)
        back, g_memory = reverse_states(*given, asked, gate, grad_end)
        g_k, g_v, g_clock = key_grads(*given, back, asked, gate, logits)
        clocks = (g_clock, clock_end_grad(order, g_clock, turn, states, back)) if order.decays else (None, None)
        others = g_v, *clocks, g_memory, *of_exact, g_gate
        if logits is None:
            return g_q, None, None, None, g_k, *others, None, None, *merged, *(None,) * 4
        (q, weight_q, keys, weight_k), asks = of_maps, ctx.needs_input_grad[2:4]
        weights = (
            matrix_grad(q, weight_q, g_q) if asks[0] else None,
            matrix_grad(keys, weight_k, g_k) if asks[1] else None,
        )
        return None, None, *weights, None, *others, g_q, g_k, *merged, *(None,) * 4


def mapped_launch(phi: Tensor, D: int, programs: int) -> Launch:
    """Of so many programs of `mapped_memory_kernel`: with operands ahead where they fit, twice a multiprocessor; else
    without, and with little memories three times."""
    launch, has = launch_of("mapped_memory", phi.dtype), shared_memory(phi.device)
    entries = power_of_two(phi.shape[-1]) * power_of_two(D)
    if phi.dtype == torch.float32:
        return launch._replace(stages=1)  # two take more shared memory than a Hopper has
    if not (programs < MANY or entries > LITTLE or 0 < has < AMPLE):
        return launch
    return launch._replace(split=False, stages=1, registers=168 if entries <= LITTLE // 2 else None)


class Logits(NamedTuple):
    """Of what a gradient is to be: of x @ matrix, where phi is the map of `scale` times that."""

    dtype: torch.dtype  # of the gradient
    scale: float


def scale_of(logits: Logits | None) -> float:
    return 1.0 if logits is None else logits.scale  # which is not looked at


def room_for_y(exact: Tensor) -> Tensor:
    """For rows like exact's [B, H, W, D], laid out by token."""
    B, H, W, D = exact.shape
    return exact.new_empty(B, W, H, D).transpose(1, 2)


def read_features(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, clock: Tensor, clock_end: Tensor, memory: Tensor, exact: Tensor,
    lse: Tensor, gate: Tensor, order: Order, branches: bool,
) -> Read:  # fmt: skip
    """`MemoryFunction` of phi_q [B, H, W, F]."""
    (B, H, W, F), (_, Hk, X, D) = phi_q.shape, v.shape
    states, end = states_of(order, phi_k, v, clock, clock_end, memory, whole=False)
    launch = launch_of("memory", phi_q.dtype)
    DV, parts = split(D, F, launch.chunk)
    y, branch, total = room_for_y(exact), unwritten(exact, lse, branches), torch.empty_like(lse)
    memory_kernel[(order.n, parts, B * Hk)](
        order.tokens, phi_q, phi_k, v, clock, clock_end, *states, exact, lse, gate, y, *branch, total,
        *v.stride()[:3], W, X, order.n, order.tokens.shape[1], order.segments, order.tiles, Hk,
        G=H // Hk, F=F, FP=power_of_two(F), D=D, DV=DV, TILE=TILE, BLOCK=order.block, DECAY=order.decays,
        BRANCHES=branches, AHEAD=DV <= 64, PRECISION=precision(phi_q.dtype), **launch.options,
    )  # fmt: skip
    return Read(y, *branch, total, phi_q, states, end)


def read_mapped(
    q: Tensor, weight: Tensor, factor: float, phi_k: Tensor, v: Tensor, clock: Tensor, clock_end: Tensor,
    memory: Tensor, exact: Tensor, lse: Tensor, gate: Tensor, order: Order, branches: bool, trains: bool,
) -> Read:  # fmt: skip
    """`MemoryFunction` of q [B, H, W, D] and the matrices [H, D, C] of its hedgehog map."""
    (B, H, W, D), (_, Hk, X, F) = q.shape, phi_k.shape
    launch = mapped_launch(phi_k, D, order.n * B * Hk)
    whole = not trains and order.tiles == 1
    states, end = states_of(order, phi_k, v, clock, clock_end, memory, whole)
    DV, parts = split(D, F, launch.chunk)
    y, branch = room_for_y(exact), unwritten(exact, lse, branches)
    total, phi_q = lse.new_empty(lse.shape if trains else 0), phi_k.new_empty((B, H, W, F) if trains else 0)
    matrices = split_matrices(weight, factor, q.dtype) if launch.split else weight
    mapped_memory_kernel[(order.n, parts, B * Hk)](
        order.tokens, q, matrices, phi_k, v, clock, clock_end, *states, exact, lse, gate,
        y, *branch, total, phi_q, factor, *q.stride()[:3], *v.stride()[:3], W, X, order.n, order.tokens.shape[1],
        order.segments, order.tiles, Hk, G=H // Hk, C=F // 2, CP=power_of_two(F // 2), D=D, DP=power_of_two(D), DV=DV,
        TILE=TILE, BLOCK=order.block, DECAY=order.decays, BRANCHES=branches, TRAINS=trains, SPLIT=launch.split,
        AHEAD=launch.split and launch.stages > 1, WHOLE=whole, PRECISION=precision(q.dtype), **launch.options,
    )  # fmt: skip
    return Read(y, *branch, total, phi_q, states, end)


def clock_end_grad(order: Order, g_clock: Tensor, turn: Tensor, states: States, back: States) -> Tensor:
    """Gradient of clock_end [B, Hk, blocks], from that of clock [B, Hk, X]; turn [B, H, W] is phi(q) times its own."""
    (B, Hk, X), (_, H, W), (F, D) = g_clock.shape, turn.shape, states.start.shape[2:]
    out = torch.empty(B, Hk, order.n * TILE // order.block, device=turn.device, dtype=torch.float32)
    clock_end_grad_kernel[(order.segments, B * Hk)](
        order.tokens, g_clock, turn, states.start, states.start_norm, back.start, back.start_norm, out,
        W, X, order.n, order.segments, order.tiles, G=H // Hk, F=F, D=D, TILE=TILE, BLOCK=order.block, SIZE=CROSSING,
    )  # fmt: skip
    return out


def merge_grad(
    dtype: torch.dtype, grad: Tensor, grad_branch: Tensor | None, grad_lse: Tensor | None,
    exact: Tensor, lse: Tensor, branch: Tensor, branch_lse: Tensor,
) -> tuple[Tensor, Tensor, Asked]:  # fmt: skip
    """Gradients of (exact, lse), and what is asked of the memory on its own, in `dtype`."""
    (B, H, W, D), programs = exact.shape, -(-exact.shape[2] // MERGED)
    g_exact, g_lse = torch.empty_like(exact), torch.empty_like(lse)
    down = torch.empty(B, H, W, D, device=exact.device, dtype=dtype)
    asked = Asked(torch.empty_like(lse), down, torch.empty_like(lse))
    given = [lse if x is None else x.contiguous() for x in (grad_branch, grad_lse)]  # what is missing is not read
    merge_grad_kernel[(programs, B * H)](
        grad, *given, exact, lse, branch, branch_lse, g_exact, g_lse, *asked, *grad.stride()[:3],
        W, H, D=D, DP=power_of_two(D), TILE=MERGED, BRANCH=grad_branch is not None, BRANCH_LSE=grad_lse is not None,
    )  # fmt: skip
    return g_exact, g_lse, asked


def summed(parts: Tensor) -> Tensor:
    """The sum over the first axis."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def sizes_of(order: Order, phi_q: Tensor, v: Tensor, asked: Asked) -> tuple[list, dict]:
    """The backward kernels' common arguments."""
    (_, H, W, F), (_, Hk, X, D) = phi_q.shape, v.shape
    strides = *asked.grad.stride()[:3], *v.stride()[:3]
    scalars = [*strides, W, X, order.n, order.tokens.shape[1], order.segments, order.tiles, Hk]
    sizes = {
        "G": H // Hk, "F": F, "D": D, "TILE": TILE, "BLOCK": order.block, "DECAY": order.decays,
        "PRECISION": precision(phi_q.dtype),
    }  # fmt: skip
    return scalars, sizes


def phi_q_grad(
    order: Order, phi_q: Tensor, phi_k: Tensor, v: Tensor, clock: Tensor, clock_end: Tensor,
    states: States, y: Tensor, asked: Asked, gate: Tensor, known: bool, logits: Logits | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(gradient of phi_q, each query's part [B, H, W] of that of its block's clock, the gate's [H]).

    Unless it is `known`, writes the delta of what is asked, of y. With `logits` the first is their gradient
    [B, H, W, F / 2].
    """
    (B, H, W, F), (_, Hk, _, D) = phi_q.shape, v.shape
    launch = launch_of("phi_q_grad", phi_q.dtype, power_of_two(F) * power_of_two(D))
    FB, parts = split(F, D, launch.chunk) if logits is None else (2 * power_of_two(F // 2), 1)
    scalars, sizes = sizes_of(order, phi_q, v, asked)
    out = torch.empty_like(phi_q) if logits is None else phi_q.new_empty(B, H, W, F // 2, dtype=logits.dtype)
    turn = torch.empty(parts, B, H, W if order.decays else 0, device=v.device, dtype=torch.float32)
    g_gate = turn.new_empty(parts, B, H, order.n)
    phi_q_grad_kernel[(order.n, parts, B * Hk)](
        order.tokens, phi_q, phi_k, v, clock, clock_end, *states, y, out, turn, g_gate, *asked, gate, scale_of(logits),
        *scalars, **sizes, FB=FB, DP=power_of_two(D), KNOWN=known, LOGITS=logits is not None,
        **launch.options,
    )  # fmt: skip
    return out, summed(turn), g_gate.sum((0, 1, 3))


def holds_halves(F: int, D: int, dtype: torch.dtype) -> bool:
    """Whether one program of each kernel that has a gradient of features has all F of a tile, so that it knows the
    sums of both halves; for features of a dtype and values of D channels."""
    entries = 2 * power_of_two(F // 2) * power_of_two(D)
    return entries <= min(launch_of(name, dtype, entries).chunk for name in ("phi_q_grad", "phi_k_grad"))


def reverse_states(
    order: Order, phi_q: Tensor, phi_k: Tensor, v: Tensor, clock: Tensor, clock_end: Tensor,
    asked: Asked, gate: Tensor, end: Tensor,
) -> tuple[States, Tensor]:  # fmt: skip
    """The gradient of the memory after every tile, and before the first token; `end` is that of the last memory."""
    (B, _, W, F), (_, Hk, _, D) = phi_q.shape, v.shape
    launch = launch_of("reverse_states", phi_q.dtype)
    DV, parts = split(D, F, launch.chunk)
    _, sizes = sizes_of(order, phi_q, v, asked)
    local = torch.empty(B * Hk, order.n, F, D, device=v.device, dtype=phi_q.dtype)
    norm = torch.empty(B * Hk, order.n, F, device=v.device, dtype=torch.float32)
    gain, gain_norm = norm.new_empty(B * Hk, order.segments, F, D), norm.new_empty(B * Hk, order.segments, F)
    reverse_states_kernel[(order.segments, parts, B * Hk)](
        phi_q, clock_end, local, norm, gain, gain_norm, *asked, gate, *asked.grad.stride()[:3],
        W, order.n, order.segments, order.tiles, Hk, **sizes, FP=power_of_two(F), DV=DV, **launch.options,
    )  # fmt: skip
    start, start_norm, begin = walk(end, gain, gain_norm, clock_end, order, back=True)
    return States(local, norm, start, start_norm), begin


def key_grads(
    order: Order, phi_q: Tensor, phi_k: Tensor, v: Tensor, clock: Tensor, clock_end: Tensor,
    back: States, asked: Asked, gate: Tensor, logits: Logits | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of phi_k [B, Hk, X, F], v [B, Hk, X, D] and clock [B, Hk, X], zero for tokens not in the memory.

    With `logits` the first is their gradient [B, Hk, X, F / 2].
    """
    F, (B, Hk, X, D) = phi_q.shape[-1], v.shape
    scalars, sizes = sizes_of(order, phi_q, v, asked)
    g_phi = torch.zeros_like(phi_k) if logits is None else phi_k.new_zeros(B, Hk, X, F // 2, dtype=logits.dtype)
    g_v = torch.zeros(B, Hk, X, D, device=v.device, dtype=v.dtype)
    given = (order.tokens, phi_q, phi_k, v, clock, clock_end, *back)
    FP = power_of_two(F) if logits is None else 2 * power_of_two(F // 2)
    DP, most = power_of_two(D), launch_of("key_grads", phi_q.dtype).chunk
    together = most >= FP * DP and FP <= DP  # else it takes more shared memory than any other kernel
    alone = together or logits is not None
    FB, parts = (FP, 1) if alone else split(F, D, launch_of("phi_k_grad", phi_q.dtype).chunk)
    g_clock = torch.zeros(parts, B, Hk, X if order.decays else 0, device=v.device, dtype=torch.float32)

    def run(name: str, parts: int, FB: int, DB: int, of_phi: bool, of_v: bool) -> None:
        key_grads_kernel[(order.n, parts, B * Hk)](
            *given, g_phi, g_clock, g_v, *asked, gate, scale_of(logits), *scalars, **sizes,
            GP=power_of_two(sizes["G"], 1), FB=FB, DB=DB, OF_PHI=of_phi, OF_V=of_v,
            LOGITS=of_phi and logits is not None, **launch_of(name, phi_q.dtype).options,
        )  # fmt: skip

    if together:
        run("key_grads", 1, FP, DP, of_phi=True, of_v=True)
    else:
        run("phi_k_grad", parts, FB, DP, of_phi=True, of_v=False)
        DB, parts = split(D, F, launch_of("value_grad", phi_q.dtype).chunk)
        run("value_grad", parts, FP, DB, of_phi=False, of_v=True)
    return g_phi, g_v, summed(g_clock)
