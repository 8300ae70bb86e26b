"""The operation as matmuls: any device, differentiable, memory linear in the length.

Same signature as `reference.attend`. A sequence is taken in segments; inside one everything is parallel:

1. rows are aligned to their own block grid (`align`);
2. the window's scores give the mass that every token receives (`local_attention`);
3. scores give every token's *lifetime*: it holds a slot from `arrive` until `death` (`lifetimes`);
4. the exact branch reads sinks, window and slots (`exact_branch`);
5. the memory is a linear attention over the tokens *in the order in which they died* (`memory_branch`).

A tile is a multiple of the block; all arithmetic runs on tiles. Blocks are numbered from the row's first unfinished
one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import self_recall
from .spec import TILE, KernelSpec
from .state import (
    EMPTY,
    AttentionOutput,
    Kernel,
    State,
    add_sink_logits,
    betas,
    by_head,
    capped,
    empty_state,
    features,
    host_may_look,
    log_decays,
    merge,
    novelty,
    quota,
    scores_from,
    softmax_of,
    unit,
    weigh_answers,
    wide,
    with_ones,
    within_reach,
)

SEGMENT = 1024  # tokens: what is held at once


@by_head
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Kernel,
    state: State | None = None,
    valid: Tensor | None = None,
    branches: bool = True,
) -> tuple[AttentionOutput, State]:
    """q [B, H, T, D], k and v [B, Hk, T, D], valid [B, T] bool -> (AttentionOutput over T, state after T).

    Without `branches` all but y is empty.
    """
    fresh = state is None
    kernel = within_reach(kernel, state, q.shape[2])
    state = empty_state(kernel.spec, k, v) if state is None else state
    aligned = valid is None and SEGMENT % tile_of(kernel.spec) == 0 and (fresh or begins_block(state, kernel.spec))
    whole = Whole(q.shape[2], branches)
    for start in range(0, q.shape[2], SEGMENT):
        now = slice(start, start + SEGMENT)
        keep = None if valid is None else valid[:, now]
        parts, state = segment(q[:, :, now], k[:, :, now], v[:, :, now], kernel, state, keep, aligned, branches)
        whole.add(start, parts)
    return whole.output(), state


class Whole:
    """The outputs of consecutive segments, joined; without gradients in place, so that no part is held twice."""

    def __init__(self, length: int, branches: bool):
        self.length, self.branches = length, branches
        self.parts: list[list[Tensor]] = []
        self.filled: list[Tensor] = []

    def add(self, start: int, part: list[Tensor]) -> None:
        size = part[0].shape[2]
        if size == self.length or torch.is_grad_enabled():
            self.parts.append(part)
            return
        self.filled = self.filled or [x.new_empty(*x.shape[:2], self.length, *x.shape[3:]) for x in part]
        for target, x in zip(self.filled, part, strict=True):
            target[:, :, start : start + size] = x

    def output(self) -> AttentionOutput:
        found = self.filled or [torch.cat(x, 2) if len(x) > 1 else x[0] for x in zip(*self.parts, strict=True)]
        return AttentionOutput(*found) if self.branches else AttentionOutput(found[0], *[found[0].new_empty(0)] * 4)


def begins_block(state: State, spec: KernelSpec) -> bool:
    """Whether the next token of every row begins a block, as far as the host may know."""
    return host_may_look(state.seen) and not any(seen % spec.block for seen in state.seen.tolist())


def tile_of(spec: KernelSpec) -> int:
    return spec.block * max(1, TILE // spec.block)


def segment(
    q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, state: State, valid: Tensor | None, aligned: bool, branches: bool
) -> tuple[list[Tensor], State]:
    """What is asked for of AttentionOutput, over one segment, and the state after it."""
    grid = align(q, k, v, kernel, state, valid, aligned)
    local = local_attention(grid, kernel)
    mass = received(grid, local, kernel.spec)
    life = live(grid, mass, kernel)
    rows = kernel._replace(log_gate=head_rows(grid, kernel.log_gate), sink_logits=head_rows(grid, kernel.sink_logits))
    exact, lse = exact_branch(grid, local, life, rows)
    parts = folds(grid, life, kernel)
    total = memory_branch(grid, life, parts, kernel) if parts else None
    out = merge(exact, lse, total, rows.log_gate)
    wanted = [out.y.to(q.dtype), *(out[1:] if branches else ())]
    return [grid.unalign(time_rows(grid, x)) for x in wanted], final_state(grid, life, mass, parts, kernel)


# --- 1. rows on their own block grid ------------------------------------------------------------------------


class Grid(NamedTuple):
    """A segment in aligned coordinates: 0 is the start of the row's first unfinished block.

    `front` positions before 0 hold what the ring still has; `n` tiles of `tile` tokens follow.
    """

    q: Tensor  # [B, H, n·tile, D]
    k: Tensor  # [B, Hk, front + n·tile, D]
    v: Tensor  # [B, Hk, front + n·tile, D]
    pos: Tensor  # [B, front + n·tile] position of an entry of k and v, EMPTY where there is none (sinks: EMPTY)
    mass: Tensor  # [B, Hk, front] mass that the ring's tokens have received so far
    sink_k: Tensor  # [B, Hk, sinks, D]
    sink_v: Tensor  # [B, Hk, sinks, D]
    sink_pos: Tensor  # [B, sinks]
    base: Tensor  # [B] position of coordinate 0
    last: Tensor  # [B] the last block that has begun when the segment ends (−1: none of this segment)
    seen: Tensor  # [B] valid tokens when it ends
    source: Tensor | None  # [B, T] coordinate of every input token; None: token t stands at t
    length: int  # T
    state: State  # before the segment
    front: int
    tile: int

    @property
    def n(self) -> int:
        return self.q.shape[2] // self.tile

    def unalign(self, x: Tensor) -> Tensor:  # [B, H, n·tile, ...] -> [B, H, T, ...]
        if self.source is None:
            return x[:, :, : self.length]
        return take_time(x, self.source)


def take_time(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, X, ...] at index [B, T] -> [B, H, T, ...]."""
    index = index.view(index.shape[0], 1, index.shape[1], *[1] * (x.ndim - 3))
    return x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:]))


def align(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, state: State, valid: Tensor | None, aligned: bool) -> Grid:
    spec, (B, _, T, _), device = kernel.spec, q.shape, q.device
    tile = tile_of(spec)
    base = state.seen // spec.block * spec.block
    offset = state.seen - base
    room = T if aligned else T + spec.block - 1
    width = -(-room // tile) * tile
    count = torch.full_like(state.seen, T) if valid is None else valid.sum(1)
    seen = state.seen + count
    front = max(spec.ring, -(-spec.back * spec.block // tile) * tile)

    coordinate = torch.arange(width, device=device)
    rank = coordinate - offset[:, None]  # [B, width] which new token stands there
    new = (rank >= 0) & (rank < count[:, None])
    if aligned:
        source = None
        pad = (0, 0, 0, width - T)
        q, k, v = (torch.nn.functional.pad(x, pad) for x in (q, k, v))
    else:
        order = (
            torch.arange(T, device=device).expand(B, T) if valid is None else (~valid).int().argsort(dim=1, stable=True)
        )
        index = order.gather(1, rank.clamp(0, T - 1))
        q, k, v = (take_time(x, index) for x in (q, k, v))
        nth = torch.arange(T, device=device).expand(B, T) if valid is None else valid.cumsum(1) - 1
        source = (offset[:, None] + nth).clamp(0, width - 1)

    old = base[:, None] + torch.arange(-front, spec.block, device=device)  # [B, front + C] what the ring may hold
    entry = spec.sinks + old % spec.ring
    in_ring = (old >= 0) & (state.pos[:, 0].gather(1, entry) == old)
    ring_k, ring_v, ring_mass = (take_time(x, entry) for x in (state.keys, state.values, state.mass))

    def join(ring: Tensor, fresh: Tensor) -> Tensor:  # the ring's part, then the new tokens
        body = torch.where(new[:, None, :, None], fresh, 0.0)
        head = torch.where(in_ring[:, None, :, None], ring, 0.0)
        begun = torch.nn.functional.pad(head[:, :, front:], (0, 0, 0, width - spec.block))
        return torch.cat([head[:, :, :front], body + begun], 2)

    pos = torch.where(new, base[:, None] + coordinate, EMPTY)
    begun = torch.nn.functional.pad(torch.where(in_ring, old, EMPTY), (0, width - spec.block), value=EMPTY)
    pos = torch.cat([begun[:, :front], torch.maximum(pos, begun[:, front:])], 1)
    grid_k, grid_v = join(ring_k, k), join(ring_v, v)
    mass = torch.nn.functional.pad((ring_mass * in_ring[:, None]), (0, width - spec.block))

    sink_pos = torch.arange(spec.sinks, device=device).expand(B, -1)
    at = (sink_pos - base[:, None] + front).clamp(0, grid_k.shape[2] - 1)
    had = sink_pos < state.seen[:, None]

    def sinks(stored: Tensor, x: Tensor) -> Tensor:
        return torch.where(had[:, None, :, None], stored[:, :, : spec.sinks], take_time(x, at))

    sink_k, sink_v = sinks(state.keys, grid_k), sinks(state.values, grid_v)
    return Grid(
        q=q, k=grid_k, v=grid_v, pos=torch.where(pos < spec.sinks, EMPTY, pos), mass=mass,
        sink_k=sink_k, sink_v=sink_v, sink_pos=torch.where(sink_pos < seen[:, None], sink_pos, EMPTY),
        base=base, last=(seen - 1) // spec.block - base // spec.block, seen=seen,
        source=source, length=T, state=state, front=front, tile=tile,
    )  # fmt: skip


# --- 2. the window ------------------------------------------------------------------------------------------


class Queries(NamedTuple):
    """Every tile's queries, scaled; those of a group stand under each other."""

    near: Tensor  # [B, Hk, n, G·tile, D]
    far: Tensor | None  # the same as if they stood at `reach`; None: nothing is beyond it
    pos: Tensor  # [B, n, tile]


class Local(NamedTuple):
    """Softmax of every tile's queries over the sinks and what their windows see, by itself."""

    queries: Queries
    weights: Tensor  # [B, Hk, n, G·tile, sinks + reach]
    value: Tensor  # [B, Hk, n, sinks + reach, D]
    lse: Tensor  # [B, Hk, n, G·tile]


def tiles(x: Tensor, size: int, step: int, dim: int) -> Tensor:
    """Overlapping pieces [..., n, size, ...] of `dim`, as a view."""
    return x.unfold(dim, size, step).movedim(-1, dim + 1)


def query_rows(grid: Grid, x: Tensor, kv_heads: int) -> Tensor:
    """[B, H, n·tile, D] -> [B, Hk, n, G·tile, D]: the queries of a group stand under each other."""
    B, H, _, D = x.shape
    x = x.view(B, kv_heads, H // kv_heads, grid.n, grid.tile, D)
    return x.transpose(2, 3).reshape(B, kv_heads, grid.n, -1, D)


def time_rows(grid: Grid, x: Tensor) -> Tensor:
    """[B, Hk, n, G·tile, ...] -> [B, H, n·tile, ...], the inverse of `query_rows`."""
    B, Hk, n = x.shape[:3]
    x = x.view(B, Hk, n, -1, grid.tile, *x.shape[4:]).transpose(2, 3)
    return x.reshape(B, -1, n * grid.tile, *x.shape[5:])


def head_rows(grid: Grid, x: Tensor | None) -> Tensor | None:
    """A number a query head, [H], as [Hk, G·tile]: what broadcasts over the rows of all tiles."""
    Hk = grid.k.shape[1]
    return None if x is None else x.view(Hk, -1, 1).expand(-1, -1, grid.tile).flatten(1)


def hide(scores: Tensor, visible: Tensor) -> None:
    """Makes scores −inf where `visible`, which broadcasts to them, is False."""
    scores.add_(torch.where(visible, 0.0, -torch.inf))  # faster than masked_fill_


def window_reach(grid: Grid, spec: KernelSpec) -> tuple[int, int]:
    """(first entry of the first tile's reach, its length): whole tiles back to the first visible block."""
    back = -(-spec.back * spec.block // grid.tile) * grid.tile
    return grid.front - back, back + grid.tile


def queries_of(grid: Grid, kernel: Kernel) -> Queries:
    query = query_rows(grid, grid.q.to(wide(grid.q.dtype)), grid.k.shape[1])
    pos = (grid.base[:, None] + torch.arange(grid.n * grid.tile, device=query.device)).view(-1, grid.n, grid.tile)
    far = None
    if kernel.spec.reach and kernel.rotation is not None:
        rows = pos.repeat(1, 1, query.shape[3] // grid.tile)[:, None]
        far = kernel.rotation.turn(query, rows, kernel.spec.reach) * kernel.scaling
    return Queries(query * kernel.scaling, far, pos)


def local_attention(grid: Grid, kernel: Kernel) -> Local:
    spec, queries = kernel.spec, queries_of(grid, kernel)
    first, reach = window_reach(grid, spec)

    def beside_sinks(sinks: Tensor, x: Tensor) -> Tensor:  # -> [B, Hk, n, sinks + reach, D]
        window = tiles(x[:, :, first:], reach, grid.tile, 2)
        return torch.cat([sinks[:, :, None].expand(-1, -1, grid.n, -1, -1), window], 3).to(queries.near.dtype)

    key, value = beside_sinks(grid.sink_k, grid.k), beside_sinks(grid.sink_v, grid.v)
    scores = capped(queries.near @ key.transpose(-1, -2), kernel.softcap)
    if queries.far is not None:
        at, sinks = grid.sink_pos[:, None, None], slice(0, spec.sinks)
        scores[..., sinks] = reaching(scores[..., sinks], queries, turned(key[:, :, :1, sinks], at, kernel), at, kernel)
    hide(scores.unflatten(3, (-1, grid.tile)), visible_locally(grid, queries.pos, spec)[:, None, :, None])
    weights, lse = softmax_of(scores)
    return Local(queries, weights, value, lse)


def visible_locally(grid: Grid, at: Tensor, spec: KernelSpec) -> Tensor:
    """[B, n, tile, sinks + reach]: sinks and positions that queries at [B, n, tile] see, sinks apart, by the window.

    A query that sees nothing, which is padding, sees itself.
    """
    first, reach = window_reach(grid, spec)
    key_pos, at = tiles(grid.pos[:, first:], reach, grid.tile, 1)[:, :, None], at[..., None]
    inside = (key_pos != EMPTY) & (key_pos <= at) & (at // spec.block - key_pos // spec.block <= spec.back)
    sink_pos = grid.sink_pos[:, None, None]
    visible = torch.cat([(sink_pos != EMPTY) & (sink_pos <= at), inside], -1)
    itself = visible.diagonal(spec.sinks + reach - grid.tile, 2, 3)  # [B, n, tile]
    itself |= ~visible.any(-1)
    return visible


def turned(key: Tensor, pos: Tensor, kernel: Kernel) -> Tensor:
    """Keys [B, Hk, ..., X, D] of positions [B, 1 or Hk, ..., X] as they would be at position 0."""
    assert kernel.rotation is not None
    return kernel.rotation.turn(key, pos, 0)


def reaching(near: Tensor, queries: Queries, key: Tensor, pos: Tensor, kernel: Kernel) -> Tensor:
    """Scores `near` [B, Hk, n, G·tile, X], but with keys of positions [B, 1 or Hk, 1 or n, X] that are beyond reach
    standing there; `key` [B, Hk, 1 or n, X, D] are `turned`."""
    assert queries.far is not None
    beyond = pos[..., None, :] < (queries.pos - kernel.spec.reach)[:, None, :, :, None]  # [B, 1 or Hk, n, tile, X]
    far = capped(queries.far @ key.transpose(-1, -2), kernel.softcap)
    near, far = (x.unflatten(3, (-1, beyond.shape[3])) for x in (near, far))
    return torch.where(beyond[:, :, :, None], far, near).flatten(3, 4)


@torch.no_grad()
def received(grid: Grid, local: Local, spec: KernelSpec) -> Tensor:
    """Attention mass [B, Hk, front + n·tile] from the queries of later blocks, under sinks and window alone."""
    if not spec.measures("attention"):
        return grid.mass
    (first, reach), at = window_reach(grid, spec), local.queries.pos
    is_query = (at >= grid.state.seen[:, None, None]) & (at < grid.seen[:, None, None])  # [B, n, tile]
    p = local.weights.detach().unflatten(3, (-1, grid.tile // spec.block, spec.block))  # [B, Hk, n, G, per, block, X]
    counts = is_query.to(p.dtype).view(-1, 1, grid.n, 1, p.shape[4], 1, spec.block)
    p = (counts @ p)[..., 0, spec.sinks :].sum(3)  # [B, Hk, n, tile/block, reach]
    key_block = (torch.arange(reach, device=p.device) - (reach - grid.tile)) // spec.block
    p = (p * (key_block < torch.arange(p.shape[3], device=p.device)[:, None])).sum(3)  # [B, Hk, n, reach]
    mass = grid.mass.clone()
    for part in range(reach // grid.tile):  # overlap-add: a tile of keys is in the reach of several tiles of queries
        start = first + part * grid.tile
        piece = p[..., part * grid.tile : (part + 1) * grid.tile].flatten(2)
        mass[:, :, start : start + piece.shape[2]] += piece
    return mass


# --- 3. lifetimes -------------------------------------------------------------------------------------------


class Life(NamedTuple):
    """The store of all tokens that may hold a slot or be folded in this segment: old slots, then the leaving tokens.

    A token holds a slot during the blocks arrive <= b < death.
    """

    key: Tensor  # [B, Hk, X, D]
    value: Tensor  # [B, Hk, X, D]
    pos: Tensor  # [B, Hk, X]
    score: Tensor  # [B, Hk, X, shares]
    arrive: Tensor  # [B, Hk, X] block at which it leaves the window; `never` where there is no token
    rejected: tuple[Tensor, ...]  # a share: [B, Hk, X] block from which that share does not hold it any more
    clock: Tensor  # [B, Hk, X] log decay is clock_end(b) − clock
    clock_end: Tensor  # [B, Hk, n·tile/block] the clock when block b's predecessors have been folded
    phi: Tensor | None  # [B, Hk, X, F]

    @property
    def death(self) -> Tensor:
        return self.rejected[-1]


def live(grid: Grid, mass: Tensor, kernel: Kernel) -> Life:
    spec, state, blocks = kernel.spec, grid.state, grid.n * grid.tile // kernel.spec.block
    B, Hk = grid.k.shape[:2]
    start = grid.front - spec.ring  # the block that leaves when block 0 begins
    leaving = slice(start, start + grid.n * grid.tile)
    slot = slice(spec.sinks + spec.ring, spec.positions)
    key = torch.cat([state.keys[:, :, slot], grid.k[:, :, leaving]], 2)
    value = torch.cat([state.values[:, :, slot], grid.v[:, :, leaving]], 2)
    left = grid.pos[:, None, leaving].expand(B, Hk, -1)
    pos = torch.cat([state.pos[:, :, slot], left], 2)
    block = torch.arange(left.shape[2], device=left.device) // spec.block
    arrive = torch.cat([torch.full_like(state.pos[:, :, slot], -1), block.expand_as(left)], 2)
    arrive = torch.where(pos == EMPTY, blocks, arrive)

    log_decay = grid.mass.new_zeros(B, Hk, left.shape[2])
    own = log_decays(kernel, grid.k[:, :, leaving], grid.v[:, :, leaving])
    if own is not None:
        log_decay = log_decay + own
    clock = (log_decay * (left != EMPTY)).cumsum(2)
    clock_end = clock[:, :, spec.block - 1 :: spec.block]
    phi = None
    if kernel.map_k is not None and spec.has_memory:
        phi = features(kernel, kernel.map_k, key, pos)
    clock = torch.cat([-state.decay[:, :, slot], clock], 2)
    life = Life(key, value, pos, grid.state.score, arrive, (), clock, clock_end, phi)
    score = store_scores(grid, life, mass[:, :, leaving], kernel)
    return life._replace(score=score, rejected=lifetimes(spec, score.detach(), arrive, blocks))


def store_scores(grid: Grid, life: Life, mass: Tensor, kernel: Kernel) -> Tensor:
    """[B, Hk, X, shares]: what the holders brought along, and the scores of those who leave in this segment."""
    spec = kernel.spec
    if not spec.slots:
        return mass.new_zeros(*life.pos.shape, len(spec.shares))
    key, value = life.key[:, :, spec.slots :], life.value[:, :, spec.slots :]
    found = {}
    with torch.no_grad():
        if spec.measures("attention"):
            found["attention"] = mass
        if spec.measures("recall"):
            found["recall"] = recall_errors(grid, life, kernel)
        if spec.measures("value"):
            found["value"] = value.to(mass.dtype).norm(dim=-1)
        if spec.measures("keydiff"):
            blocks = key.unflatten(2, (-1, spec.block))
            found["keydiff"] = novelty(blocks, key_sums(grid, spec)[:, :, :-1, None]).flatten(2)
    new = scores_from(kernel, found, key, value, life.pos[:, :, spec.slots :])
    return torch.cat([grid.state.score, torch.stack(new, -1)], 2)


def key_sums(grid: Grid, spec: KernelSpec) -> Tensor:
    """[B, Hk, n·tile/block + 1, D]: the sum of all keys before each block, sinks left out; the last: of all."""
    coordinate = torch.arange(grid.n * grid.tile, device=grid.k.device)
    new = (grid.pos[:, grid.front :] != EMPTY) & (coordinate >= (grid.state.seen - grid.base)[:, None])
    start = grid.state.key_sum[:, :, None]
    keys = (grid.k[:, :, grid.front :].to(start.dtype) * new[:, None, :, None]).unflatten(2, (-1, spec.block))
    return torch.cat([start, keys.sum(3)], 2).cumsum(2)


def recall_errors(grid: Grid, life: Life, kernel: Kernel) -> Tensor:
    """‖v − answer‖ [B, Hk, leaving] of the memory of *all* blocks before a token's own, to that token's key."""
    assert life.phi is not None
    spec, slots, value = kernel.spec, kernel.spec.slots, life.value
    clock, clock_end = life.clock, life.clock_end
    phi = life.phi
    v1 = with_ones(value.to(phi.dtype)) * (life.pos != EMPTY)[..., None]
    held = v1[:, :, :slots] * (-clock[:, :, :slots, None]).exp()
    start = grid.state.memory + phi[:, :, :slots].transpose(-1, -2) @ held  # everything that has left so far
    phi, v1, clock = phi[:, :, slots:], v1[:, :, slots:], clock[:, :, slots:]
    n, tile, per = grid.n, grid.tile, grid.tile // spec.block
    phi, v1 = phi.unflatten(2, (n, tile)), v1.unflatten(2, (n, tile))
    clock = clock.unflatten(2, (n, tile))
    end = clock_end[:, :, per - 1 :: per]  # [B, Hk, n] the clock at the end of a tile
    before = torch.cat([torch.zeros_like(end[:, :, :1]), end], 2)  # [B, Hk, n + 1]
    gain = phi.transpose(-1, -2) @ (v1 * (end[..., None] - clock).exp()[..., None])
    memory = scan(start, gain, before)[:, :, :-1]  # [B, Hk, n, F, D + 1] at the start of every tile
    # inside the tile: earlier blocks only; a token's memory ends with the block before its own
    block_start = torch.cat([before[:, :, :1], clock_end], 2)[:, :, :-1].repeat_interleave(spec.block, 2)
    block_start = block_start.unflatten(2, (n, tile))
    index = torch.arange(tile, device=phi.device) // spec.block
    earlier = index[:, None] > index
    weight = (block_start[..., :, None] - clock[..., None, :]).masked_fill(~earlier, -torch.inf).exp()
    near = ((phi @ phi.transpose(-1, -2)) * weight) @ v1
    total = near + (phi @ memory) * (block_start - before[:, :, :-1, None]).exp()[..., None]
    return self_recall(total.flatten(2, 3), value[:, :, slots:])


def scan(start: Tensor, gain: Tensor, clock: Tensor) -> Tensor:
    """M_0 = start, M_{i+1} = exp(clock_{i+1} − clock_i) M_i + gain_i, all at once.

    start [B, Hk, F, D], gain [B, Hk, n, F, D], clock [B, Hk, n + 1] -> [B, Hk, n + 1, F, D]. One small [n, n] matrix of
    decays instead of n steps.
    """
    steps = torch.cat([start[:, :, None], gain], 2)
    weight = (clock[..., :, None] - clock[..., None, :]).tril().exp().tril()
    return (weight @ steps.flatten(3)).view_as(steps)


@torch.no_grad()
def lifetimes(spec: KernelSpec, score: Tensor, arrive: Tensor, blocks: int) -> tuple[Tensor, ...]:
    """A share: the first block at which it does not hold the token, [B, Hk, X] (arrive itself: never held).

    A place is only ever lost to a better token, so a token is held during b while fewer than `capacity` of those
    that had applied by then are better.
    """
    rejected, applies, start = [], arrive, 0
    entry = torch.arange(arrive.shape[2], device=arrive.device)
    for s, (_, capacity) in enumerate(spec.shares):
        # holders of a later share were rejected by this one before
        past = (entry >= start + capacity) & (entry < spec.slots)
        candidate = torch.where(past, blocks, applies)
        death = torch.maximum(candidate, outlives(score[..., s], candidate, quota(spec, s, candidate), blocks))
        rejected.append(torch.where(past, applies, death))
        applies, start = rejected[-1], start + capacity
    return tuple(rejected)


def outlives(score: Tensor, arrive: Tensor, capacity: Tensor | int, blocks: int) -> Tensor:
    """The first block by which `capacity` (or [Hk, 1]) better tokens have arrived, [B, Hk, X]; `blocks` if none."""
    if not isinstance(capacity, Tensor) and not capacity:
        return torch.zeros_like(arrive)
    order = score.masked_fill(arrive >= blocks, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    here = arrive.gather(-1, order)[:, :, None] <= torch.arange(blocks, device=arrive.device)[:, None]
    limit = capacity[..., None] if isinstance(capacity, Tensor) else capacity
    # [B, Hk, blocks] the rank of the worst that `capacity` places hold; it only ever falls
    worst = (here.cumsum(-1, dtype=torch.int32) < limit).sum(-1)
    worst = torch.where(torch.as_tensor(capacity, device=worst.device) > 0, worst, EMPTY)
    rank = torch.arange(order.shape[-1], device=order.device).expand(order.shape).contiguous()
    held = blocks - torch.searchsorted(worst.flip(-1), rank)
    return torch.empty_like(arrive).scatter_(-1, order, held)


def table(member: Tensor, width: int) -> Tensor:
    """Indices of the members of a row, packed to the left: [..., X] bool -> [..., width], X where a place is free."""
    X = member.shape[-1]
    place = torch.where(member, member.cumsum(-1) - 1, width)
    index = torch.arange(X, device=member.device).expand_as(place)
    out = torch.full((*member.shape[:-1], width + 1), X, device=member.device)
    return out.scatter_(-1, place, index)[..., :width]


def pick(x: Tensor, index: Tensor, blank: float = 0.0) -> Tensor:
    """x [B, Hk, X, ...] at index [B, Hk, n, Y] -> [B, Hk, n, Y, ...]; index X gives `blank`."""
    B, Hk = index.shape[:2]
    padded = torch.cat([x, x.new_full((B, Hk, 1, *x.shape[3:]), blank)], 2)
    if x.ndim == 3:
        return padded.gather(2, index.flatten(2)).view_as(index)
    first = torch.arange(B * Hk, device=x.device).view(B, Hk, 1, 1) * padded.shape[2]
    rows = padded.flatten(0, 2).index_select(0, (first + index).flatten())  # copies rows; gather would single numbers
    return rows.view(*index.shape, *x.shape[3:])


# --- 4. the exact branch ------------------------------------------------------------------------------------


def query_blocks(grid: Grid, spec: KernelSpec) -> Tensor:  # [n, tile]
    return (torch.arange(grid.n * grid.tile, device=grid.q.device) // spec.block).view(grid.n, grid.tile)


def exact_branch(grid: Grid, local: Local, life: Life, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Softmax over sinks, window and slots -> (exact [B, Hk, n, G·tile, D], lse [B, Hk, n, G·tile])."""
    exact, lse = local.weights @ local.value, local.lse
    if kernel.spec.slots:
        exact, lse = beside_slots(exact, grid, local, life, kernel)
    return add_sink_logits(exact, lse, kernel)


def beside_slots(exact: Tensor, grid: Grid, local: Local, life: Life, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """`exact` [B, Hk, n, G·tile, D], and what the tokens give that hold a slot, under one normaliser: (exact, lse)."""
    spec, queries, index = kernel.spec, local.queries, holders(grid, life, kernel.spec)
    key = life.key.to(exact.dtype)
    scores = capped(queries.near @ pick(key, index).transpose(-1, -2), kernel.softcap)
    if queries.far is not None:
        pos = pick(life.pos, index, EMPTY)
        scores = reaching(scores, queries, pick(turned(key, life.pos, kernel), index), pos, kernel)
    first = query_blocks(grid, spec)[:, :: spec.block, None]  # [n, tile/block, 1]
    arrive, death = (pick(x, index, EMPTY)[:, :, :, None] for x in (life.arrive, life.death))
    alive = (arrive <= first) & (first < death)  # [B, Hk, n, tile/block, slots + 1]
    hide(scores.unflatten(3, (-1, alive.shape[3], spec.block)), alive[:, :, :, None, :, None])
    if spec.learned_share is not None:
        bias = slot_bias(grid, life, index, spec)[:, :, :, None]
        scores = (scores.unflatten(3, (-1, grid.tile)) + bias).flatten(3, 4)
    scores[..., -1] = local.lse
    weights, lse = softmax_of(scores)
    return torch.addcmul(weights @ pick(life.value, index).to(exact.dtype), weights[..., -1:], exact), lse


def holders(grid: Grid, life: Life, spec: KernelSpec) -> Tensor:
    """Entries of the store [B, Hk, n, X + 1] that hold a slot during some block of a tile; past the last: no entry.

    The last one is none of them: there stands what the window gives, as one more token.
    """
    first = query_blocks(grid, spec)[:, :1]  # [n, 1]
    last, arrive, death = first + grid.tile // spec.block, life.arrive[:, :, None], life.death[:, :, None]
    member = (arrive < last) & (death > first) & (death > arrive)  # [B, Hk, n, X]
    most = spec.slots + grid.tile - spec.block  # whoever holds one when the tile begins, and who comes later
    if host_may_look(member):
        most = int(member.sum(-1).max())
    return torch.nn.functional.pad(table(member, most), (0, 1), value=member.shape[-1])


def learned_tenure(life: Life, spec: KernelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(log sigmoid(score), first block, first block after) of every token's time under the learned share."""
    share = spec.learned_share
    assert share is not None
    since = life.rejected[share - 1] if share else life.arrive
    return torch.nn.functional.logsigmoid(life.score[..., share]), since, life.rejected[share]


def slot_bias(grid: Grid, life: Life, index: Tensor, spec: KernelSpec) -> Tensor:
    """[B, Hk, n, tile, slots]: what the learned score adds to the logits of the slots' tokens `index`."""
    bias, since, until = learned_tenure(life, spec)
    block = query_blocks(grid, spec)[..., None]
    holds = (pick(since, index)[:, :, :, None] <= block) & (pick(until, index, EMPTY)[:, :, :, None] > block)
    return torch.where(holds, pick(bias, index)[:, :, :, None], 0.0)


# --- 5. the memory ------------------------------------------------------------------------------------------


class Fold(NamedTuple):
    """What the tokens of the store add to columns of the memory once they are dead: exp(now − clock) phi valueᵀ."""

    start: Tensor  # [B, Hk, F, C] the memory's columns before the segment
    phi: Tensor  # [B, Hk, X, F]
    value: Tensor  # [B, Hk, X, C]
    clock: Tensor  # [B, Hk, X]


def folds(grid: Grid, life: Life, kernel: Kernel) -> list[Fold]:
    """The memory's columns: all by one rule, or the values' by the delta rule and the normaliser's additively."""
    if not kernel.spec.has_memory:
        return []
    assert life.phi is not None
    start, value = grid.state.memory, life.value.to(life.phi.dtype)
    if not kernel.spec.is_delta:
        return [Fold(start, life.phi, with_ones(value), life.clock)]
    mass = Fold(start[..., -1:], life.phi, torch.ones_like(value[..., :1]), life.clock)
    return [corrected(grid, life, Fold(start[..., :-1], unit(life.phi), value, life.clock), kernel), mass]


def death_groups(grid: Grid, life: Life, spec: KernelSpec, order: Tensor | None = None) -> Tensor:
    """Entries of the store [B, Hk, n + 1, tile] by the tile at which they die, in `order` [B, Hk, X]; X: no entry.

    Those that die in (first block of tile i−1, first block of tile i] are group i, and at most a tile's worth, since
    a place is lost only to somebody who comes.
    """
    per = grid.tile // spec.block
    group = torch.where(life.death < 0, 0, -(-life.death // per))  # [B, Hk, X]
    group = group.masked_fill((life.pos == EMPTY) | (life.death >= grid.n * per), EMPTY)
    group = group if order is None else group.gather(2, order)
    groups = torch.arange(grid.n + 1, device=group.device)[:, None]
    index = table(group[:, :, None] == groups, grid.tile)
    if order is None:
        return index
    return torch.nn.functional.pad(order, (0, 1), value=order.shape[2]).gather(2, index.flatten(2)).view_as(index)


def memory_branch(grid: Grid, life: Life, parts: list[Fold], kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Numerator [B, Hk, n, G·tile, D] and normaliser [B, Hk, n, G·tile, 1] of everything that has lost its place."""
    assert kernel.map_q is not None
    pos = grid.base[:, None] + torch.arange(grid.n * grid.tile, device=grid.q.device)
    phi_q = query_rows(grid, features(kernel, kernel.map_q, grid.q, pos[:, None]), grid.k.shape[1])
    index = death_groups(grid, life, kernel.spec)
    numerator, norm = (x for part in parts for x in linear(grid, life, part, phi_q, index, kernel.spec))
    if kernel.spec.is_delta:
        return weigh_answers(numerator, norm, phi_q)
    return numerator, norm


def linear(grid: Grid, life: Life, part: Fold, phi_q: Tensor, index: Tensor, spec: KernelSpec) -> list[Tensor]:
    """What the queries' features [B, Hk, n, rows, F] read: a linear attention over tokens in order of death.

    Values [B, Hk, n, rows, D] and normaliser [B, Hk, n, rows, 1] apart, as far as `part` has them.
    """
    per = grid.tile // spec.block
    phi, value, clock = (pick(x, index) for x in part[1:])
    death = pick(life.death, index, torch.iinfo(torch.int64).max)

    at = life.clock_end[:, :, ::per]  # [B, Hk, n] the clock at a tile's first block
    faded = value[:, :, :-1] * (at[..., None] - clock[:, :, :-1]).clamp(max=0).exp()[..., None]
    gain = phi[:, :, :-1].transpose(-1, -2) @ faded
    memory = scan(part.start, gain, torch.cat([torch.zeros_like(at[:, :, :1]), at], 2))[:, :, 1:]

    now = life.clock_end.repeat_interleave(spec.block, 2).unflatten(2, (grid.n, grid.tile))  # [B, Hk, n, tile]
    weight = (now[..., None] - clock[:, :, 1:, None]).clamp(max=0).exp()
    weight = weight * (death[:, :, 1:, None] <= query_blocks(grid, spec)[..., None])  # died inside the tile, before
    near = phi_q @ phi[:, :, 1:].transpose(-1, -2)
    near = scaled(near.unflatten(3, (-1, grid.tile)), weight[:, :, :, None]).flatten(3, 4)
    left = (now - at[..., None]).exp().repeat(1, 1, 1, near.shape[3] // grid.tile)[..., None]
    D = grid.v.shape[-1]
    return [
        torch.addcmul(near @ died, left, phi_q @ before)
        for died, before in zip(columns(value[:, :, 1:], D), columns(memory, D), strict=True)
    ]


def columns(x: Tensor, D: int) -> list[Tensor]:
    """x [..., D + 1] as [..., D] and [..., 1]: products with 65 columns take half as long again as those with 64."""
    normaliser = [x[..., D:].mT.contiguous().mT] if x.shape[-1] > D else []
    return [x[..., :D], *normaliser]


def scaled(x: Tensor, by: Tensor) -> Tensor:
    """x · by, in the place of x where nobody differentiates."""
    return x * by if x.requires_grad or by.requires_grad else x.mul_(by)


def corrected(grid: Grid, life: Life, part: Fold, kernel: Kernel) -> Fold:
    """The delta rule (arXiv:2102.11174) as a fold: every value becomes what its token really adds when it dies.

    Tokens are folded in the order of death, then position. Inside a group the corrections solve a triangular system
    (the WY form, arXiv:2406.06484; decays as in arXiv:2412.06464); between groups there is one small step.
    """
    spec, per = kernel.spec, grid.tile // kernel.spec.block
    by_pos = life.pos.argsort(dim=-1, stable=True)
    order = by_pos.gather(2, life.death.gather(2, by_pos).argsort(dim=-1, stable=True))
    index = death_groups(grid, life, spec, order)
    start = torch.cat([torch.zeros_like(life.clock_end[:, :, :1]), life.clock_end], 2)  # [B, Hk, blocks + 1]
    turn = start.gather(2, life.death.clamp(0, start.shape[2] - 1))  # the clock when the block of its death begins
    turn = torch.minimum(turn, life.clock)  # a token that dies on leaving is folded at its own time

    phi, value, aged, now = (pick(x, index) for x in (part.phi, part.value, (turn - part.clock).exp(), turn))
    beta = pick(betas(kernel, life.key), index)[..., None]  # [B, Hk, n + 1, tile, 1]
    since = torch.cat([torch.zeros_like(start[:, :, :1]), life.clock_end[:, :, ::per]], 2)  # [B, Hk, n + 1]
    until = torch.cat([since[:, :, 1:], since[:, :, -1:]], 2)
    decay = (now[..., :, None] - now[..., None, :]).clamp(max=0).exp()
    earlier = (beta * decay * (phi @ phi.transpose(-1, -2)).to(phi.dtype)).tril(-1)
    wanted = torch.cat([aged[..., None] * value, phi * (now - since[..., None]).clamp(max=0).exp()[..., None]], -1)
    solved = torch.linalg.solve_triangular(earlier, beta * wanted, upper=False, unitriangular=True)
    own, reads = solved.split((value.shape[-1], phi.shape[-1]), -1)

    left = phi * (until[..., None] - now).clamp(max=0).exp()[..., None]
    memory, added = part.start, []
    for i in range(grid.n + 1):
        added.append(own[:, :, i] - reads[:, :, i] @ memory)
        kept = memory * (until[:, :, i] - since[:, :, i]).exp()[..., None, None]
        memory = kept + left[:, :, i].transpose(-1, -2) @ added[-1]
    X = life.pos.shape[2]
    flat, added_all = index.flatten(2), torch.cat(added, 2)
    out = added_all.new_zeros(*flat.shape[:2], X + 1, added_all.shape[-1])
    out = out.scatter(2, flat[..., None].expand_as(added_all), added_all)[:, :, :X]
    return part._replace(value=out, clock=turn)


# --- the state afterwards -----------------------------------------------------------------------------------


def final_state(grid: Grid, life: Life, mass: Tensor, parts: list[Fold], kernel: Kernel) -> State:
    spec, state = kernel.spec, grid.state
    B, Hk = grid.k.shape[:2]
    last = grid.last[:, None, None]  # [B, 1, 1]
    begun = grid.last >= 0
    end = life.clock_end.gather(2, last.clamp(min=0).expand(B, Hk, 1)) * begun[:, None, None]  # [B, Hk, 1]

    places, entry = [], torch.arange(life.pos.shape[2], device=life.pos.device)
    applies, start = life.arrive, 0
    for (_, capacity), death in zip(spec.shares, life.rejected, strict=True):
        others = (entry < spec.slots) & (entry >= start + capacity)  # places of later shares
        places.append(table((applies <= last) & (death > last) & ~others, capacity))
        applies, start = death, start + capacity
    index = torch.cat(places, 2)  # [B, Hk, slots]

    # the ring: the last begun block and the `back` blocks before it, each at its own place
    newest = (grid.base // spec.block + grid.last) * spec.block + spec.block - 1  # [B]
    r = torch.arange(spec.ring, device=newest.device)
    p = newest[:, None] - (newest[:, None] - r) % spec.ring  # [B, ring] the position that belongs at entry r
    at = (p - grid.base[:, None] + grid.front).clamp(0, grid.k.shape[2] - 1)
    here = grid.pos.gather(1, at)
    held = (here == p) & (p >= 0)

    def assemble(sinks: Tensor, ring: Tensor, slots: Tensor) -> Tensor:
        return torch.cat([sinks, ring, slots], 2)

    def ring(x: Tensor) -> Tensor:
        got = take_time(x, at)
        return got * held.view(B, 1, -1, *[1] * (got.ndim - 3))

    def slots(x: Tensor, blank: float = 0.0) -> Tensor:
        return pick(x, index[:, :, None], blank)[:, :, 0]

    zeros = state.mass[:, :, : spec.sinks] * 0
    keys, values = ring(grid.k), ring(grid.v)
    rate = log_decays(kernel, keys, values)
    rate = torch.zeros_like(end) if rate is None else rate
    memory, lost = state.memory, (life.pos != EMPTY) & (life.death <= last) & (life.arrive <= last)
    if parts:
        memory = torch.cat([memory_after(part, lost, end) for part in parts], -1)
    alive = slots(life.pos, EMPTY) != EMPTY
    sink_pos = grid.sink_pos[:, None].expand(B, Hk, -1)
    ring_pos = torch.where(held, p, EMPTY)[:, None].expand(B, Hk, -1)
    sink_here = (sink_pos != EMPTY)[..., None]
    return State(
        keys=assemble(grid.sink_k * sink_here, keys, slots(life.key)),
        values=assemble(grid.sink_v * sink_here, values, slots(life.value)),
        pos=assemble(sink_pos, ring_pos, slots(life.pos, EMPTY)),
        decay=assemble(zeros, rate * held[:, None], (end - slots(life.clock)).clamp(max=0) * alive),
        mass=assemble(zeros, ring(mass), slots(life.clock) * 0),
        score=slots(life.score),
        memory=memory,
        seen=grid.seen,
        key_sum=key_sums(grid, spec)[:, :, -1] if spec.measures("keydiff") else state.key_sum,
    )


def memory_after(part: Fold, lost: Tensor, end: Tensor) -> Tensor:
    """The memory's columns [B, Hk, F, C] at the clock `end` [B, Hk, 1], with the tokens `lost` [B, Hk, X] in them."""
    weight = (end - part.clock).clamp(max=0).exp() * lost
    return part.start * end[..., None].exp() + part.phi.transpose(-1, -2) @ (part.value * weight[..., None])
