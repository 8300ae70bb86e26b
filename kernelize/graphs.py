"""A kernelized model as two functions of its state, to be traced: tokens inside a block, and what is between blocks.

Neither mutates anything or looks at a value on the host: what depends on a position is arithmetic on fixed shapes. The
state is a dict of tensors (`StateLayout`), given and returned; docs/edge.md is the interface.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .runtime.attention import KernelAttention
from .runtime.cache import CACHE, KernelState, adopt_cache, kernel_layers
from .runtime.modeling import family_of, kernelized_layers
from .runtime.reference import settle, slot_bias, spread, take
from .runtime.spec import KernelSpec
from .runtime.state import (
    EMPTY,
    Kernel,
    Seen,
    State,
    add_sink_logits,
    features,
    log_decays,
    merge,
    reaching_logits,
    weigh_answers,
    wide,
)

OWN = ("keys", "values", "memory")  # large fields of the state: a tensor a layer
PACKED = ("pos", "decay", "mass", "score", "key_sum")  # small ones: all layers behind each other in one tensor
NEVER = -math.inf


# --- the state as tensors -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerShape:
    """What the sizes of one layer's state depend on."""

    spec: KernelSpec
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Of each field of the state but `seen`, without the batch axis."""
        spec, Hk = self.spec, self.kv_heads
        features = spec.feature_dim if spec.has_memory else 0
        return {
            "keys": (Hk, spec.positions, self.head_dim),
            "values": (Hk, spec.positions, self.head_dim),
            "pos": (Hk, spec.positions),
            "decay": (Hk, spec.positions),
            "mass": (Hk, spec.positions),
            "score": (Hk, spec.slots, len(spec.shares)),
            "memory": (Hk, features, self.head_dim + 1),
            "key_sum": (Hk, self.head_dim if spec.measures("keydiff") else 0),
        }


def shapes_of(model: Any) -> list[LayerShape]:
    """Of every converted layer."""
    shape = family_of(model.config.model_type).shape
    return [
        LayerShape(module.kernelize.spec, *shape(module, model.config)) for module in kernelized_layers(model).values()
    ]


class StateLayout:
    """The states of all layers as one dict of tensors by name; `shapes` are theirs, without the batch axis."""

    def __init__(self, layers: list[LayerShape]):
        self.layers = layers
        self.shapes: dict[str, tuple[int, ...]] = {"seen": ()}
        for field in PACKED:
            if width := sum(self.widths(field)):
                self.shapes[field] = (width,)
        for i, layer in enumerate(layers):
            self.shapes |= {f"{field}.{i}": layer.sizes[field] for field in OWN if math.prod(layer.sizes[field])}

    def widths(self, field: str) -> list[int]:
        """Numbers that each layer has in a packed field."""
        return [math.prod(layer.sizes[field]) for layer in self.layers]

    def dtype(self, name: str) -> torch.dtype:
        return torch.int64 if name in ("seen", "pos") else torch.float32

    def fill(self, name: str) -> int:
        return EMPTY if name == "pos" else 0

    def empty(self, rows: int) -> dict[str, Tensor]:
        """The state before the first token; zeros take no memory before they are used."""
        flat = {name: torch.zeros(rows, *shape, dtype=self.dtype(name)) for name, shape in self.shapes.items()}
        for name, x in flat.items():
            if self.fill(name):
                x.fill_(self.fill(name))
        return flat

    def split(self, field: str, packed: Tensor) -> list[Tensor]:
        """A packed field [B, N] -> each layer's [B, Hk, ...]."""
        parts = packed.split(self.widths(field), 1)
        return [part.unflatten(1, layer.sizes[field]) for part, layer in zip(parts, self.layers, strict=True)]

    def unpack(self, flat: dict[str, Tensor]) -> list[State]:
        rows = flat["seen"].shape[0]
        packed = {field: self.split(field, flat[field]) for field in PACKED if field in flat}
        states = []
        for i, layer in enumerate(self.layers):
            fields = {"seen": flat["seen"]}
            for field, size in layer.sizes.items():
                if not math.prod(size):
                    fields[field] = torch.zeros(rows, *size)
                else:
                    fields[field] = packed[field][i] if field in packed else flat[f"{field}.{i}"]
            states.append(State(**fields))
        return states

    def pack(self, states: list[State], names: list[str]) -> dict[str, Tensor]:
        """The tensors `names` of these states."""
        flat = {}
        for name in names:
            field, _, layer = name.partition(".")
            if layer:
                flat[name] = getattr(states[int(layer)], field)
            else:
                flat[name] = torch.cat([getattr(state, field).flatten(1) for state in states], 1)
        return flat


# --- new tokens inside a block ------------------------------------------------------------------------------


class Span:
    """T new tokens of every row, of which `count` [B] are meant, all in one block; what all layers ask of them."""

    def __init__(self, layout: StateLayout, seen: Tensor, count: Tensor, length: int):
        self.layout, self.seen, self.length = layout, seen, length
        at = torch.arange(length)
        self.at = seen[:, None] + at  # [B, T] positions
        self.valid = at < count[:, None]  # [B, T]
        self.entries: dict[tuple[int, int], Tensor] = {}
        self.earlier: dict[tuple[int, int], Tensor] = {}

    def entry(self, spec: KernelSpec) -> Tensor:
        """Where the tokens go on a layer's position axis, [B, 1, T]."""
        key = (spec.sinks, spec.ring)
        if key not in self.entries:
            ring = spec.sinks + self.at % spec.ring
            self.entries[key] = torch.where(self.at < spec.sinks, self.at, ring)[:, None]
        return self.entries[key]

    def put(self, old: Tensor, new: Tensor, entry: Tensor) -> Tensor:
        """old [B, Hk, P, ...] with new [B, Hk, T, ...] at `entry` [B, 1, T], where valid."""
        index = spread(entry.expand(-1, old.shape[1], -1), old)
        kept = self.valid[:, None] if old.ndim == 3 else self.valid[:, None, :, None]
        return old.scatter(2, index, torch.where(kept, new.to(old.dtype), old.gather(2, index)))

    def put_packed(self, field: str, packed: Tensor, new: list[Tensor]) -> Tensor:
        """A packed field [B, N] with each layer's new [B, Hk, T] in it."""
        index, start = [], 0
        for layer, width in zip(self.layout.layers, self.layout.widths(field), strict=True):
            head = start + torch.arange(layer.kv_heads)[:, None] * layer.spec.positions  # [Hk, 1]
            index.append((self.entry(layer.spec) + head).flatten(1))
            start += width
        at = torch.cat(index, 1)  # [B, sum of Hk·T]
        fresh = torch.cat([x.flatten(1) for x in new], 1)
        valid = torch.cat([self.valid] * (at.shape[1] // self.length), 1)
        return packed.scatter(1, at, torch.where(valid, fresh, packed.gather(1, at)))


def begin(layout: StateLayout, span: Span, flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with the tokens' positions in it."""
    positions = [span.at[:, None].expand(-1, layer.kv_heads, -1) for layer in layout.layers]
    return {**flat, "pos": span.put_packed("pos", flat["pos"], positions)}


Compute = Callable[[Seen, Kernel, State], tuple[Tensor, State]]  # -> (y [B, H, T, D], the state afterwards)


def attend_span(span: Span) -> Compute:
    """What `reference.step` does with a token, for all of a span at once: they share block, slots and memory.

    In the state afterwards `mass` [B, Hk, P] is what was added, and `decay` [B, Hk, T] that of the new tokens.
    """

    def compute(seen: Seen, kernel: Kernel, state: State) -> tuple[Tensor, State]:
        entry = span.entry(kernel.spec)
        keys, values = span.put(state.keys, seen.key, entry), span.put(state.values, seen.value, entry)
        y, mass = read_span(seen.query, kernel, state._replace(keys=keys, values=values), span)
        own = log_decays(kernel, seen.key, seen.value)
        decay = torch.zeros_like(seen.key[..., 0]) + (0.0 if own is None else own)
        key_sum = state.key_sum
        if kernel.spec.measures("keydiff"):
            counts = span.valid & (span.at >= kernel.spec.sinks)
            key_sum = key_sum + torch.where(counts[:, None, :, None], seen.key, 0.0).sum(2)
        return y, state._replace(keys=keys, values=values, mass=mass, decay=decay, key_sum=key_sum)

    return compute


def read_span(q: Tensor, kernel: Kernel, state: State, span: Span) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D] against the state -> (y [B, H, T, D], the mass [B, Hk, P] that every position receives)."""
    spec, (B, H, T, D) = kernel.spec, q.shape
    Hk, acc = state.pos.shape[1], wide(q.dtype)
    G = H // Hk
    query = q.to(acc).reshape(B, Hk, G * T, D)  # [B, Hk, G·T, D]: the queries of a group stand under each other
    visible = (state.pos != EMPTY)[:, :, None] & (state.pos[:, :, None] <= span.at[:, None, :, None])  # [B, Hk, T, P]
    s = scores(query, kernel, state, span).reshape(B, Hk, G, T, spec.positions)
    s = torch.where(visible[:, :, None], s, NEVER)
    joined = s if spec.learned_share is None else s + slot_bias(spec, state)[:, :, None, None]
    exact = joined.softmax(-1).reshape(B, Hk, G * T, spec.positions) @ state.values.to(acc)
    exact, lse = add_sink_logits(exact.reshape(B, H, T, D), joined.logsumexp(-1).reshape(B, H, T), kernel)
    total = None
    if spec.has_memory:
        assert kernel.map_q is not None
        phi = features(kernel, kernel.map_q, q, span.at[:, None])
        answer = (phi.reshape(B, Hk, G * T, spec.feature_dim) @ state.memory).reshape(B, H, T, D + 1)
        total = answer[..., :-1], answer[..., -1:]
        total = weigh_answers(*total, phi) if spec.is_delta else total
    y = merge(exact, lse, total, kernel.log_gate).y.to(q.dtype)
    return y, received(s, spec, state, span) if spec.measures("attention") else torch.zeros_like(state.mass)


def scores(query: Tensor, kernel: Kernel, state: State, span: Span) -> Tensor:
    """query [B, Hk, G·T, D] against the keys of the state -> [B, Hk, G·T, P], not masked."""
    at = span.at.repeat(1, query.shape[2] // span.length)[:, None]  # [B, 1, G·T]
    return reaching_logits(query, at, state.keys.to(query.dtype), state, kernel)


def received(s: Tensor, spec: KernelSpec, state: State, span: Span) -> Tensor:
    """`reference.receive`, of scores s [B, Hk, G, T, P]: what the window's earlier blocks get, [B, Hk, P]."""
    ring = slice(spec.sinks, spec.sinks + spec.ring)
    p = s[..., : ring.stop].softmax(-1)[..., ring].sum(2)  # [B, Hk, T, ring]
    begun = (span.seen - span.seen % spec.block)[:, None, None, None]
    counts = (state.pos[:, :, None, ring] < begun) & span.valid[:, None, :, None]
    return torch.nn.functional.pad(torch.where(counts, p, 0.0).sum(2), (spec.sinks, spec.slots))


class Traced(nn.Module):
    """Stands where a layer's KernelAttention is: the same parameters, with arithmetic that can be traced."""

    def __init__(self, attention: KernelAttention, compute: Compute):
        super().__init__()
        self.attention, self.compute = attention, compute

    def forward(self, seen: Seen, cache: KernelState) -> Tensor:
        assert cache.state is not None
        y, cache.state = self.compute(seen, self.attention.kernel_for(seen), cache.state)
        return y


@contextmanager
def traced(model: Any, compute: Compute) -> Iterator[None]:
    """Within the context every layer's attention is `compute`."""
    layers = kernelized_layers(model)
    own = {i: module.kernelize for i, module in layers.items()}
    try:
        for i, module in layers.items():
            module.kernelize = Traced(own[i], compute)
        yield
    finally:
        for i, module in layers.items():
            module.kernelize = own[i]


class LastToken(nn.Module):
    """In front of the output layer: of hidden states [B, T, C] it sees those of each row's last valid token alone."""

    def __init__(self, head: nn.Module, count: Tensor):
        super().__init__()
        self.head, self.at = head, [(count - 1).clamp(min=0)]  # in a list, or torch takes it for a constant

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(take(hidden[:, None], self.at[0][:, None, None])[:, 0])


@contextmanager
def last_token(model: Any, count: Tensor) -> Iterator[None]:
    """Within the context the model's logits are [B, 1, V], after each row's first `count` [B] tokens."""
    head = model.get_output_embeddings()
    try:
        model.set_output_embeddings(LastToken(head, count))
        yield
    finally:
        model.set_output_embeddings(head)


def run_model(model: Any, ids: Tensor, positions: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
    """ids and positions [B, T] -> (logits, the states afterwards)."""
    cache = DynamicCache(config=model.config)
    adopt_cache(cache, tuple(range(len(states))))
    layers = kernel_layers(cache)
    for layer, state in zip(layers, states, strict=True):
        layer.state, layer.length, layer.is_initialized = state, state.seen[0], True
    out = model(input_ids=ids, position_ids=positions, use_cache=True, **{CACHE: cache})
    return out.logits, [layer.state for layer in layers if layer.state is not None]


class Tokens(nn.Module):
    """New tokens of every row that stay inside a block; where a block begins, `Leave` must have run before."""

    def __init__(self, model: Any, layout: StateLayout):
        super().__init__()
        self.model, self.layout = model, layout

    def forward(self, ids: Tensor, count: Tensor, flat: dict[str, Tensor]) -> dict[str, Tensor]:
        """ids [B, T], a row's first count [B] are meant -> logits [B, V] after the last of them; what they change."""
        layout, T = self.layout, ids.shape[1]
        span = Span(layout, flat["seen"], count, T)
        flat = begin(layout, span, flat)
        with traced(self.model, attend_span(span)), last_token(self.model, count):
            scores, states = run_model(self.model, ids, span.at, layout.unpack(flat))
        own = [name for name in layout.shapes if name.startswith(("keys.", "values.")) or name == "key_sum"]
        new = layout.pack(states, own)
        added = torch.cat([state.mass.flatten(1) for state in states], 1)
        decay = span.put_packed("decay", flat["decay"], [state.decay for state in states])
        new |= {"seen": flat["seen"] + count, "pos": flat["pos"], "mass": flat["mass"] + added, "decay": decay}
        return {"logits": scores[:, -1], **new}


# --- between two blocks -------------------------------------------------------------------------------------


UNBEATEN, WORTHLESS = math.inf, -math.inf  # a score, and a log decay


class Group(nn.Module):
    """Layers that differ in nothing but how many slots they have: to them a block's end is one computation.

    Their heads stand side by side, as those of one layer with as many slots as the largest has. What a smaller one
    has too many is held by tokens that never lose (`UNBEATEN`) and were worth nothing (`WORTHLESS`).
    """

    def __init__(self, members: list[int], layers: list[LayerShape], attentions: list[KernelAttention], scaling: float):
        super().__init__()
        self.members, self.layers, self.scaling = members, layers, scaling
        self.joint = layers[0].spec.replace(slots=max(layer.spec.slots for layer in layers))
        heads, kv_heads = sum(layer.heads for layer in layers), sum(layer.kv_heads for layer in layers)
        self.attention = KernelAttention(self.joint, heads, kv_heads, layers[0].head_dim).float()
        own = [attention.state_dict() for attention in attentions]
        self.attention.load_state_dict({name: torch.cat([state[name] for state in own]) for name in own[0]})
        self.positions = Widening(layers, self.joint, self.joint.ring + self.joint.sinks)
        self.slots = Widening(layers, self.joint, 0)

    def forward(self, states: list[State]) -> list[State]:
        before = self.stack(states)
        after = leave(self.attention.kernel(self.scaling), before)
        return self.unstack(after, states)

    def stack(self, states: list[State]) -> State:
        """The layers' states as that of one layer with all their heads, [B, sum of Hk, ...]."""
        wide = {
            field: self.positions.widen([getattr(state, field) for state in states], blank)
            for field, blank in (("keys", 0), ("values", 0), ("pos", 0), ("decay", WORTHLESS), ("mass", 0))
        }
        score = self.slots.widen([state.score for state in states], UNBEATEN)
        memory, key_sum = (torch.cat([getattr(state, field) for state in states], 1) for field in ("memory", "key_sum"))
        return State(**wide, score=score, memory=memory, key_sum=key_sum, seen=states[0].seen)

    def unstack(self, state: State, before: list[State]) -> list[State]:
        """The inverse of `stack`."""
        fields = ("keys", "values", "pos", "decay", "mass")
        parts = {field: self.positions.narrow(getattr(state, field)) for field in fields}
        parts["score"] = self.slots.narrow(state.score)
        parts["memory"] = list(state.memory.split([layer.kv_heads for layer in self.layers], 1))
        return [
            old._replace(**{field: part[i] for field, part in parts.items() if part[i].numel()})
            for i, old in enumerate(before)
        ]


class Widening:
    """Of tensors [B, Hk, front + slots, ...] of several layers, those that have the slots of `joint`, and back."""

    def __init__(self, layers: list[LayerShape], joint: KernelSpec, front: int):
        self.shapes = [(layer.kv_heads, front + layer.spec.slots) for layer in layers]
        self.rows, index, start = [heads * width for heads, width in self.shapes], [], 0
        for layer, (heads, width) in zip(layers, self.shapes, strict=True):
            own = start + torch.arange(heads * width).view(heads, width)
            index.append(with_slots(own, layer.spec, joint, front, sum(self.rows)))
            start += heads * width
        self.index = torch.cat(index)  # [sum of Hk, front + joint slots], into the rows; the number of rows: a blank
        self.back = torch.argsort(self.index.flatten(), stable=True)[:start]

    def widen(self, parts: list[Tensor], blank: float) -> Tensor:
        rows = torch.cat([part.flatten(1, 2) for part in parts], 1)
        if self.index.numel() > self.back.numel():
            rows = torch.cat([rows, torch.full_like(rows[:, :1], blank)], 1)
        return rows.index_select(1, self.index.flatten()).unflatten(1, self.index.shape)

    def narrow(self, joint: Tensor) -> list[Tensor]:
        rows = joint.flatten(1, 2).index_select(1, self.back).split(self.rows, 1)
        return [part.unflatten(1, shape) for part, shape in zip(rows, self.shapes, strict=True)]


def with_slots(own: Tensor, spec: KernelSpec, joint: KernelSpec, front: int, blank: int) -> Tensor:
    """own [Hk, front + slots] with the slots of `joint`: in every share the additional ones, `blank`, stand first.

    There the competition leaves them: nobody is better.
    """
    parts, at = [own[:, :front]], front
    for (_, capacity), (_, more) in zip(spec.shares, joint.shares, strict=True):
        parts += [torch.full((len(own), more - capacity), blank), own[:, at : at + capacity]]
        at += capacity
    return torch.cat(parts, 1)


def scalings(model: Any, layout: StateLayout) -> list[float]:
    """The factor of each layer's scores, which its attention says only when it is called."""
    found: list[float] = []

    def note(seen: Seen, kernel: Kernel, state: State) -> tuple[Tensor, State]:
        found.append(kernel.scaling)
        return torch.zeros_like(seen.query), state

    flat, ids = layout.empty(1), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad(), traced(model, note):
        run_model(model, ids, ids, layout.unpack(flat))
    return found


class Leave(nn.Module):
    """The block that leaves the window when one begins; rows where none begins stay as they are."""

    def __init__(self, model: Any, layout: StateLayout):
        super().__init__()
        self.layout, modules, scaling = layout, list(kernelized_layers(model).values()), scalings(model, layout)
        alike: dict[Any, list[int]] = {}
        for i, layer in enumerate(layout.layers):
            spec = layer.spec.replace(slots=size_class(layer.spec.slots))
            alike.setdefault((spec, layer.heads, layer.kv_heads, layer.head_dim, scaling[i]), []).append(i)
        self.groups = [
            Group(members, [layout.layers[i] for i in members], [modules[i].kernelize for i in members], key[-1])
            for key, members in alike.items()
        ]
        self.registered = nn.ModuleList(self.groups)

    def forward(self, flat: dict[str, Tensor]) -> dict[str, Tensor]:
        states = self.layout.unpack(flat)
        for group in self.groups:
            for i, state in zip(group.members, group([states[i] for i in group.members]), strict=True):
                states[i] = state
        return self.layout.pack(states, [name for name in self.layout.shapes if name not in ("seen", "key_sum")])


def size_class(slots: int) -> int:
    """16, 64, 256 …: budgets of one class are computed together; little goes to places that are not there."""
    size = 16
    while size < slots:
        size *= 4
    return size if slots else 0


def leave(kernel: Kernel, state: State) -> State:
    """`reference.evict` without a look of the host."""
    spec = kernel.spec
    begins = (state.seen % spec.block == 0) & (state.seen >= spec.ring)  # [B]
    leaving = spec.sinks + (state.seen[:, None] + torch.arange(spec.block)) % spec.ring  # [B, block]
    after = settle(kernel, state, leaving)
    return State(
        *(torch.where(begins.view(-1, *[1] * (old.ndim - 1)), new, old) for new, old in zip(after, state, strict=True))
    )
