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
    by_head,
    empty_state,
    features,
    host_may_look,
    log_decays,
    merge,
    novelty,
    quota,
    reaching_logits,
    scores_from,
    softmax_of,
    unit,
    weigh_answers,
    wide,
    with_ones,
    within_reach,
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


@by_head
def step(
    q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, state: State, valid: Tensor | None = None, in_place: bool = False
) -> tuple[AttentionOutput, State]:
    """One token: q [B, H, 1, D], k and v [B, Hk, 1, D], valid [B] -> (AttentionOutput of one token, next state).

    With `in_place` the tensors of `state` may be overwritten, which saves copies.
    """
    kernel = within_reach(kernel, state, 1)
    state = evict(kernel, state, valid)
    state = write(k, v, kernel, state, valid, in_place)
    out, mass = read(q, kernel, state, valid, in_place)
    return out, state._replace(mass=mass, seen=state.seen + (1 if valid is None else valid))


# --- a block leaves the window ------------------------------------------------------------------------------


def evict(kernel: Kernel, state: State, valid: Tensor | None) -> State:
    """When a block begins, the one it displaces in the ring leaves: it applies for the slots, the losers are folded."""
    spec = kernel.spec
    eager = host_may_look(state.seen)
    leaves = [seen % spec.block == 0 and seen >= spec.ring for seen in state.seen.tolist()] if eager else []
    if eager and not any(leaves):
        return state
    begins = (state.seen % spec.block == 0) & (state.seen >= spec.ring)  # [B]
    begins = begins if valid is None else begins & valid
    leaving = spec.sinks + (state.seen[:, None] + torch.arange(spec.block, device=begins.device)) % spec.ring  # [B, C]
    after = settle(kernel, state, leaving)
    if eager and valid is None and all(leaves):
        return after
    return State(
        *(torch.where(begins.view(-1, *[1] * (old.ndim - 1)), new, old) for new, old in zip(after, state, strict=True))
    )


def settle(kernel: Kernel, state: State, leaving: Tensor) -> State:
    """The state after the entries `leaving` [B, C] of the position axis have left the ring."""
    spec = kernel.spec
    slots = torch.arange(spec.sinks + spec.ring, spec.positions, device=leaving.device).expand(leaving.shape[0], -1)
    index = torch.cat([slots, leaving], 1)[:, None].expand(-1, state.pos.shape[1], -1)  # [B, Hk, X]
    key, value = take(state.keys, index), take(state.values, index)
    pos, decay = state.pos.gather(2, index), state.decay.gather(2, index)
    fresh = torch.arange(index.shape[2], device=index.device) >= spec.slots  # [X]

    # log decay that each entry has suffered once this block is folded: the tokens folded after it put it there
    block = torch.where(fresh & (pos != EMPTY), decay, 0.0)
    after = block.sum(-1, keepdim=True) - block.cumsum(-1)
    held = torch.where(fresh, after, decay + block.sum(-1, keepdim=True))

    phi = None if kernel.map_k is None else features(kernel, kernel.map_k, key, pos)
    score = scores(kernel, state, index, phi, key, value, pos, decay, fresh)
    place = choose_slots(spec, score, pos, fresh)  # [B, Hk, X] the slot an entry gets, or EMPTY
    memory = state.memory * block.sum(-1).exp()[..., None, None]
    if phi is not None:
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
    phi: Tensor | None,
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
        assert phi is not None
        found["recall"] = recall_error(spec, state, phi, value, pos, decay)
    if spec.measures("value"):
        found["value"] = value.to(wide(value.dtype)).norm(dim=-1)
    if spec.measures("keydiff"):
        found["keydiff"] = novelty(key, state.key_sum[:, :, None])
    held = torch.nn.functional.pad(state.score, (0, 0, 0, spec.block))
    return torch.where(fresh[:, None], torch.stack(scores_from(kernel, found, key, value, pos), -1), held)


def recall_error(spec: KernelSpec, state: State, phi: Tensor, value: Tensor, pos: Tensor, decay: Tensor) -> Tensor:
    """‖v − what the memory of all earlier blocks answers to k‖, [B, Hk, X]; 0 for those who hold a slot already."""
    held = slice(0, spec.slots)
    there = (pos[:, :, held] != EMPTY) * decay[:, :, held].exp()
    holders = (phi[:, :, held] * there[..., None]).transpose(-1, -2) @ with_ones(value[:, :, held].to(phi.dtype))
    error = self_recall(phi[:, :, spec.slots :] @ (state.memory + holders), value[:, :, spec.slots :])
    return torch.nn.functional.pad(error, (spec.slots, 0))


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
        wins = applies & (rank < quota(spec, s, rank))
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


def write(k: Tensor, v: Tensor, kernel: Kernel, state: State, valid: Tensor | None, in_place: bool = False) -> State:
    """Puts the token into the ring, or among the sinks; rows that are not `valid` [B] stay as they are."""
    spec, p, (B, Hk) = kernel.spec, state.seen, k.shape[:2]
    entry = torch.where(p < spec.sinks, p, spec.sinks + p % spec.ring)[:, None, None].expand(B, Hk, 1)

    def put(old: Tensor, new: Tensor) -> Tensor:
        at = spread(entry, old)
        if valid is not None:
            new = torch.where(valid.view(-1, *[1] * (old.ndim - 1)), new, old.gather(2, at))
        return old.scatter_(2, at, new) if in_place else old.scatter(2, at, new)

    own = log_decays(kernel, k, v)
    none = state.decay.new_zeros(B, Hk, 1)
    key_sum = state.key_sum
    if spec.measures("keydiff"):
        counts = p >= spec.sinks if valid is None else valid & (p >= spec.sinks)
        key_sum = key_sum + k[:, :, 0] * counts[:, None, None]
    return state._replace(
        keys=put(state.keys, k.to(state.keys.dtype)),
        values=put(state.values, v.to(state.values.dtype)),
        pos=put(state.pos, p[:, None, None].expand(B, Hk, 1)),
        decay=state.decay if own is None else put(state.decay, none + own),
        mass=put(state.mass, none),
        key_sum=key_sum,
    )


def read(
    q: Tensor, kernel: Kernel, state: State, valid: Tensor | None, in_place: bool = False
) -> tuple[AttentionOutput, Tensor]:
    """q [B, H, 1, D] against the state -> (AttentionOutput, the mass of every position after this query)."""
    spec, (B, H, _, D) = kernel.spec, q.shape
    Hk, acc = state.pos.shape[1], wide(q.dtype)
    query = q.to(acc).view(B, Hk, H // Hk, D)  # the queries of a group share a key head
    s = exact_scores(query, kernel, state)  # [B, Hk, G, P]
    joined = s if spec.learned_share is None else s + slot_bias(spec, state)[:, :, None]
    weights, lse = softmax_of(joined)
    exact = weights @ state.values.to(acc)
    exact, lse = add_sink_logits(exact.view(B, H, 1, -1), lse.view(B, H, 1), kernel)
    total = None
    if spec.has_memory:
        assert kernel.map_q is not None
        phi = features(kernel, kernel.map_q, q, state.seen[:, None, None])
        answer = (phi.view(B, Hk, H // Hk, -1) @ state.memory).view(B, H, 1, -1)
        total = answer[..., :-1], answer[..., -1:]
        total = weigh_answers(*total, phi) if spec.is_delta else total
    out = merge(exact, lse, total, kernel.log_gate)
    mass = state.mass
    if spec.measures("attention"):
        mass = receive(s.detach(), spec, state, valid, in_place)
    return AttentionOutput(out.y.to(q.dtype), *out[1:]), mass


def exact_scores(query: Tensor, kernel: Kernel, state: State) -> Tensor:
    """Scores [B, Hk, G, P] of one token's queries [B, Hk, G, D] on what the state holds, −inf where that is nothing."""
    scores = reaching_logits(query, state.seen[:, None, None], state.keys.to(query.dtype), state, kernel)
    return scores.masked_fill((state.pos == EMPTY)[:, :, None], -torch.inf)


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


def receive(s: Tensor, spec: KernelSpec, state: State, valid: Tensor | None, in_place: bool) -> Tensor:
    """The mass [B, Hk, P], with the probability that the query gives to the window's earlier blocks.

    Of scores s [B, Hk, G, P], under sinks and window alone, summed over the queries of a group.
    """
    ring = slice(spec.sinks, spec.sinks + spec.ring)
    p = s[..., : ring.stop].softmax(-1)[..., ring].sum(2)
    counts = state.pos[:, :, ring] < (state.seen - state.seen % spec.block)[:, None, None]
    p = torch.where(counts if valid is None else counts & valid[:, None, None], p, 0.0)
    if in_place:
        state.mass[:, :, ring] += p
        return state.mass
    return torch.cat([state.mass[:, :, : ring.start], state.mass[:, :, ring] + p, state.mass[:, :, ring.stop :]], 2)
