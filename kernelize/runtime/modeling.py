"""The surgery: the original Transformers classes with a mixin in front, as a new model type `kernelized_<type>`.

Every original parameter keeps its name; the new ones are `<attention>.kernelize.*`. Projections, norms and positions
stay Transformers' own code; the attention calls `attention_function` with q, k, v after them. Classes are made when
they are first asked for. This file and its neighbours are copied beside the weights of every checkpoint.
"""

from __future__ import annotations

import copy
import inspect
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .attention import ATTENTION, KernelAttention, Rotary, attention_function
from .cache import CACHE, RELEASE, KernelState, adopt_cache, kernel_layers, refuse_overflow, refuse_second_draft
from .feature_maps import FeatureMap
from .layout import Layout, layout_of
from .spec import SCORES, KernelSpec, SpecError

VERSION = 1  # of the `kernelize` entry of a config
PREFIX = "kernelized_"
FALCON = "transformers.models.falcon.modeling_falcon"
CACHE_NAMES = ("cache", "past_key_values", "layer_past")  # of attention classes, through releases and families


class KernelizedAttentionMixin:
    """In front of an attention class: its forward gets no cache, the attention function gets the layer's state."""

    kernelize: KernelAttention
    layer_idx: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.take_state(kwargs)
        return super().forward(*args, kernelize_cache=state, **kwargs)  # type: ignore[misc]

    def take_state(self, kwargs: dict[str, Any]) -> KernelState | None:
        """Takes the cache out of `kwargs`, under whichever name the model passes it; the layer's state in it."""
        given = [kwargs.pop(name, None) for name in CACHE_NAMES]
        cache = next((cache for cache in given if cache is not None), None)
        return None if cache is None else self.state_in(cache)

    def state_in(self, cache: Cache) -> KernelState:
        return cache.layers[self.layer_idx]  # type: ignore[return-value]


class Offset:
    """Stands where an attention class asks its cache for a length, and keeps nothing."""

    def __init__(self, state: KernelState):
        self.state = state

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.state.get_seq_length()

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value


class OffsetAttentionMixin(KernelizedAttentionMixin):
    """For an attention class that scales queries by their position, which it takes from the cache (Llama 4)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.take_state(kwargs)
        kwargs[CACHE] = None if state is None else Offset(state)
        return super(KernelizedAttentionMixin, self).forward(  # type: ignore[misc]
            *args, kernelize_cache=state, **kwargs
        )


class DirectAttentionMixin(KernelizedAttentionMixin):
    """For an attention class that does not ask `AttentionInterface`: its `_attn(q, k, v)` is replaced.

    Nothing but q, k and v reaches `_attn`: state and layout wait on the module.
    """

    waiting_state: KernelState | None = None
    waiting_layout: Layout | None = None
    fixed_scaling: float | None = None  # None: head_dim ** -0.5

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.waiting_state = self.take_state(kwargs)
        return super(KernelizedAttentionMixin, self).forward(*args, **kwargs)  # type: ignore[misc]

    def _attn(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> tuple[Tensor, None]:
        y, _ = attention_function(
            self,  # type: ignore[arg-type]
            query,
            key,
            value,
            None,
            self.fixed_scaling,
            kernelize_cache=self.waiting_state,
            kernelize_layout=self.waiting_layout,
        )
        return y.transpose(1, 2), None


class UnscaledDirectAttentionMixin(DirectAttentionMixin):
    """GPT-Neo: scores are not scaled."""

    fixed_scaling = 1.0


class FalconAttentionMixin(DirectAttentionMixin):
    """Falcon computes softmax inside its forward; this is that forward, up to the queries and keys after rotation.

    Falcon repeats the keys of a group to all its query heads; here each is taken once.
    """

    def forward(
        self, hidden_states: Tensor, *_: Any, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[Tensor, None]:
        rotate = sys.modules[FALCON].apply_rotary_pos_emb
        q, k, v = self._split_heads(self.query_key_value(hidden_states))  # type: ignore[attr-defined]
        repeats = k.shape[2] // self.kernelize.kv_heads
        q, k, v = (x.transpose(1, 2) for x in (q, k[:, :, ::repeats], v[:, :, ::repeats]))
        self.waiting_state = self.take_state(kwargs)
        q, k = rotate(q, k, *position_embeddings)
        y = self._attn(q, k, v)[0]
        return self.dense(y.transpose(1, 2).flatten(2)), None  # type: ignore[attr-defined]


def projected(attention: Any, config: PreTrainedConfig) -> tuple[int, int, int]:
    """(query heads, key heads, head size) of the layer's own projections: they may differ from layer to layer."""
    size = attention.head_dim
    return attention.q_proj.out_features // size, attention.k_proj.out_features // size, size


def configured(attention: Any, config: PreTrainedConfig) -> tuple[int, int, int]:
    """The same from the config, where q, k and v come from one matrix."""
    return config.num_attention_heads, kv_heads_of(config), head_dim_of(config)


Positions = Callable[[Any, Any], Rotary | None]  # (model, attention) -> its rotary positions, if it has them


def rotary_at(path: str, interleaved: bool = False) -> Positions:
    """Rotary positions in every layer, by the module at `path`."""
    return lambda model, _: Rotary(model.get_submodule(path), interleaved=interleaved)


rotary_of_model = rotary_at("model.rotary_emb")


def rotary_where_used(interleaved: bool) -> Positions:
    """The same but for layers without positions."""
    return lambda model, attention: (
        Rotary(model.model.rotary_emb, interleaved=interleaved) if attention.use_rope else None
    )


def rotary_of_type(model: Any, attention: Any) -> Rotary:
    """Layers of different types have frequencies of their own."""
    return Rotary(model.model.rotary_emb, f"{attention.layer_type}_inv_freq")


def tabled_positions(model: Any, attention: Any) -> None:
    """Positions stand in a table (learned ones, and GPT-J's) that ends with the context: nothing is further back."""


@dataclass(frozen=True)
class Family:
    """Where a model type keeps its decoder layers, how a layer calls its self-attention, and what is odd."""

    layers: str = "model.layers"
    attention: str = "self_attn"
    note: str = ""
    shape: Callable[[Any, PreTrainedConfig], tuple[int, int, int]] = projected
    mixin: type = KernelizedAttentionMixin
    rotary: Positions = rotary_of_model
    refused: str = ""  # why it is not supported
    lacks: str = ""  # what Transformers' own attention of the layers that are kept cannot do, one of LACKS


CHANGING = {"dynamic", "longrope"}  # rotary positions whose frequencies depend on the length of the text
LACKS = ("packing", "static cache", "sdpa")
LOCAL = "layers with a native sliding window keep it"
FAMILIES: dict[str, Family] = {
    "bloom": Family(refused="ALiBi biases every score by the distance, which a memory of constant size cannot hold"),
    "cohere": Family(
        note="q/k norm where the config has it; parallel residual",
        rotary=rotary_at("model.rotary_emb", interleaved=True),
    ),
    "falcon": Family(
        "transformer.h", "self_attention", "its own forward; grouped heads; without ALiBi", configured,
        FalconAttentionMixin, rotary_at("transformer.rotary_emb"),
    ),
    "gemma": Family(),
    "gemma2": Family(note=f"{LOCAL}; soft-capped scores, in the window as in the slots; no sdpa", lacks="sdpa"),
    "gemma3_text": Family(note=f"{LOCAL}; q/k norm", rotary=rotary_of_type),
    "gpt2": Family("transformer.h", "attn", "learned positions", configured, rotary=tabled_positions),
    "gpt_bigcode": Family(
        "transformer.h", "attn", "learned positions; one key-value head", configured, rotary=tabled_positions
    ),
    "gpt_neo": Family(
        "transformer.h", "attn.attention", f"{LOCAL}; learned positions; scores are not scaled; no sdpa", configured,
        UnscaledDirectAttentionMixin, tabled_positions, lacks="static cache",
    ),
    "gpt_neox": Family(
        "gpt_neox.layers", "attention", "partial RoPE", configured, rotary=rotary_at("gpt_neox.rotary_emb")
    ),
    "gpt_oss": Family(note=f"{LOCAL}; its learned sinks stay in the normaliser", lacks="packing"),
    "gptj": Family(
        "transformer.h", "attn", "partial RoPE; no sdpa before 5.24", configured,
        DirectAttentionMixin if RELEASE < (5, 24) else KernelizedAttentionMixin, tabled_positions,
    ),
    "granite": Family(note="its own scaling"),
    "llama": Family(),
    "llama4_text": Family(
        note="chunked layers stay as they are; NoPE layers", mixin=OffsetAttentionMixin,
        rotary=rotary_where_used(interleaved=True),
        lacks="packing" if RELEASE < (5, 23) else "",
    ),
    "mistral": Family(note=LOCAL),
    "mixtral": Family(note=LOCAL),
    "mpt": Family(refused="ALiBi biases every score by the distance, which a memory of constant size cannot hold"),
    "olmo2": Family(note="q/k norm over all heads"),
    "opt": Family("model.decoder.layers", note="learned positions, offset by two", rotary=tabled_positions),
    "phi": Family(note="partial RoPE"),
    "phi3": Family(note=f"partial RoPE; {LOCAL}", shape=configured),
    "qwen2": Family(note=LOCAL),
    "qwen2_moe": Family(note=LOCAL),
    "qwen3": Family(note=f"q/k norm; {LOCAL}"),
    "qwen3_moe": Family(note=f"q/k norm; {LOCAL}"),
    "smollm3": Family(note=f"NoPE layers; {LOCAL}", rotary=rotary_where_used(interleaved=False)),
    "starcoder2": Family(note=LOCAL),
}  # fmt: skip


def supported() -> list[str]:
    """The model types that can be converted."""
    return sorted(name for name, family in FAMILIES.items() if not family.refused)


def family_of(model_type: str) -> Family:
    """The row of a model type, with or without the prefix; SpecError when there is none."""
    base = model_type.removeprefix(PREFIX)
    if base not in FAMILIES:
        raise SpecError(f"model type {base!r} is not supported; supported: {', '.join(supported())}")
    if FAMILIES[base].refused:
        raise SpecError(f"model type {base!r} is not supported: {FAMILIES[base].refused}")
    return FAMILIES[base]


def native_windows(config: PreTrainedConfig) -> set[int]:
    """Layers that look at a window of their own: they cost constant memory already, and are left as they are."""
    data = config.to_dict()
    types = data.get("layer_types") or data.get("attention_layers")
    if types:
        return {i for i, kind in enumerate(types) if kind not in ("full_attention", "global")}
    window = data.get("sliding_window")
    local = window is not None and window < config.max_position_embeddings
    return set(range(config.num_hidden_layers)) if local else set()


def rotary_context(config: PreTrainedConfig) -> int | None:
    """The positions that a model has, where keys can be moved among them: its frequencies must be the same at all
    lengths. None where they are not."""
    parameters = config.to_dict().get("rope_parameters") or {}
    kinds = {parameters.get("rope_type"), *(p.get("rope_type") for p in parameters.values() if isinstance(p, dict))}
    return None if kinds & CHANGING else config.max_position_embeddings


def refuse(config: PreTrainedConfig, layers: list[KernelSpec | None]) -> None:
    """Raises SpecError for what would not be right: a family, a layer with a native window, an odd config."""
    base, data = config.model_type, config.to_dict()
    if base.startswith(PREFIX):
        raise SpecError(f"the model is already kernelized ({base})")
    family_of(base)
    if all(spec is None for spec in layers):
        raise SpecError("the plan keeps softmax in every layer; nothing to convert")
    for field in ("alibi", "add_cross_attention", "use_bidirectional_attention"):
        if data.get(field):
            raise SpecError(f"{field}={data[field]!r} in the config of {base!r} is not supported; allowed: false")
    if FAMILIES[base].lacks == config._attn_implementation:
        raise SpecError(
            f"attn_implementation={config._attn_implementation!r} leaves out what {base!r} does with its scores; "
            "load the model with attn_implementation='eager'"
        )
    if rotary_context(config) is None and any(spec is not None and spec.reach for spec in layers):
        raise SpecError(f"reach: the rotary positions of this {base!r} change with the length; allowed: reach=0")
    if rotary_context(config) is None and any(spec is not None and spec.scores_by("forecast") for spec in layers):
        raise SpecError(
            f"policy: the rotary positions of this {base!r} change with the length, and a forecast looks at keys "
            f"without them; allowed: {', '.join(name for name in SCORES if name != 'forecast')}"
        )
    local = sorted(i for i in native_windows(config) if i < len(layers) and layers[i] is not None)
    if local:
        raise SpecError(
            f"layers {', '.join(map(str, local))} of {base!r} have a native sliding window: keep them as they are "
            "(null in the plan), or take the window out of the config first, which changes the model"
        )


def refuse_wrapped(model: nn.Module) -> None:
    """Raises SpecError for what is not the language model itself: its class is about to change, and its forward."""
    wanted: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model.config.model_type]]  # type: ignore[union-attr, index]
    if type(model) is not wanted:
        raise SpecError(
            f"a {type(model).__name__} cannot be converted, only a {wanted.__name__} of Transformers itself; merge "
            "adapters first (merge_and_unload), and compile or wrap what comes out"
        )
    if any("_hf_hook" in vars(module) for module in model.modules()):
        raise SpecError(
            "the model is spread over devices (device_map), whose hooks hold its attention as it was; convert it on "
            "one device, or with `kernelize convert --stream`, and spread what comes out"
        )


def attentions(model: nn.Module, model_type: str) -> dict[int, Any]:
    """Layer index -> self-attention module, for every decoder layer."""
    family = family_of(model_type)
    layers: Any = model.get_submodule(family.layers)
    return {i: layer.get_submodule(family.attention) for i, layer in enumerate(layers)}


def kernelized_layers(model: nn.Module) -> dict[int, Any]:
    """Layer index -> attention module, for the converted layers; `.kernelize` is its KernelAttention."""
    found = attentions(unwrapped(model), unwrapped(model).config.model_type)
    return {i: m for i, m in found.items() if isinstance(m, KernelizedAttentionMixin)}


def positions_of(length: int, layout: Layout | None, cache: Cache | None) -> Tensor | None:
    """Positions [B, T] of the new tokens without those of padding, as `generate` counts; None where there is none.

    To softmax it is all the same where a row begins. Feature maps see where a token stands.
    """
    valid = None if layout is None else layout.valid
    state = None if cache is None else kernel_layers(cache)[0].state
    if state is None:
        return None if valid is None else (valid.long().cumsum(1) - 1).clamp(min=0)
    new = torch.arange(1, length + 1, device=state.seen.device) if valid is None else valid.long().cumsum(1)
    return (state.seen[:, None].to(new.device) + new - 1).clamp(min=0)


def kernels_of(model: nn.Module) -> list[FeatureMap | KernelAttention]:
    """All modules with parameters that the surgery has added."""
    found = (m for attention in kernelized_layers(model).values() for m in attention.kernelize.modules())
    return [m for m in found if isinstance(m, (FeatureMap, KernelAttention))]


@torch.no_grad()
def reset_kernels(model: nn.Module) -> None:
    """Puts what the surgery has added at its initial values."""
    for module in kernels_of(model):
        module.reset()


def unwrapped(model: nn.Module) -> Any:
    """The Transformers model inside a PEFT or parallel wrapper."""
    while not isinstance(model, PreTrainedModel):
        model = next(m for m in model.children() if isinstance(m, nn.Module))
    return model


class KernelizedModelMixin:
    """In front of a ForCausalLM class: converts its attention when it is built, lays out every batch once."""

    _is_stateful = False  # for Transformers: the state can be rolled back, see KernelState.crop
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["kernelize"]
    config: Any

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self, plan_of(config))
        self.post_init()  # type: ignore[attr-defined]

    def initialize_weights(self) -> None:
        """Also of the kernels: Transformers asks the model inside, which does not know them. Loaded tensors stay."""
        super().initialize_weights()  # type: ignore[misc]
        reset_kernels(self)  # type: ignore[arg-type]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        kernelize_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the original, with a cache of constant size, by its older or newer name; logits are [B, T, V].

        `kernelize_mask` [B, T] stands for `attention_mask` where `generate` has made 4-D masks of it.
        """
        if issubclass(family_of(self.config.model_type).mixin, DirectAttentionMixin):
            decoder_of(self).waiting_mask = kernelize_mask
        else:
            kwargs["kernelize_mask"] = kernelize_mask
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )

    @property
    def converted(self) -> tuple[int, ...]:
        """Indices of the layers that hold a kernelized state."""
        return converted_in(self.config)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict:  # fmt: skip
        """Keeps the mask of the tokens; beside 4-D ones, which are made for static caches, that of the new tokens.

        A cache of states alone counts as one for which masks are made, and none is: then there would be no mask at all.
        """
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        made = inputs.get("attention_mask")
        if made is None and (attention_mask is None or type(inputs.get(CACHE)) is DynamicCache):
            return inputs if attention_mask is None else inputs | {"attention_mask": attention_mask}
        new = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        if attention_mask is None:  # generate has dropped it: all ones
            attention_mask = new.new_ones(new.shape[:2], dtype=torch.int64)
        if made is not attention_mask:
            inputs["kernelize_mask"] = attention_mask[:, -new.shape[1] :]
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        cache = model_kwargs.get(CACHE)
        if cache is not None:
            adopt_cache(cache, self.converted)
            if generation_config.is_assistant:  # said before the layers were there
                cache.activate_past_recording()

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """As the original; a cache that is handed on then records no more, where it did not before.

        Every token read with it later would keep the state before it, until somebody calls `crop`.
        """
        cache = kwargs.get(CACHE)
        silent = [] if cache is None else [layer for layer in kernel_layers(cache) if not layer.record_past]
        try:
            return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]
        finally:
            for layer in silent:
                layer.record_past = False

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it pages keys and values of all requests in one row, where a state cannot tell them apart."""
        raise NotImplementedError(
            "continuous batching (generate_batch) pages keys and values, and a kernelized layer has none; "
            "use generate() on a padded batch"
        )

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """The ordinary checkpoint, and beside it the runtime that loads it where kernelize is not installed."""
        module = Path(__file__).stem
        self.config.auto_map = {
            "AutoConfig": f"{module}.{type(self.config).__name__}",
            "AutoModelForCausalLM": f"{module}.{type(self).__name__}",
        }
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        for source in sorted(Path(__file__).parent.glob("*.py")):
            if source.name != "__init__.py":
                shutil.copy(source, Path(save_directory) / source.name)


# --- what a decoder reads -----------------------------------------------------------------------------------


def enter(decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Before a converted decoder reads: lays out the batch and puts states into the cache, for its attentions.

    A hook of the decoder, since trainers and those who want hidden states call it without the model around it.
    """
    if not decoder.kernelized:
        return args, kwargs
    names = ["input_ids"] if len(args) < 2 else [*inspect.signature(decoder.forward).parameters]
    return (), entering(decoder, **dict(zip(names[: len(args)], args, strict=True)), **kwargs)


def entering(
    decoder: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    kernelize_mask: Tensor | None = None,
    cache: Cache | None = None,
    past_key_values: Cache | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """What the original decoder is given for these arguments."""
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds, **kwargs}
    tokens, config = inputs_embeds if input_ids is None else input_ids, decoder.config
    if tokens is None:
        return given  # the original says what is missing
    if use_cache is None:
        use_cache = config.use_cache and not decoder.training
    cache = past_key_values if cache is None else cache
    if use_cache and cache is None:
        cache = DynamicCache(config=config)
    if cache is not None:
        adopt_cache(cache, converted_in(config))
    batch, length = tokens.shape[:2]
    mask = mask_of_tokens(decoder, attention_mask, kernelize_mask, batch, length)
    layout = layout_of(length, mask, position_ids, batch, cache is not None)
    if position_ids is None and family_of(config.model_type).rotary is not tabled_positions:
        # rotary: where a row begins is all the same to softmax
        position_ids = positions_of(length, layout, cache)
    refuse_for_kept(config, layout, cache, length)
    given |= {"position_ids": position_ids, "use_cache": cache is not None, CACHE: cache}
    return given | hand_over(decoder, layout)


def mask_of_tokens(decoder: Any, given: Any, kept: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The mask [B, ≥ T] of a batch of T new tokens: `given`, or what was kept beside the masks made of it."""
    if kept is None:
        kept, decoder.waiting_mask = decoder.waiting_mask, None
    mask = given if kept is None or (isinstance(given, Tensor) and given.ndim == 2) else kept
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise SpecError("attention_mask: a kernelized layer needs the mask of the tokens, [B, T], not a 4-D one")
    if mask is not None and (mask.shape[0] not in (1, batch) or mask.shape[1] < length):
        raise SpecError(f"attention_mask is {list(mask.shape)}, and the new tokens alone are {[batch, length]}")
    return mask


def hand_over(decoder: Any, layout: Layout | None) -> dict[str, Any]:
    """Lets the attentions know the layout: as an argument, or on those that get nothing but q, k and v."""
    family = family_of(decoder.config.model_type)
    if not issubclass(family.mixin, DirectAttentionMixin):
        return {"kernelize_layout": layout}
    for layer in decoder.get_submodule(family.layers.rpartition(".")[2]):
        layer.get_submodule(family.attention).waiting_layout = layout
    return {}


def refuse_for_kept(config: PreTrainedConfig, layout: Layout | None, cache: Cache | None, length: int) -> None:
    """Raises SpecError for what the softmax layers of this family would do wrong, where any are left."""
    lacks, base = family_of(config.model_type).lacks, config.model_type.removeprefix(PREFIX)
    if cache is not None and RELEASE < (5, 18):
        refuse_second_draft(cache)
    if cache is not None:
        refuse_overflow(cache, length)
    if not lacks or len(converted_in(config)) == config.num_hidden_layers:
        return
    packed = lacks == "packing" and layout is not None and layout.documents is not None
    static = lacks == "static cache" and isinstance(cache, StaticCache)
    if packed or static:
        raise SpecError(f"{lacks}: the softmax layers of {base!r} are wrong under it; convert them too, or avoid it")


def converted_in(config: Any) -> tuple[int, ...]:
    """Indices of the layers that the plan of a config converts."""
    # not through plan_of: this runs in every forward, and under torch.compile
    return tuple(i for i, spec in enumerate(config.kernelize["layers"]) if spec is not None)


def decoder_of(model: Any) -> Any:
    """The module that holds the layers: what the model calls for hidden states."""
    return model.get_submodule(family_of(model.config.model_type).layers.rpartition(".")[0])


# --- plan in the config -------------------------------------------------------------------------------------


def plan_of(config: PreTrainedConfig) -> list[KernelSpec | None]:
    """A spec a layer, None where softmax is kept."""
    entry = config.kernelize
    if not isinstance(entry, dict) or entry.get("version") != VERSION:
        raise SpecError(f"config.kernelize={entry!r} is not a plan of version {VERSION}")
    specs = [None if s is None else KernelSpec.from_dict(s) for s in entry["layers"]]
    if len(specs) != config.num_hidden_layers:
        raise SpecError(f"the plan has {len(specs)} layers, the model {config.num_hidden_layers}")
    return specs


def plan_entry(layers: list[KernelSpec | None]) -> dict:
    """What `config.kernelize` holds."""
    return {"version": VERSION, "layers": [None if s is None else s.to_dict() for s in layers]}


# --- surgery ------------------------------------------------------------------------------------------------


def kernelize_model(model: PreTrainedModel, layers: list[KernelSpec | None]) -> PreTrainedModel:
    """Turns `model` itself into its kernelized class; new parameters are at their initial values.

    Raises SpecError for a model type without a row, a model that is converted already or wrapped, or a plan that does
    not fit.
    """
    base = model.config.model_type
    refuse(model.config, layers)
    refuse_wrapped(model)
    config = kernelized_config(model.config, layers)
    plan_of(config)
    if vars(model).get("is_quantized"):  # and not from a file whose weights have become plain ones
        config.quantization_config = model.config.quantization_config
    old = model.config
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = config  # type: ignore[assignment]
    register(base)
    model.__class__ = model_class(base)
    install(model, layers)
    reset_kernels(model)
    return model


def kernelized_config(config: PreTrainedConfig, layers: list[KernelSpec | None]) -> PreTrainedConfig:
    data = config.to_dict()
    for field in ("model_type", "architectures", "quantization_config", "transformers_version", "auto_map"):
        data.pop(field, None)
    kind: Any = config_class(config.model_type)
    new = kind(**data, kernelize=plan_entry(layers))
    new.dtype = config.dtype
    new._attn_implementation_internal = config._attn_implementation
    return new


def install(model: Any, layers: list[KernelSpec | None]) -> None:
    """Puts a KernelAttention into every layer that has a spec; parameters are on the layer's device, float32."""
    config = model.config
    family = family_of(config.model_type)
    decoder = decoder_of(model)
    decoder.kernelized, decoder.waiting_mask = True, None
    decoder.register_forward_pre_hook(enter, with_kwargs=True)
    if all(spec is not None for spec in layers):
        # masks are made for the model's implementation, and no converted layer needs one (it would be T×T)
        config._attn_implementation_internal = ATTENTION
    for i, attention in attentions(model, config.model_type).items():
        spec = layers[i]
        if spec is None:
            continue
        attention.__class__ = attention_class(type(attention), family.mixin)
        attention.layer_idx = i
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation_internal = ATTENTION
        weight = next(attention.parameters())
        with torch.device(weight.device):
            attention.kernelize = KernelAttention(spec, *family.shape(attention, config)).float()
            attention.kernelize.rotary = family.rotary(model, attention)


@contextmanager
def softmax_twin(model: Any) -> Iterator[Any]:
    """Within the context `model` is of its original class again, with eager softmax attention on the same weights."""
    parts = list(kernelized_layers(model).values())
    changed = [model, *parts]
    classes = [type(part) for part in changed]
    configs = [model.config, *(part.config for part in parts)]
    kept = [config._attn_implementation_internal for config in configs]
    try:
        for part, kind in zip(changed, classes, strict=True):
            part.__class__ = kind.__bases__[1]  # after the mixin
        for config in configs:
            config._attn_implementation_internal = "eager"
        decoder_of(model).kernelized = False
        yield model
    finally:
        decoder_of(model).kernelized = True
        for part, kind in zip(changed, classes, strict=True):
            part.__class__ = kind
        for config, implementation in zip(configs, kept, strict=True):
            config._attn_implementation_internal = implementation


def kv_heads_of(config: PreTrainedConfig) -> int:
    """Key-value heads; model types without grouped heads do not name them."""
    data = config.to_dict()
    if data.get("multi_query") and not data.get("new_decoder_architecture"):  # GPT-BigCode, Falcon 7B
        return 1
    return data.get("num_key_value_heads") or data.get("num_kv_heads") or config.num_attention_heads


def head_dim_of(config: PreTrainedConfig) -> int:
    return config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads


# --- classes ------------------------------------------------------------------------------------------------

_CLASSES: dict[str, type] = {}


def attention_class(original: type, mixin: type) -> type:
    """The original attention class with the family's mixin in front."""
    name = f"Kernelized{original.__name__}"
    if name not in _CLASSES:
        _CLASSES[name] = type(name, (mixin, original), {"__module__": __name__})
    return _CLASSES[name]


def forward_as(original: type) -> Callable[..., Any]:
    """The mixin's forward with the signature of the original's, where Transformers reads what a model takes (`labels`,
    `logits_to_keep`, ...), and what the mixin takes besides."""
    signature = inspect.signature(original.forward)  # type: ignore[attr-defined]
    given = [x for x in signature.parameters.values() if x.kind != x.VAR_KEYWORD]
    names = [parameter.name for parameter in given]
    *own, rest = inspect.signature(KernelizedModelMixin.forward).parameters.values()
    more = [x.replace(kind=x.KEYWORD_ONLY) for x in own if x.name not in names]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return KernelizedModelMixin.forward(self, **dict(zip(names[1:], args, strict=False)), **kwargs)

    forward.__signature__ = signature.replace(parameters=[*given, *more, rest])  # type: ignore[attr-defined]
    return forward


def config_class(base: str) -> type[PreTrainedConfig]:
    return _classes(base)[0]


def model_class(base: str) -> type[PreTrainedModel]:
    return _classes(base)[1]


def _classes(base: str) -> tuple[type, type]:
    """(config class, model class) of a base model type, made and registered once."""
    original_config: type = CONFIG_MAPPING[base]
    original: Any = MODEL_FOR_CAUSAL_LM_MAPPING[original_config]
    config_name, model_name = f"Kernelized{original_config.__name__}", f"Kernelized{original.__name__}"
    if model_name not in _CLASSES:
        fields = {"model_type": PREFIX + base, "kernelize": None, "__module__": __name__}
        annotations = {"kernelize": "dict | None"}
        config = type(config_name, (original_config,), {**fields, "__annotations__": annotations})
        body = {"config_class": config, "__annotations__": {"config": config}, "__module__": __name__}
        body["forward"] = forward_as(original)
        if FAMILIES[base].lacks == "sdpa":  # older releases take it, and drop the soft caps
            body["_supports_sdpa"] = False
        _CLASSES[config_name] = config
        # weights may be stored otherwise than they are held: experts one by one, the head of GPT-NeoX by its older name
        for known, mine in ((base, PREFIX + base), (original.__name__, model_name)):
            mapping = get_checkpoint_conversion_mapping(known)
            if mapping is not None:
                register_checkpoint_conversion_mapping(mine, mapping, overwrite=True)
        # where the Trainer looks whether labels are shifted before it smoothes them
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[PREFIX + base] = model_name
        # named once more, for else the loader of remote code puts it in front of a copy of the class
        _CLASSES[model_name] = type(model_name, (KernelizedModelMixin, original, GenerationMixin), body)
    return _CLASSES[config_name], _CLASSES[model_name]


def register(*base_types: str) -> None:
    """Makes the Auto classes of Transformers know `kernelized_<type>` for these types; no argument: all of them.

    Importing a model's code takes time, so nothing is registered unasked. A remote copy is registered by its loader.
    """
    for base in base_types or supported():
        config, model = _classes(base)
        if not __name__.startswith("transformers_modules"):
            AutoConfig.register(PREFIX + base, config, exist_ok=True)
            AutoModelForCausalLM.register(config, model, exist_ok=True)


def __getattr__(name: str) -> type:
    """KernelizedLlamaForCausalLM and the like, by name: the loader of remote code asks for them, and pickle."""
    if name in _CLASSES:
        return _CLASSES[name]
    for base in supported():
        config: type = CONFIG_MAPPING[base]
        model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
        if name in (f"Kernelized{config.__name__}", f"Kernelized{model.__name__}"):
            _classes(base)
            return _CLASSES[name]
        attention = vars(sys.modules[model.__module__]).get(name.removeprefix("Kernelized"))
        if name.startswith("Kernelized") and name.endswith("Attention") and attention is not None:
            return attention_class(attention, FAMILIES[base].mixin)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
