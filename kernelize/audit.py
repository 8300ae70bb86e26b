"""What a converted model's parts are worth: each taken away in turn, and where the attention goes that is left.

An ablation changes every converted layer at evaluation, and keeps the rest of the model. Who holds a slot is decided
as in the whole model: a part that is taken away leaves its term out of both sums of the attention, and nothing is
folded or moved elsewhere. Slots alone are what the exact branch has beyond window and sinks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .card import UNUSED
from .errors import InputError
from .evaluate import Passkey, Perplexity, Row, Subject, bootstrap, check_positions, wilson
from .losses import far_part
from .objectives import Features
from .recall import encode
from .runtime import ops
from .runtime.attention import Instead
from .runtime.modeling import kernelized_layers
from .runtime.reference import exact_scores, read, slot_bias
from .runtime.spec import KernelSpec
from .runtime.state import Kernel, State, unpacked, wide

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUITE = "audit"
SOURCES = ("window", "sinks", "slots", "memory")
EVERY = 64  # tokens: one query in so many is looked at
EDGES = (4, 16, 64, 256, 1024, 4096, 16384, 65536, 2**31)  # tokens of distance: upper ends of the buckets
ANSWER = 16  # tokens that a passkey may have
ROWS_HELD = 128  # positions whose logits exist at once

# What is left, as (window and sinks, slots, memory)
ABLATIONS: dict[str, tuple[bool, bool, bool]] = {
    "whole": (True, True, True),
    "no memory": (True, True, False),
    "no slots": (True, False, True),
    "window only": (True, False, False),
    "slots only": (False, True, False),
    "memory only": (False, False, True),
    "no attention": (False, False, False),
}

Read = tuple[Tensor, Callable[[Tensor], Tensor]]  # features [T, d] of a text, and the head that makes logits of them
OnProgress = Callable[[int, int, str], None]


# --- ablations --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ablated:
    """Computes a layer from some of its parts: stands in `KernelAttention.instead`."""

    window: bool
    slots: bool
    memory: bool

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
        y, before = query.new_zeros(*query.shape[:-1], value.shape[-1]), None
        for part, lse in self.parts(query, key, value, kernel):
            weight = 0.0 if before is None else torch.sigmoid(before - lse)[..., None]
            y, before = weight * y + (1 - weight) * part, lse
        return y.to(value.dtype)

    def parts(self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Iterator[tuple[Tensor, Tensor]]:
        """The branches that are left, with their log-sum-exp: [B, H, T, D], [B, H, T]."""
        if self.memory or (self.window and self.slots):
            out, _ = ops.attend(query, key, value, kernel, keep=False)
        if self.window and self.slots:
            yield out.exact, out.exact_lse
        elif self.window:
            yield near(query, key, value, kernel)
        elif self.slots:
            yield slots_alone(query, key, value, kernel)
        if self.memory:
            yield out.memory, out.memory_lse


def near(query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Attention over window and sinks alone, with its log-sum-exp: [B, H, T, D], [B, H, T]."""
    spec = kernel.spec.replace(
        slots=0, head_slots=(), feature_map="none", rule="additive", policy="attention", share=0.5, aging=0
    )
    plain = Kernel(spec, kernel.scaling, None, None, None, None, kernel.softcap, kernel.sink_logits)
    plain = plain._replace(rotation=kernel.rotation)
    out, _ = ops.attend(query, key, value, plain, keep=False)
    return out.exact, out.exact_lse


def slots_alone(query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Attention over the tokens that hold a slot, with its log-sum-exp; 0 and −inf where they have no mass to speak of.

    A difference of two sums, so it needs more than half precision.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = (x.to(wide(x.dtype)) for x in (query, key, value))
        out, _ = ops.attend(query, key, value, kernel, keep=False)
        part = far_part(out.exact, out.exact_lse, *near(query, key, value, kernel), out.exact_lse.isfinite())
    there = part.mass > 0
    return torch.where(there[..., None], part.y, 0.0), torch.where(there, part.lse, -torch.inf)


@contextmanager
def standing_in(model: PreTrainedModel, parts: dict[int, Instead]) -> Iterator[None]:
    """Within the context the layers named in `parts` compute with what is given for them."""
    layers = {i: module.kernelize for i, module in kernelized_layers(model).items()}
    for i, part in parts.items():
        layers[i].instead = part
    try:
        yield
    finally:
        for layer in layers.values():
            layer.instead = None


@contextmanager
def ablated(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within the context the model is what `ABLATIONS[name]` leaves of it; whole rows without a cache only."""
    part = Ablated(*ABLATIONS[name])
    with standing_in(model, {} if all(ABLATIONS[name]) else dict.fromkeys(kernelized_layers(model), part)):
        yield


# --- where attention goes ---------------------------------------------------------------------------------------------


@dataclass
class Meter:
    """Computes a layer as it is, and notes for every `EVERY`-th query what each source has of its normaliser.

    A first token that is still inside the window has a sink's place and counts as sink.
    """

    queries: int = 0
    shares: Tensor = field(default_factory=lambda: torch.zeros(len(SOURCES), dtype=torch.float64))
    distance: Tensor = field(default_factory=lambda: torch.zeros(3, len(EDGES), dtype=torch.float64))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
        parts, state = [], None
        for start in range(0, query.shape[2], EVERY):
            q, k, v = (x[:, :, start : start + EVERY] for x in (query, key, value))
            out, state = ops.attend(q, k, v, kernel, state)
            parts.append(out.y)
            self.note(q[:, :, -1:], *unpacked(kernel, state))
        return torch.cat(parts, 2)

    def note(self, query: Tensor, kernel: Kernel, state: State) -> None:
        """query [B, H, 1, D], the last token's, and the state after it."""
        exact, memory = masses(query, kernel, state)
        spec, (B, H, _) = kernel.spec, exact.shape
        age = (state.seen[:, None, None] - 1 - state.pos).repeat_interleave(H // state.pos.shape[1], 1)
        ends = (spec.sinks, spec.sinks + spec.ring, spec.positions)
        ranges = {"sinks": slice(0, ends[0]), "window": slice(ends[0], ends[1]), "slots": slice(ends[1], ends[2])}
        bucket = torch.bucketize(age, torch.tensor(EDGES, device=age.device), right=True)
        for i, source in enumerate(SOURCES[:3]):
            here = exact[..., ranges[source]].double().flatten()
            self.distance[i] += torch.bincount(bucket[..., ranges[source]].flatten(), here, len(EDGES)).cpu()
        self.queries += B * H
        self.shares = torch.cat([self.distance.sum(1), (self.shares[3:] + memory.double().sum().cpu())])


def masses(query: Tensor, kernel: Kernel, state: State) -> tuple[Tensor, Tensor]:
    """What each position [B, H, P] and the memory [B, H] have of the normaliser of a query [B, H, 1, D]."""
    last = state._replace(seen=state.seen - 1)  # the query's own position
    out, _ = read(query, kernel, last, None)
    spec, (B, H, _, D), Hk, acc = kernel.spec, query.shape, state.pos.shape[1], wide(query.dtype)
    scores = exact_scores(query.to(acc).view(B, Hk, H // Hk, D), kernel, last)  # [B, Hk, G, P]
    if spec.learned_share is not None:
        scores = scores + slot_bias(spec, state)[:, :, None]
    scores = scores.view(B, H, -1)
    total = torch.logaddexp(out.exact_lse, out.memory_lse)  # [B, H, 1]
    return (scores - total).exp(), (out.memory_lse - total).exp()[..., 0]


@dataclass(frozen=True)
class LayerAudit:
    """Shares of one layer's normaliser, means over queries and heads; `distance`: of each exact source, the share by
    the upper end of the distance in tokens."""

    layer: int
    window: float
    sinks: float
    slots: float
    memory: float
    distance: dict[str, dict[int, float]]
    verdict: str

    @classmethod
    def of(cls, layer: int, spec: KernelSpec, meter: Meter) -> LayerAudit:
        shares = dict(zip(SOURCES, (meter.shares / meter.queries).tolist(), strict=True))
        lines = (meter.distance / meter.queries).tolist()
        distance = {
            source: {edge: share for edge, share in zip(EDGES, line, strict=True) if share > 0}
            for source, line in zip(SOURCES, lines, strict=False)
        }
        return cls(layer, **shares, distance=distance, verdict=verdict(spec, shares["slots"], shares["memory"]))


def verdict(spec: KernelSpec, slots: float, memory: float) -> str:
    """What of a layer's slots and memory has less than `UNUSED` of its normaliser."""
    there = (("slots", spec.slots > 0, slots), ("memory", spec.has_memory, memory))
    idle = [name for name, exists, share in there if exists and share < UNUSED]
    return f"{' and '.join(idle)} unused" if idle else "in use"


# --- the audit --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Audit:
    """`rows` as evaluation has them, one model an ablation; and every converted layer's shares."""

    rows: tuple[Row, ...]
    layers: tuple[LayerAudit, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    def value(self, ablation: str, metric: str) -> float:
        return next(r.value for r in self.rows if r.model.endswith(f", {ablation}") and r.metric == metric)

    @property
    def rise(self) -> float:
        """How many times the divergence from the teacher grows without slots and memory."""
        whole = self.value("whole", "kl")
        return self.value("window only", "kl") / whole if whole else 1.0


@torch.inference_mode()
def audit(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "model",
    length: int = 2048,
    pieces: int = 4,
    trials: int = 4,
    text: str = "novel",
    on_progress: OnProgress | None = None,
) -> Audit:
    """Perplexity, KL and recall of a converted model and of what its `ABLATIONS` leave of it; shares of its layers.

    On `pieces` texts of `length` tokens, and passkeys of that length, `trials` at each of five depths, which count as
    found when every token of the answer is the likeliest after those before it.
    """
    if not kernelized_layers(model):
        raise InputError(f"{name} has no converted layer, so there is nothing to audit")
    sizes = [m.config.get_text_config().vocab_size for m in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise InputError(f"{name} and the teacher have different vocabularies, of {sizes[0]} and {sizes[1]} tokens")
    for title, subject in ((name, model), ("the teacher", teacher)):
        check_positions(Subject(title, subject, tokenizer, ""), length + ANSWER)
    texts = [unit.ids[0] for unit in Perplexity(lengths=(length,), pieces=pieces, text=text).units(tokenizer)]
    units = Passkey(lengths=(length,), trials=trials, haystack=text).units(tokenizer)
    prompts = [_asked(tokenizer, ids, asked.answers[0]) for unit in units
               for ids, asked in zip(unit.ids, unit.settings["asked"], strict=True)]  # fmt: skip
    return _Audit(model, teacher, name, texts, prompts, on_progress).run()


def _asked(tokenizer, ids: list[int], answer: str) -> tuple[list[int], int]:
    """A prompt with its answer, and how many tokens that has."""
    wanted = encode(tokenizer, " " + answer)
    return ids + wanted, len(wanted)


class _Audit:
    def __init__(self, model, teacher, name: str, texts: Sequence[list[int]], prompts, on_progress: OnProgress | None):
        self.model, self.name, self.texts, self.prompts = model.eval(), name, texts, prompts
        self.mine, self.theirs = Features(model), Features(teacher.eval())
        self.on_progress, self.done = on_progress, 0
        per_model = sum(map(len, texts)) + sum(len(ids) for ids, _ in prompts)
        self.total = per_model * (len(ABLATIONS) + 1) + sum(map(len, texts))

    def run(self) -> Audit:
        known = [self._read(self.theirs, ids, "teacher") for ids in self.texts]
        rows = [*self._scores("teacher", known, known, self._found(self.theirs, "teacher"))]
        for ablation in ABLATIONS:
            with ablated(self.model, ablation):
                reads = (self._read(self.mine, ids, ablation) for ids in self.texts)
                rows += self._scores(f"{self.name}, {ablation}", reads, known, self._found(self.mine, ablation))
        layers = self._layers()
        return Audit((*rows, *self._mass_rows(layers)), layers)

    def _read(self, features: Features, ids: list[int], label: str) -> Read:
        tokens = torch.tensor([ids], device=features.model.device)
        read, head = features(tokens, torch.arange(len(ids), device=tokens.device)[None])
        self.done += len(ids)
        if self.on_progress:
            self.on_progress(self.done, self.total, label)
        return read[0], head

    def _scores(self, title: str, reads: Iterable[Read], known: Sequence[Read], found: Iterator[bool]) -> Iterator[Row]:
        texts = zip(reads, known, map(torch.tensor, self.texts), strict=True)
        sums = [compare(*text) for text in texts]
        counts, length = [len(ids) - 1.0 for ids in self.texts], len(self.texts[0])
        for metric, column, of in (("ppl", 0, math.exp), ("kl", 1, float)):
            values = [pair[column] for pair in sums]
            low, high = bootstrap(values, counts, 0, of)
            yield Row(title, SUITE, metric, length, None, of(sum(values) / sum(counts)), low, high, len(values))
        hits = list(found)
        mean = sum(hits) / len(hits)
        yield Row(title, SUITE, "passkey", length, None, mean, *wilson(mean, len(hits)), len(hits))

    def _found(self, features: Features, label: str) -> Iterator[bool]:
        for ids, answer in self.prompts:
            read, head = self._read(features, ids, label)
            yield head(read[-answer - 1 : -1]).argmax(-1).tolist() == ids[-answer:]

    def _layers(self) -> tuple[LayerAudit, ...]:
        meters = {i: Meter() for i in kernelized_layers(self.model)}
        with standing_in(self.model, dict(meters)):
            for ids in self.texts:
                self._read(self.mine, ids, "layers")
        specs = {i: module.kernelize.spec for i, module in kernelized_layers(self.model).items()}
        return tuple(LayerAudit.of(i, specs[i], meter) for i, meter in meters.items())

    def _mass_rows(self, layers: Sequence[LayerAudit]) -> Iterator[Row]:
        title, count = f"{self.name}, whole", len(layers)
        for source in SOURCES:
            share = sum(getattr(layer, source) for layer in layers) / count
            yield Row(title, SUITE, f"mass_{source}", None, None, share, None, None, count)
        for source in SOURCES[:3]:
            for edge in sorted({edge for layer in layers for edge in layer.distance[source]}):
                share = sum(layer.distance[source].get(edge, 0.0) for layer in layers) / count
                yield Row(title, SUITE, f"mass_{source}_at", edge, None, share, None, None, count)


def compare(mine: Read, theirs: Read, ids: Tensor) -> tuple[float, float]:
    """Sums over the tokens ids [T] after the first: negative log likelihood, and KL from the teacher.

    The logits of a few positions exist at a time.
    """
    (mine_read, head), (their_read, their_head) = mine, theirs
    sums = torch.zeros(2, dtype=torch.float64)
    for rows in torch.arange(len(ids) - 1).split(ROWS_HELD):
        scores = head(mine_read[rows]).float().log_softmax(-1)
        truth = their_head(their_read[rows]).float().log_softmax(-1).to(scores.device)
        nll = -scores.gather(1, ids[rows + 1, None].to(scores.device)).double().sum()
        kl = F.kl_div(scores, truth, reduction="none", log_target=True).double().sum()
        sums += torch.stack([nll, kl]).cpu()
    return float(sums[0]), max(0.0, float(sums[1]))
