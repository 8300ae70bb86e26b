"""The oracle: the operation one token at a time. Also what decodes where there is no fused kernel.

attend(q, k, v, kernel, state, valid) -> (AttentionOutput, state); see docs/architecture.md for the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import KernelSpec
from .state import (
    EMPTY,
    AttentionOutput,
    Kernel,
    State,
    add_sink_logits,
    betas,
    empty_state,
    features,
    log_decays,
    logits,
    merge,
    novelty,
    scores_from,
    unit,
    weigh_answers,
    wide,
    with_ones,
)


def attend(
    q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, state: State | None = None, valid: Tensor | None = None
) -> tuple[AttentionOutput, State]:
    """q [B, H, T, D], k and v [B, Hk, T, D], valid [B, T] bool -> (AttentionOutput over T, state after T)."""
    state = empty_state(kernel.spec, k, v) if state is None else state
    steps = []
    for t in range(q.shape[2]):
        now = slice(t, t + 1)
        keep = None if valid is None else valid[:, t]
        out, state = step(q[:, :, now], k[:, :, now], v[:, :, now], kernel, state, keep)
        steps.append(out)
    return AttentionOutput(*(torch.cat(parts, 2) for parts in zip(*steps, strict=True))), state


def step(
    q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, state: State, valid: Tensor | None = None
) -> tuple[AttentionOutput, State]:
    """One token: q [B, H, 1, D], k and v [B, Hk, 1, D], valid [B] -> (AttentionOutput of one token, next state)."""
    valid = torch.ones_like(state.seen, dtype=torch.bool) if valid is None else valid
    state = evict(kernel, state, valid)
    state = write(k, v, kernel, state, valid)
    out, mass = read(q, kernel, state)
    return out, state._replace(mass=torch.where(valid[:, None, None], mass, state.mass), seen=state.seen + valid)


# --- a block leaves the window ------------------------------------------------------------------------------


def evict(kernel: Kernel, state: State, valid: Tensor) -> State:
    """When a block begins, the one it displaces in the ring leaves: it applies for the slots, the losers are folded."""
    spec = kernel.spec
    begins = valid & (state.seen % spec.block == 0) & (state.seen >= spec.ring)  # [B]
    eager = begins.device.type == "cpu" and not torch.compiler.is_compiling()
    if eager and not bool(begins.any()):  # a host look costs nothing on the CPU; elsewhere it would be a sync
        return state
    leaving = spec.sinks + (state.seen[:, None] + torch.arange(spec.block, device=valid.device)) % spec.ring  # [B, C]
    after = settle(kernel, state, leaving)
    return State(
        *(torch.where(begins.view(-1, *[1] * (old.ndim - 1)), new, old) for new, old in zip(after, state, strict=True))
    )


def settle(kernel: Kernel, state: State, leaving: Tensor) -> State:
    """The state after the entries `leaving` [B, C] of the position axis have left the ring."""
    spec = kernel.spec
    slots = torch.arange(spec.sinks + spec.ring, spec.positions, device=leaving.device).expand(len(leaving), -1)
    index = torch.cat([slots, leaving], 1)[:, None].expand(-1, state.pos.shape[1], -1)  # [B, Hk, X]
    key, value = take(state.keys, index), take(state.values, index)
    pos, decay = state.pos.gather(2, index), state.decay.gather(2, index)
    fresh = torch.arange(index.shape[2], device=index.device) >= spec.slots  # [X]

    # log decay that each entry has suffered once this block is folded: the tokens folded after it put it there
    block = torch.where(fresh & (pos != EMPTY), decay, 0.0)
    after = block.sum(-1, keepdim=True) - block.cumsum(-1)
    held = torch.where(fresh, after, decay + block.sum(-1, keepdim=True))

    score = scores(kernel, state, index, key, value, pos, decay, fresh)
    place = choose_slots(spec, score, pos, fresh)  # [B, Hk, X] the slot an entry gets, or EMPTY
    memory = state.memory * block.sum(-1).exp()[..., None, None]
    if spec.has_memory:
        assert kernel.map_k is not None
        phi = features(kernel, kernel.map_k, key, pos)
        gone = (place == EMPTY) & (pos != EMPTY)
        lost = gone * held.exp()  # [B, Hk, X]
        memory = memory + (phi * lost[..., None]).transpose(-1, -2) @ with_ones(value.to(phi.dtype))
        if spec.is_delta:
            clock = block.cumsum(-1)
            weight = torch.where(fresh, 0.0, decay).exp()
            corrected = fold_delta(kernel, state.memory[..., :-1], gone, phi, key, value, pos, weight, clock)
            memory = torch.cat([corrected, memory[..., -1:]], -1)
    return refill(state, spec, index, place, key, value, pos, held, score)._replace(memory=memory)


def fold_delta(
    kernel: Kernel,
    memory: Tensor,
    gone: Tensor,
    phi: Tensor,
    key: Tensor,
    value: Tensor,
    pos: Tensor,
    weight: Tensor,
    clock: Tensor,
) -> Tensor:
    """S <- d S; S <- S + k beta (weight v − Sᵀk)ᵀ for the entries that are `gone` [B, Hk, X], in order of position.

    memory [B, Hk, F, D]; `clock` is the log decay that has passed in this block when an entry's turn comes.
    """
    order = pos.masked_fill(~gone, torch.iinfo(pos.dtype).max).argsort(dim=-1)[..., : kernel.spec.block]
    end = clock[..., -1]
    now = torch.zeros_like(end)
    key_unit = unit(take(phi, order)) * gone.gather(2, order)[..., None]
    aged = take(value, order).to(phi.dtype) * weight.gather(2, order)[..., None]
    beta, turn = betas(kernel, take(key, order)), clock.gather(2, order)
    turn = torch.where(gone.gather(2, order), turn, end[..., None])
    for i in range(order.shape[2]):
        memory = memory * (turn[..., i] - now).exp()[..., None, None]
        k, now = key_unit[:, :, i, :, None], turn[..., i]  # [B, Hk, F, 1]
        error = aged[:, :, i, None] - k.transpose(-1, -2) @ memory
        memory = memory + k @ (beta[:, :, i, None, None] * error)
    return memory * (end - now).exp()[..., None, None]


def scores(
    kernel: Kernel,
    state: State,
    index: Tensor,
    key: Tensor,
    value: Tensor,
    pos: Tensor,
    decay: Tensor,
    fresh: Tensor,
) -> Tensor:
    """What decides over the slots, [B, Hk, X, shares]: fixed for holders, computed for those who leave the window."""
    spec = kernel.spec
    if not spec.slots:
        return state.score.new_zeros(*index.shape, len(spec.shares))
    found = {}
    if spec.measures("attention"):
        found["attention"] = state.mass.gather(2, index)
    if spec.measures("recall"):
        found["recall"] = recall_error(kernel, state, key, value, pos, decay, fresh)
    if spec.measures("value"):
        found["value"] = value.to(wide(value.dtype)).norm(dim=-1)
    if spec.measures("keydiff"):
        found["keydiff"] = novelty(key, state.key_sum[:, :, None])
    held = torch.nn.functional.pad(state.score, (0, 0, 0, spec.block))
    return torch.where(fresh[:, None], scores_from(kernel, found, key, value, pos), held)


def recall_error(
    kernel: Kernel, state: State, key: Tensor, value: Tensor, pos: Tensor, decay: Tensor, fresh: Tensor
) -> Tensor:
    """‖v − what the memory of all earlier blocks answers to k‖ for each entry, [B, Hk, X]."""
    assert kernel.map_k is not None
    phi = features(kernel, kernel.map_k, key, pos)
    holders = (~fresh & (pos != EMPTY)) * decay.exp()
    everything = state.memory + (phi * holders[..., None]).transpose(-1, -2) @ with_ones(value.to(phi.dtype))
    return self_recall(phi @ everything, value)


def self_recall(total: Tensor, value: Tensor) -> Tensor:
    """total [..., D + 1] is what a memory answers to a token's own key; value [..., D] -> the error [...]."""
    norm = total[..., -1:]
    filled = norm > torch.finfo(total.dtype).tiny
    recalled = torch.where(filled, total[..., :-1] / torch.where(filled, norm, 1.0), 0.0)
    return (value.to(total.dtype) - recalled).norm(dim=-1)


def choose_slots(spec: KernelSpec, score: Tensor, pos: Tensor, fresh: Tensor) -> Tensor:
    """The slot that each entry gets [B, Hk, X], or EMPTY. Shares choose in order; ties go to the earlier token."""
    place = torch.full_like(pos, EMPTY)
    start, applies = 0, torch.zeros_like(pos, dtype=torch.bool)
    entry = torch.arange(pos.shape[-1], device=pos.device)
    for s, (_, capacity) in enumerate(spec.shares):
        held_here = ~fresh & (entry >= start) & (entry < start + capacity)
        applies = (applies | held_here | (fresh if s == 0 else torch.zeros_like(fresh))) & (pos != EMPTY)
        rank = ranks(
            torch.where(applies, score[..., s], -torch.inf),
            torch.where(applies, pos, torch.iinfo(pos.dtype).max),
        )
        wins = applies & (rank < capacity)
        place = torch.where(wins, start + rank, place)
        applies, start = applies & ~wins, start + capacity
    return place


def ranks(score: Tensor, pos: Tensor) -> Tensor:
    """0 for the best: highest score first, then lowest position; [..., X] int64."""
    by_pos = pos.argsort(dim=-1, stable=True)
    order = by_pos.gather(-1, score.gather(-1, by_pos).argsort(dim=-1, descending=True, stable=True))
    where = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, where)


def refill(
    state: State,
    spec: KernelSpec,
    index: Tensor,
    place: Tensor,
    key: Tensor,
    value: Tensor,
    pos: Tensor,
    held: Tensor,
    score: Tensor,
) -> State:
    """Puts every entry with a place into its slot, and empties the ring entries that left."""
    first = spec.sinks + spec.ring
    slot = torch.where(place == EMPTY, spec.slots, place)  # losers go to one column that is cut off

    def fill(old: Tensor, new: Tensor, blank: float = 0) -> Tensor:
        kept = old[:, :, :first].clone()
        kept.scatter_(2, spread(index[:, :, spec.slots :], kept), torch.full_like(kept, blank)[:, :, : spec.block])
        table = torch.full_like(torch.cat([old[:, :, first:], old[:, :, :1]], 2), blank)
        return torch.cat([kept, table.scatter(2, spread(slot, table), new)[:, :, : spec.slots]], 2)

    table = score.new_zeros(*score.shape[:2], spec.slots + 1, score.shape[-1])
    return state._replace(
        keys=fill(state.keys, key),
        values=fill(state.values, value),
        pos=fill(state.pos, pos, EMPTY),
        decay=fill(state.decay, held),
        mass=fill(state.mass, torch.zeros_like(held)),
        score=table.scatter(2, spread(slot, table), score)[:, :, : spec.slots],
    )


def spread(index: Tensor, like: Tensor) -> Tensor:
    """index [B, Hk, X] -> [B, Hk, X, D] where `like` has a channel axis."""
    return index if like.ndim == 3 else index[..., None].expand(-1, -1, -1, like.shape[-1])


def take(x: Tensor, index: Tensor) -> Tensor:  # [B, Hk, P, D], [B, Hk, X] -> [B, Hk, X, D]
    return x.gather(2, spread(index, x))


# --- a token comes ------------------------------------------------------------------------------------------


def write(k: Tensor, v: Tensor, kernel: Kernel, state: State, valid: Tensor) -> State:
    """Puts the token into the ring, or among the sinks; rows that are not `valid` [B] stay as they are."""
    spec, p = kernel.spec, state.seen
    entry = torch.where(p < spec.sinks, p, spec.sinks + p % spec.ring)  # [B]
    here = (torch.arange(spec.positions, device=p.device) == entry[:, None]) & valid[:, None]  # [B, P]
    one = here[:, None, :, None]
    log_decay, own = torch.zeros_like(state.decay[:, :, :1]), log_decays(kernel, k, v)
    if own is not None:
        log_decay = log_decay + own
    key_sum = state.key_sum
    if spec.measures("keydiff"):
        key_sum = key_sum + k[:, :, 0] * (valid & (p >= spec.sinks))[:, None, None]
    return state._replace(
        keys=torch.where(one, k, state.keys),
        values=torch.where(one, v, state.values),
        pos=torch.where(here[:, None], p[:, None, None], state.pos),
        decay=torch.where(here[:, None], log_decay, state.decay),
        mass=torch.where(here[:, None], 0.0, state.mass),
        key_sum=key_sum,
    )


def read(q: Tensor, kernel: Kernel, state: State) -> tuple[AttentionOutput, Tensor]:
    """q [B, H, 1, D] against the state -> (AttentionOutput, the mass of every position after this query)."""
    spec, (B, H, _, D) = kernel.spec, q.shape
    Hk, acc = state.pos.shape[1], wide(q.dtype)
    query = q.to(acc).view(B, Hk, H // Hk, D)  # the queries of a group share a key head
    s = logits(query, state.keys.to(acc), kernel).masked_fill(
        (state.pos == EMPTY)[:, :, None], -torch.inf
    )  # [B, Hk, G, P]
    joined = s if spec.learned_share is None else s + slot_bias(spec, state)[:, :, None]
    lse = joined.logsumexp(-1)
    exact = (joined - lse[..., None]).exp() @ state.values.to(acc)
    exact, lse = add_sink_logits(exact.view(B, H, 1, -1), lse.view(B, H, 1), kernel)
    total = None
    if spec.has_memory:
        assert kernel.map_q is not None
        phi = features(kernel, kernel.map_q, q, state.seen[:, None, None])
        total = (phi.view(B, Hk, H // Hk, -1) @ state.memory).view(B, H, 1, -1)
        total = weigh_answers(total, phi) if spec.is_delta else total
    out = merge(exact, lse, total, kernel.log_gate)
    counts = spec.measures("attention")
    mass = state.mass + received(s.detach(), spec, state) if counts else state.mass
    return AttentionOutput(out.y.to(q.dtype), *out[1:]), mass


def slot_bias(spec: KernelSpec, state: State) -> Tensor:
    """[B, Hk, P]: log sigmoid(score) where the learned score holds the slot, else 0; the score's only gradient."""
    share = spec.learned_share
    assert share is not None
    capacities = [capacity for _, capacity in spec.shares]
    first = sum(capacities[:share])
    score = state.score[:, :, first : first + capacities[share], share]
    before = spec.sinks + spec.ring + first
    after = spec.positions - before - capacities[share]
    return torch.nn.functional.pad(torch.nn.functional.logsigmoid(score), (before, after))


def received(s: Tensor, spec: KernelSpec, state: State) -> Tensor:
    """Probability [B, Hk, P] that the query gives to the window's earlier blocks, under sinks and window alone."""
    local = s[..., : spec.sinks + spec.ring]
    p = (local - local.logsumexp(-1, keepdim=True)).exp().sum(2)
    pos = state.pos[:, :, : spec.sinks + spec.ring]
    earlier = pos // spec.block < (state.seen // spec.block)[:, None, None]
    counts = earlier & (torch.arange(spec.sinks + spec.ring, device=s.device) >= spec.sinks)
    return torch.nn.functional.pad(p * counts, (0, spec.slots))
