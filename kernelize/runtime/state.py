"""The operation's types: what a layer computes with, its state of constant size, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Layout
from .spec import KernelSpec

EMPTY = -1  # the position of an entry that holds no token
UNIT_SOFTPLUS = math.log(math.e - 1)  # softplus of this is 1
TINY = 1e-6  # keeps the logarithm of a statistic finite


class Rotation(NamedTuple):
    """Rotary positions: channel pair i of a query or key at position p is turned by p · frequencies[i]."""

    frequencies: Tensor  # [R]; the first 2R channels are turned
    interleaved: bool  # pairs are neighbours (GPT-J); else channel i goes with channel R + i

    def turn(self, x: Tensor, pos: Tensor, to: float) -> Tensor:
        """x [..., T, D] that stands at `pos` [..., T] as it would be at position `to`; pos may have axes of size 1."""
        frequencies, acc = self.frequencies.to(pos.device).float(), wide(x.dtype)
        here = (pos[..., None].float() * frequencies).to(acc)  # the products in float32, as models have them
        cos, sin = here.cos(), here.sin()
        if to:  # by addition theorems, so that what the model turned by a coarse angle is turned back by the same
            there = (frequencies * to).to(acc)
            far_cos, far_sin = there.cos(), there.sin()
            cos, sin = cos * far_cos + sin * far_sin, sin * far_cos - cos * far_sin
        width = 2 * len(self.frequencies)
        turning, rest = x[..., :width], x[..., width:]
        a, b = (turning[..., ::2], turning[..., 1::2]) if self.interleaved else turning.chunk(2, -1)
        pairs = a * cos + b * sin, b * cos - a * sin
        turned = torch.stack(pairs, -1).flatten(-2) if self.interleaved else torch.cat(pairs, -1)
        return torch.cat([turned.to(x.dtype), rest], -1) if rest.shape[-1] else turned.to(x.dtype)


class Turned:
    """The state's keys at position 0, from one decoding step to the next.

    Sinks and slots change once a block, and turning them costs more than all else that a step does with them. What was
    turned is kept beside copies of what it was made of, and serves while those are the same to the last bit: nobody has
    to say that a state was restored, reordered or read on. Nor is that compared where a step has just written its one
    token into the very tensor of the step before.
    """

    def __init__(self) -> None:
        self.last: tuple[tuple[Tensor, ...], Tensor] | None = None
        self.held: Tensor | None = None  # the state's keys as last seen,
        self.version = 0  # and how often they had been written to

    def get(self, keys: Tensor, given: Callable[[], tuple[Tensor, ...]], make: Callable[..., Tensor]) -> Tensor:
        """`make(*given())`, or what it was when these were what they are; a step wrote once to the state's `keys`."""
        version = EMPTY if keys.is_inference() else keys._version
        same_slots = self.last is not None and keys is self.held and 0 < version == self.version + 1
        self.held, self.version = keys, version
        if not same_slots:
            now = given()
            if self.last is None or not all(map(same, now, self.last[0])):
                self.last = now, make(*now)
        assert self.last is not None
        return self.last[1]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class Kernel(NamedTuple):
    """One layer's arithmetic: the spec and the tensors it works with."""

    spec: KernelSpec
    scaling: float
    map_q: Callable[[Tensor, Tensor], Tensor] | None  # (x [B, H, T, D], pos [B, 1 or H, T]) -> [B, H, T, F]
    map_k: Callable[[Tensor, Tensor], Tensor] | None  # the same on the Hk key heads
    log_gate: Tensor | None  # [H], log of the memory's weight
    log_rate: Tensor | None  # [Hk], log of −log_decay
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sink_logits: Tensor | None = None  # [H], logits that only the normaliser sees
    decay_weight: Tensor | None = None  # [Hk, 2D], read-out of key and value: a token's own share of log_decay
    beta_weight: Tensor | None = None  # [Hk, D], read-out of the key: how far the delta rule corrects
    beta_bias: Tensor | None = None  # [Hk]
    score_weight: Tensor | None = None  # [Hk, S + 2D], read-out of S statistics, key and value: the learned score
    score_bias: Tensor | None = None  # [Hk]
    forecast_skip: Tensor | None = None  # [Hk, I], read-out of the forecast's inputs: S statistics, 1, key, value
    forecast_in: Tensor | None = None  # [Hk, I, W], into its hidden layer
    forecast_out: Tensor | None = None  # [Hk, W], and out of it
    rotation: Rotation | None = None  # how keys carry their positions, if by rotation; None where no reach asks
    key_rotation: Rotation | None = None  # the same, None where no forecast asks
    turned: Turned | None = None  # what earlier steps of the same sequence have turned
    watch: Callable[[dict[str, Tensor], Tensor, Tensor, Tensor], None] | None = None  # is shown what scores are made of

    @property
    def log_decay(self) -> Tensor | None:
        """[Hk], log of the factor a folded token puts on all earlier ones, below 0; of 32 bits at least."""
        rate = self.log_rate
        if rate is None:
            return None
        return -(rate.float() if rate.dtype.itemsize < 4 else rate).exp()


class Seen(NamedTuple):
    """What a layer's attention is given, and how its original softmax weighs it."""

    query: Tensor  # [B, H, T, D], after positions
    key: Tensor  # [B, Hk, T, D]
    value: Tensor  # [B, Hk, T, Dv]
    scaling: float
    softcap: float | None = None  # as in `Kernel`
    sink_logits: Tensor | None = None  # [H], the model's own, without what the layer's spec adds
    layout: Layout | None = None


class AttentionOutput(NamedTuple):
    """y and its two branches; y = w exact + (1 − w) memory with w = sigmoid(exact_lse − memory_lse)."""

    y: Tensor  # [B, H, T, D]
    exact: Tensor  # [B, H, T, D], softmax over the exact set alone
    exact_lse: Tensor  # [B, H, T]
    memory: Tensor  # [B, H, T, D], the memory alone, normalised; zero where it is empty
    memory_lse: Tensor  # [B, H, T], −inf where it is empty


class State(NamedTuple):
    """What a layer remembers. P = ring + sinks + slots positions, laid out as [sinks | ring | slots].

    The ring holds the token of position p at p mod ring. Slots stand in the order of `spec.shares`; with
    `head_slots` those of all heads follow each other through the rows of the KV heads (`unpacked` gives each its own).
    """

    keys: Tensor  # [B, Hk, P, D]
    values: Tensor  # [B, Hk, P, D]
    pos: Tensor  # [B, Hk, P] int64, EMPTY where no token is held
    decay: Tensor  # [B, Hk, P] ring: the token's own log decay; slots: log decay accumulated since it left the window
    mass: Tensor  # [B, Hk, P] ring: attention received so far
    score: Tensor  # [B, Hk, slots, shares] the scores that slot holders hold their places by
    memory: Tensor  # [B, Hk, F, D + 1] the last column is the normaliser
    seen: Tensor  # [B] int64, valid tokens so far
    key_sum: Tensor  # [B, Hk, D] of all tokens but the sinks; [B, Hk, 0] where no score asks for it

    def map(self, f: Callable[[Tensor], Tensor]) -> State:
        return State(*map(f, self))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state and normaliser: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def empty_state(spec: KernelSpec, key: Tensor, value: Tensor) -> State:
    """The state before the first token, for keys [B, Hk, T, D] and values [B, Hk, T, D]."""
    B, Hk, _, D = key.shape
    P, Dv, acc = spec.positions, value.shape[-1], wide(key.dtype)
    features = spec.feature_dim if spec.has_memory else 0
    return State(
        keys=key.new_zeros(B, Hk, P, D),
        values=value.new_zeros(B, Hk, P, Dv),
        pos=torch.full((B, Hk, P), EMPTY, device=key.device),
        decay=key.new_zeros(B, Hk, P, dtype=acc),
        mass=key.new_zeros(B, Hk, P, dtype=acc),
        score=key.new_zeros(B, Hk, spec.slots, len(spec.shares), dtype=acc),
        memory=key.new_zeros(B, Hk, features, Dv + 1, dtype=acc),
        seen=torch.zeros(B, dtype=torch.int64, device=key.device),
        key_sum=key.new_zeros(B, Hk, D if spec.measures("keydiff") else 0, dtype=acc),
    )


def host_may_look(x: Tensor) -> bool:
    """Whether a look at numbers of `x` costs nothing: elsewhere it is a sync, or stops torch.compile."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def with_ones(v: Tensor) -> Tensor:
    """[..., D] -> [..., D + 1]: the normaliser is one more value channel."""
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)


def merge(
    exact: Tensor, exact_lse: Tensor, total: tuple[Tensor, Tensor] | None, log_gate: Tensor | None
) -> AttentionOutput:
    """One normaliser over both branches.

    exact [B, H, T, D], exact_lse [B, H, T]; `total` is the memory's numerator [B, H, T, D] and normaliser [B, H, T, 1];
    log_gate [H]. Or all by rows: [B, Hk, n, R] for [B, H, T], and log_gate [Hk, R].
    """
    if total is None:
        return AttentionOutput(
            exact, exact, exact_lse, torch.zeros_like(exact), exact_lse.new_full(exact_lse.shape, -torch.inf)
        )
    assert log_gate is not None
    numerator, norm = total[0], total[1][..., 0]
    filled = norm > torch.finfo(norm.dtype).tiny
    memory = numerator / torch.where(filled, norm, torch.inf)[..., None]
    gate = log_gate[:, None].to(norm.dtype)
    memory_lse = torch.where(filled, torch.where(filled, norm, 1.0).log() + gate, -torch.inf)
    weight = torch.sigmoid(exact_lse - memory_lse)[..., None]
    return AttentionOutput(torch.lerp(memory, exact, weight), exact, exact_lse, memory, memory_lse)


def logits(q: Tensor, k: Tensor, kernel: Kernel) -> Tensor:
    """Scaled, capped scores [..., X, Y] of q [..., X, D] and k [..., Y, D]."""
    s = (q * kernel.scaling) @ k.transpose(-1, -2)  # q is smaller than the scores
    return capped(s, kernel.softcap)


def softmax_of(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax [..., X] and log-sum-exp [...] of rows of scores, of which none may be −inf throughout."""
    if scores.requires_grad:
        return scores.softmax(-1), scores.logsumexp(-1)
    weights = scores.softmax(-1)  # one pass, where a sum of exponentials takes four
    return weights, scores.amax(-1) - weights.amax(-1).log()


def reaching_logits(query: Tensor, at: Tensor, keys: Tensor, state: State, kernel: Kernel) -> Tensor:
    """Scores [B, Hk, X, P] of queries [B, Hk, X, D] on the state's keys, here in the queries' dtype.

    `at` [B, 1 or Hk, 1 or X] are the queries' positions. The window is never beyond reach.
    """
    near, reach = logits(query, keys, kernel), kernel.spec.reach
    if not reach or kernel.rotation is None:
        return near
    far = logits(kernel.rotation.turn(query, at, reach), at_origin(keys.dtype, state, kernel), kernel)
    return torch.where(state.pos[:, :, None] < at[..., None] - reach, far, near)


def at_origin(dtype: torch.dtype, state: State, kernel: Kernel) -> Tensor:
    """The state's keys [B, Hk, P, D] as they would be at position 0, but zero in the window."""
    sinks, ring, rotation = kernel.spec.sinks, kernel.spec.ring, kernel.rotation
    assert rotation is not None

    def given() -> tuple[Tensor, ...]:
        outside = [torch.cat([x[:, :, :sinks], x[:, :, sinks + ring :]], 2) for x in (state.keys, state.pos)]
        return *outside, rotation.frequencies

    def turn(keys: Tensor, pos: Tensor, _: Tensor) -> Tensor:
        turned = rotation.turn(keys.to(dtype), pos, 0)
        window = turned.new_zeros(*turned.shape[:2], ring, turned.shape[3])
        return torch.cat([turned[:, :, :sinks], window, turned[:, :, sinks:]], 2)

    if kernel.turned is None or state.keys.requires_grad or not host_may_look(state.keys):
        return turn(*given())
    return kernel.turned.get(state.keys, given, turn)


def within_reach(kernel: Kernel, state: State | None, length: int) -> Kernel:
    """The kernel for `length` more tokens; without the rotation where the host sees that nothing is beyond reach."""
    if kernel.rotation is None:
        return kernel
    seen = 0
    if state is not None:
        if not host_may_look(state.seen):
            return kernel
        seen = max(state.seen.tolist())
    return kernel if seen + length > kernel.spec.reach > 0 else kernel._replace(rotation=None)


def capped(s: Tensor, softcap: float | None) -> Tensor:
    """Scores that never leave ±softcap (Gemma 2)."""
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def add_sink_logits(exact: Tensor, lse: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Lets `sink_logits` take their part of the normaliser (GPT-OSS); exact [B, H, T, D], lse [B, H, T], as `merge`."""
    if kernel.sink_logits is None:
        return exact, lse
    sink = kernel.sink_logits.to(lse.dtype)[:, None]
    return exact * torch.sigmoid(lse - sink)[..., None], torch.logaddexp(lse, sink)


def features(kernel: Kernel, mapping: Callable[[Tensor, Tensor], Tensor], x: Tensor, pos: Tensor) -> Tensor:
    """phi of x [B, H, T, D], scaled so that its target is exp(q·k·scaling); pos [B, 1 or H, T] -> [B, H, T, F]."""
    return mapping(x.to(wide(x.dtype)) * kernel.scaling**0.5, pos)


# --- slots that the heads share unequally -------------------------------------------------------------------


def quota(spec: KernelSpec, share: int, like: Tensor) -> Tensor | int:
    """The slots of a share that may be used: one number, or one for each KV head, [Hk, 1] on the device of `like`."""
    if not spec.head_slots:
        return spec.shares[share][1]
    heads = [spec.shares_of(head)[share][1] for head in range(len(spec.head_slots))]
    return torch.tensor(heads, device=like.device)[:, None]


Cells = list[list[int]]  # [Hk, slots]


@lru_cache(maxsize=512)  # numbers, not tensors: those would belong to the mode and device of whoever came first
def cells(spec: KernelSpec) -> tuple[Cells, Cells]:
    """Where a packed spec's slots lie: (in the packed state, for each of the `spread` one's; the other way round).

    Both count slots through the rows of all heads; one past the last: nowhere.
    """
    wide, heads = spec.spread, len(spec.head_slots)
    packed = [[heads * spec.slots] * wide.slots for _ in range(heads)]
    spread: list[int] = []
    for head in range(heads):
        start = 0
        for (_, room), (_, own) in zip(wide.shares, spec.shares_of(head), strict=True):
            packed[head][start : start + own] = range(len(spread), len(spread) + own)
            spread += range(head * wide.slots + start, head * wide.slots + start + own)
            start += room
    spread += [heads * wide.slots] * (heads * spec.slots - len(spread))
    return packed, [spread[head * spec.slots :][: spec.slots] for head in range(heads)]


def moved(state: State, spec: KernelSpec, places: Cells) -> State:
    """The state with its slots from `places` among those it has, counted through the rows of all heads."""
    first = spec.sinks + spec.ring
    index = torch.tensor(places, dtype=torch.int64).to(state.pos.device, non_blocking=True)  # a GPU is not waited for

    def move(x: Tensor, start: int, blank: float = 0.0) -> Tensor:  # x [B, Hk, start + slots, ...]
        flat = x[:, :, start:].flatten(1, 2)
        flat = torch.cat([flat, torch.full_like(flat[:, :1], blank)], 1) if flat.shape[1] else flat
        return torch.cat([x[:, :, :start], flat[:, index]], 2)

    return state._replace(
        keys=move(state.keys, first),
        values=move(state.values, first),
        pos=move(state.pos, first, EMPTY),
        decay=move(state.decay, first),
        mass=move(state.mass, first),
        score=move(state.score, 0),
    )


def unpacked(kernel: Kernel, state: State) -> tuple[Kernel, State]:
    """Kernel and state with each head's slots in its own row: those of `spec.spread` where the spec is packed."""
    spec = kernel.spec
    if not spec.is_packed:
        return kernel, state
    return kernel._replace(spec=spec.spread), moved(state, spec, cells(spec)[0])


def by_head(run: Callable[..., tuple[AttentionOutput, State]]) -> Callable[..., tuple[AttentionOutput, State]]:
    """Lets an implementation that knows rows of slots serve a packed spec: unpacks the state before, packs it after.

    Without `keep` nobody reads the state that comes back, so it stays as it is.
    """

    @wraps(run)
    def packed_run(
        q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, state: State | None = None, *others: Any, **named: Any
    ) -> tuple[AttentionOutput, State]:
        spec = kernel.spec
        if not spec.is_packed:
            return run(q, k, v, kernel, state, *others, **named)
        wide, before = (kernel._replace(spec=spec.spread), None) if state is None else unpacked(kernel, state)
        out, after = run(q, k, v, wide, before, *others, **named)
        if not named.get("keep", True):
            return out, after if state is None else state
        return out, moved(after, spec, cells(spec)[1])

    return packed_run


# --- read-outs: token-wise, so that a layer still needs nothing but q, k, v -----------------------------------


def read_out(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, Hk, T, D] against one vector a key head, weight [Hk, D] -> [B, Hk, T]."""
    return (x @ weight.to(x.dtype)[:, :, None])[..., 0]


def log_decays(kernel: Kernel, k: Tensor, v: Tensor) -> Tensor | None:
    """Each token's own log decay, [B, Hk, T] or [Hk, 1], of k and v [B, Hk, T, D]; None where nothing decays.

    Gated (arXiv:2312.06635, one number a head): the head's rate times softplus of a read-out, which starts at 1.
    """
    log_decay, acc = kernel.log_decay, wide(k.dtype)
    if log_decay is None:
        return None
    rate = log_decay.to(acc)[:, None]
    if kernel.decay_weight is None:
        return rate
    x = torch.cat([k, v], -1).to(acc)
    return rate * F.softplus(read_out(x, kernel.decay_weight) + UNIT_SOFTPLUS)


def betas(kernel: Kernel, k: Tensor) -> Tensor:
    """Of k [B, Hk, T, D]: the share of its error that the delta rule corrects, [B, Hk, T] in (0, 1)."""
    assert kernel.beta_weight is not None
    assert kernel.beta_bias is not None
    k = k.to(wide(k.dtype))
    return torch.sigmoid(read_out(k, kernel.beta_weight) + kernel.beta_bias.to(k.dtype)[:, None])


def unit(phi: Tensor) -> Tensor:
    """Features of length one: a token then recalls its own value, if beta is one."""
    return phi / length(phi)


def length(phi: Tensor) -> Tensor:  # [..., F] -> [..., 1]
    return phi.norm(dim=-1, keepdim=True).clamp(min=1e-18)  # its square is still a float32


def weigh_answers(numerator: Tensor, mass: Tensor, phi_q: Tensor) -> tuple[Tensor, Tensor]:
    """Delta: phi_q P, numerator [..., D] and `mass` [..., 1], as if so many tokens had given the memory's answer.

    The last column of P is additive under every rule, so the weight of the memory stays positive; the answer itself
    is read with phi_q [..., F] of length one.
    """
    return numerator * (mass / length(phi_q)), mass


def novelty(key: Tensor, key_sum: Tensor) -> Tensor:
    """How unlike the mean key a key is (KeyDiff, arXiv:2504.15364): −cos, [...] of [..., D] and [..., D]."""
    return -F.cosine_similarity(key.to(key_sum.dtype), key_sum, dim=-1)


def learned_score(kernel: Kernel, statistics: dict[str, Tensor], key: Tensor, value: Tensor) -> Tensor:
    """The read-out [B, Hk, X] of `spec.statistics` [B, Hk, X], keys and values [B, Hk, X, D].

    Its gradient reaches the weights alone.
    """
    assert kernel.score_weight is not None
    assert kernel.score_bias is not None
    acc = wide(key.dtype)
    columns = [
        statistics[name] if name == "keydiff" else (statistics[name] + TINY).log()
        for name in kernel.spec.statistics("learned")
    ]
    x = torch.cat([torch.stack(columns, -1), key.to(acc), value.to(acc)], -1).detach()
    return read_out(x, kernel.score_weight) + kernel.score_bias.to(acc)[:, None]


def forecast(kernel: Kernel, statistics: dict[str, Tensor], key: Tensor, value: Tensor, pos: Tensor | None) -> Tensor:
    """Log of the attention that tokens will draw after the window, [B, Hk, X], by a small network a KV head.

    Of statistics [B, Hk, X] and the directions of keys and values [B, Hk, X, D]; after Locret (arXiv:2410.01805). Keys
    that are turned by their positions `pos` [B, 1 or Hk, X] are turned back: what is fitted on short texts would else
    not know a key that stands further on.
    """
    assert kernel.forecast_skip is not None
    assert kernel.forecast_in is not None
    assert kernel.forecast_out is not None
    acc = wide(key.dtype)
    columns = [(statistics[name].to(acc) + TINY).log() for name in kernel.spec.statistics("forecast")]
    known = torch.stack([*columns, torch.ones_like(columns[0])], -1)
    key = key.to(acc)
    if kernel.key_rotation is not None:
        assert pos is not None
        key = kernel.key_rotation.turn(key, pos.clamp(min=0), 0)
    x = torch.cat([known, direction(key), direction(value.to(acc))], -1)
    hidden = F.silu(x @ kernel.forecast_in.to(acc))
    return read_out(x, kernel.forecast_skip) + read_out(hidden, kernel.forecast_out)


def direction(x: Tensor) -> Tensor:  # [..., D] -> [..., D], of mean square one
    return x / (x.square().mean(-1, keepdim=True) + TINY).sqrt()


def aged(mass: Tensor, pos: Tensor, spec: KernelSpec) -> Tensor:
    """The attention score of tokens at positions `pos` [B, 1 or Hk, X] that received `mass` [B, Hk, X].

    A mass that fades as exp(−age/aging) ranks tokens as log mass + pos/aging does, at every later time: so the score
    can be fixed when a token leaves the window.
    """
    return (mass + TINY).log() + pos.clamp(min=0) / spec.aging if spec.aging else mass


def scores_from(
    kernel: Kernel, statistics: dict[str, Tensor], key: Tensor, value: Tensor, pos: Tensor | None
) -> list[Tensor]:
    """Of every share the score [B, Hk, X], from what was measured of tokens [B, Hk, X].

    Their positions `pos` are [B, 1 or Hk, X], EMPTY where no token leaves the window; None where nobody asks for them.
    """
    if kernel.watch is not None:
        assert pos is not None
        kernel.watch(statistics, key, value, pos)
    scores = {name: statistic.detach() for name, statistic in statistics.items()}
    if "attention" in scores and kernel.spec.aging:
        assert pos is not None
        scores["attention"] = aged(scores["attention"], pos, kernel.spec)
    if kernel.spec.learned_share is not None:
        scores["learned"] = learned_score(kernel, statistics, key, value)
    if kernel.spec.scores_by("forecast"):
        with torch.no_grad():
            scores["forecast"] = forecast(kernel, statistics, key, value, pos)
    return [scores[name] for name, _ in kernel.spec.shares]
