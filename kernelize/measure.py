"""How near each feature map brings a layer to softmax, on the queries, keys and values of a real model.

Every number comes from the operation itself (`runtime.ops.attend`) with window, sinks and slots in place: maps, gates
and half-lives are calibrated on all texts but the last, and measured on the last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from .calibrate import SAMPLES, CalibrationProbe, SamplingProbe
from .errors import InputError
from .losses import far_part, softmax_attention
from .plan import AttentionShape, LayerCost
from .runtime import ops
from .runtime.attention import KernelAttention
from .runtime.feature_maps import FEATURE_MAPS
from .runtime.modeling import PREFIX, attentions, native_windows
from .runtime.spec import NO_MEMORY, KernelSpec
from .runtime.state import AttentionOutput, Seen
from .subject import check_learned, learned_positions
from .texts import read_text, sample_text

WATCHED = "kernelize_watched"  # a name in AttentionInterface, taken while a model is observed
SIZES = (32, 128)
TEXTS, TOKENS = 3, 1536
QUERIES = 128  # a text's last queries, of which negative mass is taken

Report = Callable[[int, int, str], object]  # how many are done, of how many, what is next


# --- what a layer sees ----------------------------------------------------------------------------------------


@contextmanager
def watched(model: PreTrainedModel, layers: Collection[int], see: Callable[[int, Seen], None]) -> Iterator[None]:
    """Within the context the softmax attention of `layers` also hands its inputs to `see`; outputs are the same."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None,
        softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        seen = Seen(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
        see(module.layer_idx, seen)
        return softmax_attention(seen)[0].transpose(1, 2), None

    AttentionInterface.register(WATCHED, attention)
    modules = {i: m for i, m in attentions(model, model.config.model_type).items() if i in layers}
    configs = {i: module.config for i, module in modules.items()}
    try:
        for module in modules.values():
            module.config = copy.copy(module.config)
            module.config._attn_implementation_internal = WATCHED
        yield
    finally:
        for i, module in modules.items():
            module.config = configs[i]


@torch.no_grad()
def observe(model: PreTrainedModel, texts: Sequence[Tensor], layers: Collection[int]) -> dict[int, list[Seen]]:
    """Layer -> what its attention sees in each text [1, T]; float32, on the CPU."""
    found: dict[int, list[Seen]] = {i: [] for i in layers}

    def see(layer: int, seen: Seen) -> None:
        q, k, v = (x.float().cpu().clone() for x in seen[:3])
        sinks = None if seen.sink_logits is None else seen.sink_logits.float().cpu()
        found[layer].append(Seen(q, k, v, seen.scaling, seen.softcap, sinks))

    with watched(model, layers, see):
        for ids in texts:
            model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    if not all(found.values()):
        raise InputError(f"{model.config.model_type!r} does not ask the attention interface; it cannot be inspected")
    return found


def sample_texts(tokenizer: Any, tokens: int = TOKENS, text: str | None = None) -> list[Tensor]:
    """Texts of `tokens` tokens each, [1, T]: to calibrate from the training sample, to measure from `text`.

    `text` is what `evaluate.read_text` takes; by default the shipped novel.
    """
    training, measured = sample_text("train"), read_text(text or "novel")
    starts = range(0, len(training), len(training) // (TEXTS - 1))
    pieces = [*(training[i:] for i in starts[: TEXTS - 1]), measured[len(measured) // 3 :]]
    return [torch.tensor([tokenizer(piece[: 8 * tokens])["input_ids"][:tokens]]) for piece in pieces]


def usual_tokens(model: PreTrainedModel) -> int:
    """The length of a text, unless one is asked for: what learned positions allow of `TOKENS`."""
    return min(TOKENS, learned_positions(model) or TOKENS)


def check_texts(model: PreTrainedModel, texts: Sequence[Tensor]) -> None:
    """InputError unless `texts` can calibrate and measure a model that is not converted yet."""
    if model.config.model_type.startswith(PREFIX):
        raise InputError(f"the model is already kernelized ({model.config.model_type}); inspect its source")
    check_learned(model, f"this {model.config.model_type!r}", max((ids.shape[-1] for ids in texts), default=0))
    if len(texts) < 2:
        raise InputError(f"{len(texts)} text; at least 2 are needed: the last is measured, the others calibrate")
    for ids in texts:
        if ids.ndim != 2 or len(ids) != 1:
            raise InputError(f"a text is token ids of shape [1, T], not {list(ids.shape)}")


def softmax_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """The layers that can be converted: those whose attention sees everything."""
    local = native_windows(model.config)
    return tuple(i for i in range(model.config.num_hidden_layers) if i not in local)


# --- what a map makes of it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MapRow:
    """One choice for one layer (`layer` −1: the mean of the measured ones), against softmax on the same q, k, v.

    Errors are |found − softmax|² / |softmax|², summed over heads and tokens.
    """

    layer: int
    spec: KernelSpec
    state_bytes: int  # of the layer, a sequence
    output: float  # error of the layer's attention output
    far: float  # error of the memory alone, against what softmax takes from outside the exact set
    fit: float  # weights: mean |log of the memory's mass − log of softmax's mass there|
    negative: float  # share of the memory's weights that is negative
    without: float  # error of the output without the memory


@torch.no_grad()
def measure_layer(layer: int, seen: Sequence[Seen], spec: KernelSpec, shape: AttentionShape) -> MapRow:
    """Calibrates one layer's choice on all of `seen` but the last, and measures it there."""
    kernel = KernelAttention(spec, shape.heads, shape.kv_heads, shape.head_dim)
    fit(kernel, seen[:-1])
    out, _ = ops.attend(*seen[-1][:3], kernel.kernel_for(seen[-1]))
    y, lse = softmax_attention(seen[-1])
    scale = y.square().sum()
    errors = {name: float((x - y).square().sum() / scale) for name, x in (("output", out.y), ("without", out.exact))}
    far, mass = far_errors(out, y, lse)
    negative = negative_mass(kernel, seen[-1])
    return MapRow(layer, spec, LayerCost.of(spec, shape).state_bytes, far=far, fit=mass, negative=negative, **errors)


def fit(kernel: KernelAttention, seen: Sequence[Seen]) -> None:
    """Calibrates a layer that stands alone, as `calibrate` does it in a model."""
    kernel.reset()
    if not kernel.spec.has_memory:
        return
    for feature_map in (kernel.map_q, kernel.map_k):
        feature_map.reset()
    if kernel.map_q.calibrated:
        samples = SamplingProbe(-(-sum(s.query.shape[2] for s in seen) // SAMPLES))
        for s in seen:
            samples.see(s, kernel.spec.sinks)
        samples.fit(kernel)
    gates = CalibrationProbe()
    for s in seen:
        gates(kernel, s, None)


def far_errors(out: AttentionOutput, y: Tensor, lse: Tensor) -> tuple[float, float]:
    """(error of the memory's output, mean difference of its log mass), weighted by softmax's mass out there."""
    filled = out.memory_lse.isfinite()
    far = far_part(y, lse, out.exact, out.exact_lse, torch.ones_like(filled))
    if not far.mass.any():
        return 0.0, 0.0
    weight = far.mass[..., None]
    output = (weight * (out.memory - far.y).square()).sum() / (weight * far.y.square()).sum()
    if not filled.any():
        return float(output), 0.0
    off = (out.memory_lse - far.lse).abs().where(filled & (far.mass > 0), 0)
    return float(output), float((off * far.mass).sum() / (far.mass * filled).sum())


def negative_mass(kernel: KernelAttention, seen: Seen) -> float:
    """Σ|negative weights| / Σ|weights| of the last queries on the keys outside window and sinks."""
    if not kernel.spec.has_memory:
        return 0.0
    T, root = seen.query.shape[2], seen.scaling**0.5
    first = max(0, T - QUERIES)
    pos = torch.arange(T)[None, None]
    phi_q = kernel.map_q(seen.query[:, :, first:] * root, pos[..., first:])
    phi_k = kernel.map_k(seen.key * root, pos)
    weights = phi_q.unflatten(1, (phi_k.shape[1], -1)) @ phi_k[:, :, None].mT  # [1, Hk, G, queries, T]
    age = torch.arange(first, T)[:, None] - torch.arange(T)
    weights = weights * ((age >= kernel.spec.ring) & (torch.arange(T) >= kernel.spec.sinks))
    return float(weights.clamp(max=0).abs().sum() / weights.abs().sum().clamp(min=1e-30))


# --- all of them ----------------------------------------------------------------------------------------------


def candidates(spec: KernelSpec, maps: Sequence[str], sizes: Sequence[int], head_dim: int) -> list[KernelSpec]:
    """`spec` with each map at the sizes it can have at or below each of `sizes`; InputError for an unknown map."""
    found: list[KernelSpec] = []
    for name in maps:
        if name == NO_MEMORY:
            policy = "attention" if spec.policy in ("recall", "mixed") else spec.policy
            found.append(spec.replace(feature_map=NO_MEMORY, policy=policy, decay="none"))
            continue
        if name not in FEATURE_MAPS:
            raise InputError(f"feature map {name!r} is not one of {', '.join(sorted(FEATURE_MAPS))}")
        for size in sizes:
            near = FEATURE_MAPS[name].nearest(size, head_dim)
            found.append(spec.replace(feature_map=name, feature_dim=near))
    return list(dict.fromkeys(found))


def spaced(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of `layers`, evenly spaced, none at the very ends unless all are taken."""
    step = len(layers) / count
    return tuple(layers) if count >= len(layers) else tuple(layers[int((i + 0.5) * step)] for i in range(count))


def measure_maps(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    sizes: Sequence[int] = SIZES,
    *,
    maps: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    spec: KernelSpec | None = None,
    on_progress: Report = lambda *_: None,
) -> list[MapRow]:
    """One row a map and size: the mean over `layers` (by default four, evenly spaced), best first.

    `texts` are token ids [1, T]: the last is measured, the others calibrate. InputError for what cannot be measured.
    """
    check_texts(model, texts)
    chosen = spaced(softmax_layers(model), 4) if layers is None else tuple(layers)
    shape = AttentionShape.of(model.config)
    named = (NO_MEMORY, *sorted(FEATURE_MAPS)) if maps is None else maps
    specs = candidates(spec or KernelSpec(), named, sizes, shape.head_dim)
    seen = observe(model, texts, chosen)
    rows = []
    for i, each in enumerate(specs):
        on_progress(i, len(specs), f"{each.feature_map} {each.feature_dim}")
        rows.append(mean_row([measure_layer(layer, seen[layer], each, shape) for layer in chosen]))
    on_progress(len(specs), len(specs), "measured")
    return sorted(rows, key=lambda row: row.output)


def mean_row(rows: Sequence[MapRow]) -> MapRow:
    fields = ("output", "far", "fit", "negative", "without")
    means = {name: sum(vars(row)[name] for row in rows) / len(rows) for name in fields}
    return replace(rows[0], layer=-1, **means)
