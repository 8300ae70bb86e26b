"""A kernelized model as two functions of its state, to be traced: tokens inside a block, and what is between blocks.

Neither mutates anything or looks at a value on the host: what depends on a position is arithmetic on fixed shapes. The
state is a dict of tensors (`StateLayout`), given and returned; docs/edge.md is the interface.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .runtime.attention import KernelAttention
from .runtime.cache import CACHE, KernelState, adopt_cache, kernel_layers
from .runtime.modeling import family_of, kernelized_layers
from .runtime.reference import slot_bias, spread, take
from .runtime.spec import KernelSpec
from .runtime.state import (
    EMPTY,
    Kernel,
    Seen,
    State,
    features,
    log_decays,
    logits,
    weigh_answers,
    wide,
)

OWN = ("keys", "values", "memory", "turned", "all")  # large fields of the state: a tensor a layer
PACKED = ("pos", "decay", "mass", "score", "key_sum")  # small ones: all layers behind each other in one tensor
NEVER = -1e30  # a score that no exponential survives; unlike −inf it makes no row of them undefined
LATER = 1 << 62  # a position after all others


# --- the state as tensors -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerShape:
    """What the sizes of one layer's state depend on."""

    spec: KernelSpec
    heads: int
    kv_heads: int
    head_dim: int
    turns: bool = False  # whether what is beyond reach is seen as if it were nearer
    head_slots: tuple[int, ...] = ()  # of each KV head, where they differ; the spec's are then the most of any

    @classmethod
    def of(cls, spec: KernelSpec, shape: tuple[int, int, int], turns: bool) -> LayerShape:
        """A layer's; where its KV heads have slots of their own number, each has a row as long as the longest."""
        if not spec.head_slots:
            return cls(spec, *shape, turns)
        return cls(spec.replace(slots=max(spec.head_slots), head_slots=()), *shape, turns, spec.head_slots)

    def rooms(self, head: int) -> list[int]:
        """The slots of each share that a KV head has."""
        slots = self.head_slots[head] if self.head_slots else self.spec.slots
        return [room for _, room in self.spec.divided(slots)]

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
            **self.derived,
        }

    @property
    def derived(self) -> dict[str, tuple[int, ...]]:
        """Of what the rest determines: kept, so that a block's end computes with that block's tokens alone."""
        spec, Hk = self.spec, self.kv_heads
        return {
            # keys of sinks and slots as they would be at position 0
            "turned": (Hk, spec.positions if self.turns else 0, self.head_dim),
            # a memory of all tokens that ever left the window, slot holders too
            "all": (Hk, spec.feature_dim if spec.measures("recall") else 0, self.head_dim + 1),
        }


def shapes_of(model: Any) -> list[LayerShape]:
    """Of every converted layer."""
    shape = family_of(model.config.model_type).shape
    return [
        LayerShape.of(own.spec, shape(module, model.config), bool(own.spec.reach and own.rotary is not None))
        for module in kernelized_layers(model).values()
        for own in [module.kernelize]
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

    def starts(self, field: str) -> list[int]:
        """Where each layer begins in a packed field."""
        return list(itertools.accumulate(self.widths(field), initial=0))[:-1]

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
            states.append(State(**{name: x for name, x in fields.items() if name not in layer.derived}))
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

    def put_packed(self, packed: Tensor, new: Tensor) -> Tensor:
        """A packed field [B, N] with the new numbers [B, sum of Hk, T] of all layers' heads in it."""
        heads = [layer for layer in self.layout.layers for _ in range(layer.kv_heads)]
        sinks = torch.tensor([layer.spec.sinks for layer in heads])[:, None]
        ring = torch.tensor([layer.spec.ring for layer in heads])[:, None]
        width = torch.tensor([layer.spec.positions for layer in heads])[:, None]
        at = self.at[:, None]
        entry = torch.where(at < sinks, at, sinks + at % ring) + (width.cumsum(0) - width)  # [B, sum of Hk, T]
        index, valid = entry.flatten(1), self.valid[:, None].expand_as(entry).flatten(1)
        return packed.scatter(1, index, torch.where(valid, new.expand_as(entry).flatten(1), packed.gather(1, index)))

    def rows(self, x: Tensor, heads: int) -> Tensor:
        """x [B, T] for the queries of a group of `heads`, which stand under each other: [B, 1, heads · T, 1]."""
        return x.repeat(1, heads)[:, None, :, None]

    def collect(self, mass: Tensor, pos: Tensor, added: list[Tensor]) -> Tensor:
        """The packed `mass` [B, N], with what sinks and window of the layers were given, each [B, Hk · (sinks + ring)].

        Only the window's earlier blocks count; `pos` [B, N] are the positions.
        """
        places, blocks, window, start = [], [], [], 0
        for layer, width in zip(self.layout.layers, self.layout.widths("mass"), strict=True):
            if layer.spec.measures("attention"):
                entry = torch.arange(layer.spec.sinks + layer.spec.ring).repeat(layer.kv_heads, 1)  # [Hk, …]
                places.append(start + (entry + torch.arange(layer.kv_heads)[:, None] * layer.spec.positions).flatten())
                blocks.append(torch.full_like(places[-1], layer.spec.block))
                window.append((entry >= layer.spec.sinks).flatten())
            start += width
        if not places:
            return mass
        at, seen, block = torch.cat(places), self.seen[:, None], torch.cat(blocks)
        earlier = pos.index_select(1, at) < seen - seen % block
        fresh = torch.where(earlier & torch.cat(window), torch.cat(added, 1), 0.0)  # [B, M]
        back = torch.full((start,), len(at)).scatter(0, at, torch.arange(len(at)))
        return mass + torch.nn.functional.pad(fresh, (0, 1)).index_select(1, back)


Compute = Callable[[int, Seen, Kernel, State], tuple[Tensor, State]]  # (layer, …) -> (y [B, H, T, D], state afterwards)


def attend_span(span: Span, turned: dict[str, Tensor]) -> Compute:
    """What `reference.step` does with a token, for all of a span at once: they share block, slots and memory.

    Of the state that comes in `pos` is LATER where no token is, and `turned` has the layers' keys at position 0. In
    the state afterwards `mass` [B, Hk · (sinks + ring)] is what was added, `decay` [B or 1, Hk, T or 1] their own.
    """

    def compute(layer: int, seen: Seen, kernel: Kernel, state: State) -> tuple[Tensor, State]:
        kernel = kernel._replace(spec=span.layout.layers[layer].spec)
        entry = span.entry(kernel.spec)
        keys, values = span.put(state.keys, seen.key, entry), span.put(state.values, seen.value, entry)
        state = state._replace(keys=keys, values=values)
        y, mass = read_span(seen.query, kernel, state, span, turned.get(f"turned.{layer}"))
        own = log_decays(kernel, seen.key, seen.value)
        decay = torch.zeros(1, state.pos.shape[1], 1) if own is None else own.view(-1, *own.shape[-2:])
        key_sum = state.key_sum
        if kernel.spec.measures("keydiff"):
            counts = span.valid & (span.at >= kernel.spec.sinks)
            key_sum = key_sum + torch.where(counts[:, None, :, None], seen.key, 0.0).sum(2)
        return y, state._replace(mass=mass, decay=decay, key_sum=key_sum)

    return compute


def read_span(q: Tensor, kernel: Kernel, state: State, span: Span, turned: Tensor | None) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D] against the state -> (y [B, H, T, D], the mass [B, Hk · (sinks + ring)] that is received).

    The memory is one more column of the softmax, whose score is the log of its mass and whose value is its answer.
    """
    spec, (B, H, T, D) = kernel.spec, q.shape
    Hk, acc = state.pos.shape[1], wide(q.dtype)
    G = H // Hk
    query = q.to(acc).reshape(B, Hk, G * T, D)  # the queries of a group stand under each other
    s = scores(query, kernel, state, span, turned)  # [B, Hk, G·T, P]
    joined = s if spec.learned_share is None else s + slot_bias(spec, state)[:, :, None]
    columns, answer = [joined], None
    if spec.has_memory:
        answer, mass = recall(q, kernel, state, span)  # [B, Hk, G·T, D], [B, Hk, G·T, 1]
        columns.append(mass.log())
    if kernel.sink_logits is not None:
        columns.append(kernel.sink_logits.view(Hk, G, 1).expand(B, Hk, G, T).reshape(B, Hk, G * T, 1))
    weights = (torch.cat(columns, -1) if columns[1:] else joined).softmax(-1)
    y = weights[..., : spec.positions] @ state.values.to(acc)
    if answer is not None:
        y = y + weights[..., spec.positions : spec.positions + 1] * answer
    return y.reshape(B, H, T, D).to(q.dtype), received(s, spec, span, G)


def recall(q: Tensor, kernel: Kernel, state: State, span: Span) -> tuple[Tensor, Tensor]:
    """The memory's answer [B, Hk, G·T, D] to q [B, H, T, D], and its mass, gate included: [B, Hk, G·T, 1]."""
    assert kernel.map_q is not None
    assert kernel.log_gate is not None
    (B, H, T, D), (Hk, F) = q.shape, state.memory.shape[1:3]
    phi = features(kernel, kernel.map_q, q, span.at[:, None])
    gated = (phi * kernel.log_gate.exp()[:, None, None]).reshape(B, Hk, H // Hk * T, F)
    numerator, mass = (gated @ state.memory).split([D, 1], -1)
    if kernel.spec.is_delta:
        numerator, _ = weigh_answers(numerator, mass, gated)
    return numerator / mass.clamp(min=torch.finfo(mass.dtype).tiny), mass


def scores(query: Tensor, kernel: Kernel, state: State, span: Span, turned: Tensor | None) -> Tensor:
    """query [B, Hk, G·T, D] against the keys of the state -> [B, Hk, G·T, P], NEVER where nothing is to be seen."""
    heads, pos = query.shape[2] // span.length, state.pos[:, :, None]  # [B, Hk, 1, P]
    at = span.rows(span.at, heads)
    s = logits(query, state.keys.to(query.dtype), kernel)
    if turned is not None:
        assert kernel.rotation is not None
        reach = kernel.spec.reach
        far = logits(kernel.rotation.turn(query, at[..., 0], reach), turned, kernel)
        s = torch.where(pos < at - reach, far, s)
    return torch.where(pos <= at, s, NEVER)


def received(s: Tensor, spec: KernelSpec, span: Span, heads: int) -> Tensor:
    """`reference.receive`, of scores s [B, Hk, G·T, P]: what sinks and window get, [B, Hk · (sinks + ring)]."""
    if not spec.measures("attention"):
        return s.new_zeros(s.shape[0], 0)
    p = s[..., : spec.sinks + spec.ring].softmax(-1)
    valid = span.rows(span.valid, heads).transpose(-1, -2).to(p.dtype)  # [B, 1, 1, G·T]
    return (valid @ p).flatten(1)


class Traced(nn.Module):
    """Stands where a layer's KernelAttention is: the same parameters, with arithmetic that can be traced."""

    def __init__(self, attention: KernelAttention, compute: Callable[[Seen, Kernel, State], tuple[Tensor, State]]):
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
            module.kernelize = Traced(own[i], partial(compute, i))
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
        pos = span.put_packed(flat["pos"], span.at[:, None])
        shown = {**flat, "pos": torch.where(pos == EMPTY, LATER, pos)}
        with traced(self.model, attend_span(span, flat)), last_token(self.model, count):
            scores, states = run_model(self.model, ids, span.at, layout.unpack(shown))
        own = [name for name in layout.shapes if name.startswith(("keys.", "values.")) or name == "key_sum"]
        new = layout.pack(states, own) | {"seen": flat["seen"] + count, "pos": pos}
        new["mass"] = span.collect(flat["mass"], pos, [state.mass for state in states])
        decays = [state.decay for state in states]
        if any(layer.spec.decay == "gated" for layer in layout.layers):
            decays = [decay.expand(ids.shape[0], -1, T) for decay in decays]
        new["decay"] = span.put_packed(flat["decay"], torch.cat(decays, 1))
        return {"logits": scores[:, -1], **new}


def scalings(model: Any, layout: StateLayout) -> list[float]:
    """The factor of each layer's scores, which its attention says only when it is called."""
    found: list[float] = []

    def note(layer: int, seen: Seen, kernel: Kernel, state: State) -> tuple[Tensor, State]:
        found.append(kernel.scaling)
        return torch.zeros_like(seen.query), state

    flat, ids = layout.empty(1), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad(), traced(model, note):
        run_model(model, ids, ids, layout.unpack(flat))
    return found
