"""ConversionPlan: which layer becomes what. describe(): what that costs, from a model's config alone.

Layers are counted from 0. As data a plan is `{"version": 1, "layers": [{spec fields} | null, ...]}`; this is also
what `config.kernelize` of a converted checkpoint holds. People write plans in recipes (`Recipe.kernel`, `keep` and
`layers`), or as a pattern.
"""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .runtime.spec import LARGEST, MOST_LAYERS, KernelSpec, choose

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from .recipe import Recipe

VERSION = 1
KERNEL, SOFTMAX = "K", "S"
LENGTHS = (512, 2048, 8192, 32768, 131072)


@dataclass(frozen=True)
class ConversionPlan:
    """One `KernelSpec` a layer, or None where softmax attention is kept."""

    layers: tuple[KernelSpec | None, ...]

    def __post_init__(self) -> None:
        if not any(self.layers):
            raise InputError(f"the plan keeps softmax in all {len(self.layers)} layers; nothing would be converted")

    @classmethod
    def uniform(cls, spec: KernelSpec, count: int, keep: Collection[int] = ()) -> ConversionPlan:
        """`spec` in each of `count` layers but those of `keep`."""
        for layer in keep:
            _check_layer(layer, count)
        return cls(tuple(None if i in keep else spec for i in range(count)))

    @classmethod
    def from_pattern(cls, pattern: str, spec: KernelSpec, count: int) -> ConversionPlan:
        """`pattern`, a word of K (kernelized) and S (softmax) such as "KKKS", repeated over `count` layers."""
        return cls.uniform(spec, count, kept_by_pattern(pattern, count))

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, count: int, leave: Collection[int] = (), context: int | None = None
    ) -> ConversionPlan:
        """The recipe's choice for a model of `count` layers; those in `leave` only if the recipe names them.

        `context` is the number of positions that the model has, where its recipe asks for a reach by that.
        """
        if recipe.keep_auto:
            raise InputError(f"recipe {recipe.name!r}: keep_auto={recipe.keep_auto} is measured by `convert`, not here")
        kept = set(leave) - recipe.named
        specs = recipe.specs(count)
        if recipe.reach and context is not None:
            reach = context // 2 if recipe.reach == "half" else context
            specs = tuple(s and s.replace(reach=max(reach, s.least_reach)) for s in specs)
        return cls(tuple(None if i in kept else spec for i, spec in enumerate(specs)))

    def override(self, changes: Mapping[int, Mapping[str, Any]]) -> ConversionPlan:
        """Changes fields of single layers: {18: {"slots": 512}}."""
        layers = list(self.layers)
        for i, fields in changes.items():
            _check_layer(i, len(layers))
            spec = layers[i]
            if spec is None:
                raise InputError(f"layer {i} keeps softmax; it has no fields to change")
            layers[i] = KernelSpec.from_dict({**spec.to_dict(), **fields})
        return ConversionPlan(tuple(layers))

    @property
    def converted(self) -> dict[int, KernelSpec]:
        """Layer index -> spec, of the layers that change."""
        return {i: spec for i, spec in enumerate(self.layers) if spec is not None}

    @property
    def kept(self) -> tuple[int, ...]:
        """Layers that keep softmax attention."""
        return tuple(i for i, spec in enumerate(self.layers) if spec is None)

    def to_dict(self) -> dict:
        """JSON-ready, the inverse of `from_dict`."""
        return {"version": VERSION, "layers": [spec and spec.to_dict() for spec in self.layers]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ConversionPlan:
        """Strict: refuses unknown fields, and versions that this release does not know."""
        for field in data:
            choose("plan field", field, ("version", "layers"))
        if data.get("version") != VERSION:
            raise InputError(f"plan version {data.get('version')!r} is not known; this release reads {VERSION}")
        layers = data.get("layers")
        if not isinstance(layers, list | tuple):
            raise InputError(f"a plan's layers are a list with one entry a layer, not {type(layers).__name__}")
        return cls(tuple(None if spec is None else KernelSpec.from_dict(spec) for spec in layers))

    def to_recipe(self, name: str, description: str) -> Recipe:
        """A recipe without stages that makes this plan: the most common spec, and what other layers change in it."""
        from .recipe import Recipe

        base = Counter(self.converted.values()).most_common(1)[0][0].to_dict()
        changed = {i: {f: v for f, v in spec.to_dict().items() if v != base[f]} for i, spec in self.converted.items()}
        data = {
            "name": name,
            "description": description,
            "kernel": base,
            "keep": [i for i, spec in enumerate(self.layers) if spec is None],
            "layers": {str(i): fields for i, fields in changed.items() if fields},
        }
        return Recipe.from_dict(data, name)

    def to_yaml(self) -> str:
        """The same data as YAML."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> ConversionPlan:
        """The inverse of `to_yaml`."""
        import yaml

        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise InputError(f"the plan is not valid YAML: {' '.join(str(e).split())}") from e
        if not isinstance(data, dict):
            raise InputError(f"a plan is a mapping of fields, not {type(data).__name__}")
        return cls.from_dict(data)


def kept_by_pattern(pattern: str, count: int) -> tuple[int, ...]:
    """The layers that `pattern`, repeated over `count` layers, keeps softmax: (3, 7) for "KKKS" over 8."""
    if not pattern or set(pattern) - {KERNEL, SOFTMAX}:
        raise InputError(f"pattern={pattern!r} is not a word of K (kernelized) and S (softmax)")
    return tuple(i for i in range(count) if pattern[i % len(pattern)] == SOFTMAX)


def parse_layers(text: str) -> tuple[int, ...]:
    """(0, 7, 12, 13) from "0,7,12-13"; a layer that is named twice is refused."""
    found = [i for part in text.split(",") if part.strip() for i in _range(part.strip())]
    twice = sorted(i for i, count in Counter(found).items() if count > 1)
    if twice:
        raise InputError(f"layers {text!r} name layer {twice[0]} twice")
    return tuple(found)


def parse_auto(text: str) -> int:
    """7 from "auto:7": how many layers keep softmax."""
    word, _, count = text.partition(":")
    if word != "auto" or not count.isdecimal() or int(count) == 0:
        raise InputError(f"keep={text!r} is neither layers ('0,7,12-14') nor a number of them to be chosen ('auto:7')")
    return int(count)


def _range(part: str) -> range:
    """InputError for what is none, and for more layers than a model can have."""
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
    if last < first or last >= MOST_LAYERS:
        raise InputError(f"{part!r} is neither a layer ('3') nor a range ('3-7')")
    return range(first, last + 1)


def _check_layer(layer: int, count: int) -> None:
    if not 0 <= layer < count:
        raise InputError(f"the plan names layer {layer}; the model has 0 to {count - 1}")


# --- what a plan costs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionShape:
    """What sizes depend on: read from a config."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    dtype: str  # torch's name, e.g. "bfloat16"
    windows: tuple[int | None, ...] = ()  # one entry a layer, None where it sees every token; empty: all of them do

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: str | None = None) -> AttentionShape:
        """From any decoder's config; `dtype` (torch's name) where the config says nothing or something else."""
        from .runtime.modeling import head_dim_of, kv_heads_of

        text = config.get_text_config(decoder=True)
        return cls(
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=kv_heads_of(text),
            head_dim=head_dim_of(text),
            context=text.max_position_embeddings,
            dtype=dtype or (str(text.dtype).removeprefix("torch.") if text.dtype else "float32"),
            windows=_cached_windows(text),
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype = vars(torch).get(self.dtype)
        if not isinstance(dtype, torch.dtype):
            raise InputError(f"dtype={self.dtype!r} is not a dtype of torch, such as float32 or bfloat16")
        return dtype

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token adds to the key-value cache of one softmax layer."""
        return 2 * self.kv_heads * self.head_dim * self.torch_dtype.itemsize

    @property
    def limits(self) -> tuple[int, ...]:
        """Tokens that a query of each softmax layer sees at most."""
        return tuple(window or LARGEST for window in self.windows or (None,) * self.layers)

    def kv_bytes(self, length: int, limit: int) -> int:
        """Bytes of a softmax layer's key-value cache after `length` tokens, of which a query sees `limit` at most.

        A token that was read brings its own key: Transformers keeps one less than the window for it.
        """
        return min(length, limit - 1) * self.kv_bytes_per_token

    def softmax_flops(self, seen: float) -> float:
        """FLOPs (2 a multiply-add) of one layer for one query that sees `seen` tokens: q·k and the sum of v."""
        return 4.0 * self.heads * self.head_dim * seen


@dataclass(frozen=True)
class LayerCost:
    """The constants of one converted layer: a sequence's bytes, and FLOPs a token."""

    new_parameters: int
    state_bytes: int
    positions: int
    memory_flops: int

    @classmethod
    def of(cls, spec: KernelSpec, shape: AttentionShape) -> LayerCost:
        new = _new_parameters(spec, shape)
        return cls(new, _state_bytes(spec, shape), spec.positions, _memory_flops(spec, shape, new))


@dataclass(frozen=True)
class LayerRow:
    """One layer of a plan: its spec or None, the parameters that conversion adds, a sequence's state in bytes."""

    layer: int
    spec: KernelSpec | None
    new_parameters: int
    state_bytes: int


@dataclass(frozen=True)
class LengthRow:
    """The whole model at one length, after the plan and (`teacher_`) before.

    Bytes are those of the cache of one sequence. FLOPs are those of attention without its projections: the mean of
    a token in a prefill of `length` tokens, and the one token that is decoded at that length.
    """

    length: int
    cache_bytes: int
    teacher_cache_bytes: int
    prefill_flops: float
    teacher_prefill_flops: float
    decode_flops: float
    teacher_decode_flops: float

    @classmethod
    def of(cls, length: int, costs: Sequence[LayerCost | None], shape: AttentionShape) -> LengthRow:
        """`costs`: one entry a layer, None where softmax is kept."""
        layers = list(zip(costs, shape.limits, strict=True))
        most = [cost.positions if cost else limit for cost, limit in layers]
        memory = sum(cost.memory_flops for cost in costs if cost)
        return cls(
            length,
            cache_bytes=sum(cost.state_bytes if cost else shape.kv_bytes(length, limit) for cost, limit in layers),
            teacher_cache_bytes=sum(shape.kv_bytes(length, limit) for limit in shape.limits),
            prefill_flops=memory + shape.softmax_flops(_mean_seen(length, most)),
            teacher_prefill_flops=shape.softmax_flops(_mean_seen(length, shape.limits)),
            decode_flops=memory + shape.softmax_flops(_seen(length, most)),
            teacher_decode_flops=shape.softmax_flops(_seen(length, shape.limits)),
        )


@dataclass(frozen=True)
class PlanReport:
    """What `describe` found; from the break-even lengths on, the converted layers take less than softmax did.

    A break-even is None where a layer's own window keeps softmax as cheap at every length.
    """

    shape: AttentionShape
    layers: tuple[LayerRow, ...]
    lengths: tuple[LengthRow, ...]
    break_even_bytes: int | None
    break_even_flops: int | None

    @property
    def new_parameters(self) -> int:
        return sum(row.new_parameters for row in self.layers)

    @property
    def state_bytes(self) -> int:
        """Bytes a sequence of all converted layers, whatever its length."""
        return sum(row.state_bytes for row in self.layers)

    def to_dict(self) -> dict:
        """JSON-ready."""
        sums = {"new_parameters": self.new_parameters, "state_bytes": self.state_bytes}
        return {**dataclasses.asdict(self), **sums}


def describe(
    plan: ConversionPlan,
    config: PretrainedConfig,
    *,
    lengths: Sequence[int] = LENGTHS,
    dtype: str | None = None,
) -> PlanReport:
    """Parameters, state and FLOPs of `plan` on a model of this config; no weights are needed.

    Raises InputError when the plan is for another number of layers.
    """
    shape = AttentionShape.of(config, _floating(dtype))
    if len(plan.layers) != shape.layers:
        raise InputError(f"the plan has {len(plan.layers)} layers, the model {shape.layers}")
    known = {spec: LayerCost.of(spec, shape) for spec in set(plan.converted.values())}
    costs = [None if spec is None else known[spec] for spec in plan.layers]
    pairs = [(cost, limit) for cost, limit in zip(costs, shape.limits, strict=True) if cost]
    return PlanReport(
        shape=shape,
        layers=tuple(_layer_row(i, spec, known) for i, spec in enumerate(plan.layers)),
        lengths=tuple(LengthRow.of(length, costs, shape) for length in lengths),
        break_even_bytes=_break_even_bytes(pairs, shape),
        break_even_flops=_break_even_flops(pairs, shape),
    )


def _floating(dtype: str | None) -> str | None:
    """`dtype`, or None where the config decides; InputError for what no model computes in."""
    from .convert import named_dtype

    if dtype in (None, "auto"):
        return None
    named_dtype(str(dtype))
    return dtype


def _cached_windows(config: PretrainedConfig) -> tuple[int | None, ...]:
    """The windows of Transformers' own cache: a family whose cache keeps every token has none here."""
    from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

    layers = DynamicCache(config=config).layers
    return tuple(x.sliding_window if isinstance(x, DynamicSlidingWindowLayer) else None for x in layers)


def _layer_row(layer: int, spec: KernelSpec | None, costs: Mapping[KernelSpec, LayerCost]) -> LayerRow:
    if spec is None:
        return LayerRow(layer, None, 0, 0)
    return LayerRow(layer, spec, costs[spec].new_parameters, costs[spec].state_bytes)


def _seen(length: int, limits: Sequence[int]) -> int:
    """Tokens that the query at position `length` sees, over all layers."""
    return sum(min(length, limit) for limit in limits)


def _mean_seen(length: int, limits: Sequence[int]) -> float:
    """The mean of `_seen` over the positions 1 … length: what a token of a prefill sees."""
    short = [min(length, limit) for limit in limits]
    return sum(s * (s + 1) / 2 + (length - s) * s for s in short) / length


def _new_parameters(spec: KernelSpec, shape: AttentionShape) -> int:
    """Counted on the layer's own module, laid out without storage."""
    import torch

    from .runtime.attention import KernelAttention

    with torch.device("meta"):
        kernel = KernelAttention(spec, shape.heads, shape.kv_heads, shape.head_dim)
    return sum(p.numel() for p in kernel.parameters())


def _state_bytes(spec: KernelSpec, shape: AttentionShape) -> int:
    """Counted on the state itself, laid out without storage."""
    import torch

    from .runtime.state import empty_state

    kv = torch.empty(1, shape.kv_heads, 1, shape.head_dim, device="meta", dtype=shape.torch_dtype)
    return empty_state(spec, kv, kv).nbytes


def _memory_flops(spec: KernelSpec, shape: AttentionShape, map_weights: int) -> int:
    """Of one token: both maps, reading the memory, folding a token in.

    The delta rule and the recall score each ask the memory for the token's own key besides.
    """
    if not spec.has_memory:
        return 0
    D, F, H, Hk = shape.head_dim, spec.feature_dim, shape.heads, shape.kv_heads
    read = H * F * (D + 1)
    fold = (1 + spec.is_delta + spec.measures("recall")) * Hk * F * (D + 1)
    return 2 * (map_weights + read + fold)


def _break_even_bytes(pairs: Sequence[tuple[LayerCost, int]], shape: AttentionShape) -> int | None:
    """The first length at which the converted layers' state takes fewer bytes than their key-value cache would."""
    state = sum(cost.state_bytes for cost, _ in pairs)
    limits = [limit for _, limit in pairs]
    return _first(lambda n: sum(shape.kv_bytes(n, limit) for limit in limits) - state, limits)


def _break_even_flops(pairs: Sequence[tuple[LayerCost, int]], shape: AttentionShape) -> int | None:
    """The first length at which decoding a token takes the converted layers fewer FLOPs than softmax would."""
    memory = sum(cost.memory_flops for cost, _ in pairs)
    limits, exact = [limit for _, limit in pairs], [cost.positions for cost, _ in pairs]
    return _first(lambda n: shape.softmax_flops(_seen(n, limits) - _seen(n, exact)) - memory, [*limits, *exact])


def _first(gain: Callable[[int], float], borders: Sequence[int]) -> int | None:
    """The first length at which `gain` is above 0; between two borders it only grows, or only falls."""
    low = 1
    for high in sorted({1, *borders}):
        if gain(high) > 0:
            return low + bisect_left(range(low, high), True, key=lambda n: gain(n) > 0)
        low = high
    return None
